from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from staircase import measurements, recorded_run
from torch import nn

from phasewatch.analysis import analyze_run
from phasewatch.cli import main
from phasewatch.figures import run_figure
from phasewatch.record import Estimate, Measurement, Run, load_run
from phasewatch.record.trace import pack
from phasewatch.report import format_events, write_report
from phasewatch.watch import Watch


def test_finds_the_two_jumps_of_a_staircase(tmp_path: Path) -> None:
    """Jumps of 20 and more standard deviations between two measurements: missing one is beyond chance."""
    analysis = analyze_run(recorded_run(tmp_path, jumps=(2000.0, 4000.0)))
    assert [(t.start, t.end, t.kind) for t in analysis.transitions] == [(1900, 2000, "A"), (3900, 4000, "A")]
    assert analysis.signals == ("loss", "llc", "hessian_trace", "nullity")
    assert {"hessian_max", "hessian_min"} < set(analysis.transitions[0].changes)
    assert analysis.note is None


def test_takes_signals_measured_at_different_steps(tmp_path: Path) -> None:
    """The union of the steps: loss and λ are measured in turns, and both jumps are still found."""
    run = recorded_run(tmp_path)
    thinned = []
    for k, m in enumerate(run.measurements):
        kept = {"llc"} if k % 2 else {"loss"}
        thinned.append(dataclasses.replace(m, estimates={name: m.estimates[name] for name in kept}))
    found = analyze_run(dataclasses.replace(run, measurements=tuple(thinned))).transitions
    assert [t.start <= jump <= t.end for t, jump in zip(found, (2000, 4000), strict=True)] == [True, True]
    assert set(found[0].changes) == {"loss", "llc"}


def test_says_when_there_is_too_little_to_look_at(tmp_path: Path) -> None:
    few = analyze_run(recorded_run(tmp_path, points=5))
    assert few.transitions == () and few.note is not None and "5 usable measurements" in few.note
    nothing = analyze_run(Run(None, {}, (), (), (), (), finished=False))
    assert nothing.transitions == () and nothing.note is not None and "no usable measurements" in nothing.note


def test_numbers_that_are_not_finite_neither_raise_nor_count(tmp_path: Path) -> None:
    bad = [Measurement(step, {"loss": Estimate(math.inf if step % 2 else math.nan)}) for step in range(30)]
    analysis = analyze_run(Run(None, {}, tuple(bad), (), (), (), finished=True))
    assert analysis.note is not None and "no usable" in analysis.note


def test_only_the_signals_asked_for_are_looked_at(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    assert set(analyze_run(run, signals=["hessian_max"]).transitions[0].changes) == {"hessian_max"}
    with pytest.raises(KeyError, match="no series 'accuracy'; it has: loss"):
        analyze_run(run, signals=["accuracy"])


def test_dict_is_strict_json_and_counts_the_unreliable(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    worse = dataclasses.replace(run, header={**run.header, "odd": [math.nan, {"deep": math.inf}]})
    plain = json.loads(json.dumps(analyze_run(worse).to_dict(), allow_nan=False))
    assert plain["header"]["odd"] == [None, {"deep": None}]
    assert plain["unreliable"] == {"llc": sum(k % 9 == 4 for k in range(60))}
    assert plain["steps"] == [0, 5900] and plain["measurements"] == 60
    assert [t["start"] for t in plain["transitions"]] == [1900, 3900]


def test_a_run_without_jumps_has_no_transition() -> None:
    """Rate of false alarms 5 % at most for a run; the seed is fixed."""
    run = Run(None, {}, tuple(measurements(np.arange(0, 6000, 100), [])), (), (), (), finished=True)
    assert analyze_run(run).transitions == ()


def test_a_jump_at_a_learning_rate_drop_is_named_so_everywhere(tmp_path: Path) -> None:
    steps = np.arange(0, 6_000)
    block = pack({"learning_rate": (steps.tolist(), np.where(steps < 1950, 0.1, 0.01).tolist())})
    run = dataclasses.replace(recorded_run(tmp_path, jumps=(2000.0, 4000.0)), blocks=(block,), resumed=(5_000,))
    analysis = analyze_run(run)
    assert [t.kind for t in analysis.transitions] == ["learning-rate drop", "A"]
    assert [(e.kind, e.step) for e in analysis.events] == [("learning-rate drop", 1950.0), ("resumed", 5000.0)]
    told = "the learning rate goes from 0.1 to 0.01 at step 1,950"
    assert told in format_events(analysis.events)
    assert told in write_report(analysis, tmp_path / "report").html.read_text()
    assert analysis.to_dict()["events"][0] == {
        "kind": "learning-rate drop",
        "step": 1950.0,
        "description": told,
        "until": None,
    }
    drawn = [line.get_linestyle() for line in run_figure(analysis).axes[0].lines]
    assert drawn.count(":") == 2


def test_what_the_user_gave_under_a_name_of_their_own_is_looked_at_by_name(tmp_path: Path) -> None:
    """A loss at every step that falls at 2,500 by six of its standard deviations, and an accuracy now and then."""
    rng = np.random.default_rng(0)
    every, now_and_then = np.arange(6_000), np.arange(0, 6_000, 100)
    loss = 1.0 - 0.3 * (every >= 2_500) + 0.05 * rng.standard_normal(6_000)
    accuracy = 0.5 + 0.3 * (now_and_then >= 4_000) + 0.02 * rng.standard_normal(60)
    watch = Watch(
        nn.Linear(1, 1),
        [(torch.zeros(4, 1), torch.zeros(4, 1))],
        loss_fn=lambda module, batch: module(batch[0]).square().mean(),
        estimators=(),
        schedule=[10**6],
        directory=tmp_path,
    )
    for step in every.tolist():
        watch.observe(step, my_own=float(loss[step]))
        if step % 100 == 0:
            watch.observe(step, **{"val/accuracy": float(accuracy[step // 100])})
    watch.close()
    run = load_run(tmp_path)
    [found] = analyze_run(run, signals=["my_own"]).transitions
    assert found.seen_by == ("my_own",) and abs(found.step - 2_499.5) <= 10
    [found] = analyze_run(run, signals=["val/accuracy"]).transitions
    assert (found.start, found.end) == (3_900, 4_000)
    assert len(analyze_run(run, signals=["my_own", "val/accuracy"]).transitions) == 2
    with pytest.raises(KeyError, match="no series 'another'"):
        analyze_run(run, signals=["another"])
    assert main(["analyze", str(tmp_path), "--signals", "val/accuracy", "--output", str(tmp_path / "report")]) == 0
