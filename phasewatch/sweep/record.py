"""The record of a sweep: an ordinary run record, begun once, in which each sweep goes on where the last one stopped."""

from __future__ import annotations

import time
import traceback
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from phasewatch.record import Ending, Journal, Measurement, RecordError, Run
from phasewatch.record.lines import Line
from phasewatch.record.lock import LockedFile
from phasewatch.record.reading import assemble, read_runs, records_in
from phasewatch.sweep.one import FailedPart
from phasewatch.watch import Watch

SOURCE = "checkpoints"
"""What the header of such a record names as where it is from."""
LOCK = "measuring.lock"
"""A file in the directory that whoever is measuring holds locked."""
SHARD = "shard-"
"""How the folders begin in which the jobs of one sweep record what each has measured."""
CHECKPOINT = "checkpoint"
"""What failed, where it is a whole checkpoint and no single estimator."""
_SAME = ("module", "num_parameters", "n", "seed", "monitors", "probes")


def header_of(watch: Watch) -> dict[str, Any]:
    """What the record says of what is measured, and on which data."""
    header = watch.header
    monitors = [{**monitor, "schedule": {"kind": SOURCE}} for monitor in header["monitors"]]
    probes = [fingerprint(monitor.probe.batches) for monitor in watch.monitors]
    return {**header, "source": SOURCE, "monitors": monitors, "probes": probes}


def describes_the_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two headers are of the same measurements, on the same data."""
    return all(one.get(name) == other.get(name) for name in _SAME)


def fingerprint(batches: Iterable[Any]) -> str:
    """A checksum of all numbers in some batches, so that it is seen where they are others."""
    checksum = 0
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            checksum = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), checksum)
        elif isinstance(leaf, (np.ndarray, bool, int, float, str, bytes)):
            checksum = zlib.crc32(repr(leaf).encode(), checksum)
    return f"{checksum:08x}"


class SweepRecord:
    """Writes what a sweep finds; it alone may write there until it is closed.

    Attributes:
        directory: Where the record lies.
    """

    def __init__(self, directory: Path, header: dict[str, Any]) -> None:
        """Go on with the record that is there, or begin one.

        Args:
            directory: Is made if need be.
            header: What is measured, see :func:`header_of`.

        Raises:
            RecordError: If another sweep is at work there, what is there was measured of something else, in another way
                or on other data, or the directory cannot be written.
        """
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(directory / LOCK)
        except BlockingIOError as error:
            raise RecordError(
                f"Checkpoints are being measured into {directory} by another process. Wait until that has ended, or "
                "give another directory (--output)."
            ) from error
        except OSError as error:
            raise RecordError(
                f"{directory} cannot be written ({error.strerror or error}); give another directory (--output)."
            ) from error
        try:
            self._journal = _journal(directory, header)
            self._take_up_shards()
        except BaseException:
            self._lock.close()
            raise

    def _take_up_shards(self) -> None:
        """Record what jobs have measured of this sweep, each in a folder of its own."""
        measured, header = {m.step for m in self.run.measurements}, self._journal.lines[0].body
        for path in sorted(self.directory.glob(f"{SHARD}*/*.jsonl")):
            for lines in read_runs(path)[0].values():
                if lines[0].kind == "header" and describes_the_same(lines[0].body, header):
                    for measurement in assemble(lines).measurements:
                        if measurement.step not in measured:
                            measured.add(measurement.step)
                            self.add(measurement)

    @property
    def run(self) -> Run:
        """What was recorded so far, by earlier sweeps too."""
        return assemble(self._journal.lines, self._journal.path)

    @property
    def failed(self) -> dict[int, str]:
        """Checkpoints that could not be measured so far: step to what went wrong last."""
        measured = {m.step for m in self.run.measurements}
        return {
            f["step"]: f["error"] for f in self.run.failures if f["what"] == CHECKPOINT and f["step"] not in measured
        }

    def add(self, measurement: Measurement, failures: Sequence[FailedPart] = ()) -> None:
        """Record a measurement, and what failed in it."""
        told = [
            ("failure", _told(failure.what, failure.error, failure.traceback, measurement.step)) for failure in failures
        ]
        self._journal.extend([("measurement", measurement.to_dict()), *told])  # type: ignore[list-item]

    def fail(self, step: int, error: BaseException) -> None:
        """Record that a checkpoint could not be measured."""
        trace = "".join(traceback.format_exception(error, limit=-8))
        self._journal.append("failure", _told(CHECKPOINT, str(error), trace, step))

    def __enter__(self) -> SweepRecord:
        """The record itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say how the sweep ended, and let others measure there; of one that has measured nothing, nothing is left."""
        path = self._journal.path
        if path is not None and not any(line.kind == "measurement" for line in self._journal.lines):
            path.unlink(missing_ok=True)
            (self.directory / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # where it holds other things
                self.directory.rmdir()
        elif self._journal.lines[-1].kind != "end":
            self._journal.append("end", {"time": time.time(), **Ending.by(error).to_dict()})
        self._journal.close()
        self._lock.close()


def _journal(directory: Path, header: dict[str, Any]) -> Journal:
    """That of an earlier sweep over the same, or a new one."""
    header = Line.written("", 0, "header", header).body  # as it will be read back
    sweeps = [
        (path, run_id, lines[0].body)
        for path in records_in(directory)
        for run_id, lines in read_runs(path)[0].items()
        if lines[0].kind == "header" and lines[0].body.get("source") == SOURCE
    ]
    for path, run_id, known in sweeps:
        if describes_the_same(known, header):
            return Journal.reopen(path, run_id)
    if sweeps:
        path, _, known = sweeps[0]
        raise RecordError(
            f"{path} was measured in another way: {_differences(known, header)}. Give another directory (--output), "
            "or remove that one to measure all anew."
        )
    journal = Journal(directory)
    journal.append("header", header)
    return journal


def _locked(path: Path) -> LockedFile:
    while True:
        try:
            file = LockedFile(path, create=True)
        except FileExistsError:
            try:
                file = LockedFile(path, create=False)
            except FileNotFoundError:
                continue
        if file.is_at(path):
            return file
        file.close()  # whoever held it has removed it meanwhile, and another one may hold a new one


def _told(what: str, error: str, trace: str, step: int) -> dict[str, Any]:
    return {"step": step, "what": what, "error": error, "traceback": trace, "time": time.time()}


def _differences(known: dict[str, Any], header: dict[str, Any]) -> str:
    """What two headers say otherwise, in words."""
    told = []
    for name in _SAME:
        there, here = known.get(name), header.get(name)
        if there == here:
            continue
        if name == "probes":
            told.append("the samples are others (where the code that builds draws them at random, it has to seed them)")
        elif name == "monitors":
            told.append("the settings of what is measured are others")
        else:
            told.append(f"{name} is {there!r} there and {here!r} here")
    return "; ".join(told)
