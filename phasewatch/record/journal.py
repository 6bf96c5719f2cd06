"""The append-only file that a run is recorded in, written by one process at a time."""

from __future__ import annotations

import os
import platform
import tempfile
import warnings
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any

from phasewatch.interruption import held_back
from phasewatch.record.lines import FILE_NAME, Kind, Line, RecordError
from phasewatch.record.lock import LockedFile
from phasewatch.record.position import Position
from phasewatch.record.reading import read_runs, standing_lines


class Journal:
    """Writes the record of one run line by line; what has been appended survives a kill of the process.

    The run has a file of its own from its first line on: ``phasewatch.jsonl``, or beside another record
    ``phasewatch-<id>.jsonl``. The file is locked until :meth:`close` or the end of the process. If it is removed,
    emptied or cut off meanwhile, the next line is written with all before it; if something else is put in its place,
    into a new file beside that. A warning says so.

    Attributes:
        directory: Where the file lies; None keeps the lines in memory only.
        path: The file; None before the first line, and in memory.
        run_id: On every line.
        lines: All lines of the run in order, those included that were there when it was reopened.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        """Begin the record of a new run.

        Args:
            directory: Is made if need be.

        Raises:
            RecordError: If the directory cannot be written.
        """
        self.directory = None if directory is None else Path(directory)
        self._place = None if directory is None else Path(directory).absolute()  # wherever the process goes
        self.path: Path | None = None
        self.run_id = token_hex(8)
        self.lines: list[Line] = []
        self._next = 0
        self._written = 0
        self._size = 0
        self._identity: tuple[int, int] | None = None
        self._file: LockedFile | None = None
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.directory):
                    pass
            except OSError as error:
                raise RecordError(
                    f"The run record in {self.directory} cannot be written ({error.strerror or error}). Give a "
                    "directory that this process may write to."
                ) from error

    @classmethod
    def reopen(cls, path: str | os.PathLike[str], run_id: str, sequence: int = -1) -> Journal:
        """Go on with the record of a run.

        Args:
            path: The file.
            run_id: The run.
            sequence: A line that the run is known to have written, though it may be lost: later lines get higher
                numbers, so that the loss can be seen.

        Raises:
            RecordError: If another process, or another watch of this one, is writing to it, or it has no such run.
            OSError: If it cannot be opened for writing.
        """
        journal = cls.__new__(cls)
        journal.path = Path(path)
        journal.directory = journal.path.parent
        journal._place = journal.directory.absolute()
        journal.run_id = run_id
        try:
            journal._file = LockedFile(path, create=False)
        except BlockingIOError as error:
            raise RecordError(_told_writer(journal.path)) from error
        # Only now: until it was locked, another may have written.
        journal.lines = read_runs(journal.path)[0].get(run_id, [])
        if not journal.lines:
            journal.close()
            raise RecordError(f"{path} holds no line of the run {run_id}; give the record of that run.")
        journal._written = len(journal.lines)
        journal._note_file()
        journal._next = max(journal.lines[-1].sequence, sequence) + 1
        return journal

    def append(self, kind: Kind, body: dict[str, Any]) -> None:
        """Add one line. If it cannot be written now, it is written with the next one.

        Args:
            kind: What the line tells.
            body: Plain Python values; floats must be finite. Of what JSON cannot hold, the text is written.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If a float is not finite.
        """
        self.extend([(kind, body)])

    def extend(self, told: Iterable[tuple[Kind, dict[str, Any]]]) -> None:
        """Add several lines, as :meth:`append` does one."""
        for kind, body in told:
            if kind in ("header", "resume"):
                body = {**body, "process": os.getpid(), "host": platform.node()}
            self.lines.append(Line.written(self.run_id, self._next, kind, body))
            self._next += 1
        if self.directory is not None:
            with held_back():  # between a line and what is known to be written no signal may come
                self._write()

    @property
    def position(self) -> Position | None:
        """The last line in the file that stands; None where there is none."""
        written = [line for line in standing_lines(self.lines) if line.sequence <= self._last_written]
        if self._file_path is None or not written:
            return None
        return Position(self._file_path, self.run_id, written[-1].sequence, written[-1].checksum)

    @property
    def unwritten(self) -> list[Line]:
        """What stands in memory alone: everything where there is no file, else what could not be written yet."""
        return [line for line in standing_lines(self.lines) if line.sequence > self._last_written]

    @property
    def _last_written(self) -> int:
        return self.lines[self._written - 1].sequence if self._written else -1

    def close(self) -> None:
        """Let others write to the file. What is appended later opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        file = self._opened()
        try:
            while self._written < len(self.lines):
                _write_line(file.descriptor, self.lines[self._written].encoded())
                self._written += 1
        finally:
            self._note_file()

    @property
    def _file_path(self) -> Path | None:
        return None if self._place is None or self.path is None else self._place / self.path.name

    def _note_file(self) -> None:
        """How this run leaves its file, to see later what others have done to it."""
        assert self._file is not None
        found = os.fstat(self._file.descriptor)
        self._size, self._identity = found.st_size, (found.st_dev, found.st_ino)

    def _opened(self) -> LockedFile:
        """The file as this run left it, or one into which all is written again."""
        path = self._file_path
        if path is None:
            self._file = self._create()
            return self._file
        if self._file is None or not self._file.is_open or not self._file.is_at(path):
            self.close()
            self._file = self._open_again(path)
        if os.fstat(self._file.descriptor).st_size != self._size:
            self._file = self._mended(self._file, path)
        return self._file

    def _create(self) -> LockedFile:
        assert self.directory is not None and self._place is not None
        for name in (FILE_NAME, f"phasewatch-{self.run_id}.jsonl"):
            try:
                file = LockedFile(self._place / name, create=True)
            except FileExistsError:
                continue
            self.path = self.directory / name
            return file
        raise RecordError(f"{self.directory} holds a record of the run {self.run_id} already; give another directory.")

    def _open_again(self, path: Path) -> LockedFile:
        if path.exists() and not path.is_file():  # a pipe or a directory
            return self._begin_beside(path)
        try:
            return LockedFile(path, create=False)
        except BlockingIOError as error:
            found = os.stat(path)
            if (found.st_dev, found.st_ino) == self._identity:
                raise RecordError(_told_writer(path)) from error
            return self._begin_beside(path)
        except FileNotFoundError:
            self._written = self._size = 0  # also where a new one cannot be made yet
            file = LockedFile(path, create=True)
            self._write_all_again(path, "was removed while the run went on")
            return file

    def _mended(self, file: LockedFile, path: Path) -> LockedFile:
        """Where all can be written, since the file is not as this run left it."""
        if b"".join(line.encoded() for line in self.lines[: self._written]).startswith(path.read_bytes()):
            os.ftruncate(file.descriptor, 0)
            self._write_all_again(path, "was emptied or cut off while the run went on")
            return file
        there = {line.sequence: line.checksum for line in read_runs(path)[0].get(self.run_id, [])}
        if any(sequence > self._last_written for sequence in there):
            self.close()
            raise RecordError(f"{path} is not as this run left it: another has gone on with the run there.")
        if all(there.get(line.sequence) == line.checksum for line in self.lines[: self._written]):
            return file  # another has added something
        self.close()
        return self._begin_beside(path)

    def _begin_beside(self, path: Path) -> LockedFile:
        assert self.directory is not None
        for number in count(1):
            beside = path.with_name(f"phasewatch-{self.run_id}{f'-{number}' if number > 1 else ''}.jsonl")
            try:
                file = LockedFile(beside, create=True)
            except FileExistsError:
                continue
            break
        self.path = self.directory / beside.name
        self._write_all_again(beside, f"takes the place of {path.name}, which was replaced while the run went on")
        return file

    def _write_all_again(self, path: Path, why: str) -> None:
        self._written = self._size = 0
        warnings.warn(
            f"phasewatch: {path} {why}: all that the run has recorded so far is written into it once more.",
            stacklevel=2,
        )


def _write_line(descriptor: int, data: bytes) -> None:
    if _ends_torn(descriptor):
        data = b"\n" + data
    while data:
        data = data[os.write(descriptor, data) :]


def _ends_torn(descriptor: int) -> bool:
    if os.fstat(descriptor).st_size == 0:
        return False
    os.lseek(descriptor, -1, os.SEEK_END)  # where to read; what is written goes to the end in any case
    return os.read(descriptor, 1) != b"\n"


def _told_writer(path: Path) -> str:
    """Who writes to the file, as far as its lines tell."""
    lines = [line for lines in read_runs(path)[0].values() for line in lines if "process" in line.body]
    who = "another process"
    if lines:
        last = max(lines, key=lambda line: line.sequence).body
        who = f"process {last['process']} on {last['host']}"
    return (
        f"{path} is being written by {who}, and a record has one writer at a time. End that run first, or give this "
        "one another directory."
    )
