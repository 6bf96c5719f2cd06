"""Workers that are actors on a Ray cluster, or on one that is started on this machine."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from phasewatch.sweep.checkpoints import Checkpoint
from phasewatch.sweep.workers import Message, Task, work


@dataclass(eq=False)
class Actor:
    """A worker.

    Attributes:
        handle: What Ray knows it by.
        answer: What it is yet to say.
        ending: How it ended.
    """

    handle: Any
    answer: Any
    ending: str = "it was lost"


class Cluster:
    """A crew of Ray actors, on a CPU each.

    The cluster is the one that this process is connected to, else that of ``RAY_ADDRESS``, else a running one on this
    machine, else one that is started here and ended with the crew.
    """

    def __init__(self) -> None:
        """Connect.

        Raises:
            ImportError: If Ray is not installed.
        """
        try:
            self._ray = importlib.import_module("ray")
        except ImportError as error:
            raise ImportError("Ray is not installed: pip install 'phasewatch[ray]'") from error
        self._connected = not self._ray.is_initialized()
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        if self._connected:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._ray.init(log_to_driver=False, configure_logging=False)
        self._kind = self._ray.remote(num_cpus=1, max_concurrency=1)(Measuring)
        self._actors: list[Actor] = []

    def start(self, task: Task) -> Actor:
        """Start one, wherever there is room; it waits until there is."""
        here = [replace(checkpoint, path=checkpoint.path.absolute()) for checkpoint in task.checkpoints]
        handle = self._kind.remote(replace(task, checkpoints=here))
        actor = Actor(handle, handle.hear.remote())
        self._actors.append(actor)
        return actor

    def speaking(self, workers: Sequence[Actor]) -> list[Actor]:
        """Wait for those that have something to say, or have ended."""
        answers, _ = self._ray.wait([worker.answer for worker in workers])
        return [worker for worker in workers if worker.answer in answers]

    def hear(self, worker: Actor) -> Message | None:
        """What it has to say; None where it, or the machine that it was on, has ended."""
        try:
            message: Message = self._ray.get(worker.answer)
        except self._ray.exceptions.RayError as error:
            worker.ending = " ".join(str(error).split())
            return None
        return message

    def give(self, worker: Actor, checkpoint: Checkpoint) -> None:
        """Have it measure a checkpoint."""
        worker.answer = worker.handle.measure.remote(replace(checkpoint, path=checkpoint.path.absolute()))

    def dismiss(self, worker: Actor) -> None:
        """End it."""
        self._actors.remove(worker)
        self._ray.kill(worker.handle)

    def bury(self, worker: Actor) -> str:
        """What Ray says of its end."""
        self._actors.remove(worker)
        return worker.ending

    def end(self) -> None:
        """End all of them, and Ray where it was started for them."""
        for actor in self._actors:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor.handle)
        self._actors.clear()
        if self._connected:
            self._ray.shutdown()
            # Ray sets a handler of its own in the main thread, and leaves it there
            if threading.current_thread() is threading.main_thread() and self._on_sigterm is not None:
                signal.signal(signal.SIGTERM, self._on_sigterm)


class Measuring:
    """What an actor is: a thread that builds and measures, for a source gives its network only while it is used."""

    def __init__(self, task: Task) -> None:
        """Have it begin."""
        self._given: SimpleQueue[Checkpoint] = SimpleQueue()
        self._said: SimpleQueue[Message] = SimpleQueue()
        threading.Thread(target=work, args=(self, task), daemon=True).start()

    def hear(self) -> Message:
        """The next thing that it says."""
        return self._said.get()

    def measure(self, checkpoint: Checkpoint) -> Message:
        """Measure a checkpoint."""
        self._given.put(checkpoint)
        return self.hear()

    def recv(self) -> Checkpoint:
        """For the thread: the next checkpoint."""
        return self._given.get()

    def send(self, message: Message) -> None:
        """For the thread: say something."""
        self._said.put(message)
