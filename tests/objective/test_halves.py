"""The same loss on half of the samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phasewatch import Objective


def half_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


def data(samples: int) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double(), torch.randn(samples, 3).double(), torch.randn(samples, 2).double()


def test_every_second_batch_or_sample() -> None:
    module, x, y = data(20)
    whole = Objective(module, [(x, y)], loss_fn=half_squared_error)
    half = whole.on_half()
    expected = Objective(module, [(x[::2], y[::2])], loss_fn=half_squared_error)
    assert half is not None and half.num_samples == 10 and whole.num_samples == 20
    torch.testing.assert_close(half.gradient(), expected.gradient())
    several = Objective(module, list(zip(x.split(8), y.split(8), strict=True)), loss_fn=half_squared_error)
    half = several.on_half()
    chosen = [(x[:8], y[:8]), (x[16:], y[16:])]
    expected = Objective(module, chosen, loss_fn=half_squared_error)
    assert half is not None and half.batch_weights == [8 / 12, 4 / 12]
    torch.testing.assert_close(half.gradient(), expected.gradient())
    moved = half.parameters + 0.1
    torch.testing.assert_close(half.losses(moved[None]), expected.losses(moved[None]))


@pytest.mark.parametrize("num_batches", [1, 3])
def test_of_what_is_made_of_the_outputs_and_of_some_parameters(num_batches: int) -> None:
    module, x, y = data(12)
    batches = list(zip(x.chunk(num_batches), y.chunk(num_batches), strict=True))
    kept = x[::2] if num_batches == 1 else torch.cat([x[:4], x[8:]])
    half = Objective(module, batches, loss_fn=half_squared_error).restricted_to("weight").behavioral().on_half()
    assert half is not None and half.num_parameters == 6
    moved = half.parameters + 1.0
    change = torch.ones(2, 3, dtype=torch.float64) @ kept.T
    torch.testing.assert_close(half.loss(moved), 0.5 * change.square().mean())
    assert float(half.loss()) == 0.0


def test_where_it_cannot_be_told_there_is_none() -> None:
    module, x, y = data(12)

    def comparing(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scores = module(batch[0]) @ batch[1].T
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))

    assert Objective(module, [(x, y)], loss_fn=comparing).on_half() is None
    assert Objective(module, [(x[:1], y[:1])], loss_fn=half_squared_error).on_half() is None

    def of_parts(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return module(batch["x"])[batch["chosen"]].square().mean()

    parts = {"x": x, "chosen": torch.tensor([0, 11, 3])}
    assert Objective(module, [parts], loss_fn=of_parts, batch_sizes=[12]).on_half() is None

    def of_length(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) - batch[1]).view(12, 2).square().mean()

    assert Objective(module, [(x, y)], loss_fn=of_length).on_half() is None
