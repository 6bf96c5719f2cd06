"""``phasewatch compare``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phasewatch.cli.arguments import add_alpha, add_form, add_signals, at_least_one
from phasewatch.cli.loading import loaded
from phasewatch.cli.reports import holds_a_report, say_data, say_places, say_replaced, written
from phasewatch.cli.speaking import Failure, columns, fitted, say

if TYPE_CHECKING:
    from phasewatch.record import Run

_ABOUT = """\
Find the transitions of several runs, such as those of several seeds, and match them:
what all of them go through is told from what only some do, and how much the steps
differ. Prints a table, and writes a figure (PNG), the data (JSON) and a page (HTML).

Two transitions are the same where the 95 % intervals of their places overlap; with
--factor 1.5 also where one comes up to one and a half times as late.
"""

_EXAMPLES = """\
examples:
  phasewatch compare runs/seed_0 runs/seed_1 runs/seed_2
  phasewatch compare lightning_logs/version_* --factor 1.5 --output seeds
  phasewatch compare runs/* --signals llc_behavioral
"""


def add(commands: Any) -> None:
    """Say what it takes."""
    compare = commands.add_parser(
        "compare",
        help="match the transitions of several runs",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="log directory of a run, as for analyze")
    add_alpha(compare)
    compare.add_argument(
        "--factor",
        type=at_least_one,
        default=1.0,
        help="by how much later the same transition may come in another run (default: %(default)s)",
    )
    compare.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where the report is written (default: comparison/ in the directory that holds all the runs)",
    )
    add_signals(compare)
    add_form(compare)
    compare.set_defaults(perform=perform)


def perform(arguments: argparse.Namespace) -> int:
    """Match the transitions, say and write what was found."""
    given = [one for path in arguments.runs if (one := _given(path, arguments.signals)) is not None]
    places = [(run.path or directory).resolve() for run, directory, _ in given]
    if len(set(places)) < max(2, len(places)):
        raise Failure(f"compare needs several different runs; given: {', '.join(map(str, arguments.runs))}.")
    directories = [directory.resolve() for _, directory, _ in given]
    named = directories if len(set(directories)) == len(directories) else places
    from phasewatch.analysis import analyze_run
    from phasewatch.report import compare_runs, format_comparison, write_comparison

    together = Path(os.path.commonpath(directories))
    names = [str(place.relative_to(together)) for place in named]
    analyses = [analyze_run(run, alpha=arguments.alpha, signals=signals) for run, _, signals in given]
    comparison = compare_runs(names, analyses, arguments.factor)
    output = together / "comparison" if arguments.output is None else arguments.output
    there = holds_a_report(output)
    paths = written(lambda directory: write_comparison(comparison, directory), output)
    if there and not arguments.quiet:
        say_replaced(output)
    if arguments.json:
        say_data(paths)
        return 0
    say(format_comparison(comparison, columns()))
    for remark in comparison.remarks:
        say(fitted(remark))
    if not arguments.quiet:
        say_places(paths)
    return 0


def _given(path: Path, signals: list[str] | None) -> tuple[Run, Path, list[str] | None] | None:
    """One of the runs; None, which is said, where it has just begun and has written nothing yet."""
    try:
        return loaded(path, signals, quiet=True)
    except Failure as failure:
        if not (isinstance(failure.__cause__, FileNotFoundError) and path.exists()):
            raise
        say(f"phasewatch: {path} is left out, as it holds nothing yet: {failure}", file=sys.stderr)
        return None
