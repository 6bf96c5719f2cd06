"""The outputs of a network inside of its loss: seen, replaced, and read into other functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phasewatch.objective.batches import Layout


class NoOutputsError(ValueError):
    """The loss cannot be cut at the network's outputs, so that there is no Gauss-Newton matrix."""


class ConstantOutputsError(ValueError):
    """The network says the same of every sample, as with a last layer of zeros: its outputs have no variance yet."""


@dataclass(frozen=True)
class OutputsAndSlopes:
    """What a network says of one batch, and how the loss meets it.

    Attributes:
        outputs: The floating-point output tensors.
        slopes: The gradient of the loss in each.
        loss: The loss of the batch.
        past_outputs: Whether the loss depends on the parameters by another way too, as with weight decay in it.
        earlier_outputs: Whether that way is through the outputs of earlier calls of the network.
    """

    outputs: list[Tensor]
    slopes: list[Tensor]
    loss: Tensor
    past_outputs: bool
    earlier_outputs: bool


OutputReader = Callable[[list[Tensor], Tensor, list[Tensor]], Tensor]
"""``reader(outputs, loss, data)``: another scalar made of the network's outputs and the loss of a batch."""


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of what the output tensors give; of a single one nothing is made."""
    return functools.reduce(torch.add, parts)


@dataclass(frozen=True)
class Reading:
    """Another function made of the network's outputs and of the loss, batch by batch.

    Attributes:
        reader: Makes it of the outputs, the loss (or what an earlier reading made of it) and the data.
        data: Tensors that the reader is given, a list for each batch.
    """

    reader: OutputReader
    data: Sequence[list[Tensor]]


@dataclass(frozen=True)
class Cut:
    """Where a batch's loss is cut: behind one of the calls of modules with parameters that ``loss_fn`` makes.

    Attributes:
        call: Number of that call, from 0.
        calls: How many there are; another number at other parameters would be a cut elsewhere.
        depth: How many calls it is made in: 0 for an outermost one, more where that returns the loss itself.
    """

    call: int
    calls: int
    depth: int = 0


Replacement = Callable[[int, Tensor], "Tensor | None"]
"""``replacement(number, output)``: what takes the place of an output; None leaves it where it is."""


class OutputHooks:
    """While entered, keeps the outputs of one module call, and replaces them where that is asked for.

    Attributes:
        outputs: Floating-point outputs of the call, less those that a replacement left where they are.
        calls: Calls at the depth of the cut seen so far.
        earlier: Floating-point outputs of the calls before it.
    """

    def __init__(self, watched: Iterable[nn.Module], cut: Cut, replacement: Replacement | None = None) -> None:
        """Nothing is seen yet.

        Args:
            watched: The modules whose calls count.
            cut: Which call to look at; number -1 for none.
            replacement: Default none: what is seen stays.
        """
        self._watched = list(watched)
        self._depth = 0
        self._cut = cut
        self._replacement = replacement
        self.calls = 0
        self.outputs: list[Tensor] = []
        self.earlier: list[Tensor] = []

    def __enter__(self) -> OutputHooks:
        """Register the hooks."""
        self._hooks = []
        for module in self._watched:
            # A scripted module refuses, and calls its hooks all the same.
            self._hooks.append(nn.Module.register_forward_pre_hook(module, self._enter_call))
            self._hooks.append(nn.Module.register_forward_hook(module, self._leave_call))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove them."""
        for hook in self._hooks:
            hook.remove()

    def _enter_call(self, *_: Any) -> None:
        self._depth += 1

    def _leave_call(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth != self._cut.depth:
            return output
        self.calls += 1
        if self.calls <= self._cut.call:
            self.earlier += [t for t in Layout(output).tensors if t.is_floating_point()]
        if self.calls - 1 != self._cut.call:
            return output
        layout = Layout(output)
        return layout.rebuild([self._take(tensor) for tensor in layout.tensors])

    def _take(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        taken = tensor if self._replacement is None else self._replacement(len(self.outputs), tensor)
        if taken is None:
            return tensor
        self.outputs.append(tensor)
        return taken
