"""Numbers of zero eigenvalues as signals."""

from __future__ import annotations

import math

from phasewatch.hessian import ZeroCount
from phasewatch.record import Estimate
from phasewatch.record.signals import NORMAL_95


def counted(name: str, zeros: ZeroCount) -> dict[str, Estimate]:
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
