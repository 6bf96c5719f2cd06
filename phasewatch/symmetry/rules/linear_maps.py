"""Linear layers, convolutions and embeddings: they read one space and write the next."""

from __future__ import annotations

import numpy as np

from phasewatch.symmetry.sites import Site
from phasewatch.symmetry.spaces import Space, Writer
from phasewatch.symmetry.tape import Call, Indices
from phasewatch.symmetry.walk import Walk


def linear(walk: Walk, call: Call) -> None:
    """Features lie along the last axis."""
    _linear_map(walk, call, -1, groups=1)


def convolution(walk: Walk, call: Call) -> None:
    """Channels lie along the second axis."""
    _linear_map(walk, call, 1, groups=call.argument(6, "groups", 1))


def embedding(walk: Walk, call: Call) -> None:
    """Reads no units; every token adds a constant."""
    weight = call.indices(1, "weight")
    if weight is not None and weight.ndim > 1:
        walk.write(call.output, walk.layer_of(weight), Writer(weight.T, np.full(len(weight), True)), -1)


def _linear_map(walk: Walk, call: Call, axis: int, groups: int) -> None:
    weight, bias = call.indices(1, "weight"), call.indices(2, "bias")
    read = walk.along(call.args[0], axis)
    if weight is None or groups != 1 or weight.ndim < 2:
        if read is not None:
            read[0].block(None if weight is None else f"a grouped convolution after {read[0].layer}")
        return
    layer = walk.layer_of(weight)
    writer = walk.affine_writer(weight, bias)
    space = walk.write(call.output, layer, writer, axis)
    if read is not None:
        walk.read(layer, weight, bias, read, call, space)
    _add_site(walk, layer, writer.rows, call, space, axis, bias is not None)


def _add_site(walk: Walk, layer: str, rows: Indices, call: Call, space: Space, axis: int, has_bias: bool) -> None:
    entered = [(call, x, has_bias) for x in call.inputs]
    left = call.gradients if len(call.gradients) == len(call.inputs) else None
    call.gradients = []  # the site's from now on, which lets go of them
    known = walk.sites.get(rows.tobytes())
    if known is None:
        walk.sites[rows.tobytes()] = Site(layer, rows, entered, left, axis, space)
        return
    known.entered += entered
    known.left = None if known.left is None or left is None else known.left + left


LAYERS = {"linear": linear, "conv1d": convolution, "conv2d": convolution, "embedding": embedding}
