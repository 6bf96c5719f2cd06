"""Workers that each measure one checkpoint after another; what they find is recorded by the one that asks."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch

from phasewatch.sweep.agenda import Agenda
from phasewatch.sweep.checkpoints import Checkpoint, first_content
from phasewatch.sweep.formats import CheckpointError
from phasewatch.sweep.one import Found, measured_at
from phasewatch.sweep.record import describes_the_same, header_of
from phasewatch.sweep.source import Restore, Source
from phasewatch.watch import Watch


@dataclass(frozen=True)
class Task:
    """What every worker is told when it begins.

    Attributes:
        source: What it builds for itself.
        checkpoints: All checkpoints.
        trust: Whether they may run code.
    """

    source: Source
    checkpoints: Sequence[Checkpoint]
    trust: bool


@dataclass(frozen=True)
class Ready:
    """A worker has built what it measures.

    Attributes:
        header: What the record says of it.
        seconds: What a measurement is thought to take.
    """

    header: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Broken:
    """A worker could not build what it was to measure, or not go on.

    Attributes:
        error: Why.
    """

    error: BaseException


Message = Ready | Broken | Found | CheckpointError
"""What a worker says: that it is ready, and then what came of each checkpoint that it was given."""
Worker = TypeVar("Worker")


class Crew(Protocol[Worker]):
    """Where workers live and how one speaks with them."""

    def start(self, task: Task) -> Worker:
        """Have a worker begin; it says once that it is ready."""
        ...

    def speaking(self, workers: Sequence[Worker]) -> list[Worker]:
        """Wait for those that have something to say, or have ended."""
        ...

    def hear(self, worker: Worker) -> Message | None:
        """What it has to say; None where it has ended."""
        ...

    def give(self, worker: Worker, checkpoint: Checkpoint) -> None:
        """Have it measure a checkpoint."""
        ...

    def dismiss(self, worker: Worker) -> None:
        """Let it end, as there is nothing left to do."""
        ...

    def bury(self, worker: Worker) -> str:
        """How one ended that was not dismissed."""
        ...

    def end(self) -> None:
        """End all of them."""
        ...


class Workers(Generic[Worker]):
    """Workers of a crew. The first is started at once, the others once it is known what there is to do.

    Attributes:
        ready: What the first one has built.
    """

    def __init__(self, count: int, crew: Crew[Worker], task: Task) -> None:
        """Start the first.

        Args:
            count: How many there are to be.
            crew: Where they are; ended with this.
            task: Its source has to be named by its module, or to be importable.

        Raises:
            ValueError: If the source cannot be passed to another process.
            CheckpointError: If the worker ends at once.
            Exception: What building it raises.
        """
        self._count, self._crew, self._task = count, crew, task
        self._here: list[Worker] = []
        try:
            pickle.dumps(task)
        except Exception as error:
            raise ValueError(
                f"With several workers each builds for itself, and what builds cannot be passed to it ({error}). Put "
                "it into a module, at its top level, and give it by name: 'package.module:function'."
            ) from error
        try:
            first = self._start()
            crew.speaking([first])
            ready = self._heard(first)
            if ready is None:
                raise CheckpointError(_told_beginning(crew.bury(first)))
        except BaseException:
            crew.end()
            raise
        self.ready: Ready = ready
        self._first = first

    def __enter__(self) -> Workers[Worker]:
        """The workers themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End them."""
        self._crew.end()

    def results(self, agenda: Agenda) -> Iterator[tuple[Checkpoint, Found | CheckpointError]]:
        """Measure what is handed out, and give what comes of each as soon as it is there.

        A worker that dies costs the checkpoint that it was at, and another takes its place. Where it dies before it was
        given any, the others go on without it.

        Raises:
            ValueError: If the workers have built different things.
            CheckpointError: If none is left.
        """
        at_work: dict[Worker, Checkpoint] = {}
        for _ in range(1, min(self._count, agenda.left)):
            self._start()
        self._hand_out(self._first, agenda, at_work)
        while at_work or (agenda.left and self._here):
            for worker in self._crew.speaking(self._here):
                checkpoint = at_work.pop(worker, None)
                message = self._heard(worker)
                if message is None:
                    self._here.remove(worker)
                    ending = self._crew.bury(worker)
                    if checkpoint is not None:
                        yield checkpoint, CheckpointError(_told_end(checkpoint, ending))
                        if agenda.left:
                            self._start()
                    elif not self._here:
                        raise CheckpointError(_told_beginning(ending))
                    continue
                if isinstance(message, Ready):
                    if not describes_the_same(message.header, self.ready.header):
                        raise ValueError(
                            "The workers measure on different samples: the code that builds draws them at random, and "
                            "has to seed them."
                        )
                elif checkpoint is not None:
                    yield checkpoint, message
                self._hand_out(worker, agenda, at_work)

    def _start(self) -> Worker:
        worker = self._crew.start(self._task)
        self._here.append(worker)
        return worker

    def _heard(self, worker: Worker) -> Any:
        message = self._crew.hear(worker)
        if isinstance(message, Broken):
            raise message.error
        return message

    def _hand_out(self, worker: Worker, agenda: Agenda, at_work: dict[Worker, Checkpoint]) -> None:
        """Give a worker its next checkpoint, or let it end."""
        checkpoint = agenda.next()
        if checkpoint is None:
            self._here.remove(worker)
            self._crew.dismiss(worker)
        else:
            at_work[worker] = checkpoint
            self._crew.give(worker, checkpoint)


class Line(Protocol):
    """How a worker hears and speaks."""

    def recv(self) -> Checkpoint:
        """Wait for the next checkpoint.

        Raises:
            EOFError: If there is none.
        """
        ...

    def send(self, message: Message) -> None:
        """Say something."""
        ...


def work(line: Line, task: Task) -> None:
    """What a worker does: build, and measure what it is given until nobody gives it any more."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def take(watch: Watch, restore: Restore) -> None:
        line.send(Ready(header_of(watch), sum(watch.prices.values())))
        while True:
            checkpoint = line.recv()
            try:
                found: Found | CheckpointError = measured_at(watch, restore, checkpoint, task.trust)
            except CheckpointError as error:
                found = error
            line.send(found)

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            task.source.give(take, lambda: first_content(task.checkpoints, task.trust))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except BaseException as error:
            line.send(Broken(_sendable(error)))


def _sendable(error: BaseException) -> BaseException:
    """The error, or where it cannot be passed on what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ValueError(f"{type(error).__name__}: {error}")
    return error


def _told_end(checkpoint: Checkpoint, ending: str) -> str:
    return (
        f"{checkpoint.path} is not measured: the process that was at it ended ({ending}), as where memory is short; "
        "fewer workers take less."
    )


def _told_beginning(ending: str) -> str:
    return (
        f"A worker ended before it had begun ({ending}), as where memory is short. What was measured is recorded; "
        "fewer workers take less."
    )
