"""When to measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

PROMPT = 5.0
"""Seconds that a first measurement may take unasked: training is to start within ten, and predictions of a measurement
are right to a factor of two. Chosen."""
FREE_SECONDS = 60.0
"""Seconds of measuring that nobody minds, however short the run: a fifty-point record of two minutes of training.
Chosen."""
LENGTH_UNKNOWN = 1000
"""Steps over which measurements are spread at first where nobody says how many there will be. Chosen."""
EVEN = 2 / 3
"""Of the measurements that are left, so many are spread evenly over what is left of the run; the others are for where
something is under way. Chosen."""
EVEN_AT_LEAST = 8
"""Of those that are left, spread evenly in any case: with fewer no transition is detected."""
CLOSER = 4
"""Measurements in place of one where something is under way: three or four within its distance. Chosen."""
SCALES = 20
"""Of the length of a run, the part from which on its time is logarithmic: measurements are even in log(1 + 20 t).
Chosen."""
KEPT = 0.4
"""Of an even spread over all of the run, so much is spread over what is left even where more was spent before.
Chosen."""


@dataclass
class Clock:
    """Where the time of a run went so far.

    Attributes:
        total_steps: Steps that the run will make; None where that is not known.
        steps: Steps made while the clock ran.
        training_seconds: Wall time of the run outside of measurements.
        measuring_seconds: Wall time of all measurements.
        measurement_seconds: What a measurement is expected to take, in the mean where some are dearer.
        next_seconds: What the next one is; 0 for the mean.
        end_seconds: What that of the end is; likewise.
        least_seconds: What one is without what some are without; 0 where all are alike.
        taken: Measurements that a schedule has had made.
        last_taken: The step of the last one, or the first one where that is kept to be measured; -1 before.
        last_active: The last step at which something was under way in the run; None if nothing was, as far as is seen.
    """

    total_steps: int | None = None
    steps: int = 0
    training_seconds: float = 0.0
    measuring_seconds: float = 0.0
    measurement_seconds: float = 0.0
    next_seconds: float = 0.0
    end_seconds: float = 0.0
    least_seconds: float = 0.0
    taken: int = 0
    last_taken: int = -1
    last_active: int | None = None

    @property
    def scale(self) -> float:
        """Steps from which on the time of the run is logarithmic."""
        return (self.total_steps or LENGTH_UNKNOWN) / SCALES

    @property
    def due_seconds(self) -> float:
        """What the next measurement takes."""
        return self.next_seconds or self.measurement_seconds

    @property
    def last_seconds(self) -> float:
        """What that of the end takes."""
        return max(self.measurement_seconds, self.end_seconds)

    @property
    def kept_back(self) -> float:
        """For that of the end, should the run end now.

        That of a known end the training up to there will pay for: where the run ends before, it is measured without
        what is not paid.
        """
        return (self.least_seconds if self.total_steps is not None else 0.0) or self.last_seconds

    @property
    def step_seconds(self) -> float:
        """Time that a step of training takes; NaN before the first."""
        return self.training_seconds / self.steps if self.steps else math.nan

    @property
    def overhead(self) -> float:
        """Time spent measuring as a share of the time spent training; NaN before the first step."""
        return self.measuring_seconds / self.training_seconds if self.training_seconds else math.nan


class Schedule(Protocol):
    """Decides at which steps to stop by, and there whether to measure."""

    measures_the_end: bool
    """Whether the end of the run is measured wherever it falls."""
    keeps_the_start: bool
    """Whether the state at the first step is kept, if it is not measured there, and measured before all others."""

    def measures(self, step: int, clock: Clock) -> bool:
        """Whether to measure now, at a step that ``next_visit`` named (or at the first)."""
        ...

    def left(self, clock: Clock) -> float:
        """Seconds that may still be spent measuring if the run ends now; infinite without a limit."""
        ...

    def next_visit(self, step: int, clock: Clock) -> int | None:
        """The first step after ``step`` to stop by at; None if there is none. -1 asks for the first of all."""
        ...


@dataclass(frozen=True)
class Every:
    """Every ``interval`` steps, from 0 on.

    Raises:
        ValueError: If ``interval`` is not positive.
    """

    interval: int
    measures_the_end = False
    keeps_the_start = False

    def __post_init__(self) -> None:
        """Check the interval."""
        if self.interval < 1:
            raise ValueError(f"schedule is every {self.interval} steps; expected a number of steps, at least 1")

    def measures(self, step: int, clock: Clock) -> bool:
        """Always."""
        return True

    def left(self, clock: Clock) -> float:
        """There is no limit."""
        return math.inf

    def next_visit(self, step: int, clock: Clock) -> int | None:
        """The next multiple of the interval."""
        return (step // self.interval + 1) * self.interval


@dataclass(frozen=True)
class LogSpaced:
    """At 0, 1 and then ``per_decade`` times while the step grows tenfold, and at the end.

    Raises:
        ValueError: If ``per_decade`` is not positive.
    """

    per_decade: int = 15
    measures_the_end = True
    keeps_the_start = False

    def __post_init__(self) -> None:
        """Check the density."""
        if self.per_decade < 1:
            raise ValueError(f"per_decade is {self.per_decade}; expected at least 1")

    def measures(self, step: int, clock: Clock) -> bool:
        """Always."""
        return True

    def left(self, clock: Clock) -> float:
        """There is no limit."""
        return math.inf

    def next_visit(self, step: int, clock: Clock) -> int | None:
        """The next step of the geometric series, rounded."""
        if step < 1:
            return step + 1
        power = math.floor(math.log10(step + 0.5) * self.per_decade)
        while (found := round(10 ** (power / self.per_decade))) <= step:
            power += 1
        return found


@dataclass(frozen=True)
class At:
    """At the steps listed.

    Raises:
        ValueError: If the list is empty or has a negative step.
    """

    steps: tuple[int, ...]
    measures_the_end = False
    keeps_the_start = False

    def __post_init__(self) -> None:
        """Check and sort the steps."""
        if not self.steps or min(self.steps) < 0:
            raise ValueError(f"steps is {list(self.steps)}; expected at least one step, none of them negative")
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))

    def measures(self, step: int, clock: Clock) -> bool:
        """Whether the step is on the list."""
        return step in self.steps

    def left(self, clock: Clock) -> float:
        """There is no limit."""
        return math.inf

    def next_visit(self, step: int, clock: Clock) -> int | None:
        """The next one on the list."""
        return next((listed for listed in self.steps if listed > step), None)


@dataclass(frozen=True)
class Spread:
    """Spread over the run, denser early on and where something is under way, within a share of the training time.

    The time spent measuring, the first and the last measurement included, is at most ``max_overhead`` times the time
    spent training or ``free_seconds`` in all, whichever is more, at whatever step the run ends. So a measurement is
    made only where the training time so far pays for it and for one more, which is kept back for the end (where some do
    without dear parts at times, one that does: with all of them it is paid by the training up to a known end); where
    measurements are dear, their distance grows. While it is the free seconds that pay, they are spread over the time in
    which they do. Of the start a copy is kept, if it is not measured there, and measured when it is paid.

    Two thirds of the measurements that are left are spread evenly, in log time, over what is left of the run. Four
    times as often it is looked whether something is under way (:class:`phasewatch.activity.Activity`); there, and until
    an even distance after it, it is measured each time. What this leaves over is spent on the even ones that come
    later.

    Attributes:
        max_overhead: Time for measuring as a share of the time for training; None sets no limit.
        measurements: How many to plan for a run of known length.
        free_seconds: Time for measuring that any run may take, however short; 0 leaves the share alone.

    Raises:
        ValueError: If ``max_overhead`` or ``measurements`` is not positive, or ``free_seconds`` negative.
    """

    max_overhead: float | None = 0.1
    measurements: int = 60
    free_seconds: float = FREE_SECONDS
    measures_the_end = True
    keeps_the_start = True

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.max_overhead is not None and not 0 < self.max_overhead < math.inf:
            raise ValueError(
                f"max_overhead is {self.max_overhead}; expected a positive share of the training time such as 0.1, or "
                "None for no limit"
            )
        if self.measurements < 2:
            raise ValueError(f"measurements is {self.measurements}; expected at least 2")
        if not 0 <= self.free_seconds < math.inf:
            raise ValueError(
                f"free_seconds is {self.free_seconds}; expected a number of seconds such as 60, or 0 for none"
            )

    def budget(self, training_seconds: float) -> float:
        """Seconds for measuring in a run of so many seconds of training."""
        if self.max_overhead is None:
            return math.inf
        return max(self.max_overhead * training_seconds, self.free_seconds)

    def left(self, clock: Clock) -> float:
        """What the budget of the training time so far has left."""
        return self.budget(clock.training_seconds) - clock.measuring_seconds

    def measures(self, step: int, clock: Clock) -> bool:
        """Whether one is planned here or something is under way, and the budget allows it and one at the end.

        Before training none is made that takes long.
        """
        if self.max_overhead is not None and not clock.steps and clock.measurement_seconds > PROMPT:
            return False
        is_planned = step >= self._planned(clock)
        if self.pays(clock.due_seconds, clock):
            return is_planned or self._follows(step, clock)
        # Where one was made each time that something is under way, what is due would never be paid.
        return is_planned and 0 < clock.least_seconds and self.pays(clock.least_seconds, clock)

    def pays(self, seconds: float, clock: Clock) -> bool:
        """Whether the budget allows a measurement of so many seconds, and that of the end.

        Nothing waits for an end that the run does not pay for in whole.
        """
        if self.left(clock) < seconds + clock.kept_back:
            return False
        if clock.total_steps is None or not clock.steps:
            return True
        of_the_run = self.budget(clock.step_seconds * max(clock.total_steps, clock.steps))
        left_in_all = of_the_run - clock.measuring_seconds
        return left_in_all >= seconds + clock.last_seconds or left_in_all < clock.last_seconds

    def next_visit(self, step: int, clock: Clock) -> int | None:
        """The next step to look at the run, or a later one if the budget will not have recovered by then."""
        if step < 0:
            return 0
        looked_at = step + max(1, round(self._distance(step, clock) / CLOSER))
        planned = self._planned(clock)
        visit = min(looked_at, planned) if planned > step else looked_at
        needed = clock.measuring_seconds + (clock.least_seconds or clock.due_seconds) + clock.kept_back
        if self.max_overhead is None or not clock.training_seconds or not clock.steps or needed <= self.free_seconds:
            return visit
        steps_until_paid = (needed / self.max_overhead - clock.training_seconds) / clock.step_seconds
        return max(visit, step + math.ceil(steps_until_paid))

    def _planned(self, clock: Clock) -> int:
        """The step at which one is due by the even spread."""
        if clock.last_taken < 0:
            return 0
        return clock.last_taken + max(1, round(self._distance(clock.last_taken, clock)))

    def _follows(self, step: int, clock: Clock) -> bool:
        """Whether something is under way, or was not more than an even distance ago."""
        if clock.last_active is None:
            return False
        return step - clock.last_active <= max(1, self._distance(clock.last_active, clock))

    def _distance(self, step: int, clock: Clock) -> float:
        """From one of the even spread to the next, be it that of the run or, while only these are paid, the free."""
        total = clock.total_steps
        taken = None if total is None else clock.taken
        distance = _even_in_the_logarithm(step, total or LENGTH_UNKNOWN, self.measurements, taken)
        if self.max_overhead is None or not clock.measurement_seconds:
            return distance
        # with those that were made, which may have been cheaper or dearer than the next are expected to be
        free = clock.taken + max(self.free_seconds - clock.measuring_seconds, 0.0) / clock.measurement_seconds
        until = float(total or LENGTH_UNKNOWN)
        if clock.training_seconds and clock.steps:
            # from there on the share pays for more than is free
            until = self.free_seconds / self.max_overhead / clock.step_seconds
            until = min(until, total or math.inf)
            if until < (total or math.inf):
                distance = max(distance, self._paid_by_the_share(step, clock))
        if free < 2 or step >= until or free >= self.measurements:
            return distance
        return max(distance, min(_even_in_the_logarithm(step, until, int(free), clock.taken), until - step))

    def _paid_by_the_share(self, step: int, clock: Clock) -> float:
        """The distance of those that are spread evenly, of what the share of the training time pays for."""
        assert self.max_overhead is not None
        if clock.total_steps is None or step >= clock.total_steps:
            return clock.measurement_seconds / self.max_overhead / clock.step_seconds / EVEN
        seconds = self.budget(clock.step_seconds * clock.total_steps) - clock.measuring_seconds
        return (clock.total_steps - step) / max(_spread_evenly(seconds / clock.measurement_seconds), 1.0)


def _spread_evenly(left: float) -> float:
    """How many of those that are left."""
    return max(EVEN * left, min(left, EVEN_AT_LEAST))


def _even_in_the_logarithm(step: int, length: float, measurements: int, taken: int | None) -> float:
    """The distance to the next of those that are left, evenly spaced in log(1 + step/s), s being length / 20.

    It is not less than with as many over all of the length; of as many, a part at least is taken to be left.

    Args:
        step: Where one is made.
        length: Steps over which they are spread.
        measurements: How many in all.
        taken: How many were made; None if as many as are even.
    """
    whole = math.log1p(SCALES)
    ahead = 1 - math.log1p(SCALES * step / length) / whole
    least = 1 / (measurements - 1)
    if taken is None or ahead <= 0:
        share = least / EVEN
    else:
        left = max(measurements - taken, KEPT * (measurements - 1) * ahead)
        share = max(ahead / _spread_evenly(left), least)
    return (length / SCALES + step) * math.expm1(whole * share)


ScheduleLike = Schedule | int | Sequence[int] | Literal["auto", "log"]


def as_schedule(given: ScheduleLike, max_overhead: float | None = 0.1, free_seconds: float = FREE_SECONDS) -> Schedule:
    """A schedule from what users write: an interval, a list of steps, ``"log"``, ``"auto"`` or a schedule.

    Raises:
        TypeError: If it is none of these.
    """
    if given == "auto":
        return Spread(max_overhead, free_seconds=free_seconds)
    if given == "log":
        return LogSpaced()
    if isinstance(given, int) and not isinstance(given, bool):
        return Every(given)
    if isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(s, int) for s in given):
        return At(tuple(given))
    if hasattr(given, "next_visit"):
        return given  # type: ignore[return-value]
    raise TypeError(
        f"schedule is {given!r}; expected 'auto', 'log', a number of steps, a list of steps, or a schedule such as "
        "phasewatch.schedule.LogSpaced(20)"
    )
