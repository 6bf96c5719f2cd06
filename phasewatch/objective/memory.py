"""How much memory a graph holds on to, what is given back to the system, and that there is no more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result")
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def with_saved_bytes(make: Callable[[], Result]) -> tuple[int, Result]:
    """What ``make`` returns, and the bytes of all tensors that backward passes through it need, each storage once."""
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        result = make()
    return sum(sizes.values()), result


def give_back() -> None:
    """Let the system have what is freed and still with the process; takes some milliseconds.

    The GNU C library keeps what lies between tensors that are held, and hardly uses it again for tensors, which are
    aligned. Elsewhere nothing is done.
    """
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python's, CUDA's, or that of PyTorch's allocator on the CPU, which has no class of its own."""
    told = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(phrase in told for phrase in _OUT_OF_MEMORY)
    )
