"""Where a transition is: the posterior of a ramp between two drifting stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ramp:
    """The place of a ramp.

    Attributes:
        start: index of the last measurement of the stage before, at the posterior's mode.
        end: index of the first measurement of the stage after.
        location: posterior median of the half-way time.
        interval: 95 % credible interval of the half-way time, no narrower than the measurements resolve.
    """

    start: int
    end: int
    location: float
    interval: tuple[float, float]


# The most starts and the most ends that are tried. Chosen.
GRID = 24


def locate_ramp(
    time: np.ndarray, signals: np.ndarray, weights: np.ndarray, before: tuple[int, int], after: tuple[int, int]
) -> Ramp:
    """Locate a smooth ramp (``3 x**2 - 2 x**3``) from the line of one stage to that of the next, in all signals.

    Every (start, end) on a grid of measurements is weighted by its marginal likelihood, the lines' coefficients having
    flat priors.

    Args:
        time: time of each measurement, shape (n,).
        signals: the signals, shape (n, signals).
        weights: inverse variances, shape (n, signals).
        before: [first, last + 1) of the stage before.
        after: [first, last + 1) of the stage after.
    """
    first, stop = before[0], after[1]
    gap = after[0] - before[1] + 1
    reach = max(4, gap)
    starts = _grid(max(before[1] - 1 - reach, first + 2), min(before[1] - 1 + reach, after[1] - 4))
    ends = _grid(max(after[0] - reach, before[0] + 3), min(after[0] + reach, stop - 3))
    pairs = np.array([(a, b) for a in starts for b in ends if a < b])
    if len(pairs) == 0:
        pairs = np.array([(before[1] - 1, after[0])])
    # No stage need be used further from the ramp than it takes to know its line.
    window = slice(max(first, before[1] - 60), min(stop, after[0] + 60))
    log_likelihood = _log_marginal(time[window], signals[window], weights[window], time[pairs[:, 0]], time[pairs[:, 1]])
    mass = np.exp(log_likelihood - log_likelihood.max())
    start, end = (int(k) for k in pairs[np.argmax(mass)])
    half_way = time[pairs].mean(axis=1)
    order = np.argsort(half_way, kind="stable")
    below = np.cumsum(mass[order]) / mass.sum()
    low, middle, high = (float(half_way[order][np.searchsorted(below, q)]) for q in (0.025, 0.5, 0.975))
    place = int(np.clip(np.searchsorted(time, middle), 1, len(time) - 1))
    resolution = 0.5 * float(time[place] - time[place - 1])
    middle = float(np.clip(middle, time[start], time[end]))
    return Ramp(start, end, middle, (min(low, middle) - resolution, max(high, middle) + resolution))


def _grid(low: int, high: int) -> np.ndarray:
    if high - low < GRID:
        return np.arange(low, high + 1)
    return np.unique(np.linspace(low, high, GRID).round().astype(int))


def _log_marginal(
    time: np.ndarray, signals: np.ndarray, weights: np.ndarray, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Log marginal likelihood of each ramp, up to a constant shared by all."""
    span = float(np.ptp(time)) or 1.0
    x = (time - time.mean()) / span
    share = np.clip((time - start[:, None]) / (end - start)[:, None], 0.0, 1.0)
    share = share**2 * (3.0 - 2.0 * share)
    basis = np.stack([1.0 - share, (1.0 - share) * x, share, share * x], axis=-1)
    products = (basis[..., :, None] * basis[..., None, :]).reshape(*basis.shape[:2], 16)
    total = np.zeros(len(start))
    for column in range(signals.shape[1]):
        w = weights[:, column]
        if not np.any(w > 0):
            continue
        centre = (w * signals[:, column]).sum() / w.sum()
        y = np.where(w > 0, signals[:, column] - centre, 0.0)
        gram = np.einsum("pnk,n->pk", products, w, optimize=True).reshape(-1, 4, 4)
        # A ridge far below the data's weight: it only matters for a signal that one stage never saw.
        gram = gram + 1e-9 * w.sum() * np.eye(4)
        moment = np.einsum("pnk,n->pk", basis, w * y, optimize=True)
        fitted = np.linalg.solve(gram, moment[..., None])[..., 0]
        total += 0.5 * (moment * fitted).sum(axis=1) - 0.5 * np.linalg.slogdet(gram)[1]
    return total
