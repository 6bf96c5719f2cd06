"""The append-only file that a run is recorded in, one checked JSON object a line."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FILE_NAME = "phasewatch.jsonl"
SCHEMA_VERSION = 2
KINDS = ("header", "resume", "measurement", "transition", "failure", "end")

_PREFIX = '{"crc32":"'
_BODY_AT = len(_PREFIX) + len('00000000",')


class RecordError(ValueError):
    """A record cannot be read or written; the message says how to mend it."""


@dataclass(frozen=True)
class DamagedLine:
    """A line that was skipped.

    Attributes:
        number: Line number, from 1.
        reason: What is wrong with it.
    """

    number: int
    reason: str


class Ledger:
    """Writes a run record line by line; what has been appended survives a kill of the process.

    Args:
        path: The file; its folder is made if need be. ``None`` keeps the lines in memory only.

    Attributes:
        lines: The bodies appended by this process, in order.

    Raises:
        RecordError: If the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self.lines: list[dict[str, Any]] = []
        self._unwritten = b""
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._write(b"")
            except OSError as error:
                raise RecordError(
                    f"The run record {self.path} cannot be written ({error.strerror or error}). Give a directory "
                    "that this process may write to."
                ) from error

    def append(self, kind: str, body: dict[str, Any]) -> None:
        """Add one line. If it cannot be written now, it is written with the next one.

        Args:
            kind: One of ``header``, ``resume``, ``measurement``, ``transition``, ``failure``, ``end``.
            body: Plain Python values; floats must be finite. Of what JSON cannot hold, the text is written.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If a float is not finite.
        """
        line = {"kind": kind, **body}
        text = json.dumps(line, allow_nan=False, separators=(",", ":"), default=_plain)
        self.lines.append(line)
        if self.path is not None:
            self._unwritten += encode_line(text)
            self._write(self._unwritten)
            self._unwritten = b""

    def _write(self, data: bytes) -> None:
        assert self.path is not None
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if data and _ends_torn(descriptor):
                data = b"\n" + data
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


def encode_line(text: str) -> bytes:
    """The JSON object ``text`` with the CRC-32 of its bytes as first member, and a newline."""
    return f'{_PREFIX}{zlib.crc32(text.encode()):08x}",{text[1:]}\n'.encode()


def read_lines(path: Path) -> Iterator[dict[str, Any] | DamagedLine]:
    """The lines of a record in order, damaged ones as :class:`DamagedLine`."""
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw:
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            yield DamagedLine(number, "is not UTF-8")
            continue
        body = "{" + text[_BODY_AT:]
        if not text.startswith(_PREFIX) or encode_line(body) != raw + b"\n":
            yield DamagedLine(number, "is torn, or its checksum does not match")
            continue
        yield json.loads(body)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else repr(value)


def _ends_torn(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
