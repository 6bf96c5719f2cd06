"""Measures the checkpoints of a finished run, one after another, into a run record."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from phasewatch.price import spoken
from phasewatch.record import Run
from phasewatch.sweep.agenda import Agenda
from phasewatch.sweep.checkpoints import Checkpoint, find_checkpoints, first_content, in_order
from phasewatch.sweep.cluster import Cluster
from phasewatch.sweep.formats import CheckpointError
from phasewatch.sweep.one import Found, measured_at
from phasewatch.sweep.processes import Processes
from phasewatch.sweep.record import SHARD, SweepRecord, header_of
from phasewatch.sweep.source import Build, FromBuild, Restore, Source
from phasewatch.sweep.workers import Crew, Task, Workers
from phasewatch.watch import Watch

FOLDER = "measured"
"""The folder beside the checkpoints that the record goes to."""

CREWS: dict[str, Callable[[], Crew[Any]]] = {"processes": Processes, "ray": Cluster}
"""Where workers are, by what it is called."""

Say = Callable[[str], object]
Results = Callable[[Agenda], Iterable[tuple[Checkpoint, Found | CheckpointError]]]
"""Measures what it is handed, and gives what came of each as soon as it is there, in any order."""


def measure_checkpoints(
    build: Build | Source,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    directory: str | os.PathLike[str] | None = None,
    trust: bool = False,
    retry: bool = False,
    workers: int = 1,
    engine: Literal["processes", "ray"] = "processes",
    budget: float | None = None,
    shard: tuple[int, int] | None = None,
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
        workers: Processes to measure in, each on one thread, with a network and data of its own; ``build`` must be
            importable then. 1 measures in this one.
        engine: Where the workers are: processes on this machine, or actors on a Ray cluster, one started here if there
            is none. Its machines must see code and checkpoints at the same places.
        budget: Seconds to spend. The ends of the run are measured first, then a coarse selection, then what lies where
            something changed; a later call goes on from there. Default all checkpoints.
        shard: ``(i, n)``: measure each n-th checkpoint alone, from the i-th on, as one of n independent jobs. Its
            record goes into a folder of its own in the directory; a last call without takes all of them up.
        say: Given lines that tell how it goes on; default they go nowhere.

    Returns:
        What was measured, by earlier sweeps too.

    Raises:
        CheckpointError: If there is no checkpoint, none has a step, two of one step differ, one asks for code to be
            run, or none at all can be measured.
        RecordError: If the directory holds what was measured in another way, or is being written by another sweep.
        ValueError: If what is built cannot be measured (see :class:`phasewatch.Watch`), or ``workers``, ``engine``,
            ``budget`` or ``shard`` is out of its range.
        ImportError: If the engine is not installed.

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
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget is {budget!r}; expected a positive number of seconds, or None for all checkpoints")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard is {shard!r}; expected (i, n) with i from 1 to n")
    if workers < 1:
        raise ValueError(f"workers is {workers!r}; expected a number of processes, 1 for this one alone")
    if engine not in CREWS:
        raise ValueError(f"engine is {engine!r}; expected one of {', '.join(CREWS)}")
    say = say or (lambda text: None)
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found = find_checkpoints(listed)
    checkpoints, said = in_order(found, trust)
    for text in said:
        warnings.warn(f"phasewatch: {text}", stacklevel=2)
    source = FromBuild(build) if callable(build) else build
    place = folder_for(listed) if directory is None else Path(directory)
    if shard is not None:
        checkpoints = checkpoints[shard[0] - 1 :: shard[1]]
        place = place / f"{SHARD}{shard[0]}-of-{shard[1]}"
        if not checkpoints:
            raise CheckpointError(f"There are fewer checkpoints than jobs: none is left for {shard[0]} of {shard[1]}.")
    runs: list[Run] = []

    def sweep(header: dict[str, Any], seconds: float, results: Results) -> None:
        with SweepRecord(place, header) as record:
            _sweep(record, checkpoints, results, retry, seconds / workers, budget, say)
        runs.append(record.run)
        if not record.run.measurements:
            first = next(iter(record.failed.values()))
            raise CheckpointError(f"None of {len(checkpoints)} checkpoints could be measured. The first: {first}")

    def take(watch: Watch, restore: Restore) -> None:
        results = partial(_one_by_one, watch, restore, trust)
        sweep(header_of(watch), sum(watch.prices.values()), results)

    if workers == 1 and engine == "processes":
        source.give(take, lambda: first_content(checkpoints, trust))
    else:
        with Workers(workers, CREWS[engine](), Task(source, checkpoints, trust)) as crew:
            sweep(crew.ready.header, crew.ready.seconds, crew.results)
    return runs[0]


def folder_for(paths: Iterable[str | os.PathLike[str]]) -> Path:
    """Where the record of checkpoints at these paths goes to."""
    places = [path if path.is_dir() else path.parent for path in (Path(os.path.abspath(path)) for path in paths)]
    return Path(os.path.relpath(os.path.commonpath(places))) / FOLDER if places else Path(FOLDER)


def _one_by_one(
    watch: Watch, restore: Restore, trust: bool, agenda: Agenda
) -> Iterator[tuple[Checkpoint, Found | CheckpointError]]:
    while (checkpoint := agenda.next()) is not None:
        try:
            yield checkpoint, measured_at(watch, restore, checkpoint, trust)
        except CheckpointError as error:
            yield checkpoint, error


def _sweep(
    record: SweepRecord,
    checkpoints: Sequence[Checkpoint],
    results: Results,
    retry: bool,
    seconds: float,
    budget: float | None,
    say: Say,
) -> None:
    """Measure what is not there yet."""
    measured, failed = {m.step for m in record.run.measurements}, record.failed
    left = [c for c in checkpoints if c.step not in measured and (retry or c.step not in failed)]
    progress = Progress(say, len(left))
    progress.begin(len(checkpoints), sum(c.step in measured for c in checkpoints), 0 if retry else len(failed), seconds)
    told: set[str] = set()
    agenda = Agenda(left, record.run.measurements, budget)
    for checkpoint, found in results(agenda) if left else ():
        if isinstance(found, CheckpointError):
            record.fail(checkpoint.step, found)
            warnings.warn(f"phasewatch: step {checkpoint.step} is skipped: {found}", stacklevel=2)
        else:
            record.add(found.measurement, found.failures)
            agenda.learn(found.measurement)
            for failure in found.failures:
                if failure.what not in told:
                    told.add(failure.what)
                    warnings.warn(
                        f"phasewatch: {failure.what} failed at step {checkpoint.step} ({failure.error}). All else is "
                        "measured; further failures are only recorded.",
                        stacklevel=2,
                    )
        progress.done(checkpoint.step)
    if agenda.is_spent:
        say(
            f"phasewatch: the budget is spent, {agenda.waiting} checkpoints are not measured; the same command goes on."
        )


class Progress:
    """Says how a sweep goes on, and how long it still takes."""

    def __init__(self, say: Say, count: int) -> None:
        """Nothing is measured yet.

        Args:
            say: Given lines of text.
            count: Checkpoints to measure.
        """
        self._say, self._count, self._done = say, count, 0
        self._began = time.perf_counter()

    def begin(self, checkpoints: int, measured: int, failed: int, seconds: float) -> None:
        """Say what there is to do, at so many seconds for each."""
        before = f", {measured} measured before" if measured else ""
        if failed:
            before += f", {failed} failed before (--retry tries them again)"
        duration = f", about {spoken(self._count * seconds)}" if self._count and seconds else ""
        self._say(f"phasewatch: {checkpoints} checkpoints{before}; {self._count} to measure{duration}")

    def done(self, step: int) -> None:
        """Say that a checkpoint is done, and how long the others will take."""
        self._done += 1
        left = (self._count - self._done) * (time.perf_counter() - self._began) / self._done
        rest = f"; about {spoken(left)} left" if self._done < self._count else ""
        self._say(f"phasewatch: {self._done} of {self._count}, step {step}{rest}")
