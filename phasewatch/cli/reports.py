"""Writing a report, and saying where it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phasewatch.cli.speaking import Failure, reason, say

if TYPE_CHECKING:
    from phasewatch.report import ReportPaths


def holds_a_report(output: Path) -> bool:
    """Whether there is one in a directory, which another would replace."""
    from phasewatch.report import ReportPaths

    return any(path.exists() for path in ReportPaths.within(output))


def say_replaced(output: Path) -> None:
    """Say that an older report was replaced."""
    say(f"phasewatch: an older report in {output} was replaced.", file=sys.stderr)


def written(write: Callable[[Path], ReportPaths], output: Path) -> ReportPaths:
    """What ``write`` gives.

    Raises:
        Failure: If the directory cannot be written.
    """
    try:
        return write(output)
    except OSError as error:
        raise Failure(f"the report cannot be written ({reason(error)}); give another --output.") from error


def say_data(paths: ReportPaths) -> None:
    """Print the data of a report."""
    say(paths.json.read_text(encoding="utf-8").rstrip())


def say_places(paths: ReportPaths) -> None:
    """Print where its files are, after an empty line."""
    say()
    for name, path in (("page", paths.html), ("figure", paths.png), ("data", paths.json)):
        say(f"{name + ':':<8}{path}")
