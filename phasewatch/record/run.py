"""A recorded run, read back."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.record.ending import NOT_CLOSED, Ending
from phasewatch.record.lines import DamagedLine, Gap
from phasewatch.record.measurement import Measurement
from phasewatch.record.moved import Moved, moved
from phasewatch.record.signals import CATALOGUE, DETAIL, look_up
from phasewatch.record.trace import Observed, unpack
from phasewatch.record.transition import Flag, Transition
from phasewatch.shown import shown

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
        header: What produced the run: id, versions, seed, probe, settings, parameter count, n. The id alone where the
            line that told the rest is lost.
        measurements: In order of their steps, one a step.
        transitions: Transitions flagged live, as they were seen last and without those withdrawn, in order of their
            steps; ``flagged_at`` is the step at which each was flagged first.
        failures: Estimators that failed: step, estimator, error.
        damaged: Lines that could not be read.
        finished: Whether the run came to its end and its record is whole: with lines missing, none can say what was
            measured and not read back.
        flags: All that was said live of transitions, revisions included, in order.
        gaps: Lines that the run has written and that are missing or damaged.
        blocks: What was observed at every step, packed (see :mod:`phasewatch.record.trace`).
        resumed: Steps at which it was taken up again.
        ending: How the run ended; None where it did not say: it is still going on, or was killed.
    """

    path: Path | None
    header: dict[str, Any]
    measurements: tuple[Measurement, ...]
    transitions: tuple[Transition, ...]
    failures: tuple[dict[str, Any], ...]
    damaged: tuple[DamagedLine, ...]
    finished: bool
    flags: tuple[Flag, ...] = ()
    gaps: tuple[Gap, ...] = ()
    blocks: tuple[dict[str, Any], ...] = ()
    resumed: tuple[int, ...] = ()
    ending: Ending | None = None

    @property
    def told_ending(self) -> str:
        """How the run ended, in a sentence; empty where it came to its end, or the record has lost what it said."""
        if self.ending is None:
            return "" if self.finished or self.gaps else NOT_CLOSED
        return "" if self.ending.how == "finished" else str(self.ending)

    @cached_property
    def observed(self) -> dict[str, Observed]:
        """What was observed while training went on: name to ``steps, values``.

        Of a step that was made again, because the run was resumed from before it or it was told twice, this is what was
        observed last.
        """
        return unpack(self.blocks)

    @property
    def names(self) -> list[str]:
        """Names of all recorded signals, in order of their first appearance."""
        return list(dict.fromkeys(name for m in self.measurements for name in m.estimates))

    @property
    def names_known_often(self) -> list[str]:
        """The same, less those known at fewer than half as many points as what stands in for them in the catalogue."""
        estimates = [item for m in self.measurements for item in m.estimates.items()]
        known = Counter(name for name, estimate in estimates if math.isfinite(estimate.value))
        stand_ins = {row.stands_in_for: row.name for row in CATALOGUE.values() if row.stands_in_for}
        return [name for name in self.names if 2 * known[name] >= known[stand_ins.get(name, name)]]

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

    def moved(self, transition: Transition) -> Moved | None:
        """Which samples of the probe a transition moved, and which classes; None where their losses are not known.

        Args:
            transition: Of this run; flagged while it went on, or found in all of it.
        """
        return moved(self.measurements, transition, self.header.get("labels"))

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
        pandas = _pandas("to_pandas needs pandas: pip install pandas. rows() gives the same without it.")
        return pandas.DataFrame(self.rows(), columns=["step", "name", "value", "standard_error", "reliable"])

    def observed_to_pandas(self) -> pandas.DataFrame:
        """What was observed while training went on, as a data frame of ``step, name, value``.

        Raises:
            ImportError: If pandas is not installed.
        """
        pandas = _pandas("observed_to_pandas needs pandas: pip install pandas. observed gives the same without it.")
        frames = [pandas.DataFrame({"step": s, "name": name, "value": v}) for name, (s, v) in self.observed.items()]
        return (
            pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(columns=["step", "name", "value"])
        )

    def plot(self) -> Any:
        """Find the transitions and draw the run: a figure of matplotlib. :mod:`phasewatch.plot` has its parts.

        Returns:
            The figure.
        """
        # by name: what draws stands above the record
        return importlib.import_module("phasewatch.plot").run(self)

    def _repr_html_(self) -> str:
        rows = []
        for name in self.names:
            series = self.series(name)
            last = f"{series.values[-1]:.4g} at step {series.steps[-1]:,}"
            rows.append((name, look_up(name).title, last, f"{series.reliable.sum()} of {len(series)}"))
        looked_at = [row for row in rows if look_up(row[0]).group != DETAIL]
        columns = ("signal", "what it is", "last value", "reliable points")
        ending = f" {self.told_ending}" if self.told_ending else ""
        return shown(f"{self!r}{ending}", columns if looked_at else (), looked_at)

    def __repr__(self) -> str:
        """Sizes."""
        where = "" if self.path is None else f"{str(self.path)!r}, "
        extent = f" over steps 0..{self.measurements[-1].step}" if self.measurements else ""
        return (
            f"Run({where}{len(self.measurements)} measurements of {len(self.names)} signals{extent}, "
            f"{len(self.transitions)} transitions flagged, {len(self.failures)} failures, "
            f"{len(self.damaged)} damaged lines, {sum(map(len, self.gaps))} lines missing)"
        )


def _pandas(needed: str) -> Any:
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError(needed) from error
