"""The Hessian and the Gauss-Newton matrix of an objective, as operators on flat vectors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from phasewatch.hessian.linearization import Jacobian, LossCurvature, by_forward_mode, pull_back
from phasewatch.hessian.precision import in_double_precision
from phasewatch.isolation import isolated
from phasewatch.objective import Objective, second_derivatives
from phasewatch.objective.memory import with_saved_bytes

GRAPH_MEMORY = 2**30
"""Bytes of saved tensors that may be kept between products by default. Chosen."""

_COLUMNS_AT_ONCE = 32
"""Rows of the identity that are multiplied in one vectorised pass, for as many times the memory of one. Chosen."""

_FORWARD_MODE_FROM = 20_000
"""Parameters from which on it is faster: 1.5 gradients in place of 4 on a convnet of 100 thousand, but 5 in place of 4
on a perceptron of 1.5 thousand, where the module is called anew for each product."""

_SAME_PRODUCT = 1e-3
"""Relative difference up to which forward and backward mode agree. Chosen: single precision is a hundred times
better."""


class NoSecondDerivativeError(RuntimeError):
    """An operation of the model has no second derivative."""


class NoCurvatureError(ValueError):
    """The loss jumps, changes from call to call, or has derivatives that are not finite."""


LinearMap = Callable[..., Tensor]
"""``product(vector)``, or ``product(rows, batched=True)`` on the rows of a matrix."""


class CurvatureOperator(ABC):
    """A symmetric matrix of shape ``(num_parameters, num_parameters)`` that is known by its products only.

    It is the mean over all batches, weighted by their true sizes. Between products the graphs of the batches are
    kept as long as their saved tensors fit into ``graph_memory``; the others are rebuilt for each product.

    Attributes:
        name: What the matrix is called in messages.
        objective: The loss whose curvature this is.
        products: Number of matrix-vector products computed so far.
        kept_bytes: Saved tensors of the graphs that are kept, known after the first product.
    """

    name: ClassVar[str]

    def __init__(self, objective: Objective, *, graph_memory: int = GRAPH_MEMORY) -> None:
        """Nothing is computed yet.

        Args:
            objective: The loss; its parameters are the point at which the matrix is taken.
            graph_memory: Bytes of saved tensors that may be kept between products; 0 rebuilds every time.
        """
        self.objective = objective
        self.products = 0
        self.kept_bytes = 0
        self._graph_memory = graph_memory
        self._kept: dict[int, LinearMap] | None = None
        self._derivatives: list[Tensor] = []

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.objective.num_parameters, self.objective.num_parameters

    def __matmul__(self, vector: Tensor) -> Tensor:
        """The product with a flat vector of shape ``(num_parameters,)``.

        Raises:
            ValueError: If the vector has another shape, or if the product is not finite.
            RuntimeError: If an operation of the model has no second derivative.
        """
        if vector.shape != self.shape[1:]:
            raise ValueError(f"The vector has shape {tuple(vector.shape)}; expected {self.shape[1:]}.")
        self.products += 1
        return self._multiply(vector, batched=False)

    def gradient(self) -> Tensor:
        """The gradient of the first batch, shape ``(num_parameters,)``."""
        return self.objective.gradient(batch=0)

    def dense(self) -> Tensor:
        """The whole matrix, shape ``(num_parameters, num_parameters)``, as computed, that is not symmetrised.

        Raises:
            ValueError: If the matrix is not finite.
            RuntimeError: If an operation of the model has no second derivative.
        """
        matrix = torch.eye(self.shape[0], dtype=self.objective.dtype, device=self.objective.device)
        self.products += self.shape[0]
        for rows in matrix.split(_COLUMNS_AT_ONCE):
            rows.copy_(self._multiply_rows(rows))
        return matrix

    def _product(self, batch: int) -> tuple[LinearMap, list[Tensor]]:
        parameters = self.objective.parameters.detach().clone().requires_grad_()
        tensors = self.objective.tensors_at(parameters)
        with second_derivatives(), self.objective.holding(tensors):
            multiply, derivatives = self._linearize(parameters, batch)

        def product(vectors: Tensor, batched: bool = False) -> Tensor:
            with second_derivatives(), self.objective.holding(tensors):
                return multiply(vectors, batched)

        return product, derivatives

    @abstractmethod
    def _linearize(self, parameters: Tensor, batch: int) -> tuple[LinearMap, list[Tensor]]:
        """The product with the matrix of one batch, which holds the graph, and the loss and its first derivatives.

        Made, and called, while the objective is held at ``parameters``.
        """

    def _multiply(self, vectors: Tensor, *, batched: bool) -> Tensor:
        with curvature_pass(self.name):
            vectors = vectors.detach().to(self.objective.dtype)
            result = torch.zeros_like(vectors)
            kept = self._kept_graphs()
            for batch, weight in enumerate(self.objective.batch_weights):
                product = kept.get(batch) or self._product(batch)[0]
                result.add_(product(vectors, batched=batched), alpha=weight)
        if not result.isfinite().all():
            raise NoCurvatureError(
                f"A product with the {self.name} is not finite although the loss is. A function whose second "
                "derivative is infinite at these parameters does this (sqrt, norm or a power at 0): add a small "
                "constant under it, and look for it with torch.autograd.set_detect_anomaly(True)."
            )
        return result

    def _multiply_rows(self, rows: Tensor) -> Tensor:
        if self._rows_at_once:
            try:
                return self._multiply(rows, batched=True)
            except RuntimeError:  # vmap does not know every operation; one vector at a time works for all
                self._rows_at_once = False
        return torch.stack([self._multiply(row, batched=False) for row in rows])

    _rows_at_once = True

    def _kept_graphs(self) -> dict[int, LinearMap]:
        if self._kept is None:
            self._kept = {}
            sizes: dict[Any, int] = {}
            for batch in range(self.objective.num_batches):
                shapes = self.objective.batch_shapes(batch)
                if shapes not in sizes:
                    # The hooks that count make its products 2 % slower at most; without them it is made once more.
                    sizes[shapes], (product, first) = with_saved_bytes(partial(self._product, batch))
                    if not _agree(first, self._known_derivatives(batch)):
                        _check_repeatable(first, self._product(batch)[1])
                    self._derivatives = self._derivatives or first
                elif self.kept_bytes + sizes[shapes] <= self._graph_memory:
                    product, _ = self._product(batch)
                if self.kept_bytes + sizes[shapes] <= self._graph_memory:
                    self._kept[batch] = product
                    self.kept_bytes += sizes[shapes]
            function = self.objective
            continuous = _CONTINUOUS, *function.parameter_shapes, *(reading.reader for reading in function.readings)
            if continuous not in function.known:
                _check_continuity(function)
                function.known[continuous] = True
        return self._kept

    def _known_derivatives(self, batch: int) -> list[Tensor]:
        """The loss of a batch and its first derivatives as an evaluation before has found them; nothing where none has.

        Attention is evaluated by another kernel now, whose rounding may be another.
        """
        return []

    def __repr__(self) -> str:
        """Name and size."""
        return f"{type(self).__name__}({self.shape[0]:,} x {self.shape[1]:,}, {self.products} products)"


class HessianOperator(CurvatureOperator):
    r"""The Hessian of the mean loss, :math:`\nabla^2 L(w)`, by differentiating the gradient once more.

    Example:
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> def loss_fn(module, batch):
        ...     return 0.5 * module(batch).square().mean()
        >>> objective = Objective(module, [torch.tensor([[1.0, 2.0]])], loss_fn=loss_fn)
        >>> HessianOperator(objective) @ torch.tensor([1.0, 0.0])
        tensor([1., 2.])
    """

    name = "Hessian"

    def gradient(self) -> Tensor:
        """The gradient of the first batch, shape ``(num_parameters,)``, which the first product has computed anyway."""
        with curvature_pass(self.name):
            self._kept_graphs()
        return self._derivatives[1]

    def _known_derivatives(self, batch: int) -> list[Tensor]:
        gradient = self.objective.known_gradient(batch)
        return [] if gradient is None else [self.objective.batch_losses[batch], gradient]

    def _linearize(self, parameters: Tensor, batch: int) -> tuple[LinearMap, list[Tensor]]:
        loss = self.objective.loss(parameters, batch)
        _check_differentiable_twice([loss])
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)

        def product(vectors: Tensor, batched: bool) -> Tensor:
            return pull_back(gradient, [parameters], [vectors], batched)[0]

        return product, [loss.detach(), gradient[0].detach()]


class GaussNewtonOperator(CurvatureOperator):
    r"""The (generalised) Gauss-Newton matrix :math:`J^\top H_\ell J`, :math:`J` the Jacobian of the outputs.

    :math:`H_\ell` is the Hessian of the loss in the network's outputs. Products with :math:`J` are made in forward
    mode; where the network is so small that the overhead of calling it is what counts, where an operation of it has no
    such derivative, or another than backward passes say, by differentiating :math:`u \mapsto J^\top u`, which works
    wherever second derivatives do, and holds more memory.
    """

    name = "Gauss-Newton matrix"

    _forward_mode: bool | None

    def __init__(self, objective: Objective, *, graph_memory: int = GRAPH_MEMORY) -> None:
        """Nothing is computed yet; see :class:`CurvatureOperator`."""
        super().__init__(objective, graph_memory=graph_memory)
        self._outputs_of: dict[int, int] = {}
        self._forward_mode = None if objective.num_parameters >= _FORWARD_MODE_FROM else False

    def num_outputs(self) -> int:
        """How many numbers the network says of all samples together; known after a product."""
        return sum(self._outputs_of.values())

    def rank_limit(self) -> int:
        """The greatest rank that there can be, by how many numbers the network says; known after a product."""
        return min(self.shape[0], self.num_outputs())

    def _linearize(self, parameters: Tensor, batch: int) -> tuple[LinearMap, list[Tensor]]:
        outputs, leaves, loss = self.objective.split_loss(parameters, batch)
        self._outputs_of[batch] = sum(output.numel() for output in outputs)
        _check_differentiable_twice([loss, *outputs])
        curvature, jacobian = LossCurvature(loss, leaves), Jacobian(outputs, parameters)

        # No product may refer to itself: what it holds would be freed when the collector finds it, and not before.
        def product(vectors: Tensor, batched: bool) -> Tensor:
            tangents = None if batched else self._by_forward_mode(parameters, vectors, batch, outputs)
            if tangents is not None:
                curved = curvature(tangents)
                result = jacobian.transposed(curved)
                if self._forward_mode is None:
                    # Both are the same number, the second by way of J transposed.
                    pairs = zip(tangents, curved, strict=True)
                    seen = sum(float(t.double().flatten() @ c.double().flatten()) for t, c in pairs)
                    pulled = float(vectors.double() @ result.double())
                    self._forward_mode = abs(seen - pulled) <= _SAME_PRODUCT * max(abs(seen), abs(pulled))
                if self._forward_mode:
                    return result
            return jacobian.transposed(curvature(jacobian.by_backward(vectors, batched), batched), batched)

        return product, [loss.detach(), *(slope.detach() for slope in curvature.slopes)]

    def _by_forward_mode(
        self, parameters: Tensor, vector: Tensor, batch: int, outputs: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """The product of J with a vector; None where it is not to be had."""
        found = None
        if self._forward_mode is not False:
            found = by_forward_mode(self.objective, vector, batch, outputs, parameters)
        if found is None:
            self._forward_mode = False
        return found


def _check_repeatable(first: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    """A second evaluation tells a loss with a memory or randomness of its own from a function."""
    if not all(derivative.isfinite().all() for derivative in first[1:]):
        raise NoCurvatureError(
            "The gradient is not finite although the loss is. A function whose derivative is infinite at these "
            "parameters does this (sqrt, norm or a power at 0): add a small constant under it, and look for it with "
            "torch.autograd.set_detect_anomaly(True)."
        )
    if not _agree(first, again):
        raise NoCurvatureError(
            f"Two evaluations of the loss at the same parameters give {float(first[0]):.10g} and "
            f"{float(again[0]):.10g}, or differ in their gradients, so that there is no second derivative. Look for "
            "what changes from call to call in the module or in loss_fn: counters, buffers updated in Python, "
            "random numbers from NumPy generators of their own."
        )


def _agree(first: Sequence[Tensor], again: Sequence[Tensor]) -> bool:
    """Whether a loss and its derivatives are those of another evaluation, up to rounding."""
    if len(first) != len(again):
        return False
    tolerance = 1e3 * torch.finfo(first[0].dtype).eps
    same = abs(float(first[0] - again[0])) <= tolerance * (abs(float(first[0])) + 1e-300)
    for one, other in zip(first[1:], again[1:], strict=True):
        scale = max(float(one.norm()), float(other.norm()))
        same &= float((one - other).norm()) <= max(tolerance, 1e-6) * scale + tolerance
    return same


def _check_continuity(objective: Objective) -> None:
    """Refuse a loss that jumps on the way to a place nearby; in single precision a second look is taken in double."""
    jump = _jump(objective, 200)
    if jump is not None and objective.dtype != torch.float64:
        objective = in_double_precision(objective)
        if objective.dtype != torch.float64:  # rounding cannot be told from jumps
            return
    if jump is not None and (jump := _jump(objective, 1e4)) is not None:
        raise NoCurvatureError(
            f"The loss jumps by {jump:.2g} on a step of {_STEP:.0%} of the parameters' length, so that its "
            "derivatives do not say how it changes. Look for what is discontinuous in the module or in loss_fn: "
            "rounding, argmax, comparisons, hard thresholds, quantization."
        )


def _jump(objective: Objective, rounding: float) -> float | None:
    """A jump of the first batch's loss on a line, or None.

    The line is halved again and again, towards the half in which the loss changes more. What is continuous changes
    less and less, a kink included; a jump stays.

    Args:
        objective: The loss.
        rounding: What counts as rounding, in units of the precision and the loss.
    """
    start = objective.parameters
    generator = torch.Generator().manual_seed(objective.num_parameters)
    line = torch.randn(start.numel(), generator=generator, dtype=torch.float64).to(start)
    line *= _STEP * (start.norm() or 1.0) / line.norm()

    def loss(share: float) -> float:
        with torch.no_grad():
            return float(objective.loss(start + share * line, 0))

    left, right = 0.0, 1.0
    at_left, at_right = float(objective.batch_losses[0]), loss(right)
    level = rounding * max(abs(at_left), abs(at_right))
    changes = [abs(at_right - at_left)]
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        at_middle = loss(middle)
        if abs(at_middle - at_left) > abs(at_right - at_middle):
            right, at_right = middle, at_middle
        else:
            left, at_left = middle, at_middle
        changes.append(abs(at_right - at_left))
        if not changes[-1] > level * torch.finfo(objective.dtype).eps:  # also where the loss is not finite on the way
            return None
        before = changes[-_HALVINGS_OF_A_JUMP - 3 : -_HALVINGS_OF_A_JUMP]
        if len(before) == 3 and changes[-1] > 0.7 * max(before):  # one alone may have had an extremum in its middle
            precision = _precision(objective.dtype, [loss(_NEAR * k) for k in range(_POINTS_NEAR)])
            return changes[-1] if changes[-1] > level * precision else None
    return None


def _precision(dtype: torch.dtype, losses: Sequence[float]) -> float:
    """At which a loss is really computed, by its values at a few equidistant places near one another.

    Whatever the type of the parameters is, the module's code may go through single precision, as that of many language
    models does with their outputs. Then the values are single numbers, or do not lie on a smooth curve to their own.
    """
    own, single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    values = np.array(losses)
    off_a_curve = float(np.median(np.abs(np.diff(values, n=3))))
    is_single = bool((values.astype(np.float32) == values).all()) or off_a_curve > _UNEVEN * own * abs(values[0])
    return max(own, single) if is_single else own


_NEAR, _POINTS_NEAR = 3e-5, 12
"""Share of the line between the places at which precision is looked at, and how many: third differences of what is
smooth are below 1e-13 of its change along the line. Chosen so."""

_UNEVEN = 1e3
"""Third differences of more units of the precision are not of its rounding, which makes some ten. Chosen."""

_STEP = 0.01
"""Length of the line on which jumps are looked for, relative to the parameters. Chosen."""

_HALVINGS = 20
"""Times that it is halved: a smooth change has then shrunk to a millionth. Chosen."""

_HALVINGS_OF_A_JUMP = 5
"""Halvings over which a change that does not shrink is taken for a jump. Chosen: what is smooth shrinks to a 32nd."""

_CONTINUOUS = "continuous"
"""Noted in what is known of an objective, with its parameters and what is read off its outputs: a divergence, or the
loss as a function of some of the parameters, may have no jumps that the whole has."""

Patterns = str | Sequence[str]
"""Names of modules or parameters, or globs for them."""


def of_parameters(objective: Objective, patterns: Patterns | None) -> Objective:
    """The objective as a function of the parameters that match; of all of them by default."""
    if patterns is None:
        return objective
    return objective.restricted_to(*([patterns] if isinstance(patterns, str) else patterns))


OPERATORS: dict[str, type[CurvatureOperator]] = {"hessian": HessianOperator, "gauss-newton": GaussNewtonOperator}
"""The operators by the names that users give."""


def _check_differentiable_twice(outputs: Sequence[Tensor]) -> None:
    """Find functions whose second derivative PyTorch takes for zero without a word.

    ``once_differentiable`` raises only where the incoming gradient itself depends on the parameters.
    """
    nodes = [output.grad_fn for output in outputs]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
        function = getattr(node, "_forward_cls", None)
        if function is None:
            continue
        wrapped = hasattr(function.backward, "__wrapped__")
        if wrapped and function.backward.__globals__.get("__name__") == "torch.autograd.function":
            raise RuntimeError(f"derivative for '{function.__name__}' is not implemented: once_differentiable")


@contextmanager
def curvature_pass(name: str) -> Iterator[None]:
    """Autograd as it must be for second derivatives, and its errors in words that say what to do."""
    try:
        with isolated():
            yield
    except RuntimeError as error:
        message = str(error)
        if not re.search(r"is not implemented|once_differentiable|[Dd]ouble backward", message):
            raise
        found = re.search(r"derivative for '?([\w:]+)'? is not implemented", message)
        operation = f"The operation {found[1]}" if found else "An operation of the model"
        raise NoSecondDerivativeError(
            f"{operation} has no second derivative, which the {name} needs. Replace it by differentiable PyTorch "
            "operations when measuring (attention: torch.nn.attention.SDPBackend.MATH; CuDNN RNN: "
            "torch.backends.cudnn.flags(enabled=False); own autograd.Function: drop once_differentiable). PyTorch "
            f"says: {message.splitlines()[0]}"
        ) from error
