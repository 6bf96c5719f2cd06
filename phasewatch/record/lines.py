"""One line of a run record: a checked JSON object that names its run and its place there."""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phasewatch.printable import printable
from phasewatch.record.plain import text as a_text
from phasewatch.record.plain import whole

FILE_NAME = "phasewatch.jsonl"
SCHEMA_VERSION = 2

Kind = Literal["header", "resume", "plan", "measurement", "observed", "transition", "failure", "end"]

DEEPEST = 32
"""How deeply the values of a line may be nested; those of phasewatch are six deep. Chosen."""

_RESERVED = {"crc32", "run_id", "sequence", "kind"}
_PREFIX = '{"crc32":"'
_BODY_AT = len(_PREFIX) + len('00000000",')


class RecordError(ValueError):
    """A record cannot be read or written; the message says how to mend it."""

    def __init__(self, message: object) -> None:
        """Keep what it quotes of a file from steering the terminal that shows it."""
        super().__init__(printable(str(message)))


@dataclass(frozen=True)
class Line:
    """A line of a record.

    Attributes:
        run_id: The run that it is of.
        sequence: Its number among the lines of that run, from 0.
        kind: What it tells. A ``header`` is the first line of a run, and a ``plan`` line adds to it what is known
            later; a ``resume`` line follows the line that it names as ``after`` and takes back what came since.
        body: What it tells, as JSON has it.
    """

    run_id: str
    sequence: int
    kind: str
    body: dict[str, Any]

    @classmethod
    def written(cls, run_id: str, sequence: int, kind: Kind, body: dict[str, Any]) -> Line:
        """The line as it will be read back: of what JSON cannot hold, the text.

        Raises:
            ValueError: If a float is not finite, or the body has a member that names the line itself.
        """
        if taken := _RESERVED & body.keys():
            raise ValueError(f"the body of a {kind} line has {sorted(taken)}, which every line has of its own")
        text = json.dumps(body, allow_nan=False, separators=(",", ":"), default=_plain)
        return cls(run_id, sequence, kind, json.loads(text))

    def encoded(self) -> bytes:
        """The line as it stands in the file, its newline included."""
        text = self._text()
        return f'{_PREFIX}{_checksum(text)}",{text[1:]}\n'.encode()

    @property
    def checksum(self) -> str:
        """CRC-32 of the rest of the line."""
        return _checksum(self._text())

    def _text(self) -> str:
        members = {"run_id": self.run_id, "sequence": self.sequence, "kind": self.kind, **self.body}
        return json.dumps(members, separators=(",", ":"))


@dataclass(frozen=True)
class DamagedLine:
    """A line that was skipped.

    Attributes:
        number: Line number in the file, from 1.
        reason: What is wrong with it.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class Gap:
    """Lines that a run has written and its record does not hold any more.

    Attributes:
        first: Sequence number of the first of them.
        last: Sequence number of the last of them.
    """

    first: int
    last: int

    def __len__(self) -> int:
        """How many lines are missing."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        """The numbers, such as ``12`` or ``12-20``."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def gaps(lines: Sequence[Line]) -> tuple[Gap, ...]:
    """What is missing before and between lines of one run in their order; what is lost at the end cannot be seen."""
    expected = 0
    found = []
    for line in lines:
        if line.sequence > expected:
            found.append(Gap(expected, line.sequence - 1))
        expected = line.sequence + 1
    return tuple(found)


def read_lines(path: Path) -> Iterator[tuple[int, Line | DamagedLine]]:
    """The lines of a file in order, each with its number in the file, damaged ones as :class:`DamagedLine`."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # editors of Windows put it there, and CRLF
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if raw := raw.removesuffix(b"\r"):
            read = _read(raw)
            yield number, DamagedLine(number, read) if isinstance(read, str) else read


def _read(raw: bytes) -> Line | str:
    """The line, or what is wrong with it."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "is not UTF-8"
    body = "{" + text[_BODY_AT:]
    if text[:_BODY_AT] != f'{_PREFIX}{_checksum(body)}",':
        return "is torn, or its checksum does not match"
    try:
        members = json.loads(body)
        if _depth(members) > DEEPEST:
            raise RecursionError("its values are nested too deeply")
    except (ValueError, RecursionError) as error:
        return f"is whole, and cannot be read ({str(error)[:100]})"
    try:
        run_id, sequence, kind = members.pop("run_id"), members.pop("sequence"), members.pop("kind")
    except KeyError as missing:
        return f"has no {missing}: it is of an earlier version of phasewatch"
    try:
        return Line(a_text(run_id, "run_id"), whole(sequence, "sequence"), a_text(kind, "kind"), members)
    except ValueError as error:
        return f"is whole, and cannot be read ({error})"


def _depth(value: Any) -> int:
    """How deeply lists and objects are nested."""
    depth, level = 0, [value]
    while level:
        depth += 1
        containers = (v for v in level if isinstance(v, (dict, list)))
        level = [
            inner for v in containers for inner in (v.values() if isinstance(v, dict) else v) if type(inner) in _NESTED
        ]
    return depth


_NESTED = (dict, list)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else repr(value)
