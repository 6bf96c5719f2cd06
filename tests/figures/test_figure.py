from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from staircase import measurements, recorded_run, with_lambda_of_function

from phasewatch.analysis import Analysis, analyze_run
from phasewatch.figures import run_figure
from phasewatch.record import Estimate, Measurement, Run
from phasewatch.record.trace import pack


def run_of(found: list[Measurement]) -> Run:
    return Run(None, {}, tuple(found), (), (), (), finished=True)


def panels(figure: Figure) -> dict[str, Axes]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_title(loc="left")}


def panel(figure: Figure, beginning: str) -> Axes:
    return next(axis for title, axis in panels(figure).items() if title.startswith(beginning))


def hollow(axis: Axes) -> list[tuple[str, list[float]]]:
    found = []
    for line in axis.lines:
        if line.get_markerfacecolor() == "white" and len(line.get_xdata()):
            found.append((str(line.get_marker()), list(line.get_xdata())))
    return found


def test_one_panel_a_signal_that_is_there(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    assert len(panels(run_figure(analyze_run(run)))) == 6
    some = [
        dataclasses.replace(m, estimates={k: m.estimates[k] for k in ("loss", "nullity")}) for m in run.measurements
    ]
    titles = panels(run_figure(analyze_run(run_of(some))))
    assert sorted(titles) == ["loss on the probe", "zero eigenvalues of the Hessian"]


def test_transitions_are_marked_and_their_kinds_named_on_top(tmp_path: Path) -> None:
    analysis = analyze_run(recorded_run(tmp_path))
    figure = run_figure(analysis)
    for axis in panels(figure).values():
        marked = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1]
        assert [t.step for t in analysis.transitions] == [x for x in marked if round(x, 6) in {1950.0, 3950.0}]
    labels = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert labels == ["A", "A"]


@pytest.mark.parametrize("every", [1, 2, 3, 12])
def test_a_rank_that_is_known_more_often_than_lambda_is_looked_at_beside_it(every: int) -> None:
    """Also where a few points had chains; where half of them had, the rank is a detail."""
    found = []
    for k in range(24):
        rank = Estimate(20.0 if k < 12 else 40.0, 0.2)
        estimates = {"loss": Estimate(1.0), "effective_rank_coarse": rank}
        if k % every == 0:
            estimates["llc_behavioral_coarse"] = Estimate(rank.value / 2, 0.2)
        found.append(Measurement(100 * k, estimates, {}, 0.1, 1e9))
    analysis = analyze_run(run_of(found))
    rarely = every > 2
    assert ("effective_rank_coarse" in analysis.signals) == rarely
    assert [t.step for t in analysis.transitions] == [1100 if every == 2 else 1150]  # between two known points
    titles = " ".join(panels(run_figure(analysis)))
    assert ("effective rank" in titles) == rarely
    assert "λ of the function, coarse" in titles


def gaps(axis: Axes) -> list[int]:
    """Steps across which the line does not lead."""
    line = max((line for line in axis.lines if line.get_linestyle() == "-"), key=lambda line: len(line.get_xdata()))
    steps, values = np.asarray(line.get_xdata()), np.asarray(line.get_ydata(), dtype=np.float64)
    assert steps.tolist() == sorted(steps.tolist())
    return list(steps[np.isnan(values)].tolist())


