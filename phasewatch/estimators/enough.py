"""How much of a probe is looked at where a part of it says enough."""

from __future__ import annotations

from typing import Any

from phasewatch.objective import Objective

LARGE = 20_000
"""Parameters from which there are fewer chains and moves by default: their coefficients are large, and a few draws say
as much of them as many of a small one. Chosen."""
ROWS, LEAST_SAMPLES = 512, 4
"""Samples, or positions of sequences, of which there are enough: no more of the probe is looked at. Chosen."""


def enough(objective: Objective, needed: int = ROWS) -> Objective:
    """The first batches, as many as hold 512 samples or positions of sequences, or as many as are needed.

    Of a first batch that holds twice as many by itself the first samples, four at least, where their loss is the same.
    """
    rows, batches = 0, 0
    of_shapes: dict[Any, int] = {}
    while rows < needed and batches < objective.num_batches:
        shapes = objective.batch_shapes(batches)
        if shapes not in of_shapes:
            outputs = objective.outputs(objective.parameters, batches)
            of_shapes[shapes] = max(o.numel() // o.shape[-1] if o.dim() > 1 else o.numel() for o in outputs)
        rows += of_shapes[shapes]
        batches += 1
    if batches == 1 and rows >= 2 * needed:
        samples = max(-(-needed * objective.batch_sizes[0] // rows), LEAST_SAMPLES)
        if (few := objective.first_samples(samples)) is not None:
            return few
    return objective if batches == objective.num_batches else objective.first_batches(batches)
