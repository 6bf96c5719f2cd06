"""Where a measurement takes long, the state of the first step is kept, and measured when the run has paid for it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phasewatch import price
from phasewatch.estimators import (
    BehavioralCoefficient,
    HessianSpectrum,
    LearningCoefficient,
    Price,
    Reading,
    Size,
    SymmetryLedger,
)
from phasewatch.llc.behavioral import COARSE, FINE
from phasewatch.measure import Probe
from phasewatch.objective import NoOutputsError, Objective
from phasewatch.record import Estimate, Signal, load_run
from phasewatch.record.signals import CATALOGUE
from phasewatch.schedule import Spread, as_schedule
from phasewatch.watch import Monitor, Watch

INPUTS = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
PROBE = [(INPUTS, INPUTS.sum(dim=1, keepdim=True))]
STEP_SECONDS = 1.0
GRADIENT_SECONDS = 1e-3


def half_mean_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


@pytest.fixture(autouse=True)
def clock(monkeypatch: Any) -> Iterator[Any]:
    """Time that only training steps and measurements move; a gradient of a batch takes a millisecond."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr("phasewatch.watch.time", fake)
    monkeypatch.setattr("phasewatch.measuring_time.time", fake)
    monkeypatch.setattr("phasewatch.measure.time", fake)
    monkeypatch.setattr(price.Pace, "of", lambda *_: price.Pace(GRADIENT_SECONDS, GRADIENT_SECONDS))
    for name in ("weight", "zeros_seen", "hessian_seen", "llc_seen"):
        monkeypatch.setitem(CATALOGUE, name, Signal(name, "a number", group="tests", detected=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="phasewatch")
        yield clock


@dataclass(frozen=True)
class Dear:
    """The first weight; takes the seconds that it says it takes."""

    clock: Any
    seconds: float
    name: str = "dear"

    def price(self, size: Size) -> Price:
        return Price(gradients=self.seconds / GRADIENT_SECONDS)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.clock.now += self.seconds
        return Reading({"weight": Estimate(objective.parameters[0].item())})


class Said(list[str]):
    """What a watch says."""

    def __call__(self, text: str) -> None:
        self.append(text)


def make(*estimators: Any, **options: Any) -> Watch:
    module = nn.Linear(3, 1, bias=False)
    nn.init.constant_(module.weight, -1.0)
    settings = {
        "schedule": "auto",
        "max_overhead": 0.1,
        "free_seconds": 0,
        "on_error": "raise",
        "say": Said(),
        **options,
    }
    return Watch(module, PROBE, loss_fn=half_mean_squared_error, estimators=estimators, **settings)


def train(watch: Watch, clock: Any, first: int, stop: int) -> None:
    """The weight is -1 at the start, and after that as large as the step."""
    for step in range(first, stop):
        watch.at(step)
        clock.now += STEP_SECONDS
        with torch.no_grad():
            watch.module.weight.fill_(step + 1.0)  # type: ignore[union-attr, operator]


def expected(steps: Any) -> list[float]:
    return [-1.0 if step == 0 else float(step) for step in steps]


def test_the_first_state_is_measured_when_it_is_paid_and_recorded_before_all_others(clock: Any, tmp_path: Path) -> None:
    """40 s a measurement, a tenth of 4,000 s: with one kept back for the end, step 0 is paid at 800."""
    told: list[int] = []
    watch = make(Dear(clock, 40.0), total_steps=4000, directory=tmp_path)
    listener: Any = SimpleNamespace(
        on_measurement=lambda m: told.append(m.step), on_transitions=lambda *_: None, on_end=id, close=int
    )
    watch.listeners.append(listener)
    train(watch, clock, 0, 790)
    assert not watch.run.measurements and watch.last_taken == 0 and clock.now == 790
    train(watch, clock, 790, 1000)
    (first,) = watch.run.measurements
    assert (first.step, first.value("weight"), first.seconds) == (0, -1.0, 40.0)
    assert 830 <= first.time <= 900
    train(watch, clock, 1000, 4000)
    watch.close(4000)
    weights = load_run(tmp_path).series("weight")
    assert weights.values.tolist() == expected(weights.steps)
    assert told == weights.steps.tolist() == sorted(told)
    assert told[0] == 0 and told[1] >= 1200 and told[-1] == 4000
    assert len(told) == 9 and watch.clock.overhead == pytest.approx(9 * 40 / 4000)
    assert [line.split("allows")[1] for line in watch.say] == [  # type: ignore[attr-defined]
        " about 9; the state of step 0 is kept and measured when that is paid."
    ]


@pytest.mark.parametrize(("seconds", "free", "at_once"), [(4.5, 60, True), (4.5, 8, False), (5.5, 60, False)])
def test_a_measurement_of_up_to_five_seconds_is_made_at_once_where_it_is_paid(
    seconds: float, free: float, at_once: bool, clock: Any
) -> None:
    watch = make(Dear(clock, seconds), total_steps=4000, free_seconds=free)
    measurement = watch.at(0)
    assert (measurement is not None) is at_once
    assert watch.last_taken == 0


def test_without_a_limit_it_is_made_at_once_and_said_before(clock: Any) -> None:
    for options in ({"schedule": 100}, {"max_overhead": None}):
        watch = make(Dear(clock, 40.0), **options)
        assert watch.at(0) is not None
        (said,) = watch.say  # type: ignore[misc]
        assert "a measurement takes about 40 s, and the schedule does not limit the time" in said
    cheap = make(Dear(clock, 4.0), schedule=100)
    cheap.at(0)
    assert not cheap.say


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize(
    ("seconds", "free", "measured"),
    [
        (40, 0, [700]),  # a tenth of 700 s pays for one, which is the end
        (40, 81, [0, 700]),
        (40, 79, [700]),
        (71, 0, []),
        (71, 72, [700]),
    ],
)
def test_what_is_paid_of_start_and_end_is_measured_at_the_end(
    seconds: float, free: float, measured: list[int], block: bool, clock: Any
) -> None:
    watch = make(Dear(clock, seconds), free_seconds=free)
    watch.clock.total_steps = 100_000  # as the plan believes
    if block:
        with watch:
            train(watch, clock, 0, 700)
    else:
        train(watch, clock, 0, 700)
        watch.close(700)
    assert clock.now == 700 + len(measured) * seconds
    assert [(m.step, m.value("weight")) for m in watch.run.measurements] == list(
        zip(measured, expected(measured), strict=True)
    )
    said = " ".join(watch.say)  # type: ignore[arg-type]
    assert ("the state of step 0 cannot be measured" in said) is (measured == [700])
    assert (f"it and the end take about {price.spoken(2 * seconds)}" in said) is (measured == [700])
    assert ("the state of step 0 and the end cannot be measured" in said) is (measured == [])


@pytest.mark.parametrize(
    ("seconds", "measured"),
    [
        (0.5, 34),  # one at nearly every step takes 17 s
        (11.9, 5),
        (25.0, 2),
        (40.0, 1),
        (70.0, 0),
    ],
)
def test_a_trainer_that_stops_after_forty_steps_is_not_held_up(seconds: float, measured: int, clock: Any) -> None:
    """As by default: 60 s are free; a tenth of the training time is 4 s."""
    watch = make(Dear(clock, seconds), total_steps=40, free_seconds=60)
    with warnings.catch_warnings():
        if not measured:
            warnings.filterwarnings("ignore", message="phasewatch: a measurement takes about 70 s")
        train(watch, clock, 0, 40)
    watch.close(40)
    steps = watch.run.series("weight").steps.tolist() if measured else []
    assert clock.now - 40 == pytest.approx(len(steps) * seconds) and clock.now - 40 <= 60
    assert len(steps) == measured or len(steps) > measured > 30
    assert (steps[-1:] == [40]) is (measured > 0) and (0 in steps) is (measured > 1)


@dataclass(frozen=True)
class Slow(Dear):
    """Takes another time than it says."""

    takes: float = 0.0

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.clock.now += self.takes
        return Reading({"weight": Estimate(objective.parameters[0].item())})


def test_where_a_measurement_takes_longer_than_was_said_the_rest_of_the_budget_is_kept(clock: Any) -> None:
    """10 s were said and 35 are taken: no second one is paid by 60 s."""
    watch = make(Slow(clock, 10.0, takes=35.0), total_steps=200, free_seconds=60)
    train(watch, clock, 0, 200)
    watch.close(200)
    assert watch.run.series("weight").steps.tolist() == [0]
    assert clock.now == 235 and "the end cannot be measured: 25 s are left" in watch.say[-1]  # type: ignore[index]


def test_a_run_that_breaks_off_measures_nothing_more(clock: Any) -> None:
    watch = make(Dear(clock, 40.0), total_steps=900)
    with pytest.raises(KeyboardInterrupt), watch:
        train(watch, clock, 0, 100)
        raise KeyboardInterrupt
    assert clock.now == 100 and not watch.run.measurements


def test_asked_to_measure_it_measures_the_first_state_before(clock: Any) -> None:
    watch = make(Dear(clock, 40.0), total_steps=900)
    train(watch, clock, 0, 100)
    found = watch.measure(100)
    assert found is not None and found.value("weight") == 100.0
    assert watch.run.series("weight").values.tolist() == [-1.0, 100.0]


def test_the_whole_first_row_waits_for_the_schedule_without_a_limit(clock: Any) -> None:
    """Two callbacks, one every 50 steps: its step 0 waits for step 50 too, where it makes the other's due."""
    probe = Probe(PROBE, half_mean_squared_error)
    monitors = [
        Monitor((Dear(clock, 40.0),), probe, Spread(0.1)),
        Monitor((HessianSpectrum(num_eigenvalues=1),), probe, as_schedule(50)),
    ]
    module = nn.Linear(3, 1, bias=False)
    nn.init.constant_(module.weight, -1.0)
    watch = Watch.from_monitors(module, monitors, total_steps=4000, on_error="raise", say=Said())
    train(watch, clock, 0, 51)
    assert watch.run.series("weight").steps.tolist() == [0]
    assert watch.run.series("hessian_max").steps.tolist() == [0, 50]


class Stateful(nn.Module):
    """BatchNorm, a tied and a frozen weight, a buffer, and a number that the loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.again = nn.Linear(3, 3)
        self.again.weight = self.body[0].weight
        self.head = nn.Linear(3, 1).requires_grad_(False)
        self.scale = 1.0
        self.seen: dict[str, Tensor] = {}
        self.kept: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.again(self.body(inputs))
        self.seen["last"] = hidden
        return self.scale * self.head(hidden)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_it_is_the_measurement_that_would_have_been_made_at_once(mode: Any, monkeypatch: Any) -> None:
    """To the bit, after everything of the module has changed."""
    estimators = (LearningCoefficient(chains=2, draws=6, burn_in=20), HessianSpectrum(num_eigenvalues=1))

    def run(limit: float | None) -> Any:
        torch.manual_seed(0)
        module = Stateful()
        module(INPUTS).mean().backward()
        module.kept.append(module(INPUTS).sum())
        watch = Watch(
            module,
            PROBE,
            loss_fn=half_mean_squared_error,
            estimators=estimators,
            max_overhead=limit,
            mode=mode,
            free_seconds=1e12,
            on_error="raise",
            say=Said(),
            total_steps=10_000,
        )
        assert (watch.at(0) is None) is (limit is not None)
        module(2 * INPUTS).mean().backward()
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor += 1
        module.scale = 3.0
        module.seen.clear()
        module.train(not module.training)
        modes = [m.training for m in module.modules()]
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        watch.close(1)
        assert [m.training for m in module.modules()] == modes
        assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
        return watch.run.measurements

    monkeypatch.setattr(price.Pace, "of", lambda *_: price.Pace(1.0, 1.0))
    later, at_once = run(1e-6), run(None)
    assert [m.step for m in later] == [m.step for m in at_once] == [0, 1]
    for ours, theirs in zip(later, at_once, strict=True):
        assert ours.estimates.keys() - {"overhead"} == theirs.estimates.keys() - {"overhead"}
        for name in theirs.estimates.keys() - {"overhead"}:
            assert ours.estimates[name] == theirs.estimates[name], name
    assert later[0].value("loss") != later[1].value("loss")


def test_a_checkpoint_without_the_first_state_goes_on_and_says_so(clock: Any, tmp_path: Path) -> None:
    first = make(Dear(clock, 40.0), total_steps=4000, directory=tmp_path)
    train(first, clock, 0, 500)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    assert buffer.tell() < 4096  # no tensor is in it
    buffer.seek(0)
    first.close()
    second = make(Dear(clock, 40.0), total_steps=4000, directory=tmp_path)
    with pytest.warns(UserWarning, match="state of step 0 was kept to be measured later"):
        second.load_state_dict(torch.load(buffer, weights_only=True))
    train(second, clock, 500, 4000)
    second.close(4000)
    run = load_run(tmp_path)
    weights = run.series("weight")
    assert weights.steps[0] >= 800 and weights.steps[-1] == 4000
    assert weights.values.tolist() == expected(weights.steps)
    assert [f["what"] for f in run.failures] == ["resuming"]
    assert not second.say  # it was said before


@dataclass(frozen=True)
class Zeros(SymmetryLedger):
    clock: Any = None
    seconds: float = 50.0
    said: float = 50.0
    name = "zeros"

    def price(self, size: Size) -> Price:
        return Price(gradients=self.said / GRADIENT_SECONDS)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.clock.now += self.seconds
        return Reading({"zeros_seen": Estimate(1.0)})


@dataclass(frozen=True)
class Spectrum(HessianSpectrum):
    clock: Any = None
    name = "hessian"

    def price(self, size: Size) -> Price:
        return Price(gradients=30 / GRADIENT_SECONDS)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.clock.now += 30
        return Reading({"hessian_seen": Estimate(1.0)})


@pytest.mark.parametrize(
    ("steps", "left_out"),
    [
        (12_000, []),
        (8_000, ["zeros"]),
        (3_300, ["zeros", "hessian"]),
        (2_400, ["zeros"]),
        (900, ["zeros", "hessian"]),
    ],
)
def test_what_the_run_cannot_pay_for_is_left_out_and_said(
    steps: int, left_out: list[str], clock: Any, tmp_path: Path
) -> None:
    """120 s in all, 70 s without the zeros, 40 s without the spectrum, in steps / 10 s for eight, or else for three."""
    estimators = (Spectrum(clock=clock), Zeros(clock=clock), Dear(clock, 40.0))
    watch = make(*estimators, total_steps=steps, directory=tmp_path)
    train(watch, clock, 0, steps)
    watch.close(steps)
    run = load_run(tmp_path)
    for name, signal in (("zeros", "zeros_seen"), ("hessian", "hessian_seen")):
        assert (signal in run.names) is (name not in left_out)
    assert run.header["left_out"] == left_out
    assert run.measurements[0].step == 0 and run.measurements[-1].step == steps
    assert watch.clock.overhead <= 0.1
    (said,) = watch.say  # type: ignore[misc]
    assert ("left out are " + ", ".join(left_out) in said) is bool(left_out)
    resumed = make(*estimators, total_steps=steps)
    resumed.load_state_dict(watch.state_dict())
    assert resumed.state_dict()["left_out"] == left_out
    raised = make(*estimators, total_steps=steps, max_overhead=None)
    raised.load_state_dict(watch.state_dict())
    assert raised.state_dict()["left_out"] == []  # another limit is another plan


def test_a_run_that_cannot_pay_for_one_is_told_at_the_start(clock: Any) -> None:
    watch = make(Zeros(clock=clock), Dear(clock, 40.0), total_steps=300)
    with pytest.warns(UserWarning, match="max_overhead=0.27 would pay for the start and the end") as caught:
        train(watch, clock, 0, 11)
    assert len(caught) == 1 and not watch.say and clock.now == 11
    train(watch, clock, 11, 300)
    watch.close(300)
    assert clock.now == 300 and not watch.run.measurements


CHAIN_SECONDS = {COARSE: 20.0, FINE: 28.0}
SEEN = {"both": "llc_seen", "coarse": "llc_coarse_seen", "none": "weight"}


@dataclass(frozen=True)
class Function(BehavioralCoefficient):
    """Ranks take 2 s, coarse chains 20 and fine ones 28; says which of them it has."""

    clock: Any = None

    def price_of_chains(self, size: Size, resolution: float) -> Price:
        return Price(gradients=CHAIN_SECONDS[resolution] / GRADIENT_SECONDS)

    def price_of_ranks(self, size: Size) -> Price:
        return Price(gradients=2 / GRADIENT_SECONDS)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.clock.now += 2 + sum(CHAIN_SECONDS[resolution] for resolution in self.resolutions_sampled)
        return Reading({SEEN[self.sampled]: Estimate(1.0)})


@pytest.mark.parametrize(
    ("steps", "sampled", "left_out"),
    [
        (8_100, "both", []),  # 810 s for eight of 100
        (4_100, "both", ["zeros"]),  # for eight of 50
        (1_700, "both", ["zeros"]),  # for eight of 2, of which three have the chains
        (1_500, "coarse", ["zeros", price.FINE_CHAINS]),  # for eight of 2, of which three have the coarse chains
        (700, "coarse", ["zeros", price.FINE_CHAINS]),  # for three of 22
        (630, "none", ["zeros", price.FINE_CHAINS, price.COARSE_CHAINS]),
    ],
)
def test_chains_go_last_and_only_where_three_measurements_with_them_are_not_paid(
    steps: int, sampled: str, left_out: list[str], clock: Any
) -> None:
    watch = make(Function(clock=clock), Zeros(clock=clock), total_steps=steps, free_seconds=60)
    train(watch, clock, 0, steps)
    watch.close(steps)
    run = watch.run
    assert {"llc_seen", "llc_coarse_seen"} & set(run.names) == {SEEN[sampled]} - {"weight"}
    assert run.header["left_out"] == left_out
    assert len(run.measurements) >= (15 if sampled == "none" else 3) and run.measurements[-1].step == steps
    assert sum(SEEN[sampled] in m.estimates for m in run.measurements) >= 3
    assert watch.clock.overhead <= 0.1
    assert (price.IN_THEIR_PLACE in watch.say[0]) is (sampled == "none")  # type: ignore[index]


@pytest.mark.parametrize("free", [0, 250])
def test_chains_that_are_too_dear_for_eight_are_drawn_in_each_second_or_third(free: float, clock: Any) -> None:
    """2 s, and 48 for the chains: 250 s pay for eight of which four have them, a share in its time or at once."""
    steps = 500 if free else 2_500
    watch = make(Function(clock=clock), total_steps=steps, free_seconds=free)
    train(watch, clock, 0, steps)
    watch.close(steps)
    drawn = ["llc_seen" in m.estimates for m in watch.run.measurements]
    assert len(drawn) >= 8 and drawn[-1]
    assert sum(drawn) >= 4 and not any(one and later for one, later in zip(drawn, drawn[1:-1], strict=False))
    if not free:  # what is cheap waits for no chains
        assert len([m for m in watch.run.measurements if m.step < steps / 4]) >= 3
    assert watch.clock.measuring_seconds == 2 * len(drawn) + 48 * sum(drawn) <= 250
    assert "the chains of λ of the function are drawn in about 4 of them (48 s)" in watch.say[0]  # type: ignore[index]
    assert not watch.run.header["left_out"]
    resumed = make(Function(clock=clock), total_steps=steps, free_seconds=free)
    resumed.load_state_dict(watch.state_dict())
    again, before = resumed.state_dict(), watch.state_dict()
    kept = "chains_in_each", "until_chains", "measured", "prices", "planned_for"
    assert all(again[name] == before[name] for name in kept)


def test_the_end_is_measured_without_what_is_not_paid_any_more(clock: Any) -> None:
    """The start was to take 19 s, and its zeros took 40 instead of 11: of 60 s 12 are left, and the weight takes 8."""
    watch = make(Zeros(clock=clock, seconds=40.0, said=11.0), Dear(clock, 8.0), total_steps=200, free_seconds=60)
    train(watch, clock, 0, 200)
    watch.close(200)
    first, last = watch.run.measurements
    assert [("zeros_seen" in m.estimates, "weight" in m.estimates) for m in (first, last)] == [
        (True, True),
        (False, True),
    ]
    assert clock.now - 200 == 56 and (first.step, last.step) == (0, 200)
    assert first.seconds_by_part["zeros"] == 40
    assert "a measurement takes 48 s; from now on about 8 s, zeros left out." in watch.say[1]  # type: ignore[index]


def test_a_price_that_cannot_be_had_costs_nothing_but_itself(clock: Any) -> None:
    @dataclass(frozen=True)
    class Wrong(Dear):
        def price(self, size: Size) -> Price:
            raise ZeroDivisionError("planted")

    with pytest.warns(UserWarning, match="price failed at step 0 .*planted"):
        watch = make(Wrong(clock, 40.0), total_steps=4000, on_error="warn")
    assert watch.at(0) is not None


def test_a_module_that_cannot_be_copied_is_not_kept_and_trains_on(clock: Any, monkeypatch: Any) -> None:
    def refuse(_: nn.Module) -> None:
        raise TypeError("planted")

    watch = make(Dear(clock, 40.0), total_steps=4000, on_error="warn")
    monkeypatch.setattr("phasewatch.watch.KeptState", refuse)
    with pytest.warns(UserWarning, match="start failed at step 0 .*planted"):
        train(watch, clock, 0, 1)
    train(watch, clock, 1, 4000)
    watch.close(4000)
    steps = watch.run.series("weight").steps
    assert steps[0] >= 800 and steps[-1] == 4000
    np.testing.assert_array_equal(watch.run.series("weight").values, expected(steps))


def test_a_run_that_ends_early_measures_the_end_without_what_others_did_without_at_times(clock: Any) -> None:
    """2 s, half a second for the zeros and 48 for the chains: of 180 s 16 are left.

    What was planned stands: the run may go on.
    """
    watch = make(Function(clock=clock), Zeros(clock=clock, seconds=0.5, said=0.5), total_steps=2_600)
    train(watch, clock, 0, 1_800)
    planned = watch.state_dict()
    watch.close(1_800)
    last = watch.run.measurements[-1]
    assert (last.step, last.seconds, watch.clock.measuring_seconds) == (1_800, 2.5, 6 * 2.5 + 3 * 50.5)
    assert {"weight", "zeros_seen"} <= last.estimates.keys()
    assert "the end is measured without the chains of λ of the function (half" in watch.say[-1]  # type: ignore[index]
    settled = {name: planned[name] for name in ("left_out", "chains_in_each")}
    assert settled == {"left_out": [], "chains_in_each": 2}
    assert settled.items() <= watch.run.header.items() and settled.items() <= watch.state_dict().items()


def test_measurements_of_other_monitors_do_not_count_for_when_chains_are_due(clock: Any) -> None:
    """One every 10 steps beside: chains are drawn in each second of those that can draw any."""
    probe = Probe(PROBE, half_mean_squared_error)
    monitors = [
        Monitor((Function(clock=clock),), probe, Spread(0.1, free_seconds=250)),
        Monitor((HessianSpectrum(num_eigenvalues=1),), probe, as_schedule(10)),
    ]
    module = nn.Linear(3, 1, bias=False)
    nn.init.constant_(module.weight, -1.0)
    watch = Watch.from_monitors(module, monitors, total_steps=500, on_error="raise", say=Said())
    train(watch, clock, 0, 500)
    watch.close(500)
    drawn = ["llc_seen" in m.estimates for m in watch.run.measurements if {"llc_seen", "weight"} & m.estimates.keys()]
    assert not any(one and later for one, later in zip(drawn, drawn[1:-1], strict=False)) and not drawn[0]
    assert sum(drawn) >= 4 and drawn[-1]


def test_where_ranks_are_dearer_than_said_chains_that_are_left_out_are_not_said_to_be_drawn(clock: Any) -> None:
    """70 s in place of 2, and 20 for the coarse chains: 250 s pay for three without, and no three with them."""

    @dataclass(frozen=True)
    class Dearer(Function):
        def read(self, objective: Objective, n: int, seed: int) -> Reading:
            self.clock.now += 68
            return super().read(objective, n, seed)

    watch = make(Dearer(clock=clock), total_steps=2_500)
    train(watch, clock, 0, 2_500)
    watch.close(2_500)
    assert "the chains of λ of the function are drawn in about 4 of them" in watch.say[0]  # type: ignore[index]
    assert "stands in for it) left out." in watch.say[1] and "drawn" not in watch.say[1]  # type: ignore[index]
    assert watch.run.header["chains_in_each"] == 1


def test_where_chains_are_dearer_than_said_the_rest_of_the_run_is_planned_anew_after_the_first(clock: Any) -> None:
    """96 s in place of 48, in 250 s: eight were paid, four of them with both chains; now with the coarse ones."""

    @dataclass(frozen=True)
    class Dearer(Function):
        def read(self, objective: Objective, n: int, seed: int) -> Reading:
            self.clock.now += sum(CHAIN_SECONDS[resolution] for resolution in self.resolutions_sampled)
            return super().read(objective, n, seed)

    watch = make(Dearer(clock=clock), total_steps=2_500)
    train(watch, clock, 0, 2_500)
    watch.close(2_500)
    seen = ["llc_seen" in m.estimates or "llc_coarse_seen" in m.estimates for m in watch.run.measurements]
    assert len(seen) >= 8 and sum(seen) >= 3 and seen[-1]
    assert ["llc_seen" in m.estimates for m in watch.run.measurements].count(True) == 1
    assert watch.run.header["left_out"] == [price.FINE_CHAINS] and watch.clock.measuring_seconds <= 250
    (_, news) = watch.say  # type: ignore[misc]
    assert news.startswith("phasewatch: a measurement takes 1.6 min; from now on about 24 s, ")


def test_training_since_the_last_visit_pays_after_a_checkpoint_too(clock: Any) -> None:
    """The run is cut off at 500 and 700, and stopped by at 10 and 800: one for the lost start is due before 1,200."""
    watch = make(Dear(clock, 40.0), total_steps=4000)
    train(watch, clock, 0, 500)
    for first, stop in ((500, 700), (700, 4000)):
        state = watch.state_dict()
        watch = make(Dear(clock, 40.0), total_steps=4000)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="phasewatch: The state of step 0 was kept")
            warnings.filterwarnings("ignore", message="phasewatch: .* is not there any more")
            watch.load_state_dict(state)
        train(watch, clock, first, stop)
    assert 1100 < watch.run.measurements[0].step < 1200


def test_what_is_requested_at_the_end_has_the_chains_that_are_kept_back_for_it(clock: Any) -> None:
    """2 s, and 48 for the chains, which of 250 s are drawn three times before the end."""
    watch = make(Function(clock=clock), total_steps=500, free_seconds=250)
    train(watch, clock, 0, 500)
    watch.request()
    watch.close(500)
    drawn = ["llc_seen" in m.estimates for m in watch.run.measurements]
    assert sum(drawn) == 4 and drawn[-1] and watch.run.measurements[-1].step == 500
    assert watch.clock.measuring_seconds == 4 * 48 + 2 * len(drawn) <= 250


def test_what_was_left_out_for_a_part_that_cannot_be_measured_is_measured(clock: Any) -> None:
    """2 s, 48 for the chains and 30 for the zeros: of 250 s these are paid by what the function would have taken."""

    @dataclass(frozen=True)
    class Hidden(Function):
        def read(self, objective: Objective, n: int, seed: int) -> Reading:
            raise NoOutputsError("planted")

    watch = make(Hidden(clock=clock), Zeros(clock=clock, seconds=30.0, said=30.0), total_steps=2_500)
    with pytest.warns(UserWarning, match="cannot be measured in this run, all else is .*planted"):
        train(watch, clock, 0, 2_500)
    watch.close(2_500)
    seen = ["zeros_seen" in m.estimates for m in watch.run.measurements]
    assert not seen[0] and all(seen[1:]) and len(seen) >= 8
    assert watch.run.header["left_out"] == [] and watch.clock.measuring_seconds <= 250
    plan, news = watch.say  # type: ignore[misc]
    assert "left out are zeros" in plan
    resumed = make(Hidden(clock=clock), Zeros(clock=clock, seconds=30.0, said=30.0), total_steps=2_500)
    resumed.load_state_dict(watch.state_dict())
    assert resumed.prices == watch.prices and resumed.clock.measurement_seconds == watch.clock.measurement_seconds
    assert "without what cannot be measured; from now on about 30 s, nothing left out." in news


def test_where_training_gets_faster_there_is_a_new_plan(clock: Any) -> None:
    """2 s, 48 for the chains and 10 for the zeros: 500 s pay for eight of 60, but the steps take 170 and not 500."""
    watch = make(Function(clock=clock), Zeros(clock=clock, seconds=10.0, said=10.0), total_steps=2_000)
    for step in range(2_000):
        watch.at(step)
        clock.now += 2.5 if step < 500 else 0.3
    watch.close(2_000)
    plan, *_, last = watch.say  # type: ignore[misc]
    assert "left out" not in plan and "the end is measured without" in last
    assert len(watch.run.measurements) >= 8 and watch.clock.measuring_seconds <= 170
    assert watch.run.header["left_out"] == ["zeros"]
    resumed = make(Function(clock=clock), Zeros(clock=clock, seconds=10.0, said=10.0), total_steps=2_000)
    resumed.load_state_dict(watch.state_dict())
    assert 170 < resumed.state_dict()["planned_seconds"] == watch.state_dict()["planned_seconds"] < 400
