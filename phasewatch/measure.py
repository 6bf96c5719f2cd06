"""One measurement: of a module, by estimators, on data, at a step. It knows no schedule, record or detector."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from phasewatch.estimators import Estimator, ProbeLoss, Reading
from phasewatch.hessian import NoSecondDerivativeError
from phasewatch.interruption import safe_point
from phasewatch.isolation import isolated, seed_everything
from phasewatch.objective import LossFn, NoOutputsError, Objective, OutputsFn
from phasewatch.objective.function import sizes_of_batches
from phasewatch.objective.memory import give_back, is_out_of_memory
from phasewatch.record import Estimate, Histogram, Measurement

HALVINGS = 3
"""Times that batches are cut in two where memory runs out. Chosen: training has memory for eight times what is left."""


@dataclass(frozen=True)
class Probe:
    """What is measured on: batches, the loss of a batch, and how large the training set is that they stand for.

    Attributes:
        batches: The batches.
        loss_fn: ``loss_fn(module, batch) -> scalar mean loss``.
        n: Size of the training set; default the samples in the batches.
        mode: Whether dropout and BatchNorm behave as in evaluation or as in training.
        name: Name of the data, where they are others than those of the main probe: ``"held_out"`` for those that the
            network is not trained on.
        source: Where they are from, for the record.
        batch_sizes: Samples in each batch; default what can be read off.
        outputs_fn: ``outputs_fn(module, batch)``: the network's outputs, for a ``loss_fn(outputs, batch)`` of them.
        threads: Threads of the CPU that evaluate it; None for as many as PyTorch uses. On one the numbers are those of
            every machine, and nothing waits for threads that have no core of their own.

    Raises:
        ValueError: If ``threads`` is not positive.
    """

    batches: Sequence[Any]
    loss_fn: LossFn
    n: int | None = None
    mode: Literal["eval", "train"] = "eval"
    name: str = ""
    source: str = "given"
    batch_sizes: Sequence[int] | None = None
    outputs_fn: OutputsFn | None = None
    threads: int | None = 1

    def __post_init__(self) -> None:
        """Check what no evaluation would."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads!r}; expected a number of threads, or None for PyTorch's own")

    @property
    def sizes(self) -> list[int]:
        """Samples in each batch.

        Raises:
            ValueError: If they are neither given nor to be read off.
        """
        return sizes_of_batches(self.batches, self.batch_sizes)

    def first(self, count: int) -> Probe:
        """The same with the first batches only.

        Raises:
            ValueError: If there is none, or ``batch_sizes`` are not those of the batches.
        """
        return replace(self, batches=self.batches[:count], batch_sizes=self.sizes[:count]) if self.batches else self

    def objective(self, module: nn.Module, seed: int) -> Objective:
        """The loss of a module on these batches.

        Raises:
            ValueError: If there is no batch, or the loss cannot be used (see :class:`phasewatch.Objective`).
        """
        return Objective(
            module,
            self.batches,
            loss_fn=self.loss_fn,
            outputs_fn=self.outputs_fn,
            mode=self.mode,
            batch_sizes=self.batch_sizes,
            seed=seed,
        )


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and why.

    Attributes:
        what: Name of the estimator, or ``objective`` where the loss itself failed.
        exception: What was raised.
    """

    what: str
    exception: Exception

    @property
    def error(self) -> str:
        """Type and message of the exception."""
        return f"{type(self.exception).__name__}: {self.exception}"

    @property
    def traceback(self) -> str:
        """The last calls before it was raised."""
        return "".join(traceback.format_exception(self.exception, limit=-8))

    @property
    def is_permanent(self) -> bool:
        """Whether it lies in how the loss is written: no mistake, and no reason to try again."""
        return isinstance(self.exception, (NoOutputsError, NoSecondDerivativeError))

    @property
    def is_out_of_memory(self) -> bool:
        """Whether there was no memory left, however little was taken."""
        return is_out_of_memory(self.exception)


def measure(
    module: nn.Module,
    what: Sequence[Estimator],
    data: Probe,
    step: int,
    *,
    seed: int = 0,
    without: Collection[str] = (),
    progress: Callable[[str], object] = lambda name: None,
) -> tuple[Measurement, list[Failure]]:
    """Measure a module as it is now; the same weights, data, step and seed give the same numbers to the bit.

    The module and all random streams are left as they were. An estimator that raises, or returns what is no
    :class:`phasewatch.estimators.Reading` of names that no other one has emitted, costs only its own numbers. Where one
    runs out of memory, it is tried again on an objective that is evaluated at one place at a time (one chain after
    another), then in batches of half the size, of a quarter and of an eighth. What serves is kept for those after it.

    Args:
        module: The network.
        what: What to measure, beside the loss on the probe.
        data: What to measure on.
        step: Optimizer steps made before; part of the seed of every measurement.
        seed: Seeds all randomness.
        without: Names of estimators that are left out: what is known to fail.
        progress: Told the name of each estimator before it begins.

    Returns:
        What was found (its ``time`` is left to the caller), and what failed.

    Example:
        >>> import torch
        >>> from phasewatch.estimators import HessianSpectrum
        >>> module, batch = nn.Linear(3, 1, bias=False), (torch.eye(3), torch.zeros(3, 1))
        >>> def loss_fn(module, batch):
        ...     return 0.5 * (module(batch[0]) - batch[1]).square().sum()
        >>> found, failures = measure(module, [HessianSpectrum()], Probe([batch], loss_fn, n=1000), step=0)
        >>> round(found.value("hessian_trace"), 6), found.estimates["nullity"].reliable, failures
        (3.0, True, [])
    """
    began = time.perf_counter()
    estimates: dict[str, Estimate] = {}
    histograms: dict[str, Histogram] = {}
    sample_losses: tuple[float, ...] = ()
    failures: list[Failure] = []
    by_part: dict[str, float] = {}
    with isolated(data.threads):
        try:
            objective = data.objective(module, seed)
        except Exception as error:
            failures.append(Failure("objective", error))
            wanted: list[Estimator] = []
        else:
            wanted = [e for e in (ProbeLoss(data.name), *what) if e.name not in without]
        for estimator in wanted:
            safe_point()
            give_back()  # what the part before has left behind would add to what this one takes
            progress(estimator.name)
            began_part = time.perf_counter()
            n = data.n or objective.num_samples
            reading, raised = _read(estimator, objective, n, seed_at(seed, step), estimates)
            if raised is not None and is_out_of_memory(raised):
                for lighter in _ever_lighter(objective):
                    reading, raised = _read(estimator, lighter, n, seed_at(seed, step), estimates)
                    if raised is None or not is_out_of_memory(raised):
                        objective = lighter
                        break
            by_part[estimator.name] = time.perf_counter() - began_part
            if reading is None:
                assert raised is not None
                failures.append(Failure(estimator.name, raised))
                continue
            estimates.update({name: _doubted(estimate) for name, estimate in reading.estimates.items()})
            histograms.update(reading.histograms)
            sample_losses = reading.sample_losses or sample_losses
    give_back()
    seconds = time.perf_counter() - began
    found = Measurement(step, estimates, histograms, seconds, sample_losses=sample_losses, seconds_by_part=by_part)
    return found, failures


def together(step: int, found: Sequence[Measurement], of_main: Measurement | None, seconds: float) -> Measurement:
    """What was found on several probes at one step, as one measurement.

    Args:
        step: The step.
        found: What was found on each.
        of_main: The one whose samples are those of the run; None where it was not measured.
        seconds: Wall time that all of it took.
    """
    estimates: dict[str, Estimate] = {}
    histograms: dict[str, Histogram] = {}
    by_part: dict[str, float] = {}
    for one in found:
        for name, estimate in one.estimates.items():
            estimates[name] = _agreed(estimates.get(name, estimate), estimate)
        histograms.update(one.histograms)
        for name, part in one.seconds_by_part.items():
            by_part[name] = by_part.get(name, 0.0) + part
    losses = () if of_main is None else of_main.sample_losses
    return Measurement(step, estimates, histograms, seconds, sample_losses=losses, seconds_by_part=by_part)


def _agreed(first: Estimate, other: Estimate) -> Estimate:
    """What two monitors say of one signal: the first, in doubt where the other says something else."""
    if first == other:
        return first
    doubt = f"two monitors measure this, and the other says {other.value:.6g}: their probes or settings differ"
    return replace(first, doubts=(*first.doubts, doubt))


def _read(
    estimator: Estimator, objective: Objective, n: int, seed: int, known: Mapping[str, Estimate]
) -> tuple[Reading | None, Exception | None]:
    """What an estimator finds, or what it raises."""
    try:
        # What draws from the global streams is to find them alike in a training run and in a saved checkpoint.
        seed_everything(seed)
        reading = estimator.read(objective, n, seed)
        _check(reading, estimator, known)
    except Exception as error:
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold what has filled the memory
        return None, error
    return reading, None


def _ever_lighter(objective: Objective) -> Iterator[Objective]:
    """The same with less and less memory taken, as long as that can be had."""
    gc.collect()
    if not objective.one_at_a_time:
        objective = objective.evaluated_one_at_a_time()
        yield objective
    for _ in range(HALVINGS):
        gc.collect()
        smaller = objective.in_smaller_batches()
        if smaller is None:
            return
        objective = smaller
        yield objective


def seed_at(seed: int, step: int) -> int:
    """A seed of its own for every step, equal in a run that was resumed."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)[0])


