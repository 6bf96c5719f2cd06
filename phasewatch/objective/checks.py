"""Whether a loss is what all estimators take it for: one function of the parameters, with the gradient it says."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from phasewatch.isolation import RandomState
from phasewatch.objective.copies import PythonState
from phasewatch.objective.function import PureLoss

SHIFT = 0.02
"""The other place: every tensor moved by a random direction of this share of its root mean square."""
DIRECTIONS = 3
"""Directions along which differences are taken; a gradient that is not the loss's own is wrong along most of them."""
STEPS = (1.0, 0.3, 0.1)
"""Lengths of the differences, in units of the shift: kinks and curvature spoil long ones, rounding short ones."""
TOLERANCE = 0.02
"""Disagreement up to which a difference agrees, as a share of the gradient's typical slope along a direction."""
CONVERGED = 0.3
"""Differences of several lengths speak against a gradient if they are this much nearer to each other than to it."""
ROUNDING = 100.0
"""Rounding of a loss, in units of its precision and its size."""


def first_evaluation(function: PureLoss) -> Tensor:
    """Losses at the start, and what kind of function this is: does it draw, does it write to its inputs?

    Raises:
        ValueError: If the loss is no finite scalar or does not depend on the parameters.
    """
    vector = function.parameters.detach().clone().requires_grad_()
    inputs = [*function.fixed.values(), *(tensor for own in function.data for tensor in own)]
    kept = [tensor.clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    losses = []
    for i in range(function.num_batches):
        before = RandomState.capture()
        loss = function.evaluate(vector, i)
        function.draws_random_numbers |= before != RandomState.capture()
        _check_loss(loss, i)
        losses.append(loss.detach())
    if not _depends_on(loss, vector):
        raise ValueError(
            "The loss does not depend on the trainable parameters. loss_fn(module, batch) must compute it from "
            "the module it is given, with gradients on and without detach() or item()."
        )
    if [tensor._version for tensor in inputs] != versions:
        function.writes_to_its_inputs = True
        for tensor, original in zip(inputs, kept, strict=True):
            tensor.copy_(original)
    if function.draws_random_numbers:
        with torch.no_grad():
            losses = [function.evaluate(function.parameters, i).detach() for i in range(function.num_batches)]
    return torch.stack(losses)


def check_function(function: PureLoss, losses: Tensor, state: PythonState) -> Tensor:
    """Evaluate again, here and at a place near by, and compare the gradient there with differences.

    A module that keeps something between calls is given its first state before each evaluation from then on.

    Args:
        function: The loss.
        losses: Of every batch, as evaluated first.
        state: What the module kept before that.

    Returns:
        The losses of every batch.

    Raises:
        ValueError: If the same parameters do not give the same loss, or the gradient is not that of the loss.
    """
    generator = torch.Generator().manual_seed(function.num_parameters)
    near = function.parameters + SHIFT * _direction(function, generator)
    try:
        difference = _memory(function, losses, state, near)
        changed = state.of_what_has_changed()
        if changed is not None:
            function.keep_state(changed, matters=difference is not None)
        if difference:
            losses = torch.stack([_value(function, function.parameters, i) for i in range(function.num_batches)])
            difference = _memory(function, losses, state, near)
    finally:
        state.restore()
    if difference:
        raise ValueError(
            f"The same parameters and batch gave the losses {difference[0]:.8g} and {difference[1]:.8g}: something is "
            "kept from one call to the next outside of the module's attributes. Look for counters, caches and hidden "
            "states in loss_fn, in global variables or in objects that the module holds, and for random numbers from "
            "generators of their own; make loss_fn(module, batch) compute everything anew."
        )
    _check_gradient(function, near, generator)
    return losses


def _memory(function: PureLoss, losses: Tensor, state: PythonState, near: Tensor) -> tuple[float, float] | None:
    """Two different losses at the same place, depending on what was evaluated before; None if there are none."""
    start = function.parameters
    there = _value(function, near, 0)
    again = _value(function, start, 0)
    state.restore()
    first = _value(function, near, 0)
    for one, other in ((losses[0], again), (there, first)):
        tolerance = ROUNDING * torch.finfo(function.dtype).eps * (1 + abs(float(one)))
        if abs(float(one) - float(other)) > tolerance:
            return float(one), float(other)
    return None


def _check_gradient(function: PureLoss, near: Tensor, generator: torch.Generator) -> None:
    directions = [_direction(function, generator) for _ in range(DIRECTIONS)]
    objection = _objection(function, near, directions)
    if objection is not None and function.dtype != torch.float64:
        try:  # what single precision makes rough is smooth in double
            objection = _objection(function.cast(torch.float64), near.double(), [d.double() for d in directions])
        except Exception:  # the model's code fixes its type
            pass
    if objection is not None:
        raise ValueError(
            f"The gradient of the loss is not its derivative: along a random direction near the parameters it says "
            f"{objection[0]:.4g}, and differences of the loss say {objection[1]:.4g}. Look for what computes other "
            "gradients than its own: gradients written by hand (torch.autograd.Function, hooks, straight-through "
            "estimators), detach(), recomputation by another library than torch.utils.checkpoint, values cached at "
            "other parameters. Give a loss_fn without it."
        )


def _objection(function: PureLoss, near: Tensor, directions: list[Tensor]) -> tuple[float, float] | None:
    """A slope and the differences that most directions say instead; None where they do not speak against it."""
    loss, gradient = function.loss_and_gradient(near, 0)
    if not (loss.isfinite() and gradient.isfinite().all()):
        return None  # the loss at the start is finite: the samplers refuse such places, the operators say more
    found = []
    for direction in directions:
        slope = float(gradient.double() @ direction.double())
        typical = float((gradient.double() * direction.double()).norm())
        quotients = []
        for length in (SHIFT * step for step in STEPS):
            up, down = (float(_value(function, near + sign * length * direction, 0)) for sign in (1, -1))
            quotients.append((up - down) / (2 * length))
            if abs(quotients[-1] - slope) <= TOLERANCE * typical:
                break
        else:
            off = min(abs(quotient - slope) for quotient in quotients)
            if max(quotients) - min(quotients) <= CONVERGED * off:
                found.append((slope, quotients[-1]))
    return max(found, key=lambda pair: abs(pair[0] - pair[1])) if 2 * len(found) > len(directions) else None


def _direction(function: PureLoss, generator: torch.Generator) -> Tensor:
    """Normal numbers, as large in each tensor as its own entries are; where all are zero, as one over its width."""
    pieces = []
    for piece in function.unflatten(function.parameters).values():
        size = float(piece.double().square().mean().sqrt()) or piece.shape[-1] ** -0.5 if piece.dim() else 1.0
        noise = torch.randn(piece.numel(), generator=generator, dtype=torch.float64)
        pieces.append(size * noise)
    return torch.cat(pieces).to(function.parameters)


def _value(function: PureLoss, vector: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        return function.evaluate(vector, batch)


def _check_loss(loss: Any, batch: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dim() > 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn returned {found}; expected a scalar tensor, the mean loss of the batch.")
    if not math.isfinite(loss.item()):
        raise ValueError(
            f"The loss of batch {batch} is {loss.item()}; expected a finite number. Look at the data of the probe "
            "and at the parameters (has training diverged?)."
        )


def _depends_on(result: Tensor, leaf: Tensor) -> bool:
    """Whether autograd knows a way from the result to the leaf."""
    nodes = [result.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return False
