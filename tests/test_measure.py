"""One measurement by itself: the same from a checkpoint as in the run, and what fails in it costs only itself."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phasewatch import Watch
from phasewatch.estimators import HessianSpectrum, LearningCoefficient, Reading, SymmetryLedger
from phasewatch.measure import Probe, measure
from phasewatch.objective import Objective
from phasewatch.record import Estimate, Measurement, Signal
from phasewatch.record.signals import CATALOGUE

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(20, 3, generator=GENERATOR), torch.randn(20, 2, generator=GENERATOR)) for _ in range(2)]


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))


@dataclass
class Own:
    """An estimator of a user's own, which does what it is told."""

    does: Callable[[], Any]
    name: str = "own"

    def read(self, objective: Objective, n: int, seed: int) -> Any:
        return self.does()


def number(value: float = 1.0) -> Reading:
    return Reading({"own": Estimate(value)})


def drawn() -> Reading:
    """Draws from all global streams, as code that knows no generators does."""
    return number(torch.rand(()).item() + float(np.random.rand()))


PROBE = Probe(BATCHES, squared_error, n=500)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_checkpoint_measured_by_hand_gives_the_numbers_of_the_run(mode: Any) -> None:
    """To the bit, in another process state: other random streams, another module, whatever was measured before."""
    what = (LearningCoefficient(chains=2, draws=6, burn_in=20), HessianSpectrum(2), SymmetryLedger(), Own(drawn))
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    checkpoints = {}
    watch = Watch(
        module, BATCHES, loss_fn=squared_error, n=500, schedule=4, estimators=what, mode=mode, seed=3, on_error="raise"
    )
    with watch:
        for step in range(9):
            if step % 4 == 0:
                torch.save(module.state_dict(), checkpoints.setdefault(step, io.BytesIO()))
            watch.at(step)
            optimizer.zero_grad()
            squared_error(module, BATCHES[step % 2]).backward()
            optimizer.step()
    probe = replace(PROBE, mode=mode)
    for live in reversed(watch.run.measurements):
        again = network()
        checkpoints[live.step].seek(0)
        again.load_state_dict(torch.load(checkpoints[live.step]))
        torch.manual_seed(live.step + 77)
        by_hand, failures = measure(again, what, probe, live.step, seed=3)
        assert not failures
        assert by_hand.histograms == live.histograms
        timeless = {name: found for name, found in live.estimates.items() if name != "overhead"}
        assert by_hand.estimates == timeless
    first, last = (watch.run.measurements[k].estimates for k in (0, -1))
    assert all(first[name] != last[name] for name in ("loss", "llc", "hessian_max", "own"))


def test_it_leaves_module_and_random_streams_alone() -> None:
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    stream = torch.get_rng_state()
    measure(module, [Own(drawn)], PROBE, 0)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module.training


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (3, 3), (None, 2)])
def test_it_uses_the_threads_asked_for_and_leaves_training_its_own(asked: Any, used: int, two_threads: None) -> None:
    found, failures = measure(
        network(), [Own(lambda: number(torch.get_num_threads()))], replace(PROBE, threads=asked), 0
    )
    assert not failures and found.value("own") == used and torch.get_num_threads() == 2
    measure(network(), [Own(fails)], replace(PROBE, threads=asked), 0)
    assert torch.get_num_threads() == 2


