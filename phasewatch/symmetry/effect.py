"""What a direction changes: whether it is a zero."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from phasewatch.objective import Objective
from phasewatch.symmetry.directions import Array
from phasewatch.symmetry.tape import Linearization

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative change of the outputs up to which a direction counts as a zero. Chosen: some million units of the last place
in double precision, some hundred in single."""


class RelativeEffect:
    """Size of the change of the outputs along a direction, weighted as the loss sees it, relative to the largest."""

    def __init__(self, objective: Objective, linearizations: Sequence[Linearization]) -> None:
        """Nothing is computed yet.

        Args:
            objective: The loss on the probe.
            linearizations: The network and the loss on each of its batches.
        """
        self._objective = objective
        self._batches = linearizations
        parts = zip(objective.batch_weights, self._batches, strict=True)
        self._scale = float(np.sqrt(sum(weight**2 * batch.squared_norm for weight, batch in parts)))

    @cached_property
    def rank_limit(self) -> int:
        """Number of outputs that the loss tells apart: of a softmax one less for each distribution."""
        return sum(batch.rank_limit(TOLERANCE[self._objective.dtype]) for batch in self._batches)

    def __call__(self, direction: Array) -> float:
        """Of a direction of shape ``(num_parameters,)``; 0 where nothing can have an effect."""
        norm = float(np.linalg.norm(direction))
        return self._size(direction) / (self._scale * norm) if norm and self._scale else 0.0

    def _size(self, direction: Array) -> float:
        vector = torch.as_tensor(direction).to(self._objective.parameters)
        total = 0.0
        for weight, batch in zip(self._objective.batch_weights, self._batches, strict=True):
            total += float(sum(change.double().square().sum() for change in batch(vector))) * weight**2
        return float(np.sqrt(total))
