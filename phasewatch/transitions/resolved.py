"""Transitions of runs whose courses are resolved: the scatter of the points is small beside what the signals do.

There a transition is many measurements wide and as smooth as the stages beside it. What makes it one is its speed: it
is a stretch that is faster than the stage before and the stage after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ruptures.base import BaseEstimator
from scipy.stats import chi2

from phasewatch.record.signals import NORMAL_95
from phasewatch.record.transition import Transition, overlap
from phasewatch.transitions.candidates import bounds_of
from phasewatch.transitions.cost import CostWeightedLine
from phasewatch.transitions.location import Ramp, locate_ramp
from phasewatch.transitions.regression import innovations
from phasewatch.transitions.search import OptimalPartition
from phasewatch.transitions.series import Scaled
from phasewatch.transitions.stretches import fast_stretches, fit_line
from phasewatch.transitions.wording import describe

# Measurements of a stage at least. Chosen.
MIN_STAGE = 3
# A transition is faster than the stages beside it by this share at least ...
FASTER = 0.3
# ... and moves a signal by at least this share of its range. Both are chosen.
LEAST_CHANGE = 0.05
# A difference of the Bayes information criterion that is very strong evidence (Kass & Raftery 1995, section 3.2).
PLAINLY_BETTER = 10.0
# The widening for autocorrelation settles within a few rounds of segmenting and measuring it. Chosen.
ROUNDS = 3


def resolved_transitions(
    scaled: Scaled,
    alpha: float,
    goes_on: bool = False,
    search: BaseEstimator | None = None,
    known: Sequence[Transition] = (),
) -> list[Transition]:
    """Segment the signals into lines in log time and keep the stretches that are slow, fast and slow again.

    What overlaps one that is ``known``, from other observations, is that one: these say where it is.

    Where the run goes on, the last one may be under way: slow, then fast to the last measurement. A search of
    ``ruptures`` may say where segments may end.
    """
    stretches = _Stretches(scaled, alpha, None if search is None else bounds_of(search, scaled.searched_part), known)
    return stretches.transitions(goes_on)


class _Stretches:
    def __init__(
        self, scaled: Scaled, alpha: float, candidates: Sequence[int] | None, known: Sequence[Transition] = ()
    ) -> None:
        self.candidates, self.known = candidates, known
        self.scaled, self.alpha = scaled, alpha
        self.time, self.y = scaled.time, scaled.y
        self.searched = scaled.searched
        n, count = len(self.y), int(self.searched.sum())
        self.penalty = float(chi2.isf(alpha / max(1, n - 2 * MIN_STAGE + 1), 2 * count))
        white = scaled.weights
        # How correlated the noise is shows once the course is known, and the reverse. From much correlation one comes
        # to few segments, from none to many; both may explain themselves. Few stand unless many are plainly better.
        found = []
        every = np.ones(len(scaled.signals))
        for inflation, bound in (((6.0 if n < 200 else 12.0) * every, np.minimum), (every, np.maximum)):
            for _ in range(ROUNDS + 1):
                self.weights = white / inflation
                self.ends = self._segment()
                inflation = bound(self._variance_inflation(white), inflation)
            found.append((self._criterion(white), self.ends, self.weights))
        few, many = found
        _, self.ends, self.weights = many if many[0] < few[0] - PLAINLY_BETTER else few

    def transitions(self, goes_on: bool) -> list[Transition]:
        found: list[Transition] = []
        y, weights = self.y[:, self.searched], self.weights[:, self.searched]
        stretches = fast_stretches(self.scaled.steps, self.time, y, weights, self.ends, 1.0 + FASTER, goes_on)
        ramps = [None if s.after is None else locate_ramp(self.time, y, weights, s.before, s.after) for s in stretches]
        for stretch, ramp, neighbours in zip(stretches, ramps, _neighbours(ramps, len(self.time)), strict=True):
            if stretch.after is None or ramp is None:
                transition = self._describe_so_far(stretch.before)
            else:
                transition = self._describe(stretch.before, stretch.after, ramp, neighbours)
            if transition is None:
                continue
            if found and transition.start < found[-1].end:
                # Two that meet in one short stage are one; the stronger stands for both.
                transition = max(found.pop(), transition, key=lambda one: one.score)
            found.append(transition)
        return found

    def _segment(self) -> list[int]:
        cost = CostWeightedLine(self.time, self.weights[:, self.searched], MIN_STAGE)
        return OptimalPartition(cost, self.candidates).fit_predict(self.y[:, self.searched], self.penalty)

    def _residuals(self, white: np.ndarray) -> np.ndarray:
        """What the segments leave, in standard deviations of the white noise."""
        residual = np.zeros_like(self.y)
        bounds = [0, *self.ends]
        for a, b in zip(bounds, bounds[1:], strict=False):
            line = fit_line(self.time[a:b], self.y[a:b], self.weights[a:b])
            fitted = line.level + line.slope * (self.time[a:b, None] - line.centre)
            residual[a:b] = (self.y[a:b] - fitted) * np.sqrt(white[a:b])
        return residual

    def _criterion(self, white: np.ndarray) -> float:
        """Bayes information criterion of the segments with autoregressive noise; less noise than white is not asked."""
        residual = self._residuals(white)
        searched = np.flatnonzero(self.searched)
        total = (2 * len(searched) + 1) * len(self.ends) * math.log(len(self.y))
        for column in searched:
            r = residual[self.scaled.present[:, column], column]
            power = float(r @ r)
            rho = min(max(float(r[1:] @ r[:-1]) / power, 0.0), 0.95) if power > 0 else 0.0
            fresh = innovations(r, rho)
            total += len(r) * math.log(max(float(fresh @ fresh) / len(r), 1.0))
        return total

    def _variance_inflation(self, white: np.ndarray) -> np.ndarray:
        """Long-run variance of the residuals, ``s**2 (1 + rho) / (1 - rho)``, in units of the white noise's."""
        residual = self._residuals(white)
        inflation = np.ones(self.y.shape[1])
        for column in range(self.y.shape[1]):
            r = residual[self.scaled.present[:, column], column]
            freedom = max(len(r) - 2 * len(self.ends), 2)
            variance = float(r @ r) / freedom
            if variance > 0:
                # Fitted lines take correlation away, about two points' worth each; half a standard error of the
                # correlation is not believed, since it would widen white noise half of the time.
                lag_one = float(r[1:] @ r[:-1] / (r @ r)) + 2.0 * len(self.ends) / len(r)
                rho = float(np.clip(lag_one - 0.5 / np.sqrt(len(r)), 0.0, 0.95))
                inflation[column] = max(1.0, variance * (1 + rho) / (1 - rho))
        return inflation

    def _describe(
        self, stage: tuple[int, int], next_stage: tuple[int, int], ramp: Ramp, neighbours: tuple[int, int]
    ) -> Transition | None:
        """Measure a change between two stages; None if it is within the noise or negligible.

        Args:
            stage: [first, last + 1) of the stage before.
            next_stage: [first, last + 1) of the stage after.
            ramp: where the change is.
            neighbours: where the change before it ends and where the one after it starts.
        """
        before = fit_line(*self._slice(stage[0], ramp.start + 1))
        after = fit_line(*self._slice(ramp.end, next_stage[1]))
        low, low_variance = before.at(self.time[ramp.start])
        high, high_variance = after.at(self.time[ramp.end])
        width = self.time[ramp.end] - self.time[ramp.start]
        # The drift that both stages share would have gone on without a transition.
        same_way = before.slope * after.slope > 0
        drift = np.where(same_way, np.sign(before.slope) * np.minimum(np.abs(before.slope), np.abs(after.slope)), 0.0)
        variance = low_variance + high_variance
        z, seen, p_value = self._significance(high - low - drift * width, variance)
        if p_value > self.alpha:
            return None
        steps = self.scaled.steps
        extent = float(steps[ramp.start]), float(steps[ramp.end])
        known = self._known_within(extent)
        if len(known) > 1:
            return None
        # Signals that show different sides of one change are half-way at different times: none of them is wrong.
        alone = [
            locate_ramp(self.time, self.y[:, [k]], self.weights[:, [k]], stage, next_stage).location
            for k in np.flatnonzero(seen)
        ]
        # How a change proceeds within its extent is not known either: its middle half is the least that is doubtful.
        quarter = 0.25 * width
        first = min([ramp.interval[0], *alone, self.time[ramp.start] + quarter])
        last = max([ramp.interval[1], *alone, self.time[ramp.end] - quarter])
        return describe(
            self.scaled,
            extent=extent,
            step=self._step_at(ramp.location),
            interval=(self._step_at(first), self._step_at(last)),
            before=low,
            change=high - low,
            error=np.sqrt(variance),
            z=z,
            quantile=np.full(len(z), NORMAL_95),
            seen=seen,
            sides=(
                (max(stage[0], min(neighbours[0], ramp.start + 1 - MIN_STAGE)), ramp.start + 1),
                (ramp.end, min(next_stage[1], max(neighbours[1] + 1, ramp.end + MIN_STAGE))),
            ),
            p_value=p_value,
            known=known[0] if known else None,
        )

    def _describe_so_far(self, stage: tuple[int, int]) -> Transition | None:
        """Measure what has changed since the end of a stage; None if it is within the noise or negligible.

        What the stage's drift has to do with it is not known before the next stage is seen.
        """
        start = stage[1] - 1
        newest = (max(stage[1], len(self.time) - MIN_STAGE), len(self.time))
        low, low_variance = fit_line(*self._slice(*stage)).at(self.time[start])
        high, high_variance = fit_line(*self._slice(*newest)).at(self.time[-1])
        change, variance = high - low, low_variance + high_variance
        z, seen, p_value = self._significance(change, variance)
        if p_value > self.alpha:
            return None
        extent = float(self.scaled.steps[start]), float(self.scaled.steps[-1])
        if self._known_within(extent):
            return None
        return describe(
            self.scaled,
            extent=extent,
            step=self._step_at(0.5 * (self.time[start] + self.time[-1])),
            interval=extent,
            before=low,
            change=change,
            error=np.sqrt(variance),
            z=z,
            quantile=np.full(len(change), NORMAL_95),
            seen=seen,
            sides=(stage, newest),
            p_value=p_value,
            under_way=True,
        )

    def _known_within(self, extent: tuple[float, float]) -> list[Transition]:
        """Those that no stage parts from some extent."""
        steps = self.scaled.steps
        first, last = np.searchsorted(steps, extent)
        around = steps[max(first - MIN_STAGE + 1, 0)], steps[min(last + MIN_STAGE - 1, len(steps) - 1)]
        return [one for one in self.known if overlap((one.start, one.end), around)]

    def _significance(self, change: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return changes in standard errors, whether each is worth while, and how likely chance makes one like it."""
        z = np.where(np.isfinite(variance), change / np.sqrt(np.where(np.isfinite(variance), variance, 1.0)), 0.0)
        worthwhile = (np.abs(change) >= LEAST_CHANGE) & (z != 0)
        strength = float((z[worthwhile & self.searched] ** 2).sum())
        p_value = min(1.0, len(self.time) * float(chi2.sf(strength, self.searched.sum())))
        return z, worthwhile & (np.abs(z) > 3.0), p_value

    def _slice(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.time[start:end], self.y[start:end], self.weights[start:end]

    def _step_at(self, time: float) -> float:
        return float(np.interp(time, self.time, self.scaled.steps))


def _neighbours(ramps: Sequence[Ramp | None], points: int) -> list[tuple[int, int]]:
    """Return, for each ramp, where the one before it ends and where the one after it starts."""
    ends = [0, *(points if ramp is None else ramp.end for ramp in ramps)]
    starts = [*(points if ramp is None else ramp.start for ramp in ramps), points]
    return list(zip(ends, starts[1:], strict=False))
