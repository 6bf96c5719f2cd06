"""The command ``phasewatch``."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from phasewatch._version import __version__
from phasewatch.printable import printable

if TYPE_CHECKING:
    from phasewatch.record import Run

_EXAMPLES = """\
examples:
  phasewatch demo                               train a small network, watched, and show what was found
  phasewatch analyze lightning_logs/version_0   find the transitions of a recorded run
  phasewatch compare lightning_logs/version_*   which transitions do several runs have in common?
"""

_ANALYZE = """\
Find the transitions of a recorded run, print them as a table, and write a figure
(PNG), the data (JSON) and a page (HTML) that shows both.

RUN is the log directory of a run watched by phasewatch, or its record (phasewatch.jsonl,
or phasewatch-<id>.jsonl where another run was recorded there before). Of a directory that
holds several runs, it is said which. Runs that phasewatch did not watch are read too: from
TensorBoard event files, Lightning's metrics.csv, or a table with a column of steps (CSV, JSONL,
parquet). Then what looks like a loss is analysed, or what --signals names.
"""

_ANALYZE_EXAMPLES = """\
examples:
  phasewatch analyze lightning_logs/version_0
  phasewatch analyze lightning_logs/version_0 --alpha 0.01 --output report
  phasewatch analyze runs/other --signals train/loss val/loss
  phasewatch analyze metrics.csv --signals train_loss accuracy
"""

_COMPARE = """\
Find the transitions of several runs, such as those of several seeds, and match them:
what all of them go through is told from what only some do, and how much the steps
differ. Prints a table and draws the runs one above the other (PNG).
"""

_COMPARE_EXAMPLES = """\
examples:
  phasewatch compare runs/seed_0 runs/seed_1 runs/seed_2
  phasewatch compare lightning_logs/version_* --output seeds.png
"""


def _print(text: object = "", file: TextIO | None = None) -> None:
    print(printable(str(text)), file=file)


class _Failure(Exception):
    """What the user is told before the command ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; default those of the process.

    Returns:
        The exit status: 0, or 2 where what was asked for cannot be done.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without λ is no reason to fail
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Of other packages, to their developers.
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            return {"analyze": _analyze, "compare": _compare, "demo": _demo}[arguments.command](arguments)
    except _Failure as failure:
        _print(f"phasewatch: {failure}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phasewatch",
        description="Watch the geometry of the loss while a network trains: when does it change phase?",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"phasewatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    analyze = commands.add_parser(
        "analyze",
        help="find the transitions of a recorded run",
        description=_ANALYZE,
        epilog=_ANALYZE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    analyze.add_argument("run", metavar="RUN", type=Path, help="log directory of the run, or its record")
    _add_alpha(analyze)
    analyze.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where the report is written (default: report/ beside the record)",
    )
    analyze.add_argument(
        "--signals",
        metavar="NAME",
        nargs="+",
        help="analyse these signals, of the record, the event files or the table",
    )
    compare = commands.add_parser(
        "compare",
        help="match the transitions of several runs",
        description=_COMPARE,
        epilog=_COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="log directory of a run, as for analyze")
    _add_alpha(compare)
    compare.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where the figure is written (default: comparison.png in the directory that holds all the runs)",
    )
    demo = commands.add_parser(
        "demo",
        help="train a small network, watched, and show what was found",
        description="Train a small network on real data with phasewatch watching, and show what was found.",
    )
    demo.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("runs/demo"),
        help="where to write (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
    return parser


def _add_alpha(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--alpha",
        type=_probability,
        default=0.05,
        help="wanted rate of false alarms in a run without transitions (default: %(default)s)",
    )


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; give a number between 0 and 1, such as 0.05")
    return value


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _print(f"phasewatch: {message}", file=sys.stderr)


def _analyze(arguments: argparse.Namespace) -> int:
    run, directory, signals = _loaded(arguments.run, arguments.signals)
    from phasewatch.report import analyze_run, format_moved, format_table, verdict, write_report

    analysis = analyze_run(run, alpha=arguments.alpha, signals=signals)
    output = directory / _report_name(run.path) if arguments.output is None else arguments.output
    try:
        paths = write_report(analysis, output)
    except OSError as error:
        raise _Failure(
            f"the report cannot be written to {output} ({error.strerror or error}); give another --output."
        ) from error
    _print(verdict(analysis))
    if analysis.transitions:
        _print(f"\n{format_table(analysis.transitions)}")
    if moved := format_moved(run, analysis.transitions):
        _print(f"\n{moved}")
    _print()
    for name, path in (("page", paths.html), ("figure", paths.png), ("data", paths.json)):
        _print(f"{name + ':':<8}{path}")
    return 0


