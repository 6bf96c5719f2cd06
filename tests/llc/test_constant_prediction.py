"""The loss of a network that says the same of every sample, against what is known of the data."""

from __future__ import annotations

import math

import pytest
import torch
from cases import cross_entropy, half_squared_error
from torch import Tensor, nn
from torch.nn import functional

from phasewatch.objective import LossFn, Objective, split_off_misfit
from phasewatch.objective.constant import loss_of_constant_prediction

X = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))


def batched(module: nn.Module, y: Tensor, loss_fn: LossFn) -> Objective:
    """Batches of 70, the last one shorter."""
    return Objective(module, list(zip(X.split(70), y.split(70), strict=True)), loss_fn=loss_fn)


@pytest.mark.parametrize("probabilities", [(0.7, 0.2, 0.1), (0.97, 0.01, 0.02), (0.3, 0.3, 0.4)])
def test_cross_entropy(probabilities: tuple[float, ...]) -> None:
    """The entropy of the class frequencies."""
    torch.manual_seed(1)
    y = torch.multinomial(torch.tensor(probabilities), 300, replacement=True)
    objective = batched(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), y, cross_entropy)
    frequencies = torch.bincount(y, minlength=3) / 300
    entropy = float(torch.special.entr(frequencies).sum())
    assert loss_of_constant_prediction(objective) == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_squared_error(bias: bool) -> None:
    """Half the variance of the targets, also where the weights could not say so."""
    y = torch.randn(300, 3) * torch.tensor([1, 10.0, 0.1]) + torch.tensor([1000.0, 3, 0])
    objective = batched(nn.Linear(4, 3, bias=bias), y, half_squared_error)
    expected = float(y.double().var(dim=0, unbiased=False).sum()) / 2
    assert loss_of_constant_prediction(objective) == pytest.approx(expected, rel=1e-4)


def test_mean_output() -> None:
    """Without a fit: what a network with the mean output as its bias and no weights would lose."""
    torch.manual_seed(2)
    module, y = nn.Linear(4, 3), torch.randint(0, 3, (300,))
    objective = batched(module, y, cross_entropy)
    expected = float(functional.cross_entropy(module(X).detach().mean(0).expand(300, 3), y))
    assert loss_of_constant_prediction(objective, fitted=False) == pytest.approx(expected, rel=1e-5)


def test_sequences_have_a_constant_a_position() -> None:
    """The mean entropy of the tokens over positions; the sample axis is found by its length, here the second."""
    tokens = torch.multinomial(torch.rand(6, 10) + 0.1, 50, replacement=True)
    module = nn.Sequential(nn.Embedding(10, 5), nn.Linear(5, 10))

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return functional.cross_entropy(module(batch.T).flatten(0, 1), batch.T.flatten())

    frequencies = torch.stack([torch.bincount(row, minlength=10) for row in tokens]) / 50
    objective = Objective(module, [tokens.T], loss_fn=loss_fn)
    entropy = float(torch.special.entr(frequencies).sum(1).mean())
    assert loss_of_constant_prediction(objective) == pytest.approx(entropy, abs=1e-3)


def test_log_probabilities_are_not_fitted() -> None:
    """A constant could say more than certainty of every class at once."""
    module = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(dim=1))
    y = torch.randint(0, 3, (300,))
    objective = batched(module, y, lambda module, batch: functional.nll_loss(module(batch[0]), batch[1]))
    expected = float(functional.nll_loss(module(X).detach().mean(0).expand(300, 3), y))
    assert loss_of_constant_prediction(objective) == pytest.approx(expected, rel=1e-5)


def test_of_the_divergence() -> None:
    """The same replacement serves an objective that is itself read from the outputs."""
    torch.manual_seed(3)
    module, y = nn.Linear(4, 2), torch.randn(300, 2)
    divergence, _ = split_off_misfit(batched(module, y, half_squared_error))
    expected = float(module(X).detach().double().var(dim=0, unbiased=False).sum()) / 2
    assert loss_of_constant_prediction(divergence) == pytest.approx(expected, rel=1e-4)


class LossInside(nn.Module):
    """Returns its loss, and calls no module on the way to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).square().mean()


def test_unknown_where_the_outputs_cannot_be_seen() -> None:
    """A loss inside the module, no module called, shapes that differ between batches; and nothing is left changed."""
    for loss_fn in (lambda m, b: m(b), lambda m, b: m.weight.square().sum() + 0 * b.sum()):
        assert math.isnan(loss_of_constant_prediction(Objective(LossInside(), [X], loss_fn=loss_fn)))
    ragged = [X[:60].view(20, 3, 4), X[60:140].view(20, 4, 4)]
    objective = Objective(nn.Linear(4, 1), ragged, loss_fn=lambda m, b: m(b).square().mean())
    before = objective.loss()
    assert math.isnan(loss_of_constant_prediction(objective))
    assert torch.equal(objective.loss(), before)
