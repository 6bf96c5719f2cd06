"""The detector on runs whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from synthetic import SAMPLINGS, Run, Score, linear_network, sampled_steps, strict_score, synthetic_run

from phasewatch.transitions import Transition, detect_transitions


def detect(run: Run) -> list[Transition]:
    return detect_transitions(run.steps, run.values, standard_errors=run.standard_errors)


def score(found: list[Transition], run: Run) -> Score:
    return strict_score([(transition.start, transition.end) for transition in found], run)


def step_signal(n: int = 80, height: float = 1.0, sigma: float = 0.02, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    steps = np.arange(n) * 50
    rng = np.random.default_rng(seed)
    return steps, 1.0 - height * 0.5 * (np.arange(n) >= n // 2) + sigma * rng.standard_normal(n)


# Linear networks: initial strengths small against the measurements' spacing, so that the stages can be told apart.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("sampling", "n", "strengths", "initial"),
    [
        ("linear", 60, (4.0, 2.0, 1.0), 1e-6),
        ("linear", 100, (4.0, 2.5, 1.2), 1e-6),
        ("linear", 200, (4.0, 2.5, 1.2), 1e-4),
        ("mixed", 100, (4.0, 2.0, 1.0), 1e-5),
        ("mixed", 200, (4.0, 2.5, 1.2), 1e-6),
        ("log", 200, (4.0, 2.0, 1.0), 1e-6),
    ],
)
def test_each_stage_of_a_linear_network_is_found_where_theory_says(
    seed: int, sampling: str, n: int, strengths: tuple[float, ...], initial: float
) -> None:
    scale = np.random.default_rng(seed).uniform(0.8, 1.25)
    run = linear_network(
        [scale * s for s in strengths], n, initial=initial, sampling=sampling, noise_share=0.001 * seed, seed=seed
    )
    found = detect(run)
    assert len(found) == len(run.transitions)
    for transition, truth in zip(found, run.transitions, strict=True):
        half_way = truth.step[0]
        assert transition.start <= half_way <= transition.end
        assert transition.interval[0] <= half_way <= transition.interval[1]
        assert transition.start <= transition.step <= transition.end
        assert transition.changes["loss"].change < 0 < transition.changes["hessian_trace"].change


@pytest.mark.parametrize(
    ("n", "stages", "noise_kind"),
    [(60, "drift", "gauss"), (120, "drift", "gauss"), (120, "drift", "t3"), (120, "curved", "gauss")],
)
def test_transitions_are_found_in_noise(n: int, stages: str, noise_kind: str) -> None:
    """F1 at least .88 over 30 runs with 60 transitions (seeds of their own).

    At the .95 that the benchmark shows, one found or missed in ten would come by chance less than once in 100.
    """
    total = Score()
    for seed in range(30):
        run = synthetic_run(
            40_000 + seed,
            n,
            transitions=1 + seed % 3,
            sampling=SAMPLINGS[seed // 3 % 3],
            stages=stages,
            noise_kind=noise_kind,
        )
        total += score(detect(run), run)
    assert total.f1 >= 0.88


def test_kinds_are_those_of_the_truth() -> None:
    """At least 85 % of the hits are of the true kind (24 runs; the benchmark gives 95 %)."""
    right = total = 0
    for seed in range(24):
        run = synthetic_run(50_000 + seed, 120, transitions=1, sampling=SAMPLINGS[seed % 3])
        for transition in detect(run):
            if score([transition], run).hits:
                total += 1
                right += transition.kind == run.transitions[0].kind
    assert total >= 20
    assert right >= 0.85 * total


@pytest.mark.parametrize(
    ("stages", "noise_kind"),
    [("power", "gauss"), ("curved", "gauss"), ("drift", "ar0.5"), ("drift", "ar0.8"), ("drift", "t3")],
)
def test_null_runs_raise_few_alarms(stages: str, noise_kind: str) -> None:
    """At most 6 alarms in 40 runs: at a rate of .05 more would come by chance once in 250, at .1 once in 10."""
    runs = (
        synthetic_run(45_000 + seed, 120, sampling=SAMPLINGS[seed % 3], stages=stages, noise_kind=noise_kind)
        for seed in range(40)
    )
    assert sum(len(detect(run)) for run in runs) <= 6


def test_nothing_is_found_when_the_model_is_frozen() -> None:
    """At most 18 of 150 runs raise an alarm: at a true rate of alpha = .05 more would come by chance once in 10,000."""
    alarms = 0
    for seed in range(150):
        rng = np.random.default_rng(60_000 + seed)
        n = (60, 100, 200)[seed % 3]
        steps = sampled_steps(n, SAMPLINGS[seed % 2])
        error = np.exp(0.3 * rng.standard_normal(n))
        values = {
            "loss": np.full(n, 0.31),
            "llc": 12.0 + error * rng.standard_normal(n),
            "hessian_max": 5.0 + 0.1 * rng.standard_normal(n),
            "hessian_trace": 40.0 + rng.standard_t(5, n),
            "nullity": np.full(n, 7),
        }
        alarms += bool(detect_transitions(steps, values, standard_errors={"llc": error}))
    assert alarms <= 18


def test_nothing_is_found_on_power_laws() -> None:
    """At most 11 of 90 smooth decays raise an alarm: at a rate of .05 more would come by chance once in 500."""
    alarms = 0
    for seed in range(90):
        rng = np.random.default_rng(70_000 + seed)
        n = (60, 100, 200)[seed % 3]
        steps = sampled_steps(n, SAMPLINGS[(seed // 3) % 3])
        scatter = (0.0, 0.003, 0.03)[seed % 3]
        decay = (1.0 + steps / 10 ** rng.uniform(0.0, 4.0)) ** -rng.uniform(0.2, 1.5)
        loss = (decay + rng.uniform(0.0, 0.5)) * np.exp(scatter * rng.standard_normal(n))
        alarms += bool(detect_transitions(steps, {"loss": loss}))
    assert alarms <= 11


def test_location_intervals_cover_steps() -> None:
    """At least 25 of the hits on 30 abrupt changes are covered; at 95 % coverage fewer come once in 300."""
    covered = 0
    for seed in range(30):
        rng = np.random.default_rng(90_000 + seed)
        n = 80
        steps = sampled_steps(n, SAMPLINGS[seed % 3])
        jump = int(rng.integers(25, 55))
        loss = 2.0 - 0.2 * (np.arange(n) >= jump) + 0.04 * rng.standard_normal(n)
        [transition] = detect_transitions(steps, {"loss": loss}, alpha=0.05)
        low, high = transition.interval
        # The change happened somewhere between two measurements: the interval must reach into that gap.
        covered += low <= steps[jump] and high >= steps[jump - 1]
    assert covered >= 25


def test_a_step_is_described_in_own_units() -> None:
    steps, loss = step_signal()
    llc = 10.0 + 20.0 * (1.0 - loss)
    [transition] = detect_transitions(steps, {"loss": loss, "llc": llc})
    assert (transition.start, transition.end) == (1950.0, 2000.0)
    assert transition.kind == "A"
    change = transition.changes["loss"]
    assert change.change == pytest.approx(-0.5, abs=0.05)
    assert change.change == change.after - change.before
    assert change.interval[0] < -0.5 < change.interval[1]
    assert transition.changes["llc"].change == pytest.approx(-20.0 * change.change, rel=1e-6)
    assert change.z < -10
    assert transition.p_value < 1e-6


def test_a_change_followed_in_logarithms_is_reported_in_own_units() -> None:
    n = 90
    rng = np.random.default_rng(4)
    level = np.array([3.0, 0.5, 0.1])[np.arange(n) // 30]
    first, second = detect_transitions(np.arange(n), {"loss": level * np.exp(0.02 * rng.standard_normal(n))})
    assert first.changes["loss"].before == pytest.approx(3.0, rel=0.05)
    assert first.changes["loss"].after == pytest.approx(0.5, rel=0.05)
    assert second.changes["loss"].change == pytest.approx(-0.4, rel=0.08)


@pytest.mark.parametrize(
    ("loss", "llc", "kind"),
    [
        (-1, 1, "A"),
        (0, -1, "B"),
        (1, -1, "loss rises, llc falls"),
        (-1, 0, "loss falls at constant llc"),
        (0, 1, "llc rises at constant loss"),
        (-1, None, "loss falls"),
    ],
)
def test_kinds(loss: int, llc: int | None, kind: str) -> None:
    rng = np.random.default_rng(1)
    after = np.arange(80) >= 40
    values = {"loss": 3.0 + loss * after + 0.03 * rng.standard_normal(80)}
    if llc is not None:
        values["llc"] = 20.0 + 10.0 * llc * after + rng.standard_normal(80)
    [transition] = detect_transitions(np.arange(80), values)
    assert transition.kind == kind


def test_an_exact_count_that_steps_is_found() -> None:
    steps = np.arange(40) * 10
    [transition] = detect_transitions(steps, {"loss": np.full(40, 0.2), "nullity": 3 + (steps >= 200).astype(int)})
    assert transition.start <= 200 <= transition.end
    assert transition.changes["nullity"].change == pytest.approx(1.0, abs=1e-6)
    assert transition.kind == "nullity rises"


def test_a_single_outlier_is_no_transition() -> None:
    steps, loss = step_signal(height=0.0)
    loss[37] += 3.0
    assert detect_transitions(steps, {"loss": loss}) == []
    constant = np.ones(60)
    constant[20] = 2.0
    assert detect_transitions(np.arange(60), {"loss": constant}) == []


def test_unreliable_points_carry_little_weight() -> None:
    steps, loss = step_signal(sigma=0.1)
    assert len(detect_transitions(steps, {"loss": loss})) == 1
    assert detect_transitions(steps, {"loss": loss}, reliable={"loss": np.zeros(80, dtype=bool)}) == []
    # A step that only points of one kind show is believed or not with them.
    unsure = np.arange(80) >= 40
    short = slice(0, 46)
    assert len(detect_transitions(steps[short], {"loss": loss[short]})) == 1
    assert detect_transitions(steps[short], {"loss": loss[short]}, reliable={"loss": ~unsure[short]}) == []


def test_missing_values_and_signals_at_different_steps() -> None:
    steps, loss = step_signal()
    llc = 10.0 + 20.0 * (1.0 - loss)
    loss[::3] = np.nan
    llc[1::2] = np.nan
    [transition] = detect_transitions(steps, {"loss": loss, "llc": llc})
    assert transition.start <= 2000 and transition.end >= 1950
    assert transition.kind == "A"


@pytest.mark.parametrize(("factor", "offset"), [(1e-6, 0.0), (250.0, -40.0), (1.0, 1e4)])
def test_affine_changes_of_a_signal_do_not_matter(factor: float, offset: float) -> None:
    run = synthetic_run(3, 120, transitions=2)
    original = detect(run)
    values = {**run.values, "llc": factor * run.values["llc"] + offset}
    errors = {"llc": factor * run.standard_errors["llc"]}
    found = detect_transitions(run.steps, values, standard_errors=errors)
    assert [(t.start, t.end, t.kind) for t in found] == [(t.start, t.end, t.kind) for t in original]
    for one, other in zip(found, original, strict=True):
        assert one.changes["llc"].change == pytest.approx(factor * other.changes["llc"].change, rel=1e-5)


def test_unit_of_time_order_and_constant_signals_do_not_matter() -> None:
    run = synthetic_run(5, 120, transitions=2, sampling="mixed")
    original = detect(run)
    assert original
    scaled = detect_transitions(60.0 * run.steps, run.values, standard_errors=run.standard_errors)
    assert [t.step / 60.0 for t in scaled] == pytest.approx([t.step for t in original])
    backwards = detect_transitions(run.steps, dict(reversed(run.values.items())), standard_errors=run.standard_errors)
    assert [(t.start, t.end, t.kind) for t in backwards] == [(t.start, t.end, t.kind) for t in original]
    more = {**run.values, "nullity": np.full(120, 5.0), "empty": np.full(120, np.nan)}
    assert detect_transitions(run.steps, more, standard_errors=run.standard_errors) == original


def test_same_input_same_answer_as_json() -> None:
    run = synthetic_run(5, 120, transitions=2)
    found = detect(run)
    assert found == detect(run)
    for transition in found:
        assert Transition.from_dict(json.loads(json.dumps(transition.to_dict()))) == transition
        assert transition.kind in repr(transition)
    with pytest.raises(ValueError, match="to_dict"):
        Transition.from_dict({"start": 1.0})


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_too_few_points_give_nothing(n: int) -> None:
    assert detect_transitions(np.arange(n), {"loss": np.arange(n) * 1.0}) == []


@pytest.mark.parametrize("value", [np.nan, 0.0, 3.25])
def test_constant_or_missing_series_give_nothing(value: float) -> None:
    assert detect_transitions(np.arange(50), {"loss": np.full(50, value)}) == []
    assert detect_transitions(np.arange(50), {"loss": np.full(50, value)}, standard_errors={"loss": np.zeros(50)}) == []


@pytest.mark.parametrize("error", [0.0, np.nan])
def test_standard_errors_of_zero_or_none_are_no_knowledge(error: float) -> None:
    """As if there were none; known ones among them stand for those that are not."""
    steps, loss = step_signal()
    [plain] = detect_transitions(steps, {"loss": loss})
    assert detect_transitions(steps, {"loss": loss}, standard_errors={"loss": np.full(80, error)}) == [plain]
    some = np.where(np.arange(80) % 3, 0.02, error)
    assert detect_transitions(steps, {"loss": loss}, standard_errors={"loss": some}) == [plain]


def test_one_standard_error_that_is_small_by_chance_does_not_rule() -> None:
    """A point that lies far off and claims a hundredth of the others' error makes no transition."""
    steps, loss = step_signal(height=0.0)
    loss[37] += 0.1
    errors = np.full(80, 0.02)
    errors[37] = 0.0002
    assert detect_transitions(steps, {"loss": loss}, standard_errors={"loss": errors}) == []