def test_unreliable_points_are_hollow_and_off_the_line(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    axis = panel(run_figure(analyze_run(run)), "learning coefficient")
    doubtful = run.series("llc").steps[~run.series("llc").reliable].tolist()
    assert hollow(axis) == [("o", doubtful)]
    assert gaps(axis) == doubtful
    assert "7 of 60 points unreliable" in axis.get_title(loc="left")


def test_no_line_leads_across_what_is_not_known() -> None:
    found = measurements(np.arange(0, 6000, 100), [3000.0])
    for k in (20, 21):
        unknown = Estimate(math.nan, doubts=("nothing was sampled",))
        found[k] = dataclasses.replace(found[k], estimates={**found[k].estimates, "llc": unknown})
    axis = panel(run_figure(analyze_run(run_of(found))), "learning coefficient")
    assert ", none at 2 of 60 points" in axis.get_title(loc="left")
    assert gaps(axis) == sorted([2000, 2100, *(100 * k for k in range(60) if k % 9 == 4)])
    dotted = next(line for line in axis.lines if line.get_linestyle() == ":")
    assert np.asarray(dotted.get_xdata())[np.isnan(np.asarray(dotted.get_ydata()))].tolist() == [2000, 2100]


def test_a_wild_unreliable_point_is_shown_at_the_edge_and_does_not_set_the_scale() -> None:
    found = measurements(np.arange(0, 6000, 100), [3000.0])
    wild = dataclasses.replace(found[13].estimates["llc"], value=1e6)
    found[13] = dataclasses.replace(found[13], estimates={**found[13].estimates, "llc": wild})
    axis = panel(run_figure(analyze_run(run_of(found))), "learning coefficient")
    assert axis.get_ylim()[1] < 100
    assert ("^", [1300]) in hollow(axis)


@pytest.mark.parametrize(
    ("steps", "scale"),
    [
        (np.arange(0, 6000, 100), "linear"),
        (np.unique(np.geomspace(1, 6000, 60).astype(int)), "log"),
        (np.concatenate([[0], np.unique(np.geomspace(1, 6000, 60).astype(int))]), "symlog"),
    ],
)
def test_the_step_axis_follows_the_spacing(steps: np.ndarray, scale: str) -> None:
    figure = run_figure(analyze_run(run_of(measurements(steps, [2000.0]))))
    assert {axis.get_xscale() for axis in figure.axes} == {scale}
    low, high = figure.axes[0].get_xlim()
    assert low < steps[0] and steps[-1] < high
    inside = (
        figure.axes[0]
        .transAxes.inverted()
        .transform(figure.axes[0].transData.transform([(steps[0], 1.0), (steps[-1], 1.0)]))[:, 0]
    )
    assert inside == pytest.approx([0.0, 1.0], abs=0.02) and inside[0] > 0 and inside[1] < 1


def test_the_loss_is_logarithmic_where_it_is_wide() -> None:
    steps = np.arange(0, 6000, 100)
    one = run_figure(analyze_run(run_of(measurements(steps, [2000.0]))))
    four = run_figure(analyze_run(run_of(measurements(steps, [1000.0, 2000.0, 3000.0, 4000.0]))))
    assert panel(one, "loss").get_yscale() == "linear" and panel(four, "loss").get_yscale() == "log"
    assert {axis.get_yscale() for name, axis in panels(four).items() if "loss" not in name} == {"linear"}


def test_a_constant_count_has_whole_ticks() -> None:
    found = [Measurement(k, {"nullity": Estimate(0.0)}) for k in range(20)]
    figure = run_figure(analyze_run(run_of(found)))
    figure.draw_without_rendering()
    axis = panel(figure, "zero eigenvalues")
    low, high = axis.get_ylim()
    assert [tick for tick in axis.get_yticks() if low <= tick <= high] == [-1.0, 0.0, 1.0]


def test_labels_never_overlap() -> None:
    """Long names of transitions that lie close together, measured as they are rendered."""
    run = run_of(measurements(np.arange(0, 6000, 50), [500.0, 800.0, 1100.0, 1400.0, 1700.0, 5600.0]))
    analysis = analyze_run(run)
    assert len(analysis.transitions) > 3
    kinds = ["loss falls at constant llc", "A", "hessian_max rises, nullity falls", "llc falls, loss rises"]
    renamed = tuple(dataclasses.replace(t, kind=kinds[k % len(kinds)]) for k, t in enumerate(analysis.transitions))
    figure = run_figure(Analysis(run, renamed, analysis.signals, 0.05, None))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for axis in figure.axes for text in axis.texts]
    assert len(boxes) == len(renamed)
    for k, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:k])


@pytest.mark.parametrize(
    ("found", "points"),
    [
        ([], []),
        ([Measurement(0, {"loss": Estimate(math.nan)})], []),
        ([Measurement(5000, {"loss": Estimate(1.0), "llc": Estimate(3.0, 0.1)})], [1, 1]),
        (
            [Measurement(k, {"loss": Estimate(0.0), "llc": Estimate(2.0, doubts=("stuck",))}) for k in range(20)],
            [20, 20],
        ),
        ([Measurement(0, {"loss": Estimate(1e-30)}), Measurement(1, {"loss": Estimate(1e30)})], [2]),
    ],
    ids=["nothing", "only NaN", "one step", "constant and all unreliable", "extreme"],
)
def test_odd_runs_can_be_drawn(found: list[Measurement], points: list[int]) -> None:
    """A panel for each signal that was ever known, with all of its points."""
    figure = run_figure(analyze_run(run_of(found)))
    figure.draw_without_rendering()
    assert [max(len(line.get_xdata()) for line in axis.lines) for axis in panels(figure).values()] == points


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    run_figure(analyze_run(recorded_run(tmp_path)))
    assert plt.get_fignums() == before


