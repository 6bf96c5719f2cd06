"""The quadratic part of a learning coefficient, and what the choice of the samples of the probe alone takes off it.

At a perfect minimum of the loss of all n samples the loss of a probe of m has a slope: its samples' gradients, which
vanish in the mean over n, do not over m. So it falls, on its way to a minimum of its own, by about nbeta / m times the
learning coefficient where the model realizes the data with noise, by nothing where it fits them. A draw of that slope
is the mean of the gradients of the probe's samples with random signs.

Both are integrals over the spectrum of the Gauss-Newton matrix, as random vectors and such draws see it: Lanczos runs
enclose them by two rules of quadrature (Golub & Meurant 2010, "Matrices, Moments and Quadrature", section 6.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from phasewatch.hessian.lanczos import SymmetricOperator, orthogonalized, relative_rounding
from phasewatch.hessian.operators import CurvatureOperator, GaussNewtonOperator, HessianOperator
from phasewatch.hessian.quadrature import gauss, radau
from phasewatch.isolation import isolated
from phasewatch.llc.diagnostics import FloatArray
from phasewatch.objective import NoOutputsError, Objective, split_off_misfit

CLOSE = 0.2
"""Relative width of bounds that are close enough. Chosen: what is measured is held against a tenth of the quadratic
part, and nbeta is free to be anything near what the probe bears."""
SETTLED = 0.1
"""Products of a run are enough, too, where the last few have changed less. Chosen: bounds are far apart for long where
the middle has settled, as both are off by the same factor."""
MOST_PRODUCTS = 32
"""Products of a run at most. Chosen: 8 to 16 do at the nbeta that probes of 512 samples bear."""
STEPS = 4
"""Products between two looks at the bounds. Chosen."""
CLEAR = 30.0
"""A random vector says a quadratic part of Q to .8 / root Q of it: vectors are enough where their Qs add up to this,
an error of 15 %. Chosen."""
MOST_DRAWS, DRAWS_TIMES_PARAMETERS = 4, 64
"""Random vectors at most, or more where there are so few parameters that a vector says little. Chosen."""
FEW, MORE = 1, 4
"""Batches from which a longer probe is judged. Chosen: what they say differs by up to a factor of 1.8, and that of the
whole from the second by another 1.4, which the first tells."""
KEPT = 2**26
"""Bytes of autograd graph kept between products. Chosen: four batches of a small network; a transformer's are built
anew, which takes a tenth longer and a quarter of the memory less."""
ALL_KEPT = 2**25
"""Bytes that the bases of runs may take; above, the last two vectors of each are kept. Chosen: what a convnet of 130
thousand parameters takes. On one of 106 thousand and transformers of 636 thousand that changes what is bearable, and
the quadratic part there, by .1 to 5 %."""
GRADIENTS_PER_PRODUCT = 2
"""1.7 to 2.3 measured on a convnet and a transformer."""

Integrand = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, eq=False)
class SpectralMeasure:
    """The spectrum as one vector sees it.

    Attributes:
        squared_length: Of the vector.
        diagonal: Of the tridiagonal matrix of its Lanczos run, shape ``(m,)``.
        couplings: The off-diagonal, shape ``(m,)``; the last leads out of the run, and is 0 where that has seen all.
    """

    squared_length: float
    diagonal: FloatArray
    couplings: FloatArray

    @cached_property
    def _rules(self) -> tuple[tuple[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]:
        found = gauss(self.diagonal, self.couplings[:-1])
        return found, radau(self.diagonal, self.couplings[:-1]) if self.couplings[-1] else found

    def integrals(self, integrand: Integrand) -> FloatArray:
        """By the rules of Gauss and of Gauss-Radau; the integrand's derivatives alternate in sign between the two."""
        return np.array([self.squared_length * float(w @ integrand(np.maximum(h, 0.0))) for h, w in self._rules])


