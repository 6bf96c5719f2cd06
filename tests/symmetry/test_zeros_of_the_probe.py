"""Zeros that say only that the probe is small, told from those that the data leave whatever its size."""

from __future__ import annotations

import pytest
import torch
from cases import at_own_outputs, cross_entropy, dense_nullity, half_squared_error, mlp, normal, seeded
from torch import Tensor, nn

from phasewatch.estimators import SymmetryLedger
from phasewatch.objective import Objective
from phasewatch.symmetry import ZeroLedger, explain_zeros


def ledger_of(module: nn.Module, x: Tensor, large: bool = False) -> ZeroLedger:
    return explain_zeros(module, at_own_outputs(module, x), dense_below=0 if large else 5000)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
def test_dead_pixels_are_the_data_s_and_missing_samples_the_probe_s(large: bool, batches: int) -> None:
    """Of 30 pixels 5 are dead. 18 samples leave 26 - 18 directions more unseen by each of 6 units; 200 leave none."""
    module = seeded(mlp(30, 6, 24, activation=nn.Tanh), scale=0.5)
    for samples, missing in ((18, 6 * (26 - 18)), (200, 0)):
        x = normal(samples, 30)
        x[:, [0, 7, 8, 20, 29]] = 0.0
        ledger = explain_zeros(module, at_own_outputs(module, x, batches), dense_below=0 if large else 5000)
        assert (ledger.non_generic["data rank"], ledger.probe) == (6 * 5, missing)
        assert len(ledger.zero_space()) == ledger.certified == 6 * 5 + missing
        # What 18 samples let the layers do to each other's effects is not in the ledger.
        assert ledger.certified <= dense_nullity(module, x) and (
            missing or ledger.certified == dense_nullity(module, x)
        )


@pytest.mark.parametrize("large", [False, True])
def test_inputs_of_few_kinds_are_the_data_s_where_each_is_there_again(large: bool) -> None:
    """12 kinds of samples of 20 pixels: seen once each they tell of a 13th, seen ten times they are all there are."""
    kinds, missing = normal(12, 20), 4 * (21 - 12)
    module = seeded(mlp(20, 4, 15, activation=nn.Tanh), scale=0.5)
    once, often = ledger_of(module, kinds, large), ledger_of(module, kinds.repeat(10, 1), large)
    assert (once.non_generic["data rank"], once.probe) == (0, missing)
    assert (often.non_generic["data rank"], often.probe) == (missing, 0)


def test_what_a_unit_of_few_samples_does_not_see_is_the_probe_s() -> None:
    """A unit that is on for 3 of 60 samples is free in 7 - 3 directions, on 6 times as many it is free in none."""
    for on, free in ((3, 4), (18, 0)):
        module, x = seeded(mlp(6, 5, 7, activation=nn.ReLU), scale=1.0), normal(60, 6)
        with torch.no_grad():
            module[0].bias += 1.0
            heights = (x @ module[0].weight[2]).sort(descending=True).values
            module[0].bias[2] = -(heights[on - 1] + heights[on]) / 2
        ledger = ledger_of(module, x)
        assert (ledger.non_generic["data rank"], ledger.probe) == (0, free)
        assert ledger.certified == dense_nullity(module, x)


def test_each_sample_counts_once_for_all_its_positions() -> None:
    """Tokens of one sentence are seen together: 3 sentences of 4 tokens are as many samples as directions allow."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(15, 4), nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    module, x = seeded(Tagger(), scale=0.5), normal(3, 4, 15)
    objective = Objective(module, [(x, module(x).detach())], loss_fn=half_squared_error, batch_sizes=[3])
    ledger = explain_zeros(module, objective, dense_below=0)
    assert (ledger.non_generic["data rank"], ledger.probe) == (0, 4 * (16 - 12))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("position", ["last", "second"])
def test_fewer_outputs_than_parameters(large: bool, position: str) -> None:
    """The rank of the matrix is at most samples times classes less one, by the Jacobian of the probabilities."""

    class Transposed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(1, 2)

    if position == "last":
        module, x, labels = seeded(mlp(3, 9, 4, activation=nn.Tanh)), normal(11, 3), torch.arange(11) % 4
    else:
        module = seeded(Transposed(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 4)))
        x, labels = normal(4, 3, 3), torch.arange(12).view(4, 3) % 4  # to class scores of shape (4, 4, 3)
    objective = Objective(module, [(x, labels)], loss_fn=cross_entropy)
    ledger = explain_zeros(module, objective, dense_below=0 if large else 5000)
    rank = labels.numel() * 3
    assert ledger.rank_limit == rank < ledger.num_parameters == 76
    assert ledger.certified == 76 - rank
    assert ledger.probe == 76 - rank - ledger.generic - ledger.non_generic["data rank"]
    if not large:
        assert ledger.nullity == 76 - rank and ledger.unexplained == 0
    if position == "last":
        assert dense_nullity(module, x, softmax=True) == 76 - rank


@pytest.mark.parametrize("dense_below", [0, 5000])
def test_as_a_signal(dense_below: int) -> None:
    module = seeded(mlp(30, 6, 24, activation=nn.Tanh), scale=0.5)
    x = normal(18, 30)
    x[:, 3] = 0.0
    objective = Objective(module, [(x, torch.zeros(18, 24, dtype=torch.float64))], loss_fn=half_squared_error)
    found = SymmetryLedger(dense_below=dense_below).read(objective, 18, 0).estimates
    missing = 6 * (30 - 18)
    assert (found["zeros_data_rank"].value, found["zeros_probe"].value) == (6, missing)
    assert found["zeros_certified"].value == 6 + missing
    assert found["nullity_ggn_lower"].value >= 6 + missing


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_what_the_probe_s_size_makes_need_not_be_looked_for_unit_by_unit(activation: type[nn.Module]) -> None:
    """12 samples of 40 pixels, 5 of them dead, and 10 units: as many zeros by cause as all directions tell."""
    module = seeded(mlp(40, 10, 3, activation=activation), scale=0.5)
    x = normal(12, 40)
    x[:, [0, 7, 8, 20, 29]] = 0.0
    large, thorough = ledger_of(module, x, large=True), ledger_of(module, x)
    assert large.rank_limit == 36 and large.certified == thorough.certified == 40 * 10 + 10 + 33 - 36
    assert large.certified == dense_nullity(module, x)
    assert large.non_generic["data rank"] >= 5 * 10 - 41 * large.non_generic["dead"]
    if activation is nn.Tanh:
        assert large.non_generic["data rank"] == 5 * 10
