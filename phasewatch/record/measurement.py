"""What was measured at one step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Histogram:
    """A distribution as weighted points, for example the eigenvalues of the Hessian.

    Attributes:
        positions: Where the mass lies, ascending.
        weights: How much lies there, in counts.
    """

    positions: list[float]
    weights: list[float]


@dataclass(frozen=True)
class Measurement:
    """All numbers measured on the weights as they were at one training step.

    Attributes:
        step: Optimizer steps made before the measurement.
        values: Signal name to value.
        standard_errors: Signal name to standard error, for signals that have one.
        unreliable: Signal name to the reasons why its value is not to be trusted; absent means trustworthy.
        histograms: Name to distribution.
        seconds: Wall time that the measurement took.
        time: Unix time when it was finished.
    """

    step: int
    values: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)
    unreliable: dict[str, list[str]] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    seconds: float = 0.0
    time: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, as it stands in the record and in checkpoints."""
        return {
            "step": self.step,
            "values": {name: _finite_or_none(value) for name, value in self.values.items()},
            "standard_errors": {name: _finite_or_none(value) for name, value in self.standard_errors.items()},
            "unreliable": {name: list(reasons) for name, reasons in self.unreliable.items()},
            "histograms": {
                name: {"positions": list(h.positions), "weights": list(h.weights)}
                for name, h in self.histograms.items()
            },
            "seconds": self.seconds,
            "time": self.time,
        }

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Measurement:
        """Inverse of :meth:`to_dict`; a number that was not finite comes back as NaN."""
        return cls(
            step=int(body["step"]),
            values={name: _nan_if_none(value) for name, value in body["values"].items()},
            standard_errors={name: _nan_if_none(value) for name, value in body["standard_errors"].items()},
            unreliable={name: list(reasons) for name, reasons in body["unreliable"].items()},
            histograms={name: Histogram(**h) for name, h in body["histograms"].items()},
            seconds=float(body["seconds"]),
            time=float(body["time"]),
        )


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else float(value)
