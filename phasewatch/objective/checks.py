"""Whether a loss is what all estimators take it for: one function of the parameters, with the gradient it says."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from phasewatch.isolation import RandomState
from phasewatch.objective.copies import PythonState
from phasewatch.objective.function import PureLoss

SHIFT = 0.02
"""The other place: every tensor moved by a random direction of this share of its root mean square. Chosen."""
DIRECTIONS = 3
"""Directions along which differences are taken; a gradient that is not the loss's own is wrong along most of them.
Chosen."""
STEPS = (1.0, 0.3, 0.1)
"""Lengths of the differences, in units of the shift: kinks and curvature spoil long ones, rounding short ones.
Chosen."""
SHORT_STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
"""More of them, where double precision lets differences be so short. Chosen."""
STEPS_ONCE = (0.1, 0.03, 0.01)
"""Those in one direction on the whole batch, before few samples are believed. Shorter, as differences that kinks spoil
cost the whole check: on a small convnet 8 to 9 evaluations of the batch in all, 12 with ``STEPS``."""
TOLERANCE = 0.02
"""Disagreement up to which a difference agrees, as a share of the gradient's typical slope along a direction.
Chosen."""
CONVERGED = 0.3
"""Differences of several lengths speak against a gradient if they are this much nearer to each other than to it.
Chosen."""
ROUNDING = 100.0
"""Rounding up to which two losses are the same, in units of the precision and the size of the loss. Chosen."""
FEW_ROUNDINGS = 4.0
"""What a difference of two losses is off by from rounding, likewise. Chosen."""


def first_evaluation(function: PureLoss, gradient: Tensor | None = None) -> Tensor:
    """Losses at the start, and what kind of function this is: does it draw, does it write to its inputs?

    Args:
        function: The loss.
        gradient: Zeros, to which the gradient of the mean loss is added in the same pass; of a loss that draws or
            writes to its inputs it is not that at the start.

    Raises:
        ValueError: If the loss is no finite scalar or does not depend on the parameters.
    """
    vector = function.parameters.detach().clone().requires_grad_()
    inputs = [*function.fixed.values(), *(tensor for own in function.data for tensor in own)]
    kept = [tensor.clone() for tensor in inputs]
    originals = {id(parameter) for parameter in function.module.parameters() if parameter.requires_grad}
    losses, depends = [], False
    for i in range(function.num_batches):
        before = RandomState.capture()
        loss = function.evaluate(vector, i)
        function.draws_random_numbers |= before != RandomState.capture()
        _check_loss(loss, i)
        leaves = _leaves(loss)
        if originals & leaves:
            raise ValueError(
                "The loss reaches parameters of the network past the module that loss_fn(module, batch) is given, "
                "where they cannot be varied: a function or hook that closes over it, a list of parameters, the "
                "module itself in loss_fn. Take parameters from the module given and its attributes alone."
            )
        depends |= id(vector) in leaves
        if gradient is not None and id(vector) in leaves:
            with function.holding(function.tensors_at(vector)):
                gradient.add_(torch.autograd.grad(loss, vector)[0], alpha=function.batch_weights[i])
        losses.append(loss.detach())
    if not depends:
        raise ValueError(
            "The loss does not depend on the trainable parameters. loss_fn(module, batch) must compute it from "
            "the module it is given, with gradients on and without detach() or item()."
        )
    changed = [not torch.equal(tensor, original) for tensor, original in zip(inputs, kept, strict=True)]
    if any(changed) or not torch.equal(vector, function.parameters):
        function.writes_to_its_inputs = True
        for tensor, original in zip(inputs, kept, strict=True):
            tensor.copy_(original)
    if function.draws_random_numbers or function.writes_to_its_inputs:
        losses = [_value(function, function.parameters, i) for i in range(function.num_batches)]
    return torch.stack(losses)


def check_function(function: PureLoss, losses: Tensor, state: PythonState) -> Tensor:
    """Evaluate again, here and at a place near by.

    A module that keeps something between calls is given its first state before each evaluation from then on.

    Args:
        function: The loss.
        losses: Of every batch, as evaluated first.
        state: What the module kept before that.

    Returns:
        The losses of every batch.

    Raises:
        ValueError: If the same parameters do not give the same loss.
    """
    near, there = _near(function)
    try:
        difference = _memory(function, losses, state, near, there)
        changed = state.of_what_has_changed()
        if changed is not None:
            function.keep_state(changed, matters=difference is not None)
        if difference:
            losses = torch.stack([_value(function, function.parameters, i) for i in range(function.num_batches)])
            difference = _memory(function, losses, state, near, _value(function, near, 0))
    finally:
        state.restore()
    if difference:
        raise ValueError(
            f"The same parameters and batch gave the losses {difference[0]:.8g} and {difference[1]:.8g}: something is "
            "kept from one call to the next outside of the module's attributes. Look for counters, caches and hidden "
            "states in loss_fn, in global variables or in objects that the module holds, and for random numbers from "
            "generators of their own; make loss_fn(module, batch) compute everything anew."
        )
    return losses


def check_gradient(function: PureLoss, few: PureLoss | None) -> None:
    """Compare the gradient at a place near by with differences.

    Args:
        function: The loss.
        few: The same on a few samples, which say enough where they agree, and all samples do in one direction; None
            where there are none.

    Raises:
        ValueError: If the gradient is not that of the loss.
    """
    if few is not None and _agrees_once(function):  # few may show nothing of what is wrong for the others
        with suppress(Exception):  # the module may not take so few
            _, gradient = few.loss_and_gradient(batch=0)
            if bool(gradient.isfinite().all() and gradient.any()) and _objection(few) is None:
                return
    objection = _objection(function)
    if objection is not None:
        raise ValueError(
            f"The gradient of the loss is not its derivative: along a random direction near the parameters it says "
            f"{objection[0]:.4g}, and differences of the loss say {objection[1]:.4g}. Look for what computes other "
            "gradients than its own: gradients written by hand (torch.autograd.Function, hooks, straight-through "
            "estimators), detach(), recomputation by another library than torch.utils.checkpoint, values cached at "
            "other parameters. Give a loss_fn without it."
        )


def _near(function: PureLoss) -> tuple[Tensor, Tensor]:
    """The other place, and the loss of the first batch there; the start where it is not finite there."""
    near = function.parameters + SHIFT * _direction(function, torch.Generator().manual_seed(function.num_parameters))
    with suppress(Exception):  # a factorization that fails near by, for example: there is nothing to compare with
        value = _value(function, near, 0)
        if bool(value.isfinite()):
            return near, value
    return function.parameters, _value(function, function.parameters, 0)


def _memory(
    function: PureLoss, losses: Tensor, state: PythonState, near: Tensor, there: Tensor
) -> tuple[float, float] | None:
    """Two different losses at the same place, depending on what was evaluated before; None if there are none."""
    start = function.parameters
    again = _value(function, start, 0)
    state.restore()
    pairs = [(losses[0], again), (there, _value(function, near, 0))]
    shapes = [function.batch_shapes(batch) for batch in range(function.num_batches)]
    for batch in range(1, function.num_batches):
        if batch > 1 and shapes[batch] in shapes[:batch]:
            continue  # nothing happens in it that has not been seen
        state.restore()
        pairs.append((losses[batch], _value(function, start, batch)))
    for one, other in pairs:
        tolerance = ROUNDING * torch.finfo(function.dtype).eps * (1 + abs(float(one)))
        if abs(float(one) - float(other)) > tolerance:
            return float(one), float(other)
    return None


def _objection(function: PureLoss) -> tuple[float, float] | None:
    """A slope of the first batch near by and the differences that speak against it; None if there is none."""
    near, _ = _near(function)
    objection = _against(function, near, STEPS)
    if objection is None:
        return None
    # What single precision makes rough is smooth in double, and what bends fast is straight over shorter ways.
    finest: PureLoss = function
    steps: tuple[float, ...] = STEPS
    with suppress(Exception):  # the model's code may fix its type
        cast = function if function.dtype == torch.float64 else function.cast(torch.float64)
        _value(cast, near.double(), 0)
        finest, steps = cast, (*STEPS, *SHORT_STEPS)
    return _against(finest, near.to(finest.dtype), steps)


def _against(function: PureLoss, near: Tensor, steps: tuple[float, ...]) -> tuple[float, float] | None:
    """A slope and the differences that most directions say instead; None where they do not speak against it."""
    loss, gradient = function.loss_and_gradient(near, 0)
    if not (loss.isfinite() and gradient.isfinite().all()):
        return None  # the loss at the start is finite: the samplers refuse such places, the operators say more
    found: list[tuple[float, float]] = []
    generator = _generator_of_directions(function)
    for number in range(DIRECTIONS):
        if 2 * (len(found) + DIRECTIONS - number) <= DIRECTIONS:
            return None  # whatever the others say
        _, objection = _along(function, near, loss, gradient, _direction(function, generator), steps)
        if objection is not None:
            found.append(objection)
    return max(found, key=lambda pair: abs(pair[0] - pair[1])) if 2 * len(found) > DIRECTIONS else None


def _agrees_once(function: PureLoss) -> bool:
    """Whether the gradient of the first batch, which is mostly known at the start, is right there in one direction."""
    loss, gradient = function.loss_and_gradient(batch=0)
    direction = _direction(function, _generator_of_directions(function))
    agrees, _ = _along(function, function.parameters, loss, gradient, direction, STEPS_ONCE)
    return agrees


def _along(
    function: PureLoss, place: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor, steps: tuple[float, ...]
) -> tuple[bool, tuple[float, float] | None]:
    """Whether a difference agrees with the slope in a direction, and else the slope and what they say against it."""
    slope = float(gradient.double() @ direction.double())
    typical = float((gradient.double() * direction.double()).norm())
    values, quotients = [float(loss)], []
    for length in (SHIFT * step for step in steps):
        try:
            up, down = (float(_value(function, place + sign * length * direction, 0)) for sign in (1, -1))
        except Exception:  # as at ``near``
            return False, None
        values += [up, down]
        quotients.append(((up - down) / (2 * length), length))
        if abs(quotients[-1][0] - slope) <= TOLERANCE * typical:
            return True, None
    # Of what is computed as the difference of numbers near one, as cross entropies are, no less is known.
    rounding = FEW_ROUNDINGS * max(precision(values) * max(map(abs, values)), torch.finfo(torch.float64).eps)
    told = [quotient for quotient, length in quotients if rounding / length < CONVERGED * abs(quotient - slope)]
    told = told[-len(STEPS) :]
    off = min((abs(quotient - slope) for quotient in told), default=0.0)
    speak_against = len(told) == len(STEPS) and max(told) - min(told) <= CONVERGED * off
    return False, (slope, told[-1]) if speak_against else None


def precision(values: list[float]) -> float:
    """Relative rounding of the type that a loss was really computed in: the narrowest that holds all values."""
    held = torch.tensor(values, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(held.to(dtype).double(), held):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float64).eps


def _generator_of_directions(function: PureLoss) -> torch.Generator:
    return torch.Generator().manual_seed(function.num_parameters + 1)


def _direction(function: PureLoss, generator: torch.Generator) -> Tensor:
    """Normal numbers, as large in each tensor as its own entries are; where all are zero, as one over its width."""
    pieces = []
    for piece in function.unflatten(function.parameters).values():
        size = float(piece.double().square().mean().sqrt()) or (piece.shape[-1] ** -0.5 if piece.dim() else 1.0)
        pieces.append(size * torch.randn(piece.numel(), generator=generator))
    return torch.cat(pieces).to(function.parameters)


def _value(function: PureLoss, vector: Tensor, batch: int) -> Tensor:
    """With gradients on, as a loss may take some of its own."""
    with torch.enable_grad():
        return function.evaluate(vector.detach().requires_grad_(), batch).detach()


def _check_loss(loss: Any, batch: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dim() > 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn returned {found}; expected a scalar tensor, the mean loss of the batch.")
    if not math.isfinite(loss.item()):
        raise ValueError(
            f"The loss of batch {batch} is {loss.item()}; expected a finite number. Look at the data of the probe "
            "and at the parameters (has training diverged?)."
        )


def _leaves(result: Tensor) -> set[int]:
    """Identities of the leaves that autograd knows a way to."""
    nodes = [result.grad_fn]
    seen = set()
    found = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return found
