"""The forward pass as a list of calls, with every parameter known by its place in the flat vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from phasewatch.hessian.linearization import Jacobian, LossCurvature, by_forward_mode
from phasewatch.hessian.operators import GaussNewtonOperator, curvature_pass
from phasewatch.isolation import isolated
from phasewatch.objective import Objective, second_derivatives

Indices = NDArray[np.int64]

LINEAR_MAPS = {"linear", "conv1d", "conv2d", "embedding"}
"""Calls whose gradients at the output are noted."""

HOMOGENEOUS = {"relu", "relu_", "leaky_relu", "leaky_relu_", "prelu"}
"""Elementwise functions that commute with positive factors."""

NONLINEAR = {"tanh", "tanh_", "sigmoid", "sigmoid_", "gelu", "silu", "elu", "elu_", "selu", "celu", "mish"} | {
    *("softplus", "hardtanh", "relu6", "hardswish", "hardsigmoid", "softsign", "logsigmoid", "sin", "cos", "erf"),
    *("exp", "square", "pow", "__pow__", "abs"),
}
"""Elementwise functions of which no continuous symmetry is known."""

_INPUT_NOTED = LINEAR_MAPS | HOMOGENEOUS | NONLINEAR | {"multi_head_attention_forward"}


@dataclass(eq=False)
class Call:
    """One call of a PyTorch function.

    Attributes:
        name: Name of the function, ``"T"`` and the like for attributes.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        parameters: Flat indices of the arguments that are parameters, by the id of the argument.
        inputs: The first argument in each batch, when it was called: it may be written over later. Of the homogeneous
            functions its signs.
        gradients: Gradient, in each batch, of the random combination of outputs of :func:`record` at the output.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    parameters: dict[int, Indices]
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def indices(self, position: int, name: str) -> Indices | None:
        """Places of the elements of an argument in the flat vector; None if it is no trainable parameter."""
        return self.parameters.get(id(self.argument(position, name)))

    def let_go(self) -> None:
        """Hold neither the output nor its graph any longer: what was given in each batch is in ``inputs``."""
        self.output = None
        self.args = (None, *map(_without_graph, self.args[1:]))
        self.kwargs = {name: _without_graph(argument) for name, argument in self.kwargs.items()}

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves([self.args, self.kwargs]) if isinstance(leaf, Tensor)]

    def outputs(self) -> list[Tensor]:
        """All tensors among what was returned."""
        return [leaf for leaf in tree_leaves(self.output) if isinstance(leaf, Tensor)]


@dataclass(eq=False)
class Linearization:
    r"""Products with :math:`H_\ell J` on one batch; of the network no graph is held.

    Attributes:
        objective: The loss on the probe.
        batch: Index of the batch.
        curvature: Products with :math:`H_\ell`.
        squared_norm: Squared Frobenius norm of :math:`H_\ell J`, as random combinations of outputs have seen it.
    """

    objective: Objective
    batch: int
    curvature: LossCurvature
    squared_norm: float

    def rank_limit(self, tolerance: float) -> int:
        """Number of outputs on the batch, less one for each of their rows of which the loss sees only differences.

        Rows lie along the last axis or along the second. A shift of every row by an amount of its own has, with
        probability one, an effect if that of any row has.

        Args:
            tolerance: Relative size up to which an effect counts as none.
        """
        limit = 0
        generator = torch.Generator().manual_seed(0)
        for leaf in self.curvature.leaves:
            limit += leaf.numel()
            anything = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
            for axis in sorted({1, leaf.dim() - 1} if leaf.dim() > 1 else ()):
                shifts = anything.narrow(axis, 0, 1)
                if self._change(leaf, shifts.expand_as(leaf)) <= tolerance * self._change(leaf, anything):
                    limit -= shifts.numel()
                    break
        return limit

    def _change(self, leaf: Tensor, direction: Tensor) -> float:
        """Length of the change of the loss's slopes along a direction of one of the outputs."""
        leaves = self.curvature.leaves
        with isolated(), self._held():
            changes = self.curvature([direction if other is leaf else torch.zeros_like(other) for other in leaves])
        return float(torch.stack([change.double().square().sum() for change in changes]).sum().sqrt())

    def __call__(self, direction: Tensor) -> list[Tensor]:
        """Change of the loss's slopes, of the shape of the outputs, along a direction."""
        with isolated(), second_derivatives(), self._held():
            tangents = by_forward_mode(self.objective, direction, self.batch, self.curvature.leaves)
            return self.curvature(self._by_backward(direction) if tangents is None else tangents)

    def _by_backward(self, direction: Tensor) -> list[Tensor]:
        vector = self.objective.parameters.detach().clone().requires_grad_()
        with torch.enable_grad(), self.objective.holding(self.objective.tensors_at(vector)):
            outputs, _, _ = self.objective.split_loss(vector, self.batch)
            return Jacobian(outputs, vector).by_backward(direction)

    def _held(self) -> AbstractContextManager[None]:
        return self.objective.holding(self.objective.tensors_at(self.objective.parameters))


