"""What all figures have in common: colours, sizes, and the axis of training steps."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator
from numpy.typing import NDArray

# Okabe & Ito's palette, told apart by colour-blind readers.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#007A5A", "#8A4A8B", "#56B4E9", "#E69F00"
INK, FAINT = "#2B2B2B", "#8C8C8C"
# Of the units in the order of the catalogue.
COLOURS = (BLUE, INK, GREEN, PURPLE)
# Of the second signal in a panel.
OTHER_COLOURS = (SKY, PURPLE, GREEN)
STAGE_TINTS = ("#F3F5F8", "#E5EAF1")

# Inches. Chosen by eye.
WIDTH = 9.0
PANEL_HEIGHT = 1.26
TITLE_HEIGHT = 0.21
LABEL_HEIGHT = 0.17
BOTTOM, TOP, LEFT, RIGHT = 0.46, 0.12, 0.72, 0.32
CHARACTER = 0.068
# From here on the points of a series are drawn as a line only. Chosen.
MANY_POINTS = 150
# More events than that are lines without a name. Chosen.
MOST_NAMED = 12
# A positive signal that decays by this factor is drawn on a logarithmic axis. Chosen.
WIDE = 10.0


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
