"""Detection while the run goes on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from synthetic import Run, linear_network, synthetic_run

from phasewatch.transitions import LiveDetector, Transition, detect_transitions


def feed(detector: LiveDetector, run: Run, start: int = 0, stop: int | None = None) -> list[tuple[int, Transition]]:
    """Show the detector the measurements from start to stop; return what it flagged, and when."""
    flags = []
    for index in range(start, len(run.steps) if stop is None else stop):
        values = {name: column[index] for name, column in run.values.items()}
        errors = {name: column[index] for name, column in run.standard_errors.items()}
        flags += [(index, transition) for transition in detector.update(run.steps[index], values, errors)]
    return flags


def two_steps(n: int = 70) -> Run:
    rng = np.random.default_rng(2)
    level = 3.0 - 1.0 * (np.arange(n) >= 25) - 0.8 * (np.arange(n) >= 50)
    llc = 10.0 + 5.0 * (np.arange(n) >= 25) + 0.5 * rng.standard_normal(n)
    loss = level + 0.02 * rng.standard_normal(n)
    # The learning coefficient is measured at every second step only.
    return Run(np.arange(n) * 10.0, {"loss": loss, "llc": np.where(np.arange(n) % 2, np.nan, llc)}, {}, [])


def test_each_transition_is_flagged_once_and_soon() -> None:
    flags = feed(LiveDetector(), two_steps())
    assert len(flags) == 2
    for (index, transition), place in zip(flags, (25, 50), strict=True):
        assert place + 3 <= index <= place + 8
        assert transition.start <= 10.0 * place and transition.end >= 10.0 * (place - 1)
    assert flags[0][1].kind == "A"


def test_a_single_point_raises_nothing() -> None:
    run = two_steps()
    run.values["loss"][:] = 1.0 + 0.01 * np.random.default_rng(0).standard_normal(70)
    run.values["llc"][:] = np.nan
    run.values["loss"][40] = 2.0
    assert feed(LiveDetector(), run) == []


def test_stages_of_a_linear_network_are_flagged_as_they_pass() -> None:
    run, half_way = linear_network((4.0, 2.0, 1.0), 100, initial=1e-6, noise_share=0.001)
    flags = feed(LiveDetector(), run)
    assert len(flags) == 3
    for (index, transition), time in zip(flags, sorted(half_way), strict=True):
        assert transition.start <= time <= transition.end <= run.steps[index]


@pytest.mark.parametrize("pause", [5, 27, 29, 31, 53])
def test_a_resumed_detector_gives_the_same_flags(pause: int) -> None:
    run = two_steps()
    unbroken = LiveDetector(alpha=0.1)
    expected = feed(unbroken, run)
    first = LiveDetector(alpha=0.1)
    flags = feed(first, run, stop=pause)
    second = LiveDetector()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    flags += feed(second, run, start=pause)
    assert flags == expected
    assert second.state_dict() == unbroken.state_dict()
    assert second.flagged == [transition for _, transition in expected]


def plain(value: Any) -> bool:
    """Whether a value is made of plain Python only: subclasses, such as numpy's float64, do not count."""
    if type(value) is dict:
        return all(type(key) is str and plain(item) for key, item in value.items())
    if type(value) is list:
        return all(plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def test_state_is_plain_python() -> None:
    run = synthetic_run(5, 80, transitions=1)
    detector = LiveDetector()
    feed(detector, run)
    detector.update(np.int64(30_000), {"loss": np.float32(1.0)}, reliable={"loss": np.bool_(False)})
    assert plain(detector.state_dict())


def test_no_alarms_on_a_frozen_model() -> None:
    """At most 3 of 12 runs raise an alarm: at a rate of alpha = .05 more would come by chance once in 400."""
    alarms = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n = 60
        run = Run(
            np.arange(n) * 10.0,
            {"loss": np.full(n, 0.3), "llc": 9.0 + rng.standard_normal(n), "nullity": np.full(n, 4.0)},
            {"llc": np.ones(n)},
            [],
        )
        alarms += bool(feed(LiveDetector(), run))
    assert alarms <= 3


def test_signals_that_come_late_or_never() -> None:
    detector = LiveDetector()
    assert detector.update(0, {}) == []
    for step in range(1, 30):
        assert detector.update(step, {"loss": 1.0} if step < 10 else {"loss": 1.0, "nullity": 3}) == []
    assert detect_transitions([0, 1], {"loss": [None, 1.0]}) == []  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, {"loss": 1.0}), "increasing"),
        ((float("nan"), {"loss": 1.0}), "increasing"),
        (("soon", {"loss": 1.0}), "number"),
        ((20, {"loss": float("inf")}), "infinity"),
        ((20, {"loss": "low"}), "number"),
        ((20, {"loss": 1.0}, {"llc": 1.0}), "llc"),
        ((20, {"loss": 1.0}, {"loss": -1.0}), "negative"),
        ((20, {"loss": 1.0}, {}, {"llc": True}), "llc"),
    ],
)
def test_bad_measurements_are_named_and_not_taken(arguments: tuple[Any, ...], message: str) -> None:
    detector = LiveDetector()
    detector.update(10, {"loss": 1.0})
    before = detector.state_dict()
    with pytest.raises(ValueError, match=message):
        detector.update(*arguments)
    assert detector.state_dict() == before


def test_bad_state_and_alpha() -> None:
    with pytest.raises(ValueError, match="alpha"):
        LiveDetector(alpha=1.5)
    with pytest.raises(ValueError, match="state_dict"):
        LiveDetector().load_state_dict({"alpha": 0.05})
