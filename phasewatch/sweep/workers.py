"""Local processes that each measure one checkpoint after another; what they find is recorded by the one that asks."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from phasewatch.sweep.agenda import Agenda
from phasewatch.sweep.checkpoints import Checkpoint, first_content
from phasewatch.sweep.formats import CheckpointError
from phasewatch.sweep.one import Found, measured_at
from phasewatch.sweep.record import describes_the_same, header_of
from phasewatch.sweep.source import Restore, Source
from phasewatch.watch import Watch


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


class Workers:
    """Processes that measure. The first is started at once, the others once it is known what there is to do.

    Attributes:
        ready: What the first one has built.
    """

    def __init__(self, count: int, source: Source, checkpoints: Sequence[Checkpoint], trust: bool) -> None:
        """Start the first.

        Args:
            count: How many there are to be.
            source: What each builds for itself; has to be named by its module, or to be importable.
            checkpoints: All checkpoints.
            trust: Whether they may run code.

        Raises:
            ValueError: If the source cannot be passed to another process.
            Exception: What building it raises.
        """
        self._count, self._given = count, (source, list(checkpoints), trust)
        self._processes: dict[Connection, BaseProcess] = {}
        self._over: list[BaseProcess] = []
        try:
            pickle.dumps(self._given)
        except Exception as error:
            raise ValueError(
                f"With several workers each builds for itself, and what builds cannot be passed to it ({error}). Put "
                "it into a module, at its top level, and give it by name: 'package.module:function'."
            ) from error
        try:
            connection = self._start()
            ready = self._heard(connection)
            if ready is None:
                raise CheckpointError(_told_beginning(self._buried(connection)))
            self.ready: Ready = ready
        except BaseException:
            self._end()
            raise
        self._first = connection

    def __enter__(self) -> Workers:
        """The workers themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End them."""
        self._end()

    def results(self, agenda: Agenda) -> Iterator[tuple[Checkpoint, Found | CheckpointError]]:
        """Measure what is handed out, and give what comes of each as soon as it is there.

        A worker that dies costs the checkpoint that it was at; another takes its place.

        Raises:
            ValueError: If the workers have built different things.
        """
        at_work: dict[Connection, Checkpoint] = {}
        for _ in range(1, min(self._count, agenda.left)):
            self._start()
        self._hand_out(self._first, agenda, at_work)
        while at_work or (agenda.left and self._processes):
            for connection in wait(list(self._processes)):
                assert isinstance(connection, Connection)
                checkpoint = at_work.pop(connection, None)
                message = self._heard(connection)
                if message is None:
                    code = self._buried(connection)
                    if checkpoint is not None:
                        yield checkpoint, CheckpointError(_told_end(checkpoint, code))
                        if agenda.left:
                            self._start()
                    elif not self._processes:  # the others go on without it
                        raise CheckpointError(_told_beginning(code))
                    continue
                if isinstance(message, Ready):
                    if not describes_the_same(message.header, self.ready.header):
                        raise ValueError(
                            "The workers measure on different samples: the code that builds draws them at random, and "
                            "has to seed them."
                        )
                elif checkpoint is not None:
                    yield checkpoint, message
                self._hand_out(connection, agenda, at_work)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, *self._given), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen from here
        self._processes[ours] = process
        return ours

    def _heard(self, connection: Connection) -> Any:
        """What a worker has to say; None where it has ended, be it in the middle of a word."""
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(message, Broken):
            raise message.error
        return message

    def _hand_out(self, connection: Connection, agenda: Agenda, at_work: dict[Connection, Checkpoint]) -> None:
        """Give a worker its next checkpoint, or let it end."""
        checkpoint = agenda.next()
        if checkpoint is None:
            self._over.append(self._processes.pop(connection))
            connection.close()
        else:
            at_work[connection] = checkpoint
            with suppress(BrokenPipeError):  # that it has ended is seen when it is heard
                connection.send(checkpoint)

    def _buried(self, connection: Connection) -> int | None:
        process = self._processes.pop(connection)
        process.join()
        connection.close()
        return process.exitcode

    def _end(self) -> None:
        for connection in self._processes:
            connection.close()
        for process in (*self._processes.values(), *self._over):
            process.terminate()
            process.join()
        self._processes.clear()


def _told_end(checkpoint: Checkpoint, code: int | None) -> str:
    return (
        f"{checkpoint.path} is not measured: the process that was at it ended (exit code {code}), as where memory is "
        "short; fewer workers take less."
    )


def _told_beginning(code: int | None) -> str:
    return (
        f"A worker ended before it had begun (exit code {code}), as where memory is short. What was measured is "
        "recorded; fewer workers take less, and workers=1 measures in this process."
    )


def work(connection: Connection, source: Source, checkpoints: Sequence[Checkpoint], trust: bool) -> None:
    """What a worker does: build, and measure what it is given until nobody gives it any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks, who ends the others
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def take(watch: Watch, restore: Restore) -> None:
        connection.send(Ready(header_of(watch), sum(watch.prices.values())))
        while True:
            checkpoint = connection.recv()
            try:
                found: Found | CheckpointError = measured_at(watch, restore, checkpoint, trust)
            except CheckpointError as error:
                found = error
            connection.send(found)

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            source.give(take, lambda: first_content(checkpoints, trust))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except BaseException as error:
            connection.send(Broken(_sendable(error)))


def _sendable(error: BaseException) -> BaseException:
    """The error, or where it cannot be passed on what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ValueError(f"{type(error).__name__}: {error}")
    return error
