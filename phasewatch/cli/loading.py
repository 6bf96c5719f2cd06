"""The run that a path of the user's means: a record, event files or a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phasewatch.cli.speaking import Failure, reason, say

if TYPE_CHECKING:
    from phasewatch.record import Run


def loaded(path: Path, signals: list[str] | None = None, quiet: bool = False) -> tuple[Run, Path, list[str] | None]:
    """What ``_load`` gives.

    Raises:
        Failure: If there is no run.
    """
    from phasewatch.record import RecordError

    try:
        return _load(path, signals, quiet)
    except (RecordError, OSError, ImportError) as error:
        raise Failure(reason(error)) from error


def _load(path: Path, signals: list[str] | None, quiet: bool) -> tuple[Run, Path, list[str] | None]:
    """The run, the directory that it lies in, and which signals to look at (None: the usual ones).

    A record comes first, then event files, then tables; what is named is looked for where it is.
    """
    from phasewatch.logs import find_table, is_table, told_missing
    from phasewatch.record import RecordError, find_record, load_run
    from phasewatch.record.signals import LOSS, TRAINING_LOSS

    if is_table(path) and not _is_record(path):
        return _load_series(path, signals, quiet)
    if not (path.is_file() and "tfevents" in path.name):
        try:
            record = find_record(_beside_events(path))
        except FileNotFoundError:
            if not any(path.rglob("*tfevents*")):
                if (table := find_table(path)) is None:
                    raise
                return _load_series(table, signals, quiet)
        else:
            run = load_run(record)
            known = [*run.names, *([TRAINING_LOSS] if LOSS in run.observed else []), *run.observed]
            if signals is None or (signals and set(signals) <= set(known)):
                return run, record.parent, signals
            if not any(path.rglob("*tfevents*")):
                raise RecordError(told_missing(record, [name for name in signals if name not in known], known))
    return _load_series(path, signals, quiet)


def _beside_events(path: Path) -> Path:
    """Where the record lies: of the directory of our event files alone, that above it."""
    from phasewatch.record import FILE_NAME

    ours = path.name == Path(FILE_NAME).stem and any(path.glob("*tfevents*"))
    return path.parent if ours and any(path.absolute().parent.glob("*.jsonl")) else path


def _is_record(path: Path) -> bool:
    """Whether a file of lines of JSON is a record, or was meant to be one."""
    from phasewatch.record import FILE_NAME, RecordError, load_run

    if path.name.startswith(Path(FILE_NAME).stem):
        return True
    try:
        return path.suffix == Path(FILE_NAME).suffix and load_run(path) is not None
    except RecordError:
        return False


def _load_series(path: Path, names: list[str] | None, quiet: bool) -> tuple[Run, Path, list[str]]:
    """A run out of a table or of event files."""
    from phasewatch.logs import chosen, is_table, own_names, read_table, run_of_scalars, told_known
    from phasewatch.record import RecordError

    if is_table(path):
        source, scalars = path, own_names(read_table(path))
    else:
        from phasewatch.tensorboard.events import find_event_files, read_scalars

        source = find_event_files(path)
        scalars = own_names(read_scalars(source))
    if names is None:
        names, why = chosen(scalars)
        if not names:
            raise RecordError(
                f"{source} holds no phasewatch record and nothing that looks like a loss; name some of its series by "
                f"--signals. It has{told_known(list(scalars))}."
            )
        if not quiet:
            say(f"No phasewatch record here; reading {', '.join(names)} ({why}) from {source}.\n")
    run = run_of_scalars(scalars, names, str(source))
    finite = [name for name in names if name in run.names]
    if not finite:
        raise RecordError(f"{source} holds no finite value of {', '.join(names)}; name others by --signals.")
    return run, source if source.is_dir() else source.parent, finite
