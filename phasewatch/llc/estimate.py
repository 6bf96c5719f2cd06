"""The local learning coefficient of a loss at w*, with what is needed to judge it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from phasewatch.hessian import NoCurvatureError, NoSecondDerivativeError
from phasewatch.isolation import isolated
from phasewatch.llc import diagnostics
from phasewatch.llc.diagnostics import FloatArray
from phasewatch.llc.draws import KeptDraws, existing
from phasewatch.llc.fluctuations import Fluctuations
from phasewatch.llc.hmc import LEAST_DRAWS, sample_hmc
from phasewatch.llc.newton import newton_step
from phasewatch.llc.pilot import pilot_descent
from phasewatch.llc.posterior import LocalizedPosterior
from phasewatch.llc.probe_noise import ProbeNoise, probe_noise
from phasewatch.objective import NoOutputsError, Objective
from phasewatch.objective.constant import loss_of_constant_prediction
from phasewatch.shown import Shown

HEATING_ERROR = 0.1
"""Relative error of the correction for the change of batches; part of the standard error. Chosen."""
TAKEN_OFF = 0.02
"""Share of lambda that localization and unfinished spreading take off where it is known; intervals reach up by it."""
STUCK = 0.05
"""A chain that accepts a smaller share of its moves than this has diverged: step sizes are set for .95. Chosen."""
FALLEN = 1e9
"""So has one whose nbeta (L - L(w*)) is below minus this: the loss has no floor. Chosen, beyond any number of
parameters."""
CHAINS, MOST_CHAINS, CHAINS_TIMES_PARAMETERS = 8, 128, 256
"""Chains by default: more than 8 where parameters are so few that they cost little. A small lambda needs them: a loss
that is most often near its floor and now and then far above has a relative variance of 1 / lambda. Chosen."""
SIGNIFICANCE = 3.0
"""A drift, or a heat capacity far from lambda, counts only where it is this many standard errors from none. Chosen."""
WORSE_BY_CHANCE = 4.5
"""Nats over all samples of the probe by which w* may be worse than a constant prediction. If all that it has learnt is
noise, it is better by m nats on average, with a standard deviation of sqrt(2 m). Three of these below the mean it is
worse by 3 sqrt(2 m) - m, which is 4.5 at most."""
BETTER_BY_CHANCE = 3.0
"""W* has something to lose if it gains more on a constant prediction than this times 1 + m nats, m what fitting noise
gains on average: for every m that is above m + 3 sqrt(2 m), three standard deviations beyond the mean."""
BORNE = 0.05
"""Share of lambda that the noise of the probe alone may take off by default: half of what is allowed for both the noise
and the distance from the minimum (``Thresholds.descent``)."""
NEGLIGIBLE_STEP = 0.002
"""The pilot ends where its steps promise less than this share of the quadratic part of lambda. Chosen: a 50th of the
fall that is too much (``Thresholds.descent``)."""
LEAST_SCALE = 5.0
"""A fall is held against the quadratic part of lambda, or against this where that is less: at w = 0 of a deep linear
network the quadratic part is 0 but lambda 13.5, and a fall by half a unit does not speak against sampling. Chosen."""
HELD = 1.2
"""Chains whose mean is at most so many times the quadratic part of lambda are in the well that they should be in,
however little w* gains on a constant prediction. Chosen."""


@dataclass(frozen=True)
class Thresholds:
    """When an estimate counts as unreliable.

    Attributes:
        rhat: Largest split R-hat.
        ess: Smallest effective sample size.
        acceptance: Smallest share of accepted moves.
        drift: Largest change of the mean from the first to the second half of the draws, as a share of it.
        descent: Largest ``descent`` as a share of the estimate; and, before anything is sampled, of the quadratic part
            of lambda (:attr:`LLCEstimate.quadratic`). Infinite: all is sampled.
        noise: Largest ``noise_descent`` as a share of the estimate.
        second_stage_acceptance: Smallest ``second_stage_acceptance``.
        heating: Largest ``heating`` as a share of the estimate.
        lost: Largest ``lost``. On the cases of ``benchmarks/llc.py`` it is below .05, on a weak signal .4; chains that
            have left reach 1, the plateau where the network does nothing, and more by the lambda of that. A minimum
            that gains hardly more than lambda log n / n reaches as much; there it does not count where lambda is no
            more than its quadratic part.
        heat_capacity: Least and largest heat capacity as a share of the estimate. On the cases of ``benchmarks/llc.py``
            it is .5 to 1.1; on a plateau that the chains have reached from w* it is .1, while they are on their way 4
            and more, and a lambda that lacks what w* lies above the minimum falls below it by as much.
    """

    rhat: float = 1.1
    ess: float = 30.0
    acceptance: float = 0.3
    drift: float = 0.1
    descent: float = 0.1
    noise: float = 0.1
    second_stage_acceptance: float = 0.3
    heating: float = 0.3
    lost: float = 0.8
    heat_capacity: tuple[float, float] = (0.33, 1.5)


@dataclass(frozen=True)
class LLCEstimate(Shown):
    """A local learning coefficient with its uncertainty and the diagnostics of its chains.

    Where w* is not near a minimum nothing is sampled (``draws`` is 0), and what chains would say is NaN.

    Attributes:
        nbeta: Inverse temperature times n.
        localization: Precision gamma of the Gaussian that holds the chains at w*.
        n: Data-set size.
        loss: The baseline L(w*).
        descent: By how much nbeta L fell from w* in a pilot descent held as the chains are
            (:func:`phasewatch.llc.pilot.pilot_descent`), which ends once that is too much; an estimate at the minimum
            nearby is larger by about as much.
        noise_descent: By how much it falls, on average, at a perfect minimum of the loss of all n samples, because the
            probe has not all of them (:mod:`phasewatch.llc.probe_noise`); NaN where the outputs cannot be seen, or have
            no curvature.
        quadratic: What lambda would be if the loss were quadratic, from the Gauss-Newton matrix at w*, as far as five
            batches tell; half the number of parameters, which is never less, where there is none.
        chains: Number of chains, run or not.
        gradients: Minibatch gradients spent, everything included but the two constant predictions, which take the
            time of some 10 on all batches for all chains together.
        reliable: Whether every check passed.
        reasons: What did not pass, one phrase a check.
        notes: What else is to be known of the number, as that it is limited by the probe.
        learning_coefficient: nbeta (E[L(w)] - L(w*)), less ``heating``. Negative where w* is far from a minimum;
            never clipped. NaN where nothing was sampled, or all chains diverged.
        standard_error: Its standard error, from autocorrelation, spread between chains and error of ``heating``.
        interval: 95 % interval (low, high) for lambda by Student's t. It reaches further up than down, by 2 % of the
            estimate: chains that are held at w* or have not spread out read low, and never high.
        rhat: Split R-hat of the loss; NaN where all draws are equal or all chains diverged.
        ess: Effective number of independent draws; NaN likewise.
        acceptance: Share of accepted moves.
        step_size: The frozen step, in units of the preconditioner.
        heating: What the change of batches added to the raw mean; subtracted.
        second_stage_acceptance: Share of the segments of moves that Metropolis' rule accepted once the whole probe had
            been looked at (:mod:`phasewatch.llc.second_stage`); 1 where minibatches miss nothing, NaN where there were
            too few draws to look.
        fluctuations: How the losses of single samples vary over the draws; their ``functional_variance``, and with
            it ``singular_fluctuation`` and ``waic``, are NaN where the loss is not a mean over samples.
        heat_capacity: Variance of nbeta L over the draws of a chain, (nbeta)^2 Var L; near lambda where the
            posterior has its asymptotic form, since lambda changes by lambda less it per unit of log nbeta.
        constant_loss: The loss of the best constant prediction
            (:func:`phasewatch.objective.constant.loss_of_constant_prediction`).
        mean_output_loss: The loss where the network says for every sample what it says on average at w*; higher than
            at w*, unless w* is not near a minimum. NaN, like ``constant_loss``, where the outputs cannot be seen.
        virial: E[(w - w*) . grad U] / d over the d parameters, U being nbeta L and the localization; 1 at equilibrium.
            Less by the share of the directions over which the chains have not yet spread. Deep linear networks with
            as little as .4 have the right lambda, as flat directions add no loss: it is no part of ``reliable``.
        virial_error: Its standard error; NaN where there are too few draws.
        distance: Root mean square distance of the draws from w*.
        displacements: Name of each parameter tensor to the same for it alone, in units of its norm at w*; infinite
            where that is 0. Where directions are flat, tensors go far beyond their own size with the right lambda.
        diverged_chains: Number of chains that could not stay where the loss is finite and near L(w*); left out.
        draws: Draws a chain.
        kept_draws: The loss of each draw of the chains that count, above that of w* on the same batch, where it was
            asked for by ``keep_draws``.
    """

    nbeta: float
    localization: float
    n: int
    loss: float
    descent: float
    noise_descent: float
    quadratic: float
    chains: int
    gradients: int
    reliable: bool = False
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    learning_coefficient: float = math.nan
    standard_error: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    rhat: float = math.nan
    ess: float = math.nan
    acceptance: float = math.nan
    step_size: float = math.nan
    heating: float = math.nan
    second_stage_acceptance: float = math.nan
    fluctuations: Fluctuations = Fluctuations()
    heat_capacity: float = math.nan
    constant_loss: float = math.nan
    mean_output_loss: float = math.nan
    virial: float = math.nan
    virial_error: float = math.nan
    distance: float = math.nan
    displacements: Mapping[str, float] = field(default_factory=dict)
    diverged_chains: int = 0
    draws: int = 0
    kept_draws: KeptDraws | None = field(default=None, compare=False)

    @property
    def free_energy(self) -> float:
        """Local free energy n L(w*) + lambda log n; at nbeta = n / log n that is WBIC (Watanabe 2013, eq. 14).

        At a minimum only: elsewhere this lambda means nothing, and n L + lambda log n with the lambda of the divergence
        is no free energy but a description length of the function that the network computes.
        """
        return self.n * self.loss + self.learning_coefficient * math.log(self.n)

    @property
    def lost(self) -> float:
        """Share of what w* gains on the best constant prediction that the draws have lost, on average.

        NaN where it gains nothing, or where the outputs cannot be seen.
        """
        gained = self.nbeta * (self.constant_loss - self.loss)
        return self.learning_coefficient / gained if gained > 0 else math.nan

    @property
    def singular_fluctuation(self) -> float:
        """The functional variance times beta / 2 (Watanabe 2010, sec. 2).

        It is d / 2 for a regular model that can realize the data, and 0 where no sample has a misfit.
        """
        return self.nbeta / self.n * self.fluctuations.functional_variance / 2

    @property
    def waic(self) -> float:
        """Estimate of the Bayes generalization loss at inverse temperature nbeta / n."""
        return self.fluctuations.waic(self.nbeta, self.n)

    def to_xarray(self) -> Any:
        """The draws as an ``xarray.Dataset`` (:meth:`phasewatch.llc.draws.KeptDraws.to_xarray`).

        Raises:
            ValueError: If they were not kept, or nothing was sampled.
            ImportError: If xarray is not installed.
        """
        return existing(self.kept_draws, "estimate_llc").to_xarray()

    def to_arviz(self) -> Any:
        """The draws as ArviZ takes them (:meth:`phasewatch.llc.draws.KeptDraws.to_arviz`).

        Raises:
            ValueError: If they were not kept, or nothing was sampled.
            ImportError: If ArviZ is not installed.
        """
        return existing(self.kept_draws, "estimate_llc").to_arviz()

    def __repr__(self) -> str:
        """The estimate, its standard error, and why it should not be believed where it should not."""
        verdict = "reliable" if self.reliable else "unreliable: " + "; ".join(self.reasons)
        said = "; ".join([verdict, *self.notes])
        return f"LLCEstimate(lambda = {self.learning_coefficient:.4g} +- {self.standard_error:.2g}, {said})"


def estimate_llc(
    objective: Objective,
    n: int | None = None,
    seed: int = 0,
    *,
    chains: int | None = None,
    draws: int = 2_950,
    burn_in: int = 1_000,
    nbeta: float | None = None,
    localization: float = 0.3,
    compiled: bool = False,
    thresholds: Thresholds | None = None,
    keep_draws: bool = False,
) -> LLCEstimate:
    r"""Estimate the local learning coefficient at ``objective.parameters``.

    :math:`\hat\lambda = n\beta\,(E[L_n(w)] - L_n(w^*))` under the density :math:`\propto \exp(-n\beta L_n(w) -
    \tfrac{\gamma}{2}|w - w^*|^2)` (Lau et al. 2023, "The local learning coefficient: a singularity-aware complexity
    measure", eq. 14), by Hamiltonian Monte Carlo on minibatches (:mod:`phasewatch.llc.hmc`). Each draw is the loss on a
    batch less the loss of w* on the same batch. The sampler sets itself up. It costs ``chains * (burn_in + draws)``
    minibatch gradients, one a batch, and a dozen.

    Before that some dozens of products with the Gauss-Newton matrix, on five batches at most, say what the probe can
    bear, and a step of Newton's method or up to 40 gradients on all batches for a pilot descent whether there is
    anything to sample: where the descent takes off more than a tenth of the quadratic part of lambda, w* is not near a
    minimum, lambda is NaN and no chain is run.

    Args:
        objective: The loss, on a fixed probe.
        n: Size of the data set that the model is trained on; default the samples of the probe.
        seed: Same seed, same numbers (on the same device and library versions).
        chains: Number of independent chains, all from w*; default 8, and up to 128 where there are fewer than 32
            parameters.
        draws: Draws a chain.
        burn_in: Minibatch gradients a chain before them; they set the step size.
        nbeta: Inverse temperature times n; default n / log n, or less if the probe has fewer samples than n and their
            noise alone would take off more than 5 % of lambda (``notes`` say so).
        localization: Precision gamma of the Gaussian around w*. It lowers the estimate where it is not small
            against nbeta times the curvature.
        compiled: Whether to compile the gradient (``torch.compile``): half a minute the first time, then up to a
            third faster on small networks. A later estimate with the same ``loss_fn`` and shapes need not compile.
        thresholds: When the estimate is unreliable.
        keep_draws: Whether the estimate keeps its draws, for ``to_xarray()`` and ``to_arviz()``.

    Returns:
        The estimate and its diagnostics.

    Raises:
        ValueError: If a number is out of its range. (A loss that is not finite at w* is refused by ``Objective``.)

    Example:
        >>> import torch
        >>> from phasewatch.objective import Objective
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(1000, 3)
        >>> module = torch.nn.Linear(3, 2, bias=False)
        >>> batch = (inputs, module(inputs).detach())
        >>> def half_squared_error(module, batch):
        ...     return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()
        >>> estimate = estimate_llc(Objective(module, [batch], loss_fn=half_squared_error))
        >>> estimate.reliable, abs(estimate.learning_coefficient - 6 / 2) < 0.5
        (True, True)
    """
    n = objective.num_samples if n is None else n
    if n < 2:
        raise ValueError(f"n is {n}; expected the size of the training set, at least 2 (nbeta = n / log n).")
    if chains is None:
        chains = min(MOST_CHAINS, max(CHAINS, CHAINS_TIMES_PARAMETERS // objective.num_parameters))
    check_settings(chains, draws, burn_in, nbeta, localization)
    limits = thresholds or Thresholds()
    wanted = n / math.log(n) if nbeta is None else nbeta
    share = BORNE if nbeta is None else math.inf
    noise = _noise_of_probe(objective, n, localization, wanted, share, seed)
    notes: tuple[str, ...] = ()
    if nbeta is None:
        nbeta = wanted if noise is None else noise.bearable(wanted, BORNE)
        if nbeta < wanted:
            notes = (f"limited by the probe: nbeta is {nbeta:.3g} instead of {wanted:.3g}",)
    quadratic = objective.num_parameters / 2 if noise is None else noise.quadratic(nbeta)
    scale = max(quadratic, LEAST_SCALE)
    bearable = limits.descent * scale
    pilot, before_pilot = None, 0 if noise is None else noise.gradients
    if noise is not None and noise.matrix.objective.num_batches < objective.num_batches and bearable < math.inf:
        pilot = newton_step(objective, noise.matrix, nbeta, localization, enough=bearable)
    if pilot is None or pilot.fall <= bearable:
        before_pilot += 0 if pilot is None else pilot.gradients
        pilot = pilot_descent(
            objective, nbeta, localization, seed=seed, negligible=NEGLIGIBLE_STEP * scale, enough=bearable
        )
    estimate = LLCEstimate(
        nbeta=nbeta,
        localization=localization,
        n=n,
        loss=objective.mean_loss,
        descent=pilot.fall,
        noise_descent=math.nan if noise is None else noise.fall(nbeta),
        quadratic=quadratic,
        chains=chains,
        gradients=pilot.gradients + before_pilot,
        notes=notes,
    )
    del noise  # and the graphs that it has kept
    if pilot.fall > bearable:
        return replace(estimate, reasons=(_not_near_a_minimum(estimate),))
    with isolated():
        posterior = LocalizedPosterior(objective, nbeta, localization, compiled)
        drawn, sample_losses = sample_hmc(posterior, chains=chains, draws=draws, burn_in=burn_in, seed=seed)
    sound = (drawn.acceptance > STUCK) & (np.abs(drawn.energies) < FALLEN).all(axis=1)
    values = drawn.energies[sound] - drawn.heating[sound].mean() if sound.any() else drawn.energies[sound]
    mean = error = rhat = ess = heat_capacity = distance = heating = half_width = math.nan
    virial = virial_error = math.nan
    displacements = dict.fromkeys(objective.parameter_shapes, math.nan)
    if sound.any():
        heating = float(drawn.heating[sound].mean())
        heating_error = float(np.sqrt(np.square(drawn.heating_error[sound]).sum()) / sound.sum())
        mean = float(values.mean())
        sampling_error = diagnostics.standard_error(values)
        if len(values) > 2:
            sampling_error = max(sampling_error, diagnostics.standard_error_between_chains(values))
        error = math.hypot(sampling_error, heating_error, HEATING_ERROR * heating)
        rhat, ess = diagnostics.split_rhat(values), diagnostics.effective_sample_size(values)
        # ESS is itself an estimate: a quarter of it as degrees of freedom gives 95 % coverage on AR(1) chains.
        half_width = float(stats.t.ppf(0.975, max(1.0, ess / 4))) * error if error else 0.0
        heat_capacity = float(values.var(axis=1, ddof=1).mean())
        distance = float(np.sqrt(drawn.squared_distances[sound].mean()))
        virials = drawn.virials[sound] / objective.num_parameters
        virial = float(virials.mean())
        virial_error = diagnostics.standard_error(virials) if virials.shape[1] >= LEAST_DRAWS else math.nan
        moved = np.sqrt(drawn.squared_distances_by_tensor[sound].mean(axis=(0, 1)))
        sizes = [float(tensor.norm()) for tensor in objective.unflatten(objective.parameters).values()]
        shares = [far / size if size else math.inf for far, size in zip(moved.tolist(), sizes, strict=True)]
        displacements = dict(zip(objective.parameter_shapes, shares, strict=True))
    estimate = replace(
        estimate,
        learning_coefficient=mean,
        standard_error=error,
        interval=(mean - half_width, mean + half_width + TAKEN_OFF * abs(mean)),
        rhat=rhat,
        ess=ess,
        acceptance=float(drawn.acceptance[sound].mean()) if sound.any() else 0.0,
        step_size=drawn.step_size,
        heating=heating,
        second_stage_acceptance=float(drawn.second_stage_acceptance[sound].mean()) if sound.any() else 0.0,
        fluctuations=sample_losses.result(n),
        heat_capacity=heat_capacity,
        constant_loss=loss_of_constant_prediction(objective),
        mean_output_loss=loss_of_constant_prediction(objective, fitted=False),
        virial=virial,
        virial_error=virial_error,
        distance=distance,
        displacements=displacements,
        diverged_chains=int((~sound).sum()),
        draws=drawn.energies.shape[1],
        kept_draws=_kept_draws(estimate, drawn.energies[sound], np.flatnonzero(sound)) if keep_draws else None,
        gradients=estimate.gradients + round(posterior.gradients),
    )
    batch_variance = float(drawn.batch_variance[sound].mean()) if sound.any() else math.nan
    reasons = _reasons(estimate, values, batch_variance, objective, posterior.full_gradient, limits)
    return replace(estimate, reliable=not reasons, reasons=reasons)


def _kept_draws(estimate: LLCEstimate, energies: FloatArray, chains: NDArray[np.int64]) -> KeptDraws:
    attributes = {"nbeta": estimate.nbeta, "localization": estimate.localization, "loss_at_w": estimate.loss}
    return KeptDraws("loss", energies / estimate.nbeta, tuple(chains.tolist()), attributes)


def _noise_of_probe(
    objective: Objective, n: int, localization: float, nbeta: float, share: float, seed: int
) -> ProbeNoise | None:
    try:
        return probe_noise(objective, n, localization, nbeta, share=share, seed=seed)
    except (NoOutputsError, NoSecondDerivativeError, NoCurvatureError):
        return None


def _not_near_a_minimum(estimate: LLCEstimate) -> str:
    more = "" if estimate.draws else " or more"  # nothing was gained by descending further
    return f"w* is not near a minimum: nbeta L falls by {estimate.descent:.3g}{more} nearby"


def _reasons(
    estimate: LLCEstimate,
    values: FloatArray,
    noise: float,
    objective: Objective,
    gradient: Tensor,
    limits: Thresholds,
) -> tuple[str, ...]:
    reasons = []
    if estimate.diverged_chains:
        reasons.append(f"{estimate.diverged_chains} of {estimate.chains} chains diverged")
    if estimate.diverged_chains == estimate.chains:
        return tuple(reasons)
    if math.isnan(estimate.rhat):
        reasons.append("the draws do not vary")
    if estimate.rhat > limits.rhat:
        reasons.append(f"the chains disagree (R-hat {estimate.rhat:.2f})")
    if estimate.ess < limits.ess:
        reasons.append(f"too few independent draws ({estimate.ess:.0f})")
    if estimate.acceptance < limits.acceptance:
        reasons.append(f"the chains often stick (acceptance {estimate.acceptance:.2f})")
    if math.isnan(estimate.second_stage_acceptance):
        reasons.append("what minibatches miss was never looked at: more draws or fewer batches are needed")
    elif estimate.second_stage_acceptance < limits.second_stage_acceptance:
        accepted = f"the second stage accepts {estimate.second_stage_acceptance:.2f}"
        reasons.append(f"minibatches miss much of the loss ({accepted}): larger ones are needed")
    mean, heating = estimate.learning_coefficient, estimate.heating
    half = values.shape[1] // 2
    drift = float(values[:, half:].mean() - values[:, :half].mean())
    # Each half has half of the draws: the variance of the difference is four times that of the overall mean.
    drift_error = 2 * diagnostics.standard_error(values)
    if abs(drift) > max(limits.drift * abs(mean), SIGNIFICANCE * drift_error):
        reasons.append(f"the loss still drifts ({drift:+.3g} from one half of the draws to the other)")
    if mean < 0:
        reasons.append("negative: the chains found lower loss than w*")
    elif estimate.descent > limits.descent * mean:
        reasons.append(_not_near_a_minimum(estimate))
    if mean > 0 and estimate.noise_descent > limits.noise * mean:
        reasons.append(
            f"limited by the probe: the choice of its samples alone takes off {estimate.noise_descent:.3g}; a smaller "
            "nbeta or a larger probe is needed"
        )
    if heating > limits.heating * max(abs(mean), 1.0):
        reasons.append(f"the change of batches added {heating:.3g}: larger batches are needed")
    reasons += [
        *_constant_reasons(estimate, objective, gradient, limits),
        *_heat_reasons(estimate, values, noise, limits),
    ]
    return tuple(reasons)


def _constant_reasons(
    estimate: LLCEstimate, objective: Objective, gradient: Tensor, limits: Thresholds
) -> Iterator[str]:
    """What comparison with a network that says the same of every sample speaks against."""
    samples, nbeta, mean = objective.num_samples, estimate.nbeta, estimate.learning_coefficient
    worse = estimate.loss - estimate.mean_output_loss
    # Where the loss is convex in the outputs and weights can level them, the slope at w* must take them there.
    reach = float(gradient.norm() * objective.parameters.norm())
    if samples * worse > WORSE_BY_CHANCE and nbeta * worse > 1 and reach > worse / 2:
        yield f"w* is not near a minimum (one output for all samples would lower nbeta L by {nbeta * worse:.3g})"
    gained = estimate.constant_loss - estimate.loss
    by_chance = max(mean - nbeta * gained, 0.0) / estimate.n * samples
    held = mean <= HELD * estimate.quadratic
    if estimate.lost > limits.lost and not held and samples * gained > BETTER_BY_CHANCE * (1 + by_chance):
        yield (
            f"the chains have left w*: they lost {estimate.lost:.2f} of what it gains on a constant prediction "
            f"(nbeta L rose by {mean:.3g} of {nbeta * gained:.3g})"
        )


def _heat_reasons(estimate: LLCEstimate, values: FloatArray, noise: float, limits: Thresholds) -> Iterator[str]:
    """What the spread of the energies speaks against, to which the change of batches adds ``noise``."""
    mean, heat_capacity = estimate.learning_coefficient, estimate.heat_capacity
    least, largest = (limit * mean for limit in limits.heat_capacity)
    margin = SIGNIFICANCE * diagnostics.standard_error(np.square(values - values.mean(axis=1, keepdims=True)))
    if mean > 0 and heat_capacity < least - margin:
        yield f"the loss hardly varies for its level (heat capacity {heat_capacity:.3g}): the chains are on a plateau"
    if mean > 0 and heat_capacity > largest + margin + noise:
        yield (
            f"the loss varies much for its level (heat capacity {heat_capacity:.3g}): its energies have two modes, or "
            "w* lies above the minimum"
        )


def check_settings(
    chains: int,
    draws: int,
    burn_in: int,
    nbeta: float | None,
    localization: float,
) -> None:
    """Check the settings of :func:`estimate_llc` before there is anything to measure.

    Raises:
        ValueError: If one of them is out of its range.
    """
    if chains < 1:
        raise ValueError(f"chains is {chains}; expected at least 1.")
    if draws < 4:
        raise ValueError(f"draws is {draws}; expected at least 4, or no standard error can be formed.")
    if burn_in < 20:
        raise ValueError(f"burn_in is {burn_in}; expected at least 20, it sets the step size.")
    if nbeta is not None and not (nbeta > 0 and math.isfinite(nbeta)):
        raise ValueError(f"nbeta is {nbeta}; expected a positive number, or None (n / log n at most).")
    if not (localization >= 0 and math.isfinite(localization)):
        raise ValueError(f"localization is {localization}; expected 0 or a positive number.")
