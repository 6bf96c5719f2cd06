"""Losses and gradients as straight lists of tensor operations, traced once and run many times."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from phasewatch.objective.simplified import simplified

LossOfTensors = Callable[[Tensor, list[Tensor]], Tensor]
"""``loss(vector, tensors)``: a scalar made of a flat vector of parameters and everything else that is a tensor."""
Evaluation = Callable[[Tensor, list[Tensor]], tuple[Tensor, ...]]
"""``evaluation(vectors, tensors)``: the like for several vectors, shape ``(places, num_parameters)``."""


class UntraceableError(RuntimeError):
    """The function decides by values of tensors which operations to run, or uses what cannot be recorded."""


def losses(loss: LossOfTensors) -> Evaluation:
    """The loss at several places, shape ``(places,)``."""

    def evaluation(vectors: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        if len(vectors) == 1:
            return (loss(vectors[0], tensors).unsqueeze(0),)
        return (torch.func.vmap(lambda vector: loss(vector, tensors))(vectors),)

    return evaluation


def losses_and_gradients(loss: LossOfTensors) -> Evaluation:
    """The loss at several places, shape ``(places,)``, and its gradients, shape ``(places, num_parameters)``."""

    def evaluation(vectors: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = vectors.detach().requires_grad_()
            (found,) = losses(loss)(leaves, tensors)
            (gradients,) = torch.autograd.grad(found.sum(), leaves)
        return found.detach(), gradients.detach()

    return evaluation


def sample_losses(loss: LossOfTensors, per_sample: list[bool]) -> Evaluation:
    """The loss of each sample at several places, shape ``(places, samples)``.

    Args:
        loss: Of a batch, a mean over its samples.
        per_sample: Which of the tensors have an entry for each sample.
    """

    def of_one(vector: Tensor, tensors: list[Tensor]) -> Tensor:
        batches_of_one = [t.unsqueeze(0) if chosen else t for t, chosen in zip(tensors, per_sample, strict=True)]
        return loss(vector, batches_of_one)

    def evaluation(vectors: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        over_samples = torch.func.vmap(of_one, in_dims=(None, [0 if chosen else None for chosen in per_sample]))
        return (torch.func.vmap(over_samples, in_dims=(0, None))(vectors, tensors),)

    return evaluation


class Program:
    """The operations of an evaluation.

    A trace has the overhead of neither the module nor autograd nor ``vmap``. All tensors are inputs, so that it serves
    for other data of the same shapes; where a value of one decides on what is run, tracing fails.
    """

    def __init__(self, evaluation: Evaluation, vectors: Tensor, tensors: list[Tensor], compiled: bool) -> None:
        """Trace.

        Args:
            evaluation: What to trace.
            vectors: Places as they will be asked for, shape ``(places, num_parameters)``.
            tensors: The other tensors, with the shapes that they will have.
            compiled: Whether to compile what was traced; takes some seconds to half a minute, and a C++ compiler.

        Raises:
            UntraceableError: If it cannot be traced.
        """

        def flat(varying: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            return evaluation(varying, list(others))

        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._steps = simplified(make_fx(flat)(vectors, *tensors))
        except Exception as error:
            raise UntraceableError(f"{type(error).__name__}: {error}") from error
        if compiled:
            self._compile(vectors, tensors)

    def on(self, tensors: list[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """What the evaluation returns of several vectors, detached; what depends on these tensors alone is kept."""
        run = self._steps.each
        with torch.no_grad():
            kept = self._steps.once(*tensors)

        def found(vectors: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return run(vectors, *kept)

        return found

    def _compile(self, vectors: Tensor, tensors: list[Tensor]) -> None:
        compiled = torch.compile(self._steps.each, dynamic=False)
        try:
            with torch.no_grad(), torch.compiler.set_stance("default"):
                compiled(vectors, *self._steps.once(*tensors))
        except Exception as error:
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {str(error)[:200]}); going on without, which is slower "
                "and otherwise the same.",
                stacklevel=2,
            )
        else:
            self._steps = replace(self._steps, each=torch.compiler.set_stance("default")(compiled))
