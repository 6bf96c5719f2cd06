"""What a transition is called: by the loss and by λ of the function, at which resolutions, and when not at all."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq

from phasewatch.transitions import Change, Detection, LiveDetector, detect_transitions
from phasewatch.transitions.companions import changes_measured
from phasewatch.transitions.detect import scaled_run
from phasewatch.transitions.kinds import Kind, name_kind, read_beside, slope_in_resolution

FINE, COARSE = "llc_behavioral", "llc_behavioral_coarse"
N = 60
LATER = np.arange(N) >= 30


def change(before: float, after: float, z: float | None = None) -> Change:
    rise = after - before
    return Change(before, after, rise, 0.1, (rise - 0.2, rise + 0.2), rise / 0.1 if z is None else z)


FALLS, CONSTANT = change(2.0, 1.0), change(1.0, 1.0, 0.5)


def named(loss: Change, beside: dict[str, Change] | None = None, **coefficients: Change) -> Kind:
    """Of λ that depends neither on the spread nor on the resolution, if nothing else is given beside."""
    changes = {"loss": loss, **coefficients}
    told = {}
    for name, of_one in coefficients.items():
        told[f"{name}_spread_slope"] = change(0.0, 0.0)
        told[f"{name}_heat_capacity"] = of_one
    return name_kind(changes, {name: abs(c.z) >= 3.0 for name, c in changes.items()}, {**told, **(beside or {})})


def test_the_loss_falls_and_lambda_rises() -> None:
    up = change(10.0, 20.0)
    assert named(FALLS, **{FINE: up, COARSE: up}) == Kind("A", ("fine", "coarse"))
    assert named(FALLS, **{FINE: up, COARSE: change(5.0, 5.0, 0.2)}) == Kind("A", ("fine",))
    assert named(FALLS, **{FINE: change(5.0, 5.0, 0.2), COARSE: up}) == Kind("A", ("coarse",))
    both = named(FALLS, **{FINE: change(5.0, 5.0, 0.2), COARSE: change(5.0, 5.0, -0.2)})
    assert both == Kind("loss falls at constant λ", ("fine", "coarse"))


def test_simpler_is_what_falls_in_the_output_metric_too() -> None:
    """Logits times 16: λ falls from 19.6 to 6.3 and the function of the outputs is as it was."""
    down = change(19.6, 6.3)
    assert named(CONSTANT, {"llc_outputs": change(19.6, 9.0)}, **{FINE: down}) == Kind("B", ("fine",))
    assert named(CONSTANT, {"llc_outputs": change(6.3, 6.3, -0.3)}, **{FINE: down}).name == "more confident"
    assert named(CONSTANT, {"llc_outputs": change(6.3, 9.0)}, **{FINE: down}).name == "more confident"
    unknown = named(CONSTANT, {"llc_outputs_coarse": change(19.6, 9.0)}, **{FINE: down})
    assert unknown.name == "λ falls at constant loss, output metric not measured"
    undecided = named(CONSTANT, {"llc_outputs": change(6.3, 6.1, -2.0)}, **{FINE: down})
    assert undecided.name == "λ falls at constant loss, output metric undecided"
    # At the coarse resolution it is B, whatever the fine one leaves open.
    outputs = {"llc_outputs": change(6.3, 6.3, -0.3), "llc_outputs_coarse": change(6.0, 3.0)}
    assert named(CONSTANT, outputs, **{FINE: down, COARSE: change(8.0, 4.0)}) == Kind("B", ("coarse",))


@pytest.mark.parametrize(("share", "kind"), [(0.99, "A"), (1.01, "loss falls; λ differs, but by less than")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_kind_where_another_spread_would_turn_the_sign(share: float, kind: str, sign: float) -> None:
    """A rise of 10, and slopes whose difference over a factor of 2 takes off, or adds, a little less or more.

    That is what is left of the difference, sure as it is to .1, less what may be chance.
    """
    difference = share * 10.0 / math.log(2.0) + 1.96 * 0.1
    slope = {f"{FINE}_spread_slope": change(3.0, 3.0 + sign * difference)}
    assert named(FALLS, slope, **{FINE: change(20.0, 30.0)}).name.startswith(kind)


def test_a_slope_that_may_be_chance_speaks_against_nothing() -> None:
    slope = Change(0.0, 40.0, 40.0, 30.0, (-20.0, 100.0), 1.3)
    assert named(FALLS, {f"{FINE}_spread_slope": slope}, **{FINE: change(20.0, 30.0)}).name == "A"


@pytest.mark.parametrize(("share", "kind"), [(0.99, "A"), (1.01, "loss falls; λ differs, but by less than")])
def test_no_kind_where_another_resolution_would_turn_the_sign(share: float, kind: str) -> None:
    """From λ = C (no slope) to a λ of 30 whose slope is ``share * 10 / ln 2``: C = 30² / (30 + slope), exact."""
    capacity = 30.0**2 / (30.0 - share * 10.0 / math.log(2.0))
    beside = {f"{FINE}_heat_capacity": replace(change(20.0, capacity), standard_error=0.0)}
    assert named(FALLS, beside, **{FINE: change(20.0, 30.0)}).name.startswith(kind)


def test_a_heat_capacity_of_few_draws_speaks_against_nothing() -> None:
    """The slope is 20 / ln 2 where 10 / ln 2 turns the sign; its error, 1.96 σ (λ / C)² with λ = C, takes half away."""
    capacity = 30.0**2 / (30.0 - 20.0 / math.log(2.0))
    enough = (10.0 / math.log(2.0)) / 1.96
    for share, kind in ((1.01, "A"), (0.99, "loss falls; λ differs, but by less than")):
        noisy = replace(change(20.0, capacity), standard_error=share * enough)
        found = named(FALLS, {f"{FINE}_heat_capacity": noisy}, **{FINE: change(20.0, 30.0)})
        assert found.name.startswith(kind)


def test_the_slope_in_the_resolution_is_that_of_a_well_with_a_prior() -> None:
    """½Σ bh/(bh + γ) over a spectrum of six decades, its variance ½Σ (bh/(bh + γ))², differentiated at constant ε."""
    h, gamma = np.geomspace(1e-4, 1e2, 40), 1.0

    def level(b: float) -> float:
        return float(0.5 * (b * h / (b * h + gamma)).sum())

    def at(epsilon: float) -> float:
        b = float(brentq(lambda b: level(b) - epsilon * b, 1e-6, 1e9))
        return level(b)

    epsilon, step = 0.05, 1e-4
    b = float(brentq(lambda b: level(b) - epsilon * b, 1e-6, 1e9))
    capacity = float(0.5 * ((b * h / (b * h + gamma)) ** 2).sum())
    expected = (at(epsilon * math.exp(step)) - at(epsilon * math.exp(-step))) / (2 * step)
    assert slope_in_resolution(level(b), capacity) == pytest.approx(expected, rel=1e-4)


def test_a_dependence_that_is_not_known_names_no_kind() -> None:
    changes = {"loss": FALLS, FINE: change(10.0, 20.0)}
    found = name_kind(changes, dict.fromkeys(changes, True), {f"{FINE}_spread_slope": change(0.0, 0.0)})
    assert found.name == "loss falls; λ differs, its dependence on prior and resolution not known"


def test_what_is_not_to_be_trusted_names_nothing_and_the_lambda_of_the_loss_does_not_stand_in_for_it() -> None:
    """``changed`` names all that was measured, ``changes`` what may speak."""
    changed = {"loss": True, FINE: True, "llc": True}
    changes = {"loss": FALLS, "llc": change(10.0, 20.0)}
    assert name_kind(changes, changed) == Kind("loss falls")
    del changed[FINE]
    assert name_kind(changes, changed) == Kind("A")


@pytest.mark.parametrize(
    ("fall", "kind"), [(0.002, Kind("B", ("fine",))), (0.02, Kind("loss falls, λ falls", ("fine",)))]
)
def test_a_loss_that_differs_by_more_than_the_resolution_is_not_constant(fall: float, kind: Kind) -> None:
    """Whatever the noise of its course hides: it is measured on the same samples, exactly."""
    beside = {f"{FINE}_resolution": change(0.003, 0.003), "loss": change(0.5, 0.5 - fall)}
    beside["llc_outputs"] = change(9.0, 4.0)
    assert named(CONSTANT, beside, **{FINE: change(10.0, 5.0)}) == kind


def test_only_what_tells_kinds_is_read_beside() -> None:
    names = ["loss", FINE, "llc_outputs", f"{COARSE}_heat_capacity", f"{FINE}_rhat"]
    assert read_beside(names) == ["llc_outputs", f"{COARSE}_heat_capacity"]


def series(seed: int = 0, *, loss: float, fine: float, outputs: float, slope: float = 0.0) -> dict[str, np.ndarray]:
    """Levels that jump by so much after 30 of 60 points, in noise of .3; the slope by ``slope``."""
    rng = np.random.default_rng(seed)

    def jump(level: float, height: float, noise: float = 0.3) -> np.ndarray:
        return level + height * LATER + noise * rng.standard_normal(N)

    return {
        "loss": jump(2.0, loss, 0.02),
        FINE: jump(30.0, fine),
        "llc_outputs": jump(25.0, outputs),
        f"{FINE}_spread_slope": jump(2.0, slope),
        f"{FINE}_heat_capacity": jump(30.0, fine, 0.0),
    }


def detect(values: dict[str, np.ndarray], **reliable: np.ndarray) -> Detection:
    return detect_transitions(50 * np.arange(N), values, reliable=reliable, read_beside=read_beside(values))


@pytest.mark.parametrize(
    ("heights", "label"),
    [
        ({"loss": -1.0, "fine": 12.0, "outputs": 12.0}, "A (fine)"),
        ({"loss": 0.0, "fine": -12.0, "outputs": -8.0}, "B (fine)"),
        ({"loss": 0.0, "fine": -12.0, "outputs": 0.0}, "more confident (fine)"),
        ({"loss": -1.0, "fine": 0.0, "outputs": 0.0}, "loss falls at constant λ (fine)"),
        (
            {"loss": -1.0, "fine": 12.0, "outputs": 12.0, "slope": 20.0},
            "loss falls; λ differs, but by less than it depends on prior and resolution (fine)",
        ),
    ],
)
def test_a_jump_in_noise_is_found_and_named(heights: dict[str, float], label: str) -> None:
    [found] = detect(series(**heights))
    assert (found.start, found.end, found.label) == (1450.0, 1500.0, label)
    assert set(found.changes) <= {"loss", FINE}, "what is read beside is not searched"


def test_nothing_is_looked_for_in_what_is_read_beside() -> None:
    """Noise in the loss and in λ, and a plain jump in the output metric: twin of a run without it."""
    values = series(3, loss=0.0, fine=0.0, outputs=-12.0, slope=9.0)
    assert detect(values) == [] == detect({name: values[name] for name in ("loss", FINE)})
    with pytest.raises(ValueError, match="only read beside others; expected one to search"):
        detect({"llc_outputs": values["llc_outputs"]})


def test_a_slope_is_not_believed_where_its_lambda_is_not() -> None:
    """In the stage before, λ was sound at three points alone, and its slope is wild at all others."""
    values = series(loss=-1.0, fine=12.0, outputs=12.0)
    sound = LATER | (np.arange(N) % 10 == 9)
    values[f"{FINE}_spread_slope"] = np.where(sound, values[f"{FINE}_spread_slope"], 100.0)
    [found] = detect(values, **{FINE: sound})
    assert found.label == "A (fine)"


def test_while_the_run_goes_on_it_is_named_as_afterwards_also_when_resumed() -> None:
    values = series(loss=0.0, fine=-12.0, outputs=-8.0)
    [whole] = detect(values)

    def seen(k: int) -> tuple[int, dict[str, float], dict[str, float], dict[str, bool], list[str]]:
        return 50 * k, {name: float(column[k]) for name, column in values.items()}, {}, {}, read_beside(values)

    detector = LiveDetector()
    for k in range(45):
        detector.update(*seen(k))
    again = LiveDetector()
    again.load_state_dict(detector.state_dict(), map(seen, range(45)), detector.flags)
    for k in range(45, N):
        assert detector.update(*seen(k)) == again.update(*seen(k))
    [live] = again.transitions
    assert live.label == whole.label == "B (fine)"


def test_a_signal_that_is_there_at_few_steps_changes_nothing() -> None:
    """λ of the loss at the last six points, and at every tenth: the twin of a run without it."""
    values = series(loss=-1.0, fine=12.0, outputs=12.0)
    [twin] = detect(values)
    rng = np.random.default_rng(1)
    for there in (np.arange(N) >= N - 6, np.arange(N) % 10 == 0):
        llc = np.where(there, 30.0 + 0.3 * rng.standard_normal(N), np.nan)
        [found] = detect({**values, "llc": llc})
        assert (found.start, found.end, found.label) == (twin.start, twin.end, twin.label)


def test_what_was_measured_within_a_transition_belongs_to_neither_stage() -> None:
    """A rise from 10 at step 900 to 40 at step 1,200, with points half-way: they are not the levels of its stages."""
    level = np.interp(np.arange(N), [18, 24], [10.0, 40.0])
    scaled = scaled_run(50 * np.arange(N), {FINE: level}, {FINE: np.full(N, 0.1)}, None)
    assert not isinstance(scaled, Detection)
    found = changes_measured(scaled, 0, ((0, 21), (22, N)), (900.0, 1200.0))
    assert found is not None
    assert (found.before, found.after) == (10.0, 40.0)


def test_a_loss_that_changes_too_little_to_speak_of_has_still_fallen_by_what_was_measured() -> None:
    """Beyond its noise, but small beside all that it does in the run: the words of its course say nothing."""
    changes = {"loss": FALLS, FINE: change(10.0, 50.0)}
    beside = {
        f"{FINE}_spread_slope": change(0.0, 0.0),
        f"{FINE}_heat_capacity": change(10.0, 50.0),
        f"{FINE}_resolution": change(0.003, 0.003),
    }
    changed = {"loss": False, FINE: True}
    assert name_kind(changes, changed, beside).name == "λ rises"
    assert name_kind(changes, changed, {**beside, "loss": FALLS}) == Kind("A", ("fine",))
    assert name_kind(changes, changed, {**beside, "loss": change(0.5, 0.498)}).name == "λ rises"
