"""The levels that are told of a transition: what was fitted, as far as it lies among the points beside it.

A fitted stage is continued to the transition, in log time and on the scale that is searched. Where it was hardly
measured, bends or drifts, that may lead to where no point ever was: a negative count, or a rise between points that
fall. What is told is therefore held within the points of the stage nearest to the transition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phasewatch.transitions.series import Scaled

NEAREST = 8
"""Points of a stage, next to a transition, among which its level lies: with a chance of 1 in 128 noise puts all of as
many on one side of a level that it scatters about."""


@dataclass(frozen=True)
class Beside:
    """The points of one signal on one side of a transition, next to it.

    Attributes:
        least: the smallest value.
        greatest: the largest.
        median: the middle one.
        reliable: whether they may be trusted; False where the stage has none that may.
    """

    least: float
    greatest: float
    median: float
    reliable: bool

    def nearest(self, level: float) -> float:
        """The level, or the end of the points' range that is nearest to it."""
        return min(max(level, self.least), self.greatest)


def points_before(scaled: Scaled, which: int, stage: tuple[int, int]) -> Beside | None:
    """The last points of a signal in a stage, [first, last + 1); None where it was not measured there."""
    return _beside(scaled, which, stage, slice(-NEAREST, None))


def points_after(scaled: Scaled, which: int, stage: tuple[int, int]) -> Beside | None:
    """The first points of a signal in a stage, [first, last + 1); None where it was not measured there."""
    return _beside(scaled, which, stage, slice(NEAREST))


def _beside(scaled: Scaled, which: int, stage: tuple[int, int], nearest: slice) -> Beside | None:
    inside = slice(*stage)
    values = scaled.signals[which].values[inside]
    trusted = scaled.trusted[inside, which]
    chosen = values[trusted if trusted.any() else scaled.present[inside, which]][nearest]
    if not len(chosen):
        return None
    return Beside(float(chosen.min()), float(chosen.max()), float(np.median(chosen)), bool(trusted.any()))
