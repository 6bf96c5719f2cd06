"""What a measurement is predicted to take, and what is left out where a run cannot pay for it."""

from __future__ import annotations

from dataclasses import astuple, replace
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
from phasewatch.estimators.enough import ROWS, enough
from phasewatch.objective import Objective
from phasewatch.schedule import Spread
from phasewatch.watch import DEFAULT_ESTIMATORS

FINE, COARSE = price.FINE_CHAINS, price.COARSE_CHAINS
PRICES = {"rest": 1.0, FINE: 6.0, COARSE: 3.0, "zeros": 4.0, "hessian": 3.0, "llc": 2.0}
DEAR = ["zeros", "hessian", "llc"]
ORDER = [*DEAR, FINE, COARSE]


@pytest.mark.parametrize(
    ("budget", "left_out", "each"),
    [
        (152, [], 1),  # eight of everything
        (151, ["zeros"], 1),
        (120, ["zeros"], 1),  # eight without the zeros
        (119, ["zeros", "hessian"], 1),
        (80, DEAR, 1),  # eight with the chains
        (79, ["zeros"], 3),  # eight of 6 s, of which three have the chains
        (75, ["zeros"], 3),
        (74, ["zeros", "hessian"], 2),  # eight of 3 s, of which four have them
        (60, ["zeros", "hessian"], 2),
        (59, ["zeros", "hessian"], 3),
        (51, ["zeros", "hessian"], 3),
        (50, DEAR, 2),
        (43, DEAR, 3),
        (35, DEAR, 3),
        (34, [*DEAR, FINE], 1),  # eight of 4 s, with the coarse chains alone
        (32, [*DEAR, FINE], 1),
        (31, [*DEAR, FINE], 2),
        (17, [*DEAR, FINE], 3),
        (16, [*DEAR, FINE], 1),  # three with the coarse chains, and no room for five without
        (12, [*DEAR, FINE], 1),
        (11, ORDER, 1),  # two with them, or as many as may be without
        (0.5, ORDER, 1),
    ],
)
def test_eight_measurements_come_first_and_three_with_the_chains(budget: float, left_out: list[str], each: int) -> None:
    """1 s, 6 for the fine chains and 3 for the coarse ones, 4, 3 and 2 for what is dear."""
    assert price.too_dear(PRICES, ORDER, budget) == left_out
    assert price.chains_in_each(PRICES, left_out, budget) == each


def test_where_the_fine_chains_are_too_dear_there_may_be_room_for_what_goes_before_them() -> None:
    prices = PRICES | {FINE: 100.0}
    found = [price.too_dear(prices, ORDER, budget) for budget in (104, 103, 71)]
    assert found == [[FINE], ["zeros", FINE], ["zeros", "hessian", FINE]]


@pytest.mark.parametrize(
    ("budget", "left_out"),
    [
        (66, ["llc", FINE]),  # three of 21.9 s with the coarse chains
        (63, [*DEAR, FINE]),  # three of 21
        (62, ["llc", FINE, COARSE]),
        (31, ["llc", FINE, COARSE]),  # sixteen of 1 s, of 1.9 with zeros and spectrum
        (30, ["zeros", "llc", FINE, COARSE]),  # sixteen with the spectrum, which goes later
        (24, ["zeros", "llc", FINE, COARSE]),
        (23, ["hessian", "llc", FINE, COARSE]),  # sixteen with the zeros
        (22, ORDER),
    ],
)
def test_what_is_cheap_does_not_go_with_what_is_dear(budget: float, left_out: list[str]) -> None:
    """1 s, .5 for the spectrum and .4 for the zeros, 2 for λ of the loss; 20 and 90 for the chains."""
    prices = {"rest": 1.0, FINE: 90.0, COARSE: 20.0, "zeros": 0.4, "hessian": 0.5, "llc": 2.0}
    assert price.too_dear(prices, ORDER, budget) == left_out


def test_what_is_left_out_of_one_measurement() -> None:
    found = [price.what_fits(PRICES, ORDER, seconds) for seconds in (19, 18.9, 10, 9.9, 4, 3.9, 1, 0.9)]
    without_chains = ["zeros", "hessian", FINE, COARSE]
    assert found == [[], ["zeros"], DEAR, ["zeros", FINE], ORDER[:-1], without_chains, ORDER, None]


