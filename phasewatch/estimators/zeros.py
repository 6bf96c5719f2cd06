"""Zeros by cause as signals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from phasewatch.estimators.enough import LARGE, ROWS, enough
from phasewatch.estimators.price import Price, Size
from phasewatch.estimators.reading import Reading
from phasewatch.estimators.spectrum import IN_DOUBLE_PRECISION
from phasewatch.estimators.zero_count import counted
from phasewatch.hessian import ZeroCount, hessian_spectrum
from phasewatch.objective import Objective
from phasewatch.record import Estimate
from phasewatch.record.signals import NULLITY_GGN
from phasewatch.symmetry import explain_zeros

STEPS, STEPS_OF_LARGE = 8, 4
"""Products of the first Lanczos run of the bracket, the second takes half as many: it is wide, and ten times as many do
not make it narrow enough for a count. Chosen."""
LEDGER = 16
"""Products that explaining the zeros takes about as long as, see benchmarks/results/price.md."""


@dataclass(frozen=True)
class SymmetryLedger:
    """Zeros of the Gauss-Newton matrix by cause, see :func:`phasewatch.explain_zeros`, and how near more of them are.

    Where there are many parameters not all is measured, so that the costs stay those of some dozens of gradients. From
    20,000 on the first samples alone are looked at, 512 or as many as hold so many positions of sequences, and the
    bracket's upper end is that of the first of them: what is zero in all is zero in each.

    Attributes:
        dense_below: Up to so many parameters all zeros are counted, above they are bracketed.
        ledger_below: Up to so many parameters they are explained.
    """

    dense_below: int = 1_000
    ledger_below: int = 1_000_000
    name = "zeros"

    def price(self, size: Size) -> Price:
        """All columns and as much again to explain the zeros, or short Lanczos runs and a recording of the network."""
        if size.num_parameters <= self.dense_below:
            return Price(products=size.num_parameters) * size.num_batches
        batches = size.batches_of(ROWS) if size.num_parameters >= LARGE else size.num_batches
        return Price(products=(1.5 * STEPS + LEDGER) * IN_DOUBLE_PRECISION) * batches

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``nullity_ggn`` with its bracket, ``zeros_<cause>`` and ``distance_<kind>``.

        The causes are ``certified`` (all that are known), ``generic``, each non-generic kind, ``probe`` (what a larger
        probe would not leave unseen) and, where all zeros are counted, ``unexplained``. The distance is that of the
        units nearest to a kind of degeneracy, 0 if it is there.
        """
        found: dict[str, float] = {}
        unnamed: tuple[str, ...] = ()
        zeros = None
        certified = 0
        large = objective.num_parameters >= LARGE
        objective = enough(objective) if large else objective
        if objective.num_parameters <= self.ledger_below:
            ledger = explain_zeros(objective.module, objective, dense_below=self.dense_below, seed=seed)
            zeros, certified = ledger.zeros, ledger.certified
            found = {"zeros_certified": certified, "zeros_generic": ledger.generic, "zeros_probe": ledger.probe}
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
        if zeros is None:
            zeros = _beyond(objective, seed) if large else _bracket(objective, seed)
            zeros = zeros.certified_by(certified)
        estimates = {name: Estimate(value) for name, value in found.items()}
        if unnamed:
            estimates["zeros_unexplained"] = Estimate(found["zeros_unexplained"], doubts=unnamed)
        return Reading({**counted(NULLITY_GGN, zeros), **estimates})


def _signal(what: str, kind: str) -> str:
    return f"{what}_{kind.replace(' ', '_')}"


def _bracket(objective: Objective, seed: int, steps: int = STEPS, precise: bool = True) -> ZeroCount:
    return hessian_spectrum(
        objective,
        "gauss-newton",
        seed,
        num_eigenvalues=1,
        dense_below=0,
        num_steps=steps,
        num_probes=1,
        precise=precise,
    ).zeros


def _beyond(objective: Objective, seed: int) -> ZeroCount:
    """At most so many zeros: as many as the first batch has, whose matrix is one of several that add up."""
    first = _bracket(objective.first_batches(1), seed, STEPS_OF_LARGE, precise=False)
    return replace(first, guess=0, lower=0, threshold=first.threshold * objective.batch_weights[0])