@dataclass(frozen=True, eq=False)
class PartNoise:
    """What some batches say of the Gauss-Newton matrix at w*, and of the slope that the choice of the probe makes.

    Attributes:
        curvature: The spectrum as random vectors see it whose squared length is the number of parameters.
        slope: As draws of that slope see it; none where the probe is the whole data set.
        localization: Precision gamma of the Gaussian around w*.
        rounding: Of curvatures, in units of the largest.
    """

    curvature: tuple[SpectralMeasure, ...]
    slope: tuple[SpectralMeasure, ...]
    localization: float
    rounding: float

    def quadratic(self, nbeta: float) -> float:
        """See :class:`ProbeNoise`."""
        return _middle(*self.bounds_of_quadratic(nbeta))

    def fall(self, nbeta: float) -> float:
        """Likewise."""
        return _middle(*self.bounds_of_fall(nbeta))

    def bounds_of_quadratic(self, nbeta: float) -> tuple[float, float]:
        """As far as products tell; that there are few vectors is an error beside it."""

        def share(curvature: FloatArray) -> FloatArray:
            return np.asarray(curvature * nbeta / self._held(curvature, nbeta) / 2)

        above, below = np.mean([measure.integrals(share) for measure in self.curvature], axis=0).tolist()
        return below, above

    def bounds_of_fall(self, nbeta: float) -> tuple[float, float]:
        """Likewise."""
        if not self.slope:
            return 0.0, 0.0

        def gain(curvature: FloatArray) -> FloatArray:
            held = self._held(curvature, nbeta)
            return np.asarray((1 / held - curvature * nbeta / (2 * held**2)) * nbeta**2)

        below, above = np.mean([measure.integrals(gain) for measure in self.slope], axis=0).tolist()
        return below, above

    def _held(self, curvature: FloatArray, nbeta: float) -> FloatArray:
        """Of the potential; infinite where nothing holds, as nothing is known of how far that goes."""
        if self.localization:
            return np.asarray(curvature * nbeta + self.localization)
        return np.where(curvature > self.rounding * curvature.max(), curvature * nbeta, np.inf)

    def bearable(self, nbeta: float, share: float) -> float:
        """See :class:`ProbeNoise`."""
        return _root(lambda b: self.fall(b) - share * self.quadratic(b), nbeta)

    def is_known(self, nbeta: float, share: float) -> bool:
        """Whether no number of products more could change much at what is bearable."""
        lowest = _root(lambda b: self.bounds_of_fall(b)[1] - share * self.bounds_of_quadratic(b)[0], nbeta)
        highest = _root(lambda b: self.bounds_of_fall(b)[0] - share * self.bounds_of_quadratic(b)[1], nbeta)
        least, most = self.bounds_of_quadratic(lowest)
        falls_least, falls_most = self.bounds_of_fall(lowest)
        return (
            highest - lowest <= CLOSE * highest
            and most - least <= CLOSE * most
            and falls_most - falls_least <= CLOSE * max(falls_most, CLOSE * least)
        )

    def has_settled(self, before: PartNoise, nbeta: float, share: float) -> bool:
        """Whether the last products have changed little of what is bearable, and of both there."""
        here, there = self.bearable(nbeta, share), before.bearable(nbeta, share)
        now, then = self.quadratic(here), before.quadratic(there)
        falls, fell = self.fall(here), before.fall(there)
        return (
            abs(here - there) <= SETTLED * max(here, there)
            and abs(now - then) <= SETTLED * max(now, then)
            and abs(falls - fell) <= SETTLED * max(falls, fell, CLOSE * now)
        )


@dataclass(frozen=True, eq=False)
class ProbeNoise:
    """The same of the whole probe.

    Both a quadratic part and a fall grow with the number of batches towards what endless data would give, and lack of
    it what goes as one over that number.

    Attributes:
        found: On as many batches as were looked at.
        on_few: On fewer of them; None where those are all.
        beyond: What is missing, in units of what the more have beyond the few.
        matrix: The matrix, on as many batches as were looked at.
        gradients: Minibatch gradients spent.
    """

    found: PartNoise
    on_few: PartNoise | None
    beyond: float
    matrix: CurvatureOperator
    gradients: int

    def quadratic(self, nbeta: float) -> float:
        """The learning coefficient of a quadratic loss with this curvature (:func:`phasewatch.quadratic_llc`)."""
        return self._extrapolated(lambda part: part.quadratic(nbeta))

    def fall(self, nbeta: float) -> float:
        """By how much nbeta L falls from w* to the held minimum of that loss with the slope, on average."""
        return self._extrapolated(lambda part: part.fall(nbeta))

    def bearable(self, nbeta: float, share: float) -> float:
        """The largest inverse temperature up to ``nbeta`` at which the fall is at most ``share`` of the quadratic."""
        return _root(lambda b: self.fall(b) - share * self.quadratic(b), nbeta)

    def _extrapolated(self, value: Callable[[PartNoise], float]) -> float:
        found = value(self.found)
        return found if self.on_few is None else found + self.beyond * max(found - value(self.on_few), 0.0)


