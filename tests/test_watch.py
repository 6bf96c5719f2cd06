"""The engine in a plain training loop: what fails in it never ends the run, and what it measures is recorded."""

from __future__ import annotations

import copy
import errno
import gc
import os
import shutil
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import phasewatch.listener
from phasewatch.analysis import NOT_BORNE_OUT, Analysis, analyze_run
from phasewatch.estimators import HessianSpectrum, LearningCoefficient, Price, Reading, Size
from phasewatch.measure import Probe
from phasewatch.objective import Objective
from phasewatch.record import Ending, Estimate, Flag, Measurement, RecordError, Run, Transition, load_run
from phasewatch.report import verdict
from phasewatch.schedule import Every, as_schedule
from phasewatch.settings import LISTENING
from phasewatch.transitions import LiveDetector
from phasewatch.watch import Monitor, Watch

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(64, 3, generator=GENERATOR)
TARGETS = INPUTS.sum(dim=1, keepdim=True) + 0.1 * torch.randn(64, 1, generator=GENERATOR)
PROBE = [(INPUTS, TARGETS)]


def half_mean_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


def zeroed() -> nn.Linear:
    module = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


@dataclass
class Weight:
    """The first weight: known at every step."""

    name: str = "weight"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        return Reading({"weight": Estimate(objective.parameters[0].item())})


@dataclass
class Fails:
    """Fails at some steps, counted by its calls."""

    at: Sequence[int]
    error: type[BaseException] = FloatingPointError
    name: str = "fails"
    calls: int = field(default=0)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.calls += 1
        torch.rand(2)
        if self.calls - 1 in self.at:
            raise self.error("planted")
        return Reading({"survived": Estimate(1.0)})


class Dear(Fails):
    """Says that it takes very long."""

    def price(self, size: Size) -> Price:
        return Price(gradients=1e9)


class Listener:
    """Notes what it is told; raises on the kinds of news named."""

    def __init__(self, *raises: str) -> None:
        self.raises = raises
        self.told: list[tuple[str, Any]] = []

    def tell(self, what: str, news: Any = None) -> None:
        self.told.append((what, news))
        if what in self.raises:
            raise RuntimeError(f"planted in {what}")

    def on_resume(self, run: Run) -> None:
        self.tell("resume", run)

    def on_measurement(self, measurement: Measurement) -> None:
        self.tell("measurement", measurement.step)

    def on_transitions(self, step: int, flags: Sequence[Flag], standing: Sequence[Transition]) -> None:
        self.tell("transitions", step)

    def on_end(self, analysis: Analysis) -> None:
        self.tell("end", len(analysis.run.measurements))

    def close(self) -> None:
        self.tell("close")


def train(watch: Watch, steps: int = 40, rate: float = 0.1) -> list[float]:
    """Full-batch gradient descent; the first weight before each step."""
    weights = []
    for step in range(steps + 1):
        watch.at(step)
        weights.append(watch.module.weight[0, 0].item())  # type: ignore[index, union-attr, operator]
        watch.module.zero_grad()
        half_mean_squared_error(watch.module, PROBE[0]).backward()
        with torch.no_grad():
            for p in watch.module.parameters():
                p -= rate * p.grad  # type: ignore[operator]
    return weights


def make(*estimators: Any, **options: Any) -> Watch:
    return Watch(zeroed(), PROBE, loss_fn=half_mean_squared_error, estimators=estimators, **{"schedule": 10, **options})


def unwatched() -> list[float]:
    return train(make(schedule=[1000]))


def test_it_measures_the_weights_as_they_are_before_the_step(tmp_path: Path) -> None:
    listener = Listener()
    with make(Weight(), directory=tmp_path, listeners=[listener]) as watch:
        weights = train(watch)
    run = load_run(tmp_path)
    assert run.series("weight").steps.tolist() == [0, 10, 20, 30, 40]
    assert run.series("weight").values.tolist() == weights[::10]
    assert run.finished and not run.failures
    news = [(what, s) for s in (0, 10, 20, 30, 40) for what in ("measurement", "transitions")]
    assert listener.told == [*news, ("end", 5), ("close", None)]
    assert run.measurements == watch.run.measurements
    assert weights == unwatched()


