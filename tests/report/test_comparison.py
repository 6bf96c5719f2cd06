from __future__ import annotations

import dataclasses
import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from staircase import measurements, with_lambda_of_function

from phasewatch.analysis import Analysis, analyze_run
from phasewatch.figures import comparison_figure
from phasewatch.record import Estimate, Measurement, Run
from phasewatch.report import Comparison, compare_runs, format_comparison, verdict, write_comparison
from phasewatch.report.comparison import differences
from phasewatch.transitions import Transition, align_transitions


def at(step: float, kind: str = "A") -> Transition:
    return Transition(step - 5, step + 5, step, (step - 8, step + 8), kind, {}, 9.0, 1e-9)


def analysis(*transitions: Transition) -> Analysis:
    measurements = tuple(Measurement(step, {"loss": Estimate(1.0 / (1 + step))}) for step in range(0, 1000, 50))
    return Analysis(Run(None, {}, measurements, (), (), (), finished=True), transitions, ("loss",), 0.05, None)


def compared(*transitions: list[Transition], factor: float = 1.2) -> Comparison:
    names = ["one", "two", "three", *map(str, range(4, 99))][: len(transitions)]
    return compare_runs(names, [analysis(*found) for found in transitions], factor)


def test_rows_tell_the_steps_and_how_many_runs_share_them() -> None:
    lines = format_comparison(compared([at(100), at(900)], [at(110), at(800)], [at(850)])).splitlines()
    assert lines[0].split() == "median step (range) runs kind one two three".split()
    assert lines[2].split() == "105 (100-110) 2 of 3 A 100 110 -".split()
    assert lines[3].split() == "850 (800-900) 3 of 3 A 900 800 850".split()


def test_steps_of_each_run_are_left_out_where_there_are_too_many() -> None:
    names = [f"lightning_logs/version_{k}" for k in range(12)]
    text = format_comparison(compare_runs(names, [analysis(at(100 + k)) for k in range(12)]))
    assert "12 of 12" in text and "version" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_no_transition_anywhere_is_a_sentence() -> None:
    assert format_comparison(compared([], [])).startswith("No transitions")


@pytest.mark.parametrize(
    ("transitions", "headline"),
    [
        (([at(100)], [at(110)]), "1 transition in all 2 runs"),
        (([at(100), at(500)], [at(110)]), "1 transition in all 2 runs, 1 in some of them"),
        (([at(100)], [at(500)]), "2 transitions, none of them in all 2 runs"),
        (([], []), "No transitions were found in any of the runs."),
    ],
)
def test_the_headline_counts_what_all_share(transitions: Any, headline: str) -> None:
    assert compared(*transitions).headline == headline


def header(samples: int = 256, resolutions: Any = (0.1, 0.003), n: int = 1000) -> dict[str, Any]:
    estimators = {"llc_behavioral": {"resolutions": list(resolutions)}, "llc": {"localization": 10.0}}
    probe = {"source": "given", "samples": samples, "mode": "eval"}
    return {"n": n, "module": "Net", "num_parameters": 650, "monitors": [{"estimators": estimators, "probe": probe}]}


def test_runs_that_were_not_measured_alike_are_marked() -> None:
    names = ["a", "b", "c"]
    assert differences(names, [header(), header(), header()]) == []
    assert differences(names, [header(), header(samples=512), header()]) == [
        "probe: 256 samples, given, eval (a, c); 512 samples, given, eval (b)."
    ]
    resolutions, size = differences(names, [header(resolutions=(0.1,)), header(n=2000), {"source": "events"}])
    assert resolutions == "resolutions of λ of the function: [0.1] (a); [0.1, 0.003] (b)."
    assert size == "size of the training set: 1,000 (a); 2,000 (b)."
    for damaged in ({"monitors": []}, {"monitors": [None]}, {"monitors": "x"}, {"monitors": [{"probe": None}]}):
        assert differences(names[:2], [header(), damaged]) == []


def test_the_page_has_table_figure_marks_and_every_verdict(tmp_path: Path) -> None:
    first, second = analysis(at(100)), analysis(at(110))
    first = dataclasses.replace(first, run=dataclasses.replace(first.run, header=header()))
    second = dataclasses.replace(second, run=dataclasses.replace(second.run, header=header(samples=99)))
    paths = write_comparison(compare_runs(["<one>", "two"], [first, second]), tmp_path / "new")
    page = paths.html.read_text(encoding="utf-8")
    assert "<h1>1 transition in all 2 runs</h1>" in page
    assert "&lt;one&gt;" in page and "<one>" not in page
    assert "<td>105 (100-110)</td><td>2 of 2</td><td>A</td><td>100</td><td>110</td>" in page
    assert "not to be compared: probe: 256 samples" in page and "data:image/png;base64," in page
    for one in (first, second):
        assert all(f"<li>{escape(line)}</li>" in page for line in verdict(one).sentences)
    data = json.loads(paths.json.read_text(encoding="utf-8"))
    assert data["aligned"] == [{"step": 105.0, "share": 1.0, "kind": "A", "steps": [100, 110]}]
    assert list(data["runs"]) == ["<one>", "two"]


def test_the_figure_joins_what_is_the_same_transition() -> None:
    analyses = [analysis(at(100), at(900)), analysis(at(850)), analysis(at(120), at(870))]
    aligned = align_transitions([one.transitions for one in analyses], factor=1.2)
    [axis] = comparison_figure(["one", "two", "three"], analyses, aligned).axes
    joined = [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "o"]
    lanes = [[(x, int(y)) for x, y in line] for line in joined]
    assert sorted(lanes) == [[(100, 0), (120, 2)], [(900, 0), (850, 1), (870, 2)]]
    assert [text.get_text() for text in axis.texts] == ["one: loss", "two: loss", "three: loss"]
    low, high = axis.get_xlim()
    assert low < 0 and high > 950 and np.isfinite([low, high]).all()


def test_a_lane_shows_lambda_of_the_function() -> None:
    runs = [recorded_run_with_lambda(seed) for seed in (1, 2)]
    analyses = [analyze_run(run) for run in runs]
    aligned = align_transitions([one.transitions for one in analyses])
    assert [one.kind for one in aligned] == ["A"]
    [axis] = comparison_figure(["one", "two"], analyses, aligned).axes
    assert [text.get_text() for text in axis.texts] == ["one: llc_behavioral", "two: llc_behavioral"]


def recorded_run_with_lambda(seed: int) -> Run:
    found = with_lambda_of_function(measurements(np.arange(0, 6000, 100), [3000.0], seed), [3000.0], seed=seed)
    return Run(None, {}, tuple(found), (), (), (), finished=True)


def test_runs_without_measurements_are_drawn_empty() -> None:
    empty = Analysis(Run(None, {}, (), (), (), (), finished=True), (), (), 0.05, "Undecided: nothing measured")
    [axis] = comparison_figure(["one", "two"], [empty, empty], []).axes
    assert [text.get_text() for text in axis.texts] == ["one: no signal (Undecided)", "two: no signal (Undecided)"]