def probe_noise(
    objective: Objective, n: int, localization: float, nbeta: float, *, share: float = math.inf, seed: int = 0
) -> ProbeNoise:
    """By some dozens of products with the Gauss-Newton matrix at w*, on one batch and on four where there are more.

    Args:
        objective: The loss, on the probe.
        n: Size of the data set that the probe stands for; the noise is none where the probe is all of it.
        localization: Precision gamma of the Gaussian around w*.
        nbeta: Where all is to be known, or, with a share,
        share: at the largest nbeta up to that which is bearable (:meth:`ProbeNoise.bearable`).
        seed: Seeds the random vectors.

    Raises:
        NoOutputsError: If the outputs cannot be seen, see :func:`phasewatch.objective.split_off_misfit`.
        NoSecondDerivativeError: If an operation of the model has none.
        NoCurvatureError: If the loss jumps, changes from call to call, or has derivatives that are not finite.
    """
    missing = max(0.0, 1 - objective.num_samples / n)
    count = objective.num_batches
    counts = [FEW, MORE] if count > MORE else [count]
    parts: list[PartNoise] = []
    spent = 0
    for some in counts:
        on = objective.first_batches(some) if some < count else objective
        matrix = _curvature(on)
        of_slope = missing * on.num_samples / objective.num_samples
        with isolated():
            parts.append(_on(on, matrix, localization, of_slope, nbeta, share, np.random.default_rng(seed)))
        spent += some * (GRADIENTS_PER_PRODUCT * matrix.products + len(parts[-1].slope))
    beyond = (1 / MORE - 1 / count) / (1 / FEW - 1 / MORE)
    return ProbeNoise(parts[-1], parts[0] if len(parts) > 1 else None, beyond, matrix, spent)


