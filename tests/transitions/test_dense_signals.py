"""The loss at every step beside what is measured now and then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from two_clocks import NOISES, found_on_both, touching, two_clock_run

from phasewatch.transitions import detect_transitions
from phasewatch.transitions.dense import BLOCKS, SHORTEST, Course, block_edges

STEPS = np.arange(4_000)
MEASURED = np.arange(0, 4_000, 100)


def fall(place: int, seed: int = 0, height: float = 0.3) -> np.ndarray:
    """A loss that falls in one step, with the scatter of minibatches."""
    return 1.0 - height * (STEPS >= place) + 0.05 * np.random.default_rng(seed).standard_normal(len(STEPS))


def learning(place: int, seed: int = 1, rise: float = 10.0) -> dict[str, np.ndarray]:
    """λ that rises there, as measured."""
    noise = np.random.default_rng(seed).standard_normal(len(MEASURED))
    return {"llc": 20.0 + rise * (place <= MEASURED) + noise}


@pytest.mark.parametrize("length", [1, 2, 50, 999, 4_000, 1_000_000])
def test_blocks_are_of_whole_steps_and_leave_none_out(length: int) -> None:
    edges = block_edges(7.0, 6.0 + length)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1]) == (7.0, 7.0 + length)
    assert np.all(edges == np.round(edges)) and sizes.min() >= 1 and len(sizes) <= BLOCKS
    assert np.all(sizes[:-1] >= min(SHORTEST * length, length))


def test_an_average_is_that_of_the_values_and_its_error_that_of_independent_ones() -> None:
    """A scatter of 2 in 10,000 values is known to 2 %, in medians of 50 at a time to 4 %."""
    values = 5.0 + 2.0 * np.random.default_rng(0).standard_normal(10_000)
    steps, means, errors = Course.of(np.arange(10_000.0), values).averages(np.arange(0.0, 10_001.0, 25.0))
    near = np.abs(values - 5.0) < 8.0
    plain = values.reshape(400, 25).mean(axis=1)
    assert near.all() and np.median(np.abs(means - plain)) < 1e-9
    assert np.array_equal(steps, np.arange(12.0, 10_000.0, 25.0))
    assert np.median(errors) == pytest.approx(2.0 / 5.0, rel=0.1)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_the_error_of_an_average_knows_of_correlated_neighbours(rho: float) -> None:
    """Against the exact variance of a mean of 25 in first-order autoregressive noise; some of it looks like a course.

    As of independent values it would be half and a third of that.
    """
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(40_000)
    for k in range(1, len(noise)):
        noise[k] = rho * noise[k - 1] + np.sqrt(1 - rho**2) * noise[k]
    lag = np.abs(np.arange(25)[:, None] - np.arange(25))
    exact = np.sqrt((rho**lag).sum()) / 25
    _, _, errors = Course.of(np.arange(40_000.0), noise).averages(np.arange(0.0, 40_001.0, 25.0))
    assert np.median(errors) == pytest.approx(exact, rel=0.3)


@pytest.mark.parametrize("place", [713, 2_345, 3_611])
def test_a_fall_is_placed_to_the_step_and_told_with_what_was_measured_around_it(place: int) -> None:
    """Six standard deviations of one step: with two steps on either side of it, three are exceeded by chance."""
    [found] = detect_transitions(MEASURED, learning(place), dense={"training_loss": (STEPS, fall(place))})
    assert abs(found.step - (place - 0.5)) <= 2 and found.interval[0] <= place <= found.interval[1] + 1
    assert (found.kind, found.seen_by) == ("A", ("training_loss", "llc"))
    change = found.changes["llc"]
    # An interval of 95 %; three times as wide it misses by chance once in a million.
    assert abs(change.change - 10.0) < 3 * 0.5 * (change.interval[1] - change.interval[0])
    assert found.changes["training_loss"].change == pytest.approx(-0.3, abs=0.02)


def test_what_the_loss_alone_sees_says_so() -> None:
    [found] = detect_transitions(MEASURED, learning(2_000, rise=0.0), dense={"training_loss": (STEPS, fall(2_345))})
    assert (found.kind, found.seen_by) == ("loss falls at constant llc", ("training_loss",))
    assert abs(found.changes["llc"].z) < 3


def test_two_falls_between_two_measurements_are_two() -> None:
    loss = fall(2_210) - 0.3 * (STEPS >= 2_390)
    values = {"llc": learning(2_300)["llc"][::2]}
    one, other = detect_transitions(MEASURED[::2], values, dense={"training_loss": (STEPS, loss)})
    assert abs(one.step - 2_209.5) <= 2 and abs(other.step - 2_389.5) <= 2
    assert one.changes["llc"] == other.changes["llc"]


def test_a_loss_without_transitions_changes_nothing_but_the_share_of_alpha() -> None:
    quiet = {"training_loss": (STEPS, fall(0))}
    values = learning(2_000)
    beside = detect_transitions(MEASURED, values, dense=quiet, alpha=0.05)
    alone = detect_transitions(MEASURED, values, alpha=0.025)
    assert len(alone) == 1 and list(beside) == list(alone) and beside.stages == alone.stages


def test_the_loss_alone_is_enough() -> None:
    dense = {"training_loss": (STEPS, fall(2_345))}
    for steps, values in (([], {}), ([0, 4_000], {"llc": [1.0, 2.0]})):
        [found] = detect_transitions(steps, values, dense=dense)
        assert abs(found.step - 2_344.5) <= 2 and set(found.changes) == {"training_loss"}


def test_steps_without_a_number_are_left_out() -> None:
    loss = fall(2_345)
    spoiled, kept = loss.copy(), np.ones(len(loss), dtype=bool)
    spoiled[[5, 700, 2_344, 3_999]], kept[[5, 700, 2_344, 3_999]] = [np.nan, np.inf, np.nan, np.nan], False
    found = detect_transitions(MEASURED, learning(2_345), dense={"training_loss": (STEPS, spoiled)})
    without = detect_transitions(MEASURED, learning(2_345), dense={"training_loss": (STEPS[kept], loss[kept])})
    assert len(found) == 1 and list(found) == list(without)
    nothing = np.full(len(loss), np.nan)
    plain = detect_transitions(MEASURED, learning(2_345))
    assert list(detect_transitions(MEASURED, learning(2_345), dense={"training_loss": (STEPS, nothing)})) == plain


def test_a_bad_batch_moves_nothing() -> None:
    loss = fall(2_345)
    worse = loss.copy()
    worse[[1_000, 1_001]] += 50.0
    [usual] = detect_transitions(MEASURED, learning(2_345), dense={"training_loss": (STEPS, loss)})
    [found] = detect_transitions(MEASURED, learning(2_345), dense={"training_loss": (STEPS, worse)})
    assert (found.start, found.end) == (usual.start, usual.end)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ({"llc": (STEPS, STEPS)}, "names of their own"),
        ({"training_loss": (STEPS, STEPS[1:])}, "3999 values at 4000 steps"),
        ({"training_loss": (STEPS[::-1], STEPS)}, "not sorted"),
        ({"training_loss": (STEPS, ["low"] * 4_000)}, "not numeric"),
    ],
)
def test_bad_signals_are_named(dense: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_transitions(MEASURED, learning(2_000), dense=dense)


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_runs_without_transitions_raise_few_alarms(noise: str) -> None:
    """At most 5 of 30 runs: at a rate of alpha = .05 more would come by chance once in 300."""
    assert sum(bool(found_on_both(two_clock_run(7_000 + seed, 0, noise))) for seed in range(30)) <= 5


@pytest.mark.parametrize("noise", ["correlated", *(pytest.param(n, marks=pytest.mark.slow) for n in NOISES)])
def test_transitions_are_found_and_placed_closer_than_measurements_are_apart(noise: str) -> None:
    """8 runs with 15 transitions: F1 at least .8, and half of the places within a quarter of a spacing of 100 steps.

    Measurements at even steps alone are a quarter of their spacing off for half of those in one step.
    """
    hits = found = true = 0
    off = []
    for seed in range(8):
        run = two_clock_run(8_000 + seed, 1 + seed % 3, noise)
        transitions = found_on_both(run)
        pairs = touching([(t.start, t.end) for t in transitions], run, 100.0)
        hits, found, true = hits + len(pairs), found + len(transitions), true + len(run.places)
        off += [abs(transitions[one].step - run.places[which][0]) for one, which in pairs]
    assert 2 * hits / (found + true) >= 0.8
    assert np.median(off) <= 25
