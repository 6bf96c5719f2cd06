"""The loss as a pure function of the parameters on fixed data."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from phasewatch.isolation import isolated
from phasewatch.objective.batches import Layout
from phasewatch.objective.checks import check_function, check_gradient, first_evaluation
from phasewatch.objective.copies import PythonState
from phasewatch.objective.function import LossFn, OutputsFn, PureLoss
from phasewatch.objective.outputs import (
    Cut,
    NoOutputsError,
    OutputHooks,
    OutputReader,
    OutputsAndSlopes,
    Reading,
    Replacement,
)
from phasewatch.objective.vectorized import Vectorized

SAME_LOSS = 1e-4
"""Relative difference up to which two losses are the same: rounding of sums in another order stays below it. Chosen."""
FEW, LEAST_FEW = 8, 4
"""The gradient is checked on this part of the first batch, and on so many samples at least. Chosen."""
_SAME_IN_ANOTHER_PRECISION = 1e-3
"""Relative difference up to which a loss is the same in another precision. Chosen."""
_REWRITE = (
    "Rewrite loss_fn(module, batch) so that it calls the module and makes the loss of its outputs, or give "
    "outputs_fn(module, batch) -> outputs beside loss_fn(outputs, batch) -> scalar mean loss."
)


class Objective(PureLoss):
    r"""The mean loss :math:`L(w)` over a fixed set of batches, as a pure function of a flat vector :math:`w`.

    The module given is never touched: its structure is copied, and every evaluation puts clones of its parameters,
    buffers and batches in their places, where they stay until the backward pass is over. Dropout and BatchNorm behave
    as in evaluation unless ``mode="train"``. A loss that draws random numbers sees the same ones at each evaluation,
    and the global random streams are left as they were. What a module keeps from call to call (hidden states, caches)
    is put back to what it was before each evaluation.

    Attributes:
        parameters: The trainable parameters when the objective was made, flat, shape ``(num_parameters,)``.
        num_parameters: Number of trainable scalars; a tied tensor counts once.
        num_samples: Number of samples in all batches.
        batch_weights: Share of the samples in each batch; the batch losses are averaged with them.
        batch_losses: Loss of each batch at ``parameters``, shape ``(num_batches,)``.
        parameter_shapes: Name to shape, in the order in which they stand in the flat vector.
        fixed: Name to tensor for buffers and parameters that are not trained.
        doubts: Reasons not to trust what is measured of this; none but for :meth:`behavioral`.

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

    _first_gradient: tuple[weakref.ref[Objective], Tensor] | None = None
    """Of whom, and the gradient found in the first evaluation; what is made of this objective is another function."""

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn,
        outputs_fn: OutputsFn | None = None,
        mode: Literal["eval", "train"] = "eval",
        dtype: torch.dtype | None = None,
        batch_sizes: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Copy what is needed, evaluate the loss on every batch, and check that it is a function with this gradient.

        At the parameters and at others near by, the first batch is evaluated again, through the very path that
        measures, and the gradient compared with differences: in one direction, and in others on an eighth of that
        batch where this can be evaluated.

        Args:
            module: The network; a copy of its structure is kept, with clones of its tensors.
            batches: What ``loss_fn`` takes as its second argument, one entry a batch; tensors are cloned.
            loss_fn: ``loss_fn(module, batch) -> scalar mean loss`` of the batch.
            outputs_fn: ``outputs_fn(module, batch)``: the network's outputs, where they cannot be seen in the calls of
                modules that ``loss_fn`` makes. The loss is ``loss_fn(outputs, batch)`` then.
            mode: Whether layers such as dropout and BatchNorm behave as in evaluation or as in training.
            dtype: Floating-point type to compute in; default the parameters' own, but at least float32.
            batch_sizes: Samples in each batch; default what can be read off it (see
                :func:`phasewatch.objective.batches.count_samples`).
            seed: Seeds a loss that draws random numbers.

        Raises:
            ValueError: If there is no batch or no trainable parameter, if the size of a batch is neither given nor to
                be read off, if the loss is no finite scalar, does not depend on the parameters, is not the same each
                time, or has another gradient than its differences say.
            TypeError: If ``batches`` cannot be iterated, or parameters are of a kind that is not supported
                (sharded, uninitialised, complex, spread over several devices).
        """
        if mode not in ("eval", "train"):
            raise ValueError(f"mode is {mode!r}; expected 'eval' or 'train'")
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is a {type(module).__name__}; expected a torch.nn.Module.")
        with isolated():
            super().__init__(
                module,
                batches,
                loss_fn=loss_fn,
                outputs_fn=outputs_fn,
                mode=mode,
                dtype=dtype,
                batch_sizes=batch_sizes,
                seed=seed,
            )
            state = PythonState(self._module)
            gradient = torch.zeros_like(self.parameters)
            losses = first_evaluation(self, gradient)
            self.batch_losses = check_function(self, losses, state)
            if self.is_pure and self.batch_losses is losses:
                self._first_gradient = weakref.ref(self), gradient
            self._origin: tuple[Objective, Callable[[Objective], Objective]] | None = None
            self._vectorized = Vectorized(self)
            check_gradient(self, self._cut_to(max(self.batch_sizes[0] // FEW, LEAST_FEW)))
            state.restore()  # few samples may change what a whole batch does not

    def known_gradient(self, batch: int | None = None) -> Tensor | None:
        """The gradient at the parameters where the first evaluation has found it, shape ``(num_parameters,)``, or None.

        Args:
            batch: Index of one batch; default all.
        """
        known, is_whole = self._first_gradient, batch is None or (batch == 0 and self.num_batches == 1)
        return known[1] if is_whole and known is not None and known[0]() is self else None

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
            return self.evaluate(vector, batch)
        losses = [weight * self.evaluate(vector, i) for i, weight in enumerate(self.batch_weights)]
        return torch.stack(losses).sum()

    def loss_and_gradient(self, parameters: Tensor | None = None, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss and its gradient; those at the parameters at creation are known since then.

        Args:
            parameters: Flat vector, shape ``(num_parameters,)``; default the parameters at creation.
            batch: Index of one batch; default the weighted mean over all.

        Returns:
            The loss, a scalar tensor, and the gradient, shape ``(num_parameters,)``, both detached.
        """
        known = self.known_gradient(batch) if parameters is None else None
        if known is not None:
            return self.batch_losses.new_tensor(self.mean_loss), known.clone()
        return super().loss_and_gradient(parameters, batch)

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
        itself) that ``loss_fn`` makes; where that returns the loss itself, behind the last such call made inside of it.

        Args:
            parameters: Flat vector that requires grad, shape ``(num_parameters,)``.
            batch: Index of the batch.

        Returns:
            The network's output tensors as functions of ``parameters``; the same values as leaves; the loss as a
            function of those leaves.

        Raises:
            NoOutputsError: If ``loss_fn`` calls no module with parameters, if all that it calls return a scalar (a loss
                computed inside ``forward``), or if the loss depends on the parameters by another way too.
        """
        advice = (
            "The Gauss-Newton matrix needs loss_fn(module, batch) to compute the network's outputs by calling a "
            "module and the loss from these outputs alone; rewrite loss_fn so, give outputs_fn(module, batch) beside "
            "loss_fn(outputs, batch), or use matrix='hessian'."
        )
        leaves: list[Tensor] = []

        def leaf(_: int, output: Tensor) -> Tensor | None:
            if not output.requires_grad:
                return None
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        hooks, loss = self._cut_at_outputs(parameters, batch, leaf, advice)
        if loss.requires_grad:
            with self.holding(self.tensors_at(parameters)):
                (past_cut,) = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
            if past_cut is not None:
                raise NoOutputsError(f"The loss depends on the parameters not only through the outputs. {advice}")
        return hooks.outputs, leaves, loss

    def _cut_at_outputs(
        self, parameters: Tensor, batch: int, replacement: Replacement | None, advice: str
    ) -> tuple[OutputHooks, Tensor]:
        """What the hooks saw of the last outermost call, and the loss."""
        if batch not in self.cuts:
            self.cuts[batch] = self._cut_as_before(batch) or self._find_cut(batch, advice)
        with OutputHooks(self._watched, self.cuts[batch], replacement) as hooks:
            loss = self.evaluate(parameters, batch)
        return hooks, loss

    def _cut_as_before(self, batch: int) -> Cut | None:
        """The cut of a batch of the same shapes, where it is known and this one makes as many calls."""
        alike = (other for other in self.cuts if self.batch_shapes(other) == self.batch_shapes(batch))
        cut = self.cuts.get(next(alike, -1))
        if cut is None:
            return None
        with OutputHooks(self._watched, cut) as hooks, torch.no_grad():
            self.evaluate(self.parameters, batch)
        return cut if hooks.calls == cut.calls else None

    def output_tangents(self, direction: Tensor, batch: int, parameters: Tensor | None = None) -> list[Tensor | None]:
        """How the outputs of :meth:`split_loss` change along a direction, by forward-mode differentiation.

        Args:
            direction: Shape ``(num_parameters,)``.
            batch: Index of the batch.
            parameters: Flat vector, shape ``(num_parameters,)``; default the parameters at creation.

        Returns:
            A tensor of the shape of each output, without a graph; None for those that do not depend on the parameters.

        Raises:
            NotImplementedError: If an operation of the model has no forward-mode derivative.
            RuntimeError: The same of a function written by hand, or if the loss takes gradients of its own.
        """
        vector = (self.parameters if parameters is None else parameters).detach()
        with torch.no_grad(), forward_ad.dual_level():
            moving = forward_ad.make_dual(vector, direction)
            with self.holding(self.tensors_at(moving)):
                hooks, _ = self._cut_at_outputs(moving, batch, lambda _, output: output.detach(), _REWRITE)
            return [forward_ad.unpack_dual(output).tangent for output in hooks.outputs]

    def outputs(self, parameters: Tensor, batch: int) -> list[Tensor]:
        """The network's outputs on a batch at any place, without their graph; those of :meth:`outputs_and_slopes`.

        Args:
            parameters: Flat vector, shape ``(num_parameters,)``.
            batch: Index of the batch.

        Raises:
            NoOutputsError: If they cannot be seen.
        """
        with torch.no_grad():
            return self._cut_at_outputs(parameters.detach(), batch, None, _REWRITE)[0].outputs

    def outputs_by_sample(self, vectors: Tensor, batch: int, rows: slice) -> Tensor:
        """The outputs of :meth:`split_loss` of some samples, each as a batch of one at a place of its own.

        Args:
            vectors: Shape ``(samples, num_parameters)``, in which the outputs are differentiable.
            batch: Index of the batch, which :meth:`split_loss` has been called with.
            rows: Which of its samples.

        Returns:
            Shape ``(samples, outputs)``, those of all output tensors one after another.

        Raises:
            ValueError: If the loss draws random numbers or writes to its inputs.
        """
        if not self.is_pure:
            raise ValueError("The loss draws random numbers or writes to its inputs.")
        own = [t.dim() > 0 and len(t) == self.batch_sizes[batch] for t in self.data[batch]]
        data = [t[rows] if chosen else t for t, chosen in zip(self.data[batch], own, strict=True)]

        def of_one(vector: Tensor, data: list[Tensor]) -> Tensor:
            alone = [t.unsqueeze(0) if chosen else t for t, chosen in zip(data, own, strict=True)]
            hooks = OutputHooks(self._watched, self.cuts[batch])
            self._run(vector, batch, alone, self.fixed, hooks)
            return torch.cat([output.flatten() for output in hooks.outputs])

        return torch.func.vmap(of_one, in_dims=(0, [0 if chosen else None for chosen in own]))(vectors, data)

    def _find_cut(self, batch: int, advice: str) -> Cut:
        """Behind the last outermost call; where that returns the loss itself, behind the last call made in it."""
        for depth in count():
            with OutputHooks(self._watched, Cut(-1, 0, depth)) as counter, torch.no_grad():
                self.evaluate(self.parameters, batch)
            if not counter.calls and not depth:
                raise NoOutputsError(f"loss_fn calls no module with trainable parameters. {advice}")
            if not counter.calls:
                break
            cut = Cut(counter.calls - 1, counter.calls, depth)
            with OutputHooks(self._watched, cut) as hooks, torch.no_grad():
                self.evaluate(self.parameters, batch)
            if hooks.outputs and not any(o.numel() == 1 and self.batch_sizes[batch] > 1 for o in hooks.outputs):
                return cut
        raise NoOutputsError(f"The module called by loss_fn returns the loss itself, not the outputs. {advice}")

    def outputs_and_slopes(self, batch: int) -> OutputsAndSlopes:
        """The network's outputs at ``parameters``, and the slope of the loss in each.

        They are those of the last outermost call of a module with parameters that ``loss_fn`` makes on this batch.

        Args:
            batch: Index of the batch.

        Raises:
            NoOutputsError: If ``loss_fn`` calls no module with parameters, or what it calls returns the loss itself.
        """
        vector = self.parameters.detach().clone().requires_grad_()
        leaves: list[Tensor] = []

        def leaf(number: int, output: Tensor) -> Tensor:
            leaves.append(self._widened(number, output.detach()).requires_grad_())
            return leaves[-1]

        with torch.enable_grad(), self.holding(self.tensors_at(vector)):
            hooks, loss = self._cut_at_outputs(vector, batch, leaf, _REWRITE)
            earlier = [output for output in hooks.earlier if output.requires_grad]
            inputs = [*leaves, *earlier, vector]
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, inputs, allow_unused=True)
        slopes = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=False)]
        return OutputsAndSlopes(
            [output.detach() for output in hooks.outputs],
            slopes,
            loss.detach(),
            past_outputs=found[-1] is not None,
            earlier_outputs=any(g is not None for g in found[len(leaves) : -1]),
        )

    def loss_of_outputs(self, batch: int, replacement: Replacement) -> Tensor:
        """The loss of a batch at ``parameters`` with something else in the place of the outputs.

        Args:
            batch: Index of the batch.
            replacement: What takes the place of each of the outputs of :meth:`outputs_and_slopes`.

        Raises:
            NoOutputsError: If they cannot be seen.
        """
        return self._cut_at_outputs(self.parameters, batch, replacement, _REWRITE)[1]

    def loss_and_slopes(self, batch: int, outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss of a batch at ``parameters`` where the network says something else, and its slope in that.

        Args:
            batch: Index of the batch.
            outputs: In the place of those of :meth:`outputs_and_slopes`, of their shapes.

        Raises:
            NoOutputsError: If they cannot be seen.
        """
        vector = self.parameters.detach().clone().requires_grad_()
        leaves = [self._widened(number, output.detach()).requires_grad_() for number, output in enumerate(outputs)]
        with torch.enable_grad(), self.holding(self.tensors_at(vector)):
            _, loss = self._cut_at_outputs(vector, batch, lambda number, _: leaves[number], _REWRITE)
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return loss.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    def behavioral(self, metric: Literal["loss", "outputs"] = "loss", *, nats_per_loss: float = 1.0) -> Objective:
        r"""How far the function that the network computes is from the one at ``parameters``: zero and least there.

        The outputs are those of ``outputs_fn``, else of the last outermost call of a module with parameters that
        ``loss_fn`` makes on each batch, or where that returns the loss itself, of the last such call made in it (the
        head, of whose outputs ``forward`` makes the loss).

        With ``metric="loss"`` it is the divergence
        :math:`D(w) = L(w) - L(w^*) - \langle r, f(w) - f(w^*) \rangle`, r the slope of the loss in the outputs f at w*
        (Bushnaq et al. 2024, arXiv 2405.10927): for a cross-entropy the Kullback-Leibler divergence from the model at
        w*, for half a squared error half the squared distance. Its Hessian at w* is the Gauss-Newton matrix. What the
        loss sees of the parameters past the outputs (weight decay written into it) is held as it is at w*.
        It is nowhere negative where the loss is convex in the outputs; where it is not, which is looked for in the
        first batch, ``doubts`` says so. Of log-probabilities, in which their loss is linear, the Kullback-Leibler
        divergence is taken directly.

        With ``metric="outputs"`` it is half the squared distance of the outputs in units of their variance v, as of a
        regression with that noise: :math:`\tfrac12 \sum_k (f_k(w) - f_k(w^*))^2 / v`, the mean over samples
        (and positions), v the variance of :math:`f_k(w^*)` over them, its mean over k, one number for each output
        tensor. A sample's outputs k stand along the last dimension (or along dimension 1, if that is where the
        classes are); where the loss does not change when all of them are shifted alike, as the logits of a softmax,
        only what differs from their mean counts. Positions that the loss never sees (padding) are left out. It stays as
        it is where all logits grow by one factor, and so tells another function from more confidence in the same.

        Args:
            metric: ``"loss"`` or ``"outputs"``.
            nats_per_loss: The loss is taken for minus the log-likelihood of a sample in nats, so that half a squared
                error stands for noise of variance 1. Where it is something else, what one unit of it is in nats:
                1 / σ² for half a squared error with noise σ, 1 / (2 σ²) for a squared error, ln 2 for bits.

        Returns:
            Another objective on the same parameters and batches, of which everything can be taken that can be of this
            one. Where the outputs of all batches and their slopes take more than 256 MiB they are made anew for each
            batch, and evaluations at several places follow one another.

        Raises:
            NoOutputsError: If the outputs cannot be seen (a loss computed inside ``forward``, or no module called), if
                the loss is made of those of several calls of the network, of which one alone does not say how far it
                has moved, or if the loss is linear in outputs that are no log-probabilities.
            ConstantOutputsError: With ``metric="outputs"``, if they are the same for all samples.
            ValueError: If an argument is none of these, or the outputs are not finite.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> module = torch.nn.Linear(2, 1)
            >>> def decayed(module, batch):
            ...     return 0.5 * module(batch).square().mean() + module.weight.square().sum()
            >>> moved = Objective(module, [torch.eye(2)], loss_fn=decayed).behavioral()
            >>> float(moved.loss()), float(moved.gradient().abs().max())
            (0.0, 0.0)
        """
        from phasewatch.objective.behavioral import behavioral  # it is made of objectives itself

        return behavioral(self, metric, nats_per_loss)

    def widened(self) -> Objective:
        """The same, computed in float64 from the outputs on, for what is a small difference of losses.

        Unchanged where the code of the loss cannot, or takes something else for the loss then.
        """
        other = copy.copy(self)
        other.wide = True
        other._vectorized = Vectorized(other)
        with isolated(), suppress(Exception):
            wide, plain = (float(objective.outputs_and_slopes(0).loss) for objective in (other, self))
            if abs(wide - plain) <= _SAME_IN_ANOTHER_PRECISION * (_SAME_IN_ANOTHER_PRECISION + abs(plain)):
                return other
        return self

    def read_from_outputs(
        self,
        reader: OutputReader,
        data: Sequence[list[Tensor]],
        *,
        held: bool = False,
        doubts: tuple[str, ...] = (),
        again: Callable[[Objective], Objective],
    ) -> Objective:
        """Another function of the same parameters and batches, made of the network's outputs and the loss.

        What was read is read again: where this objective is itself made so, the reader is given that as the loss.

        Args:
            reader: ``reader(outputs, loss, data) -> scalar tensor``, of the outputs of :meth:`outputs_and_slopes`.
            data: Tensors that the reader is given, a list for each batch.
            held: Whether the loss is given the outputs at the vector, and all else that it sees of the parameters as it
                is at ``parameters``; costs another evaluation.
            doubts: Reasons not to trust what is measured of it.
            again: Makes the same of this objective in another precision.
        """
        other = copy.copy(self)
        other.readings = (*self.readings, Reading(reader, data))
        other.held = held or self.held
        other.doubts = (*self.doubts, *doubts)
        other._origin = (self, again)
        other._vectorized = Vectorized(other)
        with isolated(), torch.no_grad():
            other.batch_losses = torch.stack([other.evaluate(self.parameters, i) for i in range(self.num_batches)])
        return other

    def to(self, dtype: torch.dtype) -> Objective:
        """The same objective computed in another floating-point type.

        Raises:
            RuntimeError: If the module's code fixes a type of its own and cannot run in ``dtype``.
        """
        if dtype == self.dtype:
            return self
        if self._origin is not None:
            origin, again = self._origin
            return again(origin.to(dtype))
        with isolated():
            other = self.cast(dtype)
            other._vectorized = Vectorized(other)
            other.batch_losses = first_evaluation(other)
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
        other.parameters = torch.cat([pieces[name].flatten() for name in other.parameter_shapes])
        others = {name: piece.clone() for name, piece in pieces.items() if name not in chosen}
        other.fixed = {**self.fixed, **others}
        if self._origin is not None:
            origin, again = self._origin
            other._origin = (origin.restricted_to(*patterns), again)
        other._vectorized = Vectorized(other)
        return other

    def on_half(self) -> Objective | None:
        """The same loss on half of the samples: every second batch, or every second sample of a single one.

        Returns:
            None where a single batch cannot be halved: it has one sample or tensors with another first dimension, or
            the losses of its halves do not average to its own (losses that compare samples, means over tokens).
        """
        if self._origin is not None:
            origin, again = self._origin
            half = origin.on_half()
            return None if half is None else again(half)
        with isolated():
            if self.num_batches > 1:
                every_second = range(0, self.num_batches, 2)
                return self._on([(self._layouts[i], self.data[i], self.batch_sizes[i]) for i in every_second])
            return self._first_part([slice(start, None, 2) for start in (0, 1)])

    def in_smaller_batches(self) -> Objective | None:
        """The same loss on the same samples, each batch cut in two: to look at one takes half of the memory.

        Returns:
            None where a batch cannot be cut, for the reasons of :meth:`on_half`.
        """
        if self._origin is not None:
            origin, again = self._origin
            smaller = origin.in_smaller_batches()
            return None if smaller is None else again(smaller)
        batches = range(self.num_batches)
        if min(self.batch_sizes) < 2 or not all(map(self._has_samples, batches)):
            return None
        middles = [size // 2 for size in self.batch_sizes]
        with isolated():
            try:
                cut = [self._samples(rows, i) for i in batches for rows in (slice(middles[i]), slice(middles[i], None))]
                smaller = self._on(cut)
            except Exception:  # what the loss takes is not only tensors, or has a size of its own
                return None
        return smaller if same_loss(smaller.mean_loss, self.mean_loss) else None

    def evaluated_one_at_a_time(self) -> Objective:
        """The same, evaluated at one place after another where several are asked for: it takes the least memory."""
        other = copy.copy(self)
        other.one_at_a_time = True
        other._vectorized = Vectorized(other)
        if self._origin is not None:
            origin, again = self._origin
            other._origin = (origin.evaluated_one_at_a_time(), again)
        return other

    def first_batches(self, count: int) -> Objective:
        """The same loss on the first batches only, where they say enough."""
        if self._origin is not None:
            origin, again = self._origin
            return again(origin.first_batches(count))
        with isolated():
            chosen = [(self._layouts[i], self.data[i], self.batch_sizes[i]) for i in range(count)]
            return self._on(chosen)

    def first_samples(self, count: int) -> Objective | None:
        """The same loss on the first samples of the first batch.

        Returns:
            None where that batch cannot be cut: it has no more samples or tensors with another first dimension, or
            the losses of its parts do not average to its own (losses that compare samples, means over tokens).
        """
        if self._origin is not None:
            origin, again = self._origin
            few = origin.first_samples(count)
            return None if few is None else again(few)
        size = self.batch_sizes[0]
        with isolated():
            return self._first_part([slice(start, start + count) for start in range(0, size, count)])

    def of_few_samples(self, count: int) -> Objective:
        """The first samples of the first batch alone, for what does not depend on which they are.

        Nothing is evaluated. Where the batch cannot be cut, or the module does not take the shorter one, the first
        batch is taken whole.
        """
        if self._origin is not None:
            return self._origin[0].of_few_samples(count)
        few = self._cut_to(count)
        if few is not None:
            with isolated(), suppress(Exception):
                few.outputs(few.parameters, 0)
                return few
        other = copy.copy(self)
        other._take([(self._layouts[0], self.data[0], self.batch_sizes[0])])
        return other

    def _first_part(self, parts: Sequence[slice]) -> Objective | None:
        """The same loss on the first of several parts of the first batch; None where it cannot be cut like that."""
        size = self.batch_sizes[0]
        if size < len(parts) or len(parts) < 2 or not self._has_samples():
            return None
        try:
            cut = [self._on([self._samples(rows)]) for rows in parts]
        except Exception:  # what the loss takes is not only tensors, or has a size of its own
            return None
        whole = float(self.batch_losses[0])
        mean = sum(part.num_samples / size * float(part.batch_losses[0]) for part in cut)
        return cut[0] if same_loss(mean, whole) else None

    def _cut_to(self, count: int) -> Objective | None:
        """The first samples of the first batch, not evaluated; None where it has no more or cannot be cut."""
        if self.batch_sizes[0] <= count or not self._has_samples():
            return None
        with suppress(Exception):  # what the batch is made of may know its own size
            other, few = copy.copy(self), self._samples(slice(count))
            other._take([few])
            return other
        return None

    def _has_samples(self, batch: int = 0) -> bool:
        """Whether each tensor of a batch has an entry for each sample, or no dimension."""
        return all(not tensor.dim() or tensor.size(0) == self.batch_sizes[batch] for tensor in self.data[batch])

    def _samples(self, rows: slice, batch: int = 0) -> tuple[Layout, list[Tensor], int]:
        """Some of the samples of a batch."""
        own = [tensor[rows].clone() if tensor.dim() else tensor for tensor in self.data[batch]]
        return Layout(self._layouts[batch].rebuild(own)), own, len(range(self.batch_sizes[batch])[rows])

    def _on(self, batches: Sequence[tuple[Layout, list[Tensor], int]]) -> Objective:
        """The same loss on other batches, each with its layout, its tensors and its number of samples."""
        other = copy.copy(self)
        other._take(batches)
        other.batch_losses = first_evaluation(other)
        return other

    def _take(self, batches: Sequence[tuple[Layout, list[Tensor], int]]) -> None:
        self._layouts = [layout for layout, _, _ in batches]
        self.data = [data for _, data, _ in batches]
        self.batch_sizes = [size for _, _, size in batches]
        self.num_samples = sum(self.batch_sizes)
        self.batch_weights = [size / self.num_samples for size in self.batch_sizes]
        self.cuts = {}
        self._vectorized = Vectorized(self)

    @property
    def mean_loss(self) -> float:
        """The loss on the whole probe at ``parameters``."""
        return float(sum(w * loss for w, loss in zip(self.batch_weights, self.batch_losses.tolist(), strict=True)))

    def __repr__(self) -> str:
        """Sizes and the loss."""
        return (
            f"Objective({self.num_parameters:,} parameters, {self.num_samples:,} samples in "
            f"{self.num_batches} batches, loss {self.mean_loss:.6g})"
        )


def same_loss(loss: float, other: float) -> bool:
    """Whether two losses differ by no more than rounding of sums in another order."""
    return abs(loss - other) <= SAME_LOSS * (SAME_LOSS + abs(other))


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
