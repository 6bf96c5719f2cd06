"""Keeping a measurement from leaving a trace: random streams, autograd modes and threads as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed


@dataclass(frozen=True)
class RandomState:
    """The state of every global random stream that PyTorch code draws from.

    Attributes:
        python: State of :mod:`random`.
        numpy: State of the legacy global NumPy generator.
        cpu: State of torch's default CPU generator.
        cuda: States of all CUDA generators; empty where CUDA was never initialised.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: tuple[torch.Tensor, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """Read the current state; does not initialise CUDA."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put every stream back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))

    def __eq__(self, other: object) -> bool:
        """Whether no stream has moved between the two states."""
        if not isinstance(other, RandomState):
            return NotImplemented
        return (
            self.python == other.python
            and all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
            and torch.equal(self.cpu, other.cpu)
            and len(self.cuda) == len(other.cuda)
            and all(torch.equal(a, b) for a, b in zip(self.cuda, other.cuda, strict=True))
        )


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore every global random stream on the way out, also when the body raises."""
    state = RandomState.capture()
    try:
        yield
    finally:
        state.restore()


def seed_everything(seed: int) -> None:
    """Seed the global streams; only for use inside :func:`preserved_randomness`.

    CUDA is not seeded before it is initialised: ``torch.manual_seed`` would put that off until then, in place of what
    the user has seeded, and keep the whole stack for an error message, which takes longer than a small evaluation.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class CollectiveError(RuntimeError):
    """A loss waits for other processes, which do not compute it now."""


_COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *(
        "barrier",
        "monitored_barrier",
        "broadcast",
        "broadcast_object_list",
        "gather",
        "gather_object",
        "recv",
        "reduce",
    ),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
)
"""Functions of ``torch.distributed`` that wait for other processes."""


@contextmanager
def _without_collectives() -> Iterator[None]:
    """Refuse what is asked of other processes, which are not measuring: it would wait for ever."""
    distributed: Any = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        yield
        return

    def refuse(*_: Any, **__: Any) -> Any:
        raise CollectiveError(
            "the loss waits for other processes (all_gather, all_reduce, barrier or the like), and one process "
            "alone measures it; give one that does without"
        )

    # torch's own functions call one another by their names in the second of these.
    places = [
        (m, name) for m in (distributed, distributed.distributed_c10d) for name in _COLLECTIVES if hasattr(m, name)
    ]
    before = [getattr(*place) for place in places]
    for place in places:
        setattr(*place, refuse)
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(*place, function)


_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def _on_threads(count: int) -> Iterator[None]:
    """Evaluate on so many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def isolated(threads: int | None = None) -> Iterator[None]:
    """Gradients on; all that might change what is computed off; random streams restored at the end.

    Off are inference mode, autocast, anomaly detection, ``torch.compile`` (what is compiled has no second derivatives)
    and collective communication.

    A measurement made inside may be started from any hook of a training framework (validation runs under
    ``inference_mode``, mixed precision under ``autocast``) and computes the same numbers in each. Anomaly detection
    watches the user's backward passes; ours are checked for finite values. Inside another one it does nothing: a
    product with a small matrix takes less time than setting all of this.

    Args:
        threads: Threads of the CPU to evaluate on; None for as many as there are.
    """
    if _inside.get():
        yield
        return
    with ExitStack() as stack:
        stack.callback(_inside.reset, _inside.set(True))
        stack.enter_context(preserved_randomness())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_collectives())
        if threads is not None:
            stack.enter_context(_on_threads(threads))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
