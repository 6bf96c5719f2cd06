"""From estimates on the searched scale to a transition in own units, with its kind."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq

from phasewatch.record.signals import LLC, LOSS
from phasewatch.record.transition import Change, Transition
from phasewatch.transitions.kinds import name_kind
from phasewatch.transitions.series import Scaled


def describe(
    scaled: Scaled,
    *,
    extent: tuple[float, float],
    step: float,
    interval: tuple[float, float],
    before: np.ndarray,
    change: np.ndarray,
    error: np.ndarray,
    quantile: np.ndarray,
    seen: np.ndarray,
    sides: tuple[tuple[int, int], tuple[int, int]],
    p_value: float,
    under_way: bool = False,
) -> Transition:
    """Put a transition into words and own units.

    Args:
        scaled: the signals.
        extent: first and last step.
        step: the location.
        interval: its 95 % interval.
        before: level before, per signal, on the searched scale.
        change: change of it.
        error: standard error of the change; infinite where one side was not measured.
        quantile: half of the 95 % interval in standard errors.
        seen: whether the change is beyond the noise.
        sides: [first, last + 1) of the stages before and after, as indices of measurements.
        p_value: of the transition.
        under_way: whether its end is still to come.
    """
    z = np.where(np.isfinite(error), change / np.where(np.isfinite(error), error, 1.0), 0.0)
    # What no reliable point on one of the sides speaks for is reported, but names no kind.
    known = np.all([scaled.trusted[slice(*side)].any(axis=0) for side in sides], axis=0)
    changes, changed = {}, {}
    for k, signal in enumerate(scaled.signals):
        if not np.isfinite(error[k]):
            continue
        levels = scaled.middle[k] + scaled.span[k] * np.array([before[k], before[k] + change[k]])
        low, low_slope = signal.own_units(float(levels[0]))
        high, high_slope = signal.own_units(float(levels[1]))
        # Both sides share the error where the scale is linear; where it is not, the larger slope is the safe one.
        own_error = float(scaled.span[k] * error[k] * max(low_slope, high_slope))
        reach = float(quantile[k]) * own_error
        changes[signal.name] = Change(
            before=low,
            after=high,
            change=high - low,
            standard_error=own_error,
            interval=(high - low - reach, high - low + reach),
            z=float(z[k]),
        )
        changed[signal.name] = bool(seen[k])
    sure = {s.name: changes[s.name] for k, s in enumerate(scaled.signals) if known[k] and s.name in changes}
    seen_by = tuple(name for name in changes if changed[name])
    return Transition(
        start=extent[0],
        end=extent[1],
        step=step,
        interval=interval,
        kind=name_kind(sure, changed),
        changes=changes,
        score=float(np.sqrt((z**2).sum())),
        p_value=p_value,
        seen_by=seen_by,
        consensus=len(seen_by) / max(len(changes), 1),
        under_way=under_way,
    )


def free_energy_change(transition: Transition, n: int | None) -> tuple[float | None, float | None]:
    """Return the change of ``n L + llc log n`` at ``n``, and the n at which both sides would be equal."""
    if LOSS not in transition.changes or LLC not in transition.changes:
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
