"""Series out of the logs of other programs, for runs that phasewatch did not watch."""

from __future__ import annotations

import difflib
import importlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.record import Estimate, Measurement, RecordError, Run
from phasewatch.record.plain import LARGEST_WHOLE
from phasewatch.record.signals import LOSS, detected
from phasewatch.tags import UNRELIABLE, name_of

Scalars = dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
"""Name to steps, ascending, and values."""

MOST_POINTS = 240
"""Detection takes quadratic memory; longer series are averaged in groups. Chosen."""
STEPS = ("step", "global_step", "_step", "trainer/global_step", "iteration", "iter", "epoch")
"""Columns that may count the steps, the first that there is; upper and lower case are the same."""
NO_SIGNALS = ("epoch", "_runtime", "_timestamp", "timestamp", "time", "wall_time", "relative time (process)")
"""Columns that go on by themselves."""
TABLES = {
    ".csv": "read_csv",
    ".tsv": "read_table",
    ".jsonl": "read_json",
    ".ndjson": "read_json",
    ".parquet": "read_parquet",
}
"""What pandas reads a file by, and how it ends."""
FEW = 12
"""Names that are told where one was misspelt. Chosen."""
METRICS = "metrics.csv"
"""What Lightning's CSVLogger writes."""
CALLED_UNRELIABLE = "called unreliable where it was logged"
"""Why a point that was logged as one not to be trusted is none."""


def read_table(path: str | os.PathLike[str]) -> Scalars:
    """The numeric columns of a table with a column of steps.

    Such as ``metrics.csv`` of Lightning, an export of W&B, a CSV, JSONL or parquet file. Where a step has several rows,
    as where a run was resumed from before its end, the last one with a value stands.

    Args:
        path: The file. It may be compressed.

    Raises:
        ImportError: If pandas is not installed.
        RecordError: If it is no table, or has no column of steps or no numbers.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise RecordError(f"{path} is no file; expected one that ends in {', '.join(TABLES)}. A pipe is none.")
    frame = _frame(path)
    lower = {str(name).lower(): name for name in frame.columns}
    step = next((lower[name] for name in STEPS if name in lower), None)
    if step is None:
        raise RecordError(
            f"{path} has no column of steps; expected one of {', '.join(STEPS)}. It has: "
            f"{', '.join(map(str, frame.columns)) or 'no column'}."
        )
    steps = _numbers(frame[step])
    whole = (np.abs(steps) <= LARGEST_WHOLE) & (steps == np.floor(steps))
    wrong = list(frame[step][frame[step].notna().to_numpy() & ~whole])
    if wrong and not whole.any():
        raise RecordError(
            f"{path} has {wrong[0]!r} in its column of steps ({step!r}); expected whole numbers. Call the column that "
            f"counts the steps {STEPS[0]!r}."
        )
    if wrong:
        warnings.warn(f"{path}: {len(wrong)} rows are left out, whose step is {wrong[0]!r} or the like.", stacklevel=2)
    scalars: Scalars = {}
    for name in frame.columns:
        if name == step or str(name).lower() in NO_SIGNALS:
            continue
        values = _numbers(frame[name])
        kept = np.isfinite(values) & whole
        if kept.any():
            # of rows of one step np.unique keeps the first: from the end it is the last
            at, last = np.unique(steps[kept][::-1], return_index=True)
            scalars[str(name)] = at.astype(np.int64), values[kept][::-1][last]
    if not scalars:
        raise RecordError(f"{path} holds no numbers beside its steps ({step!r}).")
    return scalars


def is_table(path: Path) -> bool:
    """Whether a path is that of a file that can be read as a table."""
    return path.is_file() and any(suffix in TABLES for suffix in path.suffixes)


def find_table(directory: Path) -> Path | None:
    """Lightning's ``metrics.csv`` in a directory or below it; None where there is none, or several."""
    found = sorted(directory.rglob(METRICS)) if directory.is_dir() else []
    return found[0] if len(found) == 1 else None


