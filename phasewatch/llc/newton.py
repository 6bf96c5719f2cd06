"""A step of Newton's method from w*, held as the chains are: whether the loss falls far at once."""

from __future__ import annotations

import math

import torch

from phasewatch.hessian.lanczos import SymmetricOperator
from phasewatch.isolation import isolated
from phasewatch.llc.pilot import Pilot
from phasewatch.llc.posterior import LOSS_PER_GRADIENT
from phasewatch.objective import Objective

PRODUCTS = 12
"""Products that the step is made of. Chosen."""
LENGTHS = (1.0, 0.3, 0.1)
"""How much of it is tried. Chosen."""
REFUSALS = ValueError, ArithmeticError, AssertionError, torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""What the model's code raises at parameters that it does not take, as a scale below zero."""


def newton_step(
    objective: Objective,
    matrix: SymmetricOperator,
    nbeta: float,
    localization: float,
    *,
    enough: float,
) -> Pilot:
    """One long step down the potential of :func:`phasewatch.llc.pilot_descent`, from w*.

    By conjugate gradients (Nocedal & Wright 2006, Numerical Optimization, alg. 5.2), ended early.

    Where w* is far from a minimum it often falls as far as that would with ten times as many gradients; where it does
    not, it says nothing. A second one does not help: what the first leaves over lies where a part of the probe sees no
    curvature.

    Args:
        objective: The loss, on a fixed probe.
        matrix: Curvature of the loss at w*, which may be that on a part of the probe. What its products cost does not
            count as gradients.
        nbeta: Inverse temperature times n.
        localization: Precision gamma of the Gaussian around w*.
        enough: No shorter step is tried once nbeta L has fallen by this much.
    """
    center = objective.parameters
    with isolated():
        losses, gradients = objective.losses_and_gradients(center[None])
        step = torch.zeros_like(center)
        slope = float(torch.linalg.vector_norm(gradients[0], dtype=torch.float64))
        residual = -gradients[0] / (slope or 1.0)  # squares of small and of large slopes have no single number
        direction, squared = residual, float(residual @ residual)
        for _ in range(PRODUCTS):
            image = nbeta * (matrix @ direction) + localization * direction
            curvature = float(direction @ image)
            if not (squared > 0 and 0 < curvature < math.inf):
                break
            step = step + squared / curvature * direction
            residual = residual - squared / curvature * image
            before, squared = squared, float(residual @ residual)
            direction = residual + squared / before * direction
        fall, distance, spent = 0.0, 0.0, 1.0
        for length in LENGTHS:
            spent += LOSS_PER_GRADIENT
            moved = length * nbeta * slope * step
            try:
                reached = objective.losses((center + moved)[None])[0]
            except REFUSALS:
                continue
            falls = nbeta * float((losses[0] - reached).double())
            held = localization / 2 * float(moved.double().square().sum())
            if falls > max(fall, held):
                fall, distance = falls, float(moved.norm())
            if fall >= enough:
                break
    return Pilot(fall, distance, round(spent * objective.num_batches), fall >= enough)
