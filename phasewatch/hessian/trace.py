"""The trace of an objective's curvature from few products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from phasewatch.hessian.lanczos import LanczosRun, lanczos, orthogonalized, own_generator, relative_rounding
from phasewatch.hessian.operators import GRAPH_MEMORY, OPERATORS, CurvatureOperator, Patterns, of_parameters
from phasewatch.isolation import isolated
from phasewatch.objective import Objective

MOST_STEPS = 64
"""Lanczos steps, and with them vectors in memory, at most. Chosen."""

_CHUNK = 8
"""Steps after which it is asked whether more of them pay. Chosen."""

_MARGIN = 0.9
"""Share of the tolerance at which it stops: where it is small enough a standard error is more often too small.
Chosen."""

_MOST_BLOCKS = 4
"""Blocks of parameters that are tried with test vectors of their own: each takes a product a round. Chosen."""


@dataclass(frozen=True)
class TraceEstimate:
    """The sum of all eigenvalues.

    Attributes:
        value: The estimate.
        standard_error: Its standard error; 0.0 where it is exact.
        converged: Whether the standard error is within the tolerance.
        products: Number of matrix-vector products that it took.
    """

    value: float
    standard_error: float
    converged: bool
    products: int


def hessian_trace(
    objective: Objective,
    matrix: Literal["hessian", "gauss-newton"] = "hessian",
    seed: int = 0,
    *,
    parameters: Patterns | None = None,
    tolerance: float = 0.01,
    max_products: int = 512,
    graph_memory: int = GRAPH_MEMORY,
) -> TraceEstimate:
    """The trace of the Hessian or Gauss-Newton matrix, to a relative standard error asked for.

    The leading part is taken out by a Lanczos run, whose basis gives its trace exactly, as long as each further step
    saves more than a product later (Chen & Hallman 2023, "Krylov-aware stochastic trace estimation"). What is left is
    estimated by random test vectors (Girard 1987; Hutchinson 1990): either on all parameters, or on one block of layers
    at a time, whichever a first vector for each block shows to need fewer. The variance of the second knows nothing of
    the curvature between blocks, and in piecewise linear networks away from a minimum there is most of it. The
    standard error is that of uniform directions, from the lengths of the products. Memory is one vector of parameters
    for each Lanczos step, at most ``MOST_STEPS``.

    Args:
        objective: The loss; the matrix is taken at its parameters, over all of its batches.
        matrix: The Hessian or the Gauss-Newton matrix.
        seed: Seeds the test vectors.
        parameters: The block of these parameters only: names of modules or parameters, or globs for them; default all.
        tolerance: Standard error wanted, relative to the trace.
        max_products: Products after which it stops, with ``converged=False``; a matrix of no more rows is summed.
        graph_memory: Bytes of autograd graph that may be kept between products; 0 rebuilds every time.

    Returns:
        The estimate.

    Raises:
        ValueError: If an argument is out of range, or if products are not finite.
        RuntimeError: If an operation of the model has no second derivative.
    """
    objective = of_parameters(objective, parameters)
    if matrix not in OPERATORS:
        raise ValueError(f"matrix is {matrix!r}; expected one of {', '.join(map(repr, OPERATORS))}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; expected a number between 0 and 1.")
    if max_products < 4 * _CHUNK:
        raise ValueError(f"max_products is {max_products}; expected at least {4 * _CHUNK}.")
    with isolated():
        operator = OPERATORS[matrix](objective, graph_memory=graph_memory)
        if objective.num_parameters <= max_products:
            return TraceEstimate(float(operator.dense().diagonal().double().sum()), 0.0, True, operator.products)
        sampler = _Sampler(operator, own_generator(seed), tolerance, max_products)
        while sampler.standard_error > _MARGIN * tolerance * abs(sampler.value) and operator.products < max_products:
            sampler.draw()
        value, error = sampler.value, sampler.standard_error
        return TraceEstimate(value, error, error <= tolerance * abs(value), operator.products)


class _Block:
    """Estimates of the trace of one block of the deflated matrix, from uniform directions in it."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.quotients: list[float] = []
        self.squares: list[float] = []

    def add(self, direction: Tensor, product: Tensor) -> None:
        """Note a direction of unit length and what the matrix makes of it, both within the block."""
        self.quotients.append(self.dimension * float(direction.double() @ product.double()))
        self.squares.append(self.dimension * float(product.double().square().sum()))

    @property
    def value(self) -> float:
        """The estimate of the trace."""
        return float(np.mean(self.quotients))

    @property
    def variance(self) -> float:
        """Variance of a single estimate, ``2 d (|A|_F^2 - tr(A)^2 / d) / (d + 2)``."""
        excess = float(np.mean(self.squares)) - self.value**2 / self.dimension
        return 2 * self.dimension / (self.dimension + 2) * max(excess, 0.0)


