"""What is told beside a transition was measured there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from staircase import recorded_run

from phasewatch.analysis import analyze_run
from phasewatch.record import Change, Flag, Run, Transition
from phasewatch.record.trace import pack
from phasewatch.report import format_hints, write_report
from phasewatch.report.hints import describe_hints


def change(before: float, after: float, z: float = 9.0, reliable: bool = True) -> Change:
    return Change(before, after, after - before, 1.0, (0.0, 1.0), z, reliable)


def transition(**changes: Change) -> Transition:
    return Transition(100, 200, 150, (120, 180), "A", changes, 9.0, 1e-9)


def run_with_rates(rates: list[float]) -> Run:
    block = pack({"learning_rate": (list(range(len(rates))), rates)})
    return Run(None, {}, (), (), (), (), finished=True, blocks=(block,))


def test_units_that_died_are_told_where_that_is_sure() -> None:
    run = Run(None, {}, (), (), (), (), finished=True)
    seen = transition(zeros_dead=change(0, 48), zeros_parallel=change(0, 5, z=1.0), loss=change(2, 1))
    assert describe_hints(run, seen) == ["zeros: units that are off for all samples 0 -> 48.0"]
    assert describe_hints(run, transition(zeros_dead=change(0, 48, reliable=False))) == []
    assert format_hints(run, [transition()]) == ""


def test_the_learning_rate_across_it_is_told() -> None:
    """As observed from step 100 to 200, whatever it was before and after."""
    assert describe_hints(run_with_rates([0.5] * 300), transition()) == ["learning rate 0.500 throughout"]
    rising = [0.001 * k for k in range(300)]
    assert describe_hints(run_with_rates(rising), transition()) == ["learning rate goes 0.100 -> 0.200"]
    assert describe_hints(run_with_rates([0.5] * 90), transition()) == []


def test_checkpoints_around_it_are_named(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    found = analyze_run(run)
    flags = tuple(Flag(k, "flagged", one, one.end) for k, one in enumerate(found.transitions))
    (tmp_path / "transitions").mkdir()
    paths = [tmp_path / "transitions" / f"transition-1-{place}-step={3800}.ckpt" for place in ("after", "before")]
    for path in paths:
        path.touch()
    flagged = dataclasses.replace(run, flags=flags)
    first, second = (describe_hints(flagged, one) for one in found.transitions)
    assert first == [] and second == [f"checkpoints: {paths[0]}, {paths[1]}"]
    told = format_hints(flagged, found.transitions, markdown=True)
    assert told == f"- at 3,950: checkpoints: {paths[0]}, {paths[1]}"
    page = write_report(dataclasses.replace(found, run=flagged), tmp_path / "report").html.read_text()
    assert "What was measured beside them" in page and str(paths[1]) in page
