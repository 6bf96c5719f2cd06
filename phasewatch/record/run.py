"""A recorded run, read back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.record.ledger import (
    FILE_NAME,
    SCHEMA_VERSION,
    DamagedLine,
    RecordError,
    read_lines,
)
from phasewatch.record.measurement import Measurement
from phasewatch.record.transition import Flag, Transition, standing_transitions

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Series:
    """One signal over training.

    Attributes:
        name: Name of the signal.
        steps: Training steps, ascending, shape ``(k,)``, int64.
        values: Shape ``(k,)``, float64.
        standard_errors: Shape ``(k,)``; NaN where none was stated.
        reliable: Shape ``(k,)``, bool.
    """

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    standard_errors: NDArray[np.float64]
    reliable: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of points."""
        return len(self.steps)

    def __repr__(self) -> str:
        """Name, length and range."""
        if not len(self):
            return f"Series({self.name!r}, empty)"
        return (
            f"Series({self.name!r}, {len(self)} points, steps {self.steps[0]}..{self.steps[-1]}, "
            f"{(~self.reliable).sum()} unreliable)"
        )


@dataclass(frozen=True)
class Run:
    """What a run record holds.

    Attributes:
        path: The file, or None for a run in memory.
        header: What produced the run: versions, seed, probe, settings, parameter count, n.
        measurements: In order of their steps, one a step.
        transitions: Transitions flagged live, as they were seen last and without those withdrawn, in order of their
            steps; ``flagged_at`` is the step at which each was flagged first.
        failures: Estimators that failed: step, estimator, error.
        damaged: Lines that could not be read.
        finished: Whether the run was closed properly.
        flags: All that was said live of transitions, revisions included, in order.
    """

    path: Path | None
    header: dict[str, Any]
    measurements: tuple[Measurement, ...]
    transitions: tuple[Transition, ...]
    failures: tuple[dict[str, Any], ...]
    damaged: tuple[DamagedLine, ...]
    finished: bool
    flags: tuple[Flag, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of all recorded signals, in order of their first appearance."""
        return list(dict.fromkeys(name for m in self.measurements for name in m.estimates))

    def series(self, name: str) -> Series:
        """One signal over training.

        Raises:
            KeyError: If no measurement has a signal of this name.
        """
        found = [(m.step, m.estimates[name]) for m in self.measurements if name in m.estimates]
        if not found:
            known = ", ".join(self.names) or "none, the run holds no measurement"
            raise KeyError(f"The run has no series {name!r}; it has: {known}.")
        return Series(
            name,
            np.array([step for step, _ in found], dtype=np.int64),
            np.array([estimate.value for _, estimate in found], dtype=np.float64),
            np.array([estimate.standard_error for _, estimate in found], dtype=np.float64),
            np.array([estimate.reliable for _, estimate in found], dtype=np.bool_),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows: ``step, name, value, standard_error, reliable``, one for each number measured."""
        return [
            {
                "step": m.step,
                "name": name,
                "value": estimate.value,
                "standard_error": estimate.standard_error,
                "reliable": estimate.reliable,
            }
            for m in self.measurements
            for name, estimate in m.estimates.items()
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install pandas. rows() gives the same without it."
            ) from error
        return pandas.DataFrame(self.rows(), columns=["step", "name", "value", "standard_error", "reliable"])

    def __repr__(self) -> str:
        """Sizes."""
        where = "" if self.path is None else f"{str(self.path)!r}, "
        extent = f" over steps 0..{self.measurements[-1].step}" if self.measurements else ""
        return (
            f"Run({where}{len(self.measurements)} measurements of {len(self.names)} signals{extent}, "
            f"{len(self.transitions)} transitions flagged, {len(self.failures)} failures, "
            f"{len(self.damaged)} damaged lines)"
        )


def find_record(path: str | os.PathLike[str]) -> Path:
    """The record file at ``path``: the file itself, or the only one in or below that directory.

    Raises:
        FileNotFoundError: If there is nothing at ``path``, or no record below it.
        RecordError: If there are several records below it.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the log directory of a run, or its {FILE_NAME}.")
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    found = sorted(path.rglob(FILE_NAME))
    if not found:
        raise FileNotFoundError(
            f"There is no {FILE_NAME} in {path} or below it; was the run watched by phasewatch, and is this its log "
            "directory?"
        )
    if len(found) > 1:
        listing = "\n  ".join(str(file.parent) for file in found)
        raise RecordError(f"{path} holds {len(found)} runs; give one of them:\n  {listing}")
    return found[0]


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run back; where a file holds several runs one after another, the last of them.

    Torn or flipped lines are reported by a warning and in :attr:`Run.damaged`, and skipped.

    Args:
        path: A log directory (searched for the record), or the record file itself.

    Raises:
        FileNotFoundError: If there is no record.
        RecordError: If the file is no record, or was written by a newer or an older version of phasewatch.
    """
    file = find_record(path)
    bodies: list[dict[str, Any]] = []
    damaged: list[DamagedLine] = []
    for line in read_lines(file):
        if isinstance(line, DamagedLine):
            damaged.append(line)
        else:
            bodies.append(line)
    if not bodies:
        raise RecordError(f"{file} is no run record: not one line of it carries a valid checksum.")
    if damaged:
        listing = "; ".join(f"line {line.number} {line.reason}" for line in damaged[:5])
        warnings.warn(f"{file}: {len(damaged)} damaged lines were skipped ({listing}).", stacklevel=2)
    return assemble(bodies, path=file, damaged=tuple(damaged))


def assemble(bodies: Iterable[dict[str, Any]], path: Path | None = None, damaged: tuple[DamagedLine, ...] = ()) -> Run:
    """Build the run from the bodies of its lines.

    A ``header`` begins a new run; a ``resume`` line at step s supersedes what was recorded at s and later.

    Raises:
        RecordError: If the record was written by a newer or an older version of phasewatch.
    """
    header: dict[str, Any] = {}
    measurements: dict[int, Measurement] = {}
    flags: list[Flag] = []
    failures: list[dict[str, Any]] = []
    finished = False
    for body in bodies:
        kind = body["kind"]
        if kind == "header":
            _check_version(body, path)
            header, measurements, flags, failures = _without_kind(body), {}, [], []
        elif kind == "resume":
            measurements = {step: m for step, m in measurements.items() if step < body["step"]}
            flags = [f for f in flags if f.detected_at < body["step"]]
            failures = [f for f in failures if f["step"] < body["step"]]
        elif kind == "measurement":
            measurement = Measurement.from_dict(body)
            measurements[measurement.step] = measurement
        elif kind == "transition":
            flags.append(Flag.from_dict(body))
        elif kind == "failure":
            failures.append(_without_kind(body))
        finished = kind == "end"
    ordered = tuple(measurements[step] for step in sorted(measurements))
    standing = tuple(standing_transitions(flags))
    return Run(path, header, ordered, standing, tuple(failures), damaged, finished, tuple(flags))


def _check_version(header: dict[str, Any], path: Path | None) -> None:
    version = header["schema_version"]
    if version > SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema version {version}, this phasewatch reads version {SCHEMA_VERSION}; upgrade it with "
            "`pip install -U phasewatch`."
        )
    if version < SCHEMA_VERSION:
        written_by = header.get("versions", {}).get("phasewatch", "an older version")
        raise RecordError(
            f"{path} has schema version {version} and was written by phasewatch {written_by}; this one reads version "
            f"{SCHEMA_VERSION} only. Read it with the phasewatch that wrote it, or record the run anew."
        )


def _without_kind(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != "kind"}
