"""Plain values out of a record or a checkpoint, each checked to be what is expected of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LARGEST_WHOLE = 2**53
"""Up to here every whole number is a float too; no run has so many steps or lines."""


def number(value: Any, what: str) -> float:
    """A float; NaN and infinities too.

    Raises:
        ValueError: If it is no number, or a larger one than a float can hold.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is {_shown(value)}; expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{what} is {_shown(value)}; expected one that a float holds") from error


def number_or_none(value: Any, what: str) -> float | None:
    """Likewise, or None."""
    return None if value is None else number(value, what)


def numbers(value: Any, what: str, count: int | None = None) -> list[float]:
    """A list of numbers, where ``count`` is given so many; None in it stands for NaN.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, (list, tuple)) or count not in (None, len(value)):
        expected = "numbers" if count is None else f"{count} numbers"
        raise ValueError(f"{what} is {_shown(value)}; expected a list of {expected}")
    return [math.nan if entry is None else number(entry, what) for entry in value]


def whole(value: Any, what: str) -> int:
    """A whole number from 0.

    Raises:
        ValueError: If it is none, or a larger one than can be.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_WHOLE:
        raise ValueError(f"{what} is {_shown(value)}; expected a whole number from 0 to 2**53")
    return value


def place(value: Any, what: str) -> float:
    """A place in a run, in steps, where it may lie between two.

    Raises:
        ValueError: If it is none, or further than there can be steps.
    """
    found = number(value, what)
    if not abs(found) <= LARGEST_WHOLE:
        raise ValueError(f"{what} is {found:g}; expected a number of steps")
    return found


def text(value: Any, what: str) -> str:
    """A string.

    Raises:
        ValueError: If it is none.
    """
    return _checked(value, str, what, "text")


def texts(value: Any, what: str) -> list[str]:
    """A list of strings.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{what} is {_shown(value)}; expected a list of texts")
    return [text(entry, what) for entry in value]


def truth(value: Any, what: str) -> bool:
    """True or False.

    Raises:
        ValueError: If it is neither.
    """
    return _checked(value, bool, what, "true or false")


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """Names to values.

    Raises:
        ValueError: If it is none.
    """
    return _checked(value, Mapping, what, "names and values")


def member(plain: Mapping[str, Any], name: str) -> Any:
    """What stands under a name.

    Raises:
        ValueError: If there is nothing.
    """
    if name not in plain:
        raise ValueError(f"has no {name!r}")
    return plain[name]


def _checked(value: Any, kind: type, what: str, expected: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {_shown(value)}; expected {expected}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        return f"a number of {value.bit_length()} bits"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
