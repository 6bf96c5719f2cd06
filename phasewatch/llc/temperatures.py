"""The learning coefficient at several temperatures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from phasewatch.llc.estimate import LLCEstimate, estimate_llc
from phasewatch.objective import Objective


def llc_by_temperature(objective: Objective, nbetas: Sequence[float], **settings: Any) -> list[LLCEstimate]:
    """Estimate the learning coefficient at several inverse temperatures.

    Where the estimates agree, the loss has its asymptotic form at that scale; a small nbeta looks at a wider
    neighbourhood of w*. No multiplicity comes out of it: fits to such sweeps missed the exact one by more than 0.3.

    Args:
        objective: The loss, on a fixed probe.
        nbetas: Inverse temperatures times n, in any order.
        settings: As for :func:`estimate_llc`, but for ``nbeta``.

    Returns:
        An estimate for each of ``nbetas``, in their order.

    Raises:
        ValueError: If there is none, one is not positive, or another setting is out of its range.
    """
    if not len(nbetas):
        raise ValueError("nbetas is empty; expected at least one positive number.")
    bad = [nbeta for nbeta in nbetas if not (nbeta > 0 and math.isfinite(nbeta))]
    if bad:
        raise ValueError(f"nbetas holds {bad}; expected positive numbers.")
    return [estimate_llc(objective, nbeta=float(nbeta), **settings) for nbeta in nbetas]