def test_a_step_is_late_or_skipped() -> None:
    watch = make(Weight())
    measured = [step for step in (0, 7, 13, 14, 19, 20, 55, 56, 60) if watch.at(step) is not None]
    assert measured == [0, 13, 20, 55, 60]


@pytest.mark.parametrize("calls", [[0], [2], range(5)])
def test_warn_warns_once_records_every_failure_and_keeps_the_rest(calls: Sequence[int], tmp_path: Path) -> None:
    fails = Fails(calls)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with make(fails, Weight(), directory=tmp_path, on_error="warn") as watch:
            weights = train(watch)
    assert [str(w.message) for w in caught if "planted" in str(w.message)] == [
        f"phasewatch: fails failed at step {10 * calls[0]} (FloatingPointError: planted). Training goes on; "
        "further failures are only recorded."
    ]
    assert fails.calls == 5
    run = load_run(tmp_path)
    assert [(f["step"], f["what"], f["error"]) for f in run.failures] == [
        (10 * c, "fails", "FloatingPointError: planted") for c in calls
    ]
    assert "in read" in run.failures[0]["traceback"]
    assert run.series("weight").values.tolist() == weights[::10] == unwatched()[::10]
    survived = [m.step for m in run.measurements if "survived" in m.estimates]
    assert survived == [10 * c for c in range(5) if c not in calls]


@dataclass
class Moved:
    """What needs the outputs; the same under two names."""

    name: str = "moved"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        return Reading({self.name: Estimate(float(objective.behavioral().loss(objective.parameters + 1)))})


