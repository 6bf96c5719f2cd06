"""The course of a run as a figure: one panel a signal, its stages shaded, its transitions marked.

Signals that are one quantity at several resolutions share a panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator
from numpy.typing import NDArray

from phasewatch.analysis import Analysis
from phasewatch.record import Run, Signal, Transition
from phasewatch.record.signals import CATALOGUE, DETAIL, NORMAL_95, detected, is_one_of_several_counts, look_up
from phasewatch.transitions.events import Event

# Okabe & Ito's palette, told apart by colour-blind readers.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#007A5A", "#8A4A8B", "#56B4E9", "#E69F00"
INK, FAINT = "#2B2B2B", "#8C8C8C"
# Of the units in the order of the catalogue.
COLOURS = (BLUE, INK, GREEN, PURPLE)
# Of the second signal in a panel.
OTHER_COLOURS = (SKY, PURPLE, GREEN)
STAGE_TINTS = ("#F3F5F8", "#E5EAF1")

WIDTH = 9.0
PANEL_HEIGHT = 1.26
TITLE_HEIGHT = 0.21
LABEL_HEIGHT = 0.17
BOTTOM, TOP, LEFT, RIGHT = 0.46, 0.12, 0.72, 0.32
CHARACTER = 0.068
# From here on the points of a series are drawn as a line only.
MANY_POINTS = 150
# More events than that are lines without a name.
MOST_NAMED = 12
# A positive signal that decays by this factor is drawn on a logarithmic axis.
WIDE = 10.0


def run_figure(analysis: Analysis) -> Figure:
    """Draw a run and its transitions.

    Points that are not to be trusted are hollow and off the line; those beyond the axis stand as triangles at its
    edge. A transition is a line at its location, with the location's 95 % interval shaded and its extent barred
    on top. What the schedule did or what befell the run is a dotted line.

    Args:
        analysis: As given by :func:`phasewatch.analyze_run`.
    """
    run = analysis.run
    panels = _panels(analysis)
    steps = np.array([m.step for m in run.measurements], dtype=np.int64)
    rows = _label_rows(analysis.transitions, steps) if panels else []
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
        _draw_stages(axis, analysis.transitions)
        _draw_events(axis, analysis.events, named=axis is axes[-1])
        _draw_panel(axis, rows_shown, run)
        axis.tick_params(labelbottom=axis is axes[-1], bottom=axis is axes[-1])
    axes[-1].set_xlabel("training step", fontsize=8.5, color=INK, labelpad=3)
    if rows:
        tall = TITLE_HEIGHT + strip
        box = (LEFT / WIDTH, (top - TITLE_HEIGHT) / height, 1 - (LEFT + RIGHT) / WIDTH, tall / height)
        _draw_labels(figure.add_axes(box, sharex=axes[0]), analysis.transitions, rows, tall, steps)
    return figure


def _panels(analysis: Analysis) -> list[list[Signal]]:
    """The signals to draw, in the order of the catalogue: those that the detector saw, and those it would look at.

    Those of one group share a panel where no logarithm is ever taken of them, so that they have one scale.
    """
    names = {*detected(analysis.run.names), *analysis.signals}
    shown = [row for row in CATALOGUE.values() if row.name in names]
    shown += [look_up(name) for name in analysis.signals if name not in CATALOGUE]
    panels: dict[str, list[Signal]] = {}
    for row in shown:
        if row.name in analysis.run.names and _says_something(row, analysis.run):
            panels.setdefault(row.group if row.linear and row.group != DETAIL else row.name, []).append(row)
    return list(panels.values())


def _says_something(row: Signal, run: Run) -> bool:
    """Whether there is a value, or a bound; of a count that is one of several, whether it ever changes."""
    values = run.series(row.name).values
    if _measured_bounds(row, run) is not None:
        return True
    return bool(np.isfinite(values).any() and not (is_one_of_several_counts(row.name) and np.ptp(values) == 0))


def _colour(row: Signal) -> str:
    """One for each unit, so that what may be compared looks alike."""
    units = list(dict.fromkeys(row.unit for row in CATALOGUE.values() if row.unit and row.group != DETAIL))
    return COLOURS[units.index(row.unit)] if row.unit in units[: len(COLOURS)] else INK


def _log_spaced(steps: NDArray[np.int64]) -> bool:
    """Whether the measurements crowd at the beginning, so that a linear axis would hide them."""
    if len(steps) < 4 or steps[-1] <= 0:
        return False
    return float(np.mean(steps <= steps[0] + 0.1 * (steps[-1] - steps[0]))) > 1 / 3


def scale_steps(axis: Axes, steps: NDArray[np.int64]) -> None:
    """Give an axis of steps its limits, ticks and scale: logarithmic where measurements crowd at the beginning."""
    first, last = float(steps[0]), float(steps[-1])
    if _log_spaced(steps):
        positive = float(steps[steps > 0][0])
        if first > 0:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
        else:
            axis.set_xscale("symlog", linthresh=positive, linscale=0.3)
            axis.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=positive))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if first == last:
        axis.set_xlim(first - 1, last + 1)
        return
    low, high = axis.transData.transform([(first, 0.0), (last, 0.0)])[:, 0]
    margin = 0.012 * (high - low)
    inverse = axis.transData.inverted()
    edges = inverse.transform([(low - margin, 0.0), (high + margin, 0.0)])[:, 0]
    axis.set_xlim(float(edges[0]), float(edges[1]))


def _draw_stages(axis: Axes, transitions: Sequence[Transition]) -> None:
    low, high = axis.get_xlim()
    bounds = [low, *(t.step for t in transitions), high]
    for k in range(len(bounds) - 1):
        axis.axvspan(bounds[k], bounds[k + 1], color=STAGE_TINTS[k % 2], linewidth=0, zorder=0)
    for transition in transitions:
        axis.axvspan(*transition.interval, color=ORANGE, alpha=0.28, linewidth=0, zorder=0.5)
        axis.axvline(transition.step, color=VERMILION, linewidth=1.0, zorder=0.6)


def _draw_events(axis: Axes, events: Sequence[Event], named: bool) -> None:
    """Dotted lines, and their kinds upright beside them unless there are too many to read."""
    low, high = axis.get_xlim()
    for event in events:
        if low <= event.step <= high:
            axis.axvline(event.step, color=FAINT, linewidth=1.0, linestyle=":", zorder=0.7)
            if named and len(events) <= MOST_NAMED:
                axis.text(
                    event.step,
                    0.97,
                    f"{event.kind} ",
                    transform=axis.get_xaxis_transform(),
                    rotation=90,
                    ha="right",
                    va="top",
                    fontsize=6.5,
                    color=FAINT,
                )


@dataclass(frozen=True)
class _Points:
    """The known values of a signal, with what stands beside each.

    Attributes:
        steps: Shape ``(k,)``.
        values: Shape ``(k,)``.
        low: Lower end of the band, shape ``(k,)``.
        high: Upper end of it.
        trusted: Whether each is.
        missing: Steps at which it was looked at and is not known.
        bounds: Steps, lower and upper bound, where these are measured.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    trusted: NDArray[np.bool_]
    missing: NDArray[np.int64]
    bounds: tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]] | None

    @classmethod
    def of(cls, row: Signal, run: Run) -> _Points:
        series = run.series(row.name)
        kept = np.isfinite(series.values)
        values = series.values[kept]
        spread = NORMAL_95 * np.nan_to_num(series.standard_errors[kept])
        return cls(
            series.steps[kept],
            values,
            values - spread,
            values + spread,
            series.reliable[kept],
            series.steps[~kept],
            _measured_bounds(row, run),
        )

    def limits(self, logarithmic: bool) -> tuple[float, float]:
        """What the axis is to show of it."""
        if self.bounds is None:
            return _value_limits(self.values, self.low, self.high, self.trusted, logarithmic)
        shown = np.concatenate([self.values, *self.bounds[1:]])
        return _value_limits(shown, shown, shown, np.ones(len(shown), dtype=bool), logarithmic)


