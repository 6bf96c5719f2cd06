"""Where the processes of a run wait for the first of them, which measures."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import distributed

PATIENCE = timedelta(days=7)
"""So long the others wait: longer than any measurement, as to give up would end training. Chosen."""


class Meeting:
    """A process group of its own.

    In that of training processes give up waiting after half an hour, and with NCCL a waiting process keeps its device
    busy. Here they wait on the CPU.
    """

    def __init__(self, trainer: Any) -> None:
        """Found the group; all processes of the trainer must, at the same time.

        Where PyTorch has no gloo, or processes do not talk by ``torch.distributed``, they meet as in training.
        """
        self._strategy = trainer.strategy
        self._group: Any = None
        if trainer.world_size > 1 and distributed.is_initialized() and distributed.is_gloo_available():
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def broadcast(self, given: Any) -> Any:
        """What the first process gives, once it has come; to be called by all."""
        if self._group is None:
            return self._strategy.broadcast(given)
        shared = [given]
        distributed.broadcast_object_list(shared, src=0, group=self._group)
        return shared[0]

    def end(self) -> None:
        """Leave the group; who waits in it for this process gets an error."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None
