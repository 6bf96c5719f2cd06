"""Linear layers as such: what enters them on the probe, and how the outputs depend on what leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.symmetry.linear_algebra import joined
from phasewatch.symmetry.spaces import Space
from phasewatch.symmetry.tape import Call, Indices


@dataclass(eq=False)
class Site:
    """A linear layer as such: what enters it and how the outputs depend on what leaves it.

    Attributes:
        layer: Name of its module.
        rows: Flat indices of weights and bias, one row a unit, shape ``(units, features [+ 1])``.
        entered: What the layer was given in each batch, with the call and whether it has a bias.
        left: Random combinations of outputs differentiated in what left the layer, in each batch; None if unknown, and
            emptied when ``gradients`` are made of them.
        unit_axis: Axis of these along which the units lie.
        space: The space that it writes.
    """

    layer: str
    rows: Indices
    entered: list[tuple[Call, Tensor, bool]]
    left: list[Tensor] | None
    unit_axis: int
    space: Space

    def let_go(self) -> None:
        """Make what follows from the recording anew where it is asked for again: together it takes a lot of memory."""
        for name in ("inputs", "first_inputs", "samples"):
            self.__dict__.pop(name, None)

    @cached_property
    def gradients(self) -> NDArray[np.float64] | None:
        """Random combinations of outputs differentiated in the units, ``(positions, units)``; None if unknown."""
        if self.left is None:
            return None
        units = len(self.rows)
        lengths, number = [left.numel() // units for left in self.left], len(self.left)
        in_turn = (as_array(self.left.pop(0).movedim(self.unit_axis, -1)).reshape(-1, units) for _ in range(number))
        return joined(lengths, in_turn, axis=0)

    @cached_property
    def inputs(self) -> NDArray[np.float64]:
        """What is multiplied with each row, shape ``(positions, features [+ 1])``; of a convolution large."""
        blocks = [_positions(*entry) for entry in self.entered]
        self._lengths = [len(block) for block in blocks]
        return np.vstack(blocks) if len(blocks) > 1 else blocks[0]

    @cached_property
    def first_inputs(self) -> NDArray[np.float64]:
        """The same of the first batch."""
        return _positions(*self.entered[0])

    @cached_property
    def samples(self) -> Indices:
        """Number of the sample that each position belongs to, shape ``(positions,)``.

        Inputs are there again for each random combination.
        """
        assert len(self.inputs)  # which counts the positions of each
        first: dict[int, int] = {}
        numbers, count = [], 0
        for (_, x, _), length in zip(self.entered, self._lengths, strict=True):
            if id(x) not in first:
                first[id(x)] = count
                count += len(x)
            numbers.append(first[id(x)] + np.arange(length) * len(x) // max(length, 1))
        return np.concatenate(numbers)


def _positions(call: Call, inputs: Tensor, has_bias: bool) -> NDArray[np.float64]:
    """What each row of the weight is multiplied with, and 1 for the bias, one position a row."""
    if call.name == "linear":
        return _with_ones(inputs.reshape(-1, inputs.shape[-1]), has_bias)
    weight = call.argument(1, "weight")
    stride, padding, dilation = (
        call.argument(i, name, default)
        for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    kernel: Sequence[int] = weight.shape[2:]
    if call.name == "conv1d":
        inputs, kernel = inputs.unsqueeze(2), (1, *kernel)
        stride, dilation = (1, *_tuple(stride, 1)), (1, *_tuple(dilation, 1))
        padding = padding if isinstance(padding, str) else (0, *_tuple(padding, 1))
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(_tuple(dilation, 2), kernel, strict=True)]
        if padding == "same":
            (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
            inputs = torch.nn.functional.pad(inputs, (left, right, top, bottom))
        padding = 0
    patches = torch.nn.functional.unfold(inputs, tuple(kernel), dilation, padding, stride)
    return _with_ones(patches.transpose(1, 2).reshape(-1, patches.shape[1]), has_bias)


def _with_ones(rows: Tensor, has_bias: bool) -> NDArray[np.float64]:
    if has_bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return as_array(rows)


def _tuple(x: Any, length: int) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,) * length


def as_array(tensor: Tensor) -> NDArray[np.float64]:
    """In double precision."""
    return tensor.detach().double().cpu().numpy()