def _on(
    objective: Objective,
    matrix: CurvatureOperator,
    localization: float,
    of_slope: float,
    nbeta: float,
    share: float,
    random: np.random.Generator,
) -> PartNoise:
    """Random vectors, and with each a draw of the slope, until they are enough."""
    size = matrix.shape[0]
    found: PartNoise | None = None
    most = max(MOST_DRAWS, -(-DRAWS_TIMES_PARAMETERS // size))
    while True:
        starts = [torch.from_numpy(random.choice([-1.0, 1.0], size)).to(objective.parameters)]
        if of_slope:
            starts.append(_slope_by_chance(objective, random) * math.sqrt(of_slope))
        more = _by_runs(matrix, starts, localization, nbeta, share)
        if found is not None:
            more = replace(more, curvature=found.curvature + more.curvature, slope=found.slope + more.slope)
        found = more
        draws = len(found.curvature)
        if draws == most:
            return found
        if draws * size >= DRAWS_TIMES_PARAMETERS and draws * found.quadratic(found.bearable(nbeta, share)) >= CLEAR:
            return found


def _by_runs(
    matrix: CurvatureOperator, starts: list[Tensor], localization: float, nbeta: float, share: float
) -> PartNoise:
    """Of a random vector and a draw of the slope, until more products would change little or lately have."""
    bases = MOST_PRODUCTS * sum(start.nbytes for start in starts)
    runs = [_Run(matrix, start, keeps_all=bases <= ALL_KEPT) for start in starts]
    before: PartNoise | None = None
    rounding = relative_rounding(starts[0].dtype, starts[0].numel())
    for _ in range(MOST_PRODUCTS // STEPS):
        for run in runs:
            run.go_on()
        first, *others = (run.measure() for run in runs)
        found = PartNoise((first,), tuple(others), localization, rounding)
        settled = before is not None and found.has_settled(before, nbeta, share)
        if settled or all(run.ended for run in runs) or found.is_known(nbeta, share):
            break
        before = found
    return found


def _curvature(objective: Objective) -> CurvatureOperator:
    """The Gauss-Newton matrix, and what the loss sees of the parameters past the outputs."""
    try:
        objective.split_loss(objective.parameters.detach().clone().requires_grad_(), 0)
    except NoOutputsError:
        return HessianOperator(split_off_misfit(objective)[0], graph_memory=KEPT)
    return GaussNewtonOperator(objective, graph_memory=KEPT)


def _slope_by_chance(objective: Objective, random: np.random.Generator) -> Tensor:
    """The mean over samples of their gradients with random signs, shape ``(num_parameters,)``."""
    signed = []
    for batch, size in enumerate(objective.batch_sizes):
        found = objective.outputs_and_slopes(batch)
        signs = torch.from_numpy(random.choice([-1.0, 1.0], size))
        own = []
        for slope in found.slopes:
            axis = slope.shape.index(size) if size in slope.shape else 0
            shape = [1] * slope.dim()
            shape[axis] = slope.shape[axis]
            # Outputs of which each sample has several are flattened sample by sample.
            one_each = signs.repeat_interleave(-(-slope.shape[axis] // size))[: slope.shape[axis]]
            own.append(slope * one_each.to(slope).view(shape))
        signed.append(own)
    reading = objective.read_from_outputs(_pairing, signed, again=lambda other: other)
    return reading.gradient()


def _pairing(outputs: list[Tensor], _loss: Tensor, slopes: list[Tensor]) -> Tensor:
    return torch.stack([(slope * output).sum() for output, slope in zip(outputs, slopes, strict=True)]).sum()


class _Run:
    """A Lanczos run that can be gone on with.

    It is orthogonalised against all of its own basis or, where that would take much memory, against the last two
    vectors. Then eigenvalues that it has found come again, as copies that share their weight: the rules of quadrature
    are nearly those of the same matrix all the same (Greenbaum 1989).

    Attributes:
        ended: Whether it has seen all that its start sees.
    """

    def __init__(self, operator: SymmetricOperator, start: Tensor, keeps_all: bool) -> None:
        self._operator = operator
        length = _length(start)
        self._squared_length = length**2
        self._vector = start / (length or 1.0)
        self._keeps_all = keeps_all
        self._blocks: list[Tensor] = []  # of the basis, so that none of it is copied
        self._diagonal: list[float] = []
        self._couplings: list[float] = []
        self.ended = False

    def go_on(self) -> None:
        """``STEPS`` products, or as many as there are."""
        block = self._vector.new_empty(STEPS if self._keeps_all else 0, len(self._vector))
        for row in range(STEPS):
            if self.ended:
                return
            if self._keeps_all:
                block[row] = self._vector
                basis = [*self._blocks, block[: row + 1]]
            else:
                basis = self._blocks = [*self._blocks[-1:], self._vector[None]]
            image = self._operator @ self._vector
            vector, _ = orthogonalized(image, *basis)
            self._diagonal.append(float(self._vector @ image))
            norm = _length(vector)
            scale = max(map(abs, [*self._diagonal, *self._couplings]))
            negligible = relative_rounding(vector.dtype, len(vector)) * scale
            self.ended = len(self._diagonal) == len(vector) or norm <= negligible
            self._couplings.append(0.0 if self.ended else norm)
            self._vector = vector / (norm or 1.0)
        if self._keeps_all:
            self._blocks.append(block)

    def measure(self) -> SpectralMeasure:
        """What it has seen so far."""
        return SpectralMeasure(self._squared_length, np.array(self._diagonal), np.array(self._couplings))


def _length(vector: Tensor) -> float:
    """In double precision: the squares of a confident network's slopes are below the least single number."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _middle(low: float, high: float) -> float:
    """Of bounds that are far apart the geometric mean: short runs miss both by about the same factor."""
    return math.sqrt(low * high) if high > 2 * low > 0 else (low + high) / 2


def _root(excess: Callable[[float], float], most: float) -> float:
    """Where a function that grows through zero does so, or ``most`` if it has not by then."""
    if not excess(most) > 0:
        return most
    least = most
    while excess(least) > 0:
        if least < most * 1e-12:
            return least
        least /= 10
    return math.exp(brentq(lambda x: excess(math.exp(x)), math.log(least), math.log(least * 10), xtol=1e-6))
