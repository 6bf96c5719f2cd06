"""Where in a record a checkpoint was made, and finding that place again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phasewatch.record.lines import Line, gaps
from phasewatch.record.reading import read_runs, records_in, standing_lines


@dataclass(frozen=True)
class Position:
    """A line of a record.

    Attributes:
        path: The file, absolute.
        run_id: The run.
        sequence: Number of the line.
        checksum: Of the line: the same number in a copy that went on by itself is another line.
    """

    path: Path
    run_id: str
    sequence: int
    checksum: str

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, as it stands in a checkpoint."""
        return {
            "path": str(self.path),
            "run_id": self.run_id,
            "sequence": self.sequence,
            "checksum": self.checksum,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Position:
        """Inverse of :meth:`to_dict`."""
        return cls(Path(plain["path"]), plain["run_id"], plain["sequence"], plain["checksum"])


@dataclass(frozen=True)
class History:
    """What a record holds up to a position.

    Attributes:
        path: The file that it was read from; None where none was found.
        lines: Those that stood at the position, in order.
        missing: How many lines are lost.
    """

    path: Path | None
    lines: list[Line]
    missing: int


def find_history(position: Position, directories: Iterable[Path]) -> History:
    """Read a record up to a position.

    Args:
        position: The position.
        directories: Where the record may be, the likeliest first; that of ``position.path`` comes last.

    Returns:
        The first that is whole; where none is, the one that misses the least.
    """
    best = History(None, [], position.sequence + 1)
    for directory in dict.fromkeys([*directories, position.path.parent]):
        for path in records_in(directory):
            found = _history_in(path, position)
            if found is not None and found.missing < best.missing:
                best = found
                if not best.missing:
                    return best
    return best


def _history_in(path: Path, position: Position) -> History | None:
    try:
        lines = read_runs(path)[0].get(position.run_id, [])
    except OSError:
        return None
    earlier = [line for line in lines if line.sequence <= position.sequence]
    if not earlier:
        return None
    after = position.sequence - earlier[-1].sequence
    if after == 0 and earlier[-1].checksum != position.checksum:
        return None
    return History(path, standing_lines(earlier), after + sum(map(len, gaps(earlier))))
