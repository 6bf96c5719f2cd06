"""Whether something is under way in a run, by the losses that training computes: where to measure more often."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from phasewatch.transitions.events import ABRUPT

WIDTH = math.log(21) / 160
"""Of a block of losses, in log(1 + step/scale): 160 in a run of twenty scales."""
SAMPLED = 2.0
"""Times the root of its steps are how many losses of a block are looked at at least, if it has as many; not twice as
many. So reading them costs ever less of a long run, and their mean is ever better known."""
BEFORE = (8, 16)
"""Blocks of the stretch before, at least and at most."""
NOW = (1, 2, 4)
"""Blocks that are held against it: an abrupt change shows in one, a slow one in four."""
CERTAIN = 5.0
"""Standard errors that the loss is off the course of the stretch before. SGD noise alone, with heavy tails too, makes
that in one run of twenty (tests/test_activity.py)."""
FASTER = 2.0
"""Times as fast as in the stretch before, in log time."""
NOTABLE = 0.02
"""Change of the loss relative to its level: without noise any smaller one would be certain as well."""
LONGEST = 32
"""Blocks after which what was faster is how the run is now: a fifth of it."""


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
        fitted = (slope, t[-1], at_end, noise, np.abs(y).mean(), middle, spread)
        return cls(*map(float, fitted), len(t))

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


class Activity:
    """Follows the loss, and says when it last moved faster than before.

    Losses are averaged in blocks even in log(1 + step/scale), the time in which measurements are spread. Something is
    under way where the last blocks leave the line through the stretch before, faster than it went on, by more than the
    scatter of the blocks about it explains and by more than 2 % of the loss; as long as the loss keeps moving so; and
    where the learning rate changes abruptly. What is said depends on steps, losses and learning rates alone, not on how
    they were portioned out, and costs the same at every step.

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
        self._rate: float | None = None

    def every(self, step: int) -> int:
        """The loss is looked at in multiples of so many steps, a power of two."""
        block = (step + self._scale) * WIDTH
        return int(2 ** max(0, math.floor(math.log2(math.sqrt(block) / SAMPLED))))

    def take(self, steps: Sequence[int], losses: Sequence[float]) -> None:
        """Go on with losses at these steps; those that come again, or are not finite, are passed over."""
        for step, loss in zip(steps, losses, strict=True):
            if step <= self._newest or step % self.every(step) or not math.isfinite(loss):
                continue
            time = math.log1p(step / self._scale)
            if int(time / WIDTH) != self._number:
                if self._open.count:
                    self._close()
                self._number = int(time / WIDTH)
            self._newest = step
            self._open.add(time, loss)

    def take_rates(self, steps: Sequence[int], rates: Sequence[float]) -> None:
        """Go on with learning rates."""
        for step, rate in zip(steps, rates, strict=True):
            if not rate > 0:
                continue
            if self._rate is not None and abs(math.log(rate / self._rate)) > math.log(ABRUPT):
                self._is_under_way(step)
            self._rate = rate

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
            self._is_under_way(self._newest)

    def _is_under_way(self, step: int) -> None:
        self.last = step if self.last is None else max(step, self.last)

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
            "rate": self._rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.last, self._scale = state["last"], state["scale"]
        self._newest, self._number = state["newest"], state["number"]
        self._open = Open(**state["open"])
        self._blocks = [Block(*values) for values in state["blocks"]]
        self._before = None if state["before"] is None else Stretch(**state["before"])
        self._lasted, self._rate = state["lasted"], state["rate"]
