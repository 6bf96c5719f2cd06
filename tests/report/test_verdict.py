"""One verdict, wherever one looks."""

from __future__ import annotations

import dataclasses
import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from staircase import HEADER, measurements, recorded_run, with_lambda_of_function
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phasewatch.analysis import NOT_BORNE_OUT, analyze_run
from phasewatch.cli import main
from phasewatch.record import Estimate, Flag, Run
from phasewatch.record.ending import NOT_CLOSED
from phasewatch.record.trace import pack
from phasewatch.report import verdict, write_report
from phasewatch.tensorboard import TensorBoardWriter
from phasewatch.tensorboard.writer import VERDICT

STEPS = np.arange(0, 6000, 100)
JUMPS = [2000.0, 4000.0]


def plain(jumps: list[float], **settings: Any) -> Run:
    found = with_lambda_of_function(measurements(STEPS, jumps), jumps)
    return Run(None, HEADER, tuple(found), (), (), (), **{"finished": True, **settings})


def test_it_says_when_how_and_what_may_be_trusted() -> None:
    """Two jumps; of 60 points of λ each eleventh from the sixth on is doubted, λ of the loss has but the last six."""
    said = verdict(analyze_run(plain(JUMPS)))
    assert said.finding == "transitions" and said.not_borne_out == ()
    assert said.sentences[0] == "2 transitions:"
    first, second = said.sentences[1:3]
    assert first.startswith("step 1,9") and ": A: loss " in first and "λ (fine) " in first and "λ (coarse) " in first
    assert second.startswith("step 3,9") and ": A: loss " in second
    assert said.sentences[3] == "Nothing since step 4,000, up to step 5,900."
    doubted = sum(k % 11 == 5 for k in range(60))
    assert said.reliable["llc_behavioral"] == said.reliable["llc_behavioral_coarse"] == (60 - doubted, 60)
    assert "λ of the function (fine): 55 of 60 points are reliable (R-hat 1.4 is above 1.1 5)." in said.sentences
    assert said.reliable["llc"][1] == 60 and said.reliable["llc"][0] <= 6


def test_a_run_that_diverges_is_called_that_before_all_else() -> None:
    """Two jumps, and no number from step 5,500 on."""
    every = np.arange(6000)
    loss = np.where(every < 5500, 1.0, np.nan)
    run = plain(JUMPS)
    run = dataclasses.replace(run, blocks=(pack({"loss": (every.tolist(), loss.tolist())}),))
    said = verdict(analyze_run(run))
    assert said.finding == "diverged"
    assert said.sentences[:2] == ("Diverged at step 5,500: the loss is nan from step 5,500 on.", "2 transitions:")
    assert sum("5,500" in sentence for sentence in said.sentences) == 1


@pytest.mark.parametrize(
    ("rates", "headline"),
    [
        ({1950: 0.1}, "1 transition, and 1 change with a cause outside of the model:"),
        ({1950: 0.1, 3950: 0.01}, "No transitions, and 2 changes with a cause outside of the model:"),
    ],
)
def test_what_the_schedule_made_is_not_counted_among_the_transitions(
    rates: dict[int, float], headline: str, tmp_path: Path
) -> None:
    """Two jumps, one or both where the learning rate drops by ten."""
    every = np.arange(6000)
    rate = np.full(6000, 1.0)
    for step, value in rates.items():
        rate[every >= step] = value
    block = pack({"learning_rate": (every.tolist(), rate.tolist())})
    run = dataclasses.replace(plain(JUMPS), blocks=(block,))
    analysis = analyze_run(run)
    assert [one.kind for one in analysis.transitions].count("learning-rate drop") == len(rates)
    assert verdict(analysis).sentences[0] == headline
    write_report(analysis, tmp_path)
    assert f"<h1>{headline[:-1]}</h1>" in (tmp_path / "phasewatch.html").read_text()


@pytest.mark.parametrize(
    ("run", "finding", "sentence"),
    [
        (plain([]), "no transition", "No transitions were found"),
        (dataclasses.replace(plain([]), measurements=plain([]).measurements[:5]), "too little measured", "holds 5"),
        (Run(None, {}, (), (), (), (), finished=False), "too little measured", "no usable measurements"),
    ],
)
def test_nothing_found_and_too_little_measured_are_different_verdicts(run: Run, finding: str, sentence: str) -> None:
    said = verdict(analyze_run(run))
    assert said.finding == finding and sentence in said.sentences[0]


@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_flag_that_the_whole_run_does_not_bear_out_is_told(withdrawn: bool) -> None:
    analysis = analyze_run(plain(JUMPS))
    true = analysis.transitions[0]
    elsewhere = {"start": 5000.0, "step": 5050.0, "end": 5100.0, "interval": (5000.0, 5100.0)}
    false = dataclasses.replace(true, **elsewhere)  # type: ignore[arg-type]
    flags = [Flag(0, "flagged", true, 2300.0), Flag(1, "flagged", false, 5200.0)]
    flags += [Flag(2, "flagged", false, 5400.0), Flag(2, "withdrawn", false, 5500.0, "not found any more")]
    flags += [Flag(1, "withdrawn", false, 5900.0, NOT_BORNE_OUT)] if withdrawn else []
    said = verdict(dataclasses.replace(analysis, run=dataclasses.replace(analysis.run, flags=tuple(flags))))
    assert said.not_borne_out == (5200.0,)
    assert any(s.startswith("Flagged at step 5,200 while the run went on, and not borne out") for s in said.sentences)


