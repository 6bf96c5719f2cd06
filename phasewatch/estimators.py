"""What a watch measures: the estimators with their settings, and how their results become signals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from phasewatch.hessian import hessian_spectrum
from phasewatch.llc import check_settings, estimate_llc
from phasewatch.objective import Objective
from phasewatch.record import Histogram

WIDEST_BRACKET = 0.01
"""Share of the parameters up to which a bracket around the number of zero eigenvalues counts as a measurement."""


@dataclass(frozen=True)
class Reading:
    """The numbers of one estimator at one step.

    Attributes:
        values: Signal name to value.
        standard_errors: Signal name to standard error.
        unreliable: Signal name to the reasons not to trust its value.
        histograms: Name to distribution.
    """

    values: Mapping[str, float]
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    unreliable: Mapping[str, list[str]] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)


class Estimator(Protocol):
    """Anything that a watch can measure."""

    name: str

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Measure on frozen weights.

        Args:
            objective: The loss on the probe.
            n: Size of the training set.
            seed: Seeds all randomness.
        """
        ...


@dataclass(frozen=True)
class LearningCoefficient:
    """The local learning coefficient, see :func:`phasewatch.estimate_llc` for the settings."""

    chains: int = 4
    draws: int = 100
    burn_in: int = 100
    nbeta: float | None = None
    localization: float = 1.0
    name = "llc"

    def __post_init__(self) -> None:
        """Check the settings, long before the first measurement."""
        check_settings(self.chains, self.draws, self.burn_in, self.nbeta, self.localization)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``llc`` with standard error, ``llc_rhat``, ``llc_ess``, ``llc_acceptance``, ``llc_step_size``."""
        estimate = estimate_llc(
            objective,
            n=n,
            seed=seed,
            chains=self.chains,
            draws=self.draws,
            burn_in=self.burn_in,
            nbeta=self.nbeta,
            localization=self.localization,
        )
        return Reading(
            values={
                "llc": estimate.learning_coefficient,
                "llc_rhat": estimate.rhat,
                "llc_ess": estimate.ess,
                "llc_acceptance": estimate.acceptance,
                "llc_step_size": estimate.step_size,
            },
            standard_errors={"llc": estimate.standard_error},
            unreliable={} if estimate.reliable else {"llc": list(estimate.reasons)},
        )


@dataclass(frozen=True)
class HessianSpectrum:
    """The Hessian spectrum, see :func:`phasewatch.hessian_spectrum` for the settings."""

    num_eigenvalues: int = 5
    dense_below: int = 1500
    name = "hessian"

    def __post_init__(self) -> None:
        """Check the settings, long before the first measurement."""
        if self.num_eigenvalues < 1:
            raise ValueError(f"num_eigenvalues is {self.num_eigenvalues}; expected at least 1")

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``hessian_max``, ``hessian_min``, ``hessian_trace``, ``nullity`` with its bracket and threshold."""
        spectrum = hessian_spectrum(
            objective,
            seed=seed,
            num_eigenvalues=min(self.num_eigenvalues, objective.num_parameters),
            dense_below=self.dense_below,
        )
        zeros = spectrum.zeros
        unreliable = {}
        width = zeros.upper - zeros.lower
        if width > WIDEST_BRACKET * objective.num_parameters:
            unreliable["nullity"] = [
                f"between {zeros.lower} and {zeros.upper}; not resolved below {zeros.threshold:.2g}"
            ]
        if not spectrum.converged:
            reason = "Lanczos has not converged"
            unreliable |= {"hessian_max": [reason], "hessian_min": [reason]}
        density = spectrum.density
        return Reading(
            values={
                "hessian_max": spectrum.largest,
                "hessian_min": spectrum.smallest,
                "hessian_trace": spectrum.trace,
                "nullity": float(spectrum.nullity),
                "nullity_lower": float(zeros.lower),
                "nullity_upper": float(zeros.upper),
                "nullity_threshold": zeros.threshold,
            },
            # the bracket read as the 95 % interval of a normal law
            standard_errors={"hessian_trace": spectrum.trace_standard_error, "nullity": width / (2 * 1.96)},
            unreliable=unreliable,
            histograms={
                "hessian_eigenvalues": Histogram(
                    [float(x) for x in density.nodes],
                    [float(w) * objective.num_parameters for w in density.weights],
                )
            },
        )


@dataclass(frozen=True)
class ProbeLoss:
    """The loss on the probe and the length of its gradient: what every other signal is read beside."""

    name = "loss"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``loss`` and ``gradient_norm``."""
        loss, gradient = objective.loss_and_gradient()
        return Reading({"loss": loss.item(), "gradient_norm": gradient.norm().item()})


def mask_non_finite(reading: Reading) -> Reading:
    """The same reading with every value that is not finite marked as unreliable."""
    bad = {name: ["is not finite"] for name, value in reading.values.items() if not math.isfinite(value)}
    if not bad:
        return reading
    return Reading(reading.values, reading.standard_errors, {**bad, **reading.unreliable}, reading.histograms)
