"""Attention: queries and keys are paired head by head, values pass head by head."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from phasewatch.symmetry.labels import units_of_heads, varying_axes
from phasewatch.symmetry.spaces import Pairing
from phasewatch.symmetry.tape import Call
from phasewatch.symmetry.walk import Found, Walk


def product(walk: Walk, call: Call) -> None:
    """Of two spaces, queries and keys; of what is no space and one, attention and values."""
    left, right = call.args[0], call.argument(1, "other")
    of_left, of_right = walk.tracked(left), walk.tracked(right)
    if of_left is not None and of_right is not None:
        _pair(walk, of_left, of_right, key_axis=-2)
    elif of_right is not None and not call.parameters:
        _attend(walk, call.output, right)
    else:
        walk.give_up(call)


def scaled_dot_product(walk: Walk, call: Call) -> None:
    """Both in one call."""
    query, key, value = (call.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    _pair(walk, walk.tracked(query), walk.tracked(key), key_axis=-1)
    _attend(walk, call.output, value)


def _pair(walk: Walk, queries: Found | None, keys: Found | None, key_axis: int) -> None:
    if queries is None or keys is None:
        for found in (queries, keys):
            if found is not None:
                found[0].block()
        return
    sides = []
    for (space, labels), axis in ((queries, -1), (keys, key_axis)):
        if varying_axes(labels) - {axis % labels.dim(), labels.dim() - 3}:
            space.block(f"how the heads of {space.layer} are arranged")
            return
        sides.append((space, units_of_heads(labels, axis, space.width)))
    (query_space, query_heads), (key_space, key_heads) = sides
    repeats, rest = divmod(len(query_heads), len(key_heads))
    if rest:
        query_space.block(f"how the heads of {query_space.layer} are arranged")
        return
    heads = [(query, key_heads[i // repeats]) for i, query in enumerate(query_heads)]
    walk.pairings.append(Pairing(query_space.layer, query_space, key_space, heads))
    # Of queries, keys and values that are one space, the values can still be used: only the parts paired are read.
    for space, units in ((query_space, query_heads), (key_space, key_heads)):
        if len(np.unique(np.concatenate(units))) == space.width:
            space.block()


def _attend(walk: Walk, output: Tensor, value: Tensor) -> None:
    found = walk.narrowed(value)
    if found is None:
        return
    space, labels = found
    if varying_axes(labels) - {labels.dim() - 1, labels.dim() - 3}:
        space.block(f"how the heads of {space.layer} are arranged")
        return
    blocks = np.zeros(space.width, dtype=np.int64)
    for number, units in enumerate(units_of_heads(labels, -1, space.width)):
        blocks[units] = number
    space.refine(blocks)
    space.heads = True
    labels = labels[..., :1, :]
    if output.dim() > 2 and output.shape[-3] != labels.shape[-3]:
        labels = labels.repeat_interleave(output.shape[-3] // labels.shape[-3], dim=-3)
    walk.track(output, space, labels.expand(output.shape))


def multi_head(walk: Walk, call: Call) -> None:
    """A whole layer in one call: three linear maps, attention, and one linear map."""
    heads, out_weight = call.args[4], call.indices(11, "out_proj_weight")
    in_weight, in_bias = call.indices(5, "in_proj_weight"), call.indices(6, "in_proj_bias")
    if in_weight is not None:
        weights = list(np.split(in_weight, 3))
    else:
        given = [call.parameters.get(id(call.kwargs.get(f"{name}_proj_weight"))) for name in "qkv"]
        weights = [weight for weight in given if weight is not None]
    if len(weights) != 3 or out_weight is None:
        walk.give_up(call)
        return
    biases = [None] * 3 if in_bias is None else list(np.split(in_bias, 3))
    layer = walk.layer_of(weights[0])
    spaces = []
    for position, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        walk.layer_of(weight)
        if (read := walk.along(call.args[position], -1)) is not None:
            walk.read(layer, weight, bias, read)
        space = walk.new_space(layer, len(weight))
        space.writers.append(walk.affine_writer(weight, bias))
        spaces.append(space)
    queries, keys, values = spaces
    units = np.split(np.arange(queries.width), heads)
    walk.pairings.append(Pairing(layer, queries, keys, [(u, u) for u in units]))
    queries.block()
    keys.block()
    values.refine(np.repeat(np.arange(heads), values.width // heads))
    values.heads = True
    out_bias = call.indices(12, "out_proj_bias")
    out_layer = walk.layer_of(out_weight)
    walk.read(out_layer, out_weight, out_bias, (values, np.arange(values.width)))
    walk.write(call.outputs()[0], out_layer, walk.affine_writer(out_weight, out_bias), -1)


LAYERS = {"multi_head_attention_forward": multi_head}
FUNCTIONS = {
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), product),
    "scaled_dot_product_attention": scaled_dot_product,
}
