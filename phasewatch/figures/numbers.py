"""How steps and values are written for a person to read."""

from __future__ import annotations

import math


def format_step(step: float) -> str:
    """A training step: ``12,000``, from a million on ``1.2346M``."""
    return f"{step:,.0f}" if step < 999_999.5 else f"{step / 1e6:.5g}M"


def format_span(low: float, high: float) -> str:
    """Two steps: ``1,180-1,300``, or one where both read the same."""
    first, last = format_step(low), format_step(high)
    return first if first == last else f"{first}-{last}"


def format_value(value: float, digits: int = 3) -> str:
    """A value to so many significant digits, with an exponent only where it would be unreadable without."""
    if not math.isfinite(value):
        return "unknown"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    # Rounded first: 9.998 has two digits before the point once it is written with three.
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def format_change(before: float, after: float, arrow: str) -> str:
    """Two values with as many digits as it takes to tell them apart: ``13.1 -> 13.4``."""
    texts = format_value(before), format_value(after)
    for digits in () if before == after else (3, 4, 5, 6):
        texts = format_value(before, digits), format_value(after, digits)
        if texts[0] != texts[1]:
            break
    return f"{texts[0]} {arrow} {texts[1]}"
