"""Functions of one unit at a time."""

from __future__ import annotations

from phasewatch.symmetry.labels import decoded, varying_axes
from phasewatch.symmetry.spaces import Activation
from phasewatch.symmetry.tape import HOMOGENEOUS, NONLINEAR, Call
from phasewatch.symmetry.walk import Walk


def same(walk: Walk, call: Call) -> None:
    """Copies, casts and signs: linear, unit by unit and alike for all."""
    if (found := walk.tracked(call.args[0])) is not None:
        walk.track(call.output, *found)


def homogeneous(walk: Walk, call: Call) -> None:
    """Positive factors of single units pass."""
    found = walk.narrowed(call.args[0])
    if found is None:
        return
    space, labels = found
    axes = varying_axes(labels)
    if len(axes) == 1:
        axis = axes.pop()
        first = labels.movedim(axis, -1).flatten(0, -2)[0] if labels.dim() > 1 else labels
        space.activations.append(Activation(call, axis, decoded(first, space.width)))
    space.separate()
    space.shift = False
    walk.track(call.output, space, labels)


def nonlinear(walk: Walk, call: Call) -> None:
    """Nothing passes."""
    homogeneous(walk, call)
    if (found := walk.narrowed(call.args[0])) is not None:
        found[0].linear = False


FUNCTIONS = {
    **dict.fromkeys(
        ("contiguous", "clone", "to", "float", "double", "type_as", "dropout", "neg", "__neg__", "detach_", "identity"),
        same,
    ),
    **dict.fromkeys(HOMOGENEOUS, homogeneous),
    **dict.fromkeys(NONLINEAR, nonlinear),
}
"""A new activation is a name in ``HOMOGENEOUS`` or ``NONLINEAR`` of :mod:`phasewatch.symmetry.tape`."""
