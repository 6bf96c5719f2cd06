"""What a measurement is predicted to take, and what is left out where a run cannot pay for it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch import price
from phasewatch.estimators import (
    BehavioralCoefficient,
    HessianSpectrum,
    LearningCoefficient,
    Price,
    ProbeLoss,
    Size,
    SymmetryLedger,
)
from phasewatch.objective import Objective

PRICES = {"rest": 1.0, "zeros": 4.0, "hessian": 3.0, "llc": 2.0}
ORDER = ["zeros", "hessian", "llc"]


@pytest.mark.parametrize(
    ("budget", "left_out"),
    [
        (80, []),  # eight of everything
        (79, ["zeros"]),
        (48, ["zeros"]),  # eight without the zeros
        (47, ["zeros", "hessian"]),
        (24, ["zeros", "hessian"]),
        (8, ORDER),  # eight of what stays
        (7, ["zeros", "hessian"]),  # eight of nothing: the start and the end, of as much as these two can be
        (5, ORDER),
        (2, ORDER),
        (0.5, ORDER),
    ],
)
def test_eight_measurements_come_first_then_the_start_and_the_end(budget: float, left_out: list[str]) -> None:
    assert price.too_dear(PRICES, ORDER, budget) == left_out


def test_what_is_left_out_first_and_what_never() -> None:
    other = BehavioralCoefficient(data="validation")
    everything = [BehavioralCoefficient(), other, LearningCoefficient(), HessianSpectrum(), SymmetryLedger()]
    assert price.may_be_left_out(everything) == ["zeros", "hessian", "llc", "llc_behavioral_validation"]
    assert price.may_be_left_out([HessianSpectrum(), SymmetryLedger()]) == ["zeros"]
    assert price.may_be_left_out([LearningCoefficient()]) == []
    assert price.may_be_left_out([LearningCoefficient(), ProbeLoss()]) == ["llc"]  # a stranger is never left out


def test_prices_grow_with_what_is_asked_for() -> None:
    size = Size(num_parameters=150_000, num_batches=8, rows=64)
    estimators: list[Any] = [BehavioralCoefficient(), LearningCoefficient(), HessianSpectrum(), SymmetryLedger()]
    for estimator in estimators:
        once, twice = (estimator.price(replace(size, num_batches=n)) for n in (4, 8))
        assert once.gradients + once.products > 0
        assert (twice.gradients, twice.products) >= (once.gradients, once.products)
    parts = replace(estimators[0], refined=("a", "b")).price(size)
    assert parts.gradients == pytest.approx(3 * estimators[0].price(size).gradients)
    # 512 rows are enough for λ of the function: of long sequences, those of a few batches.
    long = BehavioralCoefficient().price(Size(150_000, 32, rows=2048))
    assert long == BehavioralCoefficient().price(Size(150_000, 1, rows=2048))


def test_seconds_are_counts_times_pace() -> None:
    pace = price.Pace(gradient=0.5, product=2.0)
    assert pace.seconds(Price(10, 3) + Price(2) * 2) == 0.5 * 14 + 2.0 * 3
    found = price.predicted([SymmetryLedger(), ProbeLoss()], Size(100, 1, 10), pace)
    assert set(found) == {price.BEFORE_ALL, "zeros"}  # ProbeLoss says nothing of its price
    assert found["zeros"] == 2.0 * SymmetryLedger().price(Size(100, 1, 10)).products


def test_the_pace_is_the_shortest_of_the_times_taken(monkeypatch: Any) -> None:
    """Evaluations move the clock: 3 s at first, 0.1 s later; the loss has a product, then none."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(price, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    waits = iter([0.2, 0.1, 0.15])

    def evaluate() -> None:
        clock.now += next(waits)

    assert price._shortest(evaluate) == pytest.approx(0.1)
    assert next(waits) == 0.15  # two took 0.3 s together: enough
    waits = iter([3.0])
    assert price._shortest(evaluate) == pytest.approx(3.0)


def test_the_pace_of_a_loss_without_second_derivative_has_no_products() -> None:
    def linear(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).mean()

    def squared(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().mean()

    module = nn.Linear(3, 1, bias=False)
    objectives = [Objective(module, [torch.eye(3)], loss_fn=loss_fn) for loss_fn in (linear, squared)]
    stream = torch.get_rng_state()
    paces = [price.Pace.of(objective) for objective in objectives]
    assert paces[0].product == 0.0 and paces[1].product > 0
    assert min(pace.gradient for pace in paces) > 0
    assert torch.equal(stream, torch.get_rng_state())


def test_rows_are_positions_where_outputs_are_sequences() -> None:
    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().mean()

    objective = Objective(nn.Linear(3, 2), [torch.randn(5, 7, 3)], loss_fn=loss_fn)
    assert price.size_of(objective, 4) == Size(num_parameters=8, num_batches=4, rows=35)


def test_durations_as_people_say_them() -> None:
    said = [price.spoken(s) for s in (0.034, 1.26, 12.4, 89, 150, 1200, 7200, 86_400)]
    assert said == ["0.034 s", "1.3 s", "12 s", "89 s", "2.5 min", "20 min", "2 h", "24 h"]


@pytest.mark.parametrize(
    ("plan", "kept", "told"),
    [
        (
            price.Plan(40, 40, 0.1, 2400, ()),
            0,
            "a measurement takes about 40 s; max_overhead=0.1 of about 40 min of training allows about 6; the state of "
            "step 0 is kept and measured when that is paid.",
        ),
        (
            price.Plan(40, 25, 0.5, 600, ("zeros", "hessian")),
            None,
            "a measurement takes about 25 s; max_overhead=0.5 of about 10 min of training allows about 12; left out "
            "are zeros, hessian, with which it takes 40 s.",
        ),
        (
            price.Plan(2, 2, 0.1, 30, ()),
            None,
            "a measurement takes about 2 s; max_overhead=0.1 of about 30 s of training allows about 1 (the start and "
            "the end are measured in any case).",
        ),
        (
            price.Plan(40, 40, 0.1, None, ()),
            None,
            "a measurement takes about 40 s; max_overhead=0.1 allows one in 6.7 min of training.",
        ),
    ],
)
def test_the_line_that_is_told(plan: price.Plan, kept: int | None, told: str) -> None:
    assert not plan.is_beyond_the_run
    assert plan.told(kept) == told


def test_a_run_that_cannot_pay_for_one_is_told_what_would() -> None:
    plan = price.Plan(350, 100, 0.1, 12, ("zeros", "hessian", "llc"))
    assert plan.is_beyond_the_run and not price.Plan(4, 4, 0.1, 12, ()).is_beyond_the_run
    told = plan.with_what_mends_it()
    assert "takes about 5.8 min, without zeros, hessian, llc still 1.7 min" in told
    assert "max_overhead=17 would pay for these two" in told
    paid = replace(plan, share=17)
    assert paid.allowed > 2 and math.isclose(replace(plan, share=200 / 12).allowed, 2)
