r"""The effective rank of the Gauss-Newton matrix: how many directions the function tells apart at a resolution.

At the density :math:`\exp(-b D(w))` times a Gaussian prior of standard deviations ``spread`` around w*, an eigenvector
of curvature h (of the matrix :math:`A = S G S`, S the diagonal matrix of ``spread``) keeps the share 1 / (1 + b h)
of its variance. What the function takes away adds up to :math:`\operatorname{tr} A (A + 1/b)^{-1}` directions (MacKay
1992, "Bayesian interpolation": well-determined parameters). Half of it is the learning coefficient of a divergence that
is quadratic, and b times what that divergence is on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigvalsh
from scipy.optimize import brentq
from scipy.special import gammainc
from torch import Tensor

from phasewatch.hessian.by_sample import gauss_newton_by_sample
from phasewatch.hessian.lanczos import LanczosRun, lanczos, own_generator
from phasewatch.hessian.operators import GRAPH_MEMORY, GaussNewtonOperator
from phasewatch.hessian.quadrature import diagonal_of_radau, eigensystem
from phasewatch.isolation import isolated
from phasewatch.objective import Objective
from phasewatch.objective.memory import give_back

LIMITED = 0.1
"""Share by which the rank may differ on half of the probe's samples before the probe is what limits it. Chosen."""

RELIABLE = 0.15
"""Share of the rank within which it must be known, by two standard errors and the quadrature error together. Chosen."""

BASIS_MEMORY = 2**30
"""Bytes that vectors may take: up to the 64 of 64 products below four million parameters. Chosen."""

_FOUND = 0.05
"""Residual of an eigenvector taken out, relative to h + 1/b. Chosen: its term is right to the square of that, a
400th."""

_ROUNDING = 2.0
"""Units of the last place of the largest eigenvalue below which a Ritz value may be rounding alone: products in single
precision add one or less in each direction (.02 to .2 on a convnet), which is seen once runs are long."""

_LEAST_PRODUCTS = 4
"""Products that a rank may be given at least. Chosen: a run is asked to stop after every fourth step."""

_LOOSER = 3.0
"""Tolerance on half of the samples, in units of that on all. Chosen: it is a check, to be a small part of the cost."""

_LEAST_TO_COMPARE = 16
"""Steps of a run that has not converged from which on half of the samples are looked at: shorter ones say the same of
all and of half of them. Chosen."""

_STEPS_OF_A_DIRECTION = 8
"""Products that a random direction takes once the leading eigenvectors are out; also how often it is asked to stop.
Chosen: it tells what a direction more would cost, and nothing is wrong where it is a few off."""

