"""Segments of moves against delayed acceptance written out; what jumps of the potential come to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phasewatch.llc.leapfrog import State
from phasewatch.llc.minibatches import heating, variance_over_batches
from phasewatch.llc.second_stage import ENOUGH_TESTS, MOVES_PER_COST, SecondStage

CHAINS = 4_000


class Posterior:
    """Whose nonlinear misfit is the first coordinate."""

    cost_of_nonlinear_misfit = 20.0
    ignored = False

    def nonlinear_misfit(self, positions: Tensor) -> Tensor:
        return positions[:, 0]

    def ignore_nonlinear_misfit(self) -> None:
        self.ignored = True


def standing_at(misfit: float) -> State:
    positions = torch.full((CHAINS, 2), misfit, dtype=torch.float64)
    zeros = torch.zeros(CHAINS, dtype=torch.float64)
    return State(positions, torch.ones_like(positions), torch.zeros_like(positions), zeros, zeros, zeros)


def stage_at(posterior: Any, misfit: float) -> SecondStage:
    stage = SecondStage(posterior, standing_at(misfit))
    stage.begin(standing_at(misfit), torch.full((CHAINS,), misfit, dtype=torch.float64))
    return stage


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.0 + math.log(2)), (3.0, 1.0), (0.0, 1.5)])
def test_a_segment_is_taken_with_metropolis_probability(before: float, after: float) -> None:
    """Of 4,000 chains, within 4 standard errors, P(fail) < 1e-4 a case. The others begin again, turned round."""
    stage = stage_at(Posterior(), before)
    stage.binding = True
    state, taken, misfit = stage.test(standing_at(after), np.random.default_rng(0))
    expected = min(1.0, math.exp(before - after))
    assert abs(float(taken.double().mean()) - expected) <= 4 * math.sqrt(expected * (1 - expected) / CHAINS)
    assert stage.acceptance == pytest.approx(float(taken.double().mean()))
    torch.testing.assert_close(state.positions[:, 0], torch.where(taken, after, before).double())
    torch.testing.assert_close(state.momenta[:, 0], torch.where(taken, 1.0, -1.0).double())
    torch.testing.assert_close(misfit, state.positions[:, 0])


def test_before_it_binds_it_is_counted_alone() -> None:
    stage = stage_at(Posterior(), 0.0)
    state, taken, _ = stage.test(standing_at(50.0), np.random.default_rng(0))
    assert taken.all() and stage.acceptance == 0.0
    assert torch.equal(state.positions, standing_at(50.0).positions)


def test_a_look_is_due_once_the_moves_are_worth_it() -> None:
    stage = stage_at(Posterior(), 0.0)
    for dwells in range(1, 6):
        stage.dwells = dwells
        assert stage.is_due(16) == (16 * dwells >= MOVES_PER_COST * 20)


@pytest.mark.parametrize(("misfit", "ignored"), [(1e-4, True), (0.1, False)])
def test_what_was_always_negligible_is_not_looked_at_again(misfit: float, ignored: bool) -> None:
    posterior = Posterior()
    stage = stage_at(posterior, 0.0)
    for _ in range(ENOUGH_TESTS):
        assert not posterior.ignored
        stage.test(standing_at(misfit), np.random.default_rng(0))
    assert posterior.ignored is ignored


def test_heating_is_what_comes_in_over_what_is_drained() -> None:
    """Jumps of 3 and 1 on average, a fifth of the surplus drained in between; a chain that never stood has none."""
    jumps = torch.tensor([[2.0, 1.0, math.nan], [4.0, 1.0, math.nan], [3.0, math.nan, math.nan]], dtype=torch.float64)
    mean, error = heating(list(jumps), 0.2)
    assert mean == pytest.approx([15.0, 5.0, 0.0])
    assert error == pytest.approx([5 * math.sqrt(2 / 3) / math.sqrt(3), 0.0, 0.0])


def test_the_variance_over_batches_is_half_that_of_their_differences() -> None:
    """Potentials on batches drawn independently, of variance 4: within 5 % at 20,000 jumps, P(fail) < 1e-4."""
    values = 2 * np.random.default_rng(0).standard_normal((20_001, 1))
    jumps = [torch.from_numpy(later - sooner) for later, sooner in zip(values[1:], values, strict=False)]
    assert variance_over_batches(jumps) == pytest.approx([4.0], rel=0.05)
