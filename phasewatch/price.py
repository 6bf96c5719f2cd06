"""What a measurement is going to take, before it is paid, and what is left out where a run cannot pay for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import partial

import torch

from phasewatch.estimators import (
    BehavioralCoefficient,
    Estimator,
    HessianSpectrum,
    LearningCoefficient,
    Price,
    Priced,
    Size,
    SymmetryLedger,
)
from phasewatch.estimators.enough import ROWS, enough
from phasewatch.isolation import isolated
from phasewatch.llc import prior_spread
from phasewatch.llc.factored_curvature import FactoredCurvature
from phasewatch.llc.hmc import CHAINS_AT_ONCE_BELOW
from phasewatch.llc.resolved_chains import ResolvedChains
from phasewatch.objective import NoOutputsError, Objective, second_derivatives
from phasewatch.schedule import Spread
from phasewatch.transitions.detect import MIN_POINTS

CHAINS = "the chains of λ of the function"
COARSE_CHAINS, FINE_CHAINS = f"{CHAINS} (coarse)", f"{CHAINS} (fine)"
BEFORE_ALL = "the loss on the probe"
"""What is spent beside the estimators: building the objective with its checks, the loss and its gradient."""
BEFORE_ALL_BATCHES, CHECKS = 1.5, 10
"""For this, gradients of each batch, the loss of each sample being half of one, and of the first batch to check it."""
LEFT_OUT_FIRST = (SymmetryLedger, HessianSpectrum, LearningCoefficient)
"""In this order, all else that is measured by default; after them λ of the function on other data. Of that on the
probe, or held out, the chains go last, the fine ones before the coarse ones; the effective ranks stay."""
IN_THEIR_PLACE = "half the effective rank stands in for it"
LEAST_WITH_CHAINS = 3
"""Measurements with the chains of λ of the function without which these are left out. Chosen."""
AS_MUCH_AGAIN = 2
"""Where no chains are drawn, what is cheap is measured too as long as all of it costs no more than so many times what
stays in any case (a run has half as many points for it at least), and leaves so many times the points that a transition
takes, as prices may be off. Chosen."""
CHAINS_TIMED, MASSES_USED = 4, 2.5
"""Chains that are evaluated together, where any are; and how often a move uses their masses, between the two times of a
draw and the three of the set-up."""
TRIES, TIMED = 3, 0.3
"""Evaluations of which the shortest counts, since the first one sets things up; none more after so many seconds.
Chosen."""

MORE = 1.25
"""Times the budget in force is what is advised at least where that has paid for too few. Chosen."""

MANY = 1000
"""Measurements of which it does not matter how many more are allowed. Chosen."""


@dataclass(frozen=True)
class Pace:
    """Seconds that evaluations take.

    Attributes:
        gradient: The gradient of the loss of one batch of the probe.
        product: A product with its Hessian, the graph of the gradient being there; 0 where there is none.
        move: A move of one chain of λ of the function, on all batches that it looks at; 0 where there are no chains.
        masses: Finding the masses of these chains anew; likewise.
    """

    gradient: float
    product: float
    move: float = 0.0
    masses: float = 0.0

    @classmethod
    def of(cls, objective: Objective, size: Size, chains: bool = False, threads: int | None = None) -> Pace:
        """Time some on the first batches.

        Args:
            objective: The loss on the first batches of the probe.
            size: Of network and probe.
            chains: Whether chains of λ of the function will be drawn.
            threads: Threads of the CPU that will evaluate it; None for as many as there are.
        """
        product = move = masses = 0.0
        with isolated(threads):
            gradient = _shortest(lambda: objective.gradient(batch=0).sum().item())
            with suppress(Exception):  # what fails here will fail in the measurement, which says so
                product = _shortest(_products(objective))
            with suppress(Exception):
                if chains:
                    move, masses = _of_chains(objective, size)
        return cls(gradient, product, move, masses)

    def seconds(self, price: Price) -> float:
        """What a price takes."""
        return sum(count * seconds for count, seconds in zip(astuple(price), astuple(self), strict=True))


def predicted(estimators: Sequence[Estimator], size: Size, pace: Pace) -> dict[str, float]:
    """Seconds that each estimator will take, by name, and what is spent before all; those that say nothing left out.

    The chains of λ of the function stand by themselves.

    Raises:
        TypeError: If one says something else than a price.
    """
    found = {BEFORE_ALL: pace.seconds(Price(BEFORE_ALL_BATCHES * size.num_batches + CHECKS))}
    for estimator in estimators:
        if chains_of(estimator) and isinstance(estimator, BehavioralCoefficient):
            for name, resolution in zip((COARSE_CHAINS, FINE_CHAINS), estimator.resolutions_sampled, strict=False):
                found[name] = pace.seconds(estimator.price_of_chains(size, resolution))
            found[estimator.name] = pace.seconds(estimator.price_of_ranks(size))
        elif isinstance(estimator, Priced):
            found[estimator.name] = pace.seconds(_price_of(estimator, size))
    return found


def _price_of(estimator: Priced, size: Size) -> Price:
    price = estimator.price(size)
    if not isinstance(price, Price):
        raise TypeError(
            f"{type(estimator).__name__}.price returned {price!r}; expected a phasewatch.estimators.Price, such as "
            "Price(gradients=10) * size.num_batches"
        )
    return price


def chains_of(estimator: Estimator) -> tuple[str, ...]:
    """What the chains that an estimator can do without are called, those that go first first."""
    if isinstance(estimator, BehavioralCoefficient) and not estimator.data:
        return (COARSE_CHAINS, FINE_CHAINS)[: len(estimator.resolutions_sampled)][::-1]
    return ()


def without(estimator: Estimator, left_out: Collection[str]) -> Estimator:
    """The same estimator, or its twin that draws fewer chains, or none, where these are left out."""
    chains = chains_of(estimator)
    if not any(name in left_out for name in chains):
        return estimator
    sampled = "none" if COARSE_CHAINS in left_out else "coarse"
    return replace(estimator, sampled=sampled)  # type: ignore[type-var]


def measured(
    prices: Mapping[str, float], estimators: Iterable[Estimator], by_part: Mapping[str, float], seconds: float
) -> dict[str, float]:
    """What parts will take next, after a measurement: what they took, or half way to it where that was less.

    A dear one may come again, and the first of a run sets things up.

    Args:
        prices: Seconds for each part, as expected until now.
        estimators: What was measured.
        by_part: Seconds that the estimators took, by name; chains are in that of their estimator.
        seconds: What the measurement took in all.

    Returns:
        The same with what is expected now; of what was not measured, as before.
    """
    found = dict(prices)
    parts = {e.name: (*chains_of(e), e.name) for e in estimators if e.name in by_part}
    took = {BEFORE_ALL: seconds - sum(by_part[name] for name in parts)}
    for name, seconds_of_it in (took | {name: by_part[name] for name in parts}).items():
        names = parts.get(name, (name,))
        before = sum(prices.get(part, 0.0) for part in names)
        now = max(seconds_of_it, (seconds_of_it + before) / 2)
        for part in names:
            found[part] = now * prices[part] / before if before and part in prices else now / len(names)
    return found


def size_of(objective: Objective, num_batches: int) -> Size:
    """The size of a network and of a probe that has so many batches like the first one of an objective."""
    samples = rows = objective.batch_sizes[0]
    with suppress(NoOutputsError):
        outputs = objective.outputs(objective.parameters, 0)
        rows = max(output.numel() // output.shape[-1] if output.dim() > 1 else output.numel() for output in outputs)
    return Size(objective.num_parameters, num_batches, samples, max(rows, 1))


def may_be_left_out(estimators: Sequence[Estimator]) -> list[str]:
    """Names of the parts that a run can do without, the first to go first; never all of them."""
    ranked = [(rank, e.name) for e in estimators if (rank := _rank(e)) is not None]
    names = list(dict.fromkeys(name for _, name in sorted(ranked, key=lambda pair: pair[0])))
    if not any(_rank(e) is None for e in estimators):
        return names[:-1]
    return [*names, *dict.fromkeys(name for e in estimators for name in chains_of(e))]


def too_dear(prices: Mapping[str, float], order: Sequence[str], budget: float) -> list[str]:
    """What has to be left out of every measurement for a run to have enough of them.

    Enough are as many as a transition takes; of these three at least with the chains of λ of the function, since λ is
    what all this is about (:func:`chains_in_each`), at the coarse resolution alone where both are too dear. Where that
    cannot be, three measurements with them; where not even these are paid, the chains go too. What went before them and
    is cheap comes back: without chains, where it leaves half as many measurements, and twice the number that a
    transition takes.

    Args:
        prices: Seconds for each part of a measurement.
        order: What may be left out, the first first.
        budget: Seconds for measuring in the whole run.

    Returns:
        Some of ``order``; all of it where even that is not enough.
    """

    def are_paid(count: int, drawn: int, left_out: Collection[str]) -> bool:
        chains = of_chains(prices, left_out)
        return count * (together(prices, left_out) - chains) + drawn * chains <= budget

    *with_chains, without = _ways_to_leave_out(order)
    for count in (MIN_POINTS, LEAST_WITH_CHAINS):
        for some in with_chains or [without]:
            for drawn in dict.fromkeys((count, LEAST_WITH_CHAINS)):
                for left_out in some:
                    if are_paid(count, drawn, left_out):
                        return _brought_back(left_out, partial(are_paid, count, drawn))
    most = min(budget / MIN_POINTS / AS_MUCH_AGAIN, AS_MUCH_AGAIN * together(prices, order))
    return _brought_back(order, lambda left_out: together(prices, left_out) <= most)


def _brought_back(left_out: Sequence[str], are_paid: Callable[[Collection[str]], bool]) -> list[str]:
    """The same less what was not too dear, but went before what was; the last to go comes first, chains do not."""
    found = list(left_out)
    for name in reversed(left_out):
        others = [other for other in found if other != name]
        if name not in (COARSE_CHAINS, FINE_CHAINS) and are_paid(others):
            found = others
    return found


def chains_in_each(prices: Mapping[str, float], left_out: Collection[str], budget: float) -> int:
    """1 if the chains of λ of the function are drawn in each measurement, 2 if in each second, 3 in each third.

    So many that a run has as many measurements as a transition takes, where three of these or more have them; else 1.
    """
    chains = of_chains(prices, left_out)
    without_chains = MIN_POINTS * (together(prices, left_out) - chains)
    for each in range(1, MIN_POINTS):
        with_chains = math.ceil(MIN_POINTS / each)
        if with_chains >= LEAST_WITH_CHAINS and without_chains + with_chains * chains <= budget:
            return each
    return 1


def in_words(left_out: Sequence[str]) -> str:
    """What is left out, with what stands in for the chains where there are none."""
    if COARSE_CHAINS not in left_out:
        return ", ".join(left_out)
    others = [name for name in left_out if name not in (COARSE_CHAINS, FINE_CHAINS)]
    return ", ".join([*others, f"{CHAINS} ({IN_THEIR_PLACE})"])


def what_fits(prices: Mapping[str, float], order: Sequence[str], seconds: float) -> list[str] | None:
    """What has to be left out of one measurement for it to take no longer; None where it always does."""
    ways = (left_out for some in _ways_to_leave_out(order) for left_out in some)
    return next((left_out for left_out in ways if together(prices, left_out) <= seconds), None)


def _ways_to_leave_out(order: Sequence[str]) -> list[list[list[str]]]:
    """First those with all chains, then without the fine ones, then without any; in each what is dear goes in order."""
    chains = [name for name in order if name in (FINE_CHAINS, COARSE_CHAINS)]
    dear = [name for name in order if name not in chains]
    return [[[*dear[:k], *chains[:gone]] for k in range(len(dear) + 1)] for gone in range(len(chains) + 1)]


def together(prices: Mapping[str, float], left_out: Collection[str]) -> float:
    """Seconds that a measurement takes without some parts."""
    return sum(seconds for name, seconds in prices.items() if name not in left_out)


def of_chains(prices: Mapping[str, float], left_out: Collection[str]) -> float:
    """Seconds that the chains of λ of the function take of that."""
    return sum(prices.get(name, 0.0) for name in (COARSE_CHAINS, FINE_CHAINS) if name not in left_out)


def what_would_help(prices: Mapping[str, float], budget: Spread, training: float) -> str:
    """What gives a run that got few measurements more of them, by what it costs or saves.

    Args:
        prices: Seconds for each part that is measured.
        budget: The schedule that keeps to one.
        training: Seconds of training in the whole run.
    """
    whole = sum(prices.values())
    dearest = sorted(prices.items(), key=lambda part: -part[1])[:2]
    parts = " and ".join(f"{spoken(seconds)} {name}" for name, seconds in dearest)
    # What the budget in force would have paid for by these prices, it did not: they were higher before.
    enough = max(MIN_POINTS * whole, MORE * budget.budget(training))
    share = f" or max_overhead={enough / training:.2g}" if training else ""
    return (
        f"a measurement takes {spoken(whole)}, of which {parts}; free_seconds={budget.free_seconds:g} and "
        f"max_overhead={budget.max_overhead:g} of {spoken(training)} of training allow no more. A transition takes "
        f"{MIN_POINTS}: free_seconds={math.ceil(enough)}{share} would pay for them; a measurement without the dearest "
        f"part takes {spoken(whole - dearest[0][1])}, and a smaller probe (probe_samples=) less of all."
    )


def spoken(seconds: float) -> str:
    """A duration as people say it."""
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min"), (math.inf, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return "for ever"


@dataclass(frozen=True)
class Plan:
    """What a run pays for.

    Attributes:
        whole: Seconds that a measurement of everything takes.
        rest: The same without what is left out, in the mean.
        budget: The schedule that keeps to one.
        training: Seconds that training takes in the whole run; None where that is not known.
        left_out: What is left out of every measurement.
        chains: Seconds that the chains of λ of the function take, those that are drawn, and the coarse ones where none
            are.
        chains_in_each: They are drawn in one of so many measurements.
    """

    whole: float
    rest: float
    budget: Spread
    training: float | None
    left_out: tuple[str, ...]
    chains: float = 0.0
    chains_in_each: int = 1

    @property
    def allowed(self) -> float:
        """How many measurements the budget allows."""
        if self.training is None or not self.rest:
            return math.inf
        return self.budget.budget(self.training) / self.rest

    @property
    def is_beyond_the_run(self) -> bool:
        """Whether not even one is within the budget."""
        return self.allowed < 1

    def told(self, kept: int | None) -> str:
        """What a measurement takes, how many are allowed and what is left out, in a line.

        Args:
            kept: The step whose state is kept to be measured later; None if there is none.
        """
        share, free = self.budget.max_overhead, self.budget.free_seconds
        assert share is not None
        told = f"a measurement takes about {spoken(self.rest)}; "
        if self.training is None:
            told += f"max_overhead={share:g} allows one in {spoken(self.rest / share)} of training"
            told += f", and free_seconds={free:g} {spoken(free)} of them in any case" if free else ""
        else:
            if share * self.training >= free:
                told += f"max_overhead={share:g} of about {spoken(self.training)} of training allows"
            else:
                told += f"free_seconds={free:g} beside about {spoken(self.training)} of training allow"
            told += f" about {int(min(self.allowed, MANY))}" + (" or more" if self.allowed > MANY else "")
            told += ", which is that of the end" if self.allowed < 2 else ""
        if self.chains_in_each > 1:
            drawn = int(self.allowed / self.chains_in_each)
            told += f"; {CHAINS} are drawn in about {drawn} of them ({spoken(self.chains)})"
        if self.left_out:
            told += f"; left out are {self._left_out}, with which it takes {spoken(self.whole)}"
        if COARSE_CHAINS in self.left_out and self.training is not None:
            enough = self._mended(LEAST_WITH_CHAINS * (self.rest + self.chains))
            told += f"; {enough} would pay for {LEAST_WITH_CHAINS} with the coarse chains"
        if kept is not None and self.allowed >= 2:
            told += f"; the state of step {kept} is kept and measured when that is paid"
        return f"{told}."

    def with_what_mends_it(self) -> str:
        """That the run cannot pay for one, and what would change that."""
        assert self.training is not None
        without = f", without {self._left_out} still {spoken(self.rest)}" if self.left_out else ""
        return (
            f"a measurement takes about {spoken(self.whole)}{without}: more than the larger of "
            f"free_seconds={self.budget.free_seconds:g} and max_overhead={self.budget.max_overhead:g} of about "
            f"{spoken(self.training)} of training allows in the whole run, so nothing is measured. "
            f"{self._mended(2 * self.rest)} would pay for the start and the end; more points take more (max_overhead="
            "None: no limit), a longer run or a smaller probe. Or save checkpoints, and measure them afterwards with "
            "the command phasewatch measure."
        )

    @property
    def _left_out(self) -> str:
        """In words."""
        return in_words(self.left_out)

    def _mended(self, seconds: float) -> str:
        """What would pay for so much."""
        assert self.training is not None
        return f"free_seconds={math.ceil(seconds)} or max_overhead={seconds / self.training:.2g}"


def _rank(estimator: Estimator) -> int | None:
    for rank, kind in enumerate(LEFT_OUT_FIRST):
        if isinstance(estimator, kind):
            return rank
    if isinstance(estimator, BehavioralCoefficient) and estimator.data:
        return len(LEFT_OUT_FIRST)
    return None


def _of_chains(objective: Objective, size: Size) -> tuple[float, float]:
    """Seconds for a move of one chain, and for finding the masses."""
    seen = enough(objective)
    spread, divergence = prior_spread(seen), seen.behavioral()
    at_once = objective.num_parameters <= CHAINS_AT_ONCE_BELOW.get(objective.device.type, 0)
    chains = CHAINS_TIMED if at_once else 1
    sampler = ResolvedChains(divergence, spread, chains, seed=0)
    sampler.begin_at_the_prior()
    sampler.draw(1)  # a program is traced with the first
    move = _shortest(lambda: sampler.draw(1))
    # These chains have not learnt any masses yet, which take their time.
    curvature = FactoredCurvature(list(divergence.parameter_shapes.values()), spread)
    forces = torch.stack([spread] * chains)
    curvature.learn(forces, 1.0)
    masses = _shortest(lambda: curvature.refresh(1.0))
    used = _shortest(lambda: curvature.narrow(forces, 1.0).sum().item())
    batches = math.ceil(size.batches_of(ROWS)) / seen.num_batches
    return (batches * move + MASSES_USED * used) / chains, masses


def _products(objective: Objective) -> Callable[[], float]:
    """Makes a product with the Hessian of the first batch, each from the same graph."""
    vector = objective.parameters.detach().clone().requires_grad_()
    tensors = objective.tensors_at(vector)
    with second_derivatives(), objective.holding(tensors):
        (gradient,) = torch.autograd.grad(objective.loss(vector, 0), vector, create_graph=True)

    def product() -> float:
        with second_derivatives(), objective.holding(tensors):
            (found,) = torch.autograd.grad(gradient, vector, torch.ones_like(vector), retain_graph=True)
        return float(found.sum())

    return product


def _shortest(evaluate: Callable[[], object]) -> float:
    """The least time that an evaluation takes; what is read off the result, the device has finished."""
    shortest, spent = math.inf, 0.0
    for _ in range(TRIES):
        began = time.perf_counter()
        evaluate()
        seconds = time.perf_counter() - began
        shortest, spent = min(shortest, seconds), spent + seconds
        if spent > TIMED:
            break
    return shortest
