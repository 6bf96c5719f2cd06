"""``phasewatch compare``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from phasewatch.cli.arguments import add_alpha
from phasewatch.cli.loading import loaded
from phasewatch.cli.speaking import Failure, say

_ABOUT = """\
Find the transitions of several runs, such as those of several seeds, and match them:
what all of them go through is told from what only some do, and how much the steps
differ. Prints a table and draws the runs one above the other (PNG).
"""

_EXAMPLES = """\
examples:
  phasewatch compare runs/seed_0 runs/seed_1 runs/seed_2
  phasewatch compare lightning_logs/version_* --output seeds.png
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
        "--output",
        metavar="FILE",
        type=Path,
        help="where the figure is written (default: comparison.png in the directory that holds all the runs)",
    )
    compare.set_defaults(perform=perform)


def perform(arguments: argparse.Namespace) -> int:
    """Match the transitions, say and draw them."""
    given = [loaded(path) for path in arguments.runs]
    places = [(run.path or directory).resolve() for run, directory, _ in given]
    if len(set(places)) < max(2, len(places)):
        raise Failure(f"compare needs several different runs; given: {', '.join(map(str, arguments.runs))}.")
    directories = [directory.resolve() for _, directory, _ in given]
    named = directories if len(set(directories)) == len(directories) else places
    from phasewatch.analysis import analyze_run
    from phasewatch.figures import comparison_figure
    from phasewatch.report import format_comparison
    from phasewatch.transitions import align_transitions

    together = Path(os.path.commonpath(directories))
    names = [str(place.relative_to(together)) for place in named]
    analyses = [analyze_run(run, alpha=arguments.alpha, signals=signals) for run, _, signals in given]
    aligned = align_transitions([analysis.transitions for analysis in analyses])
    output = together / "comparison.png" if arguments.output is None else arguments.output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        comparison_figure(names, analyses, aligned).savefig(output, format="png")
    except OSError as error:
        raise Failure(
            f"the figure cannot be written to {output} ({error.strerror or error}); give another --output."
        ) from error
    say(format_comparison(names, aligned))
    for name, analysis in zip(names, analyses, strict=True):
        for told in filter(None, (analysis.note, analysis.run.told_ending)):
            say(f"{name}: {told}")
    say(f"\nfigure: {output}")
    return 0
