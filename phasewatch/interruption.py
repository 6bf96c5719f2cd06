"""Signals that end a run, or warn of its end: a measurement stops soon, and what must not be torn is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HELD = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # the latter are warnings of a scheduler
    if hasattr(signal, name)  # Windows has two of them
)

_before: dict[int, Any] = {}
_arrived: list[int] = []


class Interrupted(BaseException):
    """A measurement was stopped by a signal, of which the handler is yet to be called."""

    def __init__(self, signum: int) -> None:
        """Name the signal."""
        super().__init__(signal.Signals(signum).name)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that arrive inside are handled on the way out, by the handlers that were there before.

    Meanwhile :func:`safe_point` stops what is measured; the ``Interrupted`` that it raises ends here. Ctrl-C pressed
    twice is not held back a second time. A signal that has no handler of Python's does what it does always. Inside
    another one it does nothing, nor outside of the main thread, where no signal is handled.
    """
    if _before or threading.current_thread() is not threading.main_thread():
        yield
        return
    for signum in _HELD:
        handler = signal.getsignal(signum)
        if callable(handler):  # not those of the system, which wait for nothing
            _before[signum] = handler
            signal.signal(signum, _hold)
    try:
        yield
    except Interrupted:
        pass
    finally:
        for signum, handler in _before.items():
            if signal.getsignal(signum) is _hold:
                signal.signal(signum, handler)
        arrived = list(_arrived)
        _before.clear()
        _arrived.clear()
        _deliver(arrived)


def safe_point() -> None:
    """Stop here if a signal was held back: nothing is half done."""
    if _arrived and threading.current_thread() is threading.main_thread():
        raise Interrupted(_arrived[0])


def _hold(signum: int, frame: Any) -> None:
    if signum in _arrived:
        if signum == signal.SIGINT:
            _before[signum](signum, frame)
        return
    _arrived.append(signum)


def _deliver(arrived: list[int]) -> None:
    """Each to its handler, whatever the one before has raised."""
    if arrived:
        try:
            signal.raise_signal(arrived[0])
        finally:
            _deliver(arrived[1:])
