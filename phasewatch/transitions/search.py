"""The exact search for the best segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ruptures.base import BaseEstimator
from ruptures.exceptions import BadSegmentationParameters

from phasewatch.transitions.cost import CostWeightedLine


class OptimalPartition(BaseEstimator):  # type: ignore[misc]
    """Segmentation of least penalised cost, exact for every minimum segment length, over all points or candidates.

    Optimal partitioning (Jackson et al. 2005) over the matrix of all segments' costs. It answers as
    ``ruptures.Pelt(custom_cost=cost, jump=1)`` does where that is exact (with ``min_size > 1`` its pruning may not be)
    and takes milliseconds where its Python loop takes seconds.
    """

    def __init__(self, cost: CostWeightedLine, candidates: Sequence[int] | None = None) -> None:
        """Take the cost whose ``matrix`` is searched.

        Args:
            cost: the cost of a segment.
            candidates: where segments may end, besides at n; default everywhere.
        """
        self.cost = cost
        self.candidates = candidates

    def fit(self, signal: np.ndarray) -> OptimalPartition:
        """Compute the costs of all segments of ``signal``, shape (n, signals)."""
        self._matrix = self.cost.fit(signal).matrix()
        return self

    def predict(self, pen: float) -> list[int]:
        """Return the ends of the segments of the best segmentation, the last being n.

        Args:
            pen: penalty for each segment.

        Raises:
            BadSegmentationParameters: if there are fewer points than a segment needs.
        """
        n = len(self._matrix) - 1
        if n < self.cost.min_size:
            raise BadSegmentationParameters
        best = np.full(n + 1, np.inf)
        best[0] = 0.0
        previous = np.zeros(n + 1, dtype=int)
        # Row-major access: column j of the matrix is read once for each j.
        columns = np.ascontiguousarray(self._matrix.T)
        allowed = range(n) if self.candidates is None else sorted(set(self.candidates))
        for end in (*(end for end in allowed if self.cost.min_size <= end < n), n):
            candidates = best[:end] + columns[end, :end]
            previous[end] = int(np.argmin(candidates))
            best[end] = candidates[previous[end]] + pen
        ends = [n]
        while previous[ends[-1]] > 0:
            ends.append(int(previous[ends[-1]]))
        return ends[::-1]

    def fit_predict(self, signal: np.ndarray, pen: float) -> list[int]:
        """Fit to ``signal`` and return the ends of its segments at the penalty ``pen``."""
        return self.fit(signal).predict(pen)
