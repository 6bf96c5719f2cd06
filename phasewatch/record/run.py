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
        transitions: Transitions flagged live, as they were seen last and without those withdrawn: plain dictionaries in
            order of detection; ``detected_at`` is the step at which each was flagged first.
        failures: Estimators that failed: step, estimator, error.
        damaged: Lines that could not be read.
        finished: Whether the run was closed properly.
        flags: All that was said live of transitions, revisions included: plain dictionaries in order.
    """

    path: Path | None
    header: dict[str, Any]
    measurements: tuple[Measurement, ...]
    transitions: tuple[dict[str, Any], ...]
    failures: tuple[dict[str, Any], ...]
    damaged: tuple[DamagedLine, ...]
    finished: bool
    flags: tuple[dict[str, Any], ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of all recorded signals, in order of their first appearance."""
        return list(dict.fromkeys(name for m in self.measurements for name in m.values))

    def series(self, name: str) -> Series:
        """One signal over training.

        Raises:
            KeyError: If no measurement has a signal of this name.
        """
        found = [m for m in self.measurements if name in m.values]
        if not found:
            known = ", ".join(self.names) or "none, the run holds no measurement"
            raise KeyError(f"The run has no series {name!r}; it has: {known}.")
        return Series(
            name,
            np.array([m.step for m in found], dtype=np.int64),
            np.array([m.values[name] for m in found], dtype=np.float64),
            np.array([m.standard_errors.get(name, np.nan) for m in found], dtype=np.float64),
            np.array([name not in m.unreliable for m in found], dtype=np.bool_),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows: ``step, name, value, standard_error, reliable``, one for each number measured."""
        return [
            {
                "step": m.step,
                "name": name,
                "value": value,
                "standard_error": m.standard_errors.get(name, np.nan),
                "reliable": name not in m.unreliable,
            }
            for m in self.measurements
            for name, value in m.values.items()
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
        RecordError: If the file is no record, or was written by a newer version of phasewatch.
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
        RecordError: If the record was written by a newer version of phasewatch.
    """
    header: dict[str, Any] = {}
    measurements: dict[int, Measurement] = {}
    flags: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    finished = False
    for body in bodies:
        kind = body["kind"]
        if kind == "header":
            if body["schema_version"] > SCHEMA_VERSION:
                raise RecordError(
                    f"{path} has schema version {body['schema_version']}, this phasewatch reads up to "
                    f"{SCHEMA_VERSION}; upgrade it with `pip install -U phasewatch`."
                )
            header, measurements, flags, failures = _without_kind(body), {}, [], []
        elif kind == "resume":
            measurements = {step: m for step, m in measurements.items() if step < body["step"]}
            flags = [f for f in flags if f["detected_at"] < body["step"]]
            failures = [f for f in failures if f["step"] < body["step"]]
        elif kind == "measurement":
            measurement = Measurement.from_dict(body)
            measurements[measurement.step] = measurement
        elif kind == "transition":
            flags.append(_without_kind(body))
        elif kind == "failure":
            failures.append(_without_kind(body))
        finished = kind == "end"
    ordered = tuple(measurements[step] for step in sorted(measurements))
    return Run(path, header, ordered, _standing(flags), tuple(failures), damaged, finished, tuple(flags))


def _standing(flags: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Each transition as its last flag has it, with the step of its first, without those withdrawn."""
    first: dict[int, int] = {}
    last: dict[int, dict[str, Any]] = {}
    for flag in flags:
        first.setdefault(flag["number"], flag["detected_at"])
        last[flag["number"]] = flag
    return tuple(
        {**flag["transition"], "detected_at": first[number]}
        for number, flag in last.items()
        if flag["action"] != "withdrawn"
    )


def _without_kind(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != "kind"}
