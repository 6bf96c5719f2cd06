"""What is read of checkpoints of each kind, as the programs write them that do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phasewatch.sweep.checkpoints import find_checkpoints, in_order
from phasewatch.sweep.formats import CheckpointError, UnsafeCheckpointError, read_checkpoint
from phasewatch.sweep.weights import load_weights

HUGGING_FACE = Path(__file__).parent / "hugging_face"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def state(value: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in network().state_dict().items()}


class Own(nn.Module):
    """The network whose checkpoints are in ``hugging_face``; there each weight is minus half of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(2, 1)


def value_in(path: Path, module: nn.Module) -> float:
    """What all weights are that a checkpoint gives."""
    load_weights(module, read_checkpoint(path), path)
    [value] = {value for tensor in module.state_dict().values() for value in tensor.flatten().tolist()}
    return float(value)


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HUGGING_FACE, tmp_path / "hugging_face"))


def test_what_the_trainer_of_hugging_face_leaves_behind(hugging_face: Path) -> None:
    """The folder of a run is itself a checkpoint, the final one, and holds the others: 12 comes before 4 by name."""
    checkpoints, said = in_order(find_checkpoints([hugging_face / "trainer"]))
    assert [(c.step, c.path.name) for c in checkpoints] == [(k, f"checkpoint-{k}") for k in (4, 8, 12)]
    assert [value_in(c.path, Own()) for c in checkpoints] == [-2.0, -4.0, -6.0]
    assert len(said) == 1 and "nothing says of which step they are" in said[0] and said[0].endswith("/trainer.")
    assert find_checkpoints([hugging_face / "trainer" / "checkpoint-4"]) == [hugging_face / "trainer" / "checkpoint-4"]


def test_the_step_is_what_the_trainer_says_and_where_that_is_torn_the_name(hugging_face: Path) -> None:
    first, second = (hugging_face / "trainer" / f"checkpoint-{step}" for step in (4, 8))
    told = json.loads((first / "trainer_state.json").read_text())
    (first / "trainer_state.json").write_text(json.dumps({**told, "global_step": 400}))
    (second / "trainer_state.json").write_text('{"global_st')
    checkpoints, said = in_order([first, second])
    assert [(c.step, c.path) for c in checkpoints] == [(8, second), (400, first)] and not said


def test_weights_in_parts_are_put_together(hugging_face: Path) -> None:
    folder = hugging_face / "in_parts" / "checkpoint-12"
    parts = sorted(folder.glob("model-*.safetensors"))
    [checkpoint], _ = in_order(find_checkpoints([hugging_face / "in_parts"]))
    assert (checkpoint.step, checkpoint.path) == (12, folder) and value_in(folder, Own()) == -6.0 and len(parts) > 1
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{parts[1].name} cannot be read .*[Nn]o such file"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"first.weight": "../trainer/model.safetensors"}}, "expected files right in its own folder"),
        ({"weight_map": {"first.weight": "/model.safetensors"}}, "expected files right in its own folder"),
        ({"weight_map": ["model.safetensors"]}, "expected a weight_map"),
        ([], "expected a weight_map"),
    ],
)
def test_an_index_names_what_lies_beside_it_alone(index: Any, message: str, hugging_face: Path) -> None:
    folder = hugging_face / "in_parts" / "checkpoint-12"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize("in_parts", [False, True])
def test_folders_with_weights_by_torch(in_parts: bool, tmp_path: Path) -> None:
    """As earlier versions of transformers wrote them."""
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    if in_parts:
        parts = {name: f"pytorch_model-{k + 1:05d}-of-00004.bin" for k, name in enumerate(state())}
        for name, part in parts.items():
            torch.save({name: state(3)[name]}, folder / part)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    else:
        torch.save(state(3), folder / "pytorch_model.bin")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    assert find_checkpoints([tmp_path]) == [folder] and value_in(folder, network()) == 3
    [checkpoint], _ = in_order([folder])
    assert checkpoint.step == 500


def test_a_folder_whose_weights_were_never_written_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    torch.save({"state": {}}, folder / "optimizer.pt")
    assert find_checkpoints([tmp_path]) == [folder]
    with pytest.raises(CheckpointError, match=r"holds no weights; expected model.safetensors or pytorch_model.bin"):
        read_checkpoint(folder)


def test_a_folder_of_safetensors_is_no_checkpoint_itself(tmp_path: Path) -> None:
    for name in ("model-10", "model-9", "model"):
        save_file(state(len(name)), tmp_path / f"{name}.safetensors")
    checkpoints, said = in_order(find_checkpoints([tmp_path]))
    assert [(c.step, c.path.name) for c in checkpoints] == [(9, "model-9.safetensors"), (10, "model-10.safetensors")]
    assert [value_in(c.path, network()) for c in checkpoints] == [7, 8] and "model.safetensors" in said[0]


def test_the_step_in_the_metadata_of_safetensors_counts_before_the_name(tmp_path: Path) -> None:
    path = tmp_path / "model-3.safetensors"
    save_file(state(4), path, metadata={"format": "pt", "global_step": "70"})
    [checkpoint], _ = in_order([path])
    assert checkpoint.step == 70 and value_in(path, network()) == 4
    save_file(state(4), path, metadata={"step": "many"})
    [checkpoint], _ = in_order([path])
    assert checkpoint.step == 3


def test_safetensors_that_are_torn_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model-3.safetensors"
    save_file(state(4), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"is not installed: pip install 'phasewatch\[safetensors\]'"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("old_format", [False, True])
def test_what_torch_saves(suffix: str, old_format: bool, tmp_path: Path) -> None:
    for step in (100, 20):
        path = tmp_path / f"model-{step}{suffix}"
        torch.save(state(step), path, _use_new_zipfile_serialization=not old_format)
    checkpoints, _ = in_order(find_checkpoints([tmp_path]))
    assert [(c.step, value_in(c.path, network())) for c in checkpoints] == [(20, 20.0), (100, 100.0)]


class Coded:
    """What no plain checkpoint holds."""

    reads: list[str] = []

    def __setstate__(self, state: Any) -> None:
        Coded.reads.append("run")


@pytest.mark.parametrize("old_format", [False, True])
def test_what_would_run_code_is_refused_by_name(old_format: bool, tmp_path: Path) -> None:
    Coded.reads.clear()
    content = {"state_dict": state(), "step": 3, "config": Coded()}
    content["config"].__dict__["a"] = 1
    path = tmp_path / "model.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UnsafeCheckpointError, match=r"it asks for .*test_sweep_formats\.Coded.*--trust") as refused:
        in_order([path])
    assert not Coded.reads and "state_dict() alone" in str(refused.value)
    [checkpoint], _ = in_order([path], trust=True)
    assert checkpoint.step == 3 and Coded.reads


def test_a_whole_module_is_refused_and_trusted(tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    torch.save(network(), path)
    with pytest.raises(UnsafeCheckpointError, match=r"torch.nn.modules.container.Sequential"):
        read_checkpoint(path)
    load_weights(network(), read_checkpoint(path, trust=True), path)


def test_a_program_is_refused_and_trusted(tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    torch.jit.script(network()).save(path)
    with pytest.raises(UnsafeCheckpointError, match=r"it asks for a program \(TorchScript\).*--trust"):
        read_checkpoint(path)
    module = network()
    load_weights(module, read_checkpoint(path, trust=True), path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_checkpoint_is_told_without_advice_to_run_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model-1{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(CheckpointError, match="is a pointer to a file in Git LFS; fetch the file itself"):
        read_checkpoint(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint") as told:
        read_checkpoint(path)
    assert "weights_only" not in str(told.value)
