"""The loss, its gradient or its samples at several places in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from phasewatch.program import (
    Evaluation,
    LossOfTensors,
    Program,
    UntraceableError,
    losses,
    losses_and_gradients,
    sample_losses,
)

if TYPE_CHECKING:
    from phasewatch.objective import Objective

Kind = Literal["gradients", "losses", "samples"]
Block = tuple[int, ...]
"""Numbers of batches that are evaluated in one call."""

LARGEST_BLOCK = 2**17
"""Bytes of data up to which batches of one shape are evaluated together where all are asked for."""

_PROGRAMS: WeakKeyDictionary[Any, dict[Any, Program]] = WeakKeyDictionary()
"""By loss function, so that a later measurement of the same network need not trace or compile again."""


class Vectorized:
    """Evaluations of an objective that share the overhead of a call between places, and where they can, batches.

    What is run is a :class:`Program` where the objective can be traced, else ``vmap``. It is compared once with single
    evaluations; where it does not agree with them, or the loss draws random numbers or writes to its inputs, there are
    only those.
    """

    def __init__(self, objective: Objective) -> None:
        """Nothing is tried yet."""
        self._objective = objective
        self._works: bool | None = None
        self._has_sample_losses: bool | None = None
        self._evaluations: dict[tuple[Kind, Block, int, bool], tuple[Evaluation, list[Tensor]]] = {}
        self._programs: dict[Any, Program | None] = {}
        self._blocks: dict[tuple[Kind, int, bool], list[Block]] = {}

    def losses_and_gradients(self, vectors: Tensor, batch: int | None, compiled: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Objective.losses_and_gradients`."""
        if self._can_evaluate(vectors, compiled):
            values, gradients = self._evaluate("gradients", vectors, batch, compiled)
            return values, gradients
        pairs = [self._objective.loss_and_gradient(vector, batch) for vector in vectors]
        return torch.stack([loss for loss, _ in pairs]), torch.stack([gradient for _, gradient in pairs])

    def losses(self, vectors: Tensor, batch: int | None) -> Tensor:
        """See :meth:`Objective.losses`."""
        if self._can_evaluate(vectors, compiled=False):
            return self._evaluate("losses", vectors, batch, compiled=False)[0]
        with torch.no_grad():
            return torch.stack([self._objective.loss(vector, batch) for vector in vectors])

    def sample_losses(self, vectors: Tensor, batch: int) -> Tensor:
        """See :meth:`Objective.sample_losses`."""
        if not (self._objective.is_pure and any(self._per_sample(batch))):
            raise ValueError("The loss draws random numbers, or the batch has no tensor with one entry a sample.")
        try:
            if self._has_sample_losses is None:
                with torch.no_grad():
                    (found,) = self._evaluation("samples", (batch,))(vectors[:1], self._tensors((batch,)))
                    whole = self._objective.loss(vectors[0], batch)
                self._has_sample_losses = torch.allclose(found.mean(), whole, rtol=1e-3, atol=1e-6)
            if self._has_sample_losses:
                return self._evaluate("samples", vectors, batch, compiled=False)[0]
        except Exception as error:
            raise ValueError(f"The loss cannot be taken sample by sample ({type(error).__name__}: {error}).") from error
        raise ValueError("The loss of a batch is not the mean of the losses of its samples.")

    def _can_evaluate(self, vectors: Tensor, compiled: bool) -> bool:
        if len(vectors) == 1:
            return compiled and self._objective.is_pure
        if self._works is None:
            self._works = self._objective.is_pure and self._agrees(self._evaluation("gradients", (0,)), vectors, (0,))
        return self._works

    def _evaluate(self, kind: Kind, vectors: Tensor, batch: int | None, compiled: bool) -> tuple[Tensor, ...]:
        if batch is not None:
            return self._at_once(kind, vectors, (batch,), compiled)
        case = (kind, len(vectors), compiled)
        if case not in self._blocks:
            self._blocks[case] = list(self._divide(kind, vectors, compiled))
        means: list[Tensor] = []
        for block in self._blocks[case]:
            weight = sum(self._objective.batch_weights[i] for i in block)
            found = self._at_once(kind, vectors, block, compiled)
            shares = [found[0].double() * weight, *(gradients * weight for gradients in found[1:])]
            means = [mean.add_(share) for mean, share in zip(means, shares, strict=True)] if means else shares
        return tuple(means)

    def _at_once(self, kind: Kind, vectors: Tensor, block: Block, compiled: bool) -> tuple[Tensor, ...]:
        case = (kind, block, len(vectors), compiled)
        if case not in self._evaluations:
            evaluation = self._program(kind, vectors, block, compiled) or self._evaluation(kind, block)
            self._evaluations[case] = evaluation, self._tensors(block)
        evaluate, tensors = self._evaluations[case]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # slow batching rules of single operators
            return evaluate(vectors, tensors)

    def _divide(self, kind: Kind, vectors: Tensor, compiled: bool) -> Iterator[Block]:
        """All batches, those of one shape together as far as memory and a program allow."""
        alike: dict[Any, list[int]] = {}
        for batch in range(self._objective.num_batches):
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
        reader = self._objective.output_reader
        data = [leaf for leaf in tree_leaves(self._objective.batches[batch]) if isinstance(leaf, Tensor)]
        return data + (reader[2][batch] if reader else [])

    def _tensors(self, block: Block) -> list[Tensor]:
        """Everything but the parameters that an evaluation depends on."""
        fixed = list(self._objective.fixed.values())
        if len(block) == 1:
            return fixed + self._own_tensors(block[0])
        stacked = [torch.stack(alike) for alike in zip(*map(self._own_tensors, block), strict=True)]
        weights = torch.tensor([self._objective.batch_weights[i] for i in block], dtype=torch.float64)
        return [*fixed, *stacked, (weights / weights.sum()).to(self._objective.device)]

    def _per_sample(self, batch: int) -> list[bool]:
        """Which of the tensors of a batch have an entry for each sample."""
        size = self._objective.batch_sizes[batch]
        own = [t.dim() > 0 and t.shape[0] == size for t in self._own_tensors(batch)]
        return [False] * len(self._objective.fixed) + own

    def _loss_of_tensors(self, block: Block) -> LossOfTensors:
        objective, batch = self._objective, block[0]
        leaves, structure = tree_flatten(objective.batches[batch])

        def loss(vector: Tensor, tensors: list[Tensor]) -> Tensor:
            given = iter(tensors)
            fixed = {name: next(given) for name in objective.fixed}
            data = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return objective.call(vector, batch, tree_unflatten(data, structure), fixed, list(given))

        def mean_loss(vector: Tensor, tensors: list[Tensor]) -> Tensor:
            fixed, stacked, weights = tensors[: len(objective.fixed)], tensors[len(objective.fixed) : -1], tensors[-1]
            return torch.func.vmap(lambda own: loss(vector, fixed + own))(stacked).double() @ weights

        return loss if len(block) == 1 else mean_loss

    def _evaluation(self, kind: Kind, block: Block) -> Evaluation:
        loss = self._loss_of_tensors(block)
        if kind == "samples":
            return sample_losses(loss, self._per_sample(block[0]))
        return losses(loss) if kind == "losses" else losses_and_gradients(loss)

    def _signature(self, block: Block) -> tuple[Any, ...]:
        """Equal where the same program serves."""
        leaves, structure = tree_flatten(self._objective.batches[block[0]])
        constants = tuple(None if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in self._tensors(block[:1]))
        return shapes, constants, str(structure), len(block)

    def _program(self, kind: Kind, vectors: Tensor, block: Block, compiled: bool) -> Program | None:
        """The trace that serves a block of this shape; None where there is none, or where it hardly pays."""
        objective = self._objective
        if len(vectors) == 1 and not compiled:  # a large network: tracing would hold all that lies between
            return None
        reader = objective.output_reader[:2] if objective.output_reader else None
        place = (vectors.shape, vectors.dtype, vectors.device)
        key = (
            kind,
            compiled,
            place,
            *self._signature(block),
            tuple(objective.parameter_shapes),
            reader,
            objective.mode,
        )
        if key in self._programs:
            return self._programs[key]
        try:
            shared = _PROGRAMS.setdefault(objective.loss_fn, {})
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
            if program and self._agrees(program, vectors, block):
                self._programs[key] = shared[key] = program
                return program
        self._programs[key] = None
        return None

    def _agrees(self, evaluate: Evaluation, vectors: Tensor, block: Block) -> bool:
        """Whether it says what single evaluations say, some way off where gradients are not small."""
        places = 1.1 * vectors + 0.01
        loss, gradient = self._single(places[-1], block)
        if not (loss.isfinite() and gradient.isfinite().all()):
            places = vectors
            loss, gradient = self._single(places[-1], block)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values, *gradients = evaluate(places, self._tensors(block))
        except Exception:
            return False
        tolerance = float(torch.finfo(self._objective.dtype).eps) ** 0.5
        same_loss = torch.allclose(values[-1].mean().to(loss), loss, rtol=tolerance, atol=tolerance**2, equal_nan=True)
        return same_loss and all(
            bool((found[-1] - gradient).norm() <= tolerance * gradient.norm() + tolerance**2) for found in gradients
        )

    def _single(self, place: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        weights = [self._objective.batch_weights[i] for i in block]
        pairs = [self._objective.loss_and_gradient(place, i) for i in block]
        shares = [(weight / sum(weights), *pair) for weight, pair in zip(weights, pairs, strict=True)]
        loss = torch.stack([share * loss for share, loss, _ in shares]).sum()
        return loss, torch.stack([share * gradient for share, _, gradient in shares]).sum(dim=0)