def own_names(scalars: Scalars) -> Scalars:
    """The same, our own signals under the names that they have in a record, where no other series has their name.

    Of a signal none of whose values was to be trusted, an empty series is there beside them.
    """
    names = {tag: name_of(tag) for tag in scalars}
    named = {tag if tag != name and name in scalars else name: scalars[tag] for tag, name in names.items()}
    ours = [name for tag, name in names.items() if tag != name and name.endswith(UNRELIABLE)]
    empty = {name.removesuffix(UNRELIABLE): (np.empty(0, dtype=np.int64), np.empty(0)) for name in ours}
    return {**{name: series for name, series in empty.items() if name not in named}, **named}


def chosen(scalars: Mapping[str, object]) -> tuple[list[str], str]:
    """What is looked at where nobody says it: the signals that phasewatch looks at, else what looks like a loss.

    Returns:
        The names, and why these.
    """
    ours = detected(list(scalars))
    if any(name != LOSS for name in ours):
        return ours, "the signals of phasewatch"
    return [name for name in scalars if "loss" in name.lower()], "they look like losses"


def told_missing(source: object, unknown: Sequence[str], known: Sequence[str]) -> str:
    """That there are no such series, and which there are: of many the nearest, and some; all where none is named."""
    if not unknown:
        return f"--signals names no series; {source} has: {', '.join(dict.fromkeys(known)) or 'none'}."
    near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=3)]
    nearest = f"the nearest are {', '.join(dict.fromkeys(near))}; " if near and len(known) > FEW else ""
    return f"{source} has no series {', '.join(map(repr, unknown))}; {nearest}it has{told_known(known)}."


def told_known(known: Sequence[str]) -> str:
    """Names after a verb; of many how many there are, the first, and how to see all."""
    known = list(dict.fromkeys(known))
    if len(known) <= FEW:
        return f": {', '.join(known) or 'none'}"
    return f" {len(known)}, among them: {', '.join(known[:FEW])} (--signals without a name says all)"


def run_of_scalars(scalars: Scalars, names: Sequence[str], source: str) -> Run:
    """Series as a run, so that they can be analysed like one.

    One of more than 240 points is averaged in groups, each at its last step. What phasewatch has logged as not to be
    trusted is so here.

    Args:
        scalars: The series.
        names: Those wanted; they become the names of the signals.
        source: Where they are from, for the header.

    Raises:
        RecordError: If there is no such series, or none is named.
    """
    unknown = [name for name in names if name not in scalars]
    if unknown or not names:
        raise RecordError(told_missing(source, unknown, list(scalars)))
    found: dict[int, dict[str, Estimate]] = {}
    for name in names:
        for series, doubts in ((name, ()), (f"{name}{UNRELIABLE}", (CALLED_UNRELIABLE,))):
            steps, column = scalars.get(series, ([], np.empty(0)))
            finite = np.flatnonzero(np.isfinite(column))
            for group in np.array_split(finite, min(MOST_POINTS, len(finite))) if len(finite) else []:
                step, value = int(steps[group[-1]]), float(column[group].mean())
                found.setdefault(step, {}).setdefault(name, Estimate(value, doubts=doubts))
    measurements = tuple(Measurement(step, found[step]) for step in sorted(found))
    return Run(None, {"source": source, "series": list(names)}, measurements, (), (), (), finished=True)


def _frame(path: Path) -> Any:
    ending = next((suffix for suffix in path.suffixes[::-1] if suffix in TABLES), None)
    if ending is None:
        raise RecordError(f"{path} is no table that can be read; expected a file that ends in {', '.join(TABLES)}.")
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError(f"{path} is read by pandas, which is not installed: pip install pandas") from error
    settings: dict[str, Any] = {"lines": True} if TABLES[ending] == "read_json" else {}
    try:
        return getattr(pandas, TABLES[ending])(path, **settings)
    except Exception as error:  # a parser's own, of many types
        # what the system tells has a number; an OSError without one says that a compressed file is none
        if isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise RecordError(f"{path} cannot be read as a table: {error}") from error


def _numbers(column: Any) -> NDArray[np.float64]:
    pandas = importlib.import_module("pandas")
    numbers: NDArray[np.float64] = pandas.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    return numbers
