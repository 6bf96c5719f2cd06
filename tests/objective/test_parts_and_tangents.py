"""The first samples of a batch alone, and derivatives of the outputs along a direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phasewatch import Objective
from phasewatch.estimators.enough import enough


def mean_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def drawn(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(samples, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    return x, y


def test_the_first_samples_have_the_loss_that_they_have_alone() -> None:
    module, (x, y) = network(), drawn(10)
    few = Objective(module, [(x, y), drawn(4, 1)], loss_fn=mean_squared_error).first_samples(3)
    assert few is not None and (few.num_samples, few.num_batches) == (3, 1)
    assert few.loss().item() == pytest.approx(mean_squared_error(module, (x[:3], y[:3])).item())
    of_function = Objective(module, [(x, y)], loss_fn=mean_squared_error).behavioral().first_samples(3)
    moved = few.parameters + 0.1
    assert of_function is not None
    assert of_function.loss(moved).item() == pytest.approx(few.behavioral().loss(moved).item())


def test_a_loss_that_compares_samples_is_not_cut() -> None:
    def spread(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = module(batch[0])
        return (outputs - outputs.mean(0)).square().mean()

    assert Objective(network(), [drawn(10)], loss_fn=spread).first_samples(3) is None
    assert Objective(network(), [drawn(3)], loss_fn=mean_squared_error).first_samples(3) is None


def test_of_one_large_batch_and_of_many_small_ones_as_much_is_looked_at() -> None:
    one = Objective(network(), [drawn(100)], loss_fn=mean_squared_error)
    many = Objective(network(), [drawn(10, seed) for seed in range(10)], loss_fn=mean_squared_error)
    assert enough(one, 30).num_samples == enough(many, 30).num_samples == 30
    assert enough(one, 1).num_samples == 4
    assert enough(one) is one and enough(many) is many


def test_tangents_are_the_differences_of_the_outputs() -> None:
    objective = Objective(network(), [drawn(6)], loss_fn=mean_squared_error)
    direction = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (tangent,) = objective.output_tangents(direction, 0)
    up, down = (objective.outputs(objective.parameters + sign * 1e-5 * direction, 0)[0] for sign in (1, -1))
    assert tangent is not None and torch.allclose(tangent, (up - down) / 2e-5, rtol=1e-7, atol=1e-9)