def _check(reading: Any, estimator: Estimator, known: Mapping[str, Estimate]) -> None:
    """Refuse what cannot be recorded, or would replace the number of another estimator."""
    if not isinstance(reading, Reading):
        raise TypeError(
            f"{type(estimator).__name__}.read returned {reading!r}; expected a phasewatch.estimators.Reading: "
            "Reading({'name': Estimate(value)})"
        )
    if not isinstance(reading.estimates, Mapping) or not (
        isinstance(reading.histograms, Mapping) and all(isinstance(h, Histogram) for h in reading.histograms.values())
    ):
        raise TypeError(
            f"{type(estimator).__name__}.read returned {reading!r}; expected mappings of names to Estimates and to "
            "Histograms: Reading({'name': Estimate(value)})"
        )
    for name, estimate in reading.estimates.items():
        if not (isinstance(name, str) and name and isinstance(estimate, Estimate)):
            raise TypeError(
                f"{type(estimator).__name__}.read returned {name!r}: {estimate!r}; expected a name and an Estimate: "
                "Reading({'name': Estimate(value)})"
            )
        if name in known:
            raise ValueError(
                f"{type(estimator).__name__}.read returned {name!r}, which another estimator has measured already; "
                "give the signal another name"
            )


def _doubted(estimate: Estimate) -> Estimate:
    """The same, marked where it is not finite."""
    if math.isfinite(estimate.value) or estimate.doubts:
        return estimate
    return replace(estimate, doubts=("is not finite",))
