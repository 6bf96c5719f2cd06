"""What a quadratic loss would say: a check of the learning coefficient from the Hessian alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def quadratic_llc(
    eigenvalues: ArrayLike, counts: ArrayLike | None = None, *, nbeta: float, localization: float = 0.3
) -> float:
    r"""Learning-coefficient estimate that perfect sampling of a quadratic loss would give.

    :math:`\tfrac12 \sum_i h_i / (h_i + \gamma / n\beta)` over the positive Hessian eigenvalues: each direction counts
    one half if its curvature is large against the localization, nothing if it is flat (the effective number of
    parameters of MacKay 1992, "Bayesian interpolation", eq. 4.9, halved). A true learning coefficient that is larger
    comes from directions that are flat to second order only, one that is smaller from curvature that fades away from
    w*. Between d/2 and it lies what symmetry and degeneracy take off; half the rank counts every eigenvalue alike.

    Args:
        eigenvalues: Of the Hessian, all of them; or the nodes of a density.
        counts: How often each counts, as the weights of a density times the number of parameters; default once.
        nbeta: Inverse temperature times n, as in :func:`phasewatch.estimate_llc`.
        localization: Precision gamma, likewise.

    Raises:
        ValueError: If ``nbeta`` is not positive or ``localization`` is negative.

    Example:
        >>> round(quadratic_llc([0.0, 1.0, 4.0], nbeta=1000, localization=1.0), 4)  # two curved directions of three
        0.9994
    """
    if not (nbeta > 0 and localization >= 0):
        raise ValueError(f"nbeta is {nbeta}, localization {localization}; expected a positive number and at least 0.")
    values = np.asarray(eigenvalues, dtype=float)
    curved = values[values > 0]
    weights = np.ones_like(curved) if counts is None else np.asarray(counts, dtype=float)[values > 0]
    return float(np.sum(weights * curved / (curved + localization / nbeta)) / 2)
