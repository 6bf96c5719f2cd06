"""How much memory a graph holds on to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result")


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
