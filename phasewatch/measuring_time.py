"""The time that measurements take in this process, whoever makes them: several may watch one training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_seconds = 0.0


@contextmanager
def measuring() -> Iterator[None]:
    """What is done in it is no training."""
    global _seconds
    began = time.perf_counter()
    try:
        yield
    finally:
        _seconds += max(0.0, time.perf_counter() - began)  # the clock may have been set back


def seconds_measuring() -> float:
    """Wall time of all measurements so far."""
    return _seconds


def training_clock() -> float:
    """A clock, in seconds, that stands still while something is measured."""
    return time.perf_counter() - _seconds
