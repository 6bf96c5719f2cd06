"""Stages, transitions and events behind what is drawn over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from phasewatch.figures.style import FAINT, MOST_NAMED, ORANGE, STAGE_TINTS, VERMILION
from phasewatch.record import Transition
from phasewatch.transitions.events import Event

NAME_WIDTH = 0.012
"""Of the axis: what a name that stands upright takes beside its line. Chosen."""


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
    """Dotted lines, and their kinds upright beside them unless there are too many to read.

    Of several that are too near each other for that, the kinds stand side by side.
    """
    low, high = axis.get_xlim()
    shown = [event for event in events if low <= event.step <= high]
    for event in shown:
        axis.axvline(event.step, color=FAINT, linewidth=1.0, linestyle=":", zorder=0.7)
    if not named or len(events) > MOST_NAMED:
        return
    together: list[list[Event]] = []
    for event in shown:
        if together and np.ptp(fractions(axis, [together[-1][0].step, event.step])) < NAME_WIDTH:
            together[-1].append(event)
        else:
            together.append([event])
    for near in together:
        axis.text(
            near[0].step,
            0.97,
            "\n".join(f"{kind} " for kind in dict.fromkeys(event.kind for event in near)),
            transform=axis.get_xaxis_transform(),
            rotation=90,
            ha="right",
            va="top",
            fontsize=6.5,
            color=FAINT,
        )


def fractions(axis: Axes, places: Sequence[float]) -> list[float]:
    """Where steps lie along an axis, as shares of its width."""
    pixels = axis.transData.transform([(place, 0.0) for place in places])[:, 0]
    return [float(x) for x in axis.transAxes.inverted().transform([(x, 0.0) for x in pixels])[:, 0]]
