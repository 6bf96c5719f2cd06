"""The loss as a pure function of the parameters on fixed data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from phasewatch.isolation import RandomState, isolated, preserved_randomness, seed_everything
from phasewatch.vectorized import Vectorized

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(module, batch)``: the mean loss of the batch as a scalar tensor."""
OutputReader = Callable[[list[Tensor], Tensor, list[Tensor]], Tensor]
"""``reader(outputs, loss, data)``: another scalar made of the network's outputs and the loss of a batch."""


_SHARED_TYPES = (Dataset, DataLoader)


class NoOutputsError(ValueError):
    """The loss cannot be cut at the network's outputs, so that there is no Gauss-Newton matrix."""


class Objective:
    r"""The mean loss :math:`L(w)` over a fixed set of batches, as a pure function of a flat vector :math:`w`.

    The module given is never touched: its structure is copied, and every evaluation runs on clones of its
    parameters, buffers and batches (:func:`torch.func.functional_call`). Dropout and BatchNorm behave as in
    evaluation unless ``mode="train"``. A loss that draws random numbers sees the same ones at each evaluation,
    and the global random streams are left as they were.

    Attributes:
        parameters: The trainable parameters when the objective was made, flat, shape ``(num_parameters,)``.
        num_parameters: Number of trainable scalars; a tied tensor counts once.
        num_samples: Number of samples in all batches.
        batch_weights: Share of the samples in each batch; the batch losses are averaged with them.
        batch_losses: Loss of each batch at ``parameters``, shape ``(num_batches,)``.
        parameter_shapes: Name to shape, in the order in which they stand in the flat vector.
        batches: The data, with copies of the tensors.
        fixed: Name to tensor for buffers and parameters that are not trained.
        output_reader: See :meth:`read_from_outputs`: number of the call, function and data; None for the loss itself.

    Example:
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(module.weight)
        >>> batch = (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]]))
        >>> def loss_fn(module, batch):
        ...     return 0.5 * (module(batch[0]) - batch[1]).square().mean()
        >>> objective = Objective(module, [batch], loss_fn=loss_fn)
        >>> objective.loss().item()
        2.0
        >>> objective.gradient().tolist()
        [2.0, 4.0]
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn,
        mode: Literal["eval", "train"] = "eval",
        dtype: torch.dtype | None = None,
        batch_sizes: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Copy what is needed and evaluate the loss once on every batch.

        Args:
            module: The network; a copy of its structure is kept, with clones of its tensors.
            batches: What ``loss_fn`` takes as its second argument, one entry a batch; tensors are cloned.
            loss_fn: ``loss_fn(module, batch) -> scalar mean loss`` of the batch.
            mode: Whether layers such as dropout and BatchNorm behave as in evaluation or as in training.
            dtype: Floating-point type to compute in; default the parameters' own, but at least float32.
            batch_sizes: Samples in each batch; default the length of the first tensor found in it.
            seed: Seeds a loss that draws random numbers.

        Raises:
            ValueError: If there is no batch or no trainable parameter, if the loss is no finite scalar, or if
                it does not depend on the parameters.
            TypeError: If ``batches`` cannot be iterated, or parameters are of a kind that is not supported
                (sharded, uninitialised, complex, spread over several devices).
        """
        if mode not in ("eval", "train"):
            raise ValueError(f"mode is {mode!r}; expected 'eval' or 'train'")
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is a {type(module).__name__}; expected a torch.nn.Module.")
        self.loss_fn = loss_fn
        self.mode = mode
        self.seed = seed
        with isolated():
            self._module = _structure_copy(module).train(mode == "train")
            trainable = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
            _check_parameters(trainable)
            self.dtype = dtype or _computing_dtype(trainable.values())
            self.parameter_shapes = {name: p.shape for name, p in trainable.items()}
            self._sizes = [p.numel() for p in trainable.values()]
            self.parameters = torch.cat([p.detach().to(self.dtype).flatten() for p in trainable.values()])
            self.num_parameters = self.parameters.numel()
            self.fixed = {
                name: self._cast(tensor)
                for name, tensor in [*self._module.named_parameters(), *self._module.named_buffers()]
                if name not in trainable
            }
            self._aliases = _aliases(self._module)
            self._recurrent = any(isinstance(m, nn.RNNBase) for m in self._module.modules())
            self._wrapper = _LossModule(self._module, loss_fn)
            self.batches = [tree_map(self._cast, batch) for batch in _as_batches(batches)]
            self.batch_sizes = _batch_sizes(self.batches, batch_sizes)
            self.num_samples = sum(self.batch_sizes)
            self.batch_weights = [size / self.num_samples for size in self.batch_sizes]
            self._outermost_calls: dict[int, int] = {}
            self.output_reader: tuple[int, OutputReader, list[list[Tensor]]] | None = None
            self._draws_random_numbers = False
            self._writes_to_its_inputs = False
            self.batch_losses = self._first_evaluation()
            self._vectorized = Vectorized(self)

    @property
    def module(self) -> nn.Module:
        """The copy of the network's structure that is evaluated; its tensors are those of the original."""
        return self._module

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return len(self.batches)

    @property
    def is_pure(self) -> bool:
        """Whether the loss neither draws random numbers nor writes to its inputs."""
        return not (self._draws_random_numbers or self._writes_to_its_inputs)

    @property
    def device(self) -> torch.device:
        """The device of the parameters, on which everything is computed."""
        return self.parameters.device

    def loss(self, parameters: Tensor | None = None, batch: int | None = None) -> Tensor:
        """The mean loss, differentiable in ``parameters``.

        Args:
            parameters: Flat vector, shape ``(num_parameters,)``; default the parameters at creation.
            batch: Index of one batch; default the weighted mean over all.

        Returns:
            A scalar tensor.
        """
        vector = self.parameters if parameters is None else parameters
        if batch is not None:
            return self._evaluate(vector, batch)
        losses = [weight * self._evaluate(vector, i) for i, weight in enumerate(self.batch_weights)]
        return torch.stack(losses).sum()

    def loss_and_gradient(self, parameters: Tensor | None = None, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss and its gradient, batch by batch, so that only one batch's graph is held at a time.

        Args:
            parameters: Flat vector, shape ``(num_parameters,)``; default the parameters at creation.
            batch: Index of one batch; default the weighted mean over all.

        Returns:
            The loss, a scalar tensor, and the gradient, shape ``(num_parameters,)``, both detached.
        """
        vector = (self.parameters if parameters is None else parameters).detach().requires_grad_()
        with torch.enable_grad():
            if batch is not None:
                batch_loss = self._evaluate(vector, batch)
                return batch_loss.detach(), torch.autograd.grad(batch_loss, vector)[0]
            loss, gradient = torch.zeros_like(self.batch_losses[0]), torch.zeros_like(vector)
            for i, weight in enumerate(self.batch_weights):
                batch_loss = self._evaluate(vector, i)
                gradient.add_(torch.autograd.grad(batch_loss, vector)[0], alpha=weight)
                loss.add_(batch_loss.detach(), alpha=weight)
        return loss, gradient

    def losses_and_gradients(
        self, vectors: Tensor, batch: int | None = None, *, compiled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss and its gradient at several places, in one call where the network allows.

        Args:
            vectors: Shape ``(places, num_parameters)``.
            batch: Index of one batch; default the weighted mean over all.
            compiled: Whether to compile it, for each shape of batches once; pays after a minute of such calls.

        Returns:
            The losses, shape ``(places,)``, and gradients, shape ``(places, num_parameters)``, both detached. Means
            over several batches are formed in float64 where the network allows.
        """
        return self._vectorized.losses_and_gradients(vectors, batch, compiled)

    def losses(self, vectors: Tensor, batch: int | None = None) -> Tensor:
        """The loss at several places, without gradients; arguments as above, shape ``(places,)``."""
        return self._vectorized.losses(vectors, batch)

    def sample_losses(self, vectors: Tensor, batch: int) -> Tensor:
        """The loss of every sample of a batch at several places.

        Args:
            vectors: Shape ``(places, num_parameters)``.
            batch: Index of the batch.

        Returns:
            Shape ``(places, samples)``, without gradients.

        Raises:
            ValueError: If the loss of the batch is not the mean of losses that each depend on one sample, as with
                data that have no common first dimension, or a loss that sums or compares samples.
        """
        return self._vectorized.sample_losses(vectors, batch)

    def gradient(self, parameters: Tensor | None = None, batch: int | None = None) -> Tensor:
        """The gradient of :meth:`loss`, shape ``(num_parameters,)``."""
        return self.loss_and_gradient(parameters, batch)[1]

    def split_loss(self, parameters: Tensor, batch: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The loss of a batch cut at the network's outputs, as the Gauss–Newton matrix needs it.

        The cut is behind the last outermost call of a submodule with trainable parameters (or of the module
        itself) that ``loss_fn`` makes.

        Args:
            parameters: Flat vector that requires grad, shape ``(num_parameters,)``.
            batch: Index of the batch.

        Returns:
            The network's output tensors as functions of ``parameters``; the same values as leaves; the loss as a
            function of those leaves.

        Raises:
            NoOutputsError: If ``loss_fn`` calls no module with parameters, if what it calls returns a scalar (a loss
                computed inside ``forward``), or if the loss depends on the parameters by another way too.
        """
        advice = (
            "The Gauss-Newton matrix needs loss_fn(module, batch) to compute the network's outputs by calling a "
            "module and the loss from these outputs alone; rewrite loss_fn so, or use matrix='hessian'."
        )
        outputs, leaves, loss, _ = self._cut_at_outputs(parameters, batch, replace=True, advice=advice)
        if loss.requires_grad:
            (past_cut,) = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
            if past_cut is not None:
                raise NoOutputsError(f"The loss depends on the parameters not only through the outputs. {advice}")
        return outputs, leaves, loss

    def _cut_at_outputs(
        self, parameters: Tensor, batch: int, replace: bool, advice: str
    ) -> tuple[list[Tensor], list[Tensor], Tensor, int]:
        """Outputs, the leaves in their place if ``replace``, the loss, and the number of the call that is cut."""
        with _OutputCut(self._module, replace=replace) as cut:
            if batch not in self._outermost_calls:
                with torch.no_grad():
                    self._evaluate(self.parameters, batch)
                self._outermost_calls[batch] = cut.counted_calls()
            call = cut.choose_call(self._outermost_calls[batch], advice)
            loss = self._evaluate(parameters, batch)
        if not cut.outputs or any(output.numel() == 1 and self.batch_sizes[batch] > 1 for output in cut.outputs):
            raise NoOutputsError(f"The module called by loss_fn returns the loss itself, not the outputs. {advice}")
        return cut.outputs, cut.leaves, loss, call

    def outputs_and_slopes(self, batch: int) -> tuple[list[Tensor], list[Tensor], int]:
        """The network's outputs at ``parameters``, and the slope of the loss in each.

        Args:
            batch: Index of the batch.

        Returns:
            The floating-point output tensors of the last outermost call of a module with parameters; the gradient of
            the loss in them; the number of that call among the outermost ones, for :meth:`read_from_outputs`.

        Raises:
            NoOutputsError: If ``loss_fn`` calls no module with parameters, or what it calls returns the loss itself.
        """
        advice = "Rewrite loss_fn(module, batch) so that it calls the module and makes the loss of its outputs."
        vector = self.parameters.detach().clone().requires_grad_()
        with torch.enable_grad():
            outputs, _, loss, call = self._cut_at_outputs(vector, batch, replace=False, advice=advice)
            differentiable = [output for output in outputs if output.requires_grad]
            found = iter(torch.autograd.grad(loss, differentiable, allow_unused=True))
        slopes = [(next(found) if output.requires_grad else None) for output in outputs]
        return (
            [output.detach() for output in outputs],
            [torch.zeros_like(x) if g is None else g for x, g in zip(outputs, slopes, strict=True)],
            call,
        )

    def read_from_outputs(self, call: int, reader: OutputReader, data: list[list[Tensor]]) -> Objective:
        """Another function of the same parameters and batches, made of the network's outputs and the loss.

        Args:
            call: Which outermost call gives the outputs, see :meth:`outputs_and_slopes`.
            reader: ``reader(outputs, loss, data) -> scalar tensor``.
            data: Tensors that the reader is given, a list for each batch.
        """
        other = copy.copy(self)
        other.output_reader = (call, reader, data)
        other._vectorized = Vectorized(other)
        with isolated(), torch.no_grad():
            other.batch_losses = torch.stack([other._evaluate(self.parameters, i) for i in range(self.num_batches)])
        return other

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The pieces of a flat vector of shape ``(num_parameters,)`` by parameter name, as views."""
        pieces = vector.split(self._sizes)
        return {
            name: piece.view(shape) for (name, shape), piece in zip(self.parameter_shapes.items(), pieces, strict=True)
        }

    def to(self, dtype: torch.dtype) -> Objective:
        """The same objective computed in another floating-point type.

        Raises:
            RuntimeError: If the module's code fixes a type of its own and cannot run in ``dtype``.
        """
        if dtype == self.dtype:
            return self
        with isolated():
            other = copy.copy(self)
            other.dtype = dtype
            other._vectorized = Vectorized(other)
            other.parameters = self.parameters.to(dtype)
            other.fixed = {name: other._cast(tensor) for name, tensor in self.fixed.items()}
            other.batches = [tree_map(other._cast, batch) for batch in self.batches]
            other.batch_losses = other._first_evaluation()
        return other

    def restricted_to(self, *patterns: str) -> Objective:
        """The same loss as a function of some of the parameters, with the others fixed where they are.

        Args:
            patterns: Names of modules or parameters, or globs for them: ``"encoder"`` takes all parameters in that
                module, ``"*.bias"`` all biases.

        Raises:
            ValueError: If a pattern matches nothing; lists what there is.
        """
        if not patterns:
            raise ValueError("No pattern was given; expected at least one name of a module or parameter.")
        chosen: set[str] = set()
        for pattern in patterns:
            matching = {name for name in self.parameter_shapes if _matches(name, pattern)}
            if not matching:
                raise ValueError(
                    f"{pattern!r} matches no module or parameter that is trained; expected a name or a glob for one "
                    f"of: {', '.join(self.parameter_shapes)}."
                )
            chosen |= matching
        pieces = self.unflatten(self.parameters)
        other = copy.copy(self)
        other.parameter_shapes = {name: shape for name, shape in self.parameter_shapes.items() if name in chosen}
        other._sizes = [shape.numel() for shape in other.parameter_shapes.values()]
        other.parameters = torch.cat([pieces[name].flatten() for name in other.parameter_shapes])
        other.num_parameters = other.parameters.numel()
        others = {name: piece.clone() for name, piece in pieces.items() if name not in chosen}
        other.fixed = {**self.fixed, **others}
        other._vectorized = Vectorized(other)
        return other

    def _cast(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return copy.deepcopy(leaf)
        return leaf.detach().to(self.dtype if leaf.is_floating_point() else leaf.dtype, copy=True)

    def _evaluate(self, vector: Tensor, batch: int) -> Tensor:
        if not self._draws_random_numbers:
            return self.call(vector, batch)
        with preserved_randomness():
            seed_everything(self.seed * 1_000_003 + batch)
            return self.call(vector, batch)

    def call(
        self,
        vector: Tensor,
        batch: int,
        data: Any = None,
        fixed: dict[str, Tensor] | None = None,
        read: list[Tensor] | None = None,
    ) -> Tensor:
        """The loss of one batch as a function of every tensor in it; random numbers are drawn as they come.

        Args:
            vector: Flat parameters, shape ``(num_parameters,)``.
            batch: Index of the batch.
            data: Default that of the batch.
            fixed: Default :attr:`fixed`.
            read: What the ``output_reader`` is given; default its data for the batch.
        """
        fresh = _clone if self._writes_to_its_inputs else _same
        tensors = self.unflatten(vector)
        for name, tensor in (self.fixed if fixed is None else fixed).items():
            tensors[name] = fresh(tensor)
        for alias, name in self._aliases.items():
            tensors[alias] = tensors[name]
        named = {f"module.{name}": tensor for name, tensor in tensors.items()}
        inputs = tree_map(fresh, self.batches[batch] if data is None else data)
        with self._differentiable_kernels(), self._output_recorder() as recorder:
            loss = torch.func.functional_call(self._wrapper, named, (inputs,), tie_weights=False)
        if recorder is not None and self.output_reader is not None:
            _, reader, tensors_read = self.output_reader
            loss = reader(recorder.outputs, loss, tensors_read[batch] if read is None else read)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn returned a {type(loss).__name__}; expected a scalar tensor, the mean loss of the batch."
            )
        return loss.to(self.dtype)

    def _output_recorder(self) -> AbstractContextManager[_OutputCut | None]:
        if self.output_reader is None:
            return nullcontext()
        return _OutputCut(self._module, chosen=self.output_reader[0], replace=False)

    def _differentiable_kernels(self) -> AbstractContextManager[None]:
        """The recurrent layers of cuDNN have no gradient in evaluation mode; PyTorch's own do."""
        if self._recurrent and self.device.type == "cuda":
            return torch.backends.cudnn.flags(enabled=False)
        return nullcontext()

    def _first_evaluation(self) -> Tensor:
        """Losses at the start, and what kind of function this is: does it draw, does it write to its inputs?"""
        vector = self.parameters.detach().clone().requires_grad_()
        inputs = [t for t in tree_leaves([self.fixed, self.batches]) if isinstance(t, Tensor)]
        kept = [_clone(t) for t in inputs]
        versions = [t._version for t in inputs]
        losses = []
        for i in range(self.num_batches):
            before = RandomState.capture()
            loss = self._evaluate(vector, i)
            self._draws_random_numbers |= before != RandomState.capture()
            _check_loss(loss, i)
            losses.append(loss.detach())
        if not _depends_on(loss, vector):
            raise ValueError(
                "The loss does not depend on the trainable parameters. loss_fn(module, batch) must compute it from "
                "the module it is given, with gradients on and without detach() or item()."
            )
        if [t._version for t in inputs] != versions:
            self._writes_to_its_inputs = True
            for tensor, original in zip(inputs, kept, strict=True):
                tensor.copy_(original)
        if self._draws_random_numbers:
            with torch.no_grad():
                losses = [self._evaluate(self.parameters, i).detach() for i in range(self.num_batches)]
        return torch.stack(losses)

    def loss_of_constant_prediction(self, fitted: bool = True) -> float:
        """The mean loss where the network's outputs are the same for every sample.

        The outputs, see :meth:`split_loss`, are replaced by their mean at ``parameters``, and if ``fitted`` by the
        constants of least loss: for a cross-entropy that gives the entropy of the class frequencies, for a squared
        error the variance of the targets. Those are looked for from zero and from the mean output, and kept where the
        slope in them has vanished; where it has not, as with log probabilities of which one is read, the loss of the
        mean output stands. (Probabilities whose logarithm is taken go past 1, and the loss below 0.) It takes the time
        of up to 16 evaluations on all batches.

        Args:
            fitted: Whether the constants are fitted to the data.

        Returns:
            The loss; NaN where the outputs cannot be seen, or differ in shape between batches by more than the number
            of samples.
        """
        means: list[Tensor] = []
        calls: list[int] = []
        tried: list[tuple[float, float]] = []  # loss, norm of the slope
        with isolated(), torch.enable_grad(), suppress(NoOutputsError, RuntimeError, ValueError):
            for batch, size in enumerate(self.batch_sizes):
                outputs, _, call = self.outputs_and_slopes(batch)
                calls.append(call)
                axes = [output.shape.index(size) if size in output.shape else 0 for output in outputs]
                own = [o.mean(axis, keepdim=True) if o.dim() else o for o, axis in zip(outputs, axes, strict=True)]
                if means and [mean.shape for mean in own] != [mean.shape for mean in means]:
                    return math.nan
                shares = [mean * self.batch_weights[batch] for mean in own]
                means = [mean + share for mean, share in zip(means, shares, strict=True)] if means else shares

            def evaluate(constants: list[Tensor]) -> float:
                total = 0.0
                for constant in constants:
                    constant.grad = torch.zeros_like(constant)
                for batch, weight in enumerate(self.batch_weights):
                    with _ConstantOutputs(self._module, calls[batch], constants):
                        loss = weight * self._evaluate(self.parameters, batch)
                    loss.backward(inputs=[constant for constant in constants if _depends_on(loss, constant)])
                    total += float(loss.detach())
                slope = math.hypot(
                    *(float(constant.grad.norm()) for constant in constants if constant.grad is not None)
                )
                tried.append((total, slope))
                return total

            constants = [mean.clone().requires_grad_() for mean in means]
            evaluate(constants)
            if fitted:
                zeros = [torch.zeros_like(mean).requires_grad_() for mean in means]
                start = zeros if evaluate(zeros) < tried[0][0] else constants
                optimizer = torch.optim.LBFGS(start, max_eval=12, tolerance_change=1e-7, line_search_fn="strong_wolfe")
                optimizer.step(lambda: evaluate(start))
        vanished = [loss for loss, slope in tried if slope <= 0.1 * tried[0][1] and math.isfinite(loss)]
        return min(vanished, default=tried[0][0]) if tried else math.nan

    def __repr__(self) -> str:
        """Sizes and the loss."""
        loss = sum(w * value for w, value in zip(self.batch_weights, self.batch_losses.tolist(), strict=True))
        return (
            f"Objective({self.num_parameters:,} parameters, {self.num_samples:,} samples in "
            f"{self.num_batches} batches, loss {loss:.6g})"
        )


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Select the attention kernel that can be differentiated twice; the fast ones cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class _LossModule(nn.Module):
    """``loss_fn`` as a module, so that ``functional_call`` can swap the tensors of what it is called with."""

    def __init__(self, module: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.module, batch)


class _OutputCut:
    """Keeps the outputs of one outermost module call, and replaces them by leaves where that is asked for."""

    def __init__(self, module: nn.Module, chosen: int = -1, replace: bool = True) -> None:
        self._candidates = [m for m in module.modules() if any(p.requires_grad for p in m.parameters())]
        self._depth = 0
        self._calls = 0
        self._chosen = chosen
        self._replace = replace
        self.outputs: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def __enter__(self) -> _OutputCut:
        self._hooks = []
        for module in self._candidates:
            self._hooks.append(module.register_forward_pre_hook(self._enter_call))
            self._hooks.append(module.register_forward_hook(self._leave_call))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def counted_calls(self) -> int:
        count, self._calls = self._calls, 0
        return count

    def choose_call(self, count: int, advice: str) -> int:
        if count == 0:
            raise NoOutputsError(f"loss_fn calls no module with trainable parameters. {advice}")
        self._chosen = count - 1
        return self._chosen

    def _enter_call(self, *_: Any) -> None:
        self._depth += 1

    def _leave_call(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth:
            return output
        self._calls += 1
        return tree_map(self._cut, output) if self._calls - 1 == self._chosen else output

    def _cut(self, leaf: Any) -> Any:
        if not self._replace:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.outputs.append(leaf)
            return leaf
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return leaf
        self.outputs.append(leaf)
        self.leaves.append(leaf.detach().requires_grad_())
        return self.leaves[-1]


class _ConstantOutputs(_OutputCut):
    """Puts constants in the place of the floating-point outputs of one outermost call."""

    def __init__(self, module: nn.Module, chosen: int, constants: list[Tensor]) -> None:
        super().__init__(module, chosen)
        self._constants = iter(constants)

    def _cut(self, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        return next(self._constants).expand_as(leaf).clone()


def _structure_copy(module: nn.Module) -> nn.Module:
    """The module tree with its Python state copied and its parameters, buffers and data sets shared."""
    memo: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    for submodule in module.modules():
        for value in vars(submodule).values():
            if isinstance(value, _SHARED_TYPES):
                memo[id(value)] = value
            # kept losses and reparametrized weights are parts of a graph, which deepcopy refuses
            graph = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_leaf)
            memo.update({id(leaf): leaf.detach().clone() for leaf in graph})
    try:
        duplicate = copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and the measurement needs a "
            "copy so as not to touch the original. Define __deepcopy__ on what cannot be copied, or keep it outside "
            "of the module."
        ) from error
    for submodule in duplicate.modules():
        submodule._backward_hooks.clear()
        submodule._backward_pre_hooks.clear()
        for name, child in submodule._modules.items():
            submodule._modules[name] = _uncompiled(child)
    return _uncompiled(duplicate)


def _uncompiled(module: Any) -> Any:
    """What ``torch.compile`` wraps: compiled graphs have no second derivatives."""
    return getattr(module, "_orig_mod", module)


def _check_parameters(trainable: dict[str, nn.Parameter]) -> None:
    if not trainable:
        raise ValueError("The module has no trainable parameters; at least one parameter needs requires_grad=True.")
    for name, parameter in trainable.items():
        if type(parameter).__name__ in ("DTensor", "FlatParameter") or hasattr(parameter, "ds_id"):
            raise TypeError(f"Parameter {name!r} is sharded (FSDP, DeepSpeed); phasewatch needs whole parameters.")
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise TypeError(f"Parameter {name!r} is uninitialised; run the lazy module on one batch first.")
        if not parameter.is_floating_point():
            raise TypeError(f"Parameter {name!r} has type {parameter.dtype}; only real floating-point is supported.")
    devices = {str(parameter.device) for parameter in trainable.values()}
    if len(devices) > 1 or "meta" in devices:
        raise TypeError(f"Parameters are on {sorted(devices)}; phasewatch needs all of them on one real device.")


def _computing_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def _aliases(module: nn.Module) -> dict[str, str]:
    """Second and later names of tied tensors, to the first name of each."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        if (known := first.setdefault(id(tensor), name)) != name:
            aliases[name] = known
    return aliases


def _as_batches(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, (Tensor, dict, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}; expected a list with one entry a batch. Wrap a single batch "
            "as [batch]."
        )
    found = list(batches)
    if not found:
        raise ValueError("batches is empty; give at least one batch to measure on.")
    return found


def _batch_sizes(batches: list[Any], given: Sequence[int] | None) -> list[int]:
    if given is not None:
        if len(given) != len(batches) or min(given) < 1:
            raise ValueError(f"batch_sizes is {list(given)}; expected {len(batches)} positive numbers, one a batch.")
        return list(given)
    sizes = []
    for batch in batches:
        lengths = (leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
        sizes.append(next(lengths, 1))
    if not any(sizes):
        raise ValueError("batches hold no samples; give at least one batch that is not empty.")
    return sizes


def _check_loss(loss: Any, batch: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dim() > 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn returned {found}; expected a scalar tensor, the mean loss of the batch.")
    if not math.isfinite(loss.item()):
        raise ValueError(
            f"The loss of batch {batch} is {loss.item()}; expected a finite number. Look at the data of the probe "
            "and at the parameters (has training diverged?)."
        )


def _depends_on(result: Tensor, leaf: Tensor) -> bool:
    """Whether autograd knows a way from the result to the leaf."""
    nodes = [result.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _same(leaf: Any) -> Any:
    return leaf