def test_a_price_is_timed_on_the_threads_that_measure(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    used, gradient = set(), Objective.gradient

    def noted(self: Objective, *arguments: Any, **options: Any) -> Any:
        used.add(torch.get_num_threads())
        return gradient(self, *arguments, **options)

    monkeypatch.setattr(Objective, "gradient", noted)
    Watch(network(), BATCHES, loss_fn=squared_error, estimators=[HessianSpectrum(2)])
    assert used == {1} and torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads is {threads}; expected a number of threads, or None"):
        Watch(network(), BATCHES, loss_fn=squared_error, threads=threads)


def fails() -> Reading:
    raise FloatingPointError("planted")


@pytest.mark.parametrize(
    ("does", "error", "message"),
    [
        (fails, FloatingPointError, "planted"),
        (lambda: None, TypeError, "Own.read returned None; expected a phasewatch.estimators.Reading"),
        (lambda: {"own": 1.0}, TypeError, "expected a phasewatch.estimators.Reading"),
        (lambda: Reading({"own": Estimate(1.0)}, None), TypeError, "expected mappings of names"),
        (lambda: Reading({"own": Estimate(1.0)}, {"h": [1, 2]}), TypeError, "names to Estimates and to Histograms"),
        (lambda: Reading(None), TypeError, "expected mappings of names"),
        (lambda: Reading({"own": 1.0}), TypeError, "'own': 1.0; expected a name and an Estimate"),  # type: ignore[dict-item]
        (lambda: Reading({1: Estimate(1.0)}), TypeError, "expected a name and an Estimate"),  # type: ignore[dict-item]
        (lambda: Reading({"": Estimate(1.0)}), TypeError, "expected a name and an Estimate"),
        (lambda: Reading({"own": Estimate(torch.ones(2))}), TypeError, "expected a number"),  # type: ignore[arg-type]
        (lambda: Reading({"own": Estimate(1.0, -0.1)}), ValueError, "expected it to be >= 0"),
        (lambda: Reading({"loss": Estimate(1.0)}), ValueError, "'loss', which another estimator has measured already"),
    ],
)
def test_an_estimator_that_is_wrong_costs_only_itself(
    does: Callable[[], Any], error: type[Exception], message: str
) -> None:
    other = Own(lambda: Reading({"other": Estimate(2.0)}), "other")
    found, [failure] = measure(network(), [Own(does), other], PROBE, 0)
    alone, none = measure(network(), [other], PROBE, 0)
    assert not none and found.estimates == alone.estimates
    assert set(found.estimates) == {"loss", "gradient_norm", "other"}
    assert failure.what == "own" and isinstance(failure.exception, error)
    assert message in failure.error and failure.error.startswith(error.__name__)
    assert "Traceback" in failure.traceback
    if error is FloatingPointError:
        assert "in fails" in failure.traceback


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_doubted(value: float) -> None:
    found, failures = measure(network(), [Own(lambda: number(value))], PROBE, 0)
    assert not failures and found.estimates["own"].doubts == ("is not finite",)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_does_not_keep_the_detector_from_the_others(value: float, monkeypatch: Any) -> None:
    """In a signal that it looks at; the step of the loss is found all the same."""
    monkeypatch.setitem(CATALOGUE, "own", Signal("own", "a signal", group="own", detected=True))
    module = nn.Linear(3, 2)
    noise = torch.Generator().manual_seed(1)
    watch = Watch(
        module,
        BATCHES,
        loss_fn=squared_error,
        schedule=1,
        estimators=[Own(lambda: number(value))],
        on_error="raise",
    )
    with watch:
        for step in range(40):
            with torch.no_grad():
                module.weight.fill_(0.0 if step < 20 else 2.0).add_(0.01 * torch.randn(2, 3, generator=noise))
            watch.at(step)
    [transition] = watch.transitions
    assert transition.start <= 20 <= transition.end + 1


def test_a_loss_that_fails_leaves_nothing_to_measure() -> None:
    broken = replace(PROBE, loss_fn=lambda module, batch: squared_error(module, batch) * math.nan)
    found, [failure] = measure(network(), [Own(number)], broken, 7)
    assert found == Measurement(7, seconds=found.seconds) and failure.what == "objective"


def test_what_is_known_to_fail_is_left_out() -> None:
    found, failures = measure(network(), [Own(fails)], PROBE, 0, without={"own", "loss"})
    assert not failures and found.estimates == {}


def test_interrupts_pass_through() -> None:
    def interrupted() -> Reading:
        raise KeyboardInterrupt

    module = network()
    stream = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        measure(module, [Own(interrupted)], PROBE, 0)
    assert torch.equal(stream, torch.get_rng_state())


def test_of_one_sample_all_is_measured_that_needs_no_temperature() -> None:
    batch = (BATCHES[0][0][:1], BATCHES[0][1][:1])
    found, failures = measure(network(), [HessianSpectrum()], Probe([batch], squared_error), step=0)
    twice, _ = measure(network(), [HessianSpectrum()], Probe([batch], squared_error, n=2), step=0)
    assert not failures and found.estimates.keys() == twice.estimates.keys()
    for name, estimate in found.estimates.items():
        if name == "llc_quadratic":
            assert math.isnan(estimate.value) and estimate.doubts == ("n is 1, for which n / log n is no temperature",)
        else:
            assert estimate == twice.estimates[name]