class LossInside(nn.Linear):
    """Keeps its outputs to itself."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        return 0.5 * (super().forward(inputs) - targets).square().mean()


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_outputs_that_cannot_be_seen_are_told_of_once_with_the_mend(on_error: Any, tmp_path: Path) -> None:
    """At the start, whoever asks for them; all else is measured."""
    module = LossInside(3, 1, bias=False)
    settings: dict[str, Any] = {"schedule": 10, "estimators": (Moved(), Weight(), Moved("again")), "on_error": on_error}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Watch(module, PROBE, loss_fn=lambda m, b: m(*b), directory=tmp_path, **settings) as watch:
            watch.at(0)
            told = [str(w.message) for w in caught if "outputs_fn" in str(w.message)]
            watch.at(10)
    assert len(told) == 1 and "moved cannot be measured in this run, all else is" in told[0]
    assert [str(w.message) for w in caught if "outputs_fn" in str(w.message)] == told
    run = load_run(tmp_path)
    assert run.series("weight").steps.tolist() == [0, 10]
    assert [f["what"] for f in run.failures] == ["moved", "again"]
    given = Watch(
        module,
        PROBE,
        outputs_fn=lambda module, batch: batch[0] @ module.weight.T,
        loss_fn=lambda outputs, batch: 0.5 * (outputs - batch[1]).square().mean(),
        **settings,
    ).measure(0)
    assert given is not None
    # the outputs are X(w + 1) against Xw
    assert given.value("moved") == pytest.approx(0.5 * INPUTS.sum(1).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("calls", [range(30), [*range(6), *range(7, 30)]])
def test_what_fails_again_and_again_is_switched_off_and_said(calls: Sequence[int], tmp_path: Path) -> None:
    fails = Fails(calls)
    with (
        pytest.warns(UserWarning) as caught,
        make(fails, Weight(), directory=tmp_path, on_error="warn", schedule=2) as watch,
    ):
        weights = train(watch)
    tried = 8 if 6 in calls else 7 + 8
    assert fails.calls == tried
    assert [str(w.message) for w in caught if "planted" in str(w.message)][1:] == [
        f"phasewatch: fails has failed in 8 measurements in a row, last at step {2 * (tried - 1)} (FloatingPointError: "
        "planted). It is switched off; all else is measured, and training goes on."
    ]
    run = load_run(tmp_path)
    assert len(run.failures) == tried - (6 not in calls)
    assert run.series("weight").values.tolist() == weights[::2] == train(make(schedule=[1000]))[::2]


def test_disable_does_not_try_again(tmp_path: Path) -> None:
    fails = Fails([1])
    with (
        pytest.warns(UserWarning, match="fails failed at step 10"),
        make(fails, Weight(), directory=tmp_path, on_error="disable") as watch,
    ):
        train(watch)
    assert fails.calls == 2
    run = load_run(tmp_path)
    assert len(run.failures) == 1
    assert [m.step for m in run.measurements if "survived" in m.estimates] == [0]
    assert len(run.series("weight")) == 5


def test_raise_raises_and_the_failure_is_in_the_record(tmp_path: Path) -> None:
    with (
        pytest.raises(FloatingPointError, match="planted"),
        make(Fails([2]), directory=tmp_path, on_error="raise") as watch,
    ):
        train(watch)
    run = load_run(tmp_path)
    assert [f["step"] for f in run.failures] == [20]
    assert [m.step for m in run.measurements] == [0, 10]
    assert run.ending == Ending("exception", "FloatingPointError: planted")  # the context manager closes the record


@pytest.mark.parametrize("on_error", ["warn", "disable"])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_through_at_once_and_leave_a_record(
    on_error: Any, interrupt: type[BaseException], tmp_path: Path
) -> None:
    watch = make(Fails([1], interrupt), Weight(), directory=tmp_path, on_error=on_error)
    state = torch.get_rng_state()
    with pytest.raises(interrupt), watch:
        train(watch)
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == [0]
    assert not run.failures
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_way_to_handle_errors() -> None:
    with pytest.raises(ValueError, match="on_error is 'ignore'; expected 'warn', 'raise' or 'disable'"):
        make(Weight(), on_error="ignore")


@pytest.mark.parametrize("what", ["measurement", "end", "close"])
def test_a_listener_that_raises_harms_neither_the_run_nor_the_others(what: str, tmp_path: Path) -> None:
    broken, sound = Listener(what), Listener()
    with (
        pytest.warns(UserWarning, match=f"Listener failed at step .*planted in {what}"),
        make(Weight(), directory=tmp_path, listeners=[broken, sound]) as watch,
    ):
        weights = train(watch)
    assert [news for told, news in sound.told if told == "measurement"] == [0, 10, 20, 30, 40]
    assert sound.told[-1] == ("close", None)
    assert load_run(tmp_path).series("weight").values.tolist() == weights[::10]
    assert len([f for f in watch.run.failures if f["what"] == "Listener"]) == (5 if what == "measurement" else 1)


def test_a_run_that_diverges_is_recorded_as_failing_and_goes_on(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="objective failed at step 20 .*loss of batch 0 is"),
        make(Weight(), directory=tmp_path, schedule=20) as watch,
    ):
        train(watch, steps=60, rate=1000.0)
    assert {f["what"] for f in load_run(tmp_path).failures} == {"objective"}
    assert [m.step for m in watch.run.measurements] == [0]


def test_a_record_directory_removed_in_mid_run(tmp_path: Path) -> None:
    listener = Listener()
    watch = make(Weight(), directory=tmp_path / "record", listeners=[listener])
    watch.at(0)
    shutil.rmtree(tmp_path / "record")
    with pytest.warns(UserWarning, match="record failed at step 10 .*No such file") as caught:
        weights = train(watch)
        watch.close()
    assert weights == unwatched()
    assert len(caught) == 1
    assert [news for told, news in listener.told if told == "measurement"] == [0, 10, 20, 30, 40]
    assert watch.run.series("weight").values.tolist() == weights[::10]
    assert not (tmp_path / "record").exists()


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: Any) -> None:
    """A full disk takes half a line and refuses the rest; once there is room, nothing is missing."""
    watch = make(Weight(), directory=tmp_path)
    write = os.write
    seen: list[int] = []

    def full(descriptor: int, data: bytes) -> int:
        if not 10 <= watch._last_taken <= 20:
            return write(descriptor, data)
        seen.append(watch._last_taken)
        if len(seen) == 1:
            return write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match="record failed at step 10 .*No space left"), watch:
        weights = train(watch)
    assert set(seen) == {10, 20}
    with pytest.warns(UserWarning, match="1 damaged lines were skipped"):
        run = load_run(tmp_path)
    assert run.series("weight").values.tolist() == weights[::10] == unwatched()[::10]
    assert run.header["num_parameters"] == 3 and run.finished
    assert [(f["step"], f["what"]) for f in run.failures] == [(10, "record"), (20, "record")]


def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot be written"):
        make(Weight(), directory=tmp_path / "file")


def test_settings_that_json_cannot_hold_do_not_harm_the_record(tmp_path: Path) -> None:
    @dataclass
    class Odd(Weight):
        kind: Any = np.float64
        generator: Any = None
        share: Any = np.float32(0.5)

    with make(Odd(), directory=tmp_path, seed=np.int64(3), n=np.int64(64), on_error="raise") as watch:
        train(watch)
    header = load_run(tmp_path).header
    assert (header["seed"], header["n"]) == (3, 64)
    settings = header["monitors"][0]["estimators"]["weight"]
    assert settings["share"] == 0.5 and settings["kind"] == "<class 'numpy.float64'>"


def test_an_error_that_cannot_even_be_recorded_does_not_end_the_run(monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("planted in the journal")

    watch = make(Weight())
    monkeypatch.setattr(watch._journal, "extend", broken)
    with pytest.warns(UserWarning, match="record failed at step 0 .*planted in the journal"):
        assert train(watch) == unwatched()


def test_what_is_not_finite_is_marked(tmp_path: Path) -> None:
    @dataclass
    class Infinite:
        name: str = "infinite"

        def read(self, objective: Objective, n: int, seed: int) -> Reading:
            return Reading({"infinite": Estimate(float("inf")), "finite": Estimate(1.0)})

    make(Infinite(), directory=tmp_path).measure(0)
    (measurement,) = load_run(tmp_path).measurements
    doubts = {name: found.doubts for name, found in measurement.estimates.items() if not found.reliable}
    assert doubts == {"infinite": ("is not finite",)}


def test_a_model_that_does_not_move_has_no_transitions() -> None:
    """60 measurements at a minimum, each with chains of its own; at alpha 1e-4 a flag is a false alarm at that rate."""
    module = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.linalg.lstsq(INPUTS, TARGETS).solution.T)
    estimators = (LearningCoefficient(chains=2, draws=20, burn_in=30), HessianSpectrum(num_eigenvalues=1))
    with Watch(
        module,
        PROBE,
        loss_fn=half_mean_squared_error,
        schedule=1,
        estimators=estimators,
        on_error="raise",
        alpha=1e-4,
    ) as watch:
        for step in range(60):
            watch.at(step)
    assert watch.transitions == [] and not watch.run.transitions
    llc = watch.run.series("llc")
    assert len(llc) == 60 and llc.values.std() > 0  # λ is measured anew each time
    assert watch.run.series("nullity").values.tolist() == [0.0] * 60


def test_a_jump_is_flagged_recorded_and_told(tmp_path: Path) -> None:
    """The counterpart of the model that does not move."""
    listener = Listener()
    module = zeroed()
    with Watch(
        module,
        PROBE,
        loss_fn=half_mean_squared_error,
        schedule=1,
        estimators=(),
        directory=tmp_path,
        on_error="raise",
        listeners=[listener],
    ) as watch:
        noise = torch.Generator().manual_seed(1)
        for step in range(40):
            with torch.no_grad():
                module.weight.fill_(0.0 if step < 20 else 0.9).add_(0.01 * torch.randn(1, 3, generator=noise))
            watch.at(step)
    (transition,) = watch.transitions
    assert transition.start <= 20 <= transition.end + 1
    (recorded,) = load_run(tmp_path).transitions
    assert recorded == transition and recorded.flagged_at is not None
    assert ("transitions", recorded.flagged_at) in listener.told
    assert 20 <= recorded.flagged_at <= 25

    assert watch.analysis is not None and len(watch.analysis.transitions) == 1 and watch.analysis.run.finished

    again = Listener()
    resumed = Watch(module, PROBE, loss_fn=half_mean_squared_error, estimators=(), listeners=[again])
    resumed.load_state_dict(watch.state_dict())
    assert resumed.transitions == [transition]
    ((told, run),) = again.told
    assert told == "resume" and run.transitions == (recorded,)


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("cost", [0.02, 0.3])
def test_the_default_schedule_keeps_its_share_of_the_time(share: float, cost: float, monkeypatch: Any) -> None:
    """A real loop on a clock that only steps (0.01 s) and measurements (``cost``) move."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr("phasewatch.watch.time", fake)
    monkeypatch.setattr("phasewatch.measuring_time.time", fake)

    @dataclass
    class Dear:
        name: str = "dear"

        def read(self, objective: Objective, n: int, seed: int) -> Reading:
            clock.now += cost
            return Reading({"dear": Estimate(cost)})

    steps = 6000
    watch = make(Dear(), schedule="auto", max_overhead=share, free_seconds=0, total_steps=steps)
    for step in range(steps):
        watch.at(step)
        clock.now += 0.01
    watch.close(steps)
    measured = len(watch.run.measurements)
    assert clock.now == pytest.approx(steps * 0.01 + measured * cost)
    assert watch.clock.training_seconds == pytest.approx(steps * 0.01)
    assert watch.clock.measuring_seconds == pytest.approx(measured * cost)
    assert watch.clock.overhead <= share
    assert measured >= 0.5 * min(60, share * steps * 0.01 / cost)
    assert [watch.run.measurements[i].step for i in (0, -1)] == [0, steps]
    assert watch.run.measurements[-1].value("overhead") == pytest.approx(watch.clock.overhead)