FINE = np.linspace(1.0, 2.0, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": np.arange(20)[::-1]}, "sort"),
        ({"steps": np.r_[0, np.arange(19)]}, "twice"),
        ({"steps": ["a"] * 20}, "numeric"),
        ({"steps": np.r_[np.arange(19), np.nan]}, "finite"),
        ({"steps": np.ones((20, 2))}, "one-dimensional"),
        ({"values": {"loss": FINE[:-1]}}, "19 entries"),
        ({"values": {"loss": np.r_[FINE[:-1], np.inf]}}, "infinity"),
        ({"values": {"loss": ["x"] * 20}}, "numeric"),
        ({"values": {}}, "no signals"),
        ({"values": FINE}, "mapping"),
        ({"standard_errors": {"los": FINE}}, "los"),
        ({"standard_errors": {"loss": -FINE}}, "negative"),
        ({"standard_errors": {"loss": FINE[1:]}}, "19 entries"),
        ({"standard_errors": {"loss": np.full(20, np.inf)}}, "infinity"),
        ({"steps": np.r_[np.arange(19), np.inf]}, "finite"),
        ({"values": {"loss": np.ones((20, 2))}}, "one-dimensional"),
        ({"reliable": {"llc": np.ones(20, dtype=bool)}}, "llc"),
        ({"reliable": {"loss": FINE}}, "booleans"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": np.nan}, "alpha"),
        ({"alpha": "5%"}, "alpha"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    call = {"steps": np.arange(20), "values": {"loss": FINE}, **arguments}
    with pytest.raises(ValueError, match=message):
        detect_transitions(call.pop("steps"), call.pop("values"), **call)  # type: ignore[arg-type]
