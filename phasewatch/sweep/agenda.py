"""Which checkpoint is measured next: one after another, or where time is short by bisection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from phasewatch.record import Measurement
from phasewatch.record.signals import detected
from phasewatch.sweep.checkpoints import Checkpoint

COARSE = 9
"""So many, evenly over the run, are measured before any place in it is looked at more closely."""


class Agenda:
    """Hands out checkpoints: all in order, or as many as a budget pays for.

    With a budget the two ends come first, then the middle of the widest gap until the run is covered coarsely, and from
    then on the middle of the gap across which some signal changes most, by its range over what is known.
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
        step = min(self._waiting) if self._budget is None else next_by_bisection(sorted(self._waiting), self._values)
        self._values.setdefault(step, {})  # its place is taken, whatever comes of it
        return self._waiting.pop(step)

    def learn(self, measurement: Measurement) -> None:
        """Take note of what came of one that was handed out."""
        self._seconds.append(measurement.seconds)
        self._note(measurement)

    def _note(self, measurement: Measurement) -> None:
        names = detected(list(measurement.estimates)) or list(measurement.estimates)
        self._values[measurement.step] = {name: measurement.value(name) for name in names}


def next_by_bisection(waiting: Sequence[int], values: Mapping[int, Mapping[str, float]]) -> int:
    """The step to measure next, of those that wait.

    Args:
        waiting: Steps that are not measured, ascending, one at least.
        values: Step to signals, of those that are measured or being measured; these have none yet.
    """
    known = sorted(values)
    if not known or waiting[0] < known[0]:
        return waiting[0]
    if waiting[-1] > known[-1]:
        return waiting[-1]
    gaps = [
        (before, after, inside)
        for before, after in zip(known, known[1:], strict=False)
        if (inside := [step for step in waiting if before < step < after])
    ]
    if len(known) < COARSE:
        *_, inside = max(gaps, key=lambda gap: len(gap[2]))
    else:
        ranges = _ranges(values)
        *_, inside = max(gaps, key=lambda gap: (_change(values[gap[0]], values[gap[1]], ranges), len(gap[2])))
    return inside[len(inside) // 2]


def _ranges(values: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """How far each signal goes."""
    of: dict[str, list[float]] = {}
    for signals in values.values():
        for name, value in signals.items():
            of.setdefault(name, []).append(value)
    return {name: max(found) - min(found) for name, found in of.items()}


def _change(before: Mapping[str, float], after: Mapping[str, float], ranges: Mapping[str, float]) -> float:
    """The largest change of a signal, as a share of its range; what is not finite has none."""
    shares = [
        abs(after[name] - value) / ranges[name] for name, value in before.items() if name in after and ranges[name]
    ]
    return max((share for share in shares if 0 <= share <= 1), default=0.0)
