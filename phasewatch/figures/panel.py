"""One or several signals of a run over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from phasewatch.figures.style import COLOURS, INK, MANY_POINTS, OTHER_COLOURS, WIDE
from phasewatch.record import Run, Series, Signal
from phasewatch.record.signals import CATALOGUE, DETAIL, LOSS, NORMAL_95, TRAINING_LOSS

STRETCHES = 400
"""Averages that are drawn of what was observed at every step. Chosen."""
AVERAGED = ", averages over stretches of steps"


def recorded(name: str, run: Run) -> Series:
    """A signal as it was measured, or averages of what was observed at every step under this name.

    Raises:
        KeyError: If neither is there.
    """
    observed = _observed(name)
    if name in run.names or observed not in run.observed:
        return run.series(name)
    steps, values = run.observed[observed]
    known = np.flatnonzero(np.isfinite(values))
    stretches = np.array_split(known, min(STRETCHES, len(known))) if len(known) else []
    averages = np.array([values[stretch].mean() for stretch in stretches])
    middles = np.array([steps[stretch[len(stretch) // 2]] for stretch in stretches], dtype=np.int64)
    unknown = np.full(len(averages), np.nan)
    return Series(name, middles, averages, unknown, np.ones(len(averages), dtype=np.bool_))


def _observed(name: str) -> str:
    """What a signal that was not measured was observed under."""
    return LOSS if name == TRAINING_LOSS else name


def _colour(row: Signal) -> str:
    """One for each unit, so that what may be compared looks alike."""
    units = list(dict.fromkeys(row.unit for row in CATALOGUE.values() if row.unit and row.group != DETAIL))
    return COLOURS[units.index(row.unit)] if row.unit in units[: len(COLOURS)] else INK


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
        series = recorded(row.name, run)
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
            measured_bounds(row, run),
        )

    def limits(self, logarithmic: bool) -> tuple[float, float]:
        """What the axis is to show of it."""
        if self.bounds is None:
            return _value_limits(self.values, self.low, self.high, self.trusted, logarithmic)
        shown = np.concatenate([self.values, *self.bounds[1:]])
        return _value_limits(shown, shown, shown, np.ones(len(shown), dtype=bool), logarithmic)


def draw_panel(axis: Axes, rows: Sequence[Signal], run: Run) -> None:
    """Draw signals of a run that share a scale.

    Points that are not to be trusted are hollow, with a dotted line to them; those beyond the axis stand as triangles
    at its edge. Of what was observed at every step, averages over stretches are drawn.

    Args:
        axis: Where to.
        rows: The signals.
        run: The run that they are of.
    """
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
    title = axis.set_title(
        _title(rows, points, run), loc="left", y=1.0, fontsize=8.5, color=colours[0], pad=3, parse_math=False
    )
    title.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 1})
    if len(rows) > 1:
        _name_lines(axis, rows, colours, run)
    _dress(axis, first.count, logarithmic)


def _title(rows: Sequence[Signal], points: Sequence[_Points], run: Run) -> str:
    """What is drawn, what its shade is, and how much of it is not to be trusted."""
    title = rows[0].title if len(rows) == 1 else rows[0].group
    if rows[0].name not in run.names:
        title += " at every step" if len(run.observed[_observed(rows[0].name)].steps) <= STRETCHES else AVERAGED
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
    # A line that led across what is not known would be made up, and one across what is not to be trusted would hide it.
    places = np.concatenate([steps, points.missing])
    order = np.argsort(places)
    places = places[order]
    known, low, high = (
        np.concatenate([own, np.full(len(points.missing), np.nan)])[order] for own in (values, points.low, points.high)
    )
    solid = np.concatenate([trusted, np.zeros(len(points.missing), dtype=np.bool_)])[order]
    line, low, high = (np.where(solid, own, np.nan) for own in (known, low, high))
    shade: Any = (places, low, high) if points.bounds is None else points.bounds
    axis.fill_between(*shade, color=colour, alpha=0.18, linewidth=0, zorder=1)
    axis.plot(places, line, color=colour, linewidth=1.2, zorder=2, solid_joinstyle="round")
    if not trusted.all():
        axis.plot(places, known, ":", color=colour, linewidth=0.8, alpha=0.6, zorder=1.5)
    if len(values) <= MANY_POINTS or trusted.mean() < 0.5:
        axis.plot(steps[trusted], values[trusted], "o", color=colour, markersize=2.4, zorder=3)
    doubtful: dict[str, Any] = dict(markerfacecolor="white", markeredgecolor=colour, linestyle="none", zorder=4)
    if not trusted.all():
        axis.plot(steps[~trusted], values[~trusted], "o", markersize=3.6, markeredgewidth=0.9, **doubtful)
    for marker, beyond, edge in (("^", values > ceiling, ceiling), ("v", values < floor, floor)):
        if beyond.any():
            axis.plot(steps[beyond], np.full(beyond.sum(), edge), marker, markersize=4.5, clip_on=False, **doubtful)


def measured_bounds(row: Signal, run: Run) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]] | None:
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
