"""Which checkpoint is measured next."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_cases import STEPS, build, trained, what_was_found

from phasewatch import measure_checkpoints
from phasewatch.cli import main
from phasewatch.record import Estimate, Measurement
from phasewatch.sweep.agenda import COARSE, Agenda
from phasewatch.sweep.checkpoints import Checkpoint

MANY = [Checkpoint(Path(f"{k}.pt"), 10 * k) for k in range(200)]


def measurement(step: int, **values: float) -> Measurement:
    return Measurement(step, {name: Estimate(value) for name, value in values.items()}, seconds=1.0)


def order(agenda: Agenda, count: int, jumps: tuple[int, ...]) -> list[int]:
    """The steps handed out where the loss and the nullity jump at these steps in turn."""
    steps = []
    for _ in range(count):
        checkpoint = agenda.next()
        if checkpoint is None:
            break
        steps.append(checkpoint.step)
        passed = [checkpoint.step >= jump for jump in jumps]
        agenda.learn(measurement(checkpoint.step, loss=1.0 - sum(passed[::2]), nullity=5.0 + sum(passed[1::2])))
    return steps


def test_without_a_budget_all_come_in_order() -> None:
    assert order(Agenda(MANY), 300, (500,)) == [checkpoint.step for checkpoint in MANY]


@pytest.mark.parametrize("jumps", [(730,), (1990,), (10,), (420, 1510)])
def test_twenty_by_bisection_locate_what_two_hundred_would(jumps: tuple[int, ...]) -> None:
    """Nine cover the run in gaps of 25, and five halve the gap at a jump down to nothing."""
    agenda = Agenda(MANY, budget=1e9, clock=lambda: 0.0)
    steps = order(agenda, 20, jumps)
    assert steps[:2] == [0, 1990] and len(set(steps)) == 20
    coarse = sorted(steps[:COARSE])
    assert max(after - before for before, after in zip(coarse, coarse[1:], strict=False)) <= 260
    for jump in jumps:
        assert {jump - 10, jump} <= set(steps)


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