def test_what_another_watch_measures_is_no_training(monkeypatch: Any) -> None:
    """Two on one loop, on a clock that only steps (0.01 s) and measurements move."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now)
    for module in ("watch", "measuring_time", "observer"):
        monkeypatch.setattr(f"phasewatch.{module}.time", fake)

    @dataclass
    class Takes:
        cost: float
        name: str = "takes"

        def read(self, objective: Objective, n: int, seed: int) -> Reading:
            clock.now += self.cost
            return Reading({"takes": Estimate(self.cost)})

    watches = {cost: make(Takes(cost), schedule=100) for cost in (5.0, 0.5)}
    for step in range(1_000):
        for watch in watches.values():
            watch.at(step)
            watch.observe(step, loss=1.0)
        clock.now += 0.01
    for cost, watch in watches.items():
        watch.close(1_000)
        assert watch.clock.training_seconds == pytest.approx(10.0)
        assert watch.observer.training_seconds == pytest.approx(9.99)
        assert watch.clock.measuring_seconds == pytest.approx(cost * len(watch.run.measurements))


def test_the_module_its_modes_gradients_and_the_random_streams_are_left_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    module[2].eval()
    half_mean_squared_error(module, PROBE[0]).backward()
    modes = [m.training for m in module.modules()]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    stream = torch.get_rng_state()
    estimators = (LearningCoefficient(chains=2, draws=5, burn_in=20), HessianSpectrum(num_eigenvalues=1))
    watch = Watch(module, PROBE, loss_fn=half_mean_squared_error, estimators=estimators, on_error="raise")
    assert watch.measure(0) is not None
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, module.parameters(), strict=True))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), stream)


def test_continued_from_its_state_it_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    def estimators() -> tuple[Any, ...]:
        return Weight(), LearningCoefficient(chains=2, draws=5, burn_in=20)

    with make(*estimators()) as whole:
        train(whole)
    first = make(*estimators(), directory=tmp_path / "first")
    train(first, steps=24)
    listener = Listener()
    second = make(*estimators(), directory=tmp_path / "second", listeners=[listener])
    second.load_state_dict(first.state_dict())
    second.module = first.module
    for step in range(25, 41):
        second.at(step)
        second.module.zero_grad()
        half_mean_squared_error(second.module, PROBE[0]).backward()
        with torch.no_grad():
            second.module.weight -= 0.1 * second.module.weight.grad  # type: ignore[operator, union-attr]
    second.close()
    assert [told for told, _ in listener.told][0] == "resume"
    resumed = load_run(tmp_path / "second")
    for name in ("weight", "loss", "llc"):
        assert resumed.series(name).steps.tolist() == [0, 10, 20, 30, 40]
        # λ of the loss is NaN where the weights are at no minimum yet.
        np.testing.assert_array_equal(resumed.series(name).values, whole.run.series(name).values)
    assert np.isfinite(resumed.series("llc").values).any()
    assert resumed.header["continues"]["run_id"] == first.run.header["run_id"] != resumed.header["run_id"]
    with pytest.raises(ValueError, match="after the first step"):
        second.load_state_dict(first.state_dict())


class Hasty(LiveDetector):
    """Flags at step 38 what is none, beside what it finds; too late to withdraw it by itself."""

    def update(self, step: float, *arguments: Any, **options: Any) -> list[Flag]:
        said = super().update(step, *arguments, **options)
        if step == 38:
            hasty = Transition(4.0, 8.0, 6.0, (4.0, 8.0), "A", {}, 9.0, 1e-6)
            said = [*said, Flag(99, "flagged", hasty, step)]
            self.flags.append(said[-1])
        return said


def test_what_the_whole_run_does_not_bear_out_is_withdrawn_at_its_end(tmp_path: Path) -> None:
    """A jump at 20 stands; what was flagged at 38 is withdrawn at the end, and the record says why."""
    told: list[Flag] = []
    module = zeroed()
    noise = torch.Generator().manual_seed(1)
    monitor = Monitor((), Probe(PROBE, half_mean_squared_error), Every(1))
    with Watch.from_monitors(
        module, [monitor], detector=Hasty(), directory=tmp_path, on_error="raise", on_transition=told.append
    ) as watch:
        for step in range(40):
            with torch.no_grad():
                module.weight.fill_(0.0 if step < 20 else 0.9).add_(0.01 * torch.randn(1, 3, generator=noise))
            watch.at(step)
        assert len(watch.transitions) == 2
    run = load_run(tmp_path)
    (stands,) = run.transitions
    assert stands.start <= 20 <= stands.end + 1 and watch.transitions == [stands]
    last = run.flags[-1]
    assert (last.number, last.action, last.detected_at, last.why) == (99, "withdrawn", 39, NOT_BORNE_OUT)
    assert told == list(run.flags) and run.finished
    assert verdict(analyze_run(run)).not_borne_out == (38,)


def test_closing_twice_ends_once(tmp_path: Path) -> None:
    listener = Listener()
    with make(Weight(), directory=tmp_path, listeners=[listener]) as watch:
        train(watch)
        watch.close()
    assert [told for told, _ in listener.told].count("end") == 1
    assert (tmp_path / "phasewatch.jsonl").read_text().count('"kind":"end"') == 1


def test_what_is_requested_after_the_last_stop_is_measured_at_the_end() -> None:
    """As where the processes of a run meet at the schedule's stops; nothing is measured twice."""
    watch = make(Weight(), schedule=[1])
    for step in range(3):
        watch.at(step)
    watch.request()
    watch.close(5)
    assert [m.step for m in watch.run.measurements] == [1, 5]
    again = make(Weight(), schedule=[1, 3])
    for step in range(4):
        again.at(step)
    again.request()
    again.close(3)
    assert [m.step for m in again.run.measurements] == [1, 3]


