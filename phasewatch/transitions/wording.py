"""From estimates on the searched scale to a transition in own units, with its kind."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq

from phasewatch.record.signals import LLC, LOSS
from phasewatch.record.transition import Change, Transition
from phasewatch.transitions.companions import changes_beside, changes_measured
from phasewatch.transitions.kinds import COEFFICIENTS, SIGNIFICANT, name_kind
from phasewatch.transitions.levels import points_after, points_before
from phasewatch.transitions.series import Scaled

LEAST_P_VALUE = float(np.finfo(float).tiny)


def describe(
    scaled: Scaled,
    *,
    extent: tuple[float, float],
    step: float,
    interval: tuple[float, float],
    before: np.ndarray,
    change: np.ndarray,
    error: np.ndarray,
    z: np.ndarray,
    quantile: np.ndarray,
    seen: np.ndarray,
    sides: tuple[tuple[int, int], tuple[int, int]],
    p_value: float,
    under_way: bool = False,
    known: Transition | None = None,
) -> Transition:
    """Put a transition into words and own units.

    Args:
        scaled: the signals.
        extent: first and last step.
        step: the location.
        interval: its 95 % interval.
        before: level before as fitted, per signal, on the searched scale.
        change: change of it.
        error: standard error of the change; infinite where one side was not measured.
        z: the change in standard errors, beyond the drift that the stages share; 0 where the error is infinite.
        quantile: half of the 95 % interval in standard errors.
        seen: whether the change is beyond the noise.
        sides: [first, last + 1) of the stages before and after, as indices of measurements; the levels that are told
            lie among the points there that are nearest to the transition.
        p_value: of the transition.
        under_way: whether its end is still to come.
        known: the same transition as it is known from what was observed at every step: it says where it is, and what
            those signals did.
    """
    changes: dict[str, Change] = {} if known is None else dict(known.changes)
    changed = {name: known is not None and name in known.seen_by for name in changes}
    speaking = dict(changes)
    if known is not None:
        extent, step, interval, p_value = (known.start, known.end), known.step, known.interval, known.p_value
        z = np.append(z, known.score)
    beside = changes_beside(scaled, sides)
    for k, signal in enumerate(scaled.signals):
        left, right = points_before(scaled, k, sides[0]), points_after(scaled, k, sides[1])
        if not np.isfinite(error[k]) or left is None or right is None:
            continue
        span = float(scaled.span[k])
        scaled_error, significance = span * float(error[k]), float(z[k])
        fitted = scaled.middle[k] + span * np.array([before[k], before[k] + change[k]])
        (low, low_slope), (high, high_slope) = (signal.own_units(float(level)) for level in fitted)
        told_low, told_high = left.nearest(low), right.nearest(high)
        rise = told_high - told_low
        if rise * significance < 0:
            # What the points do the other way is the error of what was fitted.
            scaled_rise = signal.searched_scale(told_high) - signal.searched_scale(told_low)
            significance = scaled_rise / (scaled_error + abs(scaled_rise - significance * scaled_error))
        # Both sides share the error where the scale is linear; where it is not, the larger slope is the safe one. What
        # the levels were moved by, to lie among the points, is doubtful as well.
        own_error = scaled_error * max(low_slope, high_slope) + abs(rise - (high - low))
        reach = float(quantile[k]) * own_error
        changes[signal.name] = told = Change(
            before=told_low,
            after=told_high,
            change=rise,
            standard_error=own_error,
            interval=(rise - reach, rise + reach),
            z=significance,
            reliable=left.reliable and right.reliable,
        )
        changed[signal.name] = bool(seen[k])
        measured = changes_measured(scaled, k, sides, extent)
        if signal.name == LOSS and measured is not None:
            beside[LOSS] = measured
        if not seen[k] and signal.name in COEFFICIENTS:
            if measured is not None and abs(measured.z) >= SIGNIFICANT:
                changes[signal.name] = speaking[signal.name] = measured
                changed[signal.name] = True
                continue
        # What no reliable point on one of the sides speaks for, and what does not go the way its points do, is
        # reported, but names no kind.
        if told.reliable and (not seen[k] or rise * (right.median - left.median) > 0):
            speaking[signal.name] = told
    seen_by = tuple(name for name in changes if changed[name])
    kind = name_kind(speaking, changed, beside)
    return Transition(
        start=extent[0],
        end=extent[1],
        step=step,
        interval=interval,
        kind=kind.name,
        resolutions=kind.resolutions,
        changes=changes,
        score=float(np.sqrt((z**2).sum())),
        # Smaller chances than floating point can hold are none that is zero.
        p_value=max(p_value, LEAST_P_VALUE),
        seen_by=seen_by,
        consensus=len(seen_by) / max(len(changes), 1),
        under_way=under_way,
    )


def free_energy_change(transition: Transition, n: int | None) -> tuple[float | None, float | None]:
    """Return the change of ``n L + llc log n`` at ``n``, and the n at which both sides would be equal.

    Neither is known where the change of the loss or of the llc is not, or is one of unreliable points.
    """
    if not all(name in transition.changes and transition.changes[name].reliable for name in (LOSS, LLC)):
        return None, None
    loss, llc = transition.changes[LOSS].change, transition.changes[LLC].change
    at_n = None if n is None or n < 2 else n * loss + llc * math.log(n)
    if loss == 0 or -llc / loss <= math.e:
        # n / log n is at least e.
        return at_n, None
    ratio = -llc / loss
    largest = math.e
    while largest / math.log(largest) < ratio and largest < 1e30:
        largest *= 10.0
    if largest >= 1e30:
        return at_n, None
    return at_n, float(brentq(lambda n: n / math.log(n) - ratio, math.e, largest))
