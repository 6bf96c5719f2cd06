"""The learning coefficient of the function that a network computes, at stated resolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.llc import diagnostics
from phasewatch.llc.draws import KeptDraws, existing
from phasewatch.llc.resolved_chains import DRAWS_PER_POSITION, Draws, ResolvedChains
from phasewatch.llc.spread import prior_spread
from phasewatch.objective import Objective
from phasewatch.objective.memory import give_back
from phasewatch.shown import Shown

COARSE, FINE = 0.1, 0.003
"""Resolutions by default, in nats. On linear networks the fine one is within 4 % of the exact coefficient, and on
modular addition the coarse one tells memorising from generalising; see ``benchmarks/live.py``."""
LARGEST_RHAT, SAME_MEAN = 1.1, 0.05
"""Chains disagree if their split R-hat is above the first (Gelman et al. 2013, Bayesian Data Analysis, ch. 11) and
their means scatter by more than this share of lambda; the share is chosen."""
LARGEST_HALF_WIDTH = 0.1
"""Of the interval, see :attr:`BehavioralLLC.half_width`. Chosen."""
ROUNDS, LEAST_DRAWS = 8, 16
"""Times that draws may end, and how many there are in between at least. Chosen."""
LARGEST_DRIFT = 0.1
"""Share of lambda that the mean may change by from one half of the draws to the other. Chosen."""
LEAST_ACCEPTANCE = 0.5
"""Chains that accept fewer moves stick, where .95 is aimed at. Chosen."""
MOST_HITS = 0.02
"""Share of the moves that may end at the bound on the divergence, which a quadratic well allows less than 1e-6 of.
Chosen."""
LEAST_VIRIAL, LARGEST_VIRIAL, VIRIAL_SIGNIFICANCE = 0.85, 1.3, 2.0
"""Between which the virial must lie, which is 1 at equilibrium, within so many standard errors. Chosen."""
HEAT_CAPACITY = (0.33, 2.0)
"""Least and largest as a share of lambda, with which it agrees in a quadratic well. Chosen."""
SIGNIFICANCE = 3.0
"""Standard errors from which on a drift or a heat capacity counts. Chosen."""
CARRIED = 1.5
"""Factor by which the mean divergence of the draws may miss the resolution, and lambda be carried over along its slope;
beyond it nbeta is set anew. Chosen: chance does not miss by so much from lambda = 3 on, and where lambda is less most
draws lie far below their mean, which misleads the search for nbeta."""
STEEPNESS = (0.5, 3.0)
"""Of E[D] in temperature (lambda over the heat capacity, 1 in a quadratic well), as far as that is believed: no further
than a heat capacity that passes the check says."""


@dataclass(frozen=True)
class BehavioralLLC(Shown):
    """The learning coefficient of a function at one resolution.

    Attributes:
        resolution: The mean divergence in nats at which it is stated.
        learning_coefficient: nbeta E[D] at that resolution; 0 where the whole prior is nearer than the resolution.
        standard_error: Its standard error, from autocorrelation and the spread between chains; that of nbeta E[D] at a
            fixed temperature times lambda / heat capacity, as the temperature is known no better than that.
        interval: 95 % interval (low, high) by Student's t.
        reliable: Whether every check passed.
        reasons: What did not pass, one phrase a check.
        nbeta: Inverse temperature times n at which the mean divergence is that.
        divergence: The mean divergence of the draws, from which the coefficient is carried over to ``resolution``
            along its slope there: d ln(lambda) / d ln(resolution) = 1 - lambda / heat capacity.
        heat_capacity: Variance of nbeta D within the chains; lambda changes by lambda less it per unit of log nbeta.
        heat_capacity_error: Its standard error.
        spread_slope: By how much the coefficient at this resolution changes per unit of the logarithm of the prior's
            spread, lambda / heat capacity times Cov(nbeta D, |u|^2), with u = (w - w*) / spread.
        spread_slope_error: Its standard error over the chains.
        rhat: Split R-hat of D.
        ess: Effective number of independent draws.
        acceptance: Share of accepted moves.
        hits: Share of moves refused as their divergence was beyond the bound.
        step_size: In units of the spread.
        virial: (E[u . grad(nbeta D)] + E[|u|^2]) / d over the d parameters; 1 at equilibrium, less where the chains
            have not spread out over the flat directions yet.
        virial_error: Its standard error.
        misfit_change: E[R] over the draws: how much the loss less its divergence changes where the function hardly
            does, in units of the loss; NaN where only the divergence was given.
        displacements: Name of each tensor to the root mean square of its (w - w*) / spread.
        chains: Number of chains.
        draws: Draws a chain.
        gradients: Gradients of the whole probe spent, all chains together, since the resolution before.
        kept_draws: The divergence of each draw, where it was asked for by ``keep_draws``.
    """

    resolution: float
    learning_coefficient: float
    standard_error: float
    interval: tuple[float, float]
    reliable: bool
    reasons: tuple[str, ...]
    nbeta: float
    divergence: float
    heat_capacity: float
    heat_capacity_error: float
    spread_slope: float
    spread_slope_error: float
    rhat: float
    ess: float
    acceptance: float
    hits: float
    step_size: float
    virial: float
    virial_error: float
    misfit_change: float
    displacements: Mapping[str, float]
    chains: int
    draws: int
    gradients: int
    kept_draws: KeptDraws | None = field(default=None, compare=False)

    @property
    def half_width(self) -> float:
        """Of the interval, as a share of the coefficient; of 1 where the coefficient is less."""
        return (self.interval[1] - self.interval[0]) / 2 / max(self.learning_coefficient, 1.0)

    @property
    def is_far(self) -> bool:
        """Whether the coefficient is carried over to the resolution from so far that it may not be that of it."""
        is_carried = self.heat_capacity > 0 and self.divergence > 0
        return is_carried and not 1 / CARRIED <= self.divergence / self.resolution <= CARRIED

    @property
    def nbeta_of_resolution(self) -> float:
        """Where the mean divergence is the resolution, by its slope at the draws; NaN where it is not positive."""
        if not self.divergence > 0:
            return math.nan
        steepness = _steepness(self.nbeta * self.divergence, self.heat_capacity)
        return self.nbeta * (self.divergence / self.resolution) ** steepness

    def description_length(self, loss: float, n: int) -> float:
        """N L + lambda log n: nats to tell the labels of n samples by this function at a loss of L each.

        It is no free energy, which belongs to the loss and exists at its minima only
        (:attr:`phasewatch.LLCEstimate.free_energy`).
        """
        return n * loss + self.learning_coefficient * math.log(n)

    def to_xarray(self) -> Any:
        """The draws as an ``xarray.Dataset`` (:meth:`phasewatch.llc.draws.KeptDraws.to_xarray`).

        Raises:
            ValueError: If they were not kept, or the whole prior is nearer than the resolution.
            ImportError: If xarray is not installed.
        """
        return existing(self.kept_draws, "estimate_behavioral_llc").to_xarray()

    def to_arviz(self) -> Any:
        """The draws as ArviZ takes them (:meth:`phasewatch.llc.draws.KeptDraws.to_arviz`).

        Raises:
            ValueError: If they were not kept, or the whole prior is nearer than the resolution.
            ImportError: If ArviZ is not installed.
        """
        return existing(self.kept_draws, "estimate_behavioral_llc").to_arviz()

    def __repr__(self) -> str:
        """The estimate, its resolution, and why it should not be believed where it should not."""
        verdict = "reliable" if self.reliable else "unreliable: " + "; ".join(self.reasons)
        value, error = self.learning_coefficient, self.standard_error
        return f"BehavioralLLC(lambda = {value:.4g} +- {error:.2g} at {self.resolution:g} nats, {verdict})"


def estimate_behavioral_llc(
    objective: Objective,
    resolutions: Sequence[float] = (COARSE, FINE),
    seed: int = 0,
    *,
    metric: Literal["loss", "outputs"] = "loss",
    nats_per_loss: float = 1.0,
    chains: int = 8,
    draws: int = 4_000,
    burn_in: int = 1_000,
    spread: float | Tensor | None = None,
    precision: float = 0.03,
    keep_draws: bool = False,
) -> list[BehavioralLLC]:
    r"""Estimate the learning coefficient of the function at ``objective.parameters``, at each of several resolutions.

    :math:`\lambda(\epsilon) = \epsilon b` at the b where :math:`E[D] = \epsilon` under the density
    :math:`\propto \exp(-b D(w)) \, \mathcal N(w; w^*, \sigma^2)`, with D the divergence of the network's function
    from that at w* (:meth:`phasewatch.Objective.behavioral`; twice it is the effective number of parameters of Bushnaq
    et al. 2024, arXiv 2405.10927, sec. 2) and σ the spread of the usual initialisation
    (:func:`phasewatch.llc.spread.prior_spread`). It is the exponent with which the volume of weights that compute the
    function to within ε grows with ε, so it is never negative and exists at every step of a training run. It is that
    of the loss only where the loss is at a minimum that the model can reach exactly.

    Args:
        objective: The loss, on a fixed probe.
        resolutions: Mean divergences in nats.
        seed: Same seed, same numbers (on the same device and library versions).
        metric: What D is measured by, see :meth:`phasewatch.Objective.behavioral`.
        nats_per_loss: What one unit of the loss is in nats, likewise.
        chains: Number of chains, at least 2.
        draws: Draws a chain at each resolution, each a gradient of the whole probe. They are made in up to eight rounds
            and end with the first after which every check is passed and the interval is as narrow as wanted.
        burn_in: Moves before them, likewise.
        spread: Standard deviation of the prior, shape ``(num_parameters,)``; default
            :func:`phasewatch.llc.spread.prior_spread`. A number is a factor on that.
        precision: Half-width of the interval at which draws may end, as a share of the coefficient (of 1 where that is
            less).
        keep_draws: Whether the estimates keep their draws, for ``to_xarray()`` and ``to_arviz()``.

    Returns:
        One estimate for each of ``resolutions``, in their order.

    Raises:
        ValueError: If a number is out of its range.
        NoOutputsError: If the network's outputs cannot be seen.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> module = torch.nn.Linear(3, 2, bias=False)
        >>> batch = (torch.randn(200, 3), torch.zeros(200, 2))
        >>> def half_squared_error(module, batch):
        ...     return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()
        >>> objective = Objective(module, [batch], loss_fn=half_squared_error)
        >>> _, fine = estimate_behavioral_llc(objective, draws=1000)
        >>> fine.reliable, abs(fine.learning_coefficient - 6 / 2) < 0.3
        (True, True)
    """
    check_behavioral_settings(resolutions, chains, draws, burn_in)
    if not precision > 0:
        raise ValueError(f"precision is {precision}; expected a positive share such as 0.05.")
    if not isinstance(spread, Tensor):
        if spread is not None and not (spread > 0 and math.isfinite(spread)):
            raise ValueError(f"spread is {spread}; expected a positive factor, or a tensor of standard deviations.")
        spread = (spread or 1.0) * prior_spread(objective)
    with isolated():
        divergence = objective.behavioral(metric, nats_per_loss=nats_per_loss)
        sampler = ResolvedChains(divergence, spread, chains, seed)
        found: dict[float, BehavioralLLC] = {}
        for resolution in sorted(set(resolutions), reverse=True):
            before = sampler.gradients
            if sampler.prior_is_within(resolution):
                found[resolution] = _nothing(resolution, divergence, chains)
                continue
            sampler.set_up(resolution, burn_in)
            rounds = min(ROUNDS, draws // LEAST_DRAWS)
            for length in np.diff(np.linspace(0, draws, rounds + 1).astype(int)).tolist():
                if resolution in found and found[resolution].is_far:
                    sampler.move_on(found[resolution].nbeta_of_resolution, resolution, burn_in)
                give_back()  # what lay between the positions that are kept
                seen = sampler.draw(length)
                found[resolution] = _estimate(resolution, seen, divergence)
                only_doubted = found[resolution].reasons == divergence.doubts  # which no number of draws changes
                if found[resolution].divergence < 0 or (only_doubted and found[resolution].half_width <= precision):
                    break
            misfit = math.nan
            if metric == "loss":
                # As many places at a time as there are chains: one trace serves, however many rounds there were.
                moved = [
                    objective.losses(places) - divergence.losses(places) / nats_per_loss
                    for places in seen.positions.split(chains)
                ]
                misfit = float(torch.cat(moved).double().mean()) - objective.mean_loss
            found[resolution] = replace(found[resolution], misfit_change=misfit, gradients=sampler.gradients - before)
            if keep_draws:
                found[resolution] = replace(found[resolution], kept_draws=_kept_draws(resolution, seen))
    return [found[resolution] for resolution in resolutions]


def _kept_draws(resolution: float, seen: Draws) -> KeptDraws:
    attributes = {"resolution": resolution, "nbeta": seen.nbeta}
    return KeptDraws("divergence", seen.divergences, tuple(range(len(seen.divergences))), attributes)


def check_behavioral_settings(resolutions: Sequence[float], chains: int, draws: int, burn_in: int) -> None:
    """Check the settings of :func:`estimate_behavioral_llc` before there is anything to measure.

    Raises:
        ValueError: If one of them is out of its range.
    """
    if not len(resolutions) or not all(r > 0 and math.isfinite(r) for r in resolutions):
        raise ValueError(f"resolutions is {resolutions}; expected positive numbers of nats.")
    if chains < 2:
        raise ValueError(f"chains is {chains}; expected at least 2, or nothing shows whether they agree.")
    if draws < LEAST_DRAWS:
        raise ValueError(f"draws is {draws}; expected at least {LEAST_DRAWS}, or no standard error can be formed.")
    if burn_in < 20:
        raise ValueError(f"burn_in is {burn_in}; expected at least 20, it finds step size and temperature.")


def _estimate(resolution: float, seen: Draws, divergence: Objective) -> BehavioralLLC:
    """What the draws say at the temperature that they were made at."""
    energies = seen.nbeta * seen.divergences
    mean = float(energies.mean())
    divergence_reached = float(seen.divergences.mean())
    heat_capacity = float(energies.var(axis=1, ddof=1).mean())
    steepness = _steepness(mean, heat_capacity)
    # Chains that never move have a divergence of zero, and nothing to carry over; a loss that is not convex may have
    # one below zero.
    carried = (resolution / divergence_reached) ** (1 - steepness) if heat_capacity and divergence_reached > 0 else 1.0
    coefficient = mean * carried
    error = carried * steepness * _standard_error(energies)
    ess = diagnostics.effective_sample_size(energies)
    # ESS is itself an estimate: a quarter of it as degrees of freedom gives 95 % coverage on AR(1) chains.
    half_width = float(stats.t.ppf(0.975, max(1.0, ess / 4))) * error if error else 0.0
    distances = seen.squared_distances.sum(axis=2)
    slopes = _spread_slopes(energies[:, ::DRAWS_PER_POSITION], distances)
    sizes = [shape.numel() for shape in divergence.parameter_shapes.values()]
    moved = np.sqrt(seen.squared_distances.mean(axis=(0, 1)) / np.asarray(sizes))
    estimate = BehavioralLLC(
        resolution=resolution,
        learning_coefficient=coefficient,
        standard_error=error,
        interval=(coefficient - half_width, coefficient + half_width),
        reliable=False,
        reasons=(),
        nbeta=seen.nbeta,
        divergence=divergence_reached,
        heat_capacity=heat_capacity,
        heat_capacity_error=_standard_error(np.square(energies - energies.mean(axis=1, keepdims=True))),
        spread_slope=float(slopes.mean()) * steepness,
        spread_slope_error=float(slopes.std(ddof=1)) / math.sqrt(len(slopes)) * steepness,
        rhat=diagnostics.split_rhat(energies),
        ess=ess,
        acceptance=seen.acceptance,
        hits=seen.hits,
        step_size=seen.step_size,
        virial=float(seen.virials.mean()),
        virial_error=_standard_error(seen.virials),
        misfit_change=math.nan,
        displacements=dict(zip(divergence.parameter_shapes, moved.tolist(), strict=True)),
        chains=len(energies),
        draws=energies.shape[1],
        gradients=0,
    )
    reasons = (*divergence.doubts, *_reasons(estimate, energies))
    return replace(estimate, reliable=not reasons, reasons=reasons)


def _reasons(estimate: BehavioralLLC, energies: diagnostics.FloatArray) -> list[str]:
    mean = float(energies.mean())
    reasons = []
    if math.isnan(estimate.rhat):
        return ["the draws do not vary"]
    if mean < 0:
        reasons.append(f"the divergence is {estimate.divergence:.2g} on average, which is no distance")
    scatter = float(energies.mean(axis=1).std(ddof=1))
    if estimate.rhat > LARGEST_RHAT and scatter > SAME_MEAN * mean:
        reasons.append(f"the chains disagree (R-hat {estimate.rhat:.2f})")
    if estimate.half_width > LARGEST_HALF_WIDTH:
        reasons.append(f"too few independent draws ({estimate.ess:.0f}: +- {estimate.half_width:.0%})")
    if estimate.is_far:
        reasons.append(
            f"the chains are {estimate.divergence:.2g} nats away on average, and not {estimate.resolution:g}"
        )
    if estimate.acceptance < LEAST_ACCEPTANCE:
        reasons.append(f"the chains often stick (acceptance {estimate.acceptance:.2f})")
    half = energies.shape[1] // 2
    drift = float(energies[:, half:].mean() - energies[:, :half].mean())
    # Each half has half of the draws: the variance of the difference is four times that of the overall mean.
    if abs(drift) > max(LARGEST_DRIFT * mean, SIGNIFICANCE * 2 * _standard_error(energies)):
        reasons.append(f"the divergence still drifts ({drift:+.3g} from one half of the draws to the other)")
    margin = VIRIAL_SIGNIFICANCE * estimate.virial_error
    if not LEAST_VIRIAL - margin < estimate.virial < LARGEST_VIRIAL + margin:
        reasons.append(f"the chains have not spread out (virial {estimate.virial:.2f}, 1 at equilibrium)")
    if estimate.hits > MOST_HITS:
        reasons.append(f"the chains often reach the bound on the divergence ({estimate.hits:.0%} of the moves)")
    least, largest = (limit * mean for limit in HEAT_CAPACITY)
    margin = SIGNIFICANCE * estimate.heat_capacity_error
    if not least - margin < estimate.heat_capacity < largest + margin:
        reasons.append(f"the divergence varies oddly for its mean (heat capacity {estimate.heat_capacity:.3g})")
    return reasons


def _steepness(mean: float, heat_capacity: float) -> float:
    """How much ln(nbeta) falls where ln E[D] rises by one: d ln E[D] / d ln(nbeta) = -C / lambda."""
    return min(max(mean / heat_capacity, STEEPNESS[0]), STEEPNESS[1]) if heat_capacity else 1.0


def _standard_error(energies: diagnostics.FloatArray) -> float:
    """Of the mean of draws at one temperature."""
    between = diagnostics.standard_error_between_chains(energies)
    return max(diagnostics.standard_error(energies), between) if energies.shape[1] >= 4 else between


def _spread_slopes(
    energies: diagnostics.FloatArray, squared_distances: diagnostics.FloatArray
) -> diagnostics.FloatArray:
    """Covariance of the energies with the squared distances, chain by chain."""
    if energies.shape[1] < 2:
        return np.full(len(energies), np.nan)
    away = [values - values.mean(axis=1, keepdims=True) for values in (energies, squared_distances)]
    found: diagnostics.FloatArray = (away[0] * away[1]).sum(axis=1) / (energies.shape[1] - 1)
    return found


def _nothing(resolution: float, divergence: Objective, chains: int) -> BehavioralLLC:
    """Where the whole prior computes the function to within the resolution."""
    return BehavioralLLC(
        resolution=resolution,
        learning_coefficient=0.0,
        standard_error=0.0,
        interval=(0.0, 0.0),
        reliable=not divergence.doubts,
        reasons=divergence.doubts,
        nbeta=0.0,
        divergence=math.nan,
        heat_capacity=0.0,
        heat_capacity_error=0.0,
        spread_slope=0.0,
        spread_slope_error=0.0,
        rhat=math.nan,
        ess=math.nan,
        acceptance=math.nan,
        hits=0.0,
        step_size=math.nan,
        virial=math.nan,
        virial_error=math.nan,
        misfit_change=math.nan,
        displacements=dict.fromkeys(divergence.parameter_shapes, 1.0),
        chains=chains,
        draws=0,
        gradients=0,
    )