def test_the_end_of_the_block_is_measured_unless_it_ends_in_an_error() -> None:
    """Schedules that measure the end do so one step beyond the last that was asked of; weight k at step k."""
    for fails in (False, True):
        module = zeroed()
        watch = Watch(module, PROBE, loss_fn=half_mean_squared_error, estimators=(Weight(),), max_overhead=None)
        try:
            with watch:
                for step in range(7):
                    watch.at(step)
                    with torch.no_grad():
                        module.weight.fill_(step + 1.0)
                if fails:
                    raise RuntimeError("out of memory")
        except RuntimeError:
            pass
        series = watch.run.series("weight")
        assert series.values.tolist() == series.steps.tolist()
        assert (series.steps[-1] == 7) is not fails


def test_a_signal_of_two_monitors_that_differ_is_in_doubt() -> None:
    """Two callbacks in one trainer, each with a probe of its own: neither replaces the other in silence."""
    module, batches = nn.Linear(2, 1), [torch.randn(8, 2, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]

    def loss_fn(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return module(batch).square().mean()

    for second, reliable in ((0, True), (1, False)):
        monitors = [Monitor((), Probe([batches[k]], loss_fn), as_schedule(1)) for k in (0, second)]
        watch = Watch.from_monitors(module, monitors)
        found = watch.at(0)
        assert found is not None
        assert found.value("loss") == pytest.approx(float(loss_fn(module, batches[0])), rel=1e-6)
        assert found.estimates["loss"].reliable is reliable


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"listeners": print}, "listeners is <built-in function print>; expected a list of listeners"),
        ({"listeners": [print]}, r"listeners is \[<built-in function print>\]; expected a list of listeners"),
        (
            {"listeners": [type("Deaf", (), {"on_measurement": print})()]},
            "expected a list of listeners with on_resume, on_",
        ),
        ({"listeners": [Listener]}, r"listeners is \[<class '.*Listener'>\]; expected a list of listeners"),
        ({"on_transition": "stop"}, "on_transition is 'stop'; expected a function"),
        ({"say": "loudly"}, "say is 'loudly'; expected a function"),
    ],
)
def test_whom_to_tell_is_checked_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(Weight(), **settings)


