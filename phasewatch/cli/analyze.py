"""``phasewatch analyze``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phasewatch.cli.arguments import add_alpha, add_form, add_signals
from phasewatch.cli.loading import loaded
from phasewatch.cli.reports import holds_a_report, say_data, say_places, say_replaced, written
from phasewatch.cli.speaking import columns, fitted, say

if TYPE_CHECKING:
    from phasewatch.analysis import Analysis

_ABOUT = """\
Find the transitions of a recorded run, print them as a table, and write a figure
(PNG), the data (JSON) and a page (HTML) that shows both.

RUN is the log directory of a run watched by phasewatch, or its record (phasewatch.jsonl,
or phasewatch-<id>.jsonl where another run was recorded there before). Of a directory that
holds several runs, it is said which. Runs that phasewatch did not watch are read too: from
TensorBoard event files, Lightning's metrics.csv, or a table with a column of steps (CSV, JSONL,
parquet). Then what looks like a loss is analysed, or what --signals names.
"""

_EXAMPLES = """\
examples:
  phasewatch analyze lightning_logs/version_0
  phasewatch analyze lightning_logs/version_0 --alpha 0.01 --output report
  phasewatch analyze runs/other --signals train/loss val/loss
  phasewatch analyze metrics.csv --signals train_loss accuracy
"""


def add(commands: Any) -> None:
    """Say what it takes."""
    analyze = commands.add_parser(
        "analyze",
        help="find the transitions of a recorded run",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    analyze.add_argument("run", metavar="RUN", type=Path, help="log directory of the run, or its record")
    add_alpha(analyze)
    analyze.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where the report is written (default: report/ beside the record)",
    )
    add_signals(analyze)
    add_form(analyze)
    analyze.set_defaults(perform=perform)


def perform(arguments: argparse.Namespace) -> int:
    """Find the transitions, say and write them."""
    from phasewatch.analysis import analyze_run

    run, directory, signals = loaded(arguments.run, arguments.signals, quiet=arguments.quiet or arguments.json)
    output = directory / report_name(run.path) if arguments.output is None else arguments.output
    analysis = analyze_run(run, alpha=arguments.alpha, signals=signals)
    there = holds_a_report(output)
    report(analysis, output, quiet=arguments.quiet, as_json=arguments.json)
    if there and not arguments.quiet:
        say_replaced(output)
    return 0


def report(analysis: Analysis, output: Path, quiet: bool = False, as_json: bool = False) -> None:
    """Write the report and print what was found.

    Args:
        analysis: What was found.
        output: Directory of the report.
        quiet: Print the verdict alone.
        as_json: Print the data as JSON and nothing else.
    """
    from phasewatch.report import format_hints, format_moved, format_table, verdict, write_report

    paths = written(lambda directory: write_report(analysis, directory), output)
    if as_json:
        say_data(paths)
        return
    say(fitted(verdict(analysis)))
    if quiet:
        return
    if analysis.transitions:
        say(f"\n{format_table(analysis.transitions, width=columns())}")
    for describe in (format_moved, format_hints):
        if told := describe(analysis.run, analysis.transitions, width=columns()):
            say(f"\n{told}")
    say_places(paths)


def report_name(record: Path | None) -> str:
    """``report``, or where several records share a directory ``report-<id>``."""
    stem = "" if record is None else record.stem
    return stem.replace("phasewatch", "report", 1) if stem.startswith("phasewatch-") else "report"