_ALL = ""
"""Stands for all parameters together where the layers are not told apart."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerRank:
    """The part of the effective rank that lies in the parameters of one module.

    Attributes:
        value: The trace of this block; those of all layers add up to the effective rank.
        standard_error: Its Monte-Carlo error, not less than it is (by up to the root of two); 0.0 where exact.
    """

    value: float
    standard_error: float


@dataclass(frozen=True)
class EffectiveRank:
    r"""The effective rank :math:`\sum h / (h + 1/b)` at one resolution.

    Attributes:
        value: The estimate.
        standard_error: Its Monte-Carlo error; 0.0 where it is exact.
        quadrature_error: By how much the value may be off, either way, for too few products or for rounding: at a given
            b a sure bound, at a given resolution one to first order.
        by_layer: Module name (for a parameter of the outermost module its own) to the part in its parameters.
        nbeta: The inverse temperature b.
        amplification: How many times what they are at a given b the errors are: 1 but at a given resolution.
        converged: Whether it is known to ``RELIABLE`` (15 %): two standard errors and the quadrature error together.
        limited_by_probe: Whether half of the samples give a rank that differs by more than ``LIMITED`` (10 %); None
            where that was not asked for, where the samples cannot be told apart, or where it may be chance.
        on_half: The rank on half of the samples; NaN where it was not asked for or the samples cannot be told apart.
        reasons: What is wrong with it, in words.
        products: Matrix-vector products spent on the whole probe.
        spectrum: What was computed, from which the rank follows at every resolution.
        half: The same on half of the samples.
    """

    value: float
    standard_error: float
    quadrature_error: float
    by_layer: Mapping[str, LayerRank]
    nbeta: float
    amplification: float
    converged: bool
    limited_by_probe: bool | None
    on_half: float
    reasons: tuple[str, ...]
    products: int
    spectrum: WhitenedSpectrum = field(repr=False)
    half: WhitenedSpectrum | None = field(default=None, repr=False)

    def at(self, nbeta: float) -> EffectiveRank:
        """The rank at another b, from the same products; its errors say how far these carry.

        Args:
            nbeta: Not negative; at 0 the rank is 0.

        Raises:
            ValueError: If it is negative or not finite.
        """
        rank = replace(self.spectrum.at(nbeta), products=self.products)
        return rank if self.half is None else _beside_half(rank, self.half)

    def at_resolution(self, epsilon: float) -> EffectiveRank:
        r"""The rank at the b where the divergence, were it quadratic, is ``epsilon`` on average.

        That is :math:`\tfrac12 \sum h / (h + 1/b) / b`, which falls with b from half the trace. Where the prior alone
        moves the function by less, b and the rank are 0. As b is known no better than the rank, errors are those at a
        given b times :math:`\operatorname{tr} f / \operatorname{tr} f^2`, f = h / (h + 1/b): once where every direction
        is fixed or free, twice where the rank grows with the root of b.

        Args:
            epsilon: The mean divergence, in nats or units of half a squared error.

        Raises:
            ValueError: If it is not positive.
        """
        rank = replace(self.spectrum.at_resolution(epsilon), products=self.products)
        return rank if self.half is None else _beside_half(rank, self.half)


def effective_rank(
    objective: Objective,
    spread: Tensor,
    nbeta: float | None = None,
    *,
    resolution: float | Sequence[float] | None = None,
    seed: int = 0,
    tolerance: float = 0.03,
    max_products: int = 64,
    dense_below: int = 1000,
    check_probe: bool = True,
    by_layer: bool = True,
    graph_memory: int = GRAPH_MEMORY,
) -> EffectiveRank:
    r"""The effective rank of the Gauss-Newton matrix under a Gaussian prior, in all and layer by layer.

    Up to ``dense_below`` parameters from all eigenvalues. Above, by stochastic Lanczos quadrature (Lin, Saad & Yang
    2016): a first run is kept up as long as that pays, its leading eigenvectors are taken out and counted one by one,
    and the trace of the rest is estimated from random directions outside of them (Meyer et al. 2021, "Hutch++"). As
    :math:`h / (h + 1/b)` has derivatives of alternating sign, the rules of Gauss and of Gauss-Radau with a node at zero
    enclose each term (Golub & Meurant 2010, section 6.2), and no direction sees more than all outputs can tell apart.
    The value is their geometric mean while runs are short, as both are off by about the same factor then. With a
    direction z and its Krylov basis, :math:`z_l^\top (f(A) z)_l` estimates the trace of the block of layer l from the
    same products.

    Half of the samples are looked at from the same first direction, to three times the tolerance: it is a check.
    Where the runs are so short that they would say the same of any number of samples, they are not.

    Args:
        objective: The loss on the probe; the matrix is taken at its parameters.
        spread: Standard deviation of the prior in each parameter, shape ``(num_parameters,)``.
        nbeta: The inverse temperature b, from which the resolution follows.
        resolution: In the place of ``nbeta``: the mean divergence, see :meth:`EffectiveRank.at_resolution`. Of several
            the rank is that at the first, and it is estimated until it is known at each.
        seed: Seeds the random directions.
        tolerance: Monte-Carlo error wanted, relative to the rank.
        max_products: Products of the whole matrix after which it stops.
        dense_below: Greatest number of parameters for which the whole matrix is built.
        check_probe: Whether to look at half of the samples too.
        by_layer: Whether to tell the layers apart; without, eigenvectors of a whole matrix are not needed.
        graph_memory: Bytes of autograd graph that may be kept between products; 0 rebuilds every time.

    Returns:
        The rank with its errors, its layers, and the spectrum from which it follows at other resolutions.

    Raises:
        ValueError: If an argument is out of range, if products are not finite, or if the Gauss-Newton matrix cannot be
            formed from the loss.
        RuntimeError: If an operation of the model has no second derivative.

    Example:
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> def loss_fn(module, batch):
        ...     return 0.5 * module(batch).square().mean()
        >>> objective = Objective(module, [torch.tensor([[2.0, 0.0], [0.0, 0.0]])], loss_fn=loss_fn)
        >>> round(effective_rank(objective, torch.ones(2), 0.5).value, 6)  # the eigenvalues are 2 and 0
        0.5
    """
    size = objective.num_parameters
    if spread.shape != (size,) or not bool((spread.isfinite() & (spread >= 0)).all()):
        raise ValueError(
            f"spread has shape {tuple(spread.shape)}, from {float(spread.min()):.3g} to {float(spread.max()):.3g}; "
            f"expected shape ({size},), a standard deviation for each parameter."
        )
    if (nbeta is None) == (resolution is None):
        raise ValueError(f"nbeta is {nbeta} and resolution is {resolution}; expected one of the two.")
    if nbeta is not None and not 0 < nbeta < math.inf:
        raise ValueError(f"nbeta is {nbeta}; expected a positive number.")
    resolutions = [] if resolution is None else np.atleast_1d(resolution).tolist()
    if not (nbeta or resolutions) or not all(0 < one < math.inf for one in resolutions):
        raise ValueError(f"resolution is {resolution}; expected a positive number, the mean divergence, or several.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; expected a number between 0 and 1.")
    if max_products < _LEAST_PRODUCTS:
        raise ValueError(f"max_products is {max_products}; expected at least {_LEAST_PRODUCTS}.")

    def asked(spectrum: WhitenedSpectrum) -> list[EffectiveRank]:
        return [spectrum.at_resolution(one) for one in resolutions] if nbeta is None else [spectrum.at(nbeta)]

    def on(data: Objective, error: float) -> tuple[WhitenedSpectrum, int]:
        give_back()  # before there is a basis
        operator = _Whitened(GaussNewtonOperator(data, graph_memory=graph_memory), spread, by_layer)
        if size <= dense_below:
            return _dense(operator), operator.matrix.products
        found = _by_directions(operator, asked, own_generator(seed), error, max_products)
        return found, operator.matrix.products

    with isolated():
        spectrum, products = on(objective, tolerance)
        rank = replace(asked(spectrum)[0], products=products)
        told = rank.converged or max(len(s.diagonal) for s in spectrum.directions) >= _LEAST_TO_COMPARE
        half = objective.on_half() if check_probe and told else None
        return rank if half is None else _beside_half(rank, on(half, min(_LOOSER * tolerance, 0.5))[0])


def _beside_half(rank: EffectiveRank, half: WhitenedSpectrum) -> EffectiveRank:
    """The same with what half of the samples say of it."""
    on_half = half.at(rank.nbeta)
    change = abs(on_half.value - rank.value)  # at a b that is given to both
    error = rank.standard_error / rank.amplification
    limited: bool | None = change > LIMITED * max(rank.value, on_half.value)
    if limited and change < 2 * math.hypot(error, on_half.standard_error):
        limited = None
    reasons = rank.reasons
    if limited:
        values = f"{on_half.value:.4g} on half of its samples, {rank.value:.4g} on all"
        reasons += (f"limited by the probe: {values}",)
    return replace(rank, limited_by_probe=limited, on_half=on_half.value, reasons=reasons, half=half)


@dataclass(frozen=True, eq=False)
class _Eigensystem:
    """Of a tridiagonal matrix."""

    values: Array
    vectors: Array

    def image(self, nbeta: float, rounding: float = 0.0) -> Array:
        """``f(T) e_1``, eigenvalues up to ``rounding`` taken for none."""
        values = np.where(self.values > rounding, self.values, 0.0)
        return np.asarray(self.vectors @ (_filter(values, nbeta) * self.vectors[0]))


@dataclass(frozen=True, eq=False)
class _Direction:
    """The spectrum as one random direction sees it, outside of known eigenvectors, and these.

    Attributes:
        dimension: Of the space in which the direction is uniform; 0 where all eigenvectors are known.
        diagonal: Diagonal of the tridiagonal matrix of its Lanczos run, shape ``(m,)``.
        couplings: Off-diagonal, the last of which leads out of the basis, shape ``(m,)``.
        exact: Whether the basis is invariant.
        overlaps: Inner products of the basis vectors in each layer, shape ``(layers, m, m)``.
        known: Eigenvalues of the eigenvectors taken out, shape ``(k,)``.
        known_shares: How much of the squared length of each lies in each layer, shape ``(layers, k)``.
        rounding: What the rounding of products may pass for an eigenvalue.
        limit: The greatest rank that there can be outside of the known.
    """

    dimension: int
    diagonal: Array
    couplings: Array
    exact: bool
    overlaps: Array
    known: Array
    known_shares: Array
    rounding: float = 0.0
    limit: int | None = None

    @classmethod
    def of_run(cls, run: LanczosRun, dimension: int) -> _Direction:
        """What a run has seen, all parameters as one layer."""
        nothing = np.zeros(0)
        overlaps = np.eye(run.dimension)[None]
        return cls(dimension, run.diagonal, run.off_diagonal, False, overlaps, nothing, nothing[None])

    @cached_property
    def gauss(self) -> _Eigensystem:
        """Whose quadrature encloses from above."""
        return _Eigensystem(*eigensystem(self.diagonal, self.couplings[:-1]))

    @cached_property
    def radau(self) -> _Eigensystem:
        """Whose quadrature, with a node at zero, encloses from below."""
        if self.exact:
            return self.gauss
        inner = self.couplings[:-1]
        return _Eigensystem(*eigensystem(diagonal_of_radau(self.diagonal, inner), inner))

    def images(self, nbeta: float) -> tuple[Array, float, float, float]:
        """``f(T) e_1`` as far as is known, and the trace outside of the known: the value, its bounds."""
        above, below = self.gauss.image(nbeta), self.radau.image(nbeta, self.rounding)
        upper, lower = self.dimension * float(above[0]), self.dimension * float(below[0])
        if self.limit is not None:
            upper, lower = min(upper, self.limit), min(lower, self.limit)
        value = math.sqrt(upper * lower) if upper > 2 * lower > 0 else (upper + lower) / 2
        if above[0] - below[0] <= 0:
            return above, value, lower, upper
        share = (value / self.dimension - below[0]) / (above[0] - below[0])
        return below + share * (above - below), value, lower, upper

    def by_rounding(self, nbeta: float) -> float:
        """How far apart the bounds are for what may be rounding, which more products leave as they are."""
        within, beyond = self.radau.image(nbeta), self.radau.image(nbeta, self.rounding)
        return self.dimension * float(within[0] - beyond[0])

    def terms(self, nbeta: float) -> tuple[Array, Array, Array, float]:
        """Values and squares by layer, squares of the known by layer, and by how much the value may be off."""
        known = _filter(self.known, nbeta)
        image, value, lower, upper = self.images(nbeta)
        values = self.known_shares @ known + self.dimension * (self.overlaps[:, 0] @ image)
        squares_of_known = self.known_shares @ known**2
        squares = squares_of_known + self.dimension * np.einsum("i,lij,j->l", image, self.overlaps, image)
        return values, squares, squares_of_known, max(upper - value, value - lower)


@dataclass(frozen=True, eq=False)
class WhitenedSpectrum:
    """The spectrum of the whitened Gauss-Newton matrix, and in which layers its eigenvectors lie.

    Attributes:
        layers: Names of the modules.
        directions: What random directions have seen, at least one.
    """

    layers: tuple[str, ...]
    directions: Sequence[_Direction]

    def at(self, nbeta: float) -> EffectiveRank:
        """The effective rank at an inverse temperature; see :meth:`EffectiveRank.at`."""
        if not 0 <= nbeta < math.inf:
            raise ValueError(f"nbeta is {nbeta}; expected a number that is not negative.")
        return self._at(nbeta, b_is_given=True)

    def at_resolution(self, epsilon: float) -> EffectiveRank:
        """The effective rank at a resolution; see :meth:`EffectiveRank.at_resolution`."""
        return self._at(self.nbeta_at(epsilon), b_is_given=False)

    def _at(self, nbeta: float, b_is_given: bool) -> EffectiveRank:
        terms = [direction.terms(nbeta) for direction in self.directions]
        values, squares, known, half_widths = (np.array(several) for several in zip(*terms, strict=True))
        # The first direction has seen the leading eigenvectors too, which says little of what lies outside of them.
        later = slice(1 if len(self.directions) > 1 else 0, None)
        outside = (squares - known)[later]
        # One mean for all directions: weights made of each one's own would favour those that came out small.
        variances = 2 * (np.maximum(squares[later].mean(0) - known, 0.0) + _hidden(outside))
        # The variance for a uniform direction: what has the same term for all directions is seen without any.
        rest = values[later].sum(1).mean() - np.array([_filter(s.known, nbeta).sum() for s in self.directions])
        dimensions = np.array([max(s.dimension, 1) for s in self.directions])
        of_whole = squares[later].sum(1).mean() - known.sum(1) - np.maximum(rest, 0.0) ** 2 / dimensions
        whole = 2 * (np.maximum(of_whole, 0.0) + _hidden(outside.sum(1)))
        floor = 1e-20 * max(float(values.sum(1).max()), 1e-140) ** 2
        weights = 1 / np.maximum(whole, floor)
        weights /= weights.sum()
        layer_values, value = weights @ values, float((weights @ values).sum())
        amplification = 1.0 if b_is_given else _amplification(value, float((weights @ squares).sum()))
        layer_errors = amplification * np.sqrt(weights**2 @ variances)
        error, unsure = amplification * math.sqrt(weights**2 @ whole), amplification * float(weights @ half_widths)
        reasons = []
        if 2 * error + unsure > RELIABLE * value:
            by_rounding = amplification * float(weights @ [d.by_rounding(nbeta) for d in self.directions]) > unsure
            why, cure = ("rounding", "double precision") if by_rounding else ("too short Lanczos runs", "more products")
            errors = f"a standard error of {error / value:.1%}, and up to {unsure / value:.1%} for {why}"
            reasons.append(f"the effective rank has not converged: {errors}; {cure} would narrow it")
        return EffectiveRank(
            value=value,
            standard_error=error,
            quadrature_error=unsure,
            by_layer={
                name: LayerRank(float(v), float(e))
                for name, v, e in zip(self.layers, layer_values, layer_errors, strict=True)
                if name != _ALL
            },
            nbeta=nbeta,
            amplification=amplification,
            converged=not reasons,
            limited_by_probe=None,
            on_half=math.nan,
            reasons=tuple(reasons),
            products=0,
            spectrum=self,
        )

    def mean_divergence(self, nbeta: float) -> float:
        """What a quadratic divergence with this spectrum is on average, half the rank over b; half the trace at 0."""
        largest = max(max(s.diagonal.max(), s.known.max(initial=0.0)) for s in self.directions)
        b = max(nbeta, 1e-12 / max(float(largest), 1e-200))
        return self._mean_value(b) / (2 * b)

    def _mean_value(self, nbeta: float) -> float:
        """The value of :meth:`at` where the directions weigh alike: without what else there is to tell of it."""
        if len(self.directions) > 1:
            return self.at(nbeta).value
        (direction,) = self.directions
        return float(_filter(direction.known, nbeta).sum()) + direction.images(nbeta)[1]

    def nbeta_at(self, epsilon: float) -> float:
        """The b where that is ``epsilon``; 0 where the prior alone moves the function by less.

        Raises:
            ValueError: If ``epsilon`` is not positive.
        """
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}; expected a positive number, the mean divergence.")
        if self.mean_divergence(0.0) <= epsilon:
            return 0.0
        low, high = 1e-18, 1.0
        while self.mean_divergence(high) > epsilon:  # at most half the number of parameters over b
            low, high = high, high * 10
        ends = math.log(low / 2), math.log(high * 2)  # as either may be the b that is sought, up to rounding
        exponent = brentq(lambda x: math.log(self.mean_divergence(math.exp(x)) / epsilon), *ends, xtol=1e-9)
        return math.exp(exponent)


class _Whitened:
    """The Gauss-Newton matrix in units of the prior's standard deviations."""

    def __init__(self, matrix: GaussNewtonOperator, spread: Tensor, by_layer: bool) -> None:
        self.matrix = matrix
        self.spread = spread.to(matrix.objective.parameters)
        self.parts: dict[str, list[slice]] = {}
        if not by_layer:
            self.parts[_ALL] = [slice(None)]
            return
        start = 0
        for name, shape in matrix.objective.parameter_shapes.items():
            layer = name.rpartition(".")[0] or name
            self.parts.setdefault(layer, []).append(slice(start, start + shape.numel()))
            start += shape.numel()

    def __matmul__(self, vector: Tensor) -> Tensor:
        return self.spread * (self.matrix @ (self.spread * vector))

    def dense(self) -> Tensor:
        matrix = gauss_newton_by_sample(self.matrix)
        if matrix is None:
            matrix = self.matrix.dense()
        spread = self.spread.to(matrix)
        return matrix.mul_(spread[:, None]).mul_(spread)

    def normal(self, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(len(self.spread), generator=generator, dtype=torch.float64)
        return drawn.to(self.spread)

    def overlaps(self, rows: Tensor) -> Array:
        """Inner products of the rows layer by layer, shape ``(layers, m, m)``."""
        found = [sum(rows[:, s] @ rows[:, s].T for s in slices) for slices in self.parts.values()]
        return np.asarray(torch.stack([torch.as_tensor(f) for f in found]).double().cpu().numpy())

    def shares(self, rows: Tensor) -> Array:
        """Squared length of each row layer by layer, shape ``(layers, rows)``."""
        found = [torch.stack([rows[:, s].square().sum(1) for s in slices]).sum(0) for slices in self.parts.values()]
        return np.asarray(torch.stack(found).double().cpu().numpy())


def _dense(operator: _Whitened) -> WhitenedSpectrum:
    matrix = operator.dense().double().cpu()
    symmetric, layers = matrix.add(matrix.T).div_(2), tuple(operator.parts)
    del matrix
    if layers == (_ALL,):
        # a quarter faster than torch's, and in place
        values = eigvalsh(symmetric.numpy().T, overwrite_a=True, check_finite=False)
        return WhitenedSpectrum(layers, (_all_known(values, np.ones((1, len(values)))),))
    values, vectors = torch.linalg.eigh(symmetric)
    del symmetric
    return WhitenedSpectrum(layers, (_all_known(values.numpy(), operator.shares(vectors.T.contiguous())),))


def _all_known(eigenvalues: Array, shares: Array) -> _Direction:
    return _Direction(
        dimension=0,
        diagonal=np.zeros(1),
        couplings=np.zeros(1),
        exact=True,
        overlaps=np.zeros((len(shares), 1, 1)),
        known=eigenvalues,
        known_shares=shares,
    )


def _by_directions(
    operator: _Whitened,
    asked: Callable[[WhitenedSpectrum], list[EffectiveRank]],
    generator: torch.Generator,
    tolerance: float,
    max_products: int,
) -> WhitenedSpectrum:
    """Random directions, each outside of the eigenvectors that those before it have found, until they are enough.

    The first run may take all products: where it is too short, further directions would be as well. What may be
    rounding stays so whatever the number of products, and is told of the outcome alone.
    """
    size = len(operator.spread)
    vectors = operator.spread.new_zeros(0, size)
    known, norm = np.zeros(0), 0.0
    seen: list[_Direction] = []
    ranks: list[EffectiveRank] | None = None
    layers = tuple(operator.parts)
    most_vectors = max(BASIS_MEMORY // (size * vectors.element_size()), 2 * _STEPS_OF_A_DIRECTION)
    limit: int | None = None
    while True:
        rest = size - len(known)
        steps = min(max_products - operator.matrix.products, most_vectors - len(known), rest)
        draw = operator.normal(generator)
        start = draw - vectors.T @ (vectors @ draw)
        stop = _Stop(asked, rest, tolerance, ranks)
        run = lanczos(operator, start, steps, deflated=vectors, negligible=_rounding(start.dtype, norm), enough=stop)
        norm = max(norm, float(np.abs(run.ritz_values).max()))
        if run.dimension == rest:
            vectors = torch.cat([vectors, run.ritz_vectors(np.arange(rest))])
            known = np.concatenate([known, run.ritz_values])
            return WhitenedSpectrum(layers, (_all_known(known, operator.shares(vectors)),))
        limit = operator.matrix.rank_limit() if limit is None else limit
        seen.append(
            _Direction(
                dimension=rest,
                diagonal=run.diagonal,
                couplings=run.off_diagonal,
                exact=run.invariant,
                overlaps=operator.overlaps(run.basis),
                known=known,
                known_shares=operator.shares(vectors),
                limit=max(limit - len(known), 0),
            )
        )
        ranks = asked(WhitenedSpectrum(layers, tuple(seen)))
        enough = all(max(rank.standard_error, rank.quadrature_error) <= tolerance * rank.value for rank in ranks)
        left = max_products - operator.matrix.products
        if enough or left < _STEPS_OF_A_DIRECTION or (left < run.dimension / 2 and len(seen) > 1):
            rounding = _rounding(start.dtype, norm)
            return WhitenedSpectrum(layers, tuple(replace(direction, rounding=rounding) for direction in seen))
        found = _found(run, max(rank.nbeta for rank in ranks))
        room = max(most_vectors - len(known) - 2 * _STEPS_OF_A_DIRECTION, 0)
        found = found[max(len(found) - room, 0) :]
        if len(found):
            vectors = torch.cat([vectors, run.ritz_vectors(found)])
            known = np.concatenate([known, run.ritz_values[found]])
        del run  # its basis, before the next one is begun


class _Stop:
    """Whether a Lanczos run is long enough; of the first one also whether more steps would save directions later."""

    def __init__(
        self,
        asked: Callable[[WhitenedSpectrum], list[EffectiveRank]],
        dimension: int,
        tolerance: float,
        ranks: list[EffectiveRank] | None,
    ) -> None:
        self._asked, self._dimension, self._tolerance = asked, dimension, tolerance
        self._ranks = ranks  # by the directions before
        self._expected: list[float] = []

    def __call__(self, run: LanczosRun) -> bool:
        if run.dimension % (_STEPS_OF_A_DIRECTION // 2):
            return False
        alone = _Direction.of_run(run, self._dimension)
        if self._ranks is not None:
            return all(self._is_close(alone, rank) for rank in self._ranks)
        ranks = self._asked(WhitenedSpectrum((_ALL,), (alone,)))
        if not all(self._is_close(alone, rank) for rank in ranks):
            return False
        directions = max(self._directions(run, alone, rank) for rank in ranks)
        self._expected.append(run.dimension + directions * _STEPS_OF_A_DIRECTION)
        return directions < 1 or (len(self._expected) > 2 and self._expected[-1] > self._expected[-3])

    def _is_close(self, alone: _Direction, rank: EffectiveRank) -> bool:
        """Whether more steps would change the rank by less than half of the tolerance."""
        _, _, lower, upper = alone.images(rank.nbeta)
        return rank.amplification * (upper - lower) / 2 <= self._tolerance * rank.value / 2

    def _directions(self, run: LanczosRun, alone: _Direction, rank: EffectiveRank) -> float:
        """How many would do if the eigenvectors that this one has found were taken out."""
        if not rank.value:
            return 0.0
        image = alone.images(rank.nbeta)[0]
        found = _filter(run.ritz_values[_found(run, rank.nbeta)], rank.nbeta)
        outside = max(self._dimension * float(image @ image) - float(found @ found), 0.0)
        return 2 * outside * (rank.amplification / (self._tolerance * rank.value)) ** 2


def _amplification(value: float, square: float) -> float:
    """By how much more a rank is off at a given resolution than at a given b.

    With s = d ln(rank) / d ln(b) an error of the rank changes the logarithm of the b that belongs to the resolution by
    1 / (1 - s) times as much, and so that of the rank there; 1 - s is the trace of f² over that of f = h / (h + 1/b).

    Args:
        value: The trace of f.
        square: The trace of its square.
    """
    return max(value / square, 1.0) if square > 0 else 1.0


def _rounding(dtype: torch.dtype, norm: float) -> float:
    """What may pass for an eigenvalue of a matrix of this norm."""
    return _ROUNDING * torch.finfo(dtype).eps * norm


def _found(run: LanczosRun, nbeta: float) -> NDArray[np.intp]:
    """Ritz pairs that may be taken out as if they were eigenpairs, where that helps."""
    values = np.maximum(run.ritz_values, 0.0)
    return np.flatnonzero((nbeta * run.residuals <= _FOUND * (nbeta * values + 1)) & (nbeta * values > _FOUND))


def _hidden(outside: Array) -> Array:
    """Chance that an eigenvector more, with a term of 1, would have stayed within what was seen.

    Directions that happen to be nearly orthogonal to the last large eigenvector see neither it nor its variance.

    Args:
        outside: Sum of the squared terms as each direction has seen it, the directions along the first axis.
    """
    # of a layer that does nothing, rounding leaves less than none
    return np.asarray(gammainc(len(outside) / 2, np.maximum(outside.sum(0), 0.0) / 2))


def _filter(eigenvalues: Array, nbeta: float) -> Array:
    """``h / (h + 1/b)``, where what is below zero is rounding."""
    scaled = nbeta * np.maximum(eigenvalues, 0.0)
    return np.asarray(scaled / (scaled + 1))
