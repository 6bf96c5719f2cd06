"""The loss of each batch as a pure function of a flat vector, of tensors and of nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phasewatch.interruption import safe_point
from phasewatch.isolation import preserved_randomness, seed_everything
from phasewatch.objective.batches import Layout, count_samples
from phasewatch.objective.copies import (
    Places,
    PythonState,
    check_parameters,
    computing_dtype,
    plain_attributes,
    structure_copy,
)
from phasewatch.objective.outputs import Cut, NoOutputsError, OutputHooks, Reading

Kind = TypeVar("Kind", bound="PureLoss")
LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(module, batch)``: the mean loss of the batch as a scalar tensor; ``loss_fn(outputs, batch)`` beside an
:data:`OutputsFn`."""
OutputsFn = Callable[[nn.Module, Any], Any]
"""``outputs_fn(module, batch)``: what the network says of the batch, a tensor or a structure of them."""


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Select the attention kernel that can be differentiated twice; the fast ones cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class PureLoss:
    """What an :class:`Objective` evaluates: the copy of a module, the batches, and ``loss_fn`` of both.

    Attributes:
        loss_fn: ``loss_fn(module, batch) -> scalar mean loss``; of the outputs in place of the module where these are
            given by ``outputs_fn``.
        outputs_fn: ``outputs_fn(module, batch)``: the network's outputs; None where they are looked for in calls.
        mode: ``"eval"`` or ``"train"``.
        seed: Seeds a loss that draws random numbers.
        dtype: Floating-point type of all that is computed.
        parameters: The trainable parameters when this was made, flat, shape ``(num_parameters,)``.
        num_parameters: Number of trainable scalars; a tied tensor counts once.
        parameter_shapes: Name to shape, in the order in which they stand in the flat vector.
        fixed: Name to tensor for buffers and parameters that are not trained.
        data: The tensors of each batch.
        batch_sizes: Samples of each batch.
        batch_weights: Share of the samples in each batch; the batch losses are averaged with them.
        num_samples: Number of samples in all batches.
        readings: What is made of the outputs and the loss, one after another; none for the loss itself.
        cuts: Where each batch is cut for the readings.
        held: Whether all that the loss sees of the parameters past the outputs is held at ``parameters``.
        wide: Whether what is made of the outputs, the loss and the readings, is computed in float64.
        doubts: Reasons not to trust what is measured of this function; none where it is what it is taken for.
        one_at_a_time: Whether to hold the evaluation at one place at a time, where several are asked for.
        constants: Numbers, texts and the like that the module has in attributes.
        known: What was found of this function, or of another that was made of the same, so that it is looked at once.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn,
        outputs_fn: OutputsFn | None,
        mode: Literal["eval", "train"],
        dtype: torch.dtype | None,
        batch_sizes: Sequence[int] | None,
        seed: int,
    ) -> None:
        """Copy what is needed; see :class:`Objective`."""
        self.loss_fn = loss_fn
        self.outputs_fn = outputs_fn
        self.mode = mode
        self.seed = seed
        self._module = structure_copy(module).train(mode == "train")
        self._places = Places(self._module)
        self._outputs = nn.Identity()
        with_parameters = [m for m in self._module.modules() if any(p.requires_grad for p in m.parameters())]
        self._watched = with_parameters if outputs_fn is None else [self._outputs]
        self._renew: Callable[[], None] = _nothing
        trainable = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        check_parameters(trainable)
        self.dtype = dtype or computing_dtype(trainable.values())
        self.parameter_shapes = {name: p.shape for name, p in trainable.items()}
        self.parameters = torch.cat([p.detach().to(self.dtype).flatten() for p in trainable.values()])
        self.fixed = {
            name: self._cast(tensor)
            for name, tensor in [*self._module.named_parameters(), *self._module.named_buffers()]
            if name not in trainable
        }
        self._attends = any(isinstance(m, _FAST_PATHS) for m in self._module.modules())
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in self._module.modules())
        listed = _as_list(batches)
        layouts = [Layout(batch) for batch in listed]
        self.data = [[self._cast(tensor) for tensor in layout.tensors] for layout in layouts]
        self._layouts = [Layout(layout.rebuild(own)) for layout, own in zip(layouts, self.data, strict=True)]
        self.batch_sizes = sizes_of_batches(listed, batch_sizes)
        self.num_samples = sum(self.batch_sizes)
        self.batch_weights = [size / self.num_samples for size in self.batch_sizes]
        self.draws_random_numbers = False
        self.writes_to_its_inputs = False
        self.readings: tuple[Reading, ...] = ()
        self.cuts: dict[int, Cut] = {}
        self.held = False
        self.wide = False
        self.doubts: tuple[str, ...] = ()
        self.one_at_a_time = False
        self.constants = plain_attributes(self._module)
        self.known: dict[Any, Any] = {}

    @property
    def module(self) -> nn.Module:
        """The copy of the network's structure that is evaluated; its tensors are those of the original."""
        return self._module

    @property
    def num_parameters(self) -> int:
        """Number of trainable scalars; a tied tensor counts once."""
        return self.parameters.numel()

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return len(self.data)

    @property
    def batches(self) -> list[Any]:
        """The data as ``loss_fn`` takes them, in containers of their own."""
        return [layout.rebuild(own) for layout, own in zip(self._layouts, self.data, strict=True)]

    @property
    def is_pure(self) -> bool:
        """Whether the loss neither draws random numbers nor writes to its inputs."""
        return not (self.draws_random_numbers or self.writes_to_its_inputs)

    @property
    def device(self) -> torch.device:
        """The device of the parameters, on which everything is computed."""
        return self.parameters.device

    def keep_state(self, state: PythonState, matters: bool) -> None:
        """From now on the module has this Python state before each evaluation.

        Where it does not matter to the loss, only what is collected is dropped: kept losses would keep their graphs.
        """
        self._renew = state.restore if matters else state.shed

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The pieces of a flat vector of shape ``(num_parameters,)`` by parameter name, as views."""
        pieces = vector.split([shape.numel() for shape in self.parameter_shapes.values()])
        return {
            name: piece.view(shape) for (name, shape), piece in zip(self.parameter_shapes.items(), pieces, strict=True)
        }

    def batch_signature(self, batch: int) -> tuple[Any, ...]:
        """Equal only for batches on which the loss is the same function of its tensors."""
        cut = self.cuts.get(batch) if self.readings else None
        return (*self._layouts[batch].signature, cut)

    def batch_shapes(self, batch: int) -> tuple[Any, ...]:
        """Equal for batches that differ in nothing but the values of their tensors."""
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in self.data[batch])
        return (*self._layouts[batch].signature, shapes)

    def cast(self: Kind, dtype: torch.dtype) -> Kind:
        """The same function computed in another floating-point type; nothing is evaluated."""
        other = copy.copy(self)
        other.dtype = dtype
        other.parameters = self.parameters.to(dtype)
        other.fixed = {name: other._cast(tensor) for name, tensor in self.fixed.items()}
        other.data = [[other._cast(tensor) for tensor in own] for own in self.data]
        return other

    def tensors_at(self, vector: Tensor) -> dict[str, Tensor]:
        """All parameters and buffers of the module by name, where its trainable ones are those of a flat vector."""
        return {**self.unflatten(vector), **self.fixed}

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Keep the module at these tensors (see :meth:`tensors_at`) for all that is run inside.

        Every backward pass through an evaluation belongs inside: recomputation and gradients written by hand read the
        module's tensors again.
        """
        safe_point()
        with self._places.holding(tensors), self._differentiable_kernels():
            yield

    def evaluate(self, vector: Tensor, batch: int) -> Tensor:
        """The loss of one batch; a loss that draws random numbers sees the same ones each time."""
        if not self.draws_random_numbers:
            return self.call(vector, batch)
        with preserved_randomness():
            seed_everything(self.seed * 1_000_003 + batch)
            return self.call(vector, batch)

    def loss_and_gradient(self, parameters: Tensor | None = None, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss and its gradient, batch by batch, so that only one batch's graph is held at a time.

        Args:
            parameters: Flat vector, shape ``(num_parameters,)``; default the parameters at creation.
            batch: Index of one batch; default the weighted mean over all.

        Returns:
            The loss, a scalar tensor, and the gradient, shape ``(num_parameters,)``, both detached.
        """
        vector = (self.parameters if parameters is None else parameters).detach().requires_grad_()
        with torch.enable_grad(), self.holding(self.tensors_at(vector)):
            if batch is not None:
                batch_loss = self.evaluate(vector, batch)
                return batch_loss.detach(), _gradient(batch_loss, vector)
            loss, gradient = vector.new_zeros(()), torch.zeros_like(vector)
            for i, weight in enumerate(self.batch_weights):
                batch_loss = self.evaluate(vector, i)
                gradient.add_(_gradient(batch_loss, vector), alpha=weight)
                loss.add_(batch_loss.detach(), alpha=weight)
        return loss, gradient

    def call(
        self,
        vector: Tensor,
        batch: int,
        data: Sequence[Tensor] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
        read: Sequence[Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """The loss of one batch as a function of every tensor in it; random numbers are drawn as they come.

        Args:
            vector: Flat parameters, shape ``(num_parameters,)``.
            batch: Index of the batch.
            data: Its tensors; default its own.
            fixed: Default :attr:`fixed`.
            read: What each reading is given; default its data for the batch.
        """
        data = self.data[batch] if data is None else data
        fixed = self.fixed if fixed is None else fixed
        if not self.readings:
            return self._run(vector, batch, data, fixed, None)
        given = [reading.data[batch] for reading in self.readings] if read is None else read
        cut = self.cuts[batch]
        hooks = OutputHooks(self._watched, cut, self._widened)
        loss = self._run(vector, batch, data, fixed, hooks)
        if hooks.calls != cut.calls:
            raise NoOutputsError(
                f"loss_fn called modules {hooks.calls} times on batch {batch}, and {cut.calls} times at the start: "
                "which outputs to look at depends on the parameters. Call the network once in loss_fn(module, batch)."
            )
        if self.held:
            moved = [self._widened(number, output) for number, output in enumerate(hooks.outputs)]
            held = OutputHooks(self._watched, cut, lambda number, _: moved[number])
            loss = self._run(self.parameters, batch, data, fixed, held)
        outputs = [self._widened(number, output) for number, output in enumerate(hooks.outputs)]
        for reading, own in zip(self.readings, given, strict=True):
            loss = reading.reader(outputs, loss, list(own))
        return loss.to(self.dtype)

    def _widened(self, _: int, output: Tensor) -> Tensor:
        """An output as what follows it is given it."""
        return output.double() if self.wide else output

    def _run(
        self,
        vector: Tensor,
        batch: int,
        data: Sequence[Tensor],
        fixed: Mapping[str, Tensor],
        hooks: OutputHooks | None,
    ) -> Tensor:
        self._renew()
        if self.writes_to_its_inputs:
            vector = vector.clone()
            fixed = {name: tensor.clone() for name, tensor in fixed.items()}
            data = [tensor.clone() for tensor in data]
        rebuilt = self._layouts[batch].rebuild(data)
        with self.holding({**self.unflatten(vector), **fixed}), hooks or nullcontext():
            if self.outputs_fn is None:
                loss = self.loss_fn(self._module, rebuilt)
            else:
                loss = self.loss_fn(self._outputs(self.outputs_fn(self._module, rebuilt)), rebuilt)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn returned a {type(loss).__name__}; expected a scalar tensor, the mean loss of the batch."
            )
        return loss.to(torch.float64 if self.wide else self.dtype)

    def _differentiable_kernels(self) -> AbstractContextManager[None]:
        """The recurrent layers of cuDNN have no gradient in evaluation mode; PyTorch's own do.

        Transformer layers have a faster way where no gradient is asked for, which treats padding differently.
        """
        if self._recurrent and self.device.type == "cuda":
            return torch.backends.cudnn.flags(enabled=False)
        return _one_way_of_attention() if self._attends else nullcontext()

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


_FAST_PATHS = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


@contextmanager
def _one_way_of_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _nothing() -> None:
    """What a module without memory needs before an evaluation."""


def _gradient(loss: Tensor, vector: Tensor) -> Tensor:
    """Zero where a batch has nothing for the loss to depend on, as where all of its labels are left out."""
    return torch.autograd.grad(loss, vector)[0] if loss.requires_grad else torch.zeros_like(vector)


def _as_list(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}; expected a list with one entry a batch. Wrap a single batch "
            "as [batch]."
        )
    found = list(batches)
    if not found:
        raise ValueError("batches is empty; give at least one batch to measure on.")
    return found


def sizes_of_batches(batches: Sequence[Any], given: Sequence[int] | None) -> list[int]:
    """Samples in each batch, as given or else as can be read off.

    Raises:
        ValueError: If they do not fit the batches, are not positive, or cannot be read off.
    """
    if given is not None:
        if len(given) != len(batches) or min(given) < 1:
            raise ValueError(f"batch_sizes is {list(given)}; expected {len(batches)} positive numbers, one a batch.")
        return list(given)
    sizes = [count_samples(batch) for batch in batches]
    if not any(sizes):
        raise ValueError("batches hold no samples; give at least one batch that is not empty.")
    return sizes