def _draw_panel(axis: Axes, rows: Sequence[Signal], run: Run) -> None:
    points = [_Points.of(row, run) for row in rows]
    colours = [_colour(rows[0]), *OTHER_COLOURS][: len(rows)]
    first = rows[0]
    logarithmic = bool(
        not (first.linear or first.count)
        and points[0].values.min() > 0
        and points[0].values.max() / points[0].values.min() > WIDE
    )
    if logarithmic:
        axis.set_yscale("log")
    limits = [of_one.limits(logarithmic) for of_one in points]
    axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    for of_one, colour in zip(points, colours, strict=True):
        _draw_series(axis, of_one, colour)
    title = axis.set_title(_title(rows, points), loc="left", fontsize=8.5, color=colours[0], pad=3, parse_math=False)
    title.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 1})
    if len(rows) > 1:
        _name_lines(axis, rows, colours, run)
    _dress(axis, first.count, logarithmic)


def _title(rows: Sequence[Signal], points: Sequence[_Points]) -> str:
    """What is drawn, what its shade is, and how much of it is not to be trusted."""
    title = rows[0].title if len(rows) == 1 else rows[0].group
    if points[0].bounds is not None:
        title += ", between its bounds"
        if not len(points[0].values):
            title += "; not resolved at any step"
    elif any((of_one.high > of_one.low).any() for of_one in points):
        title += ", 95 % band"
    missing = sum(len(of_one.missing) for of_one in points)
    if missing and points[0].bounds is None:
        title += f", none at {missing} of {missing + sum(len(of_one.values) for of_one in points)} points"
    count = sum(len(of_one.values) for of_one in points)
    doubtful = sum(int((~of_one.trusted).sum()) for of_one in points)
    return f"{title}; {doubtful} of {count} points unreliable (hollow)" if doubtful else title


