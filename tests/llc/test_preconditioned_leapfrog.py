"""A leapfrog step in the bases of the masses, against the textbook's with a mass matrix, in double precision."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from phasewatch.llc.preconditioned_leapfrog import Masses, State, chosen, leap, state_at

CHAINS, SIZE, NBETA, STEP = 3, 5, 7.0, 0.3


def quartic(positions: Tensor) -> tuple[Tensor, Tensor]:
    """D = sum of k x_k^4 / 4, and its gradient."""
    weights = torch.arange(1, SIZE + 1, dtype=positions.dtype)
    return (weights * positions**4).sum(1) / 4, weights * positions**3


def start(masses: Masses) -> State:
    generator = torch.Generator().manual_seed(0)
    positions, momenta = torch.randn(2, CHAINS, SIZE, generator=generator, dtype=torch.float64)
    values, gradients = quartic(positions)
    return state_at(positions, momenta, gradients, values.numpy(), masses)


def energy(state: State) -> np.ndarray:
    """U and the kinetic energy, from positions and momenta alone."""
    total = NBETA * quartic(state.positions)[0] + (state.positions**2 + state.momenta**2).sum(1) / 2
    return np.asarray(total.numpy())


MASSES = Masses(NBETA, torch.tensor([1.0, 0.8, 0.5, 0.3, 0.2], dtype=torch.float64))


def test_a_step_is_the_textbooks_with_a_mass_matrix() -> None:
    """Momenta M v with M = R^-2: half a kick, a drift by M^-1, half a kick."""
    before = start(MASSES)
    after, work = leap(before, quartic, MASSES, STEP)
    mass = MASSES.roots**-2
    x, momenta = before.positions, before.momenta / MASSES.roots
    momenta = momenta - STEP / 2 * (x + NBETA * quartic(x)[1])
    x = x + STEP * momenta / mass
    momenta = momenta - STEP / 2 * (x + NBETA * quartic(x)[1])
    torch.testing.assert_close(after.positions, x)
    torch.testing.assert_close(after.momenta, momenta * MASSES.roots)
    np.testing.assert_allclose(work, energy(after) - energy(before), rtol=1e-10)
    again = state_at(x, after.momenta, quartic(x)[1], quartic(x)[0].numpy(), MASSES)
    for found, expected in zip(after, again, strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-10)


def test_a_step_with_reversed_momenta_leads_back() -> None:
    before = start(MASSES)
    there, work = leap(before, quartic, MASSES, STEP)
    back, undone = leap(there._replace(momenta=-there.momenta), quartic, MASSES, STEP)
    torch.testing.assert_close(back.positions, before.positions)
    torch.testing.assert_close(-back.momenta, before.momenta)
    np.testing.assert_allclose(undone, -work, rtol=1e-8)


def test_what_is_refused_stays_with_its_momentum_reversed() -> None:
    before = start(MASSES)
    after, _ = leap(before, quartic, MASSES, STEP)
    found = chosen(np.array([True, False, True]), after, before)
    assert torch.equal(found.momenta[1], -before.momenta[1]) and torch.equal(found.momenta[0], after.momenta[0])
    for part, proposed, current in zip(found, after, before, strict=True):
        if part is not found.momenta:
            assert np.array_equal(part[1], current[1])
            assert np.array_equal(part[0], proposed[0]) and np.array_equal(part[2], proposed[2])
    assert chosen(np.ones(CHAINS, dtype=bool), after, before) is after
