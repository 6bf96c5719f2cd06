"""A descent from w*, held as the chains are: whether there is a minimum for them to stay at."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.llc.posterior import LOSS_PER_GRADIENT
from phasewatch.objective import Objective

MOST_EVALUATIONS = 40
"""Gradients on the whole probe at most. Chosen."""
PAIRS = 10
"""Steps that the descent remembers: 3 to 20 do well (Nocedal & Wright 2006, Numerical Optimization, sec. 7.2)."""
ARMIJO, WOLFE = 1e-4, 0.9
"""A step must gain this share of what the slope promises, and use up one less this share of the slope (values of
Nocedal & Wright 2006, Numerical Optimization, sec. 3.1)."""
EXPANSION = 4.0
"""Factor on a step that is too short. Chosen, where Lewis & Overton double."""
CONVERGED = 3
"""The descent has arrived when so many steps one after another promise next to nothing. Chosen."""
COST_OF_DISPLACEMENT = 20.0
"""The first step is a draw of the localization's own size, shrunk until it raises nbeta L by no more than this, nor by
more than half the number of parameters: what chains carry. With 10 it is not always enough to leave the saddle at which
the network of ``phasewatch demo`` starts, with 20 it is."""
SHRINKING, DISPLACEMENTS = (0.1, 0.7), 20
"""Factors by which the first step is shrunk, at least and at most, and how often it is tried. Chosen."""


@dataclass(frozen=True)
class Pilot:
    """What a pilot descent found.

    Attributes:
        fall: By how much nbeta L falls from w* to the end of the descent; 0 where it does not.
        distance: How far that is from w*.
        gradients: Minibatch gradients spent; a loss alone counts a third.
        converged: Whether the descent had arrived, or had fallen enough, when it ended.
    """

    fall: float
    distance: float
    gradients: int
    converged: bool


def pilot_descent(
    objective: Objective,
    nbeta: float,
    localization: float,
    *,
    seed: int = 0,
    most_evaluations: int = MOST_EVALUATIONS,
    negligible: float = 0.01,
    enough: float = math.inf,
) -> Pilot:
    r"""Descend :math:`n\beta\,(L(w) - L(w^*)) + \tfrac{\gamma}{2} |w - w^*|^2` from w* on the whole probe.

    By L-BFGS (Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization") with the weak Wolfe
    line search of Lewis & Overton (2013, "Nonsmooth optimization via quasi-Newton methods", alg. 2.6). Where the loss
    is quadratic, chains held so have a mean that is lower by the fall than at the minimum nearby. The first step is
    random and raises the loss by next to nothing, so that a saddle, where the gradient vanishes, is left as well.

    Args:
        objective: The loss, on a fixed probe.
        nbeta: Inverse temperature times n.
        localization: Precision gamma of the Gaussian around w*.
        seed: Seeds the first step.
        most_evaluations: Gradients on the whole probe at most.
        negligible: The descent ends where its steps promise less than this.
        enough: It also ends once nbeta L has fallen by this much.
    """
    center = objective.parameters
    with isolated():
        start = objective.loss(center).double().detach()
        spent = LOSS_PER_GRADIENT

        def evaluate(place: Tensor) -> tuple[float, float, Tensor]:
            """The change of nbeta L, the potential, and its gradient."""
            nonlocal spent
            spent += 1
            losses, gradients = objective.losses_and_gradients(place[None])
            moved = place - center
            change = nbeta * float(losses[0].double() - start)
            potential = change + localization / 2 * float(moved.double().square().sum())
            return change, potential, nbeta * gradients[0] + localization * moved

        place = center
        affordable = min(COST_OF_DISPLACEMENT, center.numel() / 2)
        direction = torch.from_numpy(np.random.default_rng(seed).standard_normal(center.numel())).to(center)
        direction /= math.sqrt(localization or center.numel())
        for _ in range(DISPLACEMENTS):
            spent += LOSS_PER_GRADIENT
            rise = nbeta * float(objective.losses((center + direction)[None])[0].double() - start)
            if rise <= affordable:
                place = center + direction
                break
            share = math.sqrt(affordable / rise) if math.isfinite(rise) else 0.0
            direction *= min(max(share, SHRINKING[0]), SHRINKING[1])
        change, potential, gradient = evaluate(place)
        best, end = max(-change, 0.0), place
        memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=PAIRS)
        arrived = 0
        while spent < most_evaluations and best < enough and arrived < CONVERGED:
            direction = -_inverse_curvature(gradient, memory)
            slope = float(direction @ gradient)
            if not memory:  # nothing is known of the curvature: one unit of the potential
                direction /= max(-slope, 1e-30)
                slope = -1.0
            if not (slope < 0 and math.isfinite(slope)):
                break
            promises_little = -slope / 2 < negligible and bool(memory)
            arrived = arrived + 1 if promises_little else 0
            step, least, most = 1.0, 0.0, math.inf
            reached = None
            while spent < most_evaluations:
                found = evaluate(place + step * direction)
                if not found[1] <= potential + ARMIJO * step * slope:
                    most = step
                    if promises_little:  # a shorter step promises even less, and is lost in rounding
                        break
                else:
                    reached = step, found
                    if float(found[2] @ direction) >= WOLFE * slope:
                        break
                    least = step
                step = (least + most) / 2 if most < math.inf else EXPANSION * least
                if most - least < 1e-6 * most:
                    break
            if reached is None:
                arrived = CONVERGED if promises_little else 0
                break
            step, found = reached
            if float((found[2] - gradient) @ direction) > 0:
                memory.append((step * direction, found[2] - gradient))
            place = place + step * direction
            change, potential, gradient = found
            if -change > best:
                best, end = -change, place
    return Pilot(
        fall=best,
        distance=float((end - center).norm()),
        gradients=round(spent * objective.num_batches),
        converged=arrived >= CONVERGED or best >= enough,
    )


def _inverse_curvature(gradient: Tensor, memory: deque[tuple[Tensor, Tensor]]) -> Tensor:
    """The two-loop recursion of L-BFGS."""
    vector = gradient.clone()
    parts = []
    for step, change in reversed(memory):
        along = step @ vector / (step @ change)
        vector -= along * change
        parts.append(along)
    if memory:
        step, change = memory[-1]
        vector *= step @ change / (change @ change)
    for (step, change), along in zip(memory, reversed(parts), strict=True):
        vector += step * (along - change @ vector / (step @ change))
    return vector
