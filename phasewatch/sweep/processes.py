"""Workers that are processes on this machine."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from phasewatch.sweep.checkpoints import Checkpoint
from phasewatch.sweep.workers import Message, Task, work


class Processes:
    """A crew of processes, each at the other end of a connection."""

    def __init__(self) -> None:
        """None is there yet."""
        self._processes: dict[Connection, BaseProcess] = {}

    def start(self, task: Task) -> Connection:
        """Start one, which shares nothing with this one."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, task), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen from here
        self._processes[ours] = process
        return ours

    def speaking(self, workers: Sequence[Connection]) -> list[Connection]:
        """Wait for those that have something to say, or have ended."""
        return [connection for connection in wait(list(workers)) if isinstance(connection, Connection)]

    def hear(self, worker: Connection) -> Message | None:
        """What it has to say; None where it has ended, be it in the middle of a word."""
        try:
            message: Message = worker.recv()
        except (EOFError, OSError):
            return None
        return message

    def give(self, worker: Connection, checkpoint: Checkpoint) -> None:
        """Have it measure a checkpoint; that it has ended is seen when it is heard."""
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.send(checkpoint)

    def dismiss(self, worker: Connection) -> None:
        """Let it end."""
        worker.close()

    def bury(self, worker: Connection) -> str:
        """Its exit code."""
        process = self._processes.pop(worker)
        process.join()
        worker.close()
        return f"exit code {process.exitcode}"

    def end(self) -> None:
        """End all of them."""
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
            process.join()
        self._processes.clear()


def _work(connection: Connection, task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks, who ends the others
    work(connection, task)