def test_what_is_noted_of_points_is_counted_and_does_not_make_them_unreliable(tmp_path: Path) -> None:
    run = plain(JUMPS)
    found = []
    for k, m in enumerate(run.measurements):
        note = (f"limited by the probe: half of it shows {60 + k}% of the effective rank",) if k < 7 else ()
        noted = dataclasses.replace(m.estimates["llc_behavioral"], notes=note)
        found.append(dataclasses.replace(m, estimates={**m.estimates, "llc_behavioral": noted}))
    run = dataclasses.replace(run, measurements=tuple(found))
    analysis = analyze_run(run)
    said = verdict(analysis)
    assert said.reliable == verdict(analyze_run(plain(JUMPS))).reliable
    expected = (
        "λ of the function (fine): 55 of 60 points are reliable (R-hat 1.4 is above 1.1 5), 7 limited by the probe."
    )
    assert expected in said.sentences
    assert "<td>7 of 60</td><td>limited by the probe</td>" in write_report(analysis, tmp_path).html.read_text()


@pytest.mark.parametrize(
    ("what", "why"),
    [("llc_behavioral", ": llc_behavioral failed (KeyError: no such thing)"), ("zeros", "")],
)
def test_where_no_lambda_was_measured_it_says_why(what: str, why: str) -> None:
    run = plain(JUMPS)
    bare = [dataclasses.replace(m, estimates={"loss": m.estimates["loss"]}) for m in run.measurements]
    failures = ({"step": 0, "what": what, "error": "KeyError: no such thing. Look for it elsewhere."},)
    said = verdict(analyze_run(dataclasses.replace(run, measurements=tuple(bare), failures=failures)))
    assert f"No λ was measured{why}." in said.sentences


@pytest.mark.parametrize(
    ("ranks", "error", "told"),
    [
        ((3000.0, 1200.0, 2400.0, 6400.0), 60.0, "1,500 → 3,200 from step 0 to 300, least 600 at step 100."),
        ((3000.0, 9000.0, 3000.0, 3000.0), math.nan, "1,500 → 1,500 from step 0 to 300, most 4,500 at step 100."),
        ((3000.0, 2900.0, 3050.0, 3000.0), 60.0, "1,500 → 1,500 from step 0 to 300."),
        ((1000.0, 2000.0, 3000.0, 4000.0), 60.0, "500 → 2,000 from step 0 to 300."),
    ],
)
def test_ends_of_the_rank_do_not_hide_what_lies_between(ranks: Any, error: float, told: str) -> None:
    found = [
        dataclasses.replace(m, estimates={"loss": m.estimates["loss"], "effective_rank_coarse": Estimate(rank, error)})
        for m, rank in zip(plain(JUMPS).measurements, ranks, strict=False)
    ]
    said = verdict(analyze_run(dataclasses.replace(plain(JUMPS), measurements=tuple(found))))
    assert f"may be far, reliable at 4 of 4 points: {told}" in "\n".join(said.sentences)


def test_what_the_schedule_did_is_told() -> None:
    steps = np.arange(0, 6_000)
    block = pack({"learning_rate": (steps.tolist(), np.where(steps < 3000, 0.1, 0.01).tolist())})
    said = verdict(analyze_run(dataclasses.replace(plain(JUMPS), blocks=(block,))))
    assert "step 3,000: learning-rate drop: the learning rate goes from 0.1 to 0.01 at step 3,000" in said.sentences


@pytest.mark.parametrize("jumps", [[], [2000.0], JUMPS])
@pytest.mark.parametrize("finished", [True, False])
def test_all_views_say_the_same(
    jumps: list[float],
    finished: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest's workers have it, which a pipe has not
    run = recorded_run(tmp_path, jumps=tuple(jumps), finished=finished)
    analysis = analyze_run(run)
    expected = verdict(analysis).sentences
    assert (NOT_CLOSED in expected) is not finished
    assert main(["analyze", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("\n".join(expected) + "\n")
    paths = write_report(analysis, tmp_path / "out")
    assert json.loads(paths.json.read_text())["verdict"]["sentences"] == list(expected)
    assert "".join(f"<li>{escape(sentence)}</li>" for sentence in expected) in paths.html.read_text()
    writer = TensorBoardWriter(tmp_path)
    for measurement in run.measurements:
        writer.on_measurement(measurement)
    writer.on_end(analysis)
    writer.close()
    events = EventAccumulator(str(writer.directory), size_guidance={"tensors": 0}).Reload()
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{VERDICT}/text_summary")]
    assert len(texts) == len(run.measurements) and "flagged so far" in texts[0]
    assert texts[-1] == "\n".join(f"- {sentence}" for sentence in expected)
