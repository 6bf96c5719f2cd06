"""What is observed at every step: brought to few points, searched, and its transitions placed to a few steps.

Losses of minibatches scatter, with heavy tails, and neighbours are correlated. Transitions are looked for in averages
over blocks of steps, half of which would be even in time and half in log time, so that a search costs the same however
long the run is. Where one is found, its place is looked for again in ever shorter blocks around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from phasewatch.record.transition import Transition
from phasewatch.transitions.regression import BoundarySearch, SignalRegression
from phasewatch.transitions.series import NORMAL_MAD, Column, Scaled, checked_course, log_time, prepare
from phasewatch.transitions.stretches import fit_line

BLOCKS = 240
"""Averages that are searched: as many points as the live detector looks at again with each measurement. Chosen."""
SHORTEST = 1e-3
"""Share of a run that a block is at least: what takes less than a few of them is not looked for at its beginning, where
there is least to tell it from noise. Chosen."""
SCATTER_OVER = 50
"""Successive values whose scatter is looked at together, and among which neighbours are correlated: what is correlated
over more is a course, which the search knows to be correlated noise or not. Chosen."""
OUTLYING = 5.0
"""Of a value that lies further than so many standard deviations from those around it, no more is believed. Chosen."""
FASTER, SURE = 1.5, 2.0
"""A transition is so many times as fast as the run just before and just after it, by so many standard errors. Lines in
log time bend where an exponential or a noisy beginning does; this is what tells those from a transition. Chosen."""
BESIDE = 12
"""Blocks beside a transition, at least, whose rate it is held against, and within which it is placed more exactly.
Chosen."""
WIDE = 6
"""Blocks across which a transition is so wide that shorter ones say no more of where it is. Chosen."""


@dataclass(frozen=True)
class Course:
    """One signal as it was observed, what is no number left out.

    Attributes:
        steps: increasing, shape (k,).
        values: shape (k,), those drawn in that lie far from all around them.
        scatter: standard deviation of each about the course, shape (k,).
        inflation: of the variance of an average over 1, 2, ... values, beyond that of independent ones, shape
            (SCATTER_OVER,).
    """

    steps: np.ndarray
    values: np.ndarray
    scatter: np.ndarray
    inflation: np.ndarray

    @classmethod
    def of(cls, steps: np.ndarray, values: np.ndarray) -> Course:
        """Take increasing steps and values, of which some may be no numbers."""
        known = np.isfinite(values)
        steps, values = steps[known], values[known]
        if len(values) < 2:
            return cls(steps, values, np.zeros(len(values)), np.ones(SCATTER_OVER))
        count = max(len(values) // SCATTER_OVER, 1)
        size = len(values) // count
        index, whole = np.arange(len(values)), slice(count * size)
        centres = index[whole].reshape(count, size).mean(axis=1)
        course = _between(index, centres, np.median(values[whole].reshape(count, size), axis=1))
        rest = values - course
        sizes = NORMAL_MAD * np.median(np.abs(rest[whole]).reshape(count, size), axis=1)
        scatter = np.interp(index, centres, sizes)
        kept = np.clip(rest, -OUTLYING * scatter, OUTLYING * scatter)
        return cls(steps, course + kept, scatter, _inflation(kept / np.where(scatter > 0, scatter, 1.0)))

    def averages(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean step, mean and its standard error in each of the blocks between edges; NaN where one is empty."""
        bounds = np.searchsorted(self.steps, edges)
        count = np.diff(bounds)
        sums = [np.concatenate([[0.0], np.cumsum(part)]) for part in (self.steps, self.values, self.scatter**2)]
        with np.errstate(invalid="ignore", divide="ignore"):
            steps, means, variances = (np.diff(total[bounds]) / count for total in sums)
            inflation = self.inflation[np.clip(count, 1, SCATTER_OVER) - 1]
            return steps, means, np.sqrt(np.maximum(variances, 0.0) * inflation / count)


