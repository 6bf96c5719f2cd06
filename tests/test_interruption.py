"""Signals in a measurement: it stops soon, nothing is torn, and a run that goes on is as if it had not been stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch.analysis import analyze_run
from phasewatch.estimators import BehavioralCoefficient, Estimator, HessianSpectrum, Reading
from phasewatch.interruption import Interrupted, held_back, safe_point
from phasewatch.objective import Objective
from phasewatch.objective.vectorized import Vectorized
from phasewatch.record import NOT_CLOSED, Ending, Estimate, Journal, Run, load_run
from phasewatch.report import write_report
from phasewatch.watch import Watch

pytestmark = pytest.mark.filterwarnings("ignore:phasewatch. the catalogue has no row")

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(16, 3, generator=GENERATOR), torch.randn(16, 1, generator=GENERATOR)) for _ in range(2)]


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


@pytest.fixture(autouse=True, scope="module")
def ctrl_c_raises() -> None:
    """In the background of a shell Ctrl-C is ignored from the start, and Python then leaves it so."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def arrived() -> Iterator[list[int]]:
    """What comes to handlers that let the run go on."""
    seen: list[int] = []
    held = [signal.SIGTERM, signal.SIGUSR1]
    before = [signal.signal(signum, lambda number, _: seen.append(number)) for signum in held]
    yield seen
    for signum, handler in zip(held, before, strict=True):
        signal.signal(signum, handler)


@dataclass
class Evaluates:
    """Evaluates the loss a hundred times, and sends a signal after some of them in one measurement."""

    signum: int | None = None
    in_measurement: int = 1
    after: int = 7
    name: str = "evaluates"
    measurements: int = field(default=0)
    evaluations: int = field(default=0)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.evaluations = 0
        for k in range(100):
            if self.signum is not None and self.measurements == self.in_measurement and k == self.after:
                self.measurements += 1
                signal.raise_signal(self.signum)
            torch.rand(1)
            value = objective.loss()
            self.evaluations += 1
        self.measurements += 1
        return Reading({"evaluated": Estimate(float(value))})


def watched(
    estimator: Estimator,
    directory: Path | None,
    steps: int = 6,
    check: Callable[[int], Any] = lambda step: None,
    schedule: int = 1,
) -> tuple[Watch, list[Tensor]]:
    """Train with a step of SGD that draws random numbers; the weights and the state of the stream after each."""
    torch.manual_seed(3)
    module = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    states = []
    with Watch(
        module,
        BATCHES,
        loss_fn=loss_fn,
        schedule=schedule,
        estimators=[estimator],
        directory=directory,
        say=lambda text: None,
        on_error="raise",
    ) as watch:
        for step in range(steps):
            watch.at(step)
            check(step)
            optimizer.zero_grad()
            (loss_fn(module, BATCHES[step % 2]) + module.weight.sum() * torch.randn(())).backward()
            optimizer.step()
            states += [module.weight.detach().clone(), torch.get_rng_state()]
    return watch, states


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_measurement_stops_within_one_evaluation_and_the_run_goes_on_alike(
    signum: int, arrived: list[int], tmp_path: Path
) -> None:
    _, states = watched(estimator := Evaluates(signum), tmp_path, steps=3)
    assert estimator.evaluations == 100 and arrived == [signum]
    whole, others = watched(Evaluates(), None, steps=3)
    assert all(map(torch.equal, states, others))
    run = load_run(tmp_path)
    assert run.finished and not run.damaged and not run.gaps
    assert [m.step for m in run.measurements] == [0, 2]
    assert [(f["step"], f["what"]) for f in run.failures] == [(1, "measurement")]
    assert f"stopped by {signal.Signals(signum).name}" in run.failures[0]["error"]
    kept = [m for m in whole.run.measurements if m.step != 1]
    assert [m.estimates["evaluated"] for m in run.measurements] == [m.estimates["evaluated"] for m in kept]


def test_what_is_stopped_is_not_evaluated_once_more(arrived: list[int]) -> None:
    estimator = Evaluates(signal.SIGTERM)
    counted = []
    watched(estimator, None, steps=2, check=lambda step: counted.append((estimator.evaluations, list(arrived))))
    assert counted == [(100, []), (7, [signal.SIGTERM])]  # the handler was called when the measurement was over


