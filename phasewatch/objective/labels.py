"""What the samples of a probe are labelled with: classes, or the tokens of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phasewatch.objective.batches import Layout

TOKENS_KEPT = 16
"""Tokens of a sequence that are enough to know it by. Chosen."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def integer_targets(batches: Sequence[Any], batch_sizes: Sequence[int]) -> dict[str, Any] | None:
    """The integer targets in batches, as plain Python; None where there are none.

    They are the last tensor of one integer a sample in which a value stands for two samples or more on average (a
    number that is another for each is no class), else the last one of a row of integers a sample.

    Args:
        batches: The batches.
        batch_sizes: Samples in each.

    Returns:
        ``{"kind": "class", "values": [int, ...]}``, or ``{"kind": "tokens", "values": [[int, ...], ...]}`` with the
        first tokens of each sequence; in both one entry a sample, in the order of the batches.

    Example:
        >>> integer_targets([(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))], [4])
        {'kind': 'class', 'values': [0, 1, 1, 0]}
    """
    columns = [_columns(batch, size) for batch, size in zip(batches, batch_sizes, strict=True)]
    if not columns or len({len(found) for found in columns}) > 1:
        return None
    wholes = list(zip(*columns, strict=True))
    for parts in reversed(wholes):
        if all(part.dim() == 1 for part in parts):
            classes = [int(label) for part in parts for label in part.tolist()]
            if 2 * len(set(classes)) <= len(classes):
                return {"kind": "class", "values": classes}
    for parts in reversed(wholes):
        if all(part.dim() == 2 for part in parts):
            return {"kind": "tokens", "values": [row for part in parts for row in part[:, :TOKENS_KEPT].tolist()]}
    return None


def _columns(batch: Any, size: int) -> list[Tensor]:
    tensors = Layout(batch).tensors
    dense = [t for t in tensors if t.layout == torch.strided and t.dtype in _INTEGERS]
    return [t for t in dense if t.dim() in (1, 2) and len(t) == size]
