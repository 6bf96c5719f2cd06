from __future__ import annotations

import numpy as np
from staircase import measurements, with_lambda_of_function

from phasewatch.analysis import Analysis, analyze_run
from phasewatch.figures import comparison_figure
from phasewatch.record import Estimate, Measurement, Run
from phasewatch.report import format_comparison
from phasewatch.transitions import Transition, align_transitions


def at(step: float, kind: str = "A") -> Transition:
    return Transition(step - 5, step + 5, step, (step - 8, step + 8), kind, {}, 9.0, 1e-9)


def analysis(*transitions: Transition) -> Analysis:
    measurements = tuple(Measurement(step, {"loss": Estimate(1.0 / (1 + step))}) for step in range(0, 1000, 50))
    return Analysis(Run(None, {}, measurements, (), (), (), finished=True), transitions, ("loss",), 0.05, None)


def test_rows_tell_the_steps_and_how_many_runs_share_them() -> None:
    aligned = align_transitions([[at(100), at(900)], [at(110), at(800)], [at(850)]])
    lines = format_comparison(["one", "two", "three"], aligned).splitlines()
    assert lines[0].split() == "median step (range) runs kind one two three".split()
    assert lines[2].split() == "105 (100-110) 2 of 3 A 100 110 -".split()
    assert lines[3].split() == "850 (800-900) 3 of 3 A 900 800 850".split()


def test_steps_of_each_run_are_left_out_where_there_are_too_many() -> None:
    names = [f"lightning_logs/version_{k}" for k in range(12)]
    text = format_comparison(names, align_transitions([[at(100 + k)] for k in range(12)]))
    assert "12 of 12" in text and "version" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_no_transition_anywhere_is_a_sentence() -> None:
    assert format_comparison(["one", "two"], align_transitions([[], []])).startswith("No transitions")


def test_the_figure_joins_what_is_the_same_transition() -> None:
    analyses = [analysis(at(100), at(900)), analysis(at(850)), analysis(at(120), at(870))]
    aligned = align_transitions([one.transitions for one in analyses])
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
