"""Memory that runs out in a measurement costs one estimator at most, and only where a second try fails too."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch.estimators import LearningCoefficient, Reading
from phasewatch.measure import Probe, measure
from phasewatch.objective import Objective
from phasewatch.record import Estimate, load_run
from phasewatch.watch import Watch

INPUTS = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
PROBE = [(INPUTS, INPUTS.sum(dim=1, keepdim=True))]
ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 TB."
)
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 TiB."), MemoryError(), ON_CPU]


def half_mean_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


class Block:
    """Stands for what fills the memory."""


@dataclass
class Hungry:
    """Raises unless places follow one another, or always; notes whether what it had filled was free by then."""

    error: Exception
    always: bool = False
    name: str = "hungry"
    calls: list[bool] = field(default_factory=list)
    filled: list[weakref.ref[Block]] = field(default_factory=list)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        assert all(block() is None for block in self.filled)
        block = Block()
        self.filled.append(weakref.ref(block))
        self.calls.append(objective.one_at_a_time)
        drawn = torch.rand(()).item()
        if self.always or not objective.one_at_a_time:
            raise self.error
        return Reading({"hungry": Estimate(drawn)})


@dataclass
class Seed:
    """What the global stream begins with for an estimator."""

    name: str = "seed"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        return Reading({"seed": Estimate(torch.rand(()).item())})


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_it_is_tried_once_more_with_one_place_at_a_time(error: Exception) -> None:
    hungry = Hungry(error)
    found, failures = measure(nn.Linear(3, 1), [Seed(), hungry], Probe(PROBE, half_mean_squared_error), step=0)
    assert not failures and hungry.calls == [False, True]
    assert found.value("hungry") == found.value("seed")  # the second try sees what the first one saw


def test_other_errors_are_not_tried_again() -> None:
    hungry = Hungry(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    _, (failure,) = measure(nn.Linear(3, 1), [hungry], Probe(PROBE, half_mean_squared_error), step=0)
    assert hungry.calls == [False] and not failure.is_out_of_memory


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_where_that_fails_too_it_is_left_out_and_said_and_the_rest_measured(error: Exception, tmp_path: Path) -> None:
    hungry = Hungry(error, always=True)
    with (
        pytest.warns(UserWarning, match="hungry takes more memory than there is.* left out from step 0 on") as caught,
        Watch(
            nn.Linear(3, 1),
            PROBE,
            loss_fn=half_mean_squared_error,
            estimators=(hungry, Seed()),
            schedule=1,
            directory=tmp_path,
        ) as watch,
    ):
        for step in range(3):
            watch.at(step)
    assert len([w for w in caught if "memory" in str(w.message)]) == 1
    assert hungry.calls == [False, True, True, True, True]
    run = load_run(tmp_path)
    assert run.series("seed").steps.tolist() == run.series("loss").steps.tolist() == [0, 1, 2]
    (failure,) = run.failures
    assert (failure["what"], failure["step"]) == ("hungry", 0)


@dataclass
class Greedy:
    """The gradient's norm, with memory for so many samples at a time; notes the batches that it was given."""

    most: int
    name: str = "greedy"
    batches: list[list[int]] = field(default_factory=list)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.batches.append(objective.batch_sizes)
        if max(objective.batch_sizes) > self.most:
            raise MemoryError
        weighted = zip(objective.batch_weights, range(objective.num_batches), strict=True)
        return Reading({"norm": Estimate(float(sum(w * objective.gradient(batch=k) for w, k in weighted).norm()))})


def test_smaller_batches_of_the_same_samples_give_the_same_number() -> None:
    module, probe = nn.Linear(3, 1), Probe([PROBE[0], (INPUTS[:7], INPUTS[:7, :1])], half_mean_squared_error)
    at_once, greedy = Greedy(20), Greedy(5)
    (whole, _), (cut, failures) = (measure(module, [g], probe, step=0) for g in (at_once, greedy))
    assert not failures and cut.value("norm") == pytest.approx(whole.value("norm"), rel=1e-6)
    assert greedy.batches == [[20, 7], [20, 7], [10, 10, 3, 4], [5, 5, 5, 5, 1, 2, 2, 2]]
    hopeless, after = Greedy(0, name="hopeless"), Greedy(20, name="after")
    _, (failure,) = measure(module, [hopeless, after], probe, step=0)
    assert failure.what == "hopeless" and after.batches == [[20, 7]]


def test_a_loss_that_compares_samples_is_not_cut() -> None:
    def spread(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return module(batch[0]).var()

    greedy = Greedy(5)
    _, (failure,) = measure(nn.Linear(3, 1), [greedy], Probe(PROBE, spread), step=0)
    assert failure.is_out_of_memory and greedy.batches == [[20], [20]]


def test_memory_that_the_probe_itself_does_not_find_is_asked_for_again() -> None:
    asked: list[int] = []

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        asked.append(1)
        if full:
            raise MemoryError
        return half_mean_squared_error(module, batch)

    full = False
    watch = Watch(nn.Linear(3, 1), PROBE, loss_fn=loss_fn, estimators=(Seed(),), schedule=1)
    full = True
    with pytest.warns(UserWarning, match="objective failed at step 0 .*MemoryError"):
        assert watch.at(0) is None
    full = False
    assert watch.at(1) is not None


def test_raise_raises() -> None:
    hungry: Any = Hungry(MemoryError("planted"), always=True)
    watch = Watch(
        nn.Linear(3, 1), PROBE, loss_fn=half_mean_squared_error, estimators=(hungry,), schedule=1, on_error="raise"
    )
    with pytest.raises(MemoryError, match="planted"):
        watch.at(0)


def test_chains_that_follow_one_another_find_what_chains_in_one_call_find() -> None:
    """λ of the loss, 4 chains: the same draws, where the memory for all four is lacking."""
    module = nn.Linear(3, 1, bias=False).double()
    data = [(INPUTS.double(), INPUTS.double().sum(dim=1, keepdim=True))]
    with torch.no_grad():
        module.weight.fill_(1.0)
    objective = Objective(module, data, loss_fn=half_mean_squared_error)
    estimator = LearningCoefficient(chains=4, draws=20, burn_in=30)
    together, apart = (estimator.read(o, 500, 0).estimates for o in (objective, objective.evaluated_one_at_a_time()))
    assert together["llc"].value > 0
    for name in ("llc", "llc_rhat", "llc_acceptance"):
        assert apart[name].value == pytest.approx(together[name].value, rel=1e-6)
