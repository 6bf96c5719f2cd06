"""What a run spends on measuring: which parts of a measurement it can pay for, and how often the chains."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from phasewatch import price
from phasewatch.estimators import Estimator
from phasewatch.monitor import Monitor
from phasewatch.objective import Objective
from phasewatch.record import Measurement
from phasewatch.schedule import Clock, Spread

ORDINALS = {2: "second", 3: "third"}
LESS = 0.8
"""Share of the seconds that were planned with below which there is a new plan: the first steps of a training may be far
slower than the later ones. Chosen."""


class Outlay:
    """The prices of a measurement's parts, and what is left out for them.

    Attributes:
        clock: Where the time went; it is told what a measurement will take.
        left_out: Parts that are not measured, the dearest first.
        chains_in_each: In every so many measurements the chains of λ of the function are drawn.
        until_chains: Measurements until the next with chains.
        measured: Parts of which it is known what they take.
        planned_for: Share and free seconds that it was planned for; None before that.
    """

    def __init__(self, monitors: Sequence[Monitor], clock: Clock) -> None:
        """Nothing is known of prices yet."""
        self._monitors = monitors
        self.clock = clock
        self._prices: dict[str, float] = {}
        self.left_out: list[str] = []
        self.chains_in_each = 1
        self.until_chains = 0
        self.measured: set[str] = set()
        self.planned_for: list[float] | None = None
        self._planned_seconds = 0.0
        self._is_freed = False
        self._expect()

    def predict(self, objectives: Sequence[Objective]) -> None:
        """Time what parts are made of, and reckon what they take.

        Args:
            objectives: Of the monitors.
        """
        pace: price.Pace | None = None
        chains = any(price.chains_of(estimator) for estimator in self._estimators)
        prices: dict[str, float] = {}
        for monitor, objective in zip(self._monitors, objectives, strict=True):
            size = price.size_of(objective, len(monitor.probe.batches))
            pace = pace or price.Pace.of(objective, size, chains, monitor.probe.threads)
            for name, seconds in price.predicted(monitor.estimators, size, pace).items():
                prices[name] = prices.get(name, 0.0) + seconds
        self._prices = prices
        self._expect()

    def take(
        self, measured: Sequence[Estimator], found: Measurement, seconds: float, given_up: Collection[str]
    ) -> bool:
        """Take what a measurement has taken in place of what was predicted.

        Args:
            measured: The estimators that it was made by.
            found: The measurement.
            seconds: What it took in all.
            given_up: Names of estimators that have failed and are not tried any more: they will take nothing.

        Returns:
            Whether it is the first one of a part, or the last, so that the plan may be another.
        """
        known = self.measured & self._prices.keys()
        prices = price.measured(self._prices, measured, found.seconds_by_part, seconds)
        gone = self._parts_of(given_up)
        self._is_freed |= not gone.isdisjoint(prices)
        self._prices = {name: seconds for name, seconds in prices.items() if name not in gone}
        self._expect()
        parts = {part for e in measured if e.name in found.seconds_by_part for part in (e.name, *price.chains_of(e))}
        is_first = not parts <= known
        self.measured |= parts
        return is_first or self._is_freed

    @property
    def prices(self) -> dict[str, float]:
        """Seconds that each part takes, as is known by now; what is left out is not among them."""
        return {name: seconds for name, seconds in self._prices.items() if name not in self.left_out}

    @property
    def budget(self) -> Spread | None:
        """The schedule that allows least time for measuring; None where none limits it."""
        limited = [m.schedule for m in self._monitors if isinstance(m.schedule, Spread) and m.schedule.max_overhead]
        return min(limited, key=_limits, default=None)

    @property
    def has_less(self) -> bool:
        """Whether training is faster than was planned with, so that it pays for less."""
        return self._seconds() < LESS * self._planned_seconds

    @property
    def settled(self) -> dict[str, Any]:
        """What is left out and how often chains are drawn, as the record tells it."""
        return {"left_out": list(self.left_out), "chains_in_each": self.chains_in_each}

    def plan(self) -> price.Plan | None:
        """Leave out what is too dear for the run; None where there is nothing to plan by, or it was done."""
        budget, clock = self.budget, self.clock
        if budget is None or not (clock.steps and clock.training_seconds) or self.planned_for is not None:
            return None
        self.planned_for = _limits(budget)
        training = None if clock.total_steps is None else clock.step_seconds * clock.total_steps
        if training is not None:
            self._planned_seconds = self._seconds()
            self.leave_out(*self._paid_by(self._planned_seconds, self.left_out, self.chains_in_each))
        return price.Plan(
            whole=sum(self._prices.values()),
            rest=clock.measurement_seconds,
            budget=budget,
            training=training,
            left_out=tuple(self.left_out),
            chains=price.of_chains(self._prices, self.left_out) or self._prices.get(price.COARSE_CHAINS, 0.0),
            chains_in_each=self.chains_in_each,
        )

    def plan_again(self) -> str:
        """Now that it is known what a part takes, leave out what is too dear after all, and say so.

        Where one is given up, what was left out for it is measured.
        """
        clock = self.clock
        if self.budget is None or clock.total_steps is None or not self.planned_for:
            return ""
        took, self._planned_seconds = clock.end_seconds, self._seconds()
        before = ([], 1) if self._is_freed else (self.left_out, self.chains_in_each)
        given_up, self._is_freed = " without what cannot be measured" if self._is_freed else "", False
        parts, chains_in_each = self._paid_by(self._planned_seconds, *before)
        if (parts, chains_in_each) == (self.left_out, self.chains_in_each):
            return ""
        self.leave_out(parts, chains_in_each)
        rarely = f", {price.CHAINS} drawn in each {ORDINALS[chains_in_each]}" if chains_in_each > 1 else ""
        return (
            f"a measurement takes {price.spoken(took)}{given_up}; from now on about "
            f"{price.spoken(clock.measurement_seconds)}, {price.in_words(parts) or 'nothing'} left out{rarely}."
        )

    def leave_out(self, parts: list[str], chains_in_each: int = 1) -> None:
        """Measure these no more, and draw the chains of λ of the function in the last of each so many measurements.

        Where they are due and not paid yet, one that is planned by then goes without them.
        """
        self.left_out, self.chains_in_each = parts, chains_in_each
        self.until_chains = chains_in_each - 1
        self._expect()

    def what_fits(self, seconds: float) -> list[str] | None:
        """What to leave out of one measurement that may take so long; None where even the rest would take longer."""
        more = price.what_fits(self.prices, [name for name in self._dear if name not in self.left_out], seconds)
        return None if more is None else self._in_order({*more, *self.left_out})

    def draws_chains(self, monitors: Sequence[Monitor]) -> bool:
        """Whether the chains of λ of the function are due in the next measurement, and paid."""
        if self.chains_in_each == 1:
            return True
        return self.until_chains <= 0 and all(m.pays(self.clock.due_seconds, self.clock) for m in monitors)

    def count(self, monitors: Sequence[Monitor], left_out_at_the_end: Collection[str] | None = None) -> set[str]:
        """Count a measurement with chains or without; what is left out of it.

        Args:
            monitors: What is measured; where none can draw chains, those are due no sooner for it.
            left_out_at_the_end: What is not paid for at the end, where chains are drawn else; None before the end.
        """
        chains = {
            name for monitor in monitors for estimator in monitor.estimators for name in price.chains_of(estimator)
        }
        left_out = {*self.left_out, *(left_out_at_the_end or ())}
        if left_out_at_the_end is None and not self.draws_chains(monitors):
            left_out |= {price.COARSE_CHAINS, price.FINE_CHAINS}
        if chains:
            self.until_chains = self.chains_in_each - 1 if chains - left_out else self.until_chains - 1
        return left_out

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "planned_for": self.planned_for,
            "planned_seconds": self._planned_seconds,
            **self.settled,
            "until_chains": self.until_chains,
            "measured": sorted(self.measured),
            "prices": dict(self._prices),
        }

    def load_state_dict(self, state: Mapping[str, Any], clock: Clock) -> None:
        """Go on from there; what was left out stays so under the same budget only."""
        if state["planned_for"] == ([] if self.budget is None else _limits(self.budget)):
            self.planned_for, self.left_out = state["planned_for"], list(state["left_out"])
            self._planned_seconds = state["planned_seconds"]
            self.chains_in_each, self.until_chains = state["chains_in_each"], state["until_chains"]
        self.clock = clock
        self.measured = set(state["measured"])
        given_up = self._parts_of(self.measured - state["prices"].keys())  # had no price any more
        self._prices = {name: seconds for name, seconds in self._prices.items() if name not in given_up}
        self._prices.update(state["prices"])
        self._expect()

    @property
    def _estimators(self) -> list[Estimator]:
        return [estimator for monitor in self._monitors for estimator in monitor.estimators]

    def _seconds(self) -> float:
        """For measuring, in the whole run, by what a step takes; without end where that is not limited or known."""
        budget, clock = self.budget, self.clock
        if budget is None or clock.total_steps is None:
            return math.inf
        return budget.budget(clock.step_seconds * clock.total_steps)

    def _parts_of(self, names: Collection[str]) -> set[str]:
        """The estimators of these names, and their chains."""
        return {part for e in self._estimators if e.name in names for part in (e.name, *price.chains_of(e))}

    @property
    def _dear(self) -> list[str]:
        """What may be left out, the first to go first."""
        return price.may_be_left_out(self._estimators)

    def _paid_by(self, seconds: float, left_out: Sequence[str], chains_in_each: int) -> tuple[list[str], int]:
        """What to leave out of a run that may measure for so long, and how often chains are drawn.

        Args:
            seconds: For measuring, in the whole run.
            left_out: What is left out in any case.
            chains_in_each: No more often than this are chains drawn.
        """
        parts = self._in_order({*price.too_dear(self._prices, self._dear, seconds), *left_out} & self._prices.keys())
        if price.COARSE_CHAINS in parts:
            return parts, 1
        return parts, max(price.chains_in_each(self._prices, parts, seconds), chains_in_each)

    def _in_order(self, parts: Collection[str]) -> list[str]:
        return [name for name in self._dear if name in parts]

    def _expect(self) -> None:
        """Tell the clock what a measurement will take."""
        whole = price.together(self._prices, self.left_out)
        chains = price.of_chains(self._prices, self.left_out) if self.chains_in_each > 1 else 0.0
        self.clock.measurement_seconds = whole - chains * (1 - 1 / self.chains_in_each)
        self.clock.next_seconds = whole - chains if self.until_chains > 0 else whole
        self.clock.end_seconds, self.clock.least_seconds = whole, whole - chains


def _limits(budget: Spread) -> list[float]:
    """The share and the free seconds that it keeps to, as a checkpoint holds them."""
    return [budget.max_overhead or math.inf, budget.free_seconds]
