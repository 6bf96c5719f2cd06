"""What the signals that are only read did across a transition, from their points beside it."""

from __future__ import annotations

import math

import numpy as np

from phasewatch.record.signals import NORMAL_95
from phasewatch.record.transition import Change
from phasewatch.transitions.kinds import RESOLUTIONS
from phasewatch.transitions.levels import NEAREST
from phasewatch.transitions.series import Column, Scaled

MEDIAN = math.sqrt(math.pi / 2)
"""Standard error of a median in that of a mean, for points that scatter normally."""


def changes_beside(scaled: Scaled, sides: tuple[tuple[int, int], tuple[int, int]]) -> dict[str, Change]:
    """What each of them did; those are left out that have no point to be trusted in one of the stages.

    What tells how a learning coefficient depends on the prior is not to be trusted where that one is not.

    Args:
        scaled: the signals.
        sides: [first, last + 1) of the stages before and after, as indices of measurements.
    """
    trusted = {signal.name: scaled.trusted[:, k] for k, signal in enumerate(scaled.signals)}
    owner = {name: r.coefficient for r in RESOLUTIONS for name in (r.spread_slope, r.heat_capacity)}
    found = {}
    for name, column in scaled.beside.items():
        kept = column.trusted & np.isfinite(column.values) & trusted.get(owner.get(name, ""), True)
        before, after = (
            _level(column, np.arange(*stage)[kept[slice(*stage)]][nearest])
            for stage, nearest in zip(sides, (slice(-NEAREST, None), slice(NEAREST)), strict=True)
        )
        if before is not None and after is not None:
            found[name] = _change(before, after)
    return found


def changes_measured(
    scaled: Scaled, which: int, sides: tuple[tuple[int, int], tuple[int, int]], extent: tuple[float, float]
) -> Change | None:
    """What a signal did from the last trusted measurement before a transition to the first after it.

    Where stages are short, lines through them say little of where they end, though each point is known with its error.

    Args:
        scaled: the signals.
        which: column of the signal, one that is searched in its own units.
        sides: [first, last + 1) of the stages before and after, as indices of measurements.
        extent: first and last step of the transition: what lies between belongs to neither stage.
    """
    outside = (scaled.steps <= extent[0], scaled.steps >= extent[1])
    signal = scaled.signals[which]
    ends = []
    for stage, beyond, nearest in zip(sides, outside, (-1, 0), strict=True):
        trusted = np.arange(*stage)[(scaled.trusted[:, which] & beyond)[slice(*stage)]]
        if not len(trusted):
            return None
        ends.append((float(signal.values[trusted[nearest]]), float(signal.sigma[trusted[nearest]])))
    return _change(*ends)


def _level(column: Column, points: np.ndarray) -> tuple[float, float] | None:
    """The median of some points and its standard error, the larger of what they state and of what they scatter."""
    if not len(points):
        return None
    values = column.values[points]
    errors = np.full(len(points), np.nan) if column.errors is None else column.errors[points]
    stated = float(np.sqrt(np.mean(errors[np.isfinite(errors)] ** 2))) if np.isfinite(errors).any() else 0.0
    scatter = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    factor = MEDIAN if len(values) > 2 else 1.0
    return float(np.median(values)), factor * max(stated, scatter) / math.sqrt(len(values))


def _change(before: tuple[float, float], after: tuple[float, float]) -> Change:
    rise, error = after[0] - before[0], math.hypot(before[1], after[1])
    reach = NORMAL_95 * error
    z = rise / error if error > 0 else math.copysign(math.inf, rise) if rise else 0.0
    return Change(before[0], after[0], rise, error, (rise - reach, rise + reach), z)
