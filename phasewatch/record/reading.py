"""From the files of recorded runs to :class:`Run`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from phasewatch.printable import printable
from phasewatch.record.bodies import objection
from phasewatch.record.ending import Ending
from phasewatch.record.lines import FILE_NAME, SCHEMA_VERSION, DamagedLine, Line, RecordError, gaps, read_lines
from phasewatch.record.measurement import Measurement
from phasewatch.record.run import Run
from phasewatch.record.signals import take_up
from phasewatch.record.transition import Flag, standing_transitions

# So many runs are told of where one was asked for; telling what each holds means reading it. Chosen.
MOST_LISTED = 20


def records_in(directory: Path, pattern: str = "{}") -> list[Path]:
    """The record files right in a directory, or where ``pattern`` (``**/{}``) says; empty ones are none yet."""
    names = (FILE_NAME, "phasewatch-*.jsonl")
    found = {path for name in names for path in directory.glob(pattern.format(name))}
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def find_record(path: str | os.PathLike[str]) -> Path:
    """The record file at ``path``: the file itself, or the only one in that directory, or else below it.

    Raises:
        FileNotFoundError: If there is nothing at ``path``, or no record below it.
        RecordError: If there are several records; says what each holds.
    """
    found = _find_records(path)
    if len(found) > 1:
        raise RecordError(f"{path} holds {len(found)} runs; give one of them:{_listing(found)}")
    return found[0]


def load_run(path: str | os.PathLike[str], run_id: str | None = None) -> Run:
    """Read a run back.

    Torn or flipped lines are reported by a warning and in :attr:`Run.damaged`, and skipped; lines that are missing by a
    warning and in :attr:`Run.gaps`.

    Args:
        path: A log directory (searched for the record), or the record file itself.
        run_id: Which run, where there are several.

    Raises:
        FileNotFoundError: If there is no record.
        RecordError: If there are several runs, or none of that id; if the file is no record, or was written by a newer
            version of phasewatch.
    """
    if run_id is None:
        file = find_record(path)
    else:
        found = _find_records(path)
        files = [file for file in found if run_id in read_runs(file)[0]]
        if len(files) != 1:
            many = f"{len(files)} records of the run" if files else "no run"
            raise RecordError(f"{path} holds {many} {run_id}; give one of these:{_listing(files or found)}")
        file = files[0]
    runs, damaged = read_runs(file)
    if not runs:
        reason = f"line {damaged[0].number} {damaged[0].reason}" if damaged else "it is empty"
        raise RecordError(f"{file} is no run record: {reason}.")
    if run_id is None and len(runs) > 1:
        raise RecordError(f"{file} holds {len(runs)} runs; give the run_id of one of them:{_listing([file])}")
    run = assemble(runs[run_id or next(iter(runs))], file, tuple(damaged))
    if run.damaged or run.gaps:
        warnings.warn(printable(f"{file}: {_losses(run)}."), stacklevel=2)
    return run


def read_runs(file: Path) -> tuple[dict[str, list[Line]], list[DamagedLine]]:
    """The lines in a file by the run that they name, each in order, and those that were skipped."""
    runs: dict[str, dict[int, Line]] = {}
    damaged: list[DamagedLine] = []
    for number, line in read_lines(file):
        if isinstance(line, DamagedLine):
            damaged.append(line)
        elif line.sequence in runs.get(line.run_id, {}):
            damaged.append(DamagedLine(number, f"has the sequence number {line.sequence} of an earlier line"))
        elif (wrong := objection(line)) is not None:
            damaged.append(DamagedLine(number, wrong))
        else:
            runs.setdefault(line.run_id, {})[line.sequence] = line
    return {run_id: [run[k] for k in sorted(run)] for run_id, run in runs.items()}, damaged


def standing_lines(lines: Sequence[Line]) -> list[Line]:
    """The lines of one run without those that were taken back by resuming from before them.

    A resume line that is lost shows by a step back across a gap: what was recorded from there on was taken back.
    """
    chain: list[Line] = []
    last = lines[-1].sequence if lines else 0
    for line in reversed(lines):
        if line.sequence <= last:
            chain.append(line)
            last = line.body["after"] if line.kind == "resume" else line.sequence - 1
    standing: list[Line] = []
    before_gap = 0
    for line in reversed(chain):
        if standing and line.kind != "resume" and line.sequence > standing[-1].sequence + 1:
            before_gap = len(standing)
        if line.kind == "measurement":
            step, earlier = line.body["step"], standing[:before_gap]
            if any(known.kind == "measurement" and _step(known) >= step for known in earlier):
                standing[:before_gap] = [known for known in earlier if _step(known) < step]
            before_gap = 0
        standing.append(line)
    return standing


def assemble(lines: Iterable[Line], path: Path | None = None, damaged: tuple[DamagedLine, ...] = ()) -> Run:
    """Build a run from its lines in order.

    Raises:
        RecordError: If the record was written by a newer version of phasewatch.
    """
    lines = list(lines)
    header: dict[str, Any] = {"run_id": lines[0].run_id} if lines else {}
    measurements: dict[int, Measurement] = {}
    flags: list[Flag] = []
    failures: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    resumed: list[int] = []
    ending: Ending | None = None
    for line in standing_lines(lines):
        if line.kind == "header":
            header |= line.body
            _check_version(header, path)
            take_up(header.get("signals", ()))
        elif line.kind == "plan":
            header |= line.body
        elif line.kind == "measurement":
            measurement = Measurement.from_dict(line.body)
            measurements[measurement.step] = measurement
        elif line.kind == "observed":
            blocks.append(line.body)
        elif line.kind == "resume":
            resumed.append(line.body["step"])
        elif line.kind == "transition":
            flags.append(Flag.from_dict(line.body))
        elif line.kind == "failure":
            failures.append(dict(line.body))
        elif line.kind == "end":
            ending = Ending.from_dict(line.body)
        if line.kind not in ("end", "failure"):
            ending = None  # it went on
    missing = gaps(lines)
    return Run(
        path,
        header,
        tuple(measurements[step] for step in sorted(measurements)),
        tuple(standing_transitions(flags)),
        tuple(failures),
        damaged,
        ending == Ending("finished") and not missing,
        tuple(flags),
        missing,
        tuple(blocks),
        tuple(resumed),
        ending,
    )


def _find_records(path: str | os.PathLike[str]) -> list[Path]:
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the log directory of a run, or its {FILE_NAME}.")
    if not path.is_dir():
        raise RecordError(
            f"{path} is a pipe or a device, which would be waited for; write what comes out of it to a file first."
        )
    found = records_in(path) or records_in(path, "**/{}")
    if not found:
        raise FileNotFoundError(
            f"There is no {FILE_NAME} in {path} or below it; was the run watched by phasewatch, and is this its log "
            "directory?"
        )
    return found


def _listing(files: Sequence[Path]) -> str:
    told = [f"\n  {text}" for file in files[:MOST_LISTED] for text in _described(file)]
    more = len(files) - MOST_LISTED
    return "".join(told) + (f"\n  and {more} more" if more > 0 else "")


def _described(file: Path) -> list[str]:
    """One line for each run in a file."""
    try:
        runs, _ = read_runs(file)
        described = [assemble(lines, file) for lines in runs.values()]
    except (RecordError, OSError) as error:
        return [f"{file} (cannot be read: {error})"]
    if not described:
        return [f"{file} (no line of it can be read)"]
    return [f"{file} (run {run.header['run_id']}, {_created(run)}, {_extent(run)})" for run in described]


def _created(run: Run) -> str:
    created = run.header.get("created")
    if created is None:
        return "created at a time unknown"
    return f"created {datetime.fromtimestamp(created).isoformat(' ', 'seconds')}"


def _extent(run: Run) -> str:
    count = len(run.measurements)
    measured = f"{count} measurement{'' if count == 1 else 's'}"
    return f"{measured}, {sum(map(len, run.gaps))} lines missing" if run.gaps else measured


def _losses(run: Run) -> str:
    """What is damaged or missing, in words."""
    told = []
    if run.damaged:
        listing = "; ".join(f"line {line.number} {line.reason}" for line in run.damaged[:5])
        told.append(f"{len(run.damaged)} damaged lines were skipped ({listing})")
    if run.gaps:
        numbers = ", ".join(map(str, run.gaps[:5])) + (", ..." if len(run.gaps) > 5 else "")
        told.append(f"{sum(map(len, run.gaps))} lines of the run are missing (by their sequence numbers: {numbers})")
        if run.gaps[0].first == 0:
            told.append("the header is among them, so what was measured is known, but not with which settings")
    return "; ".join(told)


def _step(line: Line) -> float:
    body = line.body
    return float(body["detected_at"] if line.kind == "transition" else body.get("step", -1))


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
