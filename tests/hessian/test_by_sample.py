"""The Gauss-Newton matrix as a sum over samples, against the same column by column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cross_entropy, half_squared_error, mlp, normal
from torch import Tensor, nn

from phasewatch.hessian import GaussNewtonOperator
from phasewatch.hessian.by_sample import MOST_OUTPUTS, gauss_newton_by_sample
from phasewatch.isolation import isolated
from phasewatch.objective import Objective

LABELS = torch.arange(30) % 4


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two of different sizes."""
    return [(x[:20], y[:20]), (x[20:], y[20:])]


class TwoHeads(nn.Module):
    """Says two things of each sample, one of them in a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.other = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.other(hidden).unflatten(1, (2, 2)), self.one(hidden)


def of_two_heads(module: nn.Module, batch: Any) -> Tensor:
    grid, pair = module(batch[0])
    return (grid - 1).pow(4).mean() + (grid[:, 0] + 2 * pair - batch[1][:, None]).square().sum(1).mean()


def convolution() -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(48, 4)]
    net = nn.Sequential(*layers).double()
    net(normal(30, 1, 6, 6, seed=5))  # so that the running means are those of data
    return net


def cross_entropies() -> Objective:
    return Objective(mlp(5, 6, 4), batches(normal(30, 5), LABELS), loss_fn=cross_entropy)


def with_loss(loss: Callable[[Tensor], Tensor], outputs: int = 4) -> Objective:
    return Objective(mlp(5, 6, outputs), [normal(30, 5)], loss_fn=lambda module, x: loss(module(x)))


EXACT = {
    "cross-entropy": cross_entropies,
    "divergence": lambda: cross_entropies().behavioral(),
    "in the outputs": lambda: cross_entropies().behavioral("outputs"),
    "some parameters": lambda: cross_entropies().restricted_to("0.weight", "2.bias"),
    "squared errors": lambda: Objective(
        mlp(5, 6, 2), batches(normal(30, 5), normal(30, 2)), loss_fn=half_squared_error
    ),
    "two heads": lambda: Objective(TwoHeads().double(), batches(normal(30, 5), normal(30)), loss_fn=of_two_heads),
    "convolution": lambda: Objective(convolution(), batches(normal(30, 1, 6, 6), LABELS), loss_fn=cross_entropy),
    "flat": lambda: with_loss(lambda y: y.sum()),
}


def both(objective: Objective) -> tuple[Tensor, Tensor | None]:
    with isolated():
        return GaussNewtonOperator(objective).dense(), gauss_newton_by_sample(GaussNewtonOperator(objective))


@pytest.mark.parametrize("block_memory", [1, 2**23])
@pytest.mark.parametrize("name", EXACT)
def test_it_is_the_matrix_column_by_column(monkeypatch: pytest.MonkeyPatch, name: str, block_memory: int) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("phasewatch.hessian.by_sample.BLOCK_MEMORY", block_memory)
    expected, found = both(EXACT[name]())
    assert found is not None and torch.equal(found, found.T)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))
    assert bool(expected.any()) is (name != "flat")


OTHERS: dict[str, Callable[[], Objective]] = {
    "batch norm in training mode": lambda: Objective(
        convolution(), batches(normal(30, 1, 6, 6), LABELS), loss_fn=cross_entropy, mode="train"
    ),
    "dropout in training mode": lambda: Objective(
        nn.Sequential(mlp(5, 6), nn.Dropout()), batches(normal(30, 5), LABELS), loss_fn=cross_entropy, mode="train"
    ),
    "a loss that compares samples": lambda: with_loss(lambda y: y.var(0).mean()),
    "a loss that bends down": lambda: with_loss(lambda y: y.sin().mean()),
    "many outputs": lambda: with_loss(lambda y: y.square().mean(), MOST_OUTPUTS + 1),
    "a loss that decides by values": lambda: with_loss(lambda y: y.square().mean() if y.sum() > -1e9 else y.mean()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_not_made_of_samples_that_are_not_alone(name: str) -> None:
    expected, found = both(OTHERS[name]())
    assert found is None and bool(expected.any())


def test_what_is_not_finite_is_an_error_that_says_why() -> None:
    module = nn.Linear(2, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    objective = Objective(module, [torch.ones(4, 2)], loss_fn=lambda m, x: m(x).abs().pow(1.5).mean())
    with isolated(), pytest.raises(ValueError, match="Gauss-Newton matrix is not finite although the loss is"):
        gauss_newton_by_sample(GaussNewtonOperator(objective))
