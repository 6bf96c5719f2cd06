"""The command ``phasewatch``."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from phasewatch._version import __version__
from phasewatch.printable import printable

if TYPE_CHECKING:
    from phasewatch.analysis import Analysis
    from phasewatch.record import Run
    from phasewatch.sweep import Source

_EXAMPLES = """\
examples:
  phasewatch demo                               train a small network, watched, and show what was found
  phasewatch analyze lightning_logs/version_0   find the transitions of a recorded run
  phasewatch measure checkpoints --build train:build
                                                measure the checkpoints of a run that was not watched
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

_MEASURE = """\
Measure every checkpoint of a finished run, as if phasewatch had watched it, and find its
transitions. The numbers are those that it would have given then. They go into an ordinary
run record, one checkpoint after another: started again, the command goes on where it was
stopped.

Network, data and loss come from one of these; modules are looked for in the current
directory too:
  --config config.yaml        as LightningCLI saved it in the directory of the run
  --module M:C --data M:D     a LightningModule class and a LightningDataModule class, made
                              with the hyper-parameters in the first checkpoint
  --build M:F                 a function of yours that returns (module, probe, loss_fn): the
                              network, a list of batches, loss_fn(module, batch) -> scalar
                              mean loss; or a phasewatch.Watch of them, for other settings
"""

