"""What a detection says beside where: stages, consensus, free energy, choices of the user, indecision, other runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic import Run, strict_score, synthetic_run

from phasewatch.transitions import Change, Detection, Transition, align_transitions, detect_transitions
from phasewatch.transitions.kinds import name_kind

N = 80
LATER = np.arange(N) >= 40


def staircase(seed: int = 0, **heights: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: 20.0 + height * LATER + rng.standard_normal(N) for name, height in heights.items()}


def detect(run: Run, **options: object) -> Detection:
    return detect_transitions(run.steps, run.values, standard_errors=run.standard_errors, **options)  # type: ignore[arg-type]


def extents(found: Detection) -> list[tuple[float, float]]:
    return [(transition.start, transition.end) for transition in found]


def test_stages_lie_between_the_transitions_and_know_their_levels() -> None:
    found = detect_transitions(10 * np.arange(N), staircase(loss=-8.0, llc=6.0))
    before, after = found.stages
    assert (before.start, before.end, before.measurements) == (0.0, 390.0, 40)
    assert (after.start, after.end, after.measurements) == (400.0, 790.0, 40)
    # A median of 40 points of unit variance: within .8 with a probability of .9999.
    assert after.levels["loss"] - before.levels["loss"] == pytest.approx(-8.0, abs=1.2)
    assert found.undecided is None


def test_consensus_tells_what_one_signal_alone_sees() -> None:
    [alone] = detect_transitions(np.arange(N), staircase(loss=0.0, llc=-8.0, hessian_max=0.0))
    assert alone.seen_by == ("llc",)
    assert alone.consensus == pytest.approx(1 / 3)
    [all_three] = detect_transitions(np.arange(N), staircase(loss=-8.0, llc=8.0, hessian_max=8.0))
    assert all_three.seen_by == ("loss", "llc", "hessian_max")
    assert all_three.consensus == 1.0


def test_free_energy_and_the_n_of_equal_free_energies() -> None:
    values = staircase(loss=0.0, llc=9.0)
    values["loss"] = 1.0 - 0.05 * LATER + 0.002 * np.random.default_rng(3).standard_normal(N)
    [transition] = detect_transitions(np.arange(N), values, n=1000)
    loss, llc = transition.changes["loss"].change, transition.changes["llc"].change
    assert transition.free_energy == pytest.approx(1000 * loss + llc * math.log(1000))
    assert transition.equal_n is not None
    n = transition.equal_n
    assert n * loss + llc * math.log(n) == pytest.approx(0.0, abs=1e-6 * n)
    [without_n] = detect_transitions(np.arange(N), values)
    assert without_n.free_energy is None and without_n.equal_n == n
    # Both fall: the new side is better at every n.
    [both] = detect_transitions(np.arange(N), staircase(loss=-8.0, llc=-8.0), n=1000)
    assert both.equal_n is None and both.free_energy is not None and both.free_energy < 0


def test_adjusted_p_values_are_those_of_holm() -> None:
    run = synthetic_run(7, 240, transitions=3)
    found = detect(run)
    assert len(found) == 3
    p = np.array([t.p_value for t in found])
    order = np.argsort(p)
    expected = np.empty(3)
    expected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.array([3, 2, 1])))
    assert [t.adjusted_p_value for t in found] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_too_short_a_series_is_undecided(n: int) -> None:
    found = detect_transitions(np.arange(n), {"loss": np.arange(n) * 1.0})
    assert found == [] and found.stages == ()
    assert found.undecided is not None and f"{n} measurements" in found.undecided


def test_too_few_points_to_see_anything_in_are_undecided_and_enough_are_not() -> None:
    rng = np.random.default_rng(0)
    short = detect_transitions(np.arange(9), {"loss": rng.standard_normal(9)})
    assert short == [] and short.undecided is not None and "noise standard deviations" in short.undecided
    long = detect_transitions(np.arange(60), {"loss": rng.standard_normal(60)})
    assert long == [] and long.undecided is None and len(long.stages) == 1
    assert long.least_change < short.least_change
    # A signal that was measured four times only, beside none.
    sparse = np.full(60, np.nan)
    sparse[::15] = 1.0
    assert detect_transitions(np.arange(60), {"loss": sparse}).undecided is not None
    assert detect_transitions(np.arange(60), {"loss": np.ones(60)}).undecided is None


def test_plateaus_by_choice_read_a_drift_as_steps_and_drifts_do_not() -> None:
    """The user's model is obeyed: a straight line in log time is no transition, but no plateau either."""
    steps = np.geomspace(1.0, 1e4, 90)
    drift = 8.0 * np.log(steps) + np.random.default_rng(1).standard_normal(90)
    assert detect_transitions(steps, {"llc": drift}, model="drift") == []
    assert len(detect_transitions(steps, {"llc": drift}, model="plateau")) >= 1
    flat = detect_transitions(np.arange(N), staircase(llc=5.0), model="plateau")
    assert [(t.start <= 39.0, t.end >= 40.0) for t in flat] == [(True, True)]


