"""Loss spikes: the loss leaves where it was within some steps, stays away for more than one or two, and comes back.

Adaptive optimizers near the edge of stability make them (Cohen et al. 2022, "Adaptive gradient methods at the edge of
stability", arXiv 2207.14484). They are no stages of a run: it goes on where it was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d, median_filter, percentile_filter

from phasewatch.transitions.series import NORMAL_MAD

AROUND = 100
"""Observations before a spike that it is held against. Chosen."""
SMOOTHED_OVER = 11
"""The median of so many observations is looked at: half of them must be up there. Chosen."""
OUTLYING, LEAST = 10.0, 0.02
"""A spike rises by more than so many standard deviations of the losses before it, and by more than this share of what
the loss spans in all of the run: where nearly all is fitted, losses scatter over orders of magnitude. Chosen."""
BACK, LONGEST = 0.02, 20
"""The loss is back where it is no longer outlying or, if that is not within so many times ``AROUND``, once it has lost
all but this share of its rise. Chosen; Adam's spikes on a convnet that had fitted its data took 2 to 10 of these.
"""
STAYS = 25
"""Observations for which it must be back, or it has not been. Chosen."""
TIED = 0.1
"""Where more than this share of the losses repeat the one before, as counts of errors do and hinge losses that are
mostly zero, half of them may lie on their median: the median deviation does not tell how they scatter. Chosen."""
NORMAL_TENTH = 1.645
"""Standard deviations that a tenth of normal losses lie beyond; of those that are mostly equal, a tenth tell."""

Array = NDArray[np.float64]


class Spike(NamedTuple):
    """Where the loss is away.

    Attributes:
        begins: Its first step.
        ends: The first step at which the loss is back.
        before: The loss before it, as the median of some.
        top: The highest it has, likewise.
    """

    begins: float
    ends: float
    before: float
    top: float


def loss_spikes(steps: Array, losses: Array) -> list[Spike]:
    """The spikes of a loss that was observed at every step, or at many; in order, none within another.

    Args:
        steps: Increasing, shape ``(k,)``.
        losses: Shape ``(k,)``; those that are no numbers are left out.
    """
    known = np.isfinite(losses)
    steps, losses = np.asarray(steps, dtype=float)[known], np.asarray(losses, dtype=float)[known]
    if len(losses) < 3 * AROUND:
        return []
    half = SMOOTHED_OVER // 2
    smooth = median_filter(losses, size=SMOOTHED_OVER, mode="nearest")
    soon = maximum_filter1d(smooth, STAYS, origin=-(STAYS // 2))
    before = _over_those_before(losses, half)
    scatter = NORMAL_MAD * _over_those_before(np.abs(losses - before), half)
    if np.mean(losses[1:] == losses[:-1]) > TIED:
        scatter = np.maximum(scatter, _over_those_before(np.abs(losses - before), half, 90) / NORMAL_TENTH)
    least = np.maximum(OUTLYING * scatter, LEAST * (smooth.max() - smooth.min()))
    found: list[Spike] = []
    after = AROUND
    for first in np.flatnonzero(smooth > before + least).tolist():
        if first < after:
            continue
        level = float(before[first])
        usual = level + OUTLYING * float(scatter[first])
        away = soon[first : first + LONGEST * AROUND]
        top = np.maximum.accumulate(smooth[first : first + LONGEST * AROUND])
        nearly = np.flatnonzero(away <= np.maximum(level + BACK * (top - level), usual))
        if not len(nearly):
            after = first + AROUND + half  # a new level, which those before are again by then
            continue
        back = first + int(next(iter(np.flatnonzero(away <= usual)), nearly[0]))
        begins = first
        while begins > max(first - half, after) and losses[begins - 1] > usual:
            begins -= 1
        after = back + STAYS
        if np.median(losses[back:after]) < level - least[first]:
            continue  # a fall, after a time on a higher level
        found.append(Spike(float(steps[begins]), float(steps[back]), level, float(top[back - first])))
    return found


def _over_those_before(values: Array, gap: int, percentile: int = 50) -> Array:
    """Percentiles of the last ``AROUND`` values that lie more than ``gap`` before each, or of the first ones."""
    taken: Array = percentile_filter(values, percentile, size=AROUND, mode="nearest")
    shift = AROUND // 2 + gap
    return np.concatenate([np.full(shift, taken[AROUND // 2]), taken[:-shift]])
