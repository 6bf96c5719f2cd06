"""What an optimizer gives away while it works: its learning rates, and the lengths of gradient, weights and update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NORMS = ("gradient_norm", "weight_norm", "update_norm", "gradient_variance", "gradient_product")
"""Signals that are read every so many steps, as time allows."""
LARGEST_COPY = 2**22
"""Numbers of the weights and of the gradient that are kept from one step to the next: 16 MB each in float32. Of more
parameters it is every so manieth. Chosen."""
SLOWEST_MEMORY = 1e11
"""Bytes a second that any GPU for training moves: what one does is not waited for, so a bound on it is taken."""
PASSES = 8
"""Times that reading at two steps moves the parameters through memory, at most. Chosen."""


@dataclass(frozen=True)
class _Kept:
    """What is compared with the next step."""

    step: int
    parameters: Sequence[Tensor]
    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    stride: int
    scales: Sequence[float] | None

    def part(self, tensor: Tensor) -> Tensor:
        """What of a tensor is kept."""
        return tensor if self.stride == 1 else tensor.reshape(-1)[:: self.stride]


class UpdateReader:
    """Reads an optimizer at chosen steps, just before it makes them. Nothing of it is changed.

    Attributes:
        optimizer: What is read.
        which: Stands behind the names of its signals.
        rate_name: Of its learning rate, that of its first group.
        is_broken: Whether reading has failed; for the owner to keep.
        reads: How many times the norms were read.
    """

    def __init__(self, optimizer: Optimizer, which: str = "") -> None:
        """Nothing is read yet.

        Args:
            optimizer: What is read.
            which: Stands behind the names of its signals.
        """
        self.optimizer = optimizer
        self.which = which
        self.rate_name = f"learning_rate{which}"
        self.is_broken = False
        self.reads = 0
        self._kept: _Kept | None = None
        self._differing: set[int] = set()
        self._bytes = 0
        self._on_host = True

    @property
    def is_waiting(self) -> bool:
        """Whether something is to be compared with the next step."""
        return self._kept is not None

    @property
    def seconds_on_device(self) -> float:
        """A bound on what a device other than the host has to do for reading at one step."""
        return 0.0 if self._on_host else 0.5 * PASSES * self._bytes / SLOWEST_MEMORY

    def learning_rates(self) -> list[tuple[str, Any]]:
        """That of the first group as ``learning_rate``, and ``learning_rate_group_<k>`` where one ever differed."""
        groups = self.optimizer.param_groups
        first = groups[0].get("lr")
        rates = [(self.rate_name, first)]
        for k, group in enumerate(groups[1:], start=1) if len(groups) > 1 else ():
            rate = group.get("lr")
            # comparing tensors would wait for their device
            if k in self._differing or isinstance(rate, Tensor) or isinstance(first, Tensor) or rate != first:
                self._differing.add(k)
                rates.append((f"{self.rate_name}_group_{k}", rate))
        return rates

    @torch.no_grad()
    def read(self, step: int, begins: bool) -> list[tuple[int, str, Tensor]]:
        """Read now, when the gradients are there and the weights have not moved yet.

        Args:
            step: Optimizer steps made before.
            begins: Whether to read the norms at this step; else only what was begun at the one before is ended.

        Returns:
            Step, name and value of ``gradient_norm`` and ``weight_norm`` of this step, and of the step before, if it
            was begun there, ``update_norm``, ``gradient_variance`` (½ |g - g'|² of the gradients g and g' of both
            steps) and ``gradient_product`` (g·g').
        """
        kept = self._kept
        if kept is not None and step == kept.step:
            return []  # a closure that is called more than once in a step
        self._kept = None
        found: list[tuple[int, str, Tensor]] = []
        if kept is not None and step == kept.step + 1:
            found += self._compared(kept)
        if not begins:
            return self._named(found)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return self._named(found)
        self.reads += 1
        weights, gradients = [p.detach() for p in parameters], [_dense(p.grad) for p in parameters]
        found += [(step, "gradient_norm", _norm(gradients)), (step, "weight_norm", _norm(weights))]
        self._bytes, self._on_host = sum(p.nbytes for p in parameters), parameters[0].is_cpu
        self._kept = _keep(step, [p for p in parameters if not _grad(p).is_sparse])
        return self._named(found)

    def _named(self, found: list[tuple[int, str, Tensor]]) -> list[tuple[int, str, Tensor]]:
        return [(step, f"{name}{self.which}", value) for step, name, value in found]

    def _compared(self, kept: _Kept) -> list[tuple[int, str, Tensor]]:
        if not kept.parameters:
            return []
        weights = [kept.part(p.detach()) for p in kept.parameters]
        update = _norm(_differences(weights, kept.weights), kept.scales)
        found = [(kept.step, "update_norm", update)]
        if any(p.grad is None or p.grad.is_sparse for p in kept.parameters):
            return found
        gradients = [kept.part(_grad(p)) for p in kept.parameters]
        variance = 0.5 * _norm(_differences(gradients, kept.gradients), kept.scales).square()
        # g·g' = ½ (|g|² + |g'|²) - ½ |g - g'|²
        squares = _norm(gradients, kept.scales).square() + _norm(kept.gradients, kept.scales).square()
        return [
            *found,
            (kept.step, "gradient_variance", variance),
            (kept.step, "gradient_product", 0.5 * squares - variance),
        ]


def _keep(step: int, parameters: Sequence[Tensor]) -> _Kept:
    """Copy weights and gradients: all of them, or of many an even part of each tensor."""
    size = sum(p.numel() for p in parameters)
    if size <= LARGEST_COPY:
        weights, gradients = [p.detach().clone() for p in parameters], [_grad(p).clone() for p in parameters]
        return _Kept(step, parameters, weights, gradients, 1, None)
    # odd, so that of rows whose length is a power of two every place has its turn
    stride = -(-size // LARGEST_COPY) | 1
    weights = [p.detach().reshape(-1)[::stride].clone() for p in parameters]
    gradients = [_grad(p).reshape(-1)[::stride].clone() for p in parameters]
    scales = [(p.numel() / part.numel()) ** 0.5 for p, part in zip(parameters, weights, strict=True)]
    return _Kept(step, parameters, weights, gradients, stride, scales)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()


def _dense(gradient: Any) -> Tensor:
    """The values that stand in a gradient; all others are zero."""
    plain: Tensor = gradient.detach()
    return plain.coalesce().values() if plain.is_sparse else plain


def _differences(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_sub(list(tensors), list(others))


def _norm(tensors: Sequence[Tensor], scales: Sequence[float] | None = None) -> Tensor:
    """The length of all of them as one vector, each scaled; summed in single precision at least."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    norms = torch._foreach_norm(tensors, 2, dtype=dtype)  # type: ignore[arg-type]
    if scales is not None:
        norms = torch._foreach_mul(norms, scales)  # type: ignore[arg-type]
    return torch.linalg.vector_norm(torch.stack(norms))  # type: ignore[arg-type]