@dataclass(eq=False)
class Recording:
    """The calls that lead to the outputs of the network.

    Attributes:
        calls: The calls on which the outputs depend, in the order in which they were made on the first batch, with
            the inputs and gradients of all batches.
        outputs: The outputs of the network on the first batch.
        gradient: Sum of the squared gradients of the random combinations, shape ``(num_parameters,)``.
        linearizations: The network and the loss around where they are, batch by batch.
        alike: Whether all batches took the same calls; otherwise inputs and gradients are of the first batch only.
    """

    calls: list[Call]
    outputs: list[Tensor]
    gradient: Tensor = field(repr=False)
    linearizations: list[Linearization] = field(repr=False)
    alike: bool = True

    def add(self, other: Recording) -> None:
        """Take up what was recorded on another batch."""
        self.gradient += other.gradient
        self.linearizations += other.linearizations
        self.alike &= [call.name for call in self.calls] == [call.name for call in other.calls]
        if self.alike:
            for call, same in zip(self.calls, other.calls, strict=True):
                call.inputs += same.inputs
                call.gradients += same.gradients

    def let_go(self) -> None:
        """Hold the calls and what they computed no longer; who holds a call has its inputs and gradients."""
        for call in self.calls:
            call.let_go()
        self.calls, self.outputs = [], []


def record(
    objective: Objective, generator: torch.Generator, cotangents: Callable[[Sequence[Tensor]], int] = lambda _: 1
) -> Recording:
    """Run the network on all batches and pull random cotangents back through each.

    A cotangent is ``H_l r`` with normal ``r`` and the Hessian ``H_l`` of the loss in the outputs: a gradient
    that vanishes then means, with probability one, that no output that the loss can tell apart depends on it.

    Args:
        objective: The loss on the probe.
        generator: Draws the cotangents.
        cotangents: How many, by the outputs of a batch; inputs and gradients of the calls are repeated for each.
    """
    recording = _record(objective, 0, generator, cotangents)
    for batch in range(1, objective.num_batches):
        recording.add(_record(objective, batch, generator, cotangents))
    return recording


def _record(
    objective: Objective, batch: int, generator: torch.Generator, cotangents: Callable[[Sequence[Tensor]], int]
) -> Recording:
    vector = objective.parameters.detach().clone().requires_grad_()
    tensors = objective.tensors_at(vector)
    name = GaussNewtonOperator.name
    with curvature_pass(name), second_derivatives(), torch.enable_grad(), objective.holding(tensors):
        with _Tape(vector) as tape:
            outputs, leaves, loss = objective.split_loss(vector, batch)
        curvature, jacobian = LossCurvature(loss, leaves), Jacobian(outputs, vector)
        total = torch.zeros_like(vector)
        count = cotangents(outputs)
        for _ in range(count):
            directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in leaves]
            total += jacobian.transposed(curvature(directions)).detach().square()
        tape.stop()
    calls = _leading_to(outputs, tape.calls)
    for call in calls:
        call.inputs *= count
    return Recording(
        calls,
        outputs,
        total,
        [Linearization(objective, batch, curvature, float(total.sum()) / count)],
    )


def _noted(name: str, given: Tensor) -> Tensor:
    """An argument as it is now; of what a homogeneous function is given the signs, on which its slopes depend."""
    return given.detach().sign().to(torch.int8) if name in HOMOGENEOUS else given.detach().clone()


def _without_graph(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, Tensor) else argument


def _leading_to(outputs: Sequence[Tensor], calls: Sequence[Call]) -> list[Call]:
    needed = {id(output) for output in outputs}
    leading = []
    for call in reversed(calls):
        if any(id(output) in needed for output in call.outputs()):
            needed.update(id(tensor) for tensor in call.tensors())
            leading.append(call)
    return leading[::-1]


class _Tape(TorchFunctionMode):
    """Records calls; tensors stay alive with it, so that their ids are unique."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._storage = vector.untyped_storage().data_ptr()
        self._places = np.arange(vector.numel())
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def stop(self) -> None:
        """Keep no further gradients."""
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", type(func).__name__)
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        inputs = [_noted(name, args[0])] if name in _INPUT_NOTED and args and isinstance(args[0], Tensor) else []
        output = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            return output
        call = Call(name, func, args, kwargs, output, {}, inputs)
        call.parameters = {id(t): places for t in call.tensors() if (places := self._indices(t)) is not None}
        self.calls.append(call)
        if name in LINEAR_MAPS and output.requires_grad:
            self._hooks.append(output.register_hook(lambda gradient: call.gradients.append(gradient.detach())))
        return output

    def _indices(self, tensor: Tensor) -> Indices | None:
        """A view of the flat vector has its storage; shape, strides and offset say which elements it is of."""
        if tensor.layout != torch.strided or tensor.untyped_storage().data_ptr() != self._storage:
            return None
        if not tensor.requires_grad:
            return None
        strides = [self._places.itemsize * stride for stride in tensor.stride()]
        start = self._places[tensor.storage_offset() :]
        return np.array(np.lib.stride_tricks.as_strided(start, tuple(tensor.shape), strides))
