"""The spectral density, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.hessian.lanczos import LanczosRun


@dataclass(frozen=True, eq=False, repr=False)
class Density:
    """Where the eigenvalues lie: a discrete distribution, ready for a weighted histogram.

    Attributes:
        nodes: Places on the axis of eigenvalues, ascending.
        weights: Share of all eigenvalues at each node; they sum to 1.
    """

    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]

    def __repr__(self) -> str:
        """Number of nodes and their range."""
        return f"Density({len(self.nodes)} nodes in [{self.nodes[0]:.4g}, {self.nodes[-1]:.4g}])"


@dataclass(frozen=True, eq=False)
class Probe:
    """The spectrum as a random direction sees it, outside of a subspace whose eigenvalues are known.

    Attributes:
        nodes: Nodes of the Gauss quadrature, ascending.
        weights: Their weights, with sum 1.
        residuals: Residual norms of the nodes as Ritz values.
        exact: Whether the quadrature is the whole measure (the Krylov space was exhausted).
        dimension: Dimension of the space from which the direction was drawn uniformly.
        squared_norm: Squared length of the Gaussian vector that gave the direction.
        known: Eigenvalues of the rest of the space, shape ``(size - dimension,)``.
        known_residuals: Their residual norms.
        diagonal: Diagonal of the tridiagonal matrix of the run.
        couplings: Its off-diagonal, the last of which leads out of the basis.
        asymmetry: Entries by which the matrix was seen to fail symmetry, root mean square.
        coupling: First off-diagonal entry, the length of the part of the product orthogonal to the direction.
        mean: Rayleigh quotient of the direction.
        squared_frobenius: Lower bound from the tridiagonal matrix for the squared Frobenius norm.
    """

    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    residuals: NDArray[np.float64]
    exact: bool
    dimension: int
    squared_norm: float
    known: NDArray[np.float64]
    known_residuals: NDArray[np.float64]
    diagonal: NDArray[np.float64]
    couplings: NDArray[np.float64]
    asymmetry: float
    coupling: float
    mean: float
    squared_frobenius: float

    @classmethod
    def of(
        cls, run: LanczosRun, squared_norm: float, known: NDArray[np.float64], known_residuals: NDArray[np.float64]
    ) -> Probe:
        """What remains of a Lanczos run once its basis is dropped."""
        return cls(
            run.ritz_values,
            run.weights,
            run.residuals,
            run.invariant,
            run.basis.shape[1] - len(known),
            squared_norm,
            known,
            known_residuals,
            run.diagonal,
            run.off_diagonal,
            run.asymmetry,
            run.off_diagonal[0],
            run.diagonal[0],
            float((run.ritz_values**2).sum()),
        )


def pooled_density(probes: Sequence[Probe]) -> Density:
    """The mean of the probes' measures, known eigenvalues included.

    Stochastic Lanczos quadrature: Golub & Meurant (1994); Lin, Saad & Yang (2016), section 3.2.
    """
    size = probes[0].dimension + len(probes[0].known)
    nodes = np.concatenate([np.concatenate([p.known, p.nodes]) for p in probes])
    weights = np.concatenate([np.concatenate([np.ones(len(p.known)), p.dimension * p.weights]) / size for p in probes])
    order = np.argsort(nodes, kind="stable")
    return Density(nodes[order], weights[order] / weights.sum())


def estimated_trace(probes: Sequence[Probe]) -> tuple[float, float]:
    """The trace and its standard error from probes drawn uniformly outside of known directions.

    Hutchinson's estimate with deflation (Hutch++, Meyer et al. 2021). The variance for a uniform direction in ``d``
    dimensions, ``2 (d |A|_F^2 - tr(A)^2) / (d + 2)``, is taken from the products themselves, since the spread of
    two or three probes says little.
    """
    estimates = [float(p.known.sum()) + p.dimension * p.mean for p in probes]
    variances = [
        2
        / (p.dimension + 2)
        * p.dimension
        * max(p.dimension * p.coupling**2, p.squared_frobenius - p.dimension * p.mean**2)
        for p in probes
    ]
    pooled = max(float(np.mean(variances)), 0.0)
    return float(np.mean(estimates)), float(np.sqrt(pooled / len(probes)))


def estimated_frobenius_norm(probes: Sequence[Probe]) -> tuple[float, float]:
    """The Frobenius norm and its standard error, from the quadratures of the second and fourth moment.

    The square is the trace of the squared matrix; its variance for a uniform direction in ``d`` dimensions is
    ``2 (d tr(A^4) - tr(A^2)^2) / (d + 2)``, as for the trace itself.
    """
    squares, variances = [], []
    for probe in probes:
        second, fourth = probe.weights @ probe.nodes**2, probe.weights @ probe.nodes**4
        squares.append(float((probe.known**2).sum() + probe.dimension * second))
        variances.append(2 * probe.dimension**2 / (probe.dimension + 2) * max(float(fourth - second**2), 0.0))
    norm = float(np.sqrt(np.mean(squares)))
    return norm, float(np.sqrt(np.mean(variances) / len(probes))) / (2 * norm) if norm else 0.0


def estimated_number_below(probes: Sequence[Probe], limit: float) -> tuple[float, float]:
    """Number of eigenvalues below a limit, and its standard error.

    The error is chance (as of a Beta distribution) and, beside it, half of the weights of the two nodes next to the
    limit: Chebyshev, Markov and Stieltjes leave that much open.
    """
    numbers, variances, doubts = [], [], []
    for probe in probes:
        share = float(probe.weights[probe.nodes < limit].sum())
        numbers.append(float((probe.known < limit).sum()) + probe.dimension * share)
        variances.append(2 * probe.dimension * share * (1 - share))
        cut = int(np.searchsorted(probe.nodes, limit))
        nearest = 0.0 if probe.exact else float(probe.weights[max(cut - 1, 0) : cut + 1].sum())
        doubts.append(probe.dimension * nearest / 2)
    chance = max(float(np.mean(variances)), 0.0) / len(probes)
    return float(np.mean(numbers)), math.hypot(math.sqrt(chance), float(np.mean(doubts)))
