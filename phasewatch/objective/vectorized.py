"""The loss, its gradient or its samples at several places in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from phasewatch.interruption import safe_point
from phasewatch.objective.function import PureLoss
from phasewatch.objective.program import (
    Evaluation,
    LossOfTensors,
    Program,
    UntraceableError,
    losses,
    losses_and_gradients,
    sample_losses,
)
from phasewatch.objective.start import Recomputed

Kind = Literal["gradients", "losses", "samples"]
Block = tuple[int, ...]
"""Numbers of batches that are evaluated in one call."""

LARGEST_BLOCK = 2**17
"""Bytes of data up to which batches of one shape are evaluated together where all are asked for. Chosen."""

_PROGRAMS: WeakKeyDictionary[Any, dict[Any, Program]] = WeakKeyDictionary()
"""By loss function, so that a later measurement of the same network need not trace or compile again."""


class Vectorized:
    """Evaluations of an objective that share the overhead of a call between places, and where they can, batches.

    What is run is a :class:`Program` where the objective can be traced, else ``vmap``. It is compared once with single
    evaluations; where it does not agree with them, the loss draws random numbers or writes to its inputs, or the
    outputs are too large to be held, there are only those.
    """

    def __init__(self, function: PureLoss) -> None:
        """Nothing is tried yet."""
        self._function = function
        self._works: bool | None = None
        self._has_sample_losses: bool | None = None
        self._evaluations: dict[tuple[Kind, Block, int, bool], Callable[[Tensor], tuple[Tensor, ...]]] = {}
        self._programs: dict[Any, Program | None] = {}
        self._blocks: dict[tuple[Kind, int, bool], list[Block]] = {}

    def losses_and_gradients(self, vectors: Tensor, batch: int | None, compiled: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Objective.losses_and_gradients`."""
        if self._can_evaluate(vectors, compiled):
            values, gradients = self._evaluate("gradients", vectors, batch, compiled)
            return values, gradients
        pairs = [self._function.loss_and_gradient(vector, batch) for vector in vectors]
        return torch.stack([loss for loss, _ in pairs]), torch.stack([gradient for _, gradient in pairs])

    def losses(self, vectors: Tensor, batch: int | None) -> Tensor:
        """See :meth:`Objective.losses`."""
        if self._can_evaluate(vectors, compiled=False):
            return self._evaluate("losses", vectors, batch, compiled=False)[0]
        with torch.no_grad():
            batches = range(self._function.num_batches) if batch is None else [batch]
            weights = self._function.batch_weights if batch is None else [1.0]
            return torch.stack([self._mean(vector, batches, weights) for vector in vectors])

    def sample_losses(self, vectors: Tensor, batch: int) -> Tensor:
        """See :meth:`Objective.sample_losses`."""
        if self._recomputes() or not (self._function.is_pure and any(self._per_sample(batch))):
            raise ValueError(
                "The loss draws random numbers, the batch has no tensor with one entry a sample, or the outputs are "
                "too large to be held."
            )
        if self._function.one_at_a_time and len(vectors) > 1:
            return torch.cat([self.sample_losses(vector[None], batch) for vector in vectors])
        try:
            if self._has_sample_losses is None:
                with torch.no_grad():
                    (found,) = self._evaluation("samples", (batch,))(vectors[:1], self._tensors((batch,)))
                    whole = self._function.evaluate(vectors[0], batch)
                self._has_sample_losses = torch.allclose(found.mean(), whole, rtol=1e-3, atol=1e-6)
            if self._has_sample_losses:
                return self._evaluate("samples", vectors, batch, compiled=False)[0]
        except Exception as error:
            raise ValueError(f"The loss cannot be taken sample by sample ({type(error).__name__}: {error}).") from error
        raise ValueError("The loss of a batch is not the mean of the losses of its samples.")

    def _can_evaluate(self, vectors: Tensor, compiled: bool) -> bool:
        if self._function.one_at_a_time or not self._function.is_pure or self._recomputes():
            return False
        if len(vectors) == 1:
            return compiled
        if self._works is None:
            evaluate = _on(self._evaluation("gradients", (0,)), self._tensors((0,)))
            self._works = self._agrees(evaluate, vectors, (0,))
        return self._works

    def _recomputes(self) -> bool:
        """Whether one place is enough for the memory: outputs too large to be held."""
        return any(isinstance(reading.data, Recomputed) for reading in self._function.readings)

    def _evaluate(self, kind: Kind, vectors: Tensor, batch: int | None, compiled: bool) -> tuple[Tensor, ...]:
        if batch is not None:
            return self._at_once(kind, vectors, (batch,), compiled)
        case = (kind, len(vectors), compiled)
        if case not in self._blocks:
            self._blocks[case] = list(self._divide(kind, vectors, compiled))
        if len(self._blocks[case]) == 1:
            value, *gradients = self._at_once(kind, vectors, self._blocks[case][0], compiled)
            return (value.double(), *gradients)
        means: list[Tensor] = []
        for block in self._blocks[case]:
            weight = sum(self._function.batch_weights[i] for i in block)
            found = self._at_once(kind, vectors, block, compiled)
            shares = [found[0].double() * weight, *(gradients * weight for gradients in found[1:])]
            means = [mean.add_(share) for mean, share in zip(means, shares, strict=True)] if means else shares
        return tuple(means)

    def _at_once(self, kind: Kind, vectors: Tensor, block: Block, compiled: bool) -> tuple[Tensor, ...]:
        safe_point()
        case = (kind, block, len(vectors), compiled)
        if case not in self._evaluations:
            program, tensors = self._program(kind, vectors, block, compiled), self._tensors(block)
            self._evaluations[case] = program.on(tensors) if program else _on(self._evaluation(kind, block), tensors)
        return self._evaluations[case](vectors)

    def _divide(self, kind: Kind, vectors: Tensor, compiled: bool) -> Iterator[Block]:
        """All batches, those of one shape together as far as memory and a program allow."""
        alike: dict[Any, list[int]] = {}
        for batch in range(self._function.num_batches):
            alike.setdefault(self._signature((batch,)), []).append(batch)
        for batches in alike.values():
            size = sum(t.numel() * t.element_size() for t in self._own_tensors(batches[0]))
            parts = -(-len(batches) * size // LARGEST_BLOCK)
            for part in np.array_split(batches, min(max(parts, 1), len(batches))):
                block = tuple(part.tolist())
                if len(block) == 1 or self._program(kind, vectors, block, compiled):
                    yield block
                else:
                    yield from ((batch,) for batch in block)

    def _own_tensors(self, batch: int) -> list[Tensor]:
        """The data of a batch, and what is read beside its outputs."""
        read = (tensor for reading in self._function.readings for tensor in reading.data[batch])
        return [*self._function.data[batch], *read]

    def _tensors(self, block: Block) -> list[Tensor]:
        """Everything but the parameters that an evaluation depends on."""
        fixed = list(self._function.fixed.values())
        if len(block) == 1:
            return fixed + self._own_tensors(block[0])
        stacked = [torch.stack(alike) for alike in zip(*map(self._own_tensors, block), strict=True)]
        weights = torch.tensor([self._function.batch_weights[i] for i in block], dtype=torch.float64)
        return [*fixed, *stacked, (weights / weights.sum()).to(self._function.device)]

    def _per_sample(self, batch: int) -> list[bool]:
        """Which of the tensors of a batch have an entry for each sample."""
        size = self._function.batch_sizes[batch]
        own = [t.dim() > 0 and t.shape[0] == size for t in self._own_tensors(batch)]
        return [False] * len(self._function.fixed) + own

    def _loss_of_tensors(self, block: Block) -> LossOfTensors:
        function, batch = self._function, block[0]

        def loss(vector: Tensor, tensors: list[Tensor]) -> Tensor:
            given = iter(tensors)
            fixed = {name: next(given) for name in function.fixed}
            data = [next(given) for _ in function.data[batch]]
            read = [[next(given) for _ in reading.data[batch]] for reading in function.readings]
            return function.call(vector, batch, data, fixed, read)

        def mean_loss(vector: Tensor, tensors: list[Tensor]) -> Tensor:
            fixed, stacked, weights = tensors[: len(function.fixed)], tensors[len(function.fixed) : -1], tensors[-1]
            return torch.func.vmap(lambda own: loss(vector, fixed + own))(stacked).double() @ weights

        return loss if len(block) == 1 else mean_loss

    def _evaluation(self, kind: Kind, block: Block) -> Evaluation:
        loss = self._loss_of_tensors(block)
        if kind == "samples":
            return sample_losses(loss, self._per_sample(block[0]))
        return losses(loss) if kind == "losses" else losses_and_gradients(loss)

    def _signature(self, block: Block) -> tuple[Any, ...]:
        """Equal where the same program serves."""
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in self._tensors(block[:1]))
        return shapes, self._function.batch_signature(block[0]), len(block)

    def _program(self, kind: Kind, vectors: Tensor, block: Block, compiled: bool) -> Program | None:
        """The trace that serves a block of this shape; None where there is none, or where it hardly pays."""
        function = self._function
        if len(vectors) == 1 and not compiled:  # a large network: tracing would hold all that lies between
            return None
        readers = tuple(reading.reader for reading in function.readings)
        place = (vectors.shape, vectors.dtype, vectors.device)
        key = (
            kind,
            compiled,
            place,
            *self._signature(block),
            tuple(function.parameter_shapes),
            readers,
            function.held,
            function.wide,
            function.outputs_fn,
            function.mode,
            function.constants,
        )
        if key in self._programs:
            return self._programs[key]
        try:
            shared = _PROGRAMS.setdefault(function.loss_fn, {})
        except TypeError:  # a loss function that cannot be a key
            shared = {}

        def trace() -> Program | None:
            with suppress(UntraceableError):
                return Program(self._evaluation(kind, block), vectors, self._tensors(block), compiled)
            return None

        finders: tuple[Callable[[], Program | None], ...] = (lambda: shared.get(key), trace)
        # The module may have changed in other things than tensors since it was traced.
        for find in finders:
            program = find()
            if program and self._agrees(program.on(self._tensors(block)), vectors, block):
                self._programs[key] = shared[key] = program
                return program
        self._programs[key] = None
        return None

    def _agrees(self, evaluate: Callable[[Tensor], tuple[Tensor, ...]], vectors: Tensor, block: Block) -> bool:
        """Whether it says what single evaluations say, some way off where gradients are not small."""
        places = 1.1 * vectors + 0.01
        loss, gradient = self._single(places[-1], block)
        if not (loss.isfinite() and gradient.isfinite().all()):
            places = vectors
            loss, gradient = self._single(places[-1], block)
        try:
            values, *gradients = evaluate(places)
        except Exception:
            return False
        tolerance = float(torch.finfo(self._function.dtype).eps) ** 0.5
        same_loss = torch.allclose(values[-1].mean().to(loss), loss, rtol=tolerance, atol=0.0, equal_nan=True)
        return same_loss and all(
            bool((found[-1] - gradient).norm() <= tolerance * gradient.norm()) for found in gradients
        )

    def _mean(self, vector: Tensor, batches: Iterable[int], weights: list[float]) -> Tensor:
        losses = [weight * self._function.evaluate(vector, i) for i, weight in zip(batches, weights, strict=True)]
        return torch.stack(losses).sum()

    def _single(self, place: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        weights = [self._function.batch_weights[i] for i in block]
        pairs = [self._function.loss_and_gradient(place, i) for i in block]
        shares = [(weight / sum(weights), *pair) for weight, pair in zip(weights, pairs, strict=True)]
        loss = torch.stack([share * loss for share, loss, _ in shares]).sum()
        return loss, torch.stack([share * gradient for share, _, gradient in shares]).sum(dim=0)


def _on(evaluation: Evaluation, tensors: list[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """An evaluation that is not traced, on given tensors."""

    def found(vectors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # slow batching rules of single operators
            return evaluation(vectors, tensors)

    return found