@pytest.mark.parametrize("step", ["3", 2.5, None, True])
def test_a_step_is_a_whole_number(step: Any) -> None:
    with make(Weight()) as watch:
        for ask in (watch.at, watch.measure):
            with pytest.raises(TypeError, match=f"step is {step!r}; expected a whole number"):
                ask(step)


def test_a_step_at_which_something_is_due_is_a_whole_number() -> None:
    with make(Weight()) as watch:
        watch.at(0)
        watch.at(1)
        with pytest.raises(TypeError, match="step is 10.5; expected a whole number"):
            watch.at(10.5)  # type: ignore[arg-type]
        assert watch.at(11) is not None


def test_a_listener_is_asked_for_every_method_that_is_called() -> None:
    methods = [
        name for name, of in vars(phasewatch.listener.Listener).items() if callable(of) and not name.startswith("_")
    ]
    assert list(LISTENING) == methods


def test_a_watch_that_nobody_holds_is_gone_with_its_network(tmp_path: Path) -> None:
    watch = make(Weight(), directory=tmp_path)
    train(watch)
    watch.close()
    left = [weakref.ref(watch), weakref.ref(watch.module)]
    gc.disable()
    try:
        del watch
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


def test_a_copy_records_what_fails_in_its_own_record() -> None:
    watch = make(Weight())
    watch.at(0)
    other = copy.deepcopy(watch)
    with pytest.warns(UserWarning, match="loss"):
        other.observe(1, loss="none")  # type: ignore[arg-type]
    assert (len(watch.run.failures), len(other.run.failures)) == (0, 1)


def test_a_warning_says_that_it_comes_from_here() -> None:
    with pytest.warns(UserWarning) as caught, make(Fails([0]), Weight(), listeners=[Listener("measurement")]) as watch:
        watch.at(0)
    where = [Path(one.filename).name for one in caught if "planted" in str(one.message)]
    assert where == ["watch.py", "watch.py"]


def test_what_is_not_tried_any_more_is_not_paid_for() -> None:
    """Else a budget would wait for seconds that nothing takes."""
    tried = Dear(range(9), MemoryError), Dear([], name="sound")
    with pytest.warns(UserWarning, match="takes more memory than there is"):
        watch = make(*tried)
        assert {"fails", "sound"} < watch.prices.keys()
        watch.at(0)
    assert "sound" in watch.prices and "fails" not in watch.prices
    assert watch.clock.measurement_seconds == pytest.approx(sum(watch.prices.values()))
