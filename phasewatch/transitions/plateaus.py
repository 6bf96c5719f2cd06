"""Boundaries of developmental stages: where the smoothed learning coefficient has slope zero in log time.

After Hoogland et al. 2024, "The developmental landscape of in-context learning": a Gaussian process over log time, and
the zeros of its slope. A zero counts where the slope is beyond doubt on both sides of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from phasewatch.record.signals import LLC, LLC_BEHAVIORAL, NORMAL_95
from phasewatch.record.transition import Transition
from phasewatch.transitions.series import Scaled
from phasewatch.transitions.wording import describe

LENGTHS = np.array([0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5])
GRID = 400
"""Lengths of the smoothing, as shares of the run in log time, and places at which its slope is looked at. Chosen."""


def plateau_boundaries(scaled: Scaled) -> list[Transition]:
    """Return the places at which a smoothed signal turns, each between its doubtful slopes.

    It is the learning coefficient of the function, else that of the loss, else the first signal.
    """
    names = [signal.name for signal in scaled.signals]
    k = next((names.index(name) for name in (LLC_BEHAVIORAL, LLC) if name in names), 0)
    present = scaled.present[:, k]
    time, y, sigma = scaled.time[present], scaled.y[present, k], scaled.sigma[present, k]
    extent = float(np.ptp(time))
    x = (time - time[0]) / extent
    level = float(np.average(y, weights=1 / sigma**2))
    y = y - level
    length, factor, gain = min(
        ((a, factor, s) for a in LENGTHS for factor in (0.5, 1.0, 2.0) for s in (0.1, 0.3, 1.0, 3.0)),
        key=lambda choice: _minus_log_likelihood(x, y, sigma, *choice),
    )
    grid = np.linspace(0.0, 1.0, GRID)
    covariance = _covariance(x, x, length, gain) + np.diag((factor * sigma) ** 2)
    difference = grid[:, None] - x
    across = _covariance(grid, x, length, gain)
    slope_across = -difference / length**2 * across
    mean = across @ np.linalg.solve(covariance, y)
    slope = slope_across @ np.linalg.solve(covariance, y)
    explained = (slope_across * np.linalg.solve(covariance, slope_across.T).T).sum(axis=1)
    error = np.sqrt(np.maximum(gain**2 / length**2 - explained, 1e-12))
    sign = np.where(np.abs(slope) > NORMAL_95 * error, np.sign(slope), 0.0)
    sure = np.flatnonzero(sign)
    found = []
    for a, b in zip(sure, sure[1:], strict=False):
        if sign[a] == sign[b]:
            continue
        turn = a + int(np.argmin(np.abs(slope[a : b + 1])))
        low, middle, high = (
            float(np.interp(time[0] + extent * grid[i], scaled.time, scaled.steps)) for i in (a, turn, b)
        )
        count = len(names)
        place = int(np.searchsorted(scaled.steps, middle))
        levels, errors = np.zeros(count), np.full(count, np.inf)
        levels[k], errors[k] = level + mean[turn], float(error[turn]) * length
        transition = describe(
            scaled,
            extent=(low, high),
            step=middle,
            interval=(low, high),
            before=levels,
            change=np.zeros(count),
            error=errors,
            z=np.zeros(count),
            quantile=np.full(count, NORMAL_95),
            seen=np.zeros(count, dtype=bool),
            sides=((0, place), (place, len(scaled.steps))),
            p_value=0.05,
        )
        found.append(_renamed(transition))
    return found


def _renamed(transition: Transition) -> Transition:
    return replace(transition, kind="plateau", resolutions=())


def _covariance(a: np.ndarray, b: np.ndarray, length: float, gain: float) -> np.ndarray:
    return np.asarray(gain**2 * np.exp(-0.5 * ((a[:, None] - b) / length) ** 2))


def _minus_log_likelihood(
    x: np.ndarray, y: np.ndarray, sigma: np.ndarray, length: float, factor: float, gain: float
) -> float:
    covariance = _covariance(x, x, length, gain) + np.diag((factor * sigma) ** 2)
    root = np.linalg.cholesky(covariance)
    half = np.linalg.solve(root, y)
    return float(0.5 * half @ half + np.log(np.diag(root)).sum())
