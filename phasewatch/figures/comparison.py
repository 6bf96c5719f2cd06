"""Several runs one above the other, what is the same transition joined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phasewatch.analysis import Analysis
from phasewatch.figures.style import BOTTOM, FAINT, INK, ORANGE, RIGHT, STAGE_TINTS, TOP, VERMILION, WIDE, scale_steps
from phasewatch.transitions import AlignedTransition

# Inches. Chosen by eye.
WIDTH, LEFT = 9.0, 0.3
LANE_HEIGHT = 0.75
# Share of a lane's height that its curve takes; the rest holds the name of the run. Chosen.
CURVE = 0.66


def comparison_figure(
    names: Sequence[str], analyses: Sequence[Analysis], aligned: Sequence[AlignedTransition]
) -> Figure:
    """The runs one above the other; see :func:`draw_comparison`.

    Args:
        names: What the runs are called.
        analyses: Per run, what :func:`phasewatch.analyze_run` gave.
        aligned: Their transitions, aligned.
    """
    height = TOP + LANE_HEIGHT * len(analyses) + BOTTOM
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    box = (LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + RIGHT) / WIDTH, LANE_HEIGHT * len(analyses) / height)
    draw_comparison(figure.add_axes(box), names, analyses, aligned)
    return figure


def draw_comparison(
    axis: Axes, names: Sequence[str], analyses: Sequence[Analysis], aligned: Sequence[AlignedTransition]
) -> None:
    """Draw the runs one above the other, the first on top, and join what is the same transition.

    Each lane holds the first signal of its run, from its least to its largest value (logarithmic where it runs through
    more than a factor of ten); a transition is a line with its 95 % interval shaded. Steps are shared by all lanes.

    Args:
        axis: Where to.
        names: What the runs are called.
        analyses: Per run, what :func:`phasewatch.analyze_run` gave.
        aligned: Their transitions, aligned.
    """
    steps = np.unique([m.step for analysis in analyses for m in analysis.run.measurements])
    if len(steps):
        scale_steps(axis, steps)
    axis.set_ylim(len(analyses), 0.0)
    for lane, (name, analysis) in enumerate(zip(names, analyses, strict=True)):
        _draw_lane(axis, lane, name, analysis)
    for one in aligned:
        points = [(t.step, lane + 1 - 0.5 * CURVE) for lane, t in enumerate(one.transitions) if t is not None]
        axis.plot(*zip(*points, strict=True), "o-", color=VERMILION, markersize=3.5, linewidth=0.9, zorder=4)
    axis.set_xlabel("training step", fontsize=8.5, color=INK, labelpad=3)
    axis.tick_params(labelsize=8, colors=INK, left=False, labelleft=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _draw_lane(axis: Axes, lane: int, name: str, analysis: Analysis) -> None:
    foot, top = lane + 1.0, lane + 1.0 - CURVE
    low, high = axis.get_xlim()
    axis.fill_between([low, high], lane, foot, color=STAGE_TINTS[lane % 2], linewidth=0, zorder=0)
    for t in analysis.transitions:
        axis.fill_between(t.interval, foot, top, color=ORANGE, alpha=0.28, linewidth=0, zorder=1)
        axis.plot([t.step] * 2, [foot, top], color=VERMILION, linewidth=1.2, zorder=3)
    signal = next((name for name in analysis.signals if name in analysis.run.names), None)
    label = f"{name}: {signal or 'no signal'}" + ("" if analysis.note is None else f" ({analysis.note.split(':')[0]})")
    axis.annotate(
        label,
        (0.0, lane),
        xycoords=axis.get_yaxis_transform(),
        xytext=(4, -10),
        textcoords="offset points",
        fontsize=8.5,
        color=INK,
        parse_math=False,
    )
    if signal is None:
        return
    series = analysis.run.series(signal)
    kept = series.reliable & np.isfinite(series.values)
    values = series.values[kept]
    if len(values):
        if values.min() > 0 and values.max() / values.min() > WIDE:
            values = np.log(values)
        scaled = (values - values.min()) / (float(np.ptp(values)) or 1.0)
        axis.plot(series.steps[kept], foot - 0.06 - (CURVE - 0.12) * scaled, color=FAINT, linewidth=1.2, zorder=2)
