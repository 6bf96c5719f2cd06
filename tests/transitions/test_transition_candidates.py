"""The searches of ruptures as the source of candidates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import ruptures
from ruptures.base import BaseEstimator
from synthetic import linear_network, synthetic_run

from phasewatch.transitions import CostWeightedLine, LiveDetector, OptimalPartition, detect_transitions

SEARCHES = {
    "Pelt": lambda: ruptures.Pelt(model="l2", jump=1),
    "Pelt, kernel": lambda: ruptures.Pelt(model="rbf", jump=1),
    "Dynp": lambda: ruptures.Dynp(model="l2", jump=1),
    "Binseg": lambda: ruptures.Binseg(model="l2", jump=1),
    "BottomUp": lambda: ruptures.BottomUp(model="l2", jump=1),
    "Window": lambda: ruptures.Window(width=10, model="l2", jump=1),
    "KernelCPD": lambda: ruptures.KernelCPD(kernel="rbf"),
    "our cost": lambda: ruptures.Dynp(custom_cost=CostWeightedLine(np.arange(60.0), np.ones((60, 2))), jump=1),
}


def two_steps(seed: int = 0, missing: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A loss that falls at the 20th and at the 40th of 60 measurements, and a coefficient that rises there."""
    rng = np.random.default_rng(seed)
    at = np.arange(60)
    loss = 3.0 - 1.0 * (at >= 20) - 1.0 * (at >= 40) + 0.08 * rng.standard_normal(60)
    llc = 10.0 + 5.0 * (at >= 20) + 5.0 * (at >= 40) + 0.5 * rng.standard_normal(60)
    return 100.0 * at, {"loss": loss, "llc": np.where(missing & (at % 3 == 1), np.nan, llc)}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_of_ruptures_leads_to_the_same_transitions(name: str, missing: bool) -> None:
    steps, values = two_steps(missing=missing)
    search = SEARCHES[name]()
    before = dict(vars(search))
    found = detect_transitions(steps, values, search=search)
    assert len(found) == 2
    for transition, place in zip(found, (20, 40), strict=True):
        assert 100.0 * (place - 2) <= transition.start <= 100.0 * place
        assert 100.0 * (place - 1) <= transition.end <= 100.0 * (place + 1)
        assert transition.kind == "A"
    assert vars(search) == before


@pytest.mark.parametrize("name", ["Pelt", "Binseg", "BottomUp"])
def test_what_another_search_proposes_is_judged_as_strictly(name: str) -> None:
    """At most 9 of 60 runs of noise alone with an alarm: at a rate of .05 more would come once in 1,000."""
    alarms = 0
    for seed in range(60):
        run = synthetic_run(70_000 + seed, 60, transitions=0)
        alarms += bool(detect_transitions(run.steps, run.values, search=SEARCHES[name]()))
    assert alarms <= 9


def test_candidates_in_a_course_that_is_resolved() -> None:
    run = linear_network((4.0, 2.0, 1.0), 100, initial=1e-6, seed=0)
    found = detect_transitions(run.steps, run.values, search=ruptures.BottomUp(model="clinear", jump=1))
    assert len(found) == len(run.transitions)
    for transition, truth in zip(found, run.transitions, strict=True):
        assert transition.start <= truth.step[0] <= transition.end


@pytest.mark.parametrize("seed", range(4))
def test_partition_over_some_candidates_is_the_best_of_those(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = np.cumsum(rng.standard_normal((40, 1)), axis=0)
    cost = CostWeightedLine(np.arange(40.0), np.ones((40, 1))).fit(y)
    candidates = sorted(rng.choice(np.arange(1, 40), 6, replace=False).tolist())
    found = OptimalPartition(cost, candidates).fit_predict(y, 4.0)
    assert set(found) <= {*candidates, 40}

    def total(ends: list[int]) -> float:
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        return math.inf if any(b - a < 3 for a, b in bounds) else sum(cost.error(a, b) + 4.0 for a, b in bounds)

    subsets = ([c for k, c in enumerate(candidates) if chosen >> k & 1] for chosen in range(64))
    assert total(found) == pytest.approx(min(total([*ends, 40]) for ends in subsets), rel=1e-9)


def test_live_detection_asks_the_search_too() -> None:
    steps, values = two_steps()

    class Counting(ruptures.Binseg):  # type: ignore[misc]
        asked = 0

        def predict(self, **how: Any) -> Any:
            Counting.asked += 1
            return super().predict(**how)

    detector = LiveDetector(search=Counting(model="l2", jump=1))
    for k, step in enumerate(steps):
        detector.update(step, {name: column[k] for name, column in values.items()})
    assert len(detector.transitions) == 2
    assert Counting.asked > 0


@pytest.mark.parametrize("given", [ruptures.Pelt, "pelt", 3])
def test_what_is_no_search_is_refused(given: Any) -> None:
    steps, values = two_steps()
    with pytest.raises(TypeError, match="expected a search of ruptures"):
        detect_transitions(steps, values, search=given)
    with pytest.raises(TypeError, match="expected a search of ruptures"):
        LiveDetector(search=given)


@pytest.mark.parametrize("answer", [[], [60, 20], [20], [20, 61]])
def test_an_answer_that_is_no_segmentation_is_refused(answer: list[int]) -> None:
    class Odd(BaseEstimator):  # type: ignore[misc]
        def fit(self, signal: np.ndarray) -> Odd:
            return self

        def fit_predict(self, signal: np.ndarray, pen: float) -> list[int]:
            return answer

        def predict(self, pen: float) -> list[int]:
            return answer

    steps, values = two_steps()
    with pytest.raises(ValueError, match="expected increasing ends of segments, the last of them 60"):
        detect_transitions(steps, values, search=Odd())


@pytest.mark.parametrize("points", [8, 12, 25])
@pytest.mark.parametrize("search", [ruptures.Window(width=100), ruptures.Dynp(min_size=30), ruptures.Pelt(min_size=30)])
def test_a_search_that_makes_nothing_of_few_measurements_proposes_nothing(search: BaseEstimator, points: int) -> None:
    values = {"loss": np.where(np.arange(points) < points // 2, 2.0, 1.0) + 0.1 * np.cos(17.0 * np.arange(points))}
    assert detect_transitions(np.arange(points), values, search=search) == []
