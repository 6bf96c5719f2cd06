"""The distance of a network's outputs from those at the start, in units of their own variance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phasewatch.objective.outputs import ConstantOutputsError, NoOutputsError, OutputsAndSlopes, total
from phasewatch.objective.relative_entropy import log_probability_dimension
from phasewatch.objective.start import OutputsAtStart

if TYPE_CHECKING:
    from phasewatch.objective.loss import Objective

ROUNDING = 100.0
"""Rounding up to which two numbers are the same, in units of the precision and the size of what they are made of.
Chosen."""


@dataclass(frozen=True)
class OutputDistance:
    """Reads half the weighted squared distance from the outputs of a batch.

    Attributes:
        centred: Of each output tensor, the dimension along which only what differs from the mean counts; None if all
            counts.
    """

    centred: tuple[int | None, ...]

    def __call__(self, outputs: list[Tensor], _loss: Tensor, start: list[Tensor]) -> Tensor:
        """``start`` holds for each output tensor where it was, and a weight for each sample or position."""
        parts = [
            (weights * _centre(output - value, dim).square()).sum()
            for output, value, weights, dim in zip(outputs, start[::2], start[1::2], self.centred, strict=True)
        ]
        return 0.5 * total(parts)


def output_distance(objective: Objective, start: OutputsAtStart) -> tuple[OutputDistance, Sequence[list[Tensor]]]:
    """What reads the distance, and what it is given for each batch.

    Raises:
        ConstantOutputsError: If the outputs are the same for all samples.
        NoOutputsError: If the loss sees none of them, or batches differ in how many there are for each sample.
    """
    first = start[0].outputs
    numbers = range(len(first))
    centred = tuple(_shifted_dimension(objective, start, number) for number in numbers)
    features = [
        (-1 if output.dim() > 1 else None) if dim is None else dim for output, dim in zip(first, centred, strict=True)
    ]
    # Moments of each output over samples and positions, as sums weighted like the batches.
    seen: list[list[Tensor]] = []
    weights = [0.0 for _ in numbers]
    sums: list[list[Tensor]] = [[] for _ in numbers]
    for batch, share in enumerate(objective.batch_weights):
        own = start[batch]
        seen.append(_seen(objective, own, batch, features))
        for number, output in enumerate(own.outputs):
            rows = _rows(_centre(output, centred[number]), features[number]).double()
            rows = rows[seen[batch][number].flatten()]
            if not len(rows):
                continue
            weights[number] += share
            found = [share * rows.mean(0), share * rows.square().mean(0)]
            if sums[number] and len(sums[number][0]) != len(found[0]):
                raise NoOutputsError(
                    f"The outputs of batch {batch} have another number of entries for each sample than those before "
                    f"it ({len(found[0])}, and {len(sums[number][0])}), so that they have no variance in common. Give "
                    "batches of one width, or use metric='loss'."
                )
            sums[number] = [a + b for a, b in zip(sums[number], found, strict=True)] if sums[number] else found
    variances = [_variance(own, weight, objective.dtype) for own, weight in zip(sums, weights, strict=True)]
    if not any(weights):
        raise NoOutputsError("The loss depends on none of the network's outputs; there is nothing to measure.")

    def given(batch: int, own: OutputsAndSlopes) -> list[Tensor]:
        tensors = []
        for output, rows, variance in zip(own.outputs, seen[batch], variances, strict=True):
            share = rows.to(output.dtype) / rows.sum().clamp(min=1)
            tensors += [output, share / variance if variance else torch.zeros_like(share)]
        return tensors

    return OutputDistance(centred), start.of_each_batch(given)


def _variance(sums: list[Tensor], weight: float, dtype: torch.dtype) -> float:
    """The variance over samples and positions, its mean over what stands in each; 0 for outputs that nobody sees."""
    if not weight:
        return 0.0
    mean, square = (total / weight for total in sums)
    variance = float((square - mean.square()).mean())
    if variance <= (ROUNDING * torch.finfo(dtype).eps) ** 2 * float(square.mean()):
        raise ConstantOutputsError(
            "The network's outputs are the same for every sample, so that there is no variance to measure their "
            "distance in; use metric='loss', or wait until the network says something (a last layer at zero says the "
            "same of everything)."
        )
    return variance


def _shifted_dimension(objective: Objective, start: OutputsAtStart, number: int) -> int | None:
    """The dimension along which the loss does not see a shift of all outputs alike.

    It is looked for in the first batch where the loss sees the outputs at all, at the start or, where all predictions
    are right to the last digit, at zero. What is normalized, as log-probabilities are, has been shifted already.
    """
    for batch in range(objective.num_batches):
        own = start[batch]
        if (normalized := log_probability_dimension(own.outputs[number])) is not None:
            return normalized
        for outputs in (own.outputs, [torch.zeros_like(output) for output in own.outputs]):
            loss, slopes = objective.loss_and_slopes(batch, outputs)
            if bool((slopes[number] != 0).any()):
                return _unseen_shift(objective, batch, outputs, number, float(loss))
    return None


def _unseen_shift(objective: Objective, batch: int, outputs: list[Tensor], number: int, loss: float) -> int | None:
    output = outputs[number]
    size = float(output.abs().max())
    generator = torch.Generator().manual_seed(number)
    for dim in [-1, 1][: max(0, output.dim() - 1)]:
        if output.shape[dim] < 2:
            continue
        shape = list(output.shape)
        shape[dim] = 1
        shift = (1 + size) * torch.randn(shape, generator=generator, dtype=torch.float64).to(output)
        with suppress(RuntimeError, ValueError):  # outputs that the loss does not take, as of probabilities
            found, _ = objective.loss_and_slopes(batch, [*outputs[:number], output + shift, *outputs[number + 1 :]])
            if abs(float(found) - loss) <= ROUNDING * torch.finfo(objective.dtype).eps * (1 + size + abs(loss)):
                return dim
    return None


def _seen(objective: Objective, start: OutputsAndSlopes, batch: int, features: list[int | None]) -> list[Tensor]:
    """Which samples and positions the loss depends on; the slope in the others is zero whatever the network says.

    Where it is zero at the start (a prediction that is right to the last digit has none either), it is looked at where
    all say the same, half-way there, and where all outputs are zero.
    """
    means = [_mean(output, dim) for output, dim in zip(start.outputs, features, strict=True)]
    half_way = [0.5 * (output + mean) for output, mean in zip(start.outputs, means, strict=True)]
    seen = [_any(slope != 0, dim) for slope, dim in zip(start.slopes, features, strict=True)]
    for outputs in (means, half_way, [torch.zeros_like(output) for output in start.outputs]):
        if all(bool(rows.all()) for rows in seen):
            break
        with suppress(RuntimeError, ValueError):  # as above
            _, slopes = objective.loss_and_slopes(batch, outputs)
            seen = [rows | _any(slope != 0, dim) for rows, slope, dim in zip(seen, slopes, features, strict=True)]
    return seen


def _centre(output: Tensor, dim: int | None) -> Tensor:
    return output if dim is None else output - output.mean(dim, keepdim=True)


def _rows(output: Tensor, feature: int | None) -> Tensor:
    """Shape ``(samples and positions, outputs of each)``."""
    return output.reshape(-1, 1) if feature is None else output.movedim(feature, -1).flatten(0, -2)


def _any(found: Tensor, feature: int | None) -> Tensor:
    return found if feature is None else found.any(feature, keepdim=True)


def _mean(output: Tensor, feature: int | None) -> Tensor:
    """What the network says of all samples and positions together, in the shape of the output."""
    dims = [dim for dim in range(output.dim()) if feature is None or dim != feature % output.dim()]
    return output.mean(dims, keepdim=True).expand_as(output) if dims else output
