"""The learning coefficient of the loss as a signal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phasewatch.estimators.parts import check_names, check_refined, named, restricted
from phasewatch.estimators.price import Price, Size
from phasewatch.estimators.reading import Reading
from phasewatch.llc import LLCEstimate, check_settings, estimate_llc
from phasewatch.llc.probe_noise import FEW, MORE
from phasewatch.objective import Objective
from phasewatch.record import Estimate
from phasewatch.record.signals import LLC

_NOISE, _PILOT = 60, 40
"""Gradients before the chains, of each batch that is looked at closely and of all."""
_MOVE = 1.5
"""Gradients of a batch that a move of a chain takes as long as, with what is looked at beside it. Chosen, above
what benchmarks/results/llc.md has."""


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
        check_refined(self.refined)
        check_names(name for name in (self.name, *map(self._of_part, self.refined)) if name != LLC)

    @property
    def name(self) -> str:
        """``llc``, or ``llc_<data>``."""
        return named(LLC, self.data)

    def parts(self, objective: Objective) -> dict[str, Objective]:
        """The loss as a function of each of the parts in ``refined``.

        Raises:
            ValueError: If a name matches no module or parameter.
        """
        return restricted(objective, self.refined)

    def price(self, size: Size) -> Price:
        """What is known of it: the chains, on one batch at a time, and before them a pilot on all."""
        chains = _MOVE * self.chains * (self.burn_in + self.draws)
        before = _NOISE * min(size.num_batches, FEW + MORE) + _PILOT * size.num_batches
        return Price(before + chains) * (1 + len(self.refined))

    def _of_part(self, part: str) -> str:
        return named(self.name, part)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``llc`` with standard error, and ``llc_rhat``, ``llc_ess``, ``llc_acceptance``, ``llc_step_size``.

        ``llc_nbeta`` is the inverse temperature, n / log n or what the probe bears.
        Also ``llc_<name>`` for every name in ``refined``, at the nbeta of the whole, so that no part can exceed it. On
        other data all of them are called ``llc_<data>...``. Where the weights are not near a minimum nothing is
        sampled; all are NaN then, and ``llc`` says why.

        Raises:
            ValueError: If a name in ``refined`` matches no module or parameter.
        """
        parts = self.parts(objective)
        found = self._estimate(objective, n, seed, self.nbeta)
        of_chains = {
            "rhat": found.rhat,
            "ess": found.ess,
            "acceptance": found.acceptance,
            "step_size": found.step_size,
            "fluctuation": found.singular_fluctuation,
        }
        if found.draws and not math.isfinite(found.singular_fluctuation):
            del of_chains["fluctuation"]
        doubts = () if found.draws else ("nothing was sampled",)
        estimates = {self.name: _coefficient(found), f"{self.name}_nbeta": Estimate(found.nbeta)}
        estimates.update({f"{self.name}_{what}": Estimate(value, doubts=doubts) for what, value in of_chains.items()})
        for part, alone in parts.items():
            estimates[self._of_part(part)] = _coefficient(self._estimate(alone, n, seed, found.nbeta))
        return Reading(estimates)

    def _estimate(self, objective: Objective, n: int, seed: int, nbeta: float | None) -> LLCEstimate:
        return estimate_llc(
            objective,
            n=n,
            seed=seed,
            chains=self.chains,
            draws=self.draws,
            burn_in=self.burn_in,
            nbeta=nbeta,
            localization=self.localization,
        )


def _coefficient(found: LLCEstimate) -> Estimate:
    return Estimate(found.learning_coefficient, found.standard_error, found.reasons)
