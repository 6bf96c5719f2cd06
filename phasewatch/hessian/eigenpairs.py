"""Leading eigenpairs of an objective's curvature, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.hessian.lanczos import SymmetricOperator, orthogonalized, own_generator, relative_rounding
from phasewatch.hessian.operators import GRAPH_MEMORY, OPERATORS, CurvatureOperator, Patterns, of_parameters
from phasewatch.isolation import isolated
from phasewatch.objective import Objective
from phasewatch.shown import Shown

End = Literal["magnitude", "top", "bottom"]
_NEAR = 10.0
"""Residuals up to that many times what is allowed are looked at after every step. Chosen, like the next: both change
how often eigenpairs are looked at, none of them."""

_STEPS_WHEN_FAR = 2
"""Steps between two looks before that."""
_COLUMNS_AT_ONCE = 2**14
"""Columns of the basis that are rotated together, so that no second basis is needed. Chosen."""

_OF_ITSELF = 0.05
"""Residual, relative to its own eigenvalue, at which a small one has converged, so that it is right as well. Chosen: it
is then off by a 20th at most."""


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(Shown):
    """Eigenvalues at one end of a spectrum, with their eigenvectors.

    Attributes:
        values: The leading one first, shape ``(k,)``.
        vectors: Orthonormal rows in the same order, shape ``(k, N)``, on the device of the objective.
        residuals: Norms of ``A v - value v``; an eigenvalue of ``A`` lies within each of them.
        converged: Whether all residuals are within the tolerance.
        products: Number of matrix-vector products that it took.
    """

    values: NDArray[np.float64]
    vectors: Tensor
    residuals: NDArray[np.float64]
    converged: bool
    products: int

    def __repr__(self) -> str:
        """The values, and whether they can be relied on."""
        state = "" if self.converged else ", not converged"
        shown = ", ".join(f"{value:.4g}" for value in self.values[:10]) + (", ..." if len(self.values) > 10 else "")
        return f"Eigenpairs({shown}; {self.products} products{state})"


def leading_eigenpairs(
    objective: Objective,
    num_eigenvalues: int = 10,
    matrix: Literal["hessian", "gauss-newton"] = "hessian",
    seed: int = 0,
    *,
    parameters: Patterns | None = None,
    end: End = "magnitude",
    tolerance: float = 1e-3,
    basis_size: int = 64,
    max_products: int = 1000,
    graph_memory: int = GRAPH_MEMORY,
) -> Eigenpairs:
    """The leading eigenpairs of the Hessian or Gauss-Newton matrix, as precise as asked for and no more.

    Lanczos with full reorthogonalisation and thick restarts (Wu & Simon 2000, "Thick-restart Lanczos method for large
    symmetric eigenvalue problems", algorithm 1), in the objective's own precision; it stops as soon as all pairs wanted
    have converged. It starts from a gradient and a random vector in equal shares: a gradient lies where the curvature
    is, which saves some products, and the random part sees what symmetry keeps out of a gradient. One start vector sees
    one eigenvector of each eigenvalue: an eigenvalue with several exact copies is listed once, or as often as rounding
    has revealed (:func:`phasewatch.hessian_spectrum` looks for copies).

    Args:
        objective: The loss; the matrix is taken at its parameters, over all of its batches.
        num_eigenvalues: How many pairs.
        matrix: The Hessian or the Gauss-Newton matrix.
        seed: Seeds the start vector.
        parameters: The block of these parameters only: names of modules or parameters, or globs for them; default all.
        end: The largest magnitudes, the greatest (``"top"``) or the least (``"bottom"``) eigenvalues.
        tolerance: Residual at which a pair has converged, relative to the largest magnitude; or at 5 % of its own
            magnitude, if that is less, but never below a hundredth of the tolerance.
        basis_size: Greatest number of vectors kept, at least ``num_eigenvalues + 2``; memory is that many times the
            parameters, and eight times more at most, beside the graph.
        max_products: Products after which it gives up, with ``converged=False``.
        graph_memory: Bytes of autograd graph that may be kept between products; 0 rebuilds every time.

    Returns:
        The pairs, the leading one first.

    Raises:
        ValueError: If an argument is out of range, or if products are not finite.
        RuntimeError: If an operation of the model has no second derivative.
    """
    objective = of_parameters(objective, parameters)
    size = objective.num_parameters
    if matrix not in OPERATORS:
        raise ValueError(f"matrix is {matrix!r}; expected one of {', '.join(map(repr, OPERATORS))}")
    if end not in ("magnitude", "top", "bottom"):
        raise ValueError(f"end is {end!r}; expected 'magnitude', 'top' or 'bottom'")
    if not 1 <= num_eigenvalues <= size:
        raise ValueError(
            f"num_eigenvalues is {num_eigenvalues}; expected at least 1 and at most the number of parameters, {size}."
        )
    if basis_size < num_eigenvalues + 2:
        raise ValueError(f"basis_size is {basis_size}; expected at least num_eigenvalues + 2 = {num_eigenvalues + 2}.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; expected a number between 0 and 1.")
    if max_products < 1:
        raise ValueError(f"max_products is {max_products}; expected at least 1.")
    with isolated():
        operator = OPERATORS[matrix](objective, graph_memory=graph_memory)
        generator = own_generator(seed)

        def draw() -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(objective.parameters)

        return _thick_restart_lanczos(
            operator, _start(operator, draw), draw, num_eigenvalues, end, tolerance, basis_size, max_products
        )


def _start(operator: CurvatureOperator, draw: Callable[[], Tensor]) -> Tensor:
    """A random vector and the gradient in equal shares."""
    start, gradient = draw(), operator.gradient()
    if gradient.norm() > 0:
        start.add_(gradient, alpha=float(start.norm() / gradient.norm()))
    return start


def _thick_restart_lanczos(
    operator: SymmetricOperator,
    rest: Tensor,
    draw: Callable[[], Tensor],
    wanted: int,
    end: End,
    tolerance: float,
    basis_size: int,
    max_products: int,
) -> Eigenpairs:
    size, coupling = rest.numel(), rest.norm().item()
    rounding = relative_rounding(rest.dtype, size)
    capacity = min(basis_size, size)
    # Two pieces, as the first one is handed out and the second let go without a copy of either.
    basis = rest.new_empty(wanted, size), rest.new_empty(capacity - wanted, size)
    projected = np.zeros((capacity, capacity))
    length = products = next_look = 0
    coupled: int | None = 2
    while True:
        row = basis[0][length] if length < wanted else basis[1][length - wanted]
        torch.div(rest, coupling, out=row)
        del rest
        rest, coefficients = orthogonalized(operator @ row, *_first(basis, length + 1), coupled=coupled)
        products += 1
        projected[: length + 1, length] = projected[length, : length + 1] = coefficients.double().cpu().numpy()
        length += 1
        coupled = 2
        coupling = rest.norm().item()
        # An invariant basis holds one vector of each eigenvalue; the rest of the space is reached from a new start.
        invariant = length == size or coupling <= rounding * np.abs(projected[:length, :length]).max()
        done = length == size or products == max_products
        if not (done or invariant or length == capacity or length >= next_look):
            continue
        values, rotation = np.linalg.eigh(projected[:length, :length])
        order = _from_the_end(values, end)
        residuals = np.zeros(length) if invariant else coupling * np.abs(rotation[-1])
        leading = order[:wanted]
        magnitudes = np.abs(values)
        allowed = np.minimum(tolerance * magnitudes.max(), _OF_ITSELF * magnitudes[leading])
        allowed = np.maximum(allowed, max(rounding, tolerance / 100) * magnitudes.max())
        converged = len(leading) == wanted and bool((residuals[leading] <= allowed).all())
        if converged or done:
            _rotate(_first(basis, length), rotation[:, leading])
            return Eigenpairs(values[leading], basis[0][: len(leading)], residuals[leading], converged, products)
        near = len(leading) == wanted and bool((residuals[leading] <= _NEAR * allowed).all())
        next_look = length + (1 if near else _STEPS_WHEN_FAR)
        if length == capacity:
            kept = order[: (wanted + capacity) // 2]
            _rotate(_first(basis, length), rotation[:, kept])
            projected[:] = 0.0
            np.fill_diagonal(projected[: len(kept), : len(kept)], values[kept])
            length, coupled = len(kept), None
            next_look = length + 1
        if invariant:
            rest = orthogonalized(draw(), *_first(basis, length))[0]
            coupling = rest.norm().item()


def _from_the_end(values: NDArray[np.float64], end: End) -> NDArray[np.intp]:
    key = {"magnitude": -np.abs(values), "top": -values, "bottom": values}[end]
    return np.argsort(key, kind="stable")


def _first(basis: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    return basis[0][:length], basis[1][: max(length - len(basis[0]), 0)]


def _rotate(basis: tuple[Tensor, Tensor], rotation: NDArray[np.float64]) -> None:
    """Replace the first rows by combinations of all, shape ``(rows, combinations)``, without a second basis."""
    turn = torch.from_numpy(np.ascontiguousarray(rotation.T)).to(basis[0])
    for pieces in zip(*(block.split(_COLUMNS_AT_ONCE, dim=1) for block in basis), strict=True):
        combined = turn @ torch.cat(pieces)
        first = len(pieces[0])
        pieces[0][: len(combined)] = combined[:first]
        pieces[1][: max(len(combined) - first, 0)] = combined[first:]
