"""Stages, transitions and events behind what is drawn over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from phasewatch.figures.style import FAINT, MOST_NAMED, ORANGE, STAGE_TINTS, VERMILION
from phasewatch.record import Transition
from phasewatch.transitions.events import Event


def draw_stages(axis: Axes, transitions: Sequence[Transition]) -> None:
    """Tinted stretches, with a line and the 95 % interval of its place for each transition between them."""
    low, high = axis.get_xlim()
    bounds = [low, *(t.step for t in transitions), high]
    for k in range(len(bounds) - 1):
        axis.axvspan(bounds[k], bounds[k + 1], color=STAGE_TINTS[k % 2], linewidth=0, zorder=0)
    for transition in transitions:
        axis.axvspan(*transition.interval, color=ORANGE, alpha=0.28, linewidth=0, zorder=0.5)
        axis.axvline(transition.step, color=VERMILION, linewidth=1.0, zorder=0.6)


def draw_events(axis: Axes, events: Sequence[Event], named: bool) -> None:
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