def test_ctrl_c_raises_and_every_view_says_how_the_run_ended(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        watched(Evaluates(signal.SIGINT), tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == [0] and not run.finished
    assert run.ending == Ending("interrupted", "KeyboardInterrupt")
    analysis = analyze_run(run)
    assert analysis.to_dict()["ending"] == {"how": "interrupted", "error": "KeyboardInterrupt"}
    page = write_report(analysis, tmp_path / "report").html.read_text()
    assert "The run was interrupted (Ctrl-C)." in page and "was not closed" not in page


def test_ctrl_c_while_the_end_is_measured(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        watched(Evaluates(signal.SIGINT, in_measurement=2), tmp_path, steps=4, schedule=2)
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == [0, 2]
    assert run.ending is not None and run.ending.how == "interrupted"


class Reads:
    """Reads the record that it will stand in, as a run that is killed in its first measurement leaves it."""

    name = "reads"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.found: list[Run] = []

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.found.append(load_run(self.directory))
        return Reading({})


def test_a_run_killed_in_its_first_measurement_is_an_empty_run(tmp_path: Path) -> None:
    watched(estimator := Reads(tmp_path), tmp_path, steps=1)
    run = estimator.found[0]
    assert run.header["num_parameters"] == 4 and not run.measurements
    assert run.told_ending == NOT_CLOSED
    assert "holds no usable measurement" in str(analyze_run(run).note)


class Twice:
    """Presses Ctrl-C twice; the second is not waited for."""

    name = "twice"
    came_back = False

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        self.came_back = True
        return Reading({})


def test_ctrl_c_pressed_twice_does_not_wait_for_a_safe_point(tmp_path: Path) -> None:
    estimator = Twice()
    with pytest.raises(KeyboardInterrupt):
        watched(estimator, tmp_path)
    assert not estimator.came_back
    assert not load_run(tmp_path).finished


@pytest.mark.parametrize("call", [1, 3, 7])
def test_the_spectrum_stops_within_one_product(call: int, arrived: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, torch.autograd, "grad", call)
    watched(HessianSpectrum(), None, steps=1, check=lambda step: calls.append(-1))
    assert calls.index(-1) == call  # no call between the signal and the end of the measurement
    assert arrived == [signal.SIGTERM]


@pytest.mark.parametrize("call", [2, 60])
def test_chains_stop_within_one_step(call: int, arrived: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, Vectorized, "_at_once", call)
    estimator = BehavioralCoefficient(chains=2, draws=40, burn_in=20)
    watched(estimator, None, steps=1, check=lambda step: calls.append(-1))
    assert calls.index(-1) == call
    assert arrived == [signal.SIGTERM]


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, last: int) -> list[int]:
    """Number the calls of a function in measurements, and send SIGTERM at the end of one of them."""
    calls: list[int] = []
    called = getattr(owner, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        found = called(*arguments, **options)
        if signal.getsignal(signal.SIGTERM).__module__ == "phasewatch.interruption":
            calls.append(len(calls))
            if len(calls) == last:
                signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_a_signal_without_a_handler_does_what_it_does_always() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with held_back():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_are_handled_once_and_outermost_and_all_of_them(arrived: list[int]) -> None:
    with held_back():
        with held_back():
            for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
                signal.raise_signal(signum)
        assert not arrived
        with pytest.raises(Interrupted, match="SIGUSR1"):
            safe_point()
    assert sorted(arrived) == sorted([signal.SIGUSR1, signal.SIGTERM])
    safe_point()


def test_what_is_raised_by_one_handler_keeps_no_other_from_being_called(arrived: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert arrived == [signal.SIGTERM]


def test_a_line_is_written_whole_and_once_whenever_ctrl_c_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.append("header", {"schema_version": 2})
    write = os.write

    def interrupted(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data[:5])
        if data.startswith(b"{"):
            signal.raise_signal(signal.SIGINT)
        return written

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append("failure", {"step": 1, "what": "a", "error": "b"})
    journal.append("end", {"time": 0.0})
    run = load_run(tmp_path)
    assert run.finished and not run.damaged and [f["what"] for f in run.failures] == ["a"]


@pytest.mark.parametrize(
    ("error", "how"),
    [(None, "finished"), (KeyboardInterrupt(), "interrupted"), (ValueError("planted"), "exception")],
)
def test_how_a_run_ended_comes_back_from_its_record(error: BaseException | None, how: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("header", {"schema_version": 2})
    journal.append("end", {"time": 0.0, **Ending.by(error).to_dict()})
    run = load_run(tmp_path)
    assert run.ending == Ending.by(error) and run.ending.how == how
    assert run.finished is (error is None)
    assert ("planted" in run.told_ending) is (how == "exception")