def _name_lines(axis: Axes, rows: Sequence[Signal], colours: Sequence[str], run: Run) -> None:
    """Above the right end of a panel of several signals, each in its colour, with its resolution if that is known."""
    names = []
    for row in rows:
        measured = run.series(f"{row.name}_resolution").values if f"{row.name}_resolution" in run.names else np.empty(0)
        known = measured[np.isfinite(measured)]
        resolution = f" (ε = {np.median(known):.2g})" if len(known) else ""
        names.append(f"{row.title.rpartition(', ')[2]}{resolution}")
    lines = [Line2D([], [], color=colour, linewidth=1.2) for colour in colours]
    legend = axis.legend(
        lines,
        names,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(rows),
        fontsize=8,
        facecolor="white",
        edgecolor="none",
        framealpha=1.0,
        borderpad=0.1,
        borderaxespad=0.1,
        handlelength=1.2,
        columnspacing=1.2,
        labelcolor=list(colours),
    )
    legend.set_zorder(5)


def _draw_series(axis: Axes, points: _Points, colour: str) -> None:
    steps, values, trusted = points.steps, points.values, points.trusted
    floor, ceiling = axis.get_ylim()
    # A line that led across what is not known would be made up.
    places = np.concatenate([steps[trusted], points.missing])
    order = np.argsort(places)
    places = places[order]
    line, low, high = (
        np.concatenate([known[trusted], np.full(len(points.missing), np.nan)])[order]
        for known in (values, points.low, points.high)
    )
    shade: Any = (places, low, high) if points.bounds is None else points.bounds
    axis.fill_between(*shade, color=colour, alpha=0.18, linewidth=0, zorder=1)
    axis.plot(places, line, color=colour, linewidth=1.2, zorder=2, solid_joinstyle="round")
    if len(values) <= MANY_POINTS:
        axis.plot(steps[trusted], values[trusted], "o", color=colour, markersize=2.4, zorder=3)
    doubtful: dict[str, Any] = dict(markerfacecolor="white", markeredgecolor=colour, linestyle="none", zorder=4)
    axis.plot(steps[~trusted], values[~trusted], "o", markersize=3.6, markeredgewidth=0.9, **doubtful)
    for marker, beyond, edge in (("^", values > ceiling, ceiling), ("v", values < floor, floor)):
        axis.plot(steps[beyond], np.full(beyond.sum(), edge), marker, markersize=4.5, clip_on=False, **doubtful)


