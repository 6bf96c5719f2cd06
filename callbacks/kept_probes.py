"""Batches in a checkpoint, and out of one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from phasewatch.probe import DrawnProbe

LARGEST = 64 * 2**20
"""Bytes of a probe that a checkpoint holds; a larger one is drawn again. Chosen."""


def fits_into_checkpoint(batches: Sequence[Any]) -> bool:
    """Whether they are few enough, and plain."""
    size = sum(t.nbytes for t in tree_leaves(batches) if isinstance(t, Tensor))
    return size <= LARGEST and _is_plain(list(batches))


def _is_plain(tree: Any) -> bool:
    """Whether a checkpoint with this in it loads with ``weights_only=True``."""
    if isinstance(tree, dict):
        return type(tree) is dict and all(_is_plain(v) for v in tree.values())
    if isinstance(tree, (list, tuple)):
        return type(tree) in (list, tuple) and all(_is_plain(v) for v in tree)
    return type(tree) is Tensor or isinstance(tree, (int, float, str, bool, type(None)))


def restored_probe(kept: Any, what: str) -> DrawnProbe | None:
    """Batches and their sizes out of a checkpoint; None where there are none, of which it is told if it is odd."""
    match kept:
        case None:
            return None
        case (list() as batches, None | list() as sizes) if batches and (
            sizes is None or (len(sizes) == len(batches) and all(type(size) is int and size > 0 for size in sizes))
        ):
            return DrawnProbe(batches, sizes)
    warnings.warn(
        f"phasewatch: what the checkpoint holds as {what} is no list of batches with a list of their sizes: it is of "
        "another version, or was changed. What is measured on is drawn anew.",
        stacklevel=3,
    )
    return None


def kept_on_device(trainer: Any, batches: Sequence[Any]) -> list[Any]:
    """Batches as a checkpoint gives them back, which training_step's hooks have seen already."""
    device = trainer.strategy.root_device
    return [tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch) for batch in batches]
