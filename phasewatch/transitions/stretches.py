"""From a segmentation to transitions: stretches that are slow, then fast, then slow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# A transition is faster than the stage before it by this share in steps as well: what only decelerates never is.
# Chosen.
FASTER_IN_STEPS = 0.2


@dataclass(frozen=True)
class Line:
    """Weighted straight lines through the signals over one segment.

    Attributes:
        centre: mean time of the points of each signal, shape (signals,).
        level: value at the centre.
        slope: change for each unit of time; 0 where fewer than two points are known.
        level_variance: variance of ``level``; infinite where no point is known.
        slope_variance: variance of ``slope``; 0 where it is unknown and taken as 0.
    """

    centre: np.ndarray
    level: np.ndarray
    slope: np.ndarray
    level_variance: np.ndarray
    slope_variance: np.ndarray

    def at(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the values of the lines at ``time`` and their variances."""
        distance = time - self.centre
        return self.level + self.slope * distance, self.level_variance + self.slope_variance * distance**2


@dataclass(frozen=True)
class FastStretch:
    """A candidate transition.

    Attributes:
        before: [first, last + 1) of the slow segment before it, as indices of measurements.
        after: the same of the slow segment after it; None while that has not been seen.
    """

    before: tuple[int, int]
    after: tuple[int, int] | None


def fit_line(time: np.ndarray, signals: np.ndarray, weights: np.ndarray) -> Line:
    """Fit a line to each column of ``signals`` (n, signals), the weights being inverse variances."""
    total = weights.sum(axis=0)
    known = total > 0
    safe = np.where(known, total, 1.0)
    centre = np.where(known, (weights * time[:, None]).sum(axis=0) / safe, time.mean())
    level = np.where(known, (weights * signals).sum(axis=0) / safe, 0.0)
    distance = time[:, None] - centre
    leverage = (weights * distance**2).sum(axis=0)
    sloped = leverage > 1e-12 * safe * max(float(np.ptp(time)), 1e-300) ** 2
    lever = np.where(sloped, leverage, 1.0)
    slope = np.where(sloped, (weights * distance * (signals - level)).sum(axis=0) / lever, 0.0)
    return Line(centre, level, slope, np.where(known, 1.0 / safe, np.inf), np.where(sloped, 1.0 / lever, 0.0))


def fast_stretches(
    steps: np.ndarray,
    time: np.ndarray,
    signals: np.ndarray,
    weights: np.ndarray,
    ends: list[int],
    ratio: float,
    goes_on: bool = False,
) -> list[FastStretch]:
    """Find the stretches whose rate is at least ``ratio`` times that of both neighbouring stages.

    Where the run goes on, the last of them may have no slow stage after it yet.

    Rates are those in log time. Against the stage before, the rate in steps must have grown as well: a power law or an
    exponential approach, which only decelerates, is slow, fast and slow again in log time, yet no transition.
    """
    pieces = _pieces(steps, time, signals, weights, ends)
    together, alone = pieces[0], pieces[1:]
    count = len(together.stage)
    accepted: dict[int, tuple[_Pieces, bool]] = {}
    for peak in sorted(range(count), key=lambda k: -together.least_log_rate[k]):
        left = max((k for k in accepted if k < peak), default=-1)
        right = min((k for k in accepted if k > peak), default=count)
        # Stages that all signals together blur may be plain in one of them.
        for view in (together, *alone):
            # What is slow in log time alone, as the first steps of a run are, is not slower than a transition.
            before = view.slowest(k for k in range(left + 1, peak) if view.slow_before(k, peak, ratio))
            after = view.slowest(range(peak + 1, right))
            over = after is not None and view.slow_after(after, peak, ratio)
            if (
                before is not None
                and (over or (goes_on and right == count))
                # A neighbour found earlier must keep its own slow stage on the side that faces this one.
                and (left < 0 or view.slow_after(before, left, ratio))
                and (after is None or right == count or view.slow_before(after, right, ratio))
            ):
                accepted[peak] = view, over
                break
    bounds = [0, *ends]
    stretches = []
    for peak, (view, over) in sorted(accepted.items()):
        first, last = peak, peak
        while not (view.stage[first] and view.slow_before(first, peak, ratio)):
            first -= 1
        while over and not (view.stage[last] and view.slow_after(last, peak, ratio)):
            last += 1
        here, there = first // 2, last // 2
        following = (bounds[there], bounds[there + 1]) if over else None
        stretches.append(FastStretch((bounds[here], bounds[here + 1]), following))
    return stretches


