"""What training computes anyway, gathered step by step: read, never recomputed, and without waiting for a device."""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from phasewatch.activity import Activity
from phasewatch.record.trace import pack
from phasewatch.transitions.events import LEARNING_RATE
from phasewatch.updates import NORMS, UpdateReader

SHARE = 0.01
"""Of the training time that all of this may take. Chosen."""
LONGEST_WAIT = 60.0
"""Seconds until a block is written: what a kill may lose. Written more often, the lines of a slow run would take more
room than what is in them. Chosen."""
MOST_STEPS = 16_384
"""Steps until a block is written. Chosen."""
MOST_SIGNALS = 200
"""Names; a value of each at a thousand validations makes some 10 MB. Chosen."""
FETCHED = 1_024
"""Values that stay on a device until they are fetched together. Chosen."""
FIRST_READ = 10
"""Steps before the norms are read first: how long a step takes must be known, and its first ones take longer.
Chosen."""
FIRST_SECONDS = 0.02
"""What the first read is taken to take, which also loads what it calls: 4 to 17 ms in benchmarks/overhead.py."""
LEAST_FOR_NORMS = 0.1
"""Of the share, where steps are so short that all else takes nearly all of it. Chosen."""
UNCOUNTED = 1.5
"""Times what is counted is what a step is taken to be made longer by: calling, passing arguments, and the caches of the
processor cannot be timed from inside. Chosen, not measured."""
ASKING = 4e-6
"""Seconds that a step is longer where nothing is taken at it: a call of ``Watch.at`` and one of ``Watch.observe`` that
return at once took 2 to 6 µs in loops whose steps had worn the caches (benchmarks/overhead.py)."""
THINNED_ANEW = 64
"""Steps after which it is seen again how many can be afforded. Chosen."""
GIVEN_AT_EVERY_STEP = 0.5
"""Of the steps, from which on a value counts as one that is: others, as those of a validation, are never left out.
Chosen."""


