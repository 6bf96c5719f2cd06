"""One checkpoint, measured as a watch would have measured the run there."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from phasewatch.measure import Failure, measure, together
from phasewatch.record import Measurement
from phasewatch.sweep.checkpoints import Checkpoint
from phasewatch.sweep.formats import CheckpointError, read_checkpoint
from phasewatch.sweep.source import Restore
from phasewatch.sweep.weights import load_weights
from phasewatch.watch import Watch


@dataclass(frozen=True)
class FailedPart:
    """What could not be measured of a checkpoint, as it can be passed from process to process.

    Attributes:
        what: Name of the estimator.
        error: Type and message of what was raised.
        traceback: The last calls before.
    """

    what: str
    error: str
    traceback: str


@dataclass(frozen=True)
class Found:
    """What came of a checkpoint.

    Attributes:
        measurement: What was found.
        failures: Estimators that failed in it.
    """

    measurement: Measurement
    failures: list[FailedPart]


def measured_at(watch: Watch, restore: Restore, checkpoint: Checkpoint, trust: bool = False) -> Found:
    """Measure a checkpoint.

    Args:
        watch: What is measured, on which data and by which seed; the checkpoint is loaded into its module.
        restore: Brings all else to where it was.
        checkpoint: The checkpoint.
        trust: Whether it may run code.

    Raises:
        CheckpointError: If it cannot be read, is of another network, or every estimator fails on it.
    """
    content = read_checkpoint(checkpoint.path, trust)
    try:
        restore(content, checkpoint.step)
    except Exception as error:
        raise CheckpointError(f"{checkpoint.path} cannot be gone back to ({type(error).__name__}: {error}).") from error
    load_weights(watch.module, content, checkpoint.path)
    began = time.perf_counter()
    failures: list[Failure] = []
    by_monitor: list[Measurement] = []
    of_main: Measurement | None = None
    for monitor in watch.monitors:
        one, failed = measure(watch.module, monitor.estimators, monitor.probe, checkpoint.step, seed=watch.seed)
        failures += failed
        by_monitor.append(one)
        if monitor is watch.main:
            of_main = one
    found = together(checkpoint.step, by_monitor, of_main, time.perf_counter() - began)
    if not found.estimates:
        raise CheckpointError(f"{checkpoint.path} cannot be measured ({failures[0].error}).") from failures[0].exception
    told = [FailedPart(failure.what, failure.error, failure.traceback) for failure in failures]
    return Found(replace(found, time=time.time()), told)
