"""What a measurement is going to take, before it is paid, and what is left out where a run cannot pay for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

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
from phasewatch.isolation import isolated
from phasewatch.objective import NoOutputsError, Objective, second_derivatives
from phasewatch.schedule import PROMPT
from phasewatch.transitions.detect import MIN_POINTS

BEFORE_ALL = "the loss on the probe"
"""What is spent beside the estimators: building the objective with its checks, the loss and its gradient."""
LEFT_OUT_FIRST = (SymmetryLedger, HessianSpectrum, LearningCoefficient)
"""In this order; after them λ of the function on other data. That on the probe, or held out, is what stays."""
TRIES, TIMED = 3, 0.3
"""Evaluations of which the shortest counts, since the first one sets things up; none more after so many seconds."""

MANY = 1000
"""Measurements of which it does not matter how many more are allowed."""


@dataclass(frozen=True)
class Pace:
    """Seconds that evaluations of one batch of the probe take.

    Attributes:
        gradient: The gradient of the loss.
        product: A product with its Hessian, the graph of the gradient being there; 0 where there is none.
    """

    gradient: float
    product: float

    @classmethod
    def of(cls, objective: Objective) -> Pace:
        """Time some on the first batch."""
        product = 0.0
        with isolated():
            gradient = _shortest(lambda: objective.gradient(batch=0).sum().item())
            with suppress(Exception):  # what fails here will fail in the measurement, which says so
                product = _shortest(_products(objective))
        return cls(gradient, product)

    def seconds(self, price: Price) -> float:
        """What a price takes."""
        return price.gradients * self.gradient + price.products * self.product


def predicted(estimators: Sequence[Estimator], size: Size, pace: Pace) -> dict[str, float]:
    """Seconds that each estimator will take, by name, and what is spent before all; those that say nothing left out."""
    before_all = Price(3 * size.num_batches + 10)
    found = {BEFORE_ALL: pace.seconds(before_all)}
    found.update({e.name: pace.seconds(e.price(size)) for e in estimators if isinstance(e, Priced)})
    return found


def size_of(objective: Objective, num_batches: int) -> Size:
    """The size of a network and of a probe that has so many batches like the first one of an objective."""
    rows = objective.batch_sizes[0]
    with suppress(NoOutputsError):
        outputs = objective.outputs(objective.parameters, 0)
        rows = max(output.numel() // output.shape[-1] if output.dim() > 1 else output.numel() for output in outputs)
    return Size(objective.num_parameters, num_batches, max(rows, 1))


def may_be_left_out(estimators: Sequence[Estimator]) -> list[str]:
    """Names of the estimators that a run can do without, the first to go first; never all of them."""
    ranked = [(rank, e.name) for e in estimators if (rank := _rank(e)) is not None]
    names = list(dict.fromkeys(name for _, name in sorted(ranked, key=lambda pair: pair[0])))
    return names if any(_rank(e) is None for e in estimators) else names[:-1]


def too_dear(prices: Mapping[str, float], order: Sequence[str], budget: float) -> list[str]:
    """What has to be left out of every measurement for a run to have enough of them.

    Enough are as many as a transition takes, or else the start and the end.

    Args:
        prices: Seconds for each part of a measurement.
        order: What may be left out, the first first.
        budget: Seconds for measuring in the whole run.

    Returns:
        The first of ``order``; all of it where even that is not enough.
    """
    for wanted in (MIN_POINTS, 2):
        for count in range(len(order) + 1):
            left_out = list(order[:count])
            if wanted * sum(seconds for name, seconds in prices.items() if name not in left_out) <= budget:
                return left_out
    return list(order)


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
        rest: The same without what is left out.
        share: Time for measuring as a share of the time for training.
        training: Seconds that training takes in the whole run; None where that is not known.
        left_out: What is left out of every measurement.
    """

    whole: float
    rest: float
    share: float
    training: float | None
    left_out: tuple[str, ...]

    @property
    def allowed(self) -> float:
        """How many measurements the share allows."""
        return math.inf if self.training is None or not self.rest else self.share * self.training / self.rest

    @property
    def is_beyond_the_run(self) -> bool:
        """Whether not even one is within the share, and it takes long."""
        return self.rest > PROMPT and self.allowed < 1

    def told(self, kept: int | None) -> str:
        """What a measurement takes, how many are allowed and what is left out, in a line.

        Args:
            kept: The step whose state is kept to be measured later; None if there is none.
        """
        told = f"a measurement takes about {spoken(self.rest)}; max_overhead={self.share:g} "
        if self.training is None:
            told += f"allows one in {spoken(self.rest / self.share)} of training"
        else:
            told += f"of about {spoken(self.training)} of training allows about {int(min(self.allowed, MANY))}"
            told += " or more" if self.allowed > MANY else ""
            told += " (the start and the end are measured in any case)" if self.allowed < 2 else ""
        if self.left_out:
            told += f"; left out are {', '.join(self.left_out)}, with which it takes {spoken(self.whole)}"
        if kept is not None:
            told += f"; the state of step {kept} is kept and measured when that is paid"
        return f"{told}."

    def with_what_mends_it(self) -> str:
        """That the run cannot pay for one, and what would change that."""
        assert self.training is not None
        without = f", without {', '.join(self.left_out)} still {spoken(self.rest)}" if self.left_out else ""
        return (
            f"a measurement takes about {spoken(self.whole)}{without}: more than max_overhead={self.share:g} of about "
            f"{spoken(self.training)} of training allows in the whole run. The start and the end are measured all the "
            f"same, once training is over. max_overhead={2 * self.rest / self.training:.2g} would pay for these two; "
            "more points take a larger one (None: no limit), a longer run or a smaller probe. Or save checkpoints, and "
            "measure them afterwards with phasewatch.measure.measure."
        )


def _rank(estimator: Estimator) -> int | None:
    for rank, kind in enumerate(LEFT_OUT_FIRST):
        if isinstance(estimator, kind):
            return rank
    if isinstance(estimator, BehavioralCoefficient) and estimator.data:
        return len(LEFT_OUT_FIRST)
    return None


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
