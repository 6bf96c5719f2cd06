"""Checkpoints of a finished run: which there are, of which step they are, and where in them weights are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phasewatch.sweep.formats import (
    STEPS,
    SUFFIXES,
    CheckpointError,
    UnsafeCheckpointError,
    is_checkpoint,
    read_checkpoint,
)

EXTRA = "_extra_state"
"""How the names of what modules keep in ``state_dict()`` beside tensors end."""
_STEP_IN_NAME = re.compile(r"step[s]?[=_-]?(\d+)", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"(?<![\d.])(\d+)(?!\d|\.\d)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint.

    Attributes:
        path: The file; of Hugging Face's the folder.
        step: Optimizer steps made before it was written.
    """

    path: Path
    step: int


def find_checkpoints(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The checkpoints at these paths.

    Args:
        paths: Checkpoints, or folders that hold some, if not right there then below.

    Raises:
        CheckpointError: If there is nothing at a path, or no checkpoint.
    """
    found: dict[Path, Path] = {}  # what a link leads to, once
    for path in map(Path, paths):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give checkpoints, or the folder that they are in.")
        there = [path] if path.is_file() else _in_folder(path)
        if not there:
            raise CheckpointError(
                f"There is no checkpoint in {path} or below it; expected files that end in {', '.join(SUFFIXES)}, or "
                "folders as Hugging Face's Trainer writes them (checkpoint-500)."
            )
        for checkpoint in there:
            found.setdefault(checkpoint.resolve(), checkpoint)
    if not found:
        raise CheckpointError("No checkpoint was given; give checkpoints, or the folder that they are in.")
    return list(found.values())


def in_order(paths: Iterable[Path], trust: bool = False) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints in the order of their own steps: what is written in them, or else a number in their names.

    Args:
        paths: The checkpoints.
        trust: Whether they may run code.

    Returns:
        The checkpoints, one a step, and what is to be said of others that are left out.

    Raises:
        UnsafeCheckpointError: If one asks for code to be run.
        CheckpointError: If none has a step, or two of one step hold other weights.
    """
    by_step: dict[int, Path] = {}
    said, without_step = [], []
    for path in paths:
        try:
            step = step_of(path, read_checkpoint(path, trust))
        except UnsafeCheckpointError:
            raise
        except CheckpointError as error:  # said again when it is to be measured
            step = step_in_name(path)
            if step is None:
                said.append(f"{error} It is left out.")
                continue
        if step is None:
            without_step.append(path)
        elif step not in by_step:
            by_step[step] = path
        elif _same_weights(by_step[step], path, trust):
            said.append(f"{path} holds the same weights as {by_step[step]}, of step {step}: it is left out.")
        else:
            raise CheckpointError(
                f"{by_step[step]} and {path} are both of step {step} and hold different weights; give those of one run."
            )
    if not by_step:
        raise CheckpointError(
            "No checkpoint says of which step it is"
            f"{'' if not without_step else f' ({_listed(without_step)})'}: expected global_step or step in it, or a "
            "number in its name, such as model-500.pt."
        )
    if without_step:
        said.append(f"Left out, for nothing says of which step they are: {_listed(without_step)}.")
    return [Checkpoint(by_step[step], step) for step in sorted(by_step)], said


def first_content(checkpoints: Sequence[Checkpoint], trust: bool = False) -> Any:
    """What is in the first checkpoint that can be read.

    Raises:
        CheckpointError: If there is none.
    """
    for checkpoint in checkpoints[:-1]:
        with suppress(CheckpointError):
            return read_checkpoint(checkpoint.path, trust)
    return read_checkpoint(checkpoints[-1].path, trust)


def step_of(path: Path, content: Any) -> int | None:
    """The step of a checkpoint; None where nothing tells."""
    if isinstance(content, Mapping):
        for step in (_batches_that_stepped(content), *(content.get(name) for name in STEPS)):
            if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
                return step
    return step_in_name(path)


def step_in_name(path: Path) -> int | None:
    """The number behind ``step`` in a name, else the last whole number in it."""
    name = path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES else path.name
    numbers = _STEP_IN_NAME.findall(name) or _WHOLE_NUMBER.findall(name)
    return int(numbers[-1]) if numbers else None


def state_dicts(content: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """All that may be a network's weights in a checkpoint: where it stands there, and names to tensors."""
    if isinstance(content, torch.nn.Module):  # of trusted ones alone
        content = content.state_dict()
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(name, str) and (isinstance(v, Tensor) or name.endswith(EXTRA)) for name, v in content.items()):
        yield place, content
        return
    for name, inner in content.items():
        if isinstance(name, str):
            yield from state_dicts(inner, f"{place}.{name}" if place else name)


def _in_folder(folder: Path) -> list[Path]:
    """What a folder is itself, as one of Hugging Face's, and what lies right in it, or where nothing does below it."""
    for pattern in ("*", "**/*"):
        there = [path for path in (folder, *folder.glob(pattern)) if is_checkpoint(path)]
        folders = [path for path in there if path.is_dir()]
        found = [path for path in there if path.is_dir() or not any(parent in folders for parent in path.parents)]
        if found:
            return sorted(found, key=lambda path: (path == folder, path))
    return []


def _batches_that_stepped(content: Mapping[str, Any]) -> int | None:
    """What a watch calls the step where Lightning's ``global_step`` counts the steps of several optimizers together.

    The count in its checkpoints is one behind from the end of a batch until the next one, or the end of the epoch.
    """
    if len(content.get("optimizer_states") or ()) < 2:
        return None
    loop = _at(content, "loops", "fit_loop")
    stepped = _at(loop, "epoch_loop.state_dict", "_batches_that_stepped")
    batch, epoch = _at(loop, "epoch_loop.batch_progress", "current"), _at(loop, "epoch_progress", "current")
    if not isinstance(stepped, int) or batch is None or epoch is None:
        return None
    is_behind = batch["processed"] == batch["ready"] and epoch["processed"] < epoch["ready"]
    return stepped + is_behind


def _same_weights(one: Path, other: Path, trust: bool) -> bool:
    try:
        first, second = (dict(state_dicts(read_checkpoint(path, trust))) for path in (one, other))
    except CheckpointError:
        return False
    return first.keys() == second.keys() and all(
        first[place].keys() == second[place].keys()
        and all(_equal(tensor, second[place][name]) for name, tensor in first[place].items())
        for place in first
    )


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return repr(one) == repr(other)
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _at(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _listed(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
