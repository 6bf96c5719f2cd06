r"""A leapfrog step of chains around w*, in the bases of their curvature, as a function from one state to the next.

A chain is at :math:`x = (w - w^*) / \sigma`, in units of the prior's spread, under the potential
:math:`U(x) = b D(x) + \tfrac12 |x|^2`. In the bases of the curvature A that it meets its masses are :math:`1 + b A`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.llc.diagnostics import FloatArray

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From positions to D, in float64, and its gradients, both as in :class:`State`."""


class State(NamedTuple):
    """Where the chains are, one row a chain; vectors are coordinates in the bases.

    Attributes:
        positions: x, shape ``(chains, num_parameters)``.
        momenta: p, of unit mass; same shape.
        gradients: Of D by x, same shape.
        slopes: Of U, in units of the masses; same shape.
        values: D, shape ``(chains,)``.
        half_squares: Half of the squared length of x, likewise.
    """

    positions: Tensor
    momenta: Tensor
    gradients: Tensor
    slopes: Tensor
    values: FloatArray
    half_squares: FloatArray


class Masses(NamedTuple):
    """What a step depends on beside the state.

    Attributes:
        nbeta: The inverse temperature b.
        roots: :math:`R = (1 + b A)^{-1/2}`, which is diagonal in the bases; shape ``(num_parameters,)``.
    """

    nbeta: float
    roots: Tensor

    def slopes(self, positions: Tensor, gradients: Tensor) -> Tensor:
        r""":math:`s = R\,(x + b \nabla D)`, the gradient of U in units of the masses."""
        return torch.add(positions, gradients, alpha=self.nbeta).mul_(self.roots)


def state_at(positions: Tensor, momenta: Tensor, gradients: Tensor, values: FloatArray, masses: Masses) -> State:
    """The state of chains that are there."""
    (squares,) = half_squares(positions)
    return State(positions, momenta, gradients, masses.slopes(positions, gradients), values, squares)


def leap(state: State, evaluate: Evaluate, masses: Masses, step: float) -> tuple[State, FloatArray]:
    r"""Make one leapfrog step.

    With the step size h,

    .. math::
        p_{1/2} = p - \tfrac{h}{2} s(x), \quad x' = x + h R\, p_{1/2}, \quad p' = p_{1/2} - \tfrac{h}{2} s(x') .

    Returns:
        The state after it, and the work :math:`U(x') - U(x) + \tfrac12 |p'|^2 - \tfrac12 |p|^2` that the step has done,
        of which Metropolis' rule accepts :math:`\min(1, e^{-work})`; shape ``(chains,)``, NaN where it is not finite.
    """
    momenta = torch.add(state.momenta, state.slopes, alpha=-step / 2)
    positions = torch.addcmul(state.positions, masses.roots, momenta, value=step)
    found, gradients = evaluate(positions)
    slopes = masses.slopes(positions, gradients)
    momenta.add_(slopes, alpha=-step / 2)
    values: FloatArray = found.cpu().numpy()
    squares, kinetic, kinetic_before = half_squares(positions, momenta, state.momenta)
    with np.errstate(all="ignore"):
        work = masses.nbeta * (values - state.values) + squares - state.half_squares + kinetic - kinetic_before
    return State(positions, momenta, gradients, slopes, values, squares), work


def chosen(accepted: NDArray[np.bool_], proposed: State, current: State) -> State:
    """The rows proposed where accepted, else the current ones with their momenta reversed."""
    if accepted.all():
        return proposed
    row = torch.from_numpy(accepted[:, None]).to(proposed.positions.device)
    return State(
        positions=torch.where(row, proposed.positions, current.positions),
        momenta=torch.where(row, proposed.momenta, -current.momenta),
        gradients=torch.where(row, proposed.gradients, current.gradients),
        slopes=torch.where(row, proposed.slopes, current.slopes),
        values=np.where(accepted, proposed.values, current.values),
        half_squares=np.where(accepted, proposed.half_squares, current.half_squares),
    )


def half_squares(*vectors: Tensor) -> FloatArray:
    """Half of the squared length of each row, shape ``(len(vectors), chains)``."""
    squares = torch.stack([torch.linalg.vecdot(each, each) for each in vectors])
    found: FloatArray = squares.cpu().numpy().astype(np.float64) / 2
    return found
