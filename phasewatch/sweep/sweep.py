"""Measures the checkpoints of a finished run, one after another, into a run record."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phasewatch.measure import Failure, measure, together
from phasewatch.price import spoken
from phasewatch.record import Measurement, Run
from phasewatch.sweep.checkpoints import Checkpoint, CheckpointError, find_checkpoints, in_order, read_checkpoint
from phasewatch.sweep.record import SweepRecord, header_of
from phasewatch.sweep.source import Build, FromBuild, Restore, Source
from phasewatch.sweep.weights import load_weights
from phasewatch.watch import Watch

FOLDER = "measured"
"""The folder beside the checkpoints that the record goes to."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Found:
    """What came of a checkpoint.

    Attributes:
        measurement: What was found.
        failures: Estimators that failed in it.
    """

    measurement: Measurement
    failures: list[Failure]


def measure_checkpoints(
    build: Build | Source,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    directory: str | os.PathLike[str] | None = None,
    trust: bool = False,
    retry: bool = False,
    say: Say | None = None,
) -> Run:
    """Measure every checkpoint of a finished run, as if it had been watched at these steps.

    The numbers are those of a watch with the same probe, settings and seed, to the bit. Each is recorded as soon as it
    is there: called again after it was killed, or when there are more checkpoints, it measures only what is not there
    yet. A checkpoint that fails is warned of and skipped.

    Args:
        build: ``build()`` returns ``(module, probe, loss_fn)``, with the defaults of :class:`phasewatch.Watch` for all
            else, or such a watch (without a directory), with its settings. The weights that the module has do not
            matter. What it draws at random it has to seed.
        paths: Checkpoints, or folders that hold some. They are measured in the order of their own steps.
        directory: Where the record is written; default the folder ``measured`` beside the checkpoints.
        trust: Whether checkpoints may run code: what is not plain tensors, numbers and texts is refused otherwise.
        retry: Whether to try those again that failed in an earlier sweep.
        say: Given lines that tell how it goes on; default they go nowhere.

    Returns:
        What was measured, by earlier sweeps too.

    Raises:
        CheckpointError: If there is no checkpoint, none has a step, two of one step differ, one asks for code to be
            run, or none at all can be measured.
        RecordError: If the directory holds what was measured in another way, or is being written by another sweep.
        ValueError: If what is built cannot be measured (see :class:`phasewatch.Watch`).

    Example:
        >>> import tempfile, torch
        >>> def build():
        ...     batch = (torch.eye(3), torch.zeros(3, 1))
        ...     return torch.nn.Linear(3, 1), [batch], lambda module, batch: module(batch[0]).square().mean()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (0, 100):
        ...         torch.save(torch.nn.Linear(3, 1).state_dict(), f"{folder}/model-{step}.pt")
        ...     run = measure_checkpoints(build, folder)
        >>> run.series("loss").steps.tolist()
        [0, 100]
    """
    say = say or (lambda text: None)
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found = find_checkpoints(listed)
    checkpoints, said = in_order(found, trust)
    for text in said:
        warnings.warn(f"phasewatch: {text}", stacklevel=2)
    source = FromBuild(build) if callable(build) else build
    runs: list[Run] = []

    def take(watch: Watch, restore: Restore) -> None:
        with SweepRecord(folder_for(listed) if directory is None else Path(directory), header_of(watch)) as record:
            _sweep(watch, restore, checkpoints, record, trust, retry, say)
        runs.append(record.run)
        if not record.run.measurements:
            first = next(iter(record.failed.values()))
            raise CheckpointError(f"None of {len(checkpoints)} checkpoints could be measured. The first: {first}")

    source.give(take, lambda: _first(checkpoints, trust))
    return runs[0]


def _first(checkpoints: list[Checkpoint], trust: bool) -> Any:
    """What is in the first checkpoint that can be read.

    Raises:
        CheckpointError: If there is none.
    """
    for checkpoint in checkpoints[:-1]:
        with suppress(CheckpointError):
            return read_checkpoint(checkpoint.path, trust)
    return read_checkpoint(checkpoints[-1].path, trust)


def folder_for(paths: Iterable[str | os.PathLike[str]]) -> Path:
    """Where the record of checkpoints at these paths goes to."""
    places = [path if path.is_dir() else path.parent for path in (Path(os.path.abspath(path)) for path in paths)]
    return Path(os.path.relpath(os.path.commonpath(places))) / FOLDER if places else Path(FOLDER)


def _sweep(
    watch: Watch,
    restore: Restore,
    checkpoints: list[Checkpoint],
    record: SweepRecord,
    trust: bool,
    retry: bool,
    say: Say,
) -> None:
    """Measure what is not there yet."""
    measured, failed = {m.step for m in record.run.measurements}, record.failed
    left = [c for c in checkpoints if c.step not in measured and (retry or c.step not in failed)]
    progress = Progress(say, len(left), sum(watch.prices.values()))
    progress.begin(len(checkpoints), sum(c.step in measured for c in checkpoints), 0 if retry else len(failed))
    told: set[str] = set()
    for checkpoint in left:
        began = time.perf_counter()
        try:
            found = measured_at(watch, restore, checkpoint, trust)
        except CheckpointError as error:
            record.fail(checkpoint.step, error)
            warnings.warn(f"phasewatch: step {checkpoint.step} is skipped: {error}", stacklevel=2)
        else:
            record.add(found.measurement, found.failures)
            for failure in found.failures:
                if failure.what not in told:
                    told.add(failure.what)
                    warnings.warn(
                        f"phasewatch: {failure.what} failed at step {checkpoint.step} ({failure.error}). All else is "
                        "measured; further failures are only recorded.",
                        stacklevel=2,
                    )
        progress.done(checkpoint.step, time.perf_counter() - began)


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
    return Found(replace(found, time=time.time()), failures)


class Progress:
    """Says how a sweep goes on, and how long it still takes."""

    def __init__(self, say: Say, count: int, expected: float) -> None:
        """Nothing is measured yet.

        Args:
            say: Given lines of text.
            count: Checkpoints to measure.
            expected: Seconds that one is thought to take.
        """
        self._say, self._count, self._expected = say, count, expected
        self._done, self._seconds = 0, 0.0

    def begin(self, checkpoints: int, measured: int, failed: int) -> None:
        """Say what there is to do."""
        before = f", {measured} measured before" if measured else ""
        if failed:
            before += f", {failed} failed before (--retry tries them again)"
        duration = f", about {spoken(self._count * self._expected)}" if self._count and self._expected else ""
        self._say(f"phasewatch: {checkpoints} checkpoints{before}; {self._count} to measure{duration}")

    def done(self, step: int, seconds: float) -> None:
        """Say that a checkpoint is done, and how long the others will take."""
        self._done, self._seconds = self._done + 1, self._seconds + seconds
        left = (self._count - self._done) * self._seconds / self._done
        rest = f"; about {spoken(left)} left" if self._done < self._count else ""
        self._say(f"phasewatch: {self._done} of {self._count}, step {step}, {spoken(seconds)}{rest}")
