"""Where each unit went: tensors that hold, at every element, the code of the unit that it belongs to.

Labels are sent through the same calls as what they label. An average of several codes is the code of no unit, so that a
call that mixes units is noticed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.symmetry.tape import Indices


def _codes(width: int) -> NDArray[np.float64]:
    """Numbers in (1, 2), different for each unit, whose averages are codes of no other."""
    return 1 + np.modf(0.5 + np.arange(width) * 0.6180339887498949)[0]


def encoded(channels: Indices) -> Tensor:
    """The codes of units, in float64."""
    return torch.as_tensor(_codes(int(channels.max(initial=0)) + 1)[channels], dtype=torch.float64)


def decoded(labels: Tensor, width: int) -> Indices:
    """The unit of every element.

    Args:
        labels: Codes.
        width: Number of units that there are.

    Raises:
        ValueError: If some label is the code of none of them.
    """
    codes = _codes(width)
    order = np.argsort(codes)
    repeated = [axis for axis in range(labels.dim()) if labels.stride(axis) == 0]
    shape = labels.shape
    for axis in repeated:
        labels = labels.narrow(axis, 0, 1)
    values = labels.detach().numpy()
    nearest = np.searchsorted(codes[order], values - 1e-9).clip(max=width - 1)
    if np.any(np.abs(codes[order][nearest] - values) > 1e-9):
        raise ValueError("an operation mixes units")
    return np.broadcast_to(order[nearest], shape)


def settled(labels: Tensor, width: int) -> Tensor:
    """The same codes without what rounding has added in averages; arguments and errors as of :func:`decoded`."""
    channels = decoded(labels, width)
    once = channels[tuple(slice(None) if stride else slice(1) for stride in channels.strides)]
    codes = encoded(once).expand(labels.shape)
    return labels if torch.equal(codes, labels) else codes  # views keep sharing their memory


def varying_axes(labels: Tensor) -> set[int]:
    """Axes along which the unit changes."""
    long = [axis for axis in range(labels.dim()) if labels.shape[axis] > 1 and labels.stride(axis)]
    return {axis for axis in long if not torch.equal(labels, labels.narrow(axis, 0, 1).expand_as(labels))}


def units_of_heads(labels: Tensor, axis: int, width: int) -> list[Indices]:
    """Units of each head; heads lie along the third axis from the end, if there is one along which they vary."""
    rows = labels.movedim(axis, -1)
    rows = rows[..., 0, :]
    head_axis = labels.dim() - 3
    if head_axis not in varying_axes(labels):
        return [decoded(rows.reshape(-1, rows.shape[-1])[0], width)]
    rows = rows.reshape(-1, *rows.shape[-2:])[0]
    return list(decoded(rows, width))