def _measured_bounds(
    row: Signal, run: Run
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Steps, lower and upper bound, where these are measured: also where the value itself is not known."""
    if row.bounds is None or not set(row.bounds) <= set(run.names):
        return None
    lower, upper = (run.series(bound) for bound in row.bounds)
    steps, at_lower, at_upper = np.intersect1d(lower.steps, upper.steps, return_indices=True)
    low, high = lower.values[at_lower], upper.values[at_upper]
    kept = np.isfinite(low) & np.isfinite(high)
    return (steps[kept], low[kept], high[kept]) if kept.any() else None


def _value_limits(
    values: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    trusted: NDArray[np.bool_],
    logarithmic: bool,
) -> tuple[float, float]:
    """Limits set by the trusted points, stretched for others and for bands by half at most; room on top.

    Where hardly any point is trusted, all of them set the limits.
    """
    if logarithmic:
        floor, ceiling = _value_limits(np.log(values), np.log(values), np.log(values), trusted, False)
        return float(np.exp(floor)), float(np.exp(ceiling))
    judged = values[trusted] if trusted.mean() >= 0.25 and trusted.sum() >= 2 else values
    floor, ceiling = float(judged.min()), float(judged.max())
    reach = 0.5 * (ceiling - floor)
    if reach > 0:
        floor = max(floor - reach, float(min(values.min(), low.min())))
        ceiling = min(ceiling + reach, float(max(values.max(), high.max())))
    margin = 0.08 * (ceiling - floor) or 0.1 * abs(ceiling) or 1.0
    return floor - margin, ceiling + margin


def _dress(axis: Axes, integer: bool, logarithmic: bool) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#C9CED6")
    axis.tick_params(labelsize=8, length=2.5, color="#C9CED6", labelcolor=INK, width=0.8)
    axis.set_facecolor("none")
    if logarithmic:
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=5))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=integer, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
    axis.grid(axis="y", color="white", linewidth=0.8, zorder=0.7)


def _fractions(places: Sequence[float], steps: NDArray[np.int64]) -> list[float]:
    """Where steps lie along the axis, as shares of its width."""
    axis = Figure().add_axes((0, 0, 1, 1))
    scale_steps(axis, steps)
    pixels = axis.transData.transform([(place, 0.0) for place in places])[:, 0]
    return [float(x) for x in axis.transAxes.inverted().transform([(x, 0.0) for x in pixels])[:, 0]]


def _label_rows(transitions: Sequence[Transition], steps: NDArray[np.int64]) -> list[int]:
    """For each label the row it stands in, 0 being the lowest, so that none overlaps another."""
    if not transitions:
        return []
    ends: list[float] = []
    rows = []
    for centre, transition in zip(_label_centres(transitions, steps), transitions, strict=True):
        half = 0.5 * CHARACTER * (len(transition.label) + 2)
        row = next((row for row, end in enumerate(ends) if centre - half >= end), len(ends))
        ends[row:] = [centre + half, *ends[row + 1 :]]
        rows.append(row)
    return rows


def _label_centres(transitions: Sequence[Transition], steps: NDArray[np.int64]) -> list[float]:
    """Centres of the labels in inches from the left of the axis, none sticking out of it."""
    width = WIDTH - LEFT - RIGHT
    centres = []
    for fraction, transition in zip(_fractions([t.step for t in transitions], steps), transitions, strict=True):
        half = min(0.5 * CHARACTER * len(transition.label), 0.5 * width)
        centres.append(min(max(fraction * width, half), width - half))
    return centres


def _draw_labels(
    axis: Axes, transitions: Sequence[Transition], rows: Sequence[int], tall: float, steps: NDArray[np.int64]
) -> None:
    axis.set_axis_off()
    axis.set_zorder(-1)
    axis.set_ylim(0, tall)
    width = WIDTH - LEFT - RIGHT
    for transition, row, centre in zip(transitions, rows, _label_centres(transitions, steps), strict=True):
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
