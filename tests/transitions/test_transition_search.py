"""The cost and the search against brute force and against ruptures' own searches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import ruptures
from ruptures.exceptions import BadSegmentationParameters, NotEnoughPoints

from phasewatch.transitions import CostWeightedLine, OptimalPartition


def case(seed: int, n: int, signals: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Irregular times, signals with a large offset, and weights of which some are 0."""
    rng = np.random.default_rng(seed)
    time = np.cumsum(rng.uniform(0.1, 2.0, n))
    y = 1e3 + rng.standard_normal((n, signals)) + 3.0 * (time[:, None] > np.median(time))
    weights = rng.uniform(0.2, 5.0, (n, signals)) * (rng.random((n, signals)) > 0.15)
    return time, y, weights


def weighted_residual(time: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The same by numpy's least squares, one signal at a time."""
    total = 0.0
    for column in range(y.shape[1]):
        root = np.sqrt(weights[:, column])
        design = root[:, None] * np.column_stack([np.ones_like(time), time])
        coefficients = np.linalg.lstsq(design, root * y[:, column], rcond=None)[0]
        total += float(np.sum((root * y[:, column] - design @ coefficients) ** 2))
    return total


def test_cost_equals_weighted_least_squares_on_every_segment() -> None:
    time, y, weights = case(0, 25)
    cost = CostWeightedLine(time, weights, min_size=3).fit(y)
    matrix = cost.matrix()
    for start, end in itertools.combinations(range(26), 2):
        if end - start < 3:
            assert np.isinf(matrix[start, end])
            continue
        expected = weighted_residual(time[start:end], y[start:end], weights[start:end])
        assert cost.error(start, end) == pytest.approx(expected, rel=1e-7, abs=1e-7)
        assert matrix[start, end] == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_missing_points_do_not_count() -> None:
    time, y, weights = case(1, 20, signals=1)
    kept = weights[:, 0] > 0
    spoiled = np.where(weights > 0, y, np.nan)
    cost = CostWeightedLine(time, weights).fit(spoiled)
    assert cost.error(0, 20) == pytest.approx(weighted_residual(time[kept], y[kept], weights[kept]), rel=1e-8)


@pytest.mark.parametrize("penalty", [0.5, 5.0, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_search_is_the_best_of_all_segmentations(seed: int, penalty: float) -> None:
    n = 13
    time, y, weights = case(seed, n)
    cost = CostWeightedLine(time, weights, min_size=3)
    found = OptimalPartition(cost).fit_predict(y, penalty)
    best = min(
        weighted_total(time, y, weights, [*cuts, n], penalty)
        for count in range(n // 3)
        for cuts in itertools.combinations(range(3, n - 2), count)
        if np.all(np.diff([0, *cuts, n]) >= 3)
    )
    assert weighted_total(time, y, weights, found, penalty) == pytest.approx(best, rel=1e-8)


def weighted_total(time: np.ndarray, y: np.ndarray, weights: np.ndarray, ends: list[int], penalty: float) -> float:
    """Penalised cost of a segmentation by numpy's least squares."""
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    return sum(weighted_residual(time[a:b], y[a:b], weights[a:b]) + penalty for a, b in bounds)


@pytest.mark.parametrize("seed", range(3))
def test_search_agrees_with_dynp_of_ruptures(seed: int) -> None:
    time, y, weights = case(10 + seed, 45)
    found = OptimalPartition(CostWeightedLine(time, weights)).fit_predict(y, 8.0)
    dynp = ruptures.Dynp(custom_cost=CostWeightedLine(time, weights), min_size=3, jump=1).fit(y)
    assert dynp.predict(n_bkps=len(found) - 1) == found


def test_pelt_of_ruptures_never_beats_the_search() -> None:
    for seed in range(5):
        time, y, weights = case(20 + seed, 60)
        cost = CostWeightedLine(time, weights)
        found = OptimalPartition(cost).fit_predict(y, 8.0)
        pelt = ruptures.Pelt(custom_cost=CostWeightedLine(time, weights), min_size=3, jump=1).fit_predict(y, 8.0)
        mine = cost.sum_of_costs(found) + 8.0 * len(found)
        assert mine <= cost.sum_of_costs(pelt) + 8.0 * len(pelt) + 1e-8


def test_too_few_points() -> None:
    time, y, weights = case(0, 2)
    with pytest.raises(NotEnoughPoints):
        CostWeightedLine(time, weights).fit(y).error(0, 2)
    with pytest.raises(BadSegmentationParameters):
        OptimalPartition(CostWeightedLine(time, weights)).fit_predict(y, 1.0)


def test_shapes_must_agree() -> None:
    time, y, weights = case(0, 20)
    with pytest.raises(ValueError, match="expected"):
        CostWeightedLine(time, weights[:, :1]).fit(y)
