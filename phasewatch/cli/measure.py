"""``phasewatch measure``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phasewatch.cli.analyze import report, report_name
from phasewatch.cli.arguments import add_alpha, seconds, shard
from phasewatch.cli.speaking import Failure, reason, say

if TYPE_CHECKING:
    from phasewatch.analysis import Analysis
    from phasewatch.sweep import Source

_ABOUT = """\
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

_EXAMPLES = """\
examples:
  phasewatch measure lightning_logs/version_0 --config lightning_logs/version_0/config.yaml
  phasewatch measure lightning_logs/version_0 --module train:Net --data train:Digits
  phasewatch measure runs/checkpoints --build train:build
"""


def add(commands: Any) -> None:
    """Say what it takes."""
    measure = commands.add_parser(
        "measure",
        help="measure the checkpoints of a finished run",
        description=_ABOUT,
        epilog=_EXAMPLES,
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
        type=seconds,
        help="measure for so long, such as 2h, 30m or 90s: coarsely first, then where something changed (default: all)",
    )
    measure.add_argument(
        "--shard",
        metavar="I/N",
        type=shard,
        help="measure as the I-th of N independent jobs; the command without it, at last, takes up what they found",
    )
    measure.add_argument("--retry", action="store_true", help="try those again that failed before")
    measure.add_argument("--quiet", action="store_true", help="say nothing while it goes on")
    add_alpha(measure)
    measure.set_defaults(perform=perform)


def perform(arguments: argparse.Namespace) -> int:
    """Measure, and say and write what was found."""
    from phasewatch.analysis import analyze_run
    from phasewatch.record import FILE_NAME
    from phasewatch.sweep import measure_checkpoints

    source = _source(arguments)
    tell = (lambda text: None) if arguments.quiet else (lambda text: say(text, file=sys.stderr))
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
            say=tell,
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Failure(reason(error)) from error
    assert run.path is not None
    directory, analysis = run.path.parent, analyze_run(run, alpha=arguments.alpha)
    # not beside the events of a run that was watched, and once
    if run.path.name == FILE_NAME and any(measurement.time >= began for measurement in run.measurements):
        _write_events(analysis, directory)
    report(analysis, directory / report_name(run.path))
    say(f"record: {directory}")
    return 0


def _source(arguments: argparse.Namespace) -> Source:
    """Where network, data and settings come from."""
    of_lightning = {name: getattr(arguments, name) for name in ("config", "module", "data", "watch", "accelerator")}
    given = [f"--{name}" for name, value in of_lightning.items() if value is not None]
    if arguments.build is not None:
        if given:
            raise Failure(
                f"--build says all, and {', '.join(given)} is for what Lightning has saved; give one of them."
            )
        from phasewatch.sweep import FromBuild

        return FromBuild(arguments.build)
    if arguments.config is None and arguments.module is None:
        raise Failure(
            "it is not known of what network and on which data the checkpoints are to be measured; give --config "
            "config.yaml (as LightningCLI saved it), --module package.module:Class --data package.module:Class, or "
            f"--build package.module:function.{_config_beside(arguments.checkpoints)}"
        )
    accelerator = of_lightning.pop("accelerator")
    try:
        from phasewatch.callbacks import FinishedRun
    except ImportError as error:
        raise Failure(reason(error)) from error
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
