"""Settings of the wrong type are refused where they are given, not where they are used."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any


def check_types(**settings: Any) -> None:
    """See that each setting is of a type that can be used; whether it is in its range is checked by what uses it.

    Args:
        settings: Name to value, of those that there are in ``EXPECTED``.

    Raises:
        TypeError: If one is not.

    Example:
        >>> check_types(seed=0, probe_samples=512)
        >>> check_types(probe_samples=2.5)
        Traceback (most recent call last):
        TypeError: probe_samples is 2.5; expected a whole number, such as 512
    """
    for name, value in settings.items():
        is_usable, expected = EXPECTED[name]
        if not is_usable(value):
            raise TypeError(f"{name} is {value!r}; expected {expected}")


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _listens(value: Any) -> bool:
    """Whether all methods are there to be called; those of a class still lack the object."""
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in LISTENING)


def _or_none(is_usable: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_usable(value)


LISTENING = ("on_resume", "on_measurement", "on_transitions", "on_end", "close")
"""The methods of ``phasewatch.listener.Listener``."""

EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "probe_samples": (_whole, "a whole number, such as 512"),
    "batch_size": (_or_none(_whole), "a whole number, or None"),
    "n": (_or_none(_whole), "a whole number, the size of the training set, or None"),
    "threads": (_or_none(_whole), "a whole number, or None for as many as training uses"),
    "seed": (_whole, "a whole number"),
    "total_steps": (_or_none(_whole), "a whole number, or None"),
    "max_overhead": (_or_none(_number), "a share of the training time such as 0.1, or None for no limit"),
    "free_seconds": (_number, "a number of seconds such as 60, or 0 for none"),
    "loss_fn": (_or_none(callable), "a function loss_fn(module, batch) -> scalar mean loss"),
    "outputs_fn": (_or_none(callable), "a function outputs_fn(module, batch) -> outputs, or None"),
    "on_transition": (_or_none(callable), "a function on_transition(flag), or None"),
    "say": (_or_none(callable), "a function say(text), or None"),
    "listeners": (
        lambda value: isinstance(value, Sequence) and all(map(_listens, value)),
        f"a list of listeners with {', '.join(LISTENING)}, as phasewatch.tensorboard.TensorBoardWriter(directory)",
    ),
    "step": (_whole, "a whole number, the optimizer steps made so far"),
    "directory": (_or_none(lambda value: isinstance(value, str | os.PathLike)), "a path, or None"),
}
"""Name of a setting to what is usable, and that in words."""
