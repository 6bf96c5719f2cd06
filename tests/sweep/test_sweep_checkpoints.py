"""Finding, ordering and reading checkpoints, and loading their weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch.sweep.checkpoints import (
    Checkpoint,
    CheckpointError,
    UnsafeCheckpointError,
    find_checkpoints,
    in_order,
    read_checkpoint,
    step_in_name,
    step_of,
)
from phasewatch.sweep.weights import load_weights


def network(width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))


def state(value: float = 1.0, width: int = 2) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in network(width).state_dict().items()}


def saved(content: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("model-500.pt", 500),
        ("epoch=3-step=1200.ckpt", 1200),
        ("step_70_of_90.pt", 70),
        ("resnet18_5.pth", 5),
        ("acc=0.95-200.pt", 200),
        ("acc=0.95.pt", None),
        ("checkpoint-1500", 1500),
        ("last.ckpt", None),
    ],
)
def test_the_step_in_a_name(name: str, step: int | None) -> None:
    assert step_in_name(Path(name)) == step


@pytest.mark.parametrize(
    ("content", "step"),
    [
        ({"global_step": 40, "step": 3}, 40),
        ({"step": 7}, 7),
        ({"iteration": 0}, 0),
        ({"step": True}, 9),
        ({"step": -1}, 9),
        ({"step": torch.tensor(3.0)}, 9),  # a parameter of that name
        ({"epoch": 2}, 9),
        ([], 9),
    ],
)
def test_what_is_written_in_a_checkpoint_counts_before_its_name(content: Any, step: int) -> None:
    assert step_of(Path("model-9.pt"), content) == step


def test_their_order_is_that_of_their_steps(tmp_path: Path) -> None:
    saved({"state_dict": state(1), "global_step": 900}, tmp_path / "a-1.ckpt")
    saved({"state_dict": state(2), "global_step": 20}, tmp_path / "b-2.ckpt")
    saved(state(3), tmp_path / "model-100.pt")
    (tmp_path / "notes.txt").write_text("none")
    checkpoints, said = in_order(find_checkpoints([tmp_path]))
    assert [(c.step, c.path.name) for c in checkpoints] == [(20, "b-2.ckpt"), (100, "model-100.pt"), (900, "a-1.ckpt")]
    assert not said


def test_a_copy_is_left_out_and_a_link_counts_once(tmp_path: Path) -> None:
    first = saved({"state_dict": state(1), "global_step": 20}, tmp_path / "step=20.ckpt")
    saved({"state_dict": state(1), "global_step": 20}, tmp_path / "z-last.ckpt")
    os.symlink(first, tmp_path / "zz-best.ckpt")
    saved(state(5), tmp_path / "best.pt")
    checkpoints, said = in_order(find_checkpoints([tmp_path]))
    assert checkpoints == [Checkpoint(first, 20)]
    assert len(said) == 2 and "holds the same weights as" in said[0] and "nothing says of which step" in said[1]
    saved({"state_dict": state(2), "global_step": 20}, tmp_path / "z-last.ckpt")
    with pytest.raises(CheckpointError, match=r"step=20.ckpt and .*z-last.ckpt are both of step 20 and hold different"):
        in_order(find_checkpoints([tmp_path]))


def test_without_any_step_it_asks_for_one(tmp_path: Path) -> None:
    saved(state(), tmp_path / "final.pt")
    with pytest.raises(CheckpointError, match=r"No checkpoint says of which step .*final.pt.* such as model-500.pt"):
        in_order(find_checkpoints([tmp_path]))


def test_folders_are_searched_below_where_nothing_lies_right_there(tmp_path: Path) -> None:
    deep = saved(state(), tmp_path / "version_0" / "checkpoints" / "step=1.ckpt")
    assert find_checkpoints([tmp_path]) == [deep]
    top = saved(state(), tmp_path / "step=2.ckpt")
    assert find_checkpoints([tmp_path]) == [top]
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoints([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .*empty or below it; expected files that end in .ckpt"
    ):
        find_checkpoints([tmp_path / "empty"])
    with pytest.raises(CheckpointError, match="No checkpoint was given"):
        find_checkpoints([])


def hugging_face(folder: Path, step: int, value: float, sharded: bool = False) -> None:
    """As ``transformers.Trainer`` writes it."""
    weights = state(value)
    if sharded:
        parts = {name: f"pytorch_model-{k + 1:05d}-of-00004.bin" for k, name in enumerate(weights)}
        for name, part in parts.items():
            saved({name: weights[name]}, folder / part)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    else:
        saved(weights, folder / "pytorch_model.bin")
    saved({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    saved({}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0}))


@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_hugging_face(sharded: bool, tmp_path: Path) -> None:
    for step in (1000, 500):
        hugging_face(tmp_path / f"checkpoint-{step}", step, step, sharded)
    checkpoints, said = in_order(find_checkpoints([tmp_path]))
    assert [(c.step, c.path.name) for c in checkpoints] == [(500, "checkpoint-500"), (1000, "checkpoint-1000")]
    module = network()
    load_weights(module, read_checkpoint(checkpoints[0].path), checkpoints[0].path)
    assert not said and all((tensor == 500).all() for tensor in module.state_dict().values())
    assert find_checkpoints([tmp_path / "checkpoint-500"]) == [tmp_path / "checkpoint-500"]


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model-3.safetensors"
    try:
        from safetensors.torch import save_file
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="is not installed: pip install safetensors"):
            read_checkpoint(path)
        return
    save_file(state(4), path)
    module = network()
    load_weights(module, read_checkpoint(path), path)
    assert all((tensor == 4).all() for tensor in module.state_dict().values())
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)


class Own:
    """What no plain checkpoint holds."""

    reads: list[str] = []

    def __setstate__(self, state: Any) -> None:
        Own.reads.append("run")


@pytest.mark.parametrize("old_format", [False, True])
def test_what_would_run_code_is_refused_by_name(old_format: bool, tmp_path: Path) -> None:
    Own.reads.clear()
    content = {"state_dict": state(), "step": 3, "config": Own()}
    content["config"].__dict__["a"] = 1
    path = tmp_path / "model.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UnsafeCheckpointError, match=r"it asks for .*test_sweep_checkpoints\.Own.*--trust") as refused:
        in_order([path])
    assert not Own.reads and "state_dict() alone" in str(refused.value)
    [checkpoint], _ = in_order([path], trust=True)
    assert checkpoint.step == 3 and Own.reads


def test_a_whole_module_is_refused_and_trusted(tmp_path: Path) -> None:
    path = saved(network(), tmp_path / "model-1.pt")
    with pytest.raises(UnsafeCheckpointError, match="torch.nn.modules.container.Sequential"):
        read_checkpoint(path)
    module = network()
    load_weights(module, read_checkpoint(path, trust=True), path)


@pytest.mark.parametrize(
    "content",
    [
        state(7),
        {"module." + name: tensor for name, tensor in state(7).items()},
        {"_orig_mod.module." + name: tensor for name, tensor in state(7).items()},
        {"model_state_dict": state(7), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        {"epoch": 1, "net": {"weights": state(7)}},
        {"state_dict": state(7), "ema": state(3)},
    ],
)
def test_weights_are_found_where_programs_put_them(content: Any) -> None:
    module = network()
    load_weights(module, content, Path("model.pt"))
    assert all((tensor == 7).all() for tensor in module.state_dict().values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (state(width=3), r"of another network than Sequential: 0.weight is \(3, 3\) there and \(2, 3\) in the network"),
        ({"0.weight": torch.ones(2, 3)}, "it lacks 0.bias, 1.weight, 1.bias"),
        (
            {**state(), "2.weight": torch.ones(1), "2.bias": torch.ones(1)},
            "it has 2.weight, 2.bias, which the network has not",
        ),
        ({"state_dict": {"a": torch.ones(1)}}, r"model.pt \(state_dict\) is of another network"),
        ({"ema": state(1), "raw": state(2)}, "several sets of weights that fit: ema, raw"),
        ({"step": 3}, "holds no weights"),
        ([], "holds no weights"),
    ],
)
def test_weights_of_another_network_are_told_apart(content: Any, message: str) -> None:
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(module, content, Path("model.pt"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_tied_weight_is_there_under_one_name() -> None:
    """As safetensors keeps it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = nn.Embedding(5, 2)
            self.outputs = nn.Linear(2, 5, bias=False)
            self.outputs.weight = self.inputs.weight

    module = Tied()
    load_weights(module, {"inputs.weight": torch.full((5, 2), 3.0)}, Path("model.pt"))
    assert (module.outputs.weight == 3).all()
    with pytest.raises(CheckpointError, match="it lacks inputs.weight, outputs.weight"):
        load_weights(module, {"other": torch.ones(1)}, Path("model.pt"))


def test_lazy_parameters_take_the_shape_that_was_saved() -> None:
    module = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    load_weights(module, state(2), Path("model.pt"))
    assert module[0].weight.shape == (2, 3) and (module[0].weight == 2).all()
