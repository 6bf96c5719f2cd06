"""Figures for notebooks: drawn on the axes that are given, and what they show."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from staircase import recorded_run

from phasewatch import analyze_run, plot
from phasewatch.record import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded_run(tmp_path_factory.mktemp("run"))


def test_each_function_draws_on_the_axes_that_it_is_given_and_returns_them(run: Run) -> None:
    _, grid = pyplot.subplots(2, 2)
    analysis = analyze_run(run)
    one, two, three, four = grid.flat
    assert plot.signal(analysis, "loss", one) is one
    assert plot.density(run, two) is two
    assert plot.spectrum(run, axes=three) is three
    assert plot.comparison([analysis, analysis], axes=four) is four
    assert all(axes.has_data() for axes in grid.flat)
    pyplot.close("all")
    assert plot.signal(run, "llc") is pyplot.gca()
    pyplot.close("all")


def test_a_signal_shows_its_values_and_the_transitions_of_an_analysis(run: Run) -> None:
    series = run.series("llc")
    axes = [plot.signal(of, "llc", Figure().add_subplot()) for of in (run, analyze_run(run))]
    for one in axes:
        doubted = next(line for line in one.lines if line.get_markerfacecolor() == "white")
        assert len(doubted.get_xdata()) == (~series.reliable).sum()

    def upright(one: Axes) -> int:
        ends = [list(line.get_xdata()) for line in one.lines]
        return sum(len(xs) == 2 and xs[0] == xs[1] for xs in ends)

    assert [upright(one) for one in axes] == [0, 2]


def test_the_spectrum_is_that_of_the_step_asked_for(run: Run) -> None:
    step = run.measurements[3].step
    [lines] = plot.spectrum(run, step, Figure().add_subplot()).collections
    found = run.measurements[3].histograms["hessian_eigenvalues"]
    assert [segment[0][0] for segment in lines.get_segments()] == found.positions
    assert [segment[1][1] for segment in lines.get_segments()] == found.weights
    with pytest.raises(ValueError, match=r"no spectrum was measured at step 1; there is one at \[0, 100"):
        plot.spectrum(run, 1, Figure().add_subplot())


def test_what_is_not_there_is_named(run: Run) -> None:
    with pytest.raises(KeyError, match="no series 'accuracy'; it has: loss"):
        plot.signal(run, "accuracy", Figure().add_subplot())
    empty = Run(None, {}, (), (), (), (), finished=True)
    with pytest.raises(ValueError, match="two spectra"):
        plot.density(empty, Figure().add_subplot())
    assert isinstance(empty.plot(), Figure)


def test_a_run_plots_itself(run: Run, tmp_path: Path) -> None:
    figure = run.plot()
    assert {axes.get_title(loc="left").split(",")[0] for axes in figure.axes} >= {"loss on the probe"}
    figure.savefig(tmp_path / "run.png")
