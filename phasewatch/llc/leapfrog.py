"""A move of Hamiltonian Monte Carlo whose momentum mostly persists, as a function from one state to the next.

Horowitz 1991, "A generalized guided Monte Carlo algorithm": the momentum is refreshed in part, one leapfrog step is
made, and Metropolis' rule accepts it or reverses the momentum. Reversals are made to cluster (Neal 2020,
"Non-reversibly updating a uniform [0,1] value for Metropolis accept/reject decisions"): between them the chains run
straight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLD_DRIFT = 0.04
"""Largest change per move of the variable that decides on acceptance: from -1 to 1 in 100 moves on average. Chosen: any
value leaves the density as it is."""

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From positions to energies, potentials U and the gradients of U, as in :class:`State`."""


class State(NamedTuple):
    """Where the chains are, one row a chain.

    Attributes:
        positions: w, shape ``(chains, num_parameters)``.
        momenta: p, of unit mass in coordinates in which w is divided by the scale of each parameter; same shape.
        gradients: The gradient of U at w, same shape.
        energies: What of U is the loss, shape ``(chains,)`` and in float64.
        potentials: U, likewise.
        thresholds: v, uniform on (-1, 1), likewise; its absolute value decides, its sign is the direction in which that
            moves.
    """

    positions: Tensor
    momenta: Tensor
    gradients: Tensor
    energies: Tensor
    potentials: Tensor
    thresholds: Tensor


class Move(NamedTuple):
    """A state and how it was reached.

    Attributes:
        state: The state.
        acceptance: Metropolis' probability of the step, shape ``(chains,)``.
        accepted: Whether it was taken, likewise.
    """

    state: State
    acceptance: Tensor
    accepted: Tensor


def refresh(state: State, noise: Tensor, persistence: float) -> State:
    r"""Replace part of the momentum: :math:`p \leftarrow \alpha p + \sqrt{1 - \alpha^2}\, \xi` (Horowitz 1991).

    Args:
        state: Where the chains are.
        noise: Standard normal, of the shape of the momenta; written over.
        persistence: The share :math:`\alpha` of the momentum that lasts.
    """
    return state._replace(momenta=noise.mul_(math.sqrt(1 - persistence**2)).add_(state.momenta, alpha=persistence))


def update(state: State, evaluate: Evaluate, stride: Tensor, drift: float) -> Move:
    r"""Make one leapfrog step and decide on it.

    With the stride :math:`h`, the step size times the scale of each parameter,

    .. math::
        p_{1/2} = p - \tfrac{h}{2} \nabla U(w), \quad w' = w + h\, p_{1/2}, \quad
        p' = p_{1/2} - \tfrac{h}{2} \nabla U(w'), \quad
        \Delta = U(w') - U(w) + \tfrac12 |p'|^2 - \tfrac12 |p|^2 .

    The threshold first drifts, :math:`v \leftarrow v + \delta`, and above 1 goes on from -1. Where
    :math:`|v| < \min(1, e^{-\Delta})` the step is taken and :math:`v \leftarrow v e^{\Delta}`; elsewhere w stays and
    :math:`p \leftarrow -p` (Neal 2020, sec. 3).

    Args:
        state: Where the chains are.
        evaluate: U, as one batch shows it or all do.
        stride: Shape ``(num_parameters,)``.
        drift: :math:`\delta`, between 0 and ``THRESHOLD_DRIFT``.
    """
    momenta = state.momenta.addcmul(stride, state.gradients, value=-0.5)
    positions = state.positions.addcmul(stride, momenta)
    energies, potentials, gradients = evaluate(positions)
    momenta.addcmul_(stride, gradients, value=-0.5)
    work = potentials - state.potentials + (_kinetic(momenta) - _kinetic(state.momenta))
    work = torch.where(work.isnan(), torch.inf, work)
    acceptance = torch.exp(-work.clamp(min=0))
    thresholds = state.thresholds + drift
    thresholds = torch.where(thresholds > 1, thresholds - 2, thresholds)
    accepted = thresholds.abs() < acceptance
    # On a CPU only the few rows that are refused are written; elsewhere to ask for them would be to wait.
    refused = (~accepted).nonzero().flatten().tolist() if accepted.device.type == "cpu" else None
    moved = State(
        positions=_chosen(accepted, refused, positions, state.positions),
        momenta=_chosen(accepted, refused, momenta, state.momenta, sign=-1),
        gradients=_chosen(accepted, refused, gradients, state.gradients),
        energies=torch.where(accepted, energies, state.energies),
        potentials=torch.where(accepted, potentials, state.potentials),
        thresholds=torch.where(accepted, thresholds * work.exp(), thresholds),
    )
    return Move(moved, acceptance, accepted)


def _chosen(accepted: Tensor, refused: list[int] | None, proposed: Tensor, current: Tensor, sign: int = 1) -> Tensor:
    """The rows proposed where accepted, else ``sign`` times the current ones; may overwrite ``proposed``."""
    if refused is None:
        return torch.where(accepted[:, None], proposed, sign * current)
    for row in refused:
        torch.mul(current[row], sign, out=proposed[row])
    return proposed


def _kinetic(momenta: Tensor) -> Tensor:
    return torch.linalg.vecdot(momenta, momenta).double() / 2