def test_what_is_left_out_in_words() -> None:
    assert price.in_words(["zeros", FINE]) == "zeros, the chains of λ of the function (fine)"
    assert (
        price.in_words(ORDER[2:]) == "llc, the chains of λ of the function (half the effective rank stands in for it)"
    )


def test_what_is_left_out_first_and_what_never() -> None:
    other = BehavioralCoefficient(data="validation")
    everything = [BehavioralCoefficient(), other, LearningCoefficient(), HessianSpectrum(), SymmetryLedger()]
    found = price.may_be_left_out(everything)
    assert found == ["zeros", "hessian", "llc", "llc_behavioral_validation", FINE, COARSE]
    assert price.may_be_left_out([BehavioralCoefficient(sampled="coarse"), SymmetryLedger()]) == ["zeros", COARSE]
    assert price.may_be_left_out([HessianSpectrum(), SymmetryLedger()]) == ["zeros"]
    assert price.may_be_left_out([LearningCoefficient()]) == []
    assert price.may_be_left_out([LearningCoefficient(), ProbeLoss()]) == ["llc"]  # a stranger is never left out
    assert price.may_be_left_out([BehavioralCoefficient(sampled="none"), SymmetryLedger()]) == ["zeros"]


def test_all_that_is_measured_by_default_can_be_left_out() -> None:
    """Else a run that cannot pay for it has to."""
    assert {type(estimator) for estimator in DEFAULT_ESTIMATORS} == {BehavioralCoefficient, *price.LEFT_OUT_FIRST}


def test_the_chains_are_priced_by_themselves_and_left_out_by_a_twin_without() -> None:
    whole, lean = BehavioralCoefficient(), BehavioralCoefficient(sampled="none")
    size, pace = Size(1_482, 1, 512, 512), price.Pace(0.001, 0.002, 0.004, 0.01)
    found = price.predicted([whole], size, pace)
    # four chains: 20 moves to find their start, 200 to settle, three quarters of 1,200 draws; with the coarse ones go
    # 36 products on half of the probe, and 512 in the outputs, of two and a half products with the Hessian
    moved = 4 * (20 + 200 + 900) * 0.004 + 20 * 0.01
    assert found[FINE] == pytest.approx(moved)
    assert found[COARSE] == pytest.approx(moved + 2.5 * (36 + 512) * 0.002)
    coarse = BehavioralCoefficient(sampled="coarse")
    assert price.predicted([coarse], size, pace) == {n: s for n, s in found.items() if n != FINE}
    assert price.predicted([lean], size, pace) == {n: s for n, s in found.items() if n not in (FINE, COARSE)}
    assert found["llc_behavioral"] == pytest.approx(2.5 * 72 * 0.002)
    for one in (whole, coarse, lean):
        seconds = sum(price.predicted([one], size, pace).values()) - found[price.BEFORE_ALL]
        assert pace.seconds(one.price(size)) == pytest.approx(seconds)
    assert price.without(whole, [FINE]) == coarse and price.without(whole, [FINE, COARSE]) == lean
    assert price.without(whole, ["zeros"]) is whole and price.without(coarse, [FINE]) is coarse
    other = BehavioralCoefficient(data="validation")
    assert price.without(other, [FINE, COARSE]) is other
    assert not {FINE, COARSE} & price.predicted([other], size, pace).keys()


