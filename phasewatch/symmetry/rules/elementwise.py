"""Functions of one unit at a time."""

from __future__ import annotations

from phasewatch.symmetry.labels import decoded, varying_axes
from phasewatch.symmetry.spaces import Activation
from phasewatch.symmetry.tape import HOMOGENEOUS, NONLINEAR, Call, Indices
from phasewatch.symmetry.walk import Walk


def same(walk: Walk, call: Call) -> None:
    """Copies, casts and signs: linear, unit by unit and alike for all."""
    if (found := walk.tracked(call.args[0])) is not None:
        walk.track(call.output, *found)


def homogeneous(walk: Walk, call: Call, slopes: Indices | None = None) -> None:
    """Positive factors of single units pass; slopes that are parameters stay as they are."""
    found = walk.narrowed(call.args[0])
    if found is None:
        return
    space, labels = found
    axes = varying_axes(labels)
    if len(axes) == 1:
        axis = axes.pop()
        first = labels.movedim(axis, -1).flatten(0, -2)[0] if labels.dim() > 1 else labels
        one_each = slopes is not None and axis == 1 and len(slopes) == len(first) == space.width
        space.activations.append(Activation(call, axis, decoded(first, space.width), slopes if one_each else None))
    space.separate()
    space.shift = False
    walk.track(call.output, space, labels)


def with_slopes(walk: Walk, call: Call) -> None:
    """Homogeneous, with a slope that is a parameter: one for all units, or one for each along the second axis."""
    slopes = call.indices(1, "weight")
    if slopes is not None:
        walk.layer_of(slopes)
    homogeneous(walk, call, slopes)


def nonlinear(walk: Walk, call: Call) -> None:
    """Nothing passes."""
    homogeneous(walk, call)
    if (found := walk.narrowed(call.args[0])) is not None:
        found[0].linear = False


LAYERS = {"prelu": with_slopes}
FUNCTIONS = {
    **dict.fromkeys(
        ("contiguous", "clone", "to", "float", "double", "type_as", "dropout", "neg", "__neg__", "detach_", "identity"),
        same,
    ),
    **dict.fromkeys(HOMOGENEOUS, homogeneous),
    **dict.fromkeys(NONLINEAR, nonlinear),
}
"""A new activation is a name in ``HOMOGENEOUS`` or ``NONLINEAR`` of :mod:`phasewatch.symmetry.tape`."""