class Observer:
    """Gathers what is observed, and packs it into blocks.

    Values on a device stay there until a thousand of them, or a block, are fetched together. The norms of the updates
    are read every so many steps that, by the time this took so far, everything together takes at most ``SHARE`` of the
    training time. Where steps are so short that even losses and learning rates take more, they are taken at every
    second, fifth, tenth ... step, and at those that ``activity`` is told of; that nothing is taken is known at once.
    Training leaves none of this in the processor's caches, so that each line that is run costs ten times what it does
    when it is run again: numbers are held as they come, and put where they belong many at a time.

    Attributes:
        seconds: What all of it took in this process, host time; of the norms on a device at least what moving their
            bytes takes.
        training_seconds: What training took in this process, from the first step observed on.
        steps_taken: At how many steps something was taken.
        interval: The norms are read at multiples of it: every 10, 20, 50, 100 ... steps.
        every: What comes at every step is taken at multiples of it: every 1, 2, 5, 10 ... steps.
    """

    def __init__(self, activity: Activity | None = None) -> None:
        """Nothing was observed.

        Args:
            activity: Is told of all but the norms whenever :meth:`look` is called.
        """
        self.seconds = 0.0
        self.training_seconds = 0.0
        self.interval = 10
        self.every = 1
        self._activity = activity
        self._looked_at = 1
        self._at_every_step: frozenset[str] = frozenset()
        self.steps_taken = 0
        self._last_taken = -1
        self._next = 0  # the step at which to take what comes at every step
        self._is_reading = False
        self._may_read_from = 0.0  # by the clock: norms are not affordable before
        self._held: list[tuple[int, dict[str, float], Optimizer | None, float]] = []
        self._columns: dict[str, _Column] = {}
        self._refused: set[str] = set()
        self._errors: list[tuple[str, Exception]] = []
        self._steps = 0
        self._seen: tuple[float, float] | None = None
        self._block_began: float | None = None
        self._in_block = 0
        self._readers: dict[int, UpdateReader] = {}  # by the id of an optimizer, which they keep alive
        self._reading_seconds = 0.0
        self._costs: deque[float] = deque(maxlen=9)

    def expect(self, optimizers: Sequence[Optimizer]) -> None:
        """Name optimizers in this order: the signals of the second end in ``_1``, and so on; else as they come."""
        for optimizer in optimizers:
            self._meet(optimizer)

    def take(
        self, step: int, values: Mapping[str, Any], optimizer: Optimizer | None = None, measuring_seconds: float = 0.0
    ) -> bool:
        """Take what was observed at a step; what cannot be taken is told by :meth:`errors`.

        Args:
            step: Optimizer steps made before.
            values: Name to number, or tensor with one element; None is no value.
            optimizer: Is about to use the gradients that its parameters have.
            measuring_seconds: What measurements have taken so far, which is no time of training.

        Returns:
            Whether there are errors to be told, or a block to be written.
        """
        began = time.perf_counter()
        try:
            step = operator.index(step)
        except TypeError:
            self._refuse("step", TypeError(f"step is {step!r}; expected an integer"))
            return True
        if not 0 <= step < 2**63:
            self._refuse("step", ValueError(f"step is {step}; expected the number of optimizer steps made before"))
            return True
        is_new = step != self._last_taken
        if is_new:
            self._begin_step(step)
        if self._block_began is None:
            self._block_began = began
        if self._seen is not None:
            # whatever the clock does, training takes no less than nothing
            self.training_seconds += max(0.0, began - self._seen[0] - (measuring_seconds - self._seen[1]))
        if not self._hold(step, values, optimizer, began):
            self._settle()
            for name, value in values.items():
                if value is not None:
                    self._add(step, name, value)
            if optimizer is not None:
                self._observe_optimizer(step, optimizer, began)
        if is_new and not self.steps_taken % THINNED_ANEW:
            self._settle()
            self._thin()
        every, looked_at = self.every, self._looked_at
        self._next = step + 1 if self._is_reading else step + min(every - step % every, looked_at - step % looked_at)
        ended = time.perf_counter()
        self.seconds += ended - began
        self._seen = (ended, measuring_seconds)
        return bool(self._errors) or self._in_block >= MOST_STEPS or ended - self._block_began >= LONGEST_WAIT

    def _hold(self, step: int, values: Mapping[str, Any], optimizer: Optimizer | None, now: float) -> bool:
        """Hold numbers of known names, and the learning rate of an optimizer whose norms are not read at this step.

        Returns:
            Whether that is all there is to take; else nothing was held.
        """
        rate: Any = math.nan
        if optimizer is not None:
            if self._is_reading or (step % self.interval == 0 and now >= self._may_read_from):
                return False
            groups = optimizer.param_groups
            rate = groups[0].get("lr")
            if type(rate) is not float or len(groups) > 1 or id(optimizer) not in self._readers:
                return False
        numbers = {}
        for name, value in values.items():
            if type(value) is Tensor and value.is_cpu and value.numel() == 1:
                value = value.item()
            if type(value) is not float or name not in self._columns:
                return False
            numbers[name] = value
        self._held.append((step, numbers, optimizer, rate))
        return True

    def _settle(self) -> None:
        """Put what is held where it belongs; :meth:`_hold` has seen to it that nothing of it is refused."""
        held, self._held = self._held, []
        for step, numbers, optimizer, rate in held:
            for name, number in numbers.items():
                self._add(step, name, number)
            if optimizer is not None:
                self._add(step, self._readers[id(optimizer)].rate_name, rate)

    def leaves_out(self, step: int, values: Collection[str] = ()) -> bool:
        """Whether these values, and the optimizer, are not to be taken at this step, which comes after those taken.

        Args:
            step: Optimizer steps made before.
            values: Names.
        """
        return type(step) is int and self._last_taken < step < self._next and self._at_every_step.issuperset(values)

    def _begin_step(self, step: int) -> None:
        """Count it, and those that were left out before it."""
        gone = step - self._last_taken if self._last_taken < step <= self._next else 1
        self._last_taken = step
        self._steps += gone
        self._in_block += gone
        self.steps_taken += 1

    def _thin(self) -> None:
        """See at which steps to take what comes at every step, and what that is."""
        if self._activity is not None:
            self._looked_at = self._activity.every(self._last_taken)
        if self.training_seconds:
            share = SHARE * self.training_seconds / self._steps
            a_take = max(0.0, UNCOUNTED * self._taking_seconds / self.steps_taken - ASKING)
            for_activity = a_take / self._looked_at if self._looked_at > 1 else 0.0
            allowed = (1 - LEAST_FOR_NORMS) * share - ASKING - for_activity
            self.every = _rounded_up(a_take / max(allowed, LEAST_FOR_NORMS * share))
        often = GIVEN_AT_EVERY_STEP * self.steps_taken
        self._at_every_step = frozenset(name for name, column in self._columns.items() if column.count >= often)

    def look(self) -> None:
        """Tell ``activity`` what was given since the last time, and of learning rates. Waits for devices."""
        activity = self._activity
        if activity is None:
            return
        began = time.perf_counter()
        self._settle()
        for name, column in self._columns.items():
            if name.startswith(NORMS):  # time decides where they are read
                continue
            try:
                news = column.news()
            except RuntimeError as error:  # its device has failed
                self._refuse(name, error)
                continue
            if name == LEARNING_RATE:
                activity.take_rates(*news)
            elif not name.startswith(LEARNING_RATE):
                activity.take(name, *news)
        self.seconds += time.perf_counter() - began

    @property
    def is_due(self) -> bool:
        """Whether a block should be written now."""
        if self._block_began is None or self._seen is None:
            return False
        return self._in_block >= MOST_STEPS or self._seen[0] - self._block_began >= LONGEST_WAIT

    def block(self) -> dict[str, Any] | None:
        """What was gathered since the last block, as the body of a line; None if that is nothing. Waits for devices."""
        self.look()
        began = time.perf_counter()
        self._settle()
        self._block_began, self._in_block = None, 0
        signals = {}
        for name, column in self._columns.items():
            try:
                steps, values = column.taken()
            except RuntimeError as error:  # its device has failed, which must not cost what the line goes with
                self._refuse(name, error)
                continue
            if steps:
                signals[name] = steps, values
        body = pack(signals) if signals else None
        self.seconds += time.perf_counter() - began
        return body

    def errors(self) -> list[tuple[str, Exception]]:
        """What could not be taken since this was asked last, by name; each name is told of once."""
        if not self._errors:
            return []
        told, self._errors = self._errors, []
        return told

    def _add(self, step: int, name: str, value: Any) -> None:
        column = self._columns.get(name)
        if column is None:
            if len(self._columns) >= MOST_SIGNALS:
                error = ValueError(
                    f"{name!r} is left out, and with it every other new name: {MOST_SIGNALS} signals are observed. "
                    "Give fewer, or averages over them."
                )
                self._refuse("more signals", error)
                return
            column = self._columns[name] = _Column()
        try:
            column.add(step, value)
        except (TypeError, ValueError, RuntimeError) as error:
            self._refuse(name, error)

    def _refuse(self, what: str, error: Exception) -> None:
        if what not in self._refused:
            self._refused.add(what)
            self._errors.append((f"observing {what}", error))

    def _meet(self, optimizer: Optimizer) -> UpdateReader:
        which = f"_{len(self._readers)}" if self._readers else ""
        return self._readers.setdefault(id(optimizer), UpdateReader(optimizer, which))

    def _observe_optimizer(self, step: int, optimizer: Optimizer, now: float) -> None:
        reader = self._readers.get(id(optimizer))
        if reader is None:
            reader = self._meet(optimizer)
        for name, rate in reader.learning_rates():
            if rate is not None:
                self._add(step, name, rate)
        begins = step % self.interval == 0 and self._can_afford(reader, now)
        if not (begins or reader.is_waiting) or reader.is_broken:
            return
        began = time.perf_counter()
        try:
            for at, name, value in reader.read(step, begins):
                self._add(at, name, value)
        except Exception as error:
            reader.is_broken = True
            self._refuse(f"the norms of optimizer{reader.which}", error)
        self._is_reading = any(r.is_waiting and not r.is_broken for r in self._readers.values())
        self._keep_to_share(time.perf_counter() - began, reader, begins)

    def _can_afford(self, reader: UpdateReader, now: float) -> bool:
        """Whether reading the norms leaves all within the share, or them within what is theirs in any case.

        Where it does not, it cannot before training has gone on for as long as pays for what is lacking.
        """
        if self._steps <= FIRST_READ:
            return False
        a_read = self._a_read if reader.reads else FIRST_SECONDS
        allowed = SHARE * self.training_seconds
        reading = self._reading_seconds + a_read
        lacking = min(reading + self._others_a_step * self._steps, reading / LEAST_FOR_NORMS) - allowed
        self._may_read_from = now + lacking / SHARE
        return lacking <= 0

    def _keep_to_share(self, host_seconds: float, reader: UpdateReader, begins: bool) -> None:
        """Count what reading took, and choose how often to read from now on."""
        seconds = max(host_seconds, reader.seconds_on_device)
        self.seconds += seconds - host_seconds
        self._reading_seconds += seconds
        if reader.reads < 2 or not self.training_seconds:  # the first also loads what it calls
            return
        if begins:
            self._costs.append(seconds)
        elif self._costs:
            self._costs[-1] += seconds
        a_step = self.training_seconds / self._steps
        affordable = self._a_read / max(SHARE * a_step - self._others_a_step, LEAST_FOR_NORMS * SHARE * a_step)
        self.interval = max(10, _rounded_up(affordable))

    @property
    def _taking_seconds(self) -> float:
        """What was counted beside the norms."""
        return max(0.0, self.seconds - self._reading_seconds)

    @property
    def _others_a_step(self) -> float:
        """Seconds by which all but the norms makes a step longer, in the mean."""
        return (UNCOUNTED * self._taking_seconds + ASKING * (self._steps - self.steps_taken)) / self._steps

    @property
    def _a_read(self) -> float:
        """Seconds that reading the norms of all optimizers takes, as it mostly was of late."""
        return len(self._readers) * statistics.median(self._costs) if self._costs else 0.0