def test_what_was_measured_takes_the_place_of_what_was_predicted_part_by_part() -> None:
    prices = {price.BEFORE_ALL: 1.0, FINE: 6.0, COARSE: 3.0, "llc_behavioral": 1.0, "zeros": 4.0, "llc": 5.0}
    took = {"llc_behavioral": 20.0, "zeros": 2.0, "own": 3.0}
    estimators: list[Any] = [BehavioralCoefficient(), SymmetryLedger(), SimpleNamespace(name="own")]
    found = price.measured(prices, estimators, took, 26.0)
    assert found == {
        price.BEFORE_ALL: 1.0,
        FINE: 12.0,  # dearer than was said: at once
        COARSE: 6.0,
        "llc_behavioral": 2.0,
        "zeros": 3.0,  # cheaper: half way
        "llc": 5.0,  # not measured
        "own": 3.0,  # had no price before
    }
    lean = price.measured(prices, [BehavioralCoefficient(sampled="none")], {"llc_behavioral": 2.0}, 3.0)
    assert (lean[FINE], lean[COARSE], lean["llc_behavioral"]) == (6.0, 3.0, 2.0)
    coarse = price.measured(prices, [BehavioralCoefficient(sampled="coarse")], {"llc_behavioral": 8.0}, 9.0)
    assert (coarse[FINE], coarse[COARSE], coarse["llc_behavioral"]) == (6.0, 6.0, 2.0)


def test_prices_grow_with_what_is_asked_for() -> None:
    size = Size(num_parameters=150_000, num_batches=8, samples=64, rows=64)
    estimators: list[Any] = [BehavioralCoefficient(), LearningCoefficient(), HessianSpectrum(), SymmetryLedger()]
    for estimator in estimators:
        once, twice = (estimator.price(replace(size, num_batches=n)) for n in (4, 8))
        assert sum(astuple(once)) > 0
        assert all(more >= less for more, less in zip(astuple(twice), astuple(once), strict=True))
    parts = replace(estimators[0], refined=("a", "b")).price(size)
    assert parts.moves == pytest.approx(3 * estimators[0].price(size).moves)
    # 512 rows are enough for λ of the function: of long sequences, those of a few batches or samples.
    long = BehavioralCoefficient().price(Size(150_000, 32, samples=16, rows=2048))
    assert long == BehavioralCoefficient().price(Size(150_000, 1, samples=16, rows=2048))
    assert long.gradients == BehavioralCoefficient().price(Size(150_000, 1, samples=4, rows=512)).gradients / 4


@pytest.mark.parametrize(
    ("samples", "length", "batches"), [(64, 1, 16), (100, 1, 3), (16, 128, 4), (3, 400, 2), (8, 600, 2)]
)
def test_the_size_knows_how_much_of_a_probe_is_enough(samples: int, length: int, batches: int) -> None:
    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().mean()

    probe = [torch.randn(samples, length, 3) for _ in range(batches)]
    objective = Objective(nn.Linear(3, 2), probe, loss_fn=loss_fn)
    size = price.size_of(objective, batches)
    assert size.batches_of(ROWS) == sum(enough(objective).batch_sizes) / samples


def test_a_price_that_is_none_is_refused_by_name() -> None:
    own = SimpleNamespace(name="own", price=lambda size: 15)
    with pytest.raises(TypeError, match="SimpleNamespace.price returned 15; expected a .*Price"):
        price.predicted([own], Size(100, 1, 10, 10), price.Pace(1.0, 1.0))


def test_seconds_are_counts_times_pace() -> None:
    pace = price.Pace(gradient=0.5, product=2.0)
    assert pace.seconds(Price(10, 3) + Price(2) * 2) == 0.5 * 14 + 2.0 * 3
    found = price.predicted([SymmetryLedger(), ProbeLoss()], Size(100, 1, 10, 10), pace)
    assert set(found) == {price.BEFORE_ALL, "zeros"}  # ProbeLoss says nothing of its price
    assert found["zeros"] == 2.0 * SymmetryLedger().price(Size(100, 1, 10, 10)).products


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
    paces = [price.Pace.of(objective, Size(3, 1, 3, 3), chains=True) for objective in objectives]
    assert paces[0].product == 0.0 and paces[1].product > 0
    assert paces[0].move == 0.0 and paces[1].move > 0 and paces[1].masses > 0
    assert price.Pace.of(objectives[1], Size(3, 1, 3, 3)).move == 0.0
    assert min(pace.gradient for pace in paces) > 0
    assert torch.equal(stream, torch.get_rng_state())


def test_rows_are_positions_where_outputs_are_sequences() -> None:
    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().mean()

    objective = Objective(nn.Linear(3, 2), [torch.randn(5, 7, 3)], loss_fn=loss_fn)
    assert price.size_of(objective, 4) == Size(num_parameters=8, num_batches=4, samples=5, rows=35)


