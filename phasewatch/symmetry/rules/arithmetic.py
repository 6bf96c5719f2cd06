"""Sums and products: residual connections, biases, masks, factors and gates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from phasewatch.symmetry.spaces import Redundancy, Space, Writer
from phasewatch.symmetry.tape import Call
from phasewatch.symmetry.walk import Found, Walk


def add(walk: Walk, call: Call) -> None:
    """Two spaces become one; a parameter is one more writer; linear maps do not pass any other addend."""
    left, right = call.args[0], call.argument(1, "other")
    of_left, of_right = walk.tracked(left), walk.tracked(right)
    if call.kwargs.get("alpha", 1) != 1:
        walk.give_up(call)
    elif of_left is not None and of_right is not None:
        _merge(walk, call, of_left, of_right)
    elif of_left is not None:
        _add_other(walk, call, left, of_left, right)
    elif of_right is not None:
        _add_other(walk, call, right, of_right, left)


def _add_other(walk: Walk, call: Call, tensor: Tensor, found: Found, other: object) -> None:
    space, labels = found
    indices = call.parameters.get(id(other)) if isinstance(other, Tensor) else None
    if tuple(call.output.shape) != tuple(labels.shape):
        labels = torch.broadcast_to(labels, call.output.shape)
    if indices is None:
        space.linear = False
    else:
        read = walk.along(tensor, -1)
        if read is None or indices.shape[-1] != len(read[1]) or len(read[1]) != read[0].width:
            walk.give_up(call)
            return
        space, channels = read
        walk.layer_of(indices)
        rows = indices.reshape(-1, space.width)[:, np.argsort(channels)].T
        writer = Writer(rows, np.ones(rows.shape[1], dtype=bool))
        _note_redundant(walk, space, writer)
        space.writers.append(writer)
    walk.track(call.output, space, labels)


def _merge(walk: Walk, call: Call, left: Found, right: Found) -> None:
    (space, labels), (other, other_labels) = left, right
    shape = call.output.shape
    labels, other_labels = labels.broadcast_to(shape), other_labels.broadcast_to(shape)
    if space is other:
        space.twisted |= not torch.equal(labels, other_labels)
        walk.track(call.output, space, labels)
        return
    if space.width != other.width or not torch.equal(labels, other_labels):
        walk.give_up(call)
        return
    if space.writers and other.writers:
        _note_redundant(walk, space, other.writers[0], other)
    if space.activations or other.activations:  # units of a sum are no units of either
        space.activations, other.activations = [], []
    for name in ("writers", "readers", "fixed_norms", "norms", "normalized", "broken"):
        getattr(space, name).extend(getattr(other, name))
    space.epsilon = max(space.epsilon, other.epsilon)
    space.refine(other.blocks)
    space.linear &= other.linear and bool(other.writers) == bool(space.writers)
    space.shift &= other.shift
    space.heads |= other.heads
    space.twisted |= other.twisted
    space.standardized = False
    other.merged_into = space
    walk.track(call.output, space, labels)


def _note_redundant(walk: Walk, space: Space, writer: Writer, other: Space | None = None) -> None:
    if space.norms or (other is not None and other.norms):
        return  # a norm that reads one of the two before they are added sees the constant move
    first = next((w for w in space.writers if w.shifts.any()), None)
    if first is not None and writer.shifts.any():
        readers = [] if other is None else list(other.readers)
        walk.redundant.append(Redundancy(space.layer, first, writer, list(space.readers), readers))


def multiply(walk: Walk, call: Call) -> None:
    """A number passes; fixed numbers one by one pass factors of single units; a product of two spaces is a gate."""
    left, right = call.args[0], call.argument(1, "other")
    of_left, of_right = walk.tracked(left), walk.tracked(right)
    if of_left is not None and of_right is not None:
        _gate(walk, call, left, right)
    elif of_left is not None:
        _multiply_other(walk, call, of_left, right)
    elif of_right is not None:
        _multiply_other(walk, call, of_right, left)


def divide(walk: Walk, call: Call) -> None:
    """By a number or fixed numbers, as a product; by units nothing passes."""
    right = call.argument(1, "other")
    if walk.is_tracked(right):
        walk.give_up(call)
    elif (found := walk.tracked(call.args[0])) is not None:
        _multiply_other(walk, call, found, right)


def _multiply_other(walk: Walk, call: Call, found: Found, other: object) -> None:
    space, labels = found
    if isinstance(other, Tensor) and other.numel() > 1:
        if id(other) in call.parameters:
            walk.give_up(call)
            return
        space.twisted = True
        space.separate()
        space.shift = False
    walk.track(call.output, space, labels.broadcast_to(call.output.shape))


def _gate(walk: Walk, call: Call, left: Tensor, right: Tensor) -> None:
    """A product of two spaces is linear in the one that no activation has passed."""
    found = [walk.narrowed(left), walk.narrowed(right)]
    gates = [f for f in found if f is not None and f[0].activations]
    linear = [f for f in found if f is not None and not f[0].activations]
    if len(gates) != 1 or len(linear) != 1:
        walk.give_up(call)
        return
    gates[0][0].block()
    space, labels = linear[0]
    space.separate()
    space.shift = False
    walk.track(call.output, space, labels)


FUNCTIONS = {
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), add),
    **dict.fromkeys(("mul", "mul_", "__mul__", "__rmul__", "__imul__"), multiply),
    **dict.fromkeys(("div", "div_", "__truediv__"), divide),
}
