"""Norms: they read one space and write the next, in which they have affine parameters."""

from __future__ import annotations

import numpy as np

from phasewatch.symmetry.sites import as_array
from phasewatch.symmetry.spaces import FixedNorm, Passage, Space, Writer
from phasewatch.symmetry.tape import Call, Indices
from phasewatch.symmetry.walk import Walk


def layer_norm(walk: Walk, call: Call) -> None:
    """Takes the mean and the length of all units."""
    scale, shift = call.indices(2, "weight"), call.indices(3, "bias")
    read = walk.along(call.args[0], -1)
    written = _write(walk, call, read, scale, shift, -1)
    if written is not None:
        written.standardized = True
        _note_norm(call, read, written, call.argument(4, "eps", 1e-5))


def rms_norm(walk: Walk, call: Call) -> None:
    """Takes the length of all units."""
    read = walk.along(call.args[0], -1)
    written = _write(walk, call, read, call.indices(2, "weight"), None, -1)
    if written is not None:
        _note_norm(call, read, written, call.argument(3, "eps"))


def batch_norm(walk: Walk, call: Call) -> None:
    """Unit by unit, by what all samples say in training mode, and else by constants."""
    scale, shift = call.indices(3, "weight"), call.indices(4, "bias")
    read = walk.along(call.args[0], 1)
    written = _write(walk, call, read, scale, shift, 1)
    if written is None:
        return
    if call.argument(5, "training", False):
        _note_norm(call, read, written, call.argument(7, "eps", 1e-5))
    elif read is not None:
        _note_fixed_norm(walk, call, read, scale, shift, written)


def _write(
    walk: Walk,
    call: Call,
    read: tuple[Space, Indices] | None,
    scale: Indices | None,
    shift: Indices | None,
    axis: int,
) -> Space | None:
    """The space behind the norm; None where its width is not known."""
    given = [indices for indices in (scale, shift) if indices is not None]
    for indices in given:
        walk.layer_of(indices)
    if given:
        layer, width = walk.layer_of(given[0]), len(given[0])
        writer = Writer(np.stack(given, axis=1), np.array([i is shift for i in given]), diagonal=True)
    elif read is not None:
        layer, width, writer = read[0].layer, read[0].width, None
    else:
        return None
    written = walk.write(call.output, layer, writer, axis, width)
    written.separate()
    written.shift = shift is not None
    return written


def _note_norm(call: Call, read: tuple[Space, Indices] | None, written: Space, epsilon: float | None) -> None:
    if read is not None:
        space, _ = read
        space.norms.append(call.name)
        space.epsilon = max(space.epsilon, epsilon or 0.0)
        space.normalized.append(written)


def _note_fixed_norm(
    walk: Walk,
    call: Call,
    read: tuple[Space, Indices],
    scale: Indices | None,
    shift: Indices | None,
    written: Space,
) -> None:
    space, channels = read
    whole = len(np.unique(space.blocks)) == 1
    space.separate()
    if len(channels) != space.width:
        space.block()
        return
    order = np.argsort(channels)
    mean, variance = (as_array(call.argument(i, name))[order] for i, name in ((1, "running_mean"), (2, "running_var")))
    deviation = np.sqrt(variance + call.argument(7, "eps", 1e-5))
    scales, shifts = (None if indices is None else indices[order] for indices in (scale, shift))
    if np.array_equal(order, np.arange(space.width)):
        walk.passages.append(Passage(space, written, scales, shifts, mean, deviation, whole))
    if scales is None:
        space.block()
    else:
        space.fixed_norms.append(FixedNorm(scales, shifts, mean, deviation))


LAYERS = {"layer_norm": layer_norm, "rms_norm": rms_norm, "batch_norm": batch_norm}