class _Column:
    """The values of one signal since the last block.

    Attributes:
        count: How many there were in all.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._values: list[float] = []
        self._on_device: Tensor | None = None
        self._waiting = 0
        self._told = 0
        self.count = 0

    def add(self, step: int, value: Any) -> None:
        """Take a value.

        Raises:
            TypeError: If it is no number.
            ValueError: If it is a tensor of more or less than one element.
        """
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"a tensor of shape {tuple(value.shape)} was given; expected one number, as its mean")
            if not value.is_cpu:
                self._keep_on_device(step, value)
                return
            value = value.item()
        elif isinstance(value, str):
            raise TypeError(f"{value!r} was given; expected a number")
        number = float(value)
        if self._waiting:
            self._fetch()
        self.count += 1
        self._steps.append(step)
        self._values.append(number)

    def news(self) -> tuple[list[int], list[float]]:
        """The values since the last time that they were asked for, with their steps."""
        if self._waiting:
            self._fetch()
        told, self._told = self._told, len(self._steps)
        return self._steps[told:], self._values[told:]

    def taken(self) -> tuple[list[int], list[float]]:
        """All values with their steps; they are let go of."""
        if self._waiting:
            self._fetch()
        steps, values = self._steps, self._values
        self._steps, self._values, self._told = [], [], 0
        return steps, values

    def _keep_on_device(self, step: int, value: Tensor) -> None:
        if self._on_device is None or self._on_device.device != value.device:
            if self._waiting:
                self._fetch()
            with torch.inference_mode(False):
                self._on_device = torch.empty(FETCHED, dtype=torch.float32, device=value.device)
        with torch.no_grad():
            self._on_device[self._waiting].copy_(value.detach().reshape(()), non_blocking=True)
        self.count += 1
        self._steps.append(step)
        self._waiting += 1
        if self._waiting == FETCHED:
            self._fetch()

    def _fetch(self) -> None:
        """Wait for the device; what it has lost is let go of."""
        waiting, self._waiting = self._waiting, 0
        assert self._on_device is not None
        try:
            self._values += self._on_device[:waiting].tolist()
        except RuntimeError:
            del self._steps[-waiting:]
            raise


def _rounded_up(least: float) -> int:
    """1, 2, 5, 10, 20, 50 ...: the first of these that is no less."""
    return next(many * 10**k for k in count() for many in (1, 2, 5) if many * 10**k >= least)
