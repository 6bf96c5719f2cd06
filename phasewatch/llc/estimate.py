"""The local learning coefficient of a loss at w*, with what is needed to judge it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from phasewatch.isolation import isolated
from phasewatch.llc import diagnostics
from phasewatch.llc.posterior import LocalizedPosterior
from phasewatch.llc.sgld import Chains, sample
from phasewatch.objective import Objective


@dataclass(frozen=True)
class LLCEstimate:
    """A local learning coefficient with its uncertainty.

    Attributes:
        learning_coefficient: nbeta (E[L(w)] - L(w*)); negative where w* is not near a minimum, never clipped.
        standard_error: Its standard error, from autocorrelation and the spread between chains.
        interval: 95 % interval (low, high).
        reliable: Whether no check failed.
        reasons: Why it is not reliable, one sentence a failed check.
        rhat: Split R-hat of the loss over the chains that did not diverge; NaN where it cannot be formed.
        ess: Effective number of independent draws.
        acceptance: Mean probability with which Metropolis' rule would have taken the steps of late burn-in.
        step_size: The frozen step, in units of the preconditioned inverse curvature.
        nbeta: Inverse temperature times n.
        localization: Strength of the Gaussian prior around w*.
        n: Data-set size.
        loss: L(w*), the baseline.
        descent: By how much nbeta L could fall from w* to the nearby minimum.
        distance: Root mean square distance of the chains' last draws from w*.
        chains: Number of chains run.
        diverged_chains: How many of them became non-finite; they are left out.
        draws: Draws a chain.
        gradients: Number of minibatch gradients spent in all.
    """

    learning_coefficient: float
    standard_error: float
    interval: tuple[float, float]
    reliable: bool
    reasons: tuple[str, ...]
    rhat: float
    ess: float
    acceptance: float
    step_size: float
    nbeta: float
    localization: float
    n: int
    loss: float
    descent: float
    distance: float
    chains: int
    diverged_chains: int
    draws: int
    gradients: int

    def __repr__(self) -> str:
        """The estimate, its standard error, and why it should not be believed where it should not."""
        verdict = "reliable" if self.reliable else "unreliable: " + "; ".join(self.reasons)
        return f"LLCEstimate(lambda = {self.learning_coefficient:.4g} +- {self.standard_error:.2g}, {verdict})"


def estimate_llc(
    objective: Objective,
    n: int | None = None,
    seed: int = 0,
    *,
    chains: int = 4,
    draws: int = 200,
    burn_in: int = 200,
    nbeta: float | None = None,
    localization: float = 1.0,
    target_acceptance: float = 0.9,
    momentum: float = 0.0,
    precondition: bool = True,
) -> LLCEstimate:
    n = objective.num_samples if n is None else n
    if nbeta is None:
        nbeta = n / math.log(n)
    with isolated():
        posterior = LocalizedPosterior(objective, nbeta, localization)
        ch = sample(posterior, chains=chains, draws=draws, burn_in=burn_in, target_acceptance=target_acceptance,
                    momentum=momentum, precondition=precondition, seed=seed)
    alive = np.isfinite(ch.excess_losses).all(axis=1)
    x = nbeta * ch.excess_losses[alive]
    lam = x.mean() if alive.any() else math.nan
    se = diagnostics.standard_error(x) if alive.any() else math.nan
    ess = diagnostics.effective_sample_size(x) if alive.any() else math.nan
    t = 2.5
    reasons=()
    return LLCEstimate(float(lam), se, (lam-t*se, lam+t*se), not reasons, reasons,
        diagnostics.split_rhat(x) if alive.any() else math.nan, ess, ch.acceptance, ch.step_size, nbeta, localization, n,
        float(np.dot(objective.batch_weights, objective.batch_losses.tolist())), float(-0.5*ch.descents[alive].mean()),
        float(np.sqrt((ch.distances[alive]**2).mean())), chains, int((~alive).sum()), draws, posterior.gradients)
