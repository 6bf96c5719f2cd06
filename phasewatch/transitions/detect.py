"""Transitions of a run from its recorded series."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import chi2

from phasewatch.transitions.cost import CostWeightedLine
from phasewatch.transitions.kinds import name_kind
from phasewatch.transitions.location import locate_ramp
from phasewatch.transitions.search import OptimalPartition
from phasewatch.transitions.series import (
    Signal,
    checked_alpha,
    checked_signals,
    checked_steps,
    log_time,
    prepare,
)
from phasewatch.transitions.stages import FastStretch, Line, fast_stretches, fit_line
from phasewatch.transitions.transition import Change, Transition

MIN_POINTS = 8
MIN_STAGE = 3
# A transition is this many times faster than the stages beside it ...
RATE_RATIO = 1.3
# ... and moves a signal by at least this share of its range.
LEAST_CHANGE = 0.05
# The widening for autocorrelation settles within a few rounds of segmenting and measuring it.
ROUNDS = 3
NORMAL_95 = 1.959964


def detect_transitions(
    steps: ArrayLike,
    values: Mapping[str, ArrayLike],
    *,
    standard_errors: Mapping[str, ArrayLike] | None = None,
    reliable: Mapping[str, ArrayLike] | None = None,
    alpha: float = 0.05,
) -> list[Transition]:
    """Find the transitions of a run.

    The signals are cut into segments that are straight in log time, by an exact search for the least weighted sum of
    squares plus a penalty for each segment. The penalty follows from ``alpha``, the weights from the scatter of the
    points themselves, widened for autocorrelation. Most boundaries only follow the bends of a smooth curve; a
    transition is a stretch that is faster than the stages before and after it, with a change beyond the noise.

    Args:
        steps: increasing steps of the measurements, shape (n,).
        values: name to values of each signal, shape (n,); NaN where one was not measured. ``"loss"`` and ``"llc"``
            decide the kind.
        standard_errors: name to standard errors of the values. Only their course counts, not their scale.
        reliable: name to booleans; unreliable points carry a 25th of the weight of others.
        alpha: wanted rate of false alarms in a run without transitions.

    Returns:
        The transitions in order; none where there are fewer than 8 measurements or all signals are constant.

    Raises:
        ValueError: if steps are unsorted, repeated or not numeric, lengths differ, names are unknown, a value is
            infinite, a standard error negative, or alpha no probability.

    Example:
        >>> import numpy as np
        >>> steps = np.arange(0, 4000, 50)
        >>> loss = np.where(steps < 2000, 2.0, 1.0) + 0.02 * np.sin(17.0 * steps)
        >>> [transition] = detect_transitions(steps, {"loss": loss})
        >>> transition.start, transition.end, transition.kind
        (1950.0, 2000.0, 'loss falls')
    """
    steps = checked_steps(steps)
    given = checked_signals(steps, values, standard_errors, reliable)
    alpha = checked_alpha(alpha)
    measured = np.zeros(len(steps), dtype=bool)
    for array, _, _ in given.values():
        measured |= np.isfinite(array)
    if measured.sum() < MIN_POINTS:
        return []
    steps = steps[measured]
    time = log_time(steps)
    prepared = (
        prepare(name, time, array[measured], None if errors is None else errors[measured], trusted[measured])
        for name, (array, errors, trusted) in given.items()
    )
    signals = [signal for signal in prepared if signal is not None]
    if not signals:
        return []
    trusted = np.column_stack([given[signal.name][2][measured] for signal in signals])
    return _Detection(steps, time, signals, trusted, alpha).transitions()


class _Detection:
    """One detection: the signals as columns of arrays, and their segmentation."""

    def __init__(
        self, steps: np.ndarray, time: np.ndarray, signals: list[Signal], trusted: np.ndarray, alpha: float
    ) -> None:
        self.steps, self.time, self.signals, self.alpha = steps, time, signals, alpha
        # In units of its span about its middle, no signal is too large or too small to be squared.
        self.middle = np.array([np.nanmedian(signal.scaled) for signal in signals])
        self.span = np.array([signal.span for signal in signals])
        sigma = np.column_stack([signal.sigma for signal in signals]) / self.span
        self.present = np.isfinite(sigma)
        self.trusted = trusted & self.present
        scaled = np.column_stack([signal.scaled for signal in signals])
        self.y = np.where(self.present, (scaled - self.middle) / self.span, 0.0)
        n, count = self.y.shape
        self.penalty = float(chi2.isf(alpha / max(1, n - 2 * MIN_STAGE + 1), 2 * count))
        ceiling = np.full(count, 6.0 if n < 200 else 12.0)
        white = 1.0 / sigma**2
        self.weights = white / ceiling
        self.ends = self._segment()
        # Drift removed, the scatter tells how much of that widening was needed; it may only shrink.
        for _ in range(ROUNDS):
            ceiling = np.minimum(self._variance_inflation(white), ceiling)
            self.weights = white / ceiling
            self.ends = self._segment()

    def transitions(self) -> list[Transition]:
        found: list[Transition] = []
        for stretch in fast_stretches(self.steps, self.time, self.y, self.weights, self.ends, RATE_RATIO):
            transition = self._describe(stretch)
            if transition is None:
                continue
            if found and transition.start < found[-1].end:
                # Two that meet in one short stage are one; the stronger stands for both.
                transition = max(found.pop(), transition, key=lambda one: one.score)
            found.append(transition)
        return found

    def _segment(self) -> list[int]:
        search = OptimalPartition(CostWeightedLine(self.time, self.weights, MIN_STAGE))
        return search.fit_predict(self.y, self.penalty)

    def _variance_inflation(self, white: np.ndarray) -> np.ndarray:
        """Long-run variance of the residuals, ``s**2 (1 + rho) / (1 - rho)``, in units of the white noise's."""
        residual = np.zeros_like(self.y)
        bounds = [0, *self.ends]
        for a, b in zip(bounds, bounds[1:], strict=False):
            line = fit_line(self.time[a:b], self.y[a:b], self.weights[a:b])
            fitted = line.level + line.slope * (self.time[a:b, None] - line.centre)
            residual[a:b] = (self.y[a:b] - fitted) * np.sqrt(white[a:b])
        inflation = np.ones(self.y.shape[1])
        for column in range(self.y.shape[1]):
            r = residual[self.present[:, column], column]
            freedom = max(len(r) - 2 * len(self.ends), 2)
            variance = float(r @ r) / freedom
            if variance > 0:
                # Fitted lines take correlation away, about two points' worth each; half a standard error of the
                # correlation is not believed, since it would widen white noise half of the time.
                lag_one = float(r[1:] @ r[:-1] / (r @ r)) + 2.0 * len(self.ends) / len(r)
                rho = float(np.clip(lag_one - 0.5 / np.sqrt(len(r)), 0.0, 0.95))
                inflation[column] = max(1.0, variance * (1 + rho) / (1 - rho))
        return inflation

    def _describe(self, stretch: FastStretch) -> Transition | None:
        """Locate the stretch and measure what changed; None if the change is within the noise or negligible."""
        ramp = locate_ramp(self.time, self.y, self.weights, stretch.before, stretch.after)
        before = self._line(stretch.before[0], ramp.start + 1)
        after = self._line(ramp.end, stretch.after[1])
        low, low_variance = before.at(self.time[ramp.start])
        high, high_variance = after.at(self.time[ramp.end])
        width = self.time[ramp.end] - self.time[ramp.start]
        # The drift that both stages share would have gone on without a transition.
        same_way = before.slope * after.slope > 0
        drift = np.where(same_way, np.sign(before.slope) * np.minimum(np.abs(before.slope), np.abs(after.slope)), 0.0)
        excess = high - low - drift * width
        variance = low_variance + high_variance
        z = np.where(np.isfinite(variance), excess / np.sqrt(np.where(np.isfinite(variance), variance, 1.0)), 0.0)
        worthwhile = (np.abs(excess) >= LEAST_CHANGE) & (z != 0)
        strength = float((z[worthwhile] ** 2).sum())
        p_value = min(1.0, len(self.steps) * float(chi2.sf(strength, len(self.signals))))
        if p_value > self.alpha:
            return None
        # What no reliable point on one of the sides speaks for is reported, but names no kind.
        known = self.trusted[stretch.before[0] : ramp.start + 1].any(axis=0)
        known &= self.trusted[ramp.end : stretch.after[1]].any(axis=0)
        changes, changed = {}, {}
        for k, signal in enumerate(self.signals):
            if not np.isfinite(variance[k]):
                continue
            levels = self.middle[k] + self.span[k] * np.array([low[k], high[k]])
            errors = self.span[k] * np.sqrt([low_variance[k], high_variance[k]])
            changes[signal.name] = _in_own_units(signal, levels, errors, float(z[k]))
            changed[signal.name] = bool(worthwhile[k] and abs(z[k]) > 3.0)
        interval = (self._step_at(ramp.interval[0]), self._step_at(ramp.interval[1]))
        return Transition(
            start=float(self.steps[ramp.start]),
            end=float(self.steps[ramp.end]),
            step=self._step_at(ramp.location),
            interval=interval,
            kind=name_kind(
                {s.name: changes[s.name] for s, k in zip(self.signals, known, strict=True) if k and s.name in changes},
                changed,
            ),
            changes=changes,
            score=float(np.sqrt((z**2).sum())),
            p_value=p_value,
        )

    def _line(self, start: int, end: int) -> Line:
        return fit_line(self.time[start:end], self.y[start:end], self.weights[start:end])

    def _step_at(self, time: float) -> float:
        return float(np.interp(time, self.time, self.steps))


def _in_own_units(signal: Signal, levels: np.ndarray, errors: np.ndarray, z: float) -> Change:
    before, before_slope = signal.own_units(float(levels[0]))
    after, after_slope = signal.own_units(float(levels[1]))
    error = float(np.hypot(errors[0] * before_slope, errors[1] * after_slope))
    change = after - before
    return Change(
        before=before,
        after=after,
        change=change,
        standard_error=error,
        interval=(change - NORMAL_95 * error, change + NORMAL_95 * error),
        z=z,
    )
