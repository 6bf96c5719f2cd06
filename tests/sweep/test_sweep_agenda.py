"""Which checkpoint is measured next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from sweep_cases import STEPS, build, trained, what_was_found

from phasewatch import measure_checkpoints
from phasewatch.cli import main
from phasewatch.record import Estimate, Measurement
from phasewatch.sweep.agenda import Agenda
from phasewatch.sweep.checkpoints import Checkpoint

MANY = [Checkpoint(Path(f"{k}.pt"), 10 * k) for k in range(200)]


def measurement(step: int, **values: float) -> Measurement:
    return Measurement(step, {name: Estimate(value) for name, value in values.items()}, seconds=1.0)


def handed_out(
    signals: Callable[[int], dict[str, float]], budget: float | None, known: Sequence[Measurement] = ()
) -> list[int]:
    """The steps that are measured in turn, each in a second, where the signals are a function of the step."""
    steps: list[int] = []
    before = {measurement.step for measurement in known}
    left = [checkpoint for checkpoint in MANY if checkpoint.step not in before]
    agenda = Agenda(left, known, budget, clock=lambda: float(len(steps)))
    while (checkpoint := agenda.next()) is not None:
        steps.append(checkpoint.step)
        agenda.learn(measurement(checkpoint.step, **signals(checkpoint.step)))
    return steps


def jumping(*jumps: int) -> Callable[[int], dict[str, float]]:
    """The loss and the nullity jump at these steps in turn."""

    def signals(step: int) -> dict[str, float]:
        passed = [step >= jump for jump in jumps]
        return {"loss": 1.0 - sum(passed[::2]), "nullity": 5.0 + sum(passed[1::2])}

    return signals


def around(steps: Sequence[int], place: int) -> tuple[int, int]:
    """The last of the steps before a place, and the first from there on."""
    return max(step for step in steps if step < place), min(step for step in steps if step >= place)


def test_without_a_budget_all_come_in_order() -> None:
    assert handed_out(jumping(500), None) == [checkpoint.step for checkpoint in MANY]


@pytest.mark.parametrize("jumps", [(730,), (1990,), (10,), (420, 1510)])
def test_half_cover_the_run_and_the_others_close_in_on_what_jumps(jumps: tuple[int, ...]) -> None:
    """Ten leave gaps of 22 checkpoints; ten more halve them at a jump, and two jumps, down to one or two."""
    steps = handed_out(jumping(*jumps), 20.0)
    assert steps[:2] == [0, 1990] and len(steps) == len(set(steps)) == 20
    gaps = np.diff(sorted(steps[:10]))
    assert gaps.min() >= 200 and gaps.max() <= 240
    for jump in jumps:
        before, after = around(steps, jump)
        assert after - before <= 20


def test_noise_is_not_closed_in_on() -> None:
    """In the second half one signal goes up and down; another jumps in the first."""
    rng = np.random.default_rng(0)
    noise = {checkpoint.step: float(rng.normal()) * (checkpoint.step >= 1000) for checkpoint in MANY}
    steps = handed_out(lambda step: {"loss": float(step >= 500), "nullity": noise[step]}, 20.0)
    before, after = around(steps, 500)
    assert after - before <= 20


def test_what_drifts_is_measured_evenly() -> None:
    """Six gaps at first, and every one is halved before one is halved again: the widest is worth most."""
    gaps = np.diff(sorted(handed_out(lambda step: {"loss": float(step)}, 15.0)))
    assert len(gaps) == 14 and gaps.min() >= 80 and gaps.max() <= 170


def test_a_later_call_goes_on_from_there() -> None:
    """It knows how many there will be in all, and half of these are spread evenly."""
    first = handed_out(jumping(730), 20.0)
    known = [measurement(step, **jumping(730)(step)) for step in first]
    second = handed_out(jumping(730), 20.0, known)
    assert len(second) == 20 and not set(first) & set(second)
    assert np.diff(sorted(first + second)).max() <= 1.5 * 1990 / 19


def test_what_is_measured_at_the_same_time_is_not_handed_out_twice() -> None:
    agenda = Agenda(MANY, budget=1e9, clock=lambda: 0.0)
    handed = [agenda.next() for _ in range(200)]
    assert len({c.step for c in handed if c is not None}) == 200 and agenda.next() is None and not agenda.is_spent


def test_it_ends_before_the_budget_does_and_knows_what_was_measured_before() -> None:
    now = [100.0]
    agenda = Agenda(MANY, budget=3.5, clock=lambda: now[0])
    for expected in (0, 1990, 1000):
        checkpoint = agenda.next()
        assert checkpoint is not None and checkpoint.step == expected
        now[0] += 1.0
        agenda.learn(measurement(checkpoint.step, loss=1.0))
    assert agenda.next() is None and agenda.is_spent and agenda.left == 0 and agenda.waiting == 197
    known = [measurement(step, loss=1.0) for step in (0, 1000, 1990)]
    later = Agenda([c for c in MANY if c.step not in (0, 1000, 1990)], known, budget=3.5, clock=lambda: 0.0)
    checkpoint = later.next()
    assert checkpoint is not None and checkpoint.step in (500, 1500)


def test_a_budget_that_ends_leaves_a_record_that_goes_on(tmp_path: Path) -> None:
    live = trained(tmp_path)
    lines: list[str] = []
    first = measure_checkpoints(build, tmp_path, budget=1e-6, say=lines.append)
    assert [m.step for m in first.measurements] == [0]
    assert lines[-1] == "phasewatch: the budget is spent, 4 checkpoints are not measured; the same command goes on."
    whole = measure_checkpoints(build, tmp_path, budget=1e6)
    assert what_was_found(whole) == what_was_found(live) and [m.step for m in whole.measurements] == list(STEPS)
    with pytest.raises(ValueError, match="budget is 0; expected a positive number of seconds"):
        measure_checkpoints(build, tmp_path, budget=0)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_a_share_is_of_a_whole(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["measure", "x", "--build", "a:b", f"--shard={text}"])
    assert "is no share; give I/N with I from 1 to N" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2", "h", "-1h", "infh", "2d"])
def test_a_duration_needs_its_unit(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["measure", "x", "--build", "a:b", "--budget", text])
    err = capsys.readouterr().err
    assert "is no duration; give a number and its unit" in err or "expected one argument" in err