def _report_name(record: Path | None) -> str:
    """``report``, or where several records share a directory ``report-<id>``."""
    stem = "" if record is None else record.stem
    return stem.replace("phasewatch", "report", 1) if stem.startswith("phasewatch-") else "report"


def _compare(arguments: argparse.Namespace) -> int:
    loaded = [_loaded(path) for path in arguments.runs]
    places = [(run.path or directory).resolve() for run, directory, _ in loaded]
    if len(set(places)) < max(2, len(places)):
        raise _Failure(f"compare needs several different runs; given: {', '.join(map(str, arguments.runs))}.")
    directories = [directory.resolve() for _, directory, _ in loaded]
    named = directories if len(set(directories)) == len(directories) else places
    from phasewatch.report import analyze_run, comparison_figure, format_comparison
    from phasewatch.transitions import align_transitions

    together = Path(os.path.commonpath(directories))
    names = [str(place.relative_to(together)) for place in named]
    analyses = [analyze_run(run, alpha=arguments.alpha, signals=signals) for run, _, signals in loaded]
    aligned = align_transitions([analysis.transitions for analysis in analyses])
    output = together / "comparison.png" if arguments.output is None else arguments.output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        comparison_figure(names, analyses, aligned).savefig(output, format="png")
    except OSError as error:
        raise _Failure(
            f"the figure cannot be written to {output} ({error.strerror or error}); give another --output."
        ) from error
    _print(format_comparison(names, aligned))
    for name, analysis in zip(names, analyses, strict=True):
        for told in filter(None, (analysis.note, analysis.run.told_ending)):
            _print(f"{name}: {told}")
    _print(f"\nfigure: {output}")
    return 0


def _loaded(path: Path, signals: list[str] | None = None) -> tuple[Run, Path, list[str] | None]:
    """What ``_load`` gives, or the failure to tell."""
    from phasewatch.record import RecordError

    try:
        return _load(path, signals)
    except (RecordError, OSError, ImportError) as error:
        raise _Failure(error) from error


def _load(path: Path, signals: list[str] | None) -> tuple[Run, Path, list[str] | None]:
    """The run, the directory that it lies in, and which signals to look at (None: the usual ones).

    A record comes first, then event files, then tables; what is named is looked for where it is.
    """
    from phasewatch.logs import find_table, is_table
    from phasewatch.record import RecordError, find_record, load_run
    from phasewatch.record.signals import LOSS, TRAINING_LOSS

    if is_table(path) and not _is_record(path):
        return _load_series(path, signals)
    if not (path.is_file() and "tfevents" in path.name):
        try:
            record = find_record(path)
        except FileNotFoundError:
            if not any(path.rglob("*tfevents*")):
                if (table := find_table(path)) is None:
                    raise
                return _load_series(table, signals)
        else:
            run = load_run(record)
            known = [*run.names, *([TRAINING_LOSS] if LOSS in run.observed else []), *run.observed]
            if signals is None or set(signals) <= set(known):
                return run, record.parent, signals
            if not any(path.rglob("*tfevents*")):
                unknown = ", ".join(repr(name) for name in signals if name not in known)
                has = ", ".join(dict.fromkeys(known)) or "none"
                raise RecordError(f"{record} has no series {unknown}; it has: {has}.")
    return _load_series(path, signals)


def _is_record(path: Path) -> bool:
    """Whether a file of lines of JSON is a record, or was meant to be one."""
    from phasewatch.record import FILE_NAME, RecordError, load_run

    if path.name.startswith(Path(FILE_NAME).stem):
        return True
    try:
        return path.suffix == Path(FILE_NAME).suffix and load_run(path) is not None
    except RecordError:
        return False


def _load_series(path: Path, names: list[str] | None) -> tuple[Run, Path, list[str]]:
    """A run out of a table or of event files."""
    from phasewatch.logs import chosen, is_table, read_table, run_of_scalars, unprefixed
    from phasewatch.record import RecordError

    if is_table(path):
        source, scalars = path, unprefixed(read_table(path))
    else:
        from phasewatch.tensorboard.events import find_event_files, read_scalars

        source = find_event_files(path)
        scalars = unprefixed(read_scalars(source))
    if names is None:
        names, why = chosen(scalars)
        if not names:
            raise RecordError(
                f"{source} holds no phasewatch record and nothing that looks like a loss; name some of its series by "
                f"--signals. It has: {', '.join(scalars) or 'none'}."
            )
        _print(f"No phasewatch record here; reading {', '.join(names)} ({why}) from {source}.\n")
    run = run_of_scalars(scalars, names, str(source))
    finite = [name for name in names if name in run.names]
    if not finite:
        raise RecordError(f"{source} holds no finite value of {', '.join(names)}; name others by --signals.")
    return run, source if source.is_dir() else source.parent, finite


def _demo(arguments: argparse.Namespace) -> int:
    from phasewatch.demo import run

    run(arguments.output, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