_MEASURE_EXAMPLES = """\
examples:
  phasewatch measure lightning_logs/version_0 --config lightning_logs/version_0/config.yaml
  phasewatch measure lightning_logs/version_0 --module train:Net --data train:Digits
  phasewatch measure runs/checkpoints --build train:build
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
            return _COMMANDS[arguments.command](arguments)
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
    _add_measure(commands)
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


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure",
        help="measure the checkpoints of a finished run",
        description=_MEASURE,
        epilog=_MEASURE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measure.add_argument(
        "checkpoints", metavar="CKPT", type=Path, nargs="+", help="checkpoints, or a folder that they are in"
    )
    measure.add_argument("--config", metavar="FILE", type=Path, help="config.yaml as LightningCLI saved it")
    measure.add_argument("--module", metavar="MODULE:CLASS", help="the LightningModule")
    measure.add_argument("--data", metavar="MODULE:CLASS", help="the LightningDataModule, or a function")
    measure.add_argument(
        "--watch",
        metavar="MODULE:FUNCTION",
        help="returns the PhaseWatch with the settings to measure by (default: that of the config, else PhaseWatch())",
    )
    measure.add_argument(
        "--accelerator", metavar="NAME", help="of Lightning, such as cpu (default: that of the config, else its own)"
    )
    measure.add_argument("--build", metavar="MODULE:FUNCTION", help="returns (module, probe, loss_fn)")
    measure.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where the record and the report are written (default: measured/ beside the checkpoints)",
    )
    measure.add_argument(
        "--trust", action="store_true", help="let checkpoints run code that they hold (default: refuse them)"
    )
    measure.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=1,
        help="processes that measure, each on one thread (default: %(default)s)",
    )
    measure.add_argument(
        "--engine",
        choices=["processes", "ray"],
        default="processes",
        help="where the workers are: on this machine, or on a Ray cluster (default: %(default)s)",
    )
    measure.add_argument(
        "--budget",
        metavar="TIME",
        type=_seconds,
        help="measure for so long, such as 2h, 30m or 90s: coarsely first, then where something changed (default: all)",
    )
    measure.add_argument(
        "--shard",
        metavar="I/N",
        type=_shard,
        help="measure as the I-th of N independent jobs; the command without it, at last, takes up what they found",
    )
    measure.add_argument("--retry", action="store_true", help="try those again that failed before")
    measure.add_argument("--quiet", action="store_true", help="say nothing while it goes on")
    _add_alpha(measure)


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


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give I/N with I from 1 to N, such as 3/8")
    return int(first), int(count)


def _seconds(text: str) -> float:
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        value = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; give a number and its unit, such as 2h, 30m or 90s")
    return value


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _print(f"phasewatch: {str(message).removeprefix('phasewatch: ')}", file=sys.stderr)


def _analyze(arguments: argparse.Namespace) -> int:
    from phasewatch.analysis import analyze_run

    run, directory, signals = _loaded(arguments.run, arguments.signals)
    output = directory / _report_name(run.path) if arguments.output is None else arguments.output
    _report(analyze_run(run, alpha=arguments.alpha, signals=signals), output)
    return 0


def _report(analysis: Analysis, output: Path) -> None:
    """Print what was found and write the report."""
    from phasewatch.report import format_moved, format_table, verdict, write_report

    try:
        paths = write_report(analysis, output)
    except OSError as error:
        raise _Failure(
            f"the report cannot be written to {output} ({error.strerror or error}); give another --output."
        ) from error
    _print(verdict(analysis))
    if analysis.transitions:
        _print(f"\n{format_table(analysis.transitions)}")
    if moved := format_moved(analysis.run, analysis.transitions):
        _print(f"\n{moved}")
    _print()
    for name, path in (("page", paths.html), ("figure", paths.png), ("data", paths.json)):
        _print(f"{name + ':':<8}{path}")


def _measure(arguments: argparse.Namespace) -> int:
    from phasewatch.analysis import analyze_run
    from phasewatch.record import FILE_NAME
    from phasewatch.sweep import measure_checkpoints

    source = _source(arguments)
    say = (lambda text: None) if arguments.quiet else (lambda text: _print(text, file=sys.stderr))
    began = time.time()
    try:
        run = measure_checkpoints(
            source,
            arguments.checkpoints,
            directory=arguments.output,
            trust=arguments.trust,
            retry=arguments.retry,
            workers=arguments.workers,
            engine=arguments.engine,
            budget=arguments.budget,
            shard=arguments.shard,
            say=say,
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise _Failure(error) from error
    assert run.path is not None
    directory, analysis = run.path.parent, analyze_run(run, alpha=arguments.alpha)
    # not beside the events of a run that was watched, and once
    if run.path.name == FILE_NAME and any(measurement.time >= began for measurement in run.measurements):
        _write_events(analysis, directory)
    _report(analysis, directory / _report_name(run.path))
    _print(f"record: {directory}")
    return 0


def _source(arguments: argparse.Namespace) -> Source:
    """Where network, data and settings come from."""
    of_lightning = {name: getattr(arguments, name) for name in ("config", "module", "data", "watch", "accelerator")}
    given = [f"--{name}" for name, value in of_lightning.items() if value is not None]
    if arguments.build is not None:
        if given:
            raise _Failure(
                f"--build says all, and {', '.join(given)} is for what Lightning has saved; give one of them."
            )
        from phasewatch.sweep import FromBuild

        return FromBuild(arguments.build)
    if arguments.config is None and arguments.module is None:
        raise _Failure(
            "it is not known of what network and on which data the checkpoints are to be measured; give --config "
            "config.yaml (as LightningCLI saved it), --module package.module:Class --data package.module:Class, or "
            f"--build package.module:function.{_config_beside(arguments.checkpoints)}"
        )
    accelerator = of_lightning.pop("accelerator")
    try:
        from phasewatch.callbacks import FinishedRun
    except ImportError as error:
        raise _Failure(error) from error
    return FinishedRun(**of_lightning, trainer={} if accelerator is None else {"accelerator": accelerator})


def _config_beside(paths: Sequence[Path]) -> str:
    """A config that may be the one of these checkpoints. It names code to run, so it is not taken unasked."""
    places = [place for path in paths for place in (path, *path.absolute().parents[:2])]
    found = next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)
    return "" if found is None else f" There is a {found}."


def _write_events(analysis: Analysis, directory: Path) -> None:
    """The run as TensorBoard shows it."""
    from phasewatch.tensorboard import TensorBoardWriter

    writer = TensorBoardWriter(directory)
    for measurement in analysis.run.measurements:
        writer.on_measurement(measurement)
    writer.on_end(analysis)
    writer.close()


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
    from phasewatch.analysis import analyze_run
    from phasewatch.report import comparison_figure, format_comparison
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


_COMMANDS = {"analyze": _analyze, "measure": _measure, "compare": _compare, "demo": _demo}


if __name__ == "__main__":
    sys.exit(main())