def test_a_count_that_is_never_known_is_drawn_by_its_bounds() -> None:
    estimates = {"nullity": Estimate(math.nan), "nullity_lower": Estimate(3.0), "nullity_upper": Estimate(40.0)}
    run = Run(None, {}, tuple(Measurement(k, dict(estimates)) for k in range(12)), (), (), (), finished=True)
    [axis] = run_figure(analyze_run(run)).axes
    assert axis.get_title(loc="left") == "zero eigenvalues of the Hessian, between its bounds; not resolved at any step"
    low, high = axis.get_ylim()
    assert low < 3 and high > 40 and len(axis.collections) >= 1


def test_lambda_of_the_function_is_drawn_first_at_both_resolutions_in_one_panel() -> None:
    jumps = [2000.0, 4000.0]
    found = with_lambda_of_function(measurements(np.arange(0, 6000, 100), jumps), jumps)
    figure = run_figure(analyze_run(run_of(found)))
    title, axis = next(iter(panels(figure).items()))
    assert title == "learning coefficient λ of the function, 95 % band; 10 of 120 points unreliable (hollow)"
    assert "loss on the probe" in list(panels(figure))[1]
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["fine (ε = 0.01)", "coarse (ε = 0.1)"]
    doubtful = [found[k].step for k in range(60) if k % 11 == 5]
    assert [at for marker, at in hollow(axis) if marker == "o"] == [doubtful, doubtful]
    drawn = [line for line in axis.lines if len(line.get_xdata()) == 60 and line.get_linestyle() == "-"]
    for name, line, text in zip(("llc_behavioral", "llc_behavioral_coarse"), drawn, legend.get_texts(), strict=True):
        reliable = [m.value(name) for m in found if m.estimates[name].reliable]
        values = np.asarray(line.get_ydata())
        assert values[~np.isnan(values)].tolist() == reliable
        assert same_color(line.get_color(), text.get_color())
    low, high = axis.get_ylim()
    assert low < 10 and high > 34, "the scale holds both"


def test_one_resolution_alone_is_named_by_its_title() -> None:
    found = with_lambda_of_function(measurements(np.arange(0, 6000, 100), [3000.0]), [3000.0])
    fine = [
        dataclasses.replace(m, estimates={k: e for k, e in m.estimates.items() if "coarse" not in k}) for m in found
    ]
    title, axis = next(iter(panels(run_figure(analyze_run(run_of(fine)))).items()))
    assert title.startswith("learning coefficient λ of the function, fine, 95 % band") and axis.get_legend() is None


def test_the_loss_at_every_step_is_drawn_where_a_transition_was_found_in_it() -> None:
    """20,000 noisy losses with one jump and hardly a measurement: averages over stretches, against means by hand."""
    rng = np.random.default_rng(0)
    steps = np.arange(20_000)
    losses = np.where(steps < 12_000, 2.0, 1.0) + 0.1 * rng.standard_normal(20_000)
    block = pack({"loss": (steps.tolist(), losses.tolist())})
    few = [Measurement(step, {"loss": Estimate(2.0 if step < 12_000 else 1.0)}) for step in (0, 10_000, 20_000)]
    for found in (few, []):
        analysis = analyze_run(Run(None, {}, tuple(found), (), (), (), finished=True, blocks=(block,)))
        [one] = analysis.transitions
        assert one.seen_by == ("training_loss",)
        axis = panel(run_figure(analysis), "training loss, averages over stretches of steps")
        drawn = next(line for line in axis.lines if len(line.get_xdata()) == 400)
        expected = losses.astype(np.float32).reshape(400, 50).mean(axis=1)
        assert np.asarray(drawn.get_ydata()) == pytest.approx(expected, abs=1e-6)
        low, high = axis.get_xlim()
        assert low < one.step < high and low < 100 and high > 19_900
