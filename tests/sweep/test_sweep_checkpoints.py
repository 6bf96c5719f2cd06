"""Finding, ordering and reading checkpoints, and loading their weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch.sweep.checkpoints import Checkpoint, find_checkpoints, in_order, step_in_name, step_of
from phasewatch.sweep.formats import CheckpointError
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
