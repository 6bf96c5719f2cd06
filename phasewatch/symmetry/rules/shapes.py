"""Functions that move units to other places: their labels are sent through the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from phasewatch.symmetry.labels import settled
from phasewatch.symmetry.spaces import Space
from phasewatch.symmetry.tape import Call
from phasewatch.symmetry.walk import Walk

_SEVERAL = {"cat", "concat", "stack"}


def relabel(walk: Walk, call: Call) -> None:
    """Units are where their labels are; averages are followed as long as they are of one unit each."""
    _relabelled(walk, call)


def pool(walk: Walk, call: Call) -> None:
    """The same, and of linear maps only positive factors of single units pass a maximum of one unit each."""
    if (space := _relabelled(walk, call)) is not None:
        space.separate()


def _relabelled(walk: Walk, call: Call) -> Space | None:
    """The space, None where units cannot be followed."""
    leaves = [leaf for leaf in tree_leaves([call.args, call.kwargs]) if isinstance(leaf, Tensor)]
    found = {id(leaf): of_leaf for leaf in leaves if (of_leaf := walk.tracked(leaf)) is not None}
    spaces = [found[id(leaf)][0] for leaf in leaves if id(leaf) in found]
    joins_others = call.name in _SEVERAL and len(spaces) < len(leaves)
    if any(space is not spaces[0] for space in spaces) or joins_others:
        walk.give_up(call)
        return None

    def sent(change: Callable[[Tensor], Tensor]) -> Any:
        args, kwargs = tree_map(lambda x: change(found[id(x)][1]) if id(x) in found else x, (call.args, call.kwargs))
        return getattr(args[0], call.name) if call.name in ("T", "mT") else call.function(*args, **kwargs)

    try:
        with torch.no_grad():
            labels = sent(lambda label: label)
            if call.name in _POOL and not torch.equal(labels, -sent(torch.neg)):
                raise ValueError("a maximum is that of several units: their greatest label is not their least")
        moved = [leaf for leaf in tree_leaves(labels) if isinstance(leaf, Tensor)]
        for tensor, of_tensor in zip(call.outputs(), moved, strict=False):
            walk.track(tensor, spaces[0], settled(of_tensor, spaces[0].width))
    except (RuntimeError, TypeError, ValueError):
        walk.give_up(call)
        return None
    return spaces[0]


_RELABEL = {
    *("flatten", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "unflatten"),
    *("__getitem__", "chunk", "split", "tensor_split", "T", "mT", "movedim", "moveaxis", "repeat", "repeat_interleave"),
    *("unbind", "swapaxes", "swapdims", "narrow", "select", "cat", "concat", "stack", "view_as", "reshape_as", "mean"),
    *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "index_select", "roll", "flip"),
    *("pixel_unshuffle", "channel_shuffle", "interpolate"),
}
_POOL = {"max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax"}

FUNCTIONS = {**dict.fromkeys(_RELABEL, relabel), **dict.fromkeys(_POOL, pool)}
