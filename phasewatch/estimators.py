"""What a watch measures: the estimators with their settings, and how their results become signals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from phasewatch.hessian import ZeroCount, hessian_spectrum
from phasewatch.llc import LLCEstimate, check_settings, estimate_llc, quadratic_llc
from phasewatch.objective import Objective
from phasewatch.record import Histogram
from phasewatch.symmetry import explain_zeros

LEFT_OUT_BELOW = 5000
"""Parameters up to which certified zeros are kept in memory and left out of the bracket, which is narrower then."""


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

    @property
    def name(self) -> str:
        """What failures are recorded under."""
        ...

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
    """The local learning coefficient, see :func:`phasewatch.estimate_llc` for the settings.

    Attributes:
        refined: Names or globs of modules and parameters; the coefficient of each alone, with all others fixed, is
            measured too ("refined": Wang et al. 2024, "Differentiation and specialization of attention heads via the
            refined local learning coefficient").
        data: Name of the data, where they are others than those of the main probe; becomes part of the signals' names.
    """

    chains: int = 4
    draws: int = 400
    burn_in: int = 200
    nbeta: float | None = None
    localization: float = 10.0
    refined: tuple[str, ...] = ()
    data: str = ""

    def __post_init__(self) -> None:
        """Check the settings, long before the first measurement."""
        check_settings(self.chains, self.draws, self.burn_in, self.nbeta, self.localization)
        if isinstance(self.refined, str):
            raise TypeError(f"refined is the string {self.refined!r}; expected a list of names, as [{self.refined!r}].")

    @property
    def name(self) -> str:
        """``llc``, or ``llc_<data>``."""
        return f"llc_{self.data}" if self.data else "llc"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``llc`` with standard error, and ``llc_rhat``, ``llc_ess``, ``llc_acceptance``, ``llc_step_size``.

        Also ``llc_<name>`` for every name in ``refined``. On other data all of them are called ``llc_<data>...``.

        Raises:
            ValueError: If a name in ``refined`` matches no module or parameter.
        """
        parts = {name: objective.restricted_to(name) for name in self.refined}
        estimate = self._estimate(objective, n, seed)
        values = {
            self.name: estimate.learning_coefficient,
            f"{self.name}_rhat": estimate.rhat,
            f"{self.name}_ess": estimate.ess,
            f"{self.name}_acceptance": estimate.acceptance,
            f"{self.name}_step_size": estimate.step_size,
        }
        if math.isfinite(estimate.singular_fluctuation):
            values[f"{self.name}_fluctuation"] = estimate.singular_fluctuation
        errors = {self.name: estimate.standard_error}
        unreliable = {} if estimate.reliable else {self.name: list(estimate.reasons)}
        for part, restricted in parts.items():
            of_part = self._estimate(restricted, n, seed)
            signal = f"{self.name}_{part}"
            values[signal], errors[signal] = of_part.learning_coefficient, of_part.standard_error
            if not of_part.reliable:
                unreliable[signal] = list(of_part.reasons)
        return Reading(values, errors, unreliable)

    def _estimate(self, objective: Objective, n: int, seed: int) -> LLCEstimate:
        return estimate_llc(
            objective,
            n=n,
            seed=seed,
            chains=self.chains,
            draws=self.draws,
            burn_in=self.burn_in,
            nbeta=self.nbeta,
            localization=self.localization,
        )


@dataclass(frozen=True)
class HessianSpectrum:
    """The Hessian spectrum, see :func:`phasewatch.hessian_spectrum` for the settings."""

    num_eigenvalues: int = 5
    dense_below: int = 1500
    nbeta: float | None = None
    localization: float = 10.0
    name = "hessian"

    def __post_init__(self) -> None:
        """Check the settings, long before the first measurement."""
        if self.num_eigenvalues < 1:
            raise ValueError(f"num_eigenvalues is {self.num_eigenvalues}; expected at least 1")

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``hessian_max``, ``_min``, ``_trace`` and ``_negative``, ``nullity`` and ``rank_half``.

        The number of zeros comes with its bracket and threshold (``nullity_lower``, ``nullity_upper``,
        ``nullity_threshold``); it is NaN, and ``rank_half`` with it, where the bracket is too wide for a count
        (:attr:`phasewatch.hessian.ZeroCount.resolved`). Half the rank is the learning coefficient of a model that is
        regular but for them, and ``llc_quadratic`` what an ideal sampler would find if the loss were quadratic
        (:func:`quadratic_llc`).
        """
        spectrum = hessian_spectrum(
            objective,
            seed=seed,
            num_eigenvalues=min(self.num_eigenvalues, objective.num_parameters),
            dense_below=self.dense_below,
        )
        nullity = _count("nullity", spectrum.zeros)
        unreliable = dict(nullity.unreliable)
        if "nullity" in unreliable:
            unreliable["rank_half"] = unreliable["nullity"]
        if not spectrum.largest_converged:
            unreliable["hessian_max"] = [f"Lanczos has not converged: off by up to {spectrum.largest_error:.2g}"]
        if not spectrum.smallest_converged:
            unreliable["hessian_min"] = [f"Lanczos has not converged: off by up to {spectrum.smallest_error:.2g}"]
        density = spectrum.density
        return Reading(
            values={
                "hessian_max": spectrum.largest,
                "hessian_min": spectrum.smallest,
                "hessian_trace": spectrum.trace,
                "hessian_negative": spectrum.num_negative,
                "rank_half": (objective.num_parameters - nullity.values["nullity"]) / 2,
                "llc_quadratic": quadratic_llc(
                    density.nodes,
                    density.weights * objective.num_parameters,
                    nbeta=n / math.log(n) if self.nbeta is None else self.nbeta,
                    localization=self.localization,
                ),
                **nullity.values,
            },
            standard_errors={
                "hessian_trace": spectrum.trace_standard_error,
                "hessian_negative": spectrum.num_negative_standard_error,
                "rank_half": nullity.standard_errors["nullity"] / 2,
                **nullity.standard_errors,
            },
            unreliable=unreliable,
            histograms={
                "hessian_eigenvalues": Histogram(
                    [float(x) for x in density.nodes],
                    [float(w) * objective.num_parameters for w in density.weights],
                )
            },
        )


@dataclass(frozen=True)
class SymmetryLedger:
    """Zeros of the Gauss-Newton matrix by cause, see :func:`phasewatch.explain_zeros`, and how near more of them are.

    Where there are many parameters not all is measured, so that the costs stay those of some dozens of gradients.

    Attributes:
        dense_below: Up to so many parameters all zeros are counted, above they are bracketed.
        ledger_below: Up to so many parameters they are explained.
    """

    dense_below: int = 1500
    ledger_below: int = 1_000_000
    name = "zeros"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``nullity_ggn`` with its bracket, ``zeros_<cause>`` and ``distance_<kind>``.

        The causes are ``certified`` (all that are known), ``generic``, each non-generic kind and, where all zeros are
        counted, ``unexplained``. The distance is that of the units nearest to a kind of degeneracy, 0 if it is there.
        """
        values: dict[str, float] = {}
        unreliable: dict[str, list[str]] = {}
        zeros = known = None
        certified = 0
        if objective.num_parameters <= self.ledger_below:
            ledger = explain_zeros(objective.module, objective, dense_below=self.dense_below, seed=seed)
            zeros, certified = ledger.zeros, ledger.certified
            values = {"zeros_certified": float(certified), "zeros_generic": float(ledger.generic)}
            for kind, dimensions in ledger.non_generic.items():
                values[_signal("zeros", kind)] = float(dimensions)
            if ledger.unexplained is not None:
                values["zeros_unexplained"] = float(ledger.unexplained)
                if ledger.unexplained and ledger.unknown:
                    unreliable["zeros_unexplained"] = [f"not known: {what}" for what in ledger.unknown]
            for layer in ledger.closeness:
                for kind, (distance, _) in layer.distances.items():
                    name = _signal("distance", kind)
                    values[name] = min(distance, values.get(name, math.inf))
            if zeros is None and objective.num_parameters <= LEFT_OUT_BELOW:
                known = ledger.zero_space()
        if zeros is None:
            spectrum = hessian_spectrum(
                objective,
                "gauss-newton",
                seed,
                num_eigenvalues=1,
                dense_below=0,
                num_steps=32,
                num_probes=1,
                known_zeros=known,
            )
            zeros = spectrum.zeros.certified_by(certified)
        count = _count("nullity_ggn", zeros)
        return Reading({**count.values, **values}, count.standard_errors, {**count.unreliable, **unreliable})


def _count(name: str, zeros: ZeroCount) -> Reading:
    """A number of zeros, NaN where it is not known, and its bracket, read as the 95 % interval of a normal law."""
    count, error, unreliable = math.nan, math.nan, {}
    if zeros.count is not None:
        count, error = float(zeros.count), (zeros.upper - zeros.lower) / (2 * 1.96)
    elif zeros.lower > zeros.upper:
        unreliable[name] = [zeros.note]
    else:
        unreliable[name] = [f"between {zeros.lower} and {zeros.upper}; not resolved below {zeros.threshold:.2g}"]
    return Reading(
        values={
            name: count,
            f"{name}_lower": float(zeros.lower),
            f"{name}_upper": float(zeros.upper),
            f"{name}_threshold": zeros.threshold,
        },
        standard_errors={name: error},
        unreliable=unreliable,
    )


def _signal(what: str, kind: str) -> str:
    return f"{what}_{kind.replace(' ', '_')}"


@dataclass(frozen=True)
class ProbeLoss:
    """The loss on the probe and the length of its gradient: what every other signal is read beside.

    Attributes:
        data: Name of the data, where they are others than those of the main probe.
    """

    data: str = ""

    @property
    def name(self) -> str:
        """``loss``, or ``loss_<data>``."""
        return f"loss_{self.data}" if self.data else "loss"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``loss`` and ``gradient_norm``, or ``loss_<data>`` and ``gradient_norm_<data>``."""
        loss, gradient = objective.loss_and_gradient()
        norm = f"gradient_norm_{self.data}" if self.data else "gradient_norm"
        return Reading({self.name: loss.item(), norm: gradient.norm().item()})


def mask_non_finite(reading: Reading) -> Reading:
    """The same reading with every value that is not finite marked as unreliable."""
    bad = {name: ["is not finite"] for name, value in reading.values.items() if not math.isfinite(value)}
    if not bad:
        return reading
    return Reading(reading.values, reading.standard_errors, {**bad, **reading.unreliable}, reading.histograms)
