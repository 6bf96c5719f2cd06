"""Who is told of what a watch has found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from phasewatch.analysis import Analysis
from phasewatch.record import Flag, Measurement, Run, Transition


class Listener(Protocol):
    """Takes what a watch has found, for example :class:`phasewatch.tensorboard.TensorBoardWriter`."""

    def on_resume(self, run: Run) -> None:
        """The watch goes on from an earlier process; ``run`` holds what that one recorded."""
        ...

    def on_measurement(self, measurement: Measurement) -> None:
        """A measurement was recorded."""
        ...

    def on_transitions(self, step: int, flags: Sequence[Flag], standing: Sequence[Transition]) -> None:
        """The detector has looked at the measurement at ``step``: what it flagged, revised or withdrew, mostly nothing.

        ``standing`` are all transitions as of now. Once the run is over it may withdraw some more.
        """
        ...

    def on_end(self, analysis: Analysis) -> None:
        """The run is over, and was analysed as a whole."""
        ...

    def close(self) -> None:
        """Release files."""
        ...