def _between(index: np.ndarray, centres: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """A course through some levels, continued at both ends as it goes there."""
    if len(levels) == 1:
        return np.full(len(index), levels[0])
    course = np.interp(index, centres, levels)
    for end, other, beyond in ((0, 1, index < centres[0]), (-1, -2, index > centres[-1])):
        slope = (levels[end] - levels[other]) / (centres[end] - centres[other])
        course[beyond] = levels[end] + slope * (index[beyond] - centres[end])
    return course


def _inflation(residual: np.ndarray) -> np.ndarray:
    """By how much correlated neighbours widen an average over 1, 2, ... values, as a factor of its variance.

    Autocorrelations are summed as far as they are positive (Geyer 1992, section 3.3, in its simplest form).
    """
    power = float(residual @ residual)
    factors = np.ones(SCATTER_OVER)
    if power <= 0:
        return factors
    count = np.arange(1, SCATTER_OVER + 1)
    for lag in range(1, min(SCATTER_OVER // 2, len(residual) - 1)):
        rho = float(residual[lag:] @ residual[:-lag]) / power
        if rho <= 2.0 / math.sqrt(len(residual)):
            break
        factors += 2.0 * rho * np.maximum(1.0 - lag / count, 0.0)
    return factors


def block_edges(first: float, last: float, blocks: int = BLOCKS) -> np.ndarray:
    """Edges of blocks of whole steps from the first to the last, half even in time and half in log time.

    None is shorter than ``SHORTEST`` of the whole.
    """
    length = last - first + 1.0
    shortest = max(SHORTEST * length, 1.0)
    steps = np.concatenate([[0.0], np.geomspace(shortest, length, 20 * blocks)])
    share = 0.5 * steps / length + 0.5 * np.log1p(steps / shortest) / math.log1p(length / shortest)
    even = np.interp(np.linspace(0.0, 1.0, blocks + 1), share, steps)
    edges = [0.0]
    for edge in np.ceil(even[1:]):
        if edge - edges[-1] >= shortest and edge < length:
            edges.append(float(edge))
    return first + np.array([*edges, length])


class DenseSignals:
    """Signals that are observed at every step, ready to be searched.

    Attributes:
        scaled: averages over blocks of them.
    """

    def __init__(self, courses: Mapping[str, Course], scaled: Scaled) -> None:
        """Take the courses and the averages over blocks of all of the run."""
        self._courses = courses
        self.scaled = scaled

    @classmethod
    def of(cls, observed: Mapping[str, tuple[ArrayLike, ArrayLike]], least: int) -> DenseSignals | None:
        """Take steps and values of each signal; None where they make fewer than ``least`` blocks, or never change.

        Raises:
            ValueError: if steps are unsorted, repeated or not numeric, or lengths differ.
        """
        checked = {name: checked_course(name, *course) for name, course in observed.items()}
        courses = {name: Course.of(*course) for name, course in checked.items()}
        courses = {name: course for name, course in courses.items() if len(course.steps)}
        if not courses:
            return None
        first = min(course.steps[0] for course in courses.values())
        last = max(course.steps[-1] for course in courses.values())
        scaled = _averaged(courses, block_edges(float(first), float(last)))
        return None if scaled is None or len(scaled.steps) < least else cls(courses, scaled)

    def placed(self, found: Sequence[Transition]) -> list[Transition | None]:
        """Each of the transitions that were found in the averages, placed as exactly as the steps allow.

        None stands for what is not surely faster than the run just before and after it.
        """
        steps = self.scaled.steps
        ends = [steps[0], *(t.end for t in found)]
        starts = [*(t.start for t in found), steps[-1]]
        return [
            self._placed(t, low, high) if t.under_way or self._is_faster(t, low, high) else None
            for t, low, high in zip(found, ends, starts[1:], strict=False)
        ]

    def _is_faster(self, transition: Transition, low: float, high: float) -> bool:
        """Whether it is faster than what is beside it, between two steps, in one of the signals that see it."""
        steps = self.scaled.steps
        first, last = np.searchsorted(steps, [transition.start, transition.end])
        first = int(first) - int(steps[first] > transition.start)
        width = steps[last] - steps[first]
        left = max(min(np.searchsorted(steps, steps[first] - width), first + 1 - BESIDE), np.searchsorted(steps, low))
        right = min(
            max(np.searchsorted(steps, steps[last] + width, side="right"), last + BESIDE),
            np.searchsorted(steps, high, side="right"),
        )
        for k, signal in enumerate(self.scaled.signals):
            if signal.name in transition.seen_by:
                # A stage is slow in own units and in the logarithm: one of the two alone makes stages of any course.
                columns = (self.scaled.y[:, k], self.scaled.sigma[:, k]), (signal.values, signal.own_sigma)
                sides = [
                    [self._line(y, sigma, a, b) for a, b in ((int(left), first + 1), (int(last), int(right)))]
                    for y, sigma in columns
                ]
                if all(a is not None and b is not None and _is_faster(a, b, width) for a, b in sides):
                    return True
        return False

    def _line(self, values: np.ndarray, sigma: np.ndarray, start: int, stop: int) -> _Side | None:
        """The course of a signal through the blocks of one side."""
        present = np.flatnonzero(np.isfinite(sigma[start:stop])) + start
        if len(present) < 3:
            return None
        steps, y = self.scaled.steps[present], values[present]
        weights = 1.0 / sigma[present] ** 2
        line = fit_line(steps, y[:, None], weights[:, None])
        rest = y - line.level - line.slope * (steps - line.centre)
        # Neighbours may wander together for a while, and scatter more than they do elsewhere.
        scatter = max(float(weights @ rest**2) / (len(present) - 2), 1.0)
        levels = []
        for end in (steps[0], steps[-1]):
            level, variance = line.at(float(end))
            levels.append((float(level[0]), float(variance[0]) * scatter))
        return _Side(levels[0], levels[1], float(line.slope[0]), float(line.slope_variance[0]) * scatter)

    def _placed(self, transition: Transition, low: float, high: float) -> Transition:
        """Look for its place in ever shorter blocks around it, as long as they become shorter."""
        if transition.under_way:
            return transition
        scaled, finest = self.scaled, math.inf
        while True:
            at = int(np.clip(np.searchsorted(scaled.steps, transition.step), 1, len(scaled.steps) - 1))
            # Where steps were not observed, points are further apart than their blocks are long.
            length = min(float(scaled.steps[at] - scaled.steps[at - 1]), finest)
            first = math.floor(max(low, transition.start - BESIDE * length))
            last = math.ceil(min(high, transition.end + BESIDE * length))
            shorter = max(1, math.ceil((last - first + 1) / BLOCKS))
            if shorter > 0.5 * length or transition.end - transition.start > WIDE * length:
                return transition
            closer = _averaged(self._courses, np.arange(first, last + shorter + 1, shorter, dtype=float))
            if closer is None or not set(transition.seen_by) & {signal.name for signal in closer.signals}:
                return transition
            around = transition.start - length, transition.end + length
            scaled, finest, transition = closer, shorter, _replaced(transition, closer, around)


@dataclass(frozen=True)
class _Side:
    """A line through one side of a transition: levels at both ends with their variances, and its slope."""

    first: tuple[float, float]
    last: tuple[float, float]
    slope: float
    slope_variance: float


def _is_faster(before: _Side, after: _Side, width: float) -> bool:
    rate = abs(after.first[0] - before.last[0]) / width
    variance = (after.first[1] + before.last[1]) / width**2
    return all(
        rate - FASTER * abs(side.slope) > SURE * math.sqrt(variance + FASTER**2 * side.slope_variance)
        for side in (before, after)
    )


def _averaged(courses: Mapping[str, Course], edges: np.ndarray) -> Scaled | None:
    """Averages over blocks, brought to one scale; None where no signal has enough of them that differ."""
    averages = {name: course.averages(edges) for name, course in courses.items()}
    steps = np.array([a[0] for a in averages.values()])
    known = np.isfinite(steps).any(axis=0)
    if known.sum() < 4:
        return None
    steps = np.nanmean(steps[:, known], axis=0)
    time = log_time(steps)
    every = np.ones(len(steps), dtype=bool)
    prepared = [
        prepare(name, time, Column(means[known], errors[known], every)) for name, (_, means, errors) in averages.items()
    ]
    signals = [signal for signal in prepared if signal is not None]
    if not signals:
        return None
    trusted = np.ones((len(steps), len(signals)), dtype=bool)
    return Scaled.of(steps, time, signals, trusted, np.ones(len(signals), dtype=bool), {})


def _replaced(transition: Transition, scaled: Scaled, around: tuple[float, float]) -> Transition:
    """Where a transition between two steps is, by the averages there: a step or a ramp, as these make likely."""
    count = len(scaled.steps)
    seeing = [k for k, signal in enumerate(scaled.signals) if signal.name in transition.seen_by]
    regressions = [
        SignalRegression(scaled.steps, scaled.time, scaled.y[:, k], scaled.sigma[:, k], 1.0, scaled.trusted[:, k])
        for k in seeing
    ]
    search = BoundarySearch(regressions, count, price=0.0)
    (place, width), (low, middle, high) = search.within(*np.interp(around, scaled.steps, np.arange(count)).tolist())
    first, last = min(place - width / 2, math.floor(place)), max(place + width / 2, math.floor(place) + 1)

    def step_at(index: float) -> float:
        return float(np.interp(index, np.arange(count), scaled.steps))

    return replace(
        transition,
        start=step_at(first),
        end=step_at(last),
        step=step_at(min(max(middle, first), last)),
        interval=(step_at(min(low, first)), step_at(max(high, last))),
    )