class _Sampler:
    """The trace of a matrix as that of a Krylov basis and test vectors outside of it."""

    def __init__(
        self, operator: CurvatureOperator, generator: torch.Generator, tolerance: float, max_products: int
    ) -> None:
        self._operator = operator
        self._generator = generator
        self._tolerance = tolerance
        self._expected: list[float] = []
        run = lanczos(
            operator, self._normal(operator.shape[0]), min(MOST_STEPS, max_products // 2), enough=self._enough
        )
        self._basis = run.basis
        self._inside = float(run.diagonal.sum())
        self._negligible = relative_rounding(run.basis.dtype, operator.shape[0]) * float(np.abs(run.ritz_values).max())
        self._whole = _Block(operator.shape[0] - run.dimension)
        self._parts = _layers(operator.objective)
        self._blocks = [_Block(part.stop - part.start) for part in self._parts]
        self._by_block = len(self._parts) > 1
        if self._by_block:
            self._compare()
        else:
            self._draw_whole()

    @property
    def value(self) -> float:
        """The estimate: that of blocks and that of the whole, by the inverses of their variances."""
        return self._inside + self._pooled()[0]

    @property
    def standard_error(self) -> float:
        """Its standard error."""
        return self._pooled()[1]

    def draw(self) -> None:
        """Use one more product where it helps most."""
        if self._by_block:
            gains = [b.variance / (len(b.quotients) * (len(b.quotients) + 1)) for b in self._blocks]
            self._draw_block(int(np.argmax(gains)))
        else:
            self._draw_whole()

    def _enough(self, run: LanczosRun) -> bool:
        """Whether the last steps have saved fewer test vectors than they have cost."""
        if run.dimension % _CHUNK:
            return False
        size = run.basis.shape[1]
        outside = run.residuals > 0.3 * np.abs(run.ritz_values)
        trace = float(run.ritz_values[~outside].sum()) + size * float((run.weights * run.ritz_values)[outside].sum())
        square = size * float((run.weights * run.ritz_values**2)[outside].sum())
        self._expected.append(2 * square / max((self._tolerance * trace) ** 2, 1e-300))
        few = len(self._expected) > 1 and self._expected[-1] < _CHUNK
        return few or (len(self._expected) > 2 and self._expected[-2] - self._expected[-1] < _CHUNK)

    def _compare(self) -> None:
        """One vector on each block: the variances of both ways, and with them their costs."""
        total = 0.0
        for number, block in enumerate(self._blocks):
            total += block.dimension * self._draw_block(number)
        by_block = sum(math.sqrt(float(np.mean(block.squares))) for block in self._blocks) ** 2
        self._by_block = by_block < total
        if self._by_block:
            for number in range(len(self._blocks)):
                self._draw_block(number)
        else:
            self._draw_whole()

    def _draw_block(self, number: int) -> float:
        """A test vector on one block; squared length of what the whole matrix makes of it."""
        part = self._parts[number]
        direction = torch.zeros_like(self._operator.objective.parameters)
        direction[part] = self._normal(part.stop - part.start)
        direction /= direction.norm()
        product = self._outside(self._operator @ self._outside(direction))
        self._blocks[number].add(direction[part], product[part])
        return float(product.double().square().sum())

    def _draw_whole(self) -> None:
        direction = self._outside(self._normal(self._operator.shape[0]))
        direction /= direction.norm()
        self._whole.add(direction, self._outside(self._operator @ direction))

    def _pooled(self) -> tuple[float, float]:
        estimates = []
        if self._parts[1:]:
            variance = sum(block.variance / len(block.quotients) for block in self._blocks)
            estimates.append((sum(block.value for block in self._blocks), variance))
        if self._whole.quotients:
            estimates.append((self._whole.value, self._whole.variance / len(self._whole.quotients)))
        floor = self._negligible**2
        weights = np.array([1 / max(variance, floor) for _, variance in estimates])
        value = float(np.average([value for value, _ in estimates], weights=weights))
        error = float(1 / math.sqrt(weights.sum()))
        return value, error if error > self._negligible else 0.0

    def _outside(self, vector: Tensor) -> Tensor:
        return orthogonalized(vector, self._basis)[0]

    def _normal(self, size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, dtype=torch.float64).to(self._operator.objective.parameters)


def _layers(objective: Objective) -> list[slice]:
    """Stretches of the flat vector, each a layer or several of about the same size."""
    sizes: dict[str, int] = {}
    for name, shape in objective.parameter_shapes.items():
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + shape.numel()
    ends = np.cumsum(list(sizes.values()))
    if len(ends) > _MOST_BLOCKS:
        targets = np.linspace(0, ends[-1], _MOST_BLOCKS + 1)[1:]
        ends = np.unique(ends[np.searchsorted(ends, targets).clip(max=len(ends) - 1)])
    return [slice(int(start), int(end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
