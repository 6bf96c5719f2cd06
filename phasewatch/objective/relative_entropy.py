"""The relative entropy of outputs that are log-probabilities already, in which their loss is linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phasewatch.objective.outputs import OutputsAndSlopes, total

NORMALIZED = 1e-3
"""How far the logarithm of the sum of probabilities may be from zero. Chosen."""


def log_probability_dimension(output: Tensor) -> int | None:
    """The dimension, the last or the first after the samples, along which the exponentials add up to one."""
    for dim in [-1, 1][: max(0, output.dim() - 1)]:
        if output.shape[dim] > 1 and bool((output.logsumexp(dim).abs() < NORMALIZED).all()):
            return dim
    return None


@dataclass(frozen=True)
class RelativeEntropy:
    """Reads the Kullback-Leibler divergence from the model at the start off its log-probabilities.

    Each sample or position weighs as much as its slopes sum to: 1 / count in a mean negative log-likelihood, its weight
    in a weighted one, nothing where it is ignored.

    Attributes:
        dimensions: Of each output tensor, that along which its probabilities stand; None where the loss sees none.
    """

    dimensions: tuple[int | None, ...]

    def given(self, start: OutputsAndSlopes) -> list[Tensor]:
        """What it is given of a batch, after a factor."""
        weighted = [
            output.exp() * (-slope.sum(dim, keepdim=True) if dim is not None else torch.zeros_like(slope))
            for output, slope, dim in zip(start.outputs, start.slopes, self.dimensions, strict=True)
        ]
        return [*start.outputs, *weighted]

    def __call__(self, outputs: list[Tensor], _loss: Tensor, start: list[Tensor]) -> Tensor:
        """``start`` holds a factor, the outputs at the start, and their weighted probabilities."""
        values, weighted = start[1 : 1 + len(outputs)], start[1 + len(outputs) :]
        moved = zip(outputs, values, weighted, strict=True)
        return start[0] * total([(weight * (value - output)).sum() for output, value, weight in moved])
