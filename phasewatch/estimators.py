"""What a watch measures: the estimators with their settings, and how their results become signals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from phasewatch.hessian import ZeroCount, hessian_spectrum
from phasewatch.llc import LLCEstimate, check_settings, estimate_llc, quadratic_llc
from phasewatch.objective import Objective
from phasewatch.record import Estimate, Histogram
from phasewatch.record.signals import CATALOGUE, LLC, LOSS, NORMAL_95, NULLITY, NULLITY_GGN, SPECTRUM
from phasewatch.symmetry import explain_zeros

LEFT_OUT_BELOW = 5000
"""Parameters up to which certified zeros are kept in memory and left out of the bracket, which is narrower then."""


@dataclass(frozen=True)
class Reading:
    """The numbers of one estimator at one step.

    Attributes:
        estimates: Signal name to what was found.
        histograms: Name to distribution.
    """

    estimates: Mapping[str, Estimate]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)


class Estimator(Protocol):
    """Anything that can be measured.

    Each signal that it emits has a row in the catalogue (:mod:`phasewatch.record.signals`), which says what it is
    called, how it is shown and whether transitions are looked for in it; one without is recorded as a detail.
    """

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
        taken = [name for name in (self.name, *map(self._of_part, self.refined)) if name != LLC and name in CATALOGUE]
        if taken:
            raise ValueError(
                f"the signal of a part or of other data would be called {taken[0]!r}, as another signal is: "
                f"{CATALOGUE[taken[0]].title}. Name the data otherwise, or the part by a glob."
            )

    @property
    def name(self) -> str:
        """``llc``, or ``llc_<data>``."""
        return f"{LLC}_{self.data}" if self.data else LLC

    def parts(self, objective: Objective) -> dict[str, Objective]:
        """The loss as a function of each of the parts in ``refined``.

        Raises:
            ValueError: If a name matches no module or parameter.
        """
        return {name: objective.restricted_to(name) for name in self.refined}

    def _of_part(self, part: str) -> str:
        return f"{self.name}_{part}"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``llc`` with standard error, and ``llc_rhat``, ``llc_ess``, ``llc_acceptance``, ``llc_step_size``.

        Also ``llc_<name>`` for every name in ``refined``. On other data all of them are called ``llc_<data>...``.

        Raises:
            ValueError: If a name in ``refined`` matches no module or parameter.
        """
        parts = self.parts(objective)
        found = self._estimate(objective, n, seed)
        estimates = {
            self.name: _coefficient(found),
            f"{self.name}_rhat": Estimate(found.rhat),
            f"{self.name}_ess": Estimate(found.ess),
            f"{self.name}_acceptance": Estimate(found.acceptance),
            f"{self.name}_step_size": Estimate(found.step_size),
        }
        if math.isfinite(found.singular_fluctuation):
            estimates[f"{self.name}_fluctuation"] = Estimate(found.singular_fluctuation)
        for part, restricted in parts.items():
            estimates[self._of_part(part)] = _coefficient(self._estimate(restricted, n, seed))
        return Reading(estimates)

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
        counted = _counted(NULLITY, spectrum.zeros)
        nullity = counted[NULLITY]
        density = spectrum.density
        quadratic = quadratic_llc(
            density.nodes,
            density.weights * objective.num_parameters,
            nbeta=n / math.log(n) if self.nbeta is None else self.nbeta,
            localization=self.localization,
        )
        return Reading(
            {
                "hessian_max": Estimate(
                    spectrum.largest, doubts=_end(spectrum.largest_converged, spectrum.largest_error)
                ),
                "hessian_min": Estimate(
                    spectrum.smallest, doubts=_end(spectrum.smallest_converged, spectrum.smallest_error)
                ),
                "hessian_trace": Estimate(spectrum.trace, spectrum.trace_standard_error),
                "hessian_negative": Estimate(spectrum.num_negative, spectrum.num_negative_standard_error),
                "rank_half": Estimate(
                    (objective.num_parameters - nullity.value) / 2, nullity.standard_error / 2, nullity.doubts
                ),
                "llc_quadratic": Estimate(quadratic),
                **counted,
            },
            histograms={
                SPECTRUM: Histogram(
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
        found: dict[str, float] = {}
        unnamed: tuple[str, ...] = ()
        zeros = known = None
        certified = 0
        if objective.num_parameters <= self.ledger_below:
            ledger = explain_zeros(objective.module, objective, dense_below=self.dense_below, seed=seed)
            zeros, certified = ledger.zeros, ledger.certified
            found = {"zeros_certified": certified, "zeros_generic": ledger.generic}
            for kind, dimensions in ledger.non_generic.items():
                found[_signal("zeros", kind)] = dimensions
            if ledger.unexplained is not None:
                found["zeros_unexplained"] = ledger.unexplained
                if ledger.unexplained:
                    unnamed = tuple(f"not known: {what}" for what in ledger.unknown)
            for layer in ledger.closeness:
                for kind, (distance, _) in layer.distances.items():
                    name = _signal("distance", kind)
                    found[name] = min(distance, found.get(name, math.inf))
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
        estimates = {name: Estimate(value) for name, value in found.items()}
        if unnamed:
            estimates["zeros_unexplained"] = Estimate(found["zeros_unexplained"], doubts=unnamed)
        return Reading({**_counted(NULLITY_GGN, zeros), **estimates})


def _coefficient(found: LLCEstimate) -> Estimate:
    return Estimate(found.learning_coefficient, found.standard_error, found.reasons)


def _end(converged: bool, error: float) -> tuple[str, ...]:
    return () if converged else (f"Lanczos has not converged: off by up to {error:.2g}",)


def _counted(name: str, zeros: ZeroCount) -> dict[str, Estimate]:
    """A number of zeros, NaN where it is not known, and its bracket, read as the 95 % interval of a normal law."""
    if zeros.count is not None:
        count = Estimate(zeros.count, (zeros.upper - zeros.lower) / (2 * NORMAL_95))
    elif zeros.lower > zeros.upper:
        count = Estimate(math.nan, doubts=(zeros.note,))
    else:
        bracket = f"between {zeros.lower} and {zeros.upper}; not resolved below {zeros.threshold:.2g}"
        count = Estimate(math.nan, doubts=(bracket,))
    return {
        name: count,
        f"{name}_lower": Estimate(zeros.lower),
        f"{name}_upper": Estimate(zeros.upper),
        f"{name}_threshold": Estimate(zeros.threshold),
    }


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
        return f"{LOSS}_{self.data}" if self.data else LOSS

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``loss`` and ``gradient_norm``, or ``loss_<data>`` and ``gradient_norm_<data>``."""
        loss, gradient = objective.loss_and_gradient()
        norm = f"gradient_norm_{self.data}" if self.data else "gradient_norm"
        return Reading({self.name: Estimate(loss.item()), norm: Estimate(gradient.norm().item())})
