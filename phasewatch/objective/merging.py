"""Whether several batches may be taken as one: the loss must be the same, and fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phasewatch.isolation import isolated
from phasewatch.objective.function import LossFn, OutputsFn
from phasewatch.objective.loss import Objective, same_loss
from phasewatch.objective.memory import with_saved_bytes

LARGEST_GRAPH = 2**28
"""Bytes that the graph of a loss may hold on to for all samples together. Chosen."""
SHIFT = 0.5
"""How far from the parameters the losses are compared a second time, in units of one over the root of the width.
Chosen."""


def one_batch_serves(
    module: nn.Module,
    batches: Sequence[Any],
    sizes: Sequence[int] | None,
    collate_all: Callable[[], Any],
    *,
    loss_fn: LossFn,
    outputs_fn: OutputsFn | None = None,
    mode: Literal["eval", "train"] = "eval",
    seed: int = 0,
) -> bool:
    """Tell whether a network may be measured on all samples at once in place of batch by batch.

    A loss that compares the samples of a batch (in-batch negatives, episodes), averages over something else than
    samples, or takes batches of one size only is another function of one large batch.

    Args:
        module: The network.
        batches: The samples in batches as training sees them.
        sizes: Samples in each batch; default what can be read off.
        collate_all: Gives the same samples as one batch.
        loss_fn: ``loss_fn(module, batch) -> scalar mean loss``.
        outputs_fn: As for :class:`Objective`.
        mode: As for :class:`Objective`.
        seed: As for :class:`Objective`.

    Raises:
        ValueError: If the loss of the batches themselves cannot be used, see :class:`Objective`.
    """
    with isolated():
        settings: dict[str, Any] = {"loss_fn": loss_fn, "outputs_fn": outputs_fn, "mode": mode, "seed": seed}
        parts = Objective(module, batches, batch_sizes=sizes, **settings)
        if parts.num_batches == 1:
            return True
        if not parts.is_pure or _graph_size(parts) * parts.num_samples / parts.batch_sizes[0] > LARGEST_GRAPH:
            return False
        try:
            whole = Objective(module, [collate_all()], batch_sizes=[parts.num_samples], **settings)
        except Exception:  # a network that takes batches of one size only
            return False
        return _same(parts, whole, parts.parameters) and _same(parts, whole, _elsewhere(parts))


def _elsewhere(objective: Objective) -> Tensor:
    """A place where nothing is zero any more: heads often start there, and hide what is made of them."""
    generator = torch.Generator().manual_seed(objective.num_parameters)
    moved = [
        (piece + SHIFT * (piece.shape[-1] if piece.dim() else 1) ** -0.5 * noise.to(piece)).flatten()
        for piece in objective.unflatten(objective.parameters).values()
        for noise in [torch.randn(piece.shape, generator=generator, dtype=torch.float64)]
    ]
    return torch.cat(moved)


def _same(one: Objective, other: Objective, vector: Tensor) -> bool:
    with torch.no_grad():
        return same_loss(float(other.loss(vector)), float(one.loss(vector)))


def _graph_size(objective: Objective) -> int:
    """Bytes that the backward pass of the first batch needs."""
    vector = objective.parameters.detach().clone().requires_grad_()
    return with_saved_bytes(lambda: objective.loss(vector, 0))[0]
