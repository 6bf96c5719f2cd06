"""Losses and gradients as straight lists of tensor operations, traced once and run many times."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

LossOfTensors = Callable[[Tensor, list[Tensor]], Tensor]
"""``loss(vector, tensors)``: a scalar made of a flat vector of parameters and everything else that is a tensor."""


class UntraceableError(RuntimeError):
    """The function decides by values of tensors which operations to run, or uses what cannot be recorded."""


class GradientProgram:
    """The operations that give a loss and its gradient at several places.

    A trace has the overhead of neither the module nor autograd nor ``vmap``. All tensors are inputs, so that it serves
    for other data of the same shapes; where a value of one decides on what is run, tracing fails.
    """

    def __init__(self, loss: LossOfTensors, vectors: Tensor, tensors: list[Tensor], compiled: bool) -> None:
        """Trace.

        Args:
            loss: What to trace.
            vectors: Places as they will be asked for, shape ``(places, num_parameters)``.
            tensors: The other tensors, with the shapes that they will have.
            compiled: Whether to compile what was traced; takes some seconds to half a minute, and a C++ compiler.

        Raises:
            UntraceableError: If it cannot be traced.
        """

        def losses_and_gradients(places: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor]:
            leaves = places.detach().requires_grad_()
            if len(places) == 1:
                losses = loss(leaves[0], others).unsqueeze(0)
            else:
                losses = torch.func.vmap(lambda vector: loss(vector, others))(leaves)
            (gradients,) = torch.autograd.grad(losses.sum(), leaves)
            return losses.detach(), gradients.detach()

        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._run: Callable[..., Any] = make_fx(losses_and_gradients)(vectors, tensors)
        except Exception as error:
            raise UntraceableError(f"{type(error).__name__}: {error}") from error
        if compiled:
            self._compile(vectors, tensors)

    def __call__(self, vectors: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Losses, shape ``(places,)``, and gradients, shape ``(places, num_parameters)``."""
        with torch.no_grad():
            losses, gradients = self._run(vectors, tensors)
        return losses, gradients

    def _compile(self, vectors: Tensor, tensors: list[Tensor]) -> None:
        compiled = torch.compile(self._run, dynamic=False)
        try:
            with torch.no_grad():
                compiled(vectors, tensors)
        except Exception as error:
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {str(error)[:200]}); going on without, which is slower "
                "and otherwise the same.",
                stacklevel=2,
            )
        else:
            self._run = compiled
