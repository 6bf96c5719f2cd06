"""The Hessian spectrum as signals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phasewatch.estimators.enough import LARGE, enough
from phasewatch.estimators.price import Price, Size
from phasewatch.estimators.reading import Reading
from phasewatch.estimators.zero_count import counted
from phasewatch.hessian import hessian_spectrum
from phasewatch.llc import quadratic_llc
from phasewatch.objective import Objective
from phasewatch.record import Estimate, Histogram
from phasewatch.record.signals import NULLITY, SPECTRUM

IN_DOUBLE_PRECISION = 2.0
"""Products in float64 take so many in float32. Chosen: as many times the bytes."""
STEPS, STEPS_OF_LARGE = 16, 12
"""Products of the first Lanczos run, and of that of a large network; the second run takes half as many. Chosen."""
TOLERANCE = 0.01
"""Residual at which the greatest and the least eigenvalue count as found, relative to the larger one. Chosen."""
ROWS_OF_LARGE = 64
"""Samples of which a large network's spectrum is, or four sequences; no more of the probe is looked at. Chosen."""


@dataclass(frozen=True)
class HessianSpectrum:
    """The Hessian spectrum, see :func:`phasewatch.hessian_spectrum` for the settings.

    Of networks from 20,000 parameters on it is that of the first samples alone, and in single precision: there are so
    many eigenvalues next to zero that their number would not be known in double precision either. The standard error
    of the greatest and of the least eigenvalue is then by how much half of these samples say something else.
    """

    num_eigenvalues: int = 5
    dense_below: int = 1_000
    nbeta: float | None = None
    localization: float = 10.0
    name = "hessian"

    def __post_init__(self) -> None:
        """Check the settings, long before the first measurement."""
        if self.num_eigenvalues < 1:
            raise ValueError(f"num_eigenvalues is {self.num_eigenvalues}; expected at least 1")

    def price(self, size: Size) -> Price:
        """A column in a block takes half of a product alone; else Lanczos runs, of large networks on few samples."""
        if size.num_parameters >= LARGE:
            return Price(products=2 * STEPS_OF_LARGE) * size.batches_of(ROWS_OF_LARGE)
        dense = size.num_parameters <= self.dense_below
        products = size.num_parameters / 2 if dense else 1.5 * STEPS * IN_DOUBLE_PRECISION
        return Price(products=products) * size.num_batches

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``hessian_max``, ``_min``, ``_trace`` and ``_negative``, ``nullity`` and ``rank_half``.

        The number of zeros comes with its bracket and threshold (``nullity_lower``, ``nullity_upper``,
        ``nullity_threshold``); it is NaN, and ``rank_half`` with it, where the bracket is too wide for a count
        (:attr:`phasewatch.hessian.ZeroCount.resolved`). Half the rank is the learning coefficient of a model that is
        regular but for them, and ``llc_quadratic`` what an ideal sampler would find if the loss were quadratic
        (:func:`quadratic_llc`).
        """
        large = objective.num_parameters >= LARGE
        seen = enough(objective, ROWS_OF_LARGE) if large else objective
        spectrum = hessian_spectrum(
            seen,
            seed=seed,
            num_eigenvalues=min(self.num_eigenvalues, objective.num_parameters),
            dense_below=self.dense_below,
            num_steps=STEPS_OF_LARGE if large else STEPS,
            num_probes=1,
            tolerance=TOLERANCE,
            precise=not large,
            half=seen.on_half() if large else None,
        )
        zeros = counted(NULLITY, spectrum.zeros)
        nullity = zeros[NULLITY]
        density = spectrum.density
        if self.nbeta is None and n < 2:
            quadratic = Estimate(math.nan, doubts=(f"n is {n}, for which n / log n is no temperature",))
        else:
            quadratic = Estimate(
                quadratic_llc(
                    density.nodes,
                    density.weights * objective.num_parameters,
                    nbeta=n / math.log(n) if self.nbeta is None else self.nbeta,
                    localization=self.localization,
                )
            )
        return Reading(
            {
                "hessian_max": Estimate(
                    spectrum.largest,
                    spectrum.largest_by_samples,
                    _end(spectrum.largest_converged, spectrum.largest_error),
                ),
                "hessian_min": Estimate(
                    spectrum.smallest,
                    spectrum.smallest_by_samples,
                    _end(spectrum.smallest_converged, spectrum.smallest_error),
                ),
                "hessian_trace": Estimate(spectrum.trace, spectrum.trace_standard_error),
                "hessian_negative": Estimate(spectrum.num_negative, spectrum.num_negative_standard_error),
                "rank_half": Estimate(
                    (objective.num_parameters - nullity.value) / 2, nullity.standard_error / 2, nullity.doubts
                ),
                "llc_quadratic": quadratic,
                **zeros,
            },
            histograms={
                SPECTRUM: Histogram(
                    [float(x) for x in density.nodes],
                    [float(w) * objective.num_parameters for w in density.weights],
                )
            },
        )


def _end(converged: bool, error: float) -> tuple[str, ...]:
    return () if converged else (f"Lanczos has not converged: off by up to {error:.2g}",)
