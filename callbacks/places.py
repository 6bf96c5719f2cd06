"""Where the record of a run lies: a directory of its own, and none that a logger keeps its books in."""

from __future__ import annotations

import time
from pathlib import Path
from secrets import token_hex
from typing import Any

from phasewatch.record import FILE_NAME

FOLDER = "phasewatch_logs"


def checked_name(name: str | None) -> str | None:
    """The name of a watch among several in one trainer, as it stands in folders and metrics; None where it has none.

    Raises:
        ValueError: If it is no name.
    """
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name is {name!r}; expected letters, digits and underscores, as 'second', or None")
    return name


def directory_of_run(trainer: Any, earlier: Path | None) -> Path:
    """The directory of the first logger that has one for each run; else a new one in ``phasewatch_logs``.

    ``MLFlowLogger`` and ``WandbLogger`` name one directory for all runs, and MLflow takes any folder in it for an
    experiment of its own.

    Args:
        trainer: The trainer.
        earlier: The directory of the run that is resumed. If it lies in ``phasewatch_logs``, it goes on there.
    """
    for logger in trainer.loggers:
        if is_a(logger, "TensorBoardLogger", "CSVLogger"):
            return Path(logger.log_dir)
    folder = Path(trainer.default_root_dir) / FOLDER
    if earlier is not None and earlier.parent == folder.absolute():
        return folder / earlier.name
    return folder / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{token_hex(4)}"


def checkpoints_of_run(directory: Path, record: Path | None) -> Path:
    """The folder for checkpoints around transitions: ``transitions``, or ``transitions-<id>`` as the record has it."""
    shared = record is not None and record.name != FILE_NAME
    return directory / (record.stem.replace("phasewatch", "transitions", 1) if record and shared else "transitions")


def is_a(logger: Any, *names: str) -> bool:
    """Whether a logger is of a class of one of these names, or of one derived from it, in any namespace."""
    return any(base.__name__ in names for base in type(logger).__mro__)
