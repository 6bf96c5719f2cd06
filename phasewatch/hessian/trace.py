"""The trace of an objective's curvature from few products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.linalg import solve_triangular
from torch import Tensor

from phasewatch.hessian.lanczos import orthogonalized, own_generator, relative_rounding
from phasewatch.hessian.operators import GRAPH_MEMORY, OPERATORS, CurvatureOperator, Patterns, of_parameters
from phasewatch.isolation import isolated
from phasewatch.objective import Objective

FIRST_VECTORS = 8


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

    XTrace (Epperly, Tropp & Webber 2024, "XTrace: making the most of every sample in stochastic trace estimation",
    section 2.1 with the normalisation of section 2.3): the leading part of the matrix is found from the test vectors
    themselves and its trace taken exactly; each test vector in turn estimates what the others have left. Test vectors
    are added until the standard error is small enough. Memory is three vectors of parameters for each, two products.

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
    if max_products < 2 * FIRST_VECTORS:
        raise ValueError(f"max_products is {max_products}; expected at least {2 * FIRST_VECTORS}.")
    with isolated():
        operator = OPERATORS[matrix](objective, graph_memory=graph_memory)
        size = objective.num_parameters
        if size <= max_products:
            return TraceEstimate(float(operator.dense().diagonal().double().sum()), 0.0, True, operator.products)
        sketch = _Sketch(operator, own_generator(seed))
        while True:
            sketch.grow(min(max(FIRST_VECTORS, sketch.count), max_products // 2 - sketch.count))
            value, error = sketch.estimate()
            converged = error <= tolerance * abs(value)
            if converged or sketch.exhausted or 2 * sketch.count + 2 > max_products:
                return TraceEstimate(value, error, converged, operator.products)


class _Sketch:
    """Test vectors as rows, what the matrix makes of them, and an orthonormal basis of that."""

    def __init__(self, operator: CurvatureOperator, generator: torch.Generator) -> None:
        self.operator = operator
        self.generator = generator
        parameters = operator.objective.parameters
        self.tests = parameters.new_zeros(0, parameters.numel())
        self.basis = self.tests
        self.images = self.tests
        self.triangle = np.zeros((0, 0))
        self.quadratic: list[float] = []
        self.exhausted = False

    @property
    def count(self) -> int:
        """Number of test vectors."""
        return len(self.tests)

    def grow(self, number: int) -> None:
        """Add test vectors, up to the first that brings nothing new: then the basis holds the matrix's range."""
        dtype = self.basis.dtype
        for _ in range(number):
            test = torch.randn(self.operator.shape[0], generator=self.generator, dtype=torch.float64).to(self.basis)
            product = self.operator @ test
            rest, coefficients = orthogonalized(product, self.basis)
            length = rest.norm().item()
            if length <= relative_rounding(dtype, rest.numel()) * product.norm().item():
                self.exhausted = True
                return
            self.tests = torch.cat([self.tests, test[None]])
            self.basis = torch.cat([self.basis, rest[None] / length])
            self.images = torch.cat([self.images, (self.operator @ self.basis[-1])[None]])
            self.quadratic.append(float(test.double() @ product.double()))
            count = self.count
            grown = np.zeros((count, count))
            grown[:-1, :-1] = self.triangle
            grown[:-1, -1], grown[-1, -1] = coefficients.double().cpu().numpy(), length
            self.triangle = grown

    def estimate(self) -> tuple[float, float]:
        """Mean and standard error over the test vectors, each with the basis that the others span."""
        compressed = _inner(self.basis, self.images)
        inside = float(np.trace(compressed))
        if self.exhausted:
            return inside, 0.0
        # Leaving a test vector out takes one direction off the basis: these columns, in coordinates of the basis.
        removed = solve_triangular(self.triangle, np.eye(self.count), trans="T")
        removed /= np.linalg.norm(removed, axis=0)
        coordinates = _inner(self.basis, self.tests)
        coordinates -= removed * (removed * coordinates).sum(axis=0)
        against = _inner(self.images, self.tests)
        left = (
            np.array(self.quadratic)
            - 2 * (coordinates * against).sum(axis=0)
            + (coordinates * (compressed @ coordinates)).sum(axis=0)
        )
        squared_norms = self.tests.double().square().sum(dim=1).cpu().numpy() - (coordinates**2).sum(axis=0)
        rank = self.operator.shape[0] - self.count + 1
        single = inside - (removed * (compressed @ removed)).sum(axis=0) + left * rank / squared_norms
        return float(single.mean()), float(single.std(ddof=1) / math.sqrt(self.count))


def _inner(left: Tensor, right: Tensor) -> np.ndarray:
    return (left.double() @ right.double().T).cpu().numpy()
