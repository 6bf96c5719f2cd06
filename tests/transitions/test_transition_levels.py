"""Levels that are told of a transition and of stages lie among the points that were measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phasewatch.transitions import LiveDetector, Transition, detect_transitions
from phasewatch.transitions.detect import scaled_run
from phasewatch.transitions.levels import NEAREST
from phasewatch.transitions.series import Scaled
from phasewatch.transitions.wording import describe

SHAPES = ("steps", "ramps", "drift", "spikes", "fall")
Series = dict[str, np.ndarray]


def drawn_series(seed: int, n: int, shapes: Sequence[str]) -> tuple[np.ndarray, Series, Series]:
    """Steps, values and reliability of a positive signal, one of both signs and a count, some points missing."""
    rng = np.random.default_rng(seed)
    index = np.arange(n)
    steps = np.geomspace(1, 1e4, n) if rng.random() < 0.5 else 100.0 * index
    time = np.log1p(steps)
    values = {}
    for name, scale in (("loss", 0.03), ("hessian_min", 0.1), ("zeros_dead", 1.0)):
        course = scale * rng.choice([0.1, 0.5, 1.0]) * rng.standard_normal(n)
        for place in rng.integers(4, n - 4, size=2):
            height = scale * rng.uniform(-40, 40)
            if "steps" in shapes:
                course = course + height * (index >= place)
            if "ramps" in shapes:
                course = course + height / (1 + np.exp(-(index - place) / rng.uniform(0.5, n / 15)))
        if "drift" in shapes:
            course = course + scale * rng.uniform(-10, 10) * (time - time[0])
        if "fall" in shapes:
            course = course + 100 * scale * np.exp(-6 * index / n)
        if "spikes" in shapes:
            course = course + scale * 50 * rng.standard_normal(n) * (rng.random(n) < 0.05)
        if name == "loss":
            course = course - course.min() + scale
        if name == "zeros_dead":
            course = np.round(np.maximum(course - np.median(course), 0.0))
        values[name] = np.where(rng.random(n) < 0.1, np.nan, course)
    reliable = {"hessian_min": (rng.random(n) < 0.5) & (index > n // 3)}
    return steps, values, reliable


def assert_told_among_points(found: Sequence[Transition], steps: np.ndarray, values: Series, reliable: Series) -> None:
    for k, transition in enumerate(found):
        # Stages of less than three measurements between wide transitions are told from what is about their middle.
        earlier, later = found[k - 1] if k else None, found[k + 1] if k + 1 < len(found) else None
        low, high = -np.inf, np.inf
        if earlier is not None:
            between = ((steps >= earlier.end) & (steps <= transition.start)).sum()
            low = earlier.end if between >= 3 else earlier.start
        if later is not None:
            between = ((steps >= transition.end) & (steps <= later.start)).sum()
            high = later.start if between >= 3 else later.end
        here = (steps >= low) & (steps <= high)
        for name, change in transition.changes.items():
            sound = reliable.get(name, np.ones(len(steps), bool)) if change.reliable else np.ones(len(steps), bool)
            points = values[name][here & sound & np.isfinite(values[name])]
            for level in (change.before, change.after):
                assert points.min() <= level <= points.max(), (name, change, transition)
            assert change.change == change.after - change.before
            assert change.interval[0] <= change.change <= change.interval[1]
            assert change.change * change.z >= 0


@settings(max_examples=30, deadline=None)
@example(seed=0, n=40, shapes=["steps", "drift"])
@given(
    seed=st.integers(0, 100_000),
    n=st.integers(12, 90),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4, unique=True),
)
def test_levels_lie_among_the_points_of_their_stages(seed: int, n: int, shapes: list[str]) -> None:
    steps, values, reliable = drawn_series(seed, n, shapes)
    found = detect_transitions(steps, values, reliable=reliable)
    assert_told_among_points(found, steps, values, reliable)
    for stage in found.stages:
        inside = (steps >= stage.start) & (steps <= stage.end)
        for name, level in stage.levels.items():
            points = values[name][inside & reliable.get(name, inside) & np.isfinite(values[name])]
            assert level == np.median(points)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 100_000), shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3, unique=True))
def test_so_do_those_that_are_flagged_while_the_run_goes_on(seed: int, shapes: list[str]) -> None:
    steps, values, reliable = drawn_series(seed, 40, shapes)
    detector = LiveDetector()
    for k, step in enumerate(steps):
        flags = detector.update(
            float(step),
            {name: float(column[k]) for name, column in values.items()},
            reliable={name: bool(column[k]) for name, column in reliable.items()},
        )
        for flag in flags:
            if flag.action != "withdrawn":
                seen = {name: column[: k + 1] for name, column in values.items()}
                sound = {name: column[: k + 1] for name, column in reliable.items()}
                assert_told_among_points([flag.transition], steps[: k + 1], seen, sound)


N, HALF = 24, 12


def described(values: np.ndarray, fitted: tuple[float, float], reliable: np.ndarray | None = None) -> Transition:
    """What is told of a change at the middle of a series, with a standard error of .01, where these were fitted."""
    flags = None if reliable is None else {"hessian_min": reliable}
    scaled = scaled_run(np.arange(N), {"hessian_min": values}, None, flags)
    assert isinstance(scaled, Scaled)
    before, after = ((level - scaled.middle) / scaled.span for level in fitted)
    error = 0.01 / scaled.span
    return describe(
        scaled,
        extent=(HALF - 1.0, float(HALF)),
        step=HALF - 0.5,
        interval=(HALF - 1.0, float(HALF)),
        before=before,
        change=after - before,
        error=error,
        z=(after - before) / error,
        quantile=np.array([2.0]),
        seen=np.array([True]),
        sides=((0, HALF), (HALF, N)),
        p_value=1e-6,
    )


def falling(low: float = -0.311, high: float = -0.029) -> np.ndarray:
    """Points that fall from about ``high`` to about ``low``, within .01, after a start that lies far from both."""
    values = np.where(np.arange(N) < HALF, high, low) + 0.01 * np.sin(np.arange(N))
    values[: HALF - NEAREST] = 3.0
    return values


def test_a_rise_that_was_fitted_to_points_that_fall_is_not_told() -> None:
    values = falling()
    transition = described(values, (-0.092, -0.042))
    change = transition.changes["hessian_min"]
    # The ends of the ranges of the eight points on each side, which are nearest to what was fitted.
    assert change.before == values[HALF - NEAREST : HALF].min()
    assert change.after == values[HALF : HALF + NEAREST].max()
    # Fitted .05; told about -.26: off by .31, which is the error now, beside .01 of the noise.
    assert change.standard_error == pytest.approx(0.01 + 0.05 - change.change)
    assert change.interval[0] < change.change < 0.0 < change.interval[1]
    assert -1.0 < change.z < 0.0
    assert "rises" not in transition.kind and "falls" not in transition.kind
    # The strength is that of what was searched, whatever is told of it.
    assert transition.score == pytest.approx(5.0)


def test_what_was_fitted_among_the_points_is_told_as_it_is() -> None:
    transition = described(falling(), (-0.03, -0.31))
    change = transition.changes["hessian_min"]
    assert (change.before, change.after, change.standard_error) == pytest.approx((-0.03, -0.31, 0.01))
    assert change.z == pytest.approx(-28.0)
    assert transition.kind == "hessian_min falls"


def test_levels_of_unreliable_points_are_told_as_such_and_name_no_kind() -> None:
    values = falling()
    transition = described(values, (-0.03, -0.31), reliable=np.arange(N) < HALF)
    assert not transition.changes["hessian_min"].reliable
    assert transition.changes["hessian_min"].after == pytest.approx(-0.31, abs=0.02)
    assert "falls" not in transition.kind
    # One reliable point among others that lie elsewhere: the level is its own.
    values[HALF + 5] = -0.5
    one = described(values, (-0.03, -0.31), reliable=(np.arange(N) < HALF) | (np.arange(N) == HALF + 5))
    assert one.changes["hessian_min"].reliable
    assert one.changes["hessian_min"].after == -0.5


def test_a_chance_too_small_for_floating_point_is_not_zero() -> None:
    """A step of a thousand standard deviations."""
    loss = np.where(np.arange(80) < 40, 2.0, 1.0) + 1e-3 * np.random.default_rng(0).standard_normal(80)
    [transition] = detect_transitions(np.arange(80), {"loss": loss, "llc": -loss, "hessian_max": loss})
    assert 0.0 < transition.p_value <= transition.adjusted_p_value < 1e-100


def test_a_free_energy_of_unreliable_points_is_not_known() -> None:
    rng = np.random.default_rng(0)
    later = np.arange(80) >= 40
    values = {"loss": 2.0 - later + 0.05 * rng.standard_normal(80), "llc": 5.0 + 9 * later + rng.standard_normal(80)}
    [known] = detect_transitions(np.arange(80), values, n=1000)
    assert known.free_energy is not None and known.changes["llc"].reliable
    [unknown] = detect_transitions(np.arange(80), values, reliable={"llc": later}, n=1000)
    assert not unknown.changes["llc"].reliable
    assert unknown.free_energy is None and unknown.equal_n is None
