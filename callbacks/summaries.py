"""The verdict on a run, as the terminal is told it and as loggers keep it: numbers, words and the report."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

from phasewatch.analysis import Analysis
from phasewatch.callbacks.places import is_a
from phasewatch.price import what_would_help
from phasewatch.record import FILE_NAME
from phasewatch.report import verdict, write_report
from phasewatch.schedule import Spread
from phasewatch.tags import SUMMARY
from phasewatch.transitions.detect import MIN_POINTS
from phasewatch.watch import Watch

FOLDER = "phasewatch"
"""Of the report, among the artifacts of a run."""


def prefixed(metric: str, name: str | None) -> str:
    """A metric as the watch of this name has it."""
    return metric if name is None else f"{name}/{metric}"


def log_verdict(logger: Any, analysis: Analysis, name: str | None = None) -> None:
    """Give a logger the verdict at the end of a run.

    All take the numbers as metrics, under ``phasewatch_summary/``, which W&B keeps in the run's summary. W&B and MLflow
    have the words and the report as well; TensorBoard is written to by its own writer.

    Args:
        logger: One of the trainer.
        analysis: Of the whole run.
        name: Of the watch, among several.
    """
    measurements = analysis.run.measurements
    if not measurements or is_a(logger, "TensorBoardLogger"):
        return
    said = verdict(analysis)
    numbers = {prefixed(f"{SUMMARY}{one}", name): value for one, value in said.numbers().items()}
    logger.log_metrics(numbers, step=measurements[-1].step)
    logger.save()
    for kind, write in _WITH_ARTIFACTS.items():
        if is_a(logger, kind):
            with TemporaryDirectory() as folder:
                write_report(analysis, folder)
                write(logger, str(said), folder, FOLDER if name is None else f"{FOLDER}-{name}")


def _to_wandb(logger: Any, said: str, report: str, called: str) -> None:
    logger.experiment.summary[f"{called}_summary/verdict"] = said
    logger.experiment.log_artifact(report, name=f"{called}-{logger.experiment.id}", type="report")


def _to_mlflow(logger: Any, said: str, report: str, called: str) -> None:
    logger.experiment.set_tag(logger.run_id, f"{called}.verdict", said)
    logger.experiment.log_artifacts(logger.run_id, report, called)


_WITH_ARTIFACTS: dict[str, Callable[[Any, str, str, str], None]] = {
    "WandbLogger": _to_wandb,
    "MLFlowLogger": _to_mlflow,
}


def told_at_the_end(watch: Watch) -> str:
    """What a run says when it ends: what was measured, the verdict, and where to look."""
    run = watch.run
    measured = len(run.measurements)
    said = "" if watch.analysis is None else textwrap.indent(f"\n{verdict(watch.analysis)}", "  ")
    text = f"phasewatch: {measured} measurements"
    if watch.clock.training_seconds:
        text += (
            f", {watch.clock.measuring_seconds:.1f} s measuring beside {watch.clock.training_seconds:.1f} s of training"
        )
    if watch.directory is None:
        return f"{text}.{said}"
    # where several records share the directory, the file says which
    alone = run.path is None or run.path.name == FILE_NAME
    record = watch.directory if alone else run.path
    text += f".{said}"
    if measured:
        text += f"\n  phasewatch analyze {record}\n  tensorboard --logdir {watch.directory}"
    budgets = [m.schedule for m in watch.monitors if isinstance(m.schedule, Spread) and m.schedule.max_overhead]
    short = measured < MIN_POINTS and bool(budgets) and len(watch.prices) > 0
    # where the seconds would have paid for one more, it is the run that was short
    if short and budgets[0].left(watch.clock) < watch.clock.measurement_seconds:
        helps = what_would_help(watch.prices, budgets[0], watch.clock.training_seconds)
        text += f"\n  Little was measured: {helps}"
    return text
