"""A move against the equations written out, and what it leaves as it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phasewatch.llc.leapfrog import State, refresh, update

CURVATURES = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)


def quadratic(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U = sum of c w^2 / 2, twice of which is called the energy."""
    potentials = (CURVATURES * positions.square()).sum(1) / 2
    return 2 * potentials, potentials, CURVATURES * positions


def begin(thresholds: float, chains: int = 5) -> State:
    generator = torch.Generator().manual_seed(0)
    positions, momenta = torch.randn(2, chains, 3, generator=generator, dtype=torch.float64)
    energies, potentials, gradients = quadratic(positions)
    return State(positions, momenta, gradients, energies, potentials, torch.full((chains,), thresholds).double())


def total_energy(state: State) -> Tensor:
    return state.potentials + state.momenta.square().sum(1) / 2


@pytest.mark.parametrize("stride", [0.01, 0.3])
def test_a_step_that_is_taken(stride: float) -> None:
    """In a quadratic well the leapfrog step is a linear map of (w, p), one direction at a time."""
    state = begin(0.0)
    moved, acceptance, accepted = update(state, quadratic, torch.full((3,), stride).double(), 0.0)
    assert accepted.all()
    turn = stride * CURVATURES * stride
    positions = (1 - turn / 2) * state.positions + stride * state.momenta
    momenta = (1 - turn / 2) * state.momenta - stride * CURVATURES * (1 - turn / 4) * state.positions
    torch.testing.assert_close(moved.positions, positions)
    torch.testing.assert_close(moved.momenta, momenta)
    torch.testing.assert_close(moved.gradients, CURVATURES * positions)
    torch.testing.assert_close(moved.energies, 2 * moved.potentials)
    rise = total_energy(moved) - total_energy(state)
    torch.testing.assert_close(acceptance, torch.exp(-rise.clamp(min=0)))


def test_the_way_back_is_the_same_way() -> None:
    state, stride = begin(0.0), torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)
    there = update(state, quadratic, stride, 0.0).state
    back = update(there._replace(momenta=-there.momenta), quadratic, stride, 0.0).state
    torch.testing.assert_close(back.positions, state.positions)
    torch.testing.assert_close(back.momenta, -state.momenta)


def test_a_step_that_is_refused_turns_the_momentum_round() -> None:
    """Beyond a stride of 2 over the root of the curvature the energy grows; |v| is above the acceptance then."""
    state = begin(0.9)
    stride = torch.full((3,), 8.0).double()
    moved, acceptance, accepted = update(state, quadratic, stride, 0.0)
    assert not accepted.any() and acceptance.max() < 0.9
    for kept, before in zip(moved[:1] + moved[2:], state[:1] + state[2:], strict=True):
        assert torch.equal(kept, before)
    assert torch.equal(moved.momenta, -state.momenta)


def test_what_is_no_number_is_refused() -> None:
    def wall(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energies, potentials, gradients = quadratic(positions)
        return energies * math.nan, potentials * math.nan, gradients

    state = begin(0.0)
    moved, acceptance, accepted = update(state, wall, torch.ones(3).double(), 0.0)
    assert not accepted.any() and not acceptance.any()
    assert torch.equal(moved.positions, state.positions) and moved.potentials.isfinite().all()


def test_the_threshold_goes_round_and_is_rescaled() -> None:
    """v moves by the drift, from above 1 to above -1; where the step is taken v exp(rise) stays within (-1, 1)."""
    still = torch.zeros(3).double()
    assert update(begin(0.5), quadratic, still, 0.03).state.thresholds == pytest.approx([0.53] * 5)
    assert update(begin(0.99), quadratic, still, 0.03).state.thresholds == pytest.approx([-0.98] * 5)
    state = begin(0.3)
    moved, _, accepted = update(state, quadratic, torch.full((3,), 0.4).double(), 0.0)
    rise = total_energy(moved) - total_energy(state)
    assert accepted.all() and rise.abs().max() > 0.01
    torch.testing.assert_close(moved.thresholds, 0.3 * rise.exp())
    assert moved.thresholds.abs().max() < 1


def test_refreshment_leaves_the_length_of_momenta_on_average() -> None:
    state = begin(0.0)
    noise = torch.ones_like(state.momenta)
    mixed = refresh(state, noise.clone(), 0.6).momenta
    torch.testing.assert_close(mixed, 0.6 * state.momenta + 0.8 * noise)
