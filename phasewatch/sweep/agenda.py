"""Which checkpoint is measured next: one after another, or where time is short what tells most."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

from phasewatch.record import Measurement
from phasewatch.record.signals import searched
from phasewatch.sweep.checkpoints import Checkpoint

EVENLY = 0.5
"""The share of what a budget pays for that is spread evenly over the run, before any place in it is looked at closely.

This and the two below were chosen on simulated runs; `make bench-sweep` reports on others."""
BESIDE = 2
"""So many measurements on either side must lie apart for a change between them to count: noise goes up and down."""
UNCHANGED = 0.1
"""So large a change, as a share of a signal's range, is thought possible in every gap: wide ones are not forgotten."""


class Agenda:
    """Hands out checkpoints: all in order, or as many as a budget pays for.

    With a budget the two ends come first. Half of what it pays for is then spread evenly, from coarse to fine, and the
    rest goes where most is in doubt: to the middle of the gap whose width times the change across it is greatest.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        known: Iterable[Measurement] = (),
        budget: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin; the time counts from here.

        Args:
            checkpoints: What there is to measure.
            known: What was measured before.
            budget: Seconds; None to measure all.
            clock: Tells the seconds.
        """
        self._waiting = {checkpoint.step: checkpoint for checkpoint in checkpoints}
        self._values: dict[int, Mapping[str, float]] = {}
        self._budget, self._clock, self._began = budget, clock, clock()
        self._seconds: list[float] = []
        for measurement in known:
            self._note(measurement)

    @property
    def left(self) -> int:
        """How many can still be handed out; none where the budget does not pay for another one."""
        return 0 if self.is_spent else len(self._waiting)

    @property
    def waiting(self) -> int:
        """How many were not handed out."""
        return len(self._waiting)

    @property
    def is_spent(self) -> bool:
        """Whether the budget has ended before the checkpoints have."""
        if self._budget is None or not self._seconds or not self._waiting:
            return False
        expected = sum(self._seconds) / len(self._seconds)
        return self._clock() - self._began + expected > self._budget

    def next(self) -> Checkpoint | None:
        """The next checkpoint; None where there is none, or nothing is left of the budget."""
        if not self.left:
            return None
        if self._budget is None:
            step = min(self._waiting)
        else:
            step = next_of_few(sorted(self._waiting), self._values, self._count)
        self._values.setdefault(step, {})  # its place is taken, whatever comes of it
        return self._waiting.pop(step)

    def learn(self, measurement: Measurement) -> None:
        """Take note of what came of one that was handed out."""
        self._seconds.append(measurement.seconds)
        self._note(measurement)

    @property
    def _count(self) -> float:
        """How many will have been measured when the budget ends, at the pace of this call so far."""
        every = len(self._values) + len(self._waiting)
        elapsed = self._clock() - self._began
        if self._budget is None or not self._seconds or not elapsed:
            return every
        return min(every, len(self._values) + len(self._seconds) * (self._budget - elapsed) / elapsed)

    def _note(self, measurement: Measurement) -> None:
        names = searched(list(measurement.estimates)) or list(measurement.estimates)
        self._values[measurement.step] = {name: measurement.value(name) for name in names}


def next_of_few(waiting: Sequence[int], values: Mapping[int, Mapping[str, float]], count: float) -> int:
    """The step to measure next, of those that wait, where not all will be measured.

    Args:
        waiting: Steps that are not measured, ascending, one at least.
        values: Step to signals, of those that are measured or being measured; these have none yet.
        count: How many will be measured in all.
    """
    known = sorted(values)
    if not known or waiting[0] < known[0]:
        return waiting[0]
    if waiting[-1] > known[-1]:
        return waiting[-1]
    places = [bisect_right(waiting, step) for step in known]
    gaps = [waiting[first:last] for first, last in zip(places, places[1:], strict=False)]
    widest = max(gaps, key=len)
    width = len(widest) + 1
    spacing = (len(waiting) + len(known) - 1) / max(EVENLY * count - 1, 1)
    parts = round(width / spacing)
    if parts > 1:
        return widest[round(width * (parts // 2) / parts) - 1]
    worth = [(change + UNCHANGED) * len(gap) for gap, change in zip(gaps, _changes(known, values), strict=True)]
    inside = gaps[worth.index(max(worth))]
    return inside[len(inside) // 2]


def _changes(known: Sequence[int], values: Mapping[int, Mapping[str, float]]) -> list[float]:
    """How far some signal is moved between two neighbours, as a share of its range: the most of all signals.

    By as much as the measurements before lie apart from those after. Across a slow drift and an abrupt change that is
    the whole difference, and in noise next to nothing. What is not finite has no say.
    """
    found = [0.0] * (len(known) - 1)
    for name in {name for signals in values.values() for name in signals}:
        steps = [step for step in known if math.isfinite(values[step].get(name, math.nan))]
        course = [values[step][name] for step in steps]
        extent = max(course, default=0.0) - min(course, default=0.0)
        for k, step in enumerate(known[:-1]):
            place = bisect_right(steps, step)
            before, after = course[max(place - BESIDE, 0) : place], course[place : place + BESIDE]
            if before and after and extent:
                apart = max(min(after) - max(before), min(before) - max(after))
                found[k] = max(found[k], apart / extent)
    return found
