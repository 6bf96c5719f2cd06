"""Records that the tests here share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phasewatch.record import Estimate, Histogram, Journal, Measurement

HEADER: dict[str, Any] = {"schema_version": 2, "n": 100, "created": 1.75e9}


def measurement(step: int, llc: float = 1.5) -> Measurement:
    return Measurement(
        step,
        {"loss": Estimate(1 / (step + 1)), "llc": Estimate(llc, 0.1, ("too few draws",) if step % 2 else ())},
        {"hessian_eigenvalues": Histogram([0.0, 1.0], [3.0, 4.0])},
        0.5,
        1e9,
    )


def begin(directory: Path, steps: range = range(6), llc: float = 1.5) -> Journal:
    """A record that is still open."""
    journal = Journal(directory)
    journal.append("header", HEADER)
    for step in steps:
        journal.append("measurement", measurement(step, llc).to_dict())
    return journal


def write(directory: Path, steps: range = range(6), llc: float = 1.5) -> Path:
    """The file of a run that has ended."""
    journal = begin(directory, steps, llc)
    journal.append("end", {"time": 1e9})
    journal.close()
    assert journal.path is not None
    return journal.path
