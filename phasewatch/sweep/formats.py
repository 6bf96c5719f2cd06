"""What is in a checkpoint: a file of one of several kinds, or a folder as Hugging Face's Trainer writes it."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
"""How files end that are taken for checkpoints where a folder is given."""
FOLDER = re.compile(r"checkpoint-\d+")
"""What Hugging Face's Trainer calls its checkpoints, each a folder of its own."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The weights in such a folder; large ones are in several files, which an index names."""
BESIDE = ("trainer_state.json", "config.json", "optimizer.pt", "optimizer.bin")
"""What lies beside them, one of these at least."""
STEPS = ("global_step", "step", "steps", "iteration", "iter")
"""What programs call the step in the checkpoints that they write."""
_REFUSED = re.compile(r"(?:GLOBAL|Unsupported class|Unsupported global:) (?:GLOBAL )?([\w.]+)")
_REASON = "WeightsUnpickler error: "
_POINTER = b"version https://git-lfs"


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read or used; the message says how to mend it."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint asks for code to be run."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like that of a checkpoint."""
    return path.suffix in SUFFIXES if path.is_file() else is_folder(path)


def is_folder(path: Path) -> bool:
    """Whether a path is that of a folder with one checkpoint: by two of its name, its weights, and what is beside."""
    named = FOLDER.fullmatch(path.name) is not None
    weights = any((path / name).exists() for name in (*WEIGHTS, *map(_index, WEIGHTS)))
    beside = any((path / name).exists() for name in BESIDE)
    return path.is_dir() and named + weights + beside >= 2


def read_checkpoint(path: Path, trust: bool = False) -> Any:
    """What is in a checkpoint, its tensors in main memory.

    Args:
        path: The file, or a folder of Hugging Face's.
        trust: Whether it may run code.

    Raises:
        UnsafeCheckpointError: If it asks for code to be run, and is not trusted.
        CheckpointError: If it cannot be read.
    """
    if path.is_dir():
        return _read_folder(path, trust)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        # not read before it is used: of most of a checkpoint, the optimizer's state, nothing is
        return torch.load(path, map_location="cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        wanted = _wanted(path, error)
        if wanted and not trust:
            raise UnsafeCheckpointError(
                f"{path} is no plain checkpoint: reading it would run code, for it asks for {', '.join(wanted)}. If "
                "you trust who wrote it, --trust (in Python trust=True) reads it all the same; else save its "
                "state_dict() alone."
            ) from error
        raise _unreadable(path, error) from error


def _read_folder(folder: Path, trust: bool) -> dict[str, Any]:
    """The weights in a folder of Hugging Face's, and its step."""
    weights: dict[str, Tensor] = {}
    for part in _parts(folder):
        content = read_checkpoint(part, trust)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{part} holds no weights; expected names and tensors, as state_dict() has them.")
        weights.update(content["state_dict"] if part.suffix == ".safetensors" else content)
    state: Any = None
    with suppress(CheckpointError):  # written last: where it is torn, the name of the folder has the step
        state = _json(folder / "trainer_state.json")
    return {"state_dict": weights, "global_step": state.get("global_step") if isinstance(state, dict) else None}


def _parts(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / _index(name)).exists():
            told = _json(index)
            named = told.get("weight_map") if isinstance(told, dict) else None
            if not isinstance(named, dict) or not all(isinstance(part, str) for part in named.values()):
                raise CheckpointError(f"{index} names no files; expected a weight_map, from parameters to files.")
            parts = sorted(set(named.values()))
            if outside := [part for part in parts if Path(part).name != part]:
                raise CheckpointError(f"{index} names {outside[0]!r}; expected files right in its own folder.")
            return [folder / part for part in parts]
    raise CheckpointError(f"{folder} holds no weights; expected {' or '.join(WEIGHTS)}, or an index of their parts.")


def _index(name: str) -> str:
    return f"{name}.index.json"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The weights, and the step if the metadata have it; they are texts."""
    try:
        opened = importlib.import_module("safetensors").safe_open
    except ImportError as error:
        raise CheckpointError(
            f"{path} is read by safetensors, which is not installed: pip install 'phasewatch[safetensors]'"
        ) from error
    try:
        with opened(path, framework="pt") as file:
            told = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except Exception as error:
        raise _unreadable(path, error) from error
    return {"state_dict": weights} | {name: int(told[name]) for name in STEPS if told.get(name, "").isdecimal()}


def _wanted(path: Path, error: Exception) -> list[str]:
    """What code a checkpoint asks for, if that is why it was refused."""
    if "TorchScript" in str(error):
        return ["a program (TorchScript)"]
    named = _REFUSED.findall(str(error)) if isinstance(error, (pickle.UnpicklingError, RuntimeError)) else []
    if not named:
        return []
    try:  # all of them, where torch can tell
        return sorted({*named, *torch.serialization.get_unsafe_globals_in_checkpoint(path)})
    except Exception:
        return named


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return CheckpointError(f"{path} is a pointer to a file in Git LFS; fetch the file itself by git lfs pull.")
    told = str(error).rpartition(_REASON)[2].strip() or "no message"  # before it torch advises to run what is in there
    return CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {told.splitlines()[0]}).")
