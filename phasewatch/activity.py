"""Whether something is under way in a run, by what is observed of it: where to measure more often."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from phasewatch.transitions.events import ABRUPT

WIDTH = math.log(21) / 160
"""Of a block of losses, in log(1 + step/scale): 160 in a run of twenty scales. Chosen."""
SAMPLED = 2.0
"""Times the root of its steps are how many losses of a block are looked at at least, if it has as many; not twice as
many. So reading them costs ever less of a long run, and their mean is ever better known. Chosen."""
BEFORE = (8, 16)
"""Blocks of the stretch before, at least and at most. Chosen."""
NOW = (1, 2, 4)
"""Blocks that are held against it: an abrupt change shows in one, a slow one in four. Chosen."""
CERTAIN = 5.0
"""Standard errors that the loss is off the course of the stretch before. SGD noise about a power law makes that in less
than one of sixty runs, with tails as heavy as Student's t with three degrees of freedom in one of fourteen
(tests/test_activity.py)."""
FASTER = 2.0
"""Times as fast as in the stretch before, in log time. Chosen."""
NOTABLE = 0.02
"""Change of the loss relative to its level: without noise any smaller one would be certain as well. Chosen."""
MOST_FOLLOWED = 10
"""Signals, the first that come: each has false alarms of its own. Chosen."""
LONGEST = 32
"""Blocks after which what was faster is how the run is now: a fifth of it. Chosen."""


@dataclass(frozen=True)
class Block:
    """The mean of some losses, their mean time, and the variance of that mean if their noise is white."""

    time: float
    loss: float
    variance: float


@dataclass
class Open:
    """Sums over the losses of a block that is not complete."""

    count: int = 0
    time: float = 0.0
    loss: float = 0.0
    last: float = 0.0
    differences: float = 0.0

    def add(self, time: float, loss: float) -> None:
        """Take one more."""
        if self.count:
            self.differences += (loss - self.last) ** 2
        self.count, self.last = self.count + 1, loss
        self.time += time
        self.loss += loss

    def block(self) -> Block:
        """What they come to; half the mean square of the differences of neighbours is the variance of white noise."""
        variance = self.differences / (2 * max(self.count - 1, 1))
        return Block(self.time / self.count, self.loss / self.count, variance / self.count)


@dataclass(frozen=True)
class Stretch:
    """The line through the blocks before something is under way, and how well it is known."""

    slope: float
    end: float
    at_end: float
    noise: float
    level: float
    middle: float
    spread: float
    count: int

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Stretch:
        """Fit the line; the noise of a block is what scatters about it, or what scatters within the blocks."""
        t, y = np.array([b.time for b in blocks]), np.array([b.loss for b in blocks])
        middle, spread = t.mean(), ((t - t.mean()) ** 2).sum()
        slope = ((t - middle) * y).sum() / spread
        at_end = y.mean() + slope * (t[-1] - middle)
        scatter = ((y - y.mean() - slope * (t - middle)) ** 2).sum() / (len(t) - 2)
        noise = math.sqrt(max(scatter, np.mean([b.variance for b in blocks])))
        level = float(np.abs(y).mean())
        return cls(float(slope), float(t[-1]), float(at_end), noise, level, float(middle), float(spread), len(t))

    def is_left_by(self, blocks: Sequence[Block]) -> bool:
        """Whether blocks after it move away from where it ended, faster than it did and for certain."""
        time, loss = (sum(b.time for b in blocks) / len(blocks), sum(b.loss for b in blocks) / len(blocks))
        moved, expected = loss - self.at_end, self.slope * (time - self.end)
        error = self.noise * math.sqrt(1 / len(blocks) + 1 / self.count + (time - self.middle) ** 2 / self.spread)
        return self._is_faster(moved, expected) and abs(moved - expected) > CERTAIN * error

    def is_outrun(self, one: Block, other: Block) -> bool:
        """Whether the loss still moves faster from one block to another than in this stretch."""
        moved, expected = other.loss - one.loss, self.slope * (other.time - one.time)
        return self._is_faster(moved, expected) and abs(moved - expected) > 0.5 * CERTAIN * self.noise * math.sqrt(2)

    def _is_faster(self, moved: float, expected: float) -> bool:
        return abs(moved) > FASTER * abs(expected) and abs(moved) > NOTABLE * self.level


class Course:
    """Follows one signal, and says when it last moved faster than before.

    Values are averaged in blocks even in log(1 + step/scale), the time in which measurements are spread. Something is
    under way where the last blocks leave the line through the stretch before, faster than it went on, by more than the
    scatter of the blocks about it explains and by more than 2 % of the level; and as long as the signal keeps moving
    so.

    Attributes:
        last: The last step at which something was under way; None if nothing was yet.
    """

    def __init__(self, scale: float) -> None:
        """Nothing was seen.

        Args:
            scale: Steps from which on time is logarithmic.
        """
        self.last: int | None = None
        self._scale = scale
        self._newest = -1
        self._number = -1
        self._open = Open()
        self._blocks: list[Block] = []
        self._before: Stretch | None = None
        self._lasted = 0

    def take(self, steps: Sequence[int], values: Sequence[float]) -> None:
        """Go on with values at these steps; those that come again, or are not finite, are passed over."""
        for step, value in zip(steps, values, strict=True):
            every = looked_at(step, self._scale)
            # what comes more rarely than that is taken as it comes
            if step <= self._newest or (step % every and step - self._newest < 2 * every) or not math.isfinite(value):
                continue
            time = math.log1p(step / self._scale)
            if int(time / WIDTH) != self._number:
                if self._open.count:
                    self._close()
                self._number = int(time / WIDTH)
            self._newest = step
            self._open.add(time, value)

    def _close(self) -> None:
        """A block is complete: see whether something is under way in it."""
        block, self._open = self._open.block(), Open()
        blocks = self._blocks = [*self._blocks, block][-BEFORE[1] - NOW[-1] :]
        if self._before is None:
            for now in NOW:
                before = blocks[:-now][-BEFORE[1] :]
                if len(before) >= BEFORE[0] and (stretch := Stretch.of(before)).is_left_by(blocks[-now:]):
                    self._before, self._lasted = stretch, 0
                    break
        elif self._lasted >= LONGEST or not self._before.is_outrun(blocks[-3], block):
            self._before, self._blocks = None, [block]
        if self._before is not None:
            self._lasted += 1
            self.last = self._newest

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, in plain Python values."""
        return {
            "last": self.last,
            "scale": self._scale,
            "newest": self._newest,
            "number": self._number,
            "open": asdict(self._open),
            "blocks": [list(asdict(block).values()) for block in self._blocks],
            "before": None if self._before is None else asdict(self._before),
            "lasted": self._lasted,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Course:
        """One that goes on from what :meth:`state_dict` returned."""
        course = cls(state["scale"])
        course.last, course._newest, course._number = state["last"], state["newest"], state["number"]
        course._open = Open(**state["open"])
        course._blocks = [Block(*values) for values in state["blocks"]]
        course._before = None if state["before"] is None else Stretch(**state["before"])
        course._lasted = state["lasted"]
        return course


class Activity:
    """Whether something is under way in a run, by its losses, the metrics that its user gives, and learning rates.

    What is said depends on steps and values alone, not on how they were portioned out or how long anything took.

    Attributes:
        last: The last step at which one of them moved faster than before, or the learning rate changed abruptly; None
            if none did yet.
    """

    def __init__(self, scale: float) -> None:
        """Nothing was seen.

        Args:
            scale: Steps from which on time is logarithmic.
        """
        self._scale = scale
        self._courses: dict[str, Course] = {}
        self._rate: float | None = None
        self._changed: int | None = None  # the learning rate

    @property
    def last(self) -> int | None:
        """The last step at which something was under way."""
        steps = (self._changed, *(course.last for course in self._courses.values()))
        return max((step for step in steps if step is not None), default=None)

    def every(self, step: int) -> int:
        """Of what comes at every step, multiples of so many are looked at."""
        return looked_at(step, self._scale)

    def take(self, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Go on with values of a loss or metric."""
        if name not in self._courses:
            if len(self._courses) >= MOST_FOLLOWED:
                return
            self._courses[name] = Course(self._scale)
        self._courses[name].take(steps, values)

    def take_rates(self, steps: Sequence[int], rates: Sequence[float]) -> None:
        """Go on with learning rates."""
        for step, rate in zip(steps, rates, strict=True):
            if not 0 < rate < math.inf:
                continue
            if self._rate is not None and abs(math.log(rate / self._rate)) > math.log(ABRUPT):
                self._changed = step
            self._rate = rate

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, in plain Python values."""
        courses = {name: course.state_dict() for name, course in self._courses.items()}
        return {"courses": courses, "rate": self._rate, "changed": self._changed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._courses = {name: Course.from_state(own) for name, own in state["courses"].items()}
        self._rate, self._changed = state["rate"], state["changed"]


def looked_at(step: int, scale: float) -> int:
    """Of values that come at every step, multiples of so many are looked at around this one: a power of two."""
    block = (step + scale) * WIDTH
    return int(2 ** max(0, math.floor(math.log2(math.sqrt(block) / SAMPLED))))
