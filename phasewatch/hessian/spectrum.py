"""The spectrum of an objective's curvature: dense where it is small, by Lanczos where it is not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import chdtri
from torch import Tensor

from phasewatch.hessian.density import (
    Density,
    Probe,
    estimated_frobenius_norm,
    estimated_number_below,
    estimated_trace,
    pooled_density,
)
from phasewatch.hessian.lanczos import LanczosRun, lanczos, own_generator, relative_rounding
from phasewatch.hessian.operators import GRAPH_MEMORY, OPERATORS, CurvatureOperator, Patterns, of_parameters
from phasewatch.hessian.precision import in_double_precision
from phasewatch.hessian.zeros import ZeroCount, bracket_zeros, count_zeros
from phasewatch.isolation import isolated
from phasewatch.objective import Objective
from phasewatch.shown import Shown

_ASYMMETRY_TO_ERROR = 10
"""The error of a matrix in single precision is about nine times its asymmetry."""

_ASYMMETRY_TO_NOISE = 10 * _ASYMMETRY_TO_ERROR
"""With a margin of ten, chosen: what is to be told from zero must stand out of it."""


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Shown):
    """Eigenvalues of a curvature matrix, and what follows from them.

    Attributes:
        eigenvalues: Ascending, float64. Dense: all. Lanczos: the leading ones of both ends that have converged.
        residuals: Bound for the error of each eigenvalue.
        converged: Whether all leading eigenvalues asked for were found to the tolerance, copies included.
        largest: Greatest eigenvalue, or the best lower bound for it.
        largest_error: Its own residual, within which there is an eigenvalue.
        smallest: Least eigenvalue, or the best upper bound for it.
        smallest_error: The same of it.
        largest_by_samples: By how much the Rayleigh quotient of its vector differs on half of the samples, about the
            standard error that comes of looking at so few of them; NaN where no half was given.
        smallest_by_samples: The same of the least one.
        allowed_error: The tolerance times the largest magnitude, up to which an eigenvalue counts as found.
        trace: Sum of all eigenvalues.
        trace_standard_error: Standard error of the trace; 0.0 if dense.
        frobenius_norm: Root of the sum of all squared eigenvalues.
        frobenius_norm_standard_error: Its standard error; 0.0 if dense.
        num_negative: Number of eigenvalues below minus the threshold of ``zeros``.
        num_negative_standard_error: Its standard error; 0.0 if dense.
        zeros: How many eigenvalues are zero, with threshold and bracket.
        density: Distribution of all eigenvalues.
        num_parameters: Number of rows of the matrix.
        matrix: Which matrix, ``"hessian"`` or ``"gauss-newton"``.
        method: ``"dense"`` or ``"lanczos"``.
        precision: Floating-point type of the products, ``"float64"`` or the model's own.
        products: Number of matrix-vector products that it took.
    """

    eigenvalues: NDArray[np.float64]
    residuals: NDArray[np.float64]
    converged: bool
    largest: float
    largest_error: float
    smallest: float
    smallest_error: float
    allowed_error: float
    trace: float
    trace_standard_error: float
    frobenius_norm: float
    frobenius_norm_standard_error: float
    num_negative: float
    num_negative_standard_error: float
    zeros: ZeroCount
    density: Density
    num_parameters: int
    matrix: str
    method: str
    precision: str
    products: int
    largest_by_samples: float = math.nan
    smallest_by_samples: float = math.nan

    @property
    def largest_converged(self) -> bool:
        """Whether the greatest eigenvalue is known to the tolerance, whatever the other leading ones are."""
        return self.largest_error <= self.allowed_error

    @property
    def smallest_converged(self) -> bool:
        """Whether the least eigenvalue is known to the tolerance, whatever the other leading ones are."""
        return self.smallest_error <= self.allowed_error

    @property
    def nullity(self) -> int | None:
        """Number of zero eigenvalues; None where only a bracket is known, see ``zeros``."""
        return self.zeros.count

    def __repr__(self) -> str:
        """The headline numbers."""
        error = f" ± {self.trace_standard_error:.2g}" if self.trace_standard_error else ""
        state = "" if self.converged else ", not all leading eigenvalues found"
        smallest = f"{self.smallest:.4g}" + ("" if self.smallest_converged else f" (± {self.smallest_error:.2g})")
        largest = f"{self.largest:.4g}" + ("" if self.largest_converged else f" (± {self.largest_error:.2g})")
        return (
            f"Spectrum({self.matrix}, {self.num_parameters:,} parameters, {self.method}: eigenvalues "
            f"{smallest} to {largest}, trace {self.trace:.4g}{error}, {self.zeros!r}{state})"
        )


def hessian_spectrum(
    objective: Objective,
    matrix: Literal["hessian", "gauss-newton"] = "hessian",
    seed: int = 0,
    *,
    parameters: Patterns | None = None,
    num_eigenvalues: int | None = None,
    dense_below: int = 5000,
    num_steps: int | None = None,
    num_probes: int = 2,
    tolerance: float = 1e-3,
    known_zeros: Tensor | None = None,
    precise: bool = True,
    half: Objective | None = None,
    graph_memory: int = GRAPH_MEMORY,
) -> Spectrum:
    """Leading eigenvalues at both ends, trace, spectral density and the number of zeros.

    Up to ``dense_below`` parameters the matrix is built and diagonalised. Above, one Lanczos run with full
    reorthogonalisation finds the leading eigenpairs; further runs from random starts orthogonal to them show
    whether copies were missed and serve as probes for the trace, the density and the zeros. All is computed in
    float64 where the model's code allows, since the rounding error of single precision hides small eigenvalues.

    Args:
        objective: The loss; the matrix is taken at its parameters, over all of its batches.
        matrix: The Hessian, or the Gauss-Newton matrix, whose zeros do not need a gradient of zero.
        seed: Seeds the start vectors.
        parameters: The block of these parameters only: names of modules or parameters, or globs for them such as
            ``"layers.0.*"``; default all.
        num_eigenvalues: Leading eigenvalues wanted at each end (Lanczos); default 5, or all where there are less.
        dense_below: Greatest number of parameters for which the whole matrix is built.
        num_steps: Products of the first Lanczos run, the others take half of it; default 64, and not less than 8
            for each of ``num_eigenvalues``.
        num_probes: Number of further runs; up to twice as many where copies keep turning up.
        tolerance: Residual at which an eigenpair has converged, relative to the largest magnitude.
        known_zeros: Orthonormal rows, shape ``(k, N)``, that the matrix maps to zero, such as those of
            :meth:`phasewatch.symmetry.ZeroLedger.zero_space`. Lanczos runs stay outside of them, so that the bracket is
            about the other zeros only; all are kept in memory.
        half: The loss on half of the samples, to see how far the ends are those of the samples (Lanczos).
        precise: Whether to compute in float64; in the objective's own precision it takes half the time, and what counts
            as zero reaches farther.
        graph_memory: Bytes of autograd graph that may be kept between products; 0 rebuilds every time.

    Returns:
        The spectrum.

    Raises:
        ValueError: If an argument is out of range, if ``parameters`` match nothing, if products are not finite, if the
            loss jumps or is not the same function each time, if ``known_zeros`` are no zeros of this matrix, or if the
            Gauss-Newton matrix cannot be formed from the loss.
        RuntimeError: If an operation of the model has no second derivative.
    """
    objective = of_parameters(objective, parameters)
    if num_eigenvalues is None:
        num_eigenvalues = min(5, objective.num_parameters)
    if num_steps is None:
        num_steps = max(64, 8 * num_eigenvalues)
    _check_arguments(objective, matrix, num_eigenvalues, num_steps, num_probes, tolerance)
    with isolated():
        computed = in_double_precision(objective) if precise else objective
        operator = OPERATORS[matrix](computed, graph_memory=graph_memory)
        if objective.num_parameters <= dense_below:
            spectrum = _dense_spectrum(operator, matrix, tolerance)
            if known_zeros is None:
                return spectrum
            return replace(spectrum, zeros=spectrum.zeros.certified_by(len(known_zeros)))
        search = _LanczosSearch(operator, own_generator(seed), num_eigenvalues, tolerance)
        if known_zeros is not None:
            search.leave_out(known_zeros)
        search.run(num_steps)
        for number in range(2 * num_probes):
            if number < num_probes or not search.settled:
                search.run((num_steps + 1) // 2)
        spectrum = search.spectrum(matrix)
        if half is None:
            return spectrum
        beside = OPERATORS[matrix](of_parameters(half, parameters), graph_memory=graph_memory)
        top, bottom = (
            abs(float(vector.double() @ (beside @ vector).double()) - value)
            for value, vector in (search.top, search.bottom)
        )
        return replace(spectrum, largest_by_samples=top, smallest_by_samples=bottom)


def _check_arguments(
    objective: Objective, matrix: str, num_eigenvalues: int, num_steps: int, num_probes: int, tolerance: float
) -> None:
    if matrix not in OPERATORS:
        raise ValueError(f"matrix is {matrix!r}; expected one of {', '.join(map(repr, OPERATORS))}")
    if not 1 <= num_eigenvalues <= objective.num_parameters:
        raise ValueError(
            f"num_eigenvalues is {num_eigenvalues}; expected at least 1 and at most the number of parameters, "
            f"{objective.num_parameters}."
        )
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1, and better ten times num_eigenvalues.")
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}; expected at least 1, as copies and the trace need one.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; expected a number between 0 and 1.")


def _dense_spectrum(operator: CurvatureOperator, matrix: str, tolerance: float) -> Spectrum:
    computed = operator.dense().to("cpu", torch.float64)
    size = len(computed)
    eigenvalues = torch.linalg.eigvalsh((computed + computed.T) / 2).numpy()
    norm = float(np.abs(eigenvalues).max())
    rounding = relative_rounding(operator.objective.dtype, size) * norm
    noise = _ASYMMETRY_TO_NOISE * _norm_of_skew((computed - computed.T) / 2)
    zeros = count_zeros(eigenvalues, rounding, noise)
    return Spectrum(
        eigenvalues=eigenvalues,
        residuals=np.full(size, max(rounding, noise)),
        converged=True,
        largest=float(eigenvalues[-1]),
        largest_error=max(rounding, noise),
        smallest=float(eigenvalues[0]),
        smallest_error=max(rounding, noise),
        allowed_error=tolerance * norm,
        trace=float(computed.trace()),
        trace_standard_error=0.0,
        frobenius_norm=float(np.linalg.norm(eigenvalues)),
        frobenius_norm_standard_error=0.0,
        num_negative=float((eigenvalues < -zeros.threshold).sum()),
        num_negative_standard_error=0.0,
        zeros=zeros,
        density=Density(eigenvalues, np.full(size, 1 / size)),
        num_parameters=size,
        matrix=matrix,
        method="dense",
        precision=_name(operator.objective.dtype),
        products=operator.products,
    )


def _norm_of_skew(skew: Tensor, steps: int = 10) -> float:
    """Spectral norm of a skew-symmetric matrix by power steps, from its longest row; right to a few per cent."""
    rows = skew.norm(dim=1)
    norm = float(rows.max())
    vector = skew[rows.argmax()]
    for _ in range(steps):
        if vector.norm() == 0.0:
            break
        vector = skew @ (vector / vector.norm())
        norm = max(norm, float(vector.norm()))
    return norm


class _LanczosSearch:
    """Lanczos runs one after another, each outside of the eigenvectors that those before it have found."""

    def __init__(self, operator: CurvatureOperator, generator: torch.Generator, wanted: int, tolerance: float) -> None:
        self.operator = operator
        self.generator = generator
        self.wanted = wanted
        self.tolerance = tolerance
        self.size = operator.shape[0]
        self.vectors = operator.objective.parameters.new_zeros(0, self.size)
        self.values = np.zeros(0)
        self.residuals = np.zeros(0)
        self.copies = np.zeros((2, 0))
        self.probes: list[Probe] = []
        self.norm = 0.0
        self.tops: list[tuple[float, float]] = []
        self.bottoms: list[tuple[float, float]] = []
        self.top: tuple[float, Tensor] = -np.inf, self.vectors
        self.bottom: tuple[float, Tensor] = np.inf, self.vectors
        self.beyond = (-np.inf, np.inf)
        self.settled = False
        self.certified: int | None = None

    def leave_out(self, zeros: Tensor) -> None:
        """Stay outside of a space of zeros, after one product has shown that it is one."""
        if zeros.dim() != 2 or zeros.shape[1] != self.size or len(zeros) > self.size:
            raise ValueError(
                f"known_zeros has shape {tuple(zeros.shape)}; expected orthonormal rows, shape (k, {self.size})."
            )
        zeros = zeros.to(self.vectors)
        draw = torch.randn(self.size, generator=self.generator, dtype=torch.float64).to(self.vectors)
        inside = zeros.T @ (zeros @ draw)
        if not len(zeros) or not inside.norm():
            return
        twice = zeros.T @ (zeros @ inside)
        outside = draw - inside
        largest = (self.operator @ outside).norm() / outside.norm().clamp_min(1e-300) * self.size**0.5
        found = (self.operator @ inside).norm() / inside.norm()
        if (twice - inside).norm() > 1e-6 * inside.norm():
            raise ValueError("known_zeros are not orthonormal rows; take those of ZeroLedger.zero_space().")
        if found > 1e-8 * largest:
            raise ValueError(
                f"known_zeros are no zeros of this matrix: a product with them has a length of {float(found):.2g}. "
                "Symmetries are zeros of the Gauss-Newton matrix, and of the Hessian only where the gradient is zero."
            )
        self.vectors = zeros
        self._keep(np.zeros(len(zeros)), np.zeros(len(zeros)))
        self.certified = len(zeros)
        self.tops.append((0.0, 0.0))
        self.bottoms.append((0.0, 0.0))

    def run(self, num_steps: int) -> None:
        """One Lanczos run; its leading pairs are kept, and its quadrature as a probe."""
        rest = self.size - len(self.values)
        if rest == 0:
            return
        draw = torch.randn(self.size, generator=self.generator, dtype=torch.float64).to(self.vectors)
        start = draw - self.vectors.T @ (self.vectors @ draw)
        negligible = relative_rounding(self.vectors.dtype, self.size) * self.norm
        run = lanczos(self.operator, start, min(num_steps, rest), deflated=self.vectors, negligible=negligible)
        self.norm = max(self.norm, float(np.abs(run.ritz_values).max()))
        self.probes.append(Probe.of(run, float(start.square().sum()), self.values, self.residuals))
        self.tops.append((float(run.ritz_values[-1]), float(run.residuals[-1])))
        self.bottoms.append((float(run.ritz_values[0]), float(run.residuals[0])))
        if run.ritz_values[-1] > self.top[0]:
            self.top = float(run.ritz_values[-1]), run.ritz_vectors(np.array([run.dimension - 1]))[0]
        if run.ritz_values[0] < self.bottom[0]:
            self.bottom = float(run.ritz_values[0]), run.ritz_vectors(np.array([0]))[0]
        if run.invariant and run.dimension in (1, rest):
            # If one random vector is an eigenvector, then all of the space it was drawn from is one eigenspace.
            self._keep(np.resize(run.ritz_values, rest), np.full(rest, self.rounding))
            self.beyond = (-np.inf, np.inf)
            self.settled = True
            return
        self._infer_copies(run, rest)
        high, low = self._thresholds()
        chosen = self._leading(run, high, low)
        others = np.delete(run.ritz_values, chosen)
        self.settled = bool(run.ritz_values[-1] <= high and run.ritz_values[0] >= low)
        self.beyond = (others[-1], others[0]) if len(others) else (-np.inf, np.inf)
        self.vectors = torch.cat([self.vectors, run.ritz_vectors(chosen)])
        self._keep(run.ritz_values[chosen], np.maximum(run.residuals[chosen], self.rounding))

    def spectrum(self, matrix: str) -> Spectrum:
        """All that was found."""
        complete = len(self.values) == self.size
        known = np.stack([self.values, self.residuals])
        values, residuals = known if complete else np.hstack([known, self.copies])
        order = np.argsort(values, kind="stable")
        values, residuals = values[order], residuals[order]
        slack = self.tolerance * self.norm
        at_top = np.flatnonzero(values >= self.beyond[0] - slack)[-self.wanted :]
        at_bottom = np.flatnonzero(values <= self.beyond[1] + slack)[: self.wanted]
        leading = np.union1d(at_top, at_bottom)
        # Each run stays outside of what those before it have found, so that the extremes are among their ends.
        (largest, largest_error), (smallest, smallest_error) = max(self.tops), min(self.bottoms)
        # The first run is the one whose directions were not deflated: its trace is by far the noisiest.
        probes = self.probes[1:] or self.probes
        if complete:
            zeros = count_zeros(values, self.rounding, 0.0)
            trace, norm = (float(values.sum()), 0.0), (float(np.linalg.norm(values)), 0.0)
            negative = float((values < -zeros.threshold).sum()), 0.0
        else:
            zeros = bracket_zeros(self.probes, self.rounding)
            trace, norm = estimated_trace(probes), estimated_frobenius_norm(probes)
            negative = estimated_number_below(probes, -zeros.threshold)
        if self.certified is not None:
            zeros = zeros.certified_by(self.certified)
        return Spectrum(
            eigenvalues=values[leading],
            residuals=residuals[leading],
            converged=(self.settled or complete) and len(at_top) == len(at_bottom) == self.wanted,
            largest=largest,
            largest_error=max(largest_error, self._error_of_products(_ASYMMETRY_TO_ERROR)),
            smallest=smallest,
            smallest_error=max(smallest_error, self._error_of_products(_ASYMMETRY_TO_ERROR)),
            allowed_error=self.tolerance * self.norm,
            trace=trace[0],
            trace_standard_error=trace[1],
            frobenius_norm=norm[0],
            frobenius_norm_standard_error=norm[1],
            num_negative=negative[0],
            num_negative_standard_error=negative[1],
            zeros=zeros,
            density=Density(values, np.full(self.size, 1 / self.size)) if complete else pooled_density(self.probes),
            num_parameters=self.size,
            matrix=matrix,
            method="lanczos",
            precision=_name(self.operator.objective.dtype),
            products=self.operator.products,
        )

    @property
    def rounding(self) -> float:
        """Error of the products, with a margin where it is seen in the lack of symmetry."""
        return self._error_of_products(_ASYMMETRY_TO_NOISE)

    def _error_of_products(self, by_asymmetry: float) -> float:
        """Error of rounding in general, or as the lack of symmetry shows it, if that is more."""
        general = relative_rounding(self.operator.objective.dtype, self.size) * self.norm
        asymmetry = max((probe.asymmetry for probe in self.probes), default=0.0)
        return float(max(general, by_asymmetry * self.size**0.5 * asymmetry))

    def _infer_copies(self, run: LanczosRun, rest: int) -> None:
        """Eigenvalues that must have many copies, zero above all: a run sees one, but it sees how heavy it is.

        The weight of an eigenvalue with ``k`` copies is distributed as ``chi^2_k / rest``; one too heavy for less
        copies than are wanted, at a level of 1e-8, has at least as many. The copies have no vectors.
        """
        heavy = rest * run.weights > chdtri(self.wanted, 1e-8)
        found = np.flatnonzero(heavy & (run.residuals <= self.tolerance * self.norm))
        pairs = np.stack([run.ritz_values[found], np.maximum(run.residuals[found], self.rounding)])
        self.copies = np.hstack([self.copies, np.repeat(pairs, self.wanted, axis=1)])

    def _thresholds(self) -> tuple[float, float]:
        """What a new eigenvalue must exceed, or fall below, to be among the leading ones."""
        values = np.sort(np.concatenate([self.values, self.copies[0]]))
        slack = self.tolerance * self.norm
        if len(values) < 2 * self.wanted:
            return -np.inf, np.inf
        return values[-self.wanted] + slack, values[self.wanted - 1] - slack

    def _leading(self, run: LanczosRun, high: float, low: float) -> NDArray[np.intp]:
        """Ritz pairs to keep: all where they are exact, else the converged ones that are among the leading."""
        if run.invariant:
            return np.arange(run.dimension)
        converged = run.residuals <= self.tolerance * self.norm
        from_top = np.cumprod(converged[::-1] & (run.ritz_values[::-1] > high))[::-1]
        from_bottom = np.cumprod(converged & (run.ritz_values < low))
        top, bottom = np.flatnonzero(from_top), np.flatnonzero(from_bottom)
        return np.union1d(top[-self.wanted :], bottom[: self.wanted])

    def _keep(self, values: NDArray[np.float64], residuals: NDArray[np.float64]) -> None:
        self.values = np.concatenate([self.values, values])
        self.residuals = np.concatenate([self.residuals, residuals])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