def test_plateau_criterion_finds_the_turns_of_the_llc() -> None:
    """sin(u) has slope zero at u = pi/2 + k pi; log time is u."""
    u = np.linspace(1.0, 9.0, 120)
    llc = 10.0 + 3.0 * np.sin(u) + 0.1 * np.random.default_rng(0).standard_normal(120)
    found = detect_transitions(np.exp(u), {"loss": -u, "llc": llc}, criterion="plateau")
    turns = np.exp(np.pi / 2 + np.pi * np.arange(3))
    assert [t.kind for t in found] == ["plateau"] * 3
    for transition, turn in zip(found, turns, strict=True):
        assert transition.interval[0] <= turn <= transition.interval[1]
        assert transition.step == pytest.approx(turn, rel=0.1)
    monotone = detect_transitions(
        np.exp(u), {"llc": u + 0.1 * np.random.default_rng(0).standard_normal(120)}, criterion="plateau"
    )
    assert monotone == []


@pytest.mark.parametrize(("option", "value"), [("model", "lines"), ("criterion", "slope")])
def test_unknown_choices_are_named(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        detect_transitions(np.arange(N), staircase(loss=1.0), **{option: value})  # type: ignore[arg-type]


def at(step: float, kind: str = "A") -> Transition:
    return Transition(0.9 * step, 1.1 * step, step, (0.9 * step, 1.1 * step), kind, {}, 9.0, 1e-9)


def test_transitions_of_several_runs_are_aligned_in_order() -> None:
    runs = [[at(100.0), at(400.0, "B"), at(900.0)], [at(130.0), at(1000.0)], [at(90.0), at(450.0, "B"), at(800.0)], []]
    first, second, third = align_transitions(runs, factor=1.2)
    assert [t and t.step for t in first.transitions] == [100.0, 130.0, 90.0, None]
    assert [t and t.step for t in second.transitions] == [400.0, None, 450.0, None]
    assert (second.kind, second.step, second.spread, second.share) == ("B", 425.0, (400.0, 450.0), 0.5)
    assert third.spread == (800.0, 1000.0)
    assert align_transitions([]) == [] and align_transitions([[], []]) == []


def test_only_transitions_whose_intervals_overlap_are_matched() -> None:
    """Each with each: 100 with 115, and 115 with 130, make no three of them one."""
    unrelated = Transition(1400, 1700, 1536, (1411, 1661), "A", {}, 9.0, 1e-9)
    other = Transition(1100, 1300, 1214, (1144, 1284), "A", {}, 9.0, 1e-9)
    assert [one.share for one in align_transitions([[unrelated], [other]])] == [0.5, 0.5]
    assert [one.share for one in align_transitions([[unrelated], [other]], factor=1.09)] == [0.5, 0.5]
    assert [one.share for one in align_transitions([[unrelated], [other]], factor=1411 / 1284)] == [1.0]
    chain = align_transitions([[at(100.0)], [at(115.0)], [at(130.0)]])
    assert sorted(round(3 * one.share) for one in chain) == [1, 2]
    with pytest.raises(ValueError, match=r"factor is 0.5.*at least 1"):
        align_transitions([], factor=0.5)


def test_what_only_single_runs_have_is_sorted_by_its_steps() -> None:
    aligned = align_transitions([[at(100.0), at(5000.0)], [at(900.0)]])
    assert [one.step for one in aligned] == [100.0, 900.0, 5000.0]


def test_transitions_do_not_overlap_and_are_as_sure_as_alpha_says() -> None:
    for seed in (50_005, *range(41_000, 41_012)):
        run = synthetic_run(seed, 120, transitions=3, sampling="mixed", stages="power")
        found = detect(run)
        for one, next_one in zip(found, found[1:], strict=False):
            assert one.end <= next_one.start
        assert all(transition.p_value <= 0.05 for transition in found)


def test_a_place_between_two_measurements_is_known_no_better_than_they_tell() -> None:
    """The loss, measured at every fourth step, steps down between two of them; noise is measured in between."""
    rng = np.random.default_rng(0)
    index = np.arange(120)
    loss = np.where(index % 4 == 0, 2.0 - 0.6 * (index > 58) + 0.05 * rng.standard_normal(120), np.nan)
    noise = np.where(index % 4 == 2, rng.standard_normal(120), np.nan)
    [alone] = detect_transitions(50 * index, {"loss": loss})
    assert (alone.start, alone.end) == (2800.0, 3000.0)
    assert alone.interval[0] <= 2800.0 and alone.interval[1] >= 3000.0
    assert list(detect_transitions(50 * index, {"loss": loss, "nullity": np.full(120, 7.0)})) == [alone]
    [beside] = detect_transitions(50 * index, {"loss": loss, "llc": noise})
    assert (beside.start, beside.end) == (2800.0, 3000.0)


def test_a_count_that_flickers_about_any_level_raises_nothing() -> None:
    """100 points, a fifth of them one up: at most 1 alarm in 20 runs of each; 2 come by chance once in 4 at .05."""
    for level in (0.0, 7.0, 1000.1):
        alarms = 0
        for seed in range(20):
            flicker = (np.random.default_rng(seed).random(100) < 0.2) + level
            alarms += len(detect_transitions(np.arange(100) * 50, {"nullity": flicker}))
        assert alarms <= 1


def test_a_fall_out_of_a_silent_plateau_into_noise_is_found() -> None:
    """As SGD leaves the start: hardly any noise on the plateau, much of it after the fall."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        index = np.arange(60)
        after = 0.8 * np.exp(-np.maximum(index - 24, 0) / 25.0)
        course = 2.3 + (after - 2.3) / (1.0 + np.exp(-(index - 22.0) / 0.8))
        loss = course * np.exp(np.where(index < 22, 1e-4, 0.03) * rng.standard_normal(60))
        found = detect_transitions(100 * index, {"loss": loss})
        assert any(t.start <= 2200.0 <= t.end and t.end - t.start <= 800.0 for t in found)


def test_steps_that_are_large_beside_their_spacing() -> None:
    index = np.arange(60)
    loss = 2.0 - (index >= 30) + 0.1 * np.random.default_rng(0).standard_normal(60)
    [transition] = detect_transitions(index + 2**52, {"loss": loss})
    assert (transition.start, transition.end) == (2**52 + 29, 2**52 + 30)


def test_masked_values_are_missing() -> None:
    loss = np.ma.array(
        2.0 - 1.0 * LATER + 0.1 * np.random.default_rng(0).standard_normal(N), mask=np.arange(N) % 7 == 0
    )
    expected = detect_transitions(np.arange(N), {"loss": np.ma.filled(loss, np.nan)})
    assert list(detect_transitions(np.arange(N), {"loss": loss})) == list(expected) != []


@pytest.mark.parametrize("n", ["5", math.nan, math.inf])
def test_an_n_that_is_no_number_is_named(n: object) -> None:
    with pytest.raises(ValueError, match="n is"):
        detect_transitions(np.arange(N), {"loss": np.arange(N) * 1.0}, n=n)  # type: ignore[arg-type]


def test_a_kind_says_nothing_that_its_changes_do_not() -> None:
    def change(z: float) -> Change:
        return Change(1.0, 1.0 + z, z, 1.0, (z - 2.0, z + 2.0), z)

    changes = {"loss": change(-9.0), "llc": change(5.5), "nullity": change(0.5)}

    def named(changes: dict[str, Change], **changed: bool) -> str:
        return name_kind(changes, dict.fromkeys(changes, False) | changed).name

    assert named(changes, loss=True, llc=True) == "A"
    # Beyond its noise, though too small to count: neither a rise nor constant.
    assert named(changes, loss=True) == "loss falls"
    assert named({**changes, "llc": change(1.0)}, loss=True) == "loss falls at constant llc"
    assert named({"nullity": change(0.5)}, nullity=True) == "several signals change a little"


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.lists(st.floats(1.0, 1e5), max_size=4, unique=True), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_alignment_loses_nothing_and_keeps_the_order(steps: list[list[float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = [[at(s, str(rng.choice(["A", "B"]))) for s in sorted(row)] for row in steps]
    aligned = align_transitions(runs)
    for number, run in enumerate(runs):
        assert [a.transitions[number] for a in aligned if a.transitions[number] is not None] == run


@settings(max_examples=15, deadline=None)
@example(seed=527, factor=1.0, offset=-15.0, unit=1.0, names=["loss", "llc", "hessian_max"])
@given(
    seed=st.integers(0, 10_000),
    factor=st.floats(1e-6, 1e6),
    offset=st.floats(-1e3, 1e3),
    unit=st.floats(1e-3, 1e3),
    names=st.permutations(["loss", "llc", "hessian_max"]),
)
def test_units_offsets_order_and_constant_signals_do_not_matter(
    seed: int, factor: float, offset: float, unit: float, names: list[str]
) -> None:
    run = synthetic_run(seed, 60, transitions=1)
    original = detect(run)
    # The loss and the curvature are positive, and may be followed in logarithms: they keep their zero.
    values = {name: run.values[name] * factor + (factor * offset if name == "llc" else 0.0) for name in names}
    values["nullity"] = np.full(60, 3.0)
    errors = {"llc": factor * run.standard_errors["llc"]}
    found = detect_transitions(unit * run.steps, values, standard_errors=errors)
    assert [t.kind for t in found] == [t.kind for t in original]
    for one, other in zip(found, original, strict=True):
        assert one.start / unit == pytest.approx(other.start, rel=1e-6)
        assert one.end / unit == pytest.approx(other.end, rel=1e-6)
        assert one.changes["llc"].change == pytest.approx(factor * other.changes["llc"].change, rel=1e-4)


def test_the_wanted_rate_hardly_changes_what_is_found() -> None:
    """Over a threefold range of alpha the found sets agree to F1 >= .9 on 20 runs."""
    runs = [synthetic_run(30_000 + seed, 120, transitions=1 + seed % 3) for seed in range(20)]
    as_usual = [detect(run) for run in runs]
    for alpha in (0.05 / 3**0.5, 0.05 * 3**0.5):
        hits = total = 0
        for run, usual in zip(runs, as_usual, strict=True):
            other = detect(run, alpha=alpha)
            same = {t.step for t in usual} & {t.step for t in other}
            hits, total = hits + 2 * len(same), total + len(usual) + len(other)
        assert hits >= 0.9 * total


def test_every_point_counts_once() -> None:
    """The strict score itself: a long stretch over two transitions is a hit for none but one, and reaches too far."""
    run = synthetic_run(11, 120, transitions=2)
    one, other = ((run.steps[t.first], run.steps[t.last]) for t in run.transitions)
    assert strict_score([one, other], run).f1 == 1.0
    assert strict_score([one, one], run).hits == 1
    assert strict_score([(run.steps[0], run.steps[-1])], run).hits == 0