@dataclass(frozen=True)
class _Pieces:
    """Segments (even places) and the gaps between them (odd places), with bounds on their rates of change."""

    stage: list[bool]
    least_rate: np.ndarray
    most_rate: np.ndarray
    least_log_rate: np.ndarray
    most_log_rate: np.ndarray

    def slowest(self, places: Iterable[int]) -> int | None:
        """Return the slowest segment among some places, or None if there is none."""
        return min((k for k in places if self.stage[k]), key=lambda k: float(self.most_log_rate[k]), default=None)

    def slow_before(self, stage: int, peak: int, ratio: float) -> bool:
        """Tell whether the run gets faster from the stage to the peak: much in log time, and in steps at all."""
        faster = (1.0 + FASTER_IN_STEPS) * self.most_rate[stage] <= self.least_rate[peak]
        return bool(faster and self.slow_after(stage, peak, ratio))

    def slow_after(self, stage: int, peak: int, ratio: float) -> bool:
        """Tell whether the run gets slower from the peak to the stage: much in log time, hence more so in steps."""
        least = self.least_log_rate[peak]
        return bool(least > 0 and ratio * self.most_log_rate[stage] <= least)


def _pieces(
    steps: np.ndarray, time: np.ndarray, signals: np.ndarray, weights: np.ndarray, ends: list[int]
) -> list[_Pieces]:
    """Return the pieces as all signals together see them, then as each alone does."""
    bounds = [0, *ends]
    lines = [fit_line(time[a:b], signals[a:b], weights[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    # Changes are counted in standard deviations of a typical point, so that the signals add up.
    unit = np.sqrt([np.median(w[w > 0]) for w in weights.T])
    changes, variances, durations, log_durations, stage = [], [], [], [], []
    for k, line in enumerate(lines):
        first, last = bounds[k], bounds[k + 1] - 1
        width = time[last] - time[first]
        changes.append(line.slope * width * unit)
        variances.append(line.slope_variance * (width * unit) ** 2)
        durations.append(steps[last] - steps[first])
        log_durations.append(width)
        stage.append(True)
        if k + 1 == len(lines):
            break
        here, here_variance = line.at(time[last])
        there, there_variance = lines[k + 1].at(time[last + 1])
        variance = here_variance + there_variance
        known = np.isfinite(variance)
        changes.append(np.where(known, there - here, 0.0) * unit)
        variances.append(np.where(known, variance, 0.0) * unit**2)
        # A jump is resolved to about three measurements, no better: else a ramp with a jump in it falls apart.
        around = slice(max(0, last - 1), min(len(time), last + 3))
        durations.append(float(np.ptp(steps[around])))
        log_durations.append(float(np.ptp(time[around])))
        stage.append(False)
    change, variance = np.array(changes), np.array(variances)
    duration, log_duration = np.array(durations), np.array(log_durations)
    count = change.shape[1]
    views = [slice(None), *(slice(k, k + 1) for k in range(count) if count > 1)]
    return [_view(stage, change[:, view], variance[:, view], duration, log_duration) for view in views]


def _view(
    stage: list[bool], change: np.ndarray, variance: np.ndarray, duration: np.ndarray, log_duration: np.ndarray
) -> _Pieces:
    noise = variance.sum(axis=1)
    size = np.sqrt(np.maximum((change**2).sum(axis=1) - noise, 0.0))
    error = np.sqrt(noise / change.shape[1])
    least, most = np.maximum(size - error, 0.0), size + error
    return _Pieces(stage, least / duration, most / duration, least / log_duration, most / log_duration)
