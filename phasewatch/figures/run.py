"""The course of a run as a figure: one panel a signal, its stages shaded, its transitions marked.

Signals that are one quantity at several resolutions share a panel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from phasewatch.analysis import Analysis
from phasewatch.figures.panel import draw_panel, measured_bounds, recorded
from phasewatch.figures.stages import draw_events, draw_stages, fractions
from phasewatch.figures.style import (
    BOTTOM,
    CHARACTER,
    FAINT,
    INK,
    LABEL_HEIGHT,
    LEFT,
    PANEL_HEIGHT,
    RIGHT,
    TITLE_HEIGHT,
    TOP,
    VERMILION,
    WIDTH,
    scale_steps,
)
from phasewatch.record import Run, Signal, Transition
from phasewatch.record.signals import (
    CATALOGUE,
    DETAIL,
    LOSS,
    TRAINING_LOSS,
    detected,
    is_one_of_several_counts,
    look_up,
)


def run_figure(analysis: Analysis) -> Figure:
    """Draw a run and its transitions.

    Points that are not to be trusted are hollow, with a dotted line to them; those beyond the axis stand as triangles
    at its edge. A transition is a line at its location, with the location's 95 % interval shaded and its extent barred
    on top. What the schedule did or what befell the run is a dotted line.

    Args:
        analysis: As given by :func:`phasewatch.analyze_run`.
    """
    run = analysis.run
    panels = _panels(analysis)
    steps = _extent(panels, run)
    centres = _label_centres(analysis.transitions, steps) if panels else []
    rows = _label_rows(analysis.transitions, centres) if panels else []
    strip = LABEL_HEIGHT * (len(set(rows)) + 0.6) if rows else 0.0
    height = TOP + strip + PANEL_HEIGHT * max(len(panels), 1) + BOTTOM
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    if not panels:
        figure.text(0.5, 0.5, "Nothing has been measured yet.", ha="center", va="center", color=FAINT, fontsize=10)
        return figure
    top = height - TOP - strip
    axes: list[Axes] = []
    for k in range(len(panels)):
        low = top - PANEL_HEIGHT * (k + 1)
        box = (LEFT / WIDTH, low / height, 1 - (LEFT + RIGHT) / WIDTH, (PANEL_HEIGHT - TITLE_HEIGHT) / height)
        axes.append(figure.add_axes(box, sharex=axes[0] if axes else None))
    scale_steps(axes[0], steps)
    for axis, rows_shown in zip(axes, panels, strict=True):
        draw_stages(axis, analysis.transitions)
        draw_events(axis, analysis.events, named=axis is axes[-1])
        draw_panel(axis, rows_shown, run)
        axis.tick_params(labelbottom=axis is axes[-1], bottom=axis is axes[-1])
    axes[-1].set_xlabel("training step", fontsize=8.5, color=INK, labelpad=3)
    if rows:
        tall = TITLE_HEIGHT + strip
        box = (LEFT / WIDTH, (top - TITLE_HEIGHT) / height, 1 - (LEFT + RIGHT) / WIDTH, tall / height)
        _draw_labels(figure.add_axes(box, sharex=axes[0]), analysis.transitions, rows, centres, tall)
    return figure


def _panels(analysis: Analysis) -> list[list[Signal]]:
    """The signals to draw: those that the detector saw, and those it would look at.

    They come in the order of the catalogue, those that it does not have after the loss, as one of them is the loss too.

    Those of one group share a panel where no logarithm is ever taken of them, so that they have one scale.
    """
    names = {*detected(analysis.run.names), *analysis.signals}
    shown = [row for row in CATALOGUE.values() if row.name in names]
    others = [look_up(name) for name in analysis.signals if name not in CATALOGUE]
    after_loss = next((k for k, row in enumerate(shown, start=1) if row.name == LOSS), len(shown))
    shown[after_loss:after_loss] = others
    panels: dict[str, list[Signal]] = {}
    for row in shown:
        if _says_something(row, analysis.run):
            panels.setdefault(row.group if row.linear and row.group != DETAIL else row.name, []).append(row)
    return list(panels.values())


def _extent(panels: Sequence[Sequence[Signal]], run: Run) -> NDArray[np.int64]:
    """The steps of the measurements, and around them those of what was observed at every step."""
    measured = [m.step for m in run.measurements]
    dense = [recorded(row.name, run).steps[[0, -1]] for rows in panels for row in rows if row.name not in run.names]
    return np.unique(np.concatenate([np.array(measured, dtype=np.int64), *dense]))


def _says_something(row: Signal, run: Run) -> bool:
    """Whether there is a value, or a bound; of a count that is one of several, whether it ever changes."""
    if row.name not in {*run.names, *run.observed, TRAINING_LOSS}:
        return False
    values = recorded(row.name, run).values
    if measured_bounds(row, run) is not None:
        return True
    return bool(np.isfinite(values).any() and not (is_one_of_several_counts(row.name) and np.ptp(values) == 0))


def _fractions(places: Sequence[float], steps: NDArray[np.int64]) -> list[float]:
    """Where steps lie along the axis that there will be, as shares of its width."""
    axis = Figure().add_axes((0, 0, 1, 1))
    scale_steps(axis, steps)
    return fractions(axis, places)


def _label_centres(transitions: Sequence[Transition], steps: NDArray[np.int64]) -> list[float]:
    """Centres of the labels in inches from the left of the axis, none sticking out of it."""
    if not transitions:
        return []
    width = WIDTH - LEFT - RIGHT
    centres = []
    for fraction, transition in zip(_fractions([t.step for t in transitions], steps), transitions, strict=True):
        half = min(0.5 * CHARACTER * len(transition.label), 0.5 * width)
        centres.append(min(max(fraction * width, half), width - half))
    return centres


def _label_rows(transitions: Sequence[Transition], centres: Sequence[float]) -> list[int]:
    """For each label the row it stands in, 0 being the lowest, so that none overlaps another."""
    ends: list[float] = []
    rows = []
    for centre, transition in zip(centres, transitions, strict=True):
        half = 0.5 * CHARACTER * (len(transition.label) + 2)
        row = next((row for row, end in enumerate(ends) if centre - half >= end), len(ends))
        ends[row:] = [centre + half, *ends[row + 1 :]]
        rows.append(row)
    return rows


def _draw_labels(
    axis: Axes, transitions: Sequence[Transition], rows: Sequence[int], centres: Sequence[float], tall: float
) -> None:
    axis.set_axis_off()
    axis.set_zorder(-1)
    axis.set_ylim(0, tall)
    width = WIDTH - LEFT - RIGHT
    for transition, row, centre in zip(transitions, rows, centres, strict=True):
        foot = TITLE_HEIGHT + 0.1 * LABEL_HEIGHT
        height = TITLE_HEIGHT + (0.4 + row) * LABEL_HEIGHT
        axis.plot(
            [transition.start, transition.end],
            [foot, foot],
            color=VERMILION,
            linewidth=2.4,
            solid_capstyle="butt",
        )
        axis.plot([transition.step] * 2, [0, height], color=VERMILION, linewidth=1.0)
        axis.text(
            centre / width,
            height / tall,
            transition.label,
            transform=axis.transAxes,
            ha="center",
            va="bottom",
            fontsize=8.5,
            fontweight="bold",
            color=VERMILION,
            parse_math=False,
            # The line of another transition may pass behind.
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
            zorder=3,
        )
