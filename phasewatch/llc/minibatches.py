"""In which order chains see the batches, and what the change from one to the next does to them.

A batch serves several moves. When the next takes over, the potential of a chain that has settled on the last one rises:
it jumps. The friction drains that energy; what it leaves of it is the heating, known since the jumps are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from phasewatch.llc.diagnostics import FloatArray


def balanced_batches(weights: Sequence[float], random: np.random.Generator) -> Iterator[int]:
    """Batch numbers without end, each as often as its weight says, in random order, pass by pass.

    Args:
        weights: Share of each batch; they sum to 1.
        random: Draws the order.
    """
    count = len(weights)
    while True:
        order = random.permutation(count)
        edges = np.cumsum(np.asarray(weights)[order])
        points = (np.arange(count) + random.random()) / count
        chosen = order[np.minimum(np.searchsorted(edges, points, side="right"), count - 1)]
        yield from random.permutation(chosen).tolist()


def heating(jumps: Sequence[Tensor], drained: float) -> tuple[FloatArray, FloatArray]:
    """What the change of batches adds to the mean of nbeta L, chain by chain.

    Where as much is drained as comes in, the surplus of kinetic energy is what comes in over the share that is drained
    until the next jump, and that of potential energy is the same.

    Args:
        jumps: Changes of the potential, at least one, each of shape ``(chains,)``; NaN where there is nothing to see.
        drained: Share of the surplus of kinetic energy that friction takes away between two jumps.

    Returns:
        The heating and its standard error.
    """
    values = torch.stack(list(jumps)).cpu().numpy() / drained
    count = np.maximum(np.isfinite(values).sum(axis=0), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a chain whose segments were all refused
        means = np.nan_to_num(np.nanmean(values, axis=0))
        spread = np.nan_to_num(np.nanstd(values, axis=0)) if len(values) > 1 else np.abs(means)
    return means, spread / np.sqrt(count)


def variance_over_batches(jumps: Sequence[Tensor]) -> FloatArray:
    """Variance of the potential at one position over the batches, chain by chain.

    It is half that of the jumps, each the difference of two batches; rather too large, as chains settle on each.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a chain whose segments were all refused
        variance: FloatArray = np.nan_to_num(np.nanvar(torch.stack(list(jumps)).cpu().numpy(), axis=0)) / 2
    return variance
