"""How a loss bends in the network's outputs: what its divergence can be taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phasewatch.objective.checks import precision
from phasewatch.objective.outputs import OutputsAndSlopes

if TYPE_CHECKING:
    from phasewatch.objective.loss import Objective

FAR = 1000.0
"""How much farther a loss is looked at that seems linear: one with corners is so as far as the next corner. Chosen."""
SMALLER = 0.1
"""Displacements are as large as the outputs' own spread, and by this smaller. Chosen."""
ROUNDING = 100.0
"""Rounding up to which two losses are the same, in units of the precision and the size of what they are made of.
Chosen."""


class Bend(Enum):
    """What a loss is as a function of the outputs."""

    CONVEX = "convex"
    LINEAR = "linear"
    NOT_CONVEX = "not convex"


def bend(objective: Objective, batch: int, start: OutputsAndSlopes) -> Bend:
    """Look at the loss of a batch at outputs displaced from those at the start.

    It is not convex if its divergence from the start is negative at some of them, and linear if it is zero at all. They
    are displaced towards those of other samples, and at random by as much; then those samples alone whose slope turns
    against the motion, which the others would hide.

    Args:
        objective: The loss.
        batch: Index of the batch.
        start: Its outputs and slopes.
    """
    if objective.wide:
        start = replace(start, outputs=[output.double() for output in start.outputs])
    linear = True
    for displacement in _displacements(start.outputs):
        found = _divergence(objective, batch, start, displacement)
        if found is None:
            continue
        divergence, tolerance, slopes = found
        if divergence < -tolerance or _bends_down(objective, batch, start, displacement, slopes):
            return Bend.NOT_CONVEX
        linear &= divergence <= tolerance
    if linear:
        far = _divergence(objective, batch, start, [FAR * step for step in displacement])
        linear = far is None or far[0] <= far[1]
    return Bend.LINEAR if linear else Bend.CONVEX


def _bends_down(
    objective: Objective, batch: int, start: OutputsAndSlopes, displacement: list[Tensor], slopes: list[Tensor]
) -> bool:
    """Whether the divergence is negative where those samples alone move whose slope turns against the motion."""
    against = [
        _of_samples((slope - before) * moved) < 0
        for slope, before, moved in zip(slopes, start.slopes, displacement, strict=True)
    ]
    if not any(bool(chosen.any()) for chosen in against):
        return False
    alone = [moved * chosen for moved, chosen in zip(displacement, against, strict=True)]
    found = _divergence(objective, batch, start, alone)
    return found is not None and found[0] < -found[1]


def _divergence(
    objective: Objective, batch: int, start: OutputsAndSlopes, displacement: list[Tensor]
) -> tuple[float, float, list[Tensor]] | None:
    """The divergence, what rounding makes of it, and the slopes there; None where the loss is not defined."""
    moved = [output + step for output, step in zip(start.outputs, displacement, strict=True)]
    try:
        loss, slopes = objective.loss_and_slopes(batch, moved)
    except (RuntimeError, ValueError):  # as of probabilities that are none
        return None
    steps = [after - before for after, before in zip(moved, start.outputs, strict=True)]  # as they were rounded
    products = [slope * step for slope, step in zip(start.slopes, steps, strict=True)]
    before, after = float(start.loss), float(loss)
    divergence = after - before - sum(float(product.sum(dtype=torch.float64)) for product in products)
    size = 1 + abs(before) + abs(after) + sum(float(product.abs().sum()) for product in products)
    tolerance = ROUNDING * precision([before, after]) * size
    return (divergence, tolerance, slopes) if torch.isfinite(loss) and divergence == divergence else None


def _displacements(outputs: list[Tensor]) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    directions: list[Callable[[Tensor], Tensor]] = [
        lambda output: _others(output, generator) - output,
        lambda output: torch.randn(output.shape, generator=generator).to(output).mul_(_spread(output)),
    ]
    for direction in directions:
        steps = [direction(output) for output in outputs]
        yield steps
        yield [SMALLER * step for step in steps]
    # Outputs that are still next to nothing do not say at what size the loss bends.
    yield [step / min(_spread(output), 1.0) for step, output in zip(steps, outputs, strict=True)]


def _others(output: Tensor, generator: torch.Generator) -> Tensor:
    """The outputs of other samples in the place of each."""
    if not output.dim():
        return output
    return output[torch.randperm(len(output), generator=generator).to(output.device)]


def _spread(output: Tensor) -> float:
    """Standard deviation over samples; where there is none, as at a last layer of zeros, the outputs' size, or 1."""
    spread = float(output.var(0, correction=0).mean().sqrt()) if output.dim() else 0.0
    return spread or float(output.square().mean().sqrt()) or 1.0


def _of_samples(values: Tensor) -> Tensor:
    """Sums over what belongs to one sample or position, in a shape that multiplies the outputs."""
    return values.sum(-1, keepdim=True) if values.dim() > 1 else values