def test_durations_as_people_say_them() -> None:
    said = [price.spoken(s) for s in (0.034, 1.26, 12.4, 89, 150, 1200, 7200, 86_400)]
    assert said == ["0.034 s", "1.3 s", "12 s", "89 s", "2.5 min", "20 min", "2 h", "24 h"]


def plan(whole: float, rest: float, share: float, training: float | None, *left_out: str, free: float = 0.0) -> Any:
    return price.Plan(whole, rest, Spread(share, free_seconds=free), training, left_out, chains=60.0)


@pytest.mark.parametrize(
    ("plan", "kept", "told"),
    [
        (
            plan(40, 40, 0.1, 2400),
            0,
            "a measurement takes about 40 s; max_overhead=0.1 of about 40 min of training allows about 6; the state of "
            "step 0 is kept and measured when that is paid.",
        ),
        (
            plan(40, 25, 0.5, 600, "zeros", "hessian"),
            None,
            "a measurement takes about 25 s; max_overhead=0.5 of about 10 min of training allows about 12; left out "
            "are zeros, hessian, with which it takes 40 s.",
        ),
        (
            plan(2, 2, 0.1, 30),
            0,
            "a measurement takes about 2 s; max_overhead=0.1 of about 30 s of training allows about 1, which is that "
            "of the end.",
        ),
        (
            plan(40, 40, 0.1, None),
            None,
            "a measurement takes about 40 s; max_overhead=0.1 allows one in 6.7 min of training.",
        ),
        (
            plan(1.2, 1.2, 0.1, 120, free=60),
            None,
            "a measurement takes about 1.2 s; free_seconds=60 beside about 2 min of training allow about 50.",
        ),
        (
            plan(100, 2, 0.1, 20, "zeros", FINE, COARSE, free=60),
            None,
            "a measurement takes about 2 s; free_seconds=60 beside about 20 s of training allow about 30; left out are "
            "zeros, the chains of λ of the function (half the effective rank stands in for it), with which it takes "
            "1.7 min; free_seconds=186 or max_overhead=9.3 would pay for 3 with the coarse chains.",
        ),
        (
            plan(100, 62, 1, 900, FINE),
            None,
            "a measurement takes about 62 s; max_overhead=1 of about 15 min of training allows about 14; left out are "
            "the chains of λ of the function (fine), with which it takes 1.7 min.",
        ),
    ],
)
def test_the_line_that_is_told(plan: price.Plan, kept: int | None, told: str) -> None:
    assert not plan.is_beyond_the_run
    assert plan.told(kept) == told


def test_a_run_that_cannot_pay_for_one_is_told_what_would() -> None:
    beyond = plan(350, 100, 0.1, 12, "zeros", "hessian", "llc", free=60)
    assert beyond.is_beyond_the_run
    told = beyond.with_what_mends_it()
    assert "takes about 5.8 min, without zeros, hessian, llc still 1.7 min" in told and "nothing is measured" in told
    assert "free_seconds=200 or max_overhead=17 would pay for the start and the end" in told
    assert plan(350, 100, 17, 12).allowed > 2 and plan(350, 100, 0.1, 12, free=200).allowed == 2


def test_what_would_help_is_said_by_price() -> None:
    told = price.what_would_help({"zeros": 4.0, FINE: 9.0, "rest": 1.0}, Spread(0.1, free_seconds=20), 70.0)
    assert "takes 14 s, of which 9 s the chains of λ of the function (fine) and 4 s zeros" in told
    assert "free_seconds=112 or max_overhead=1.6 would pay" in told and "dearest part takes 5 s" in told
    assert "max_overhead=" not in price.what_would_help({"rest": 1.0}, Spread(0.1), 0.0).split("A transition")[1]

    # a budget that by these prices pays for eight did not: they were higher when it was spent
    told = price.what_would_help({"rest": 14.0}, Spread(0.1, free_seconds=120), 70.0)
    assert "free_seconds=150 or max_overhead=2.1 would pay" in told
