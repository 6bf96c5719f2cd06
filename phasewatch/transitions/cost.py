"""The cost of a stage: weighted least squares about a line in time, summed over the signals."""

from __future__ import annotations

from typing import Any

import numpy as np
from ruptures.base import BaseCost
from ruptures.exceptions import NotEnoughPoints

BLOCK = 32
"""Starts of segments whose costs are computed together, for memory. Chosen."""


class CostWeightedLine(BaseCost):  # type: ignore[misc]
    """Weighted residual sum of squares of a straight line in ``time`` in each signal, each segment with its own line.

    With ``drift=False`` of a constant instead.

    With weights ``1/sigma**2`` this is minus twice the Gaussian log-likelihood (up to a constant). All segments' costs
    come from prefix sums, so that one is O(signals) and the matrix of all of them a handful of array operations.
    Missing points have weight 0. Serves ``ruptures.Pelt`` and ``ruptures.Dynp`` as ``custom_cost``.

    Attributes:
        time: increasing time of each point, shape (n,).
        weights: weight of each point of each signal, shape (n, signals).
        min_size: fewest points of a segment.
        drift: whether a segment has a slope.
        signal: the signals as fitted, shape (n, signals).
    """

    model = "weighted line"

    def __init__(self, time: np.ndarray, weights: np.ndarray, min_size: int = 3, drift: bool = True) -> None:
        """Take the times and weights; the signals come with ``fit``."""
        self.time = np.asarray(time, dtype=float)
        self.weights = np.asarray(weights, dtype=float)
        self.min_size = min_size
        self.drift = drift

    def fit(self, signal: np.ndarray) -> CostWeightedLine:
        """Take the signals, shape (n, signals), finite wherever their weight is not 0."""
        signal = np.asarray(signal, dtype=float)
        self.signal = signal.reshape(len(signal), -1)
        w = self.weights
        if self.signal.shape != w.shape or len(self.time) != len(w):
            raise ValueError(
                f"signal has shape {self.signal.shape}, weights {w.shape} and time {self.time.shape}: "
                "expected (n, signals), (n, signals) and (n,)"
            )
        present = w > 0
        y = np.where(present, self.signal, 0.0)
        total = np.maximum(w.sum(axis=0), np.finfo(float).tiny)
        # Sums of squares lose digits to a large mean: both axes are centred first.
        y = np.where(present, y - (w * y).sum(axis=0) / total, 0.0)
        span = float(self.time[-1] - self.time[0]) or 1.0
        x = ((self.time - self.time.mean()) / span)[:, None]
        moments = np.stack([w, w * x, w * x * x, w * y, w * x * y, w * y * y])
        self._sums = np.concatenate([np.zeros((6, 1, w.shape[1])), np.cumsum(moments, axis=1)], axis=1)
        return self

    def error(self, start: int, end: int) -> float:
        """Return the cost of the segment ``[start, end)``.

        Raises:
            NotEnoughPoints: if it has fewer than ``min_size`` points.
        """
        if end - start < self.min_size:
            raise NotEnoughPoints
        return float(_residual(self._sums[:, end] - self._sums[:, start], self.drift).sum())

    def matrix(self) -> np.ndarray:
        """Return the costs of all segments, shape (n + 1, n + 1); infinite where a segment is too short."""
        size = self._sums.shape[1]
        cost = np.zeros((size, size))
        for signal in range(self._sums.shape[2]):
            sums = np.ascontiguousarray(self._sums[:, :, signal])
            # A block of starts at a time stays in the processor's cache; ends before them are not needed.
            for first in range(0, size, BLOCK):
                starts = slice(first, first + BLOCK)
                cost[starts, first:] += _residual(sums[:, None, first:] - sums[:, starts, None], self.drift)
        index = np.arange(size)
        cost[index[None, :] - index[:, None] < self.min_size] = np.inf
        return cost


def _residual(moments: np.ndarray, drift: bool) -> Any:
    """Residual sum of squares of weighted lines or means from (w, wx, wxx, wy, wxy, wyy), elementwise."""
    w, wx, wxx, wy, wxy, wyy = moments
    safe = np.where(w > 0, w, 1.0)
    syy = wyy - wy * wy / safe
    if not drift:
        return np.where(w > 0, np.maximum(syy, 0.0), 0.0)
    sxx = wxx - wx * wx / safe
    sxy = wxy - wx * wy / safe
    sloped = sxx > 1e-12 * np.abs(wxx)
    explained = np.where(sloped, sxy * sxy / np.where(sloped, sxx, 1.0), 0.0)
    return np.where(w > 0, np.maximum(syy - explained, 0.0), 0.0)
