"""Scalars out of TensorBoard's event files, for runs that phasewatch did not watch."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray

from phasewatch.logs import Scalars
from phasewatch.record import RecordError


def find_event_files(path: str | os.PathLike[str]) -> Path:
    """The directory that holds event files: ``path`` itself, or the only one below it.

    Raises:
        FileNotFoundError: If there is nothing at ``path``, or no event file below it.
        RecordError: If several directories below it hold event files.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the log directory of a run.")
    if path.is_file():
        return path
    if event_files(path):
        return path
    found = sorted({file.parent for file in path.rglob("*tfevents*") if file.is_file()})
    if not found:
        raise FileNotFoundError(f"There is no TensorBoard event file in {path} or below it.")
    if len(found) > 1:
        listing = "\n  ".join(str(directory) for directory in found)
        raise RecordError(f"{path} holds {len(found)} TensorBoard runs; give one of them:\n  {listing}")
    return found[0]


def read_scalars(log_dir: str | os.PathLike[str]) -> Scalars:
    """All scalars of one TensorBoard run.

    Args:
        log_dir: The directory with the run's event files, or one event file.

    Returns:
        Tag to steps, ascending, and values. Of several values at one step the one written last stands. A warning says
        where a file cannot be read to its end.
    """
    path = Path(log_dir)
    points: dict[str, list[tuple[int, float, float]]] = {}
    kinds: dict[str, str] = {}
    for file in [path] if path.is_file() else event_files(path):
        count = 0
        try:
            for event in events(file):
                count += 1
                for value in event.summary.value:
                    kinds.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                    number = _scalar(value, kinds[value.tag])
                    if number is not None:
                        points.setdefault(value.tag, []).append((event.step, event.wall_time, number))
        except DamagedError as damage:
            warnings.warn(
                f"{file} was read up to its event {count} and not to its end: {damage}. What it holds beyond that is "
                "missing.",
                stacklevel=2,
            )
    scalars: Scalars = {}
    for tag, found in points.items():
        last = {step: value for step, _, value in sorted(found, key=lambda point: point[1])}
        steps = sorted(last)
        scalars[tag] = (
            np.array(steps, dtype=np.int64),
            np.array([last[step] for step in steps], dtype=np.float64),
        )
    return scalars


def event_files(directory: Path) -> list[Path]:
    """Those in a directory, by their names, which begin with the time of their making."""
    return sorted(file for file in directory.glob("*tfevents*") if file.is_file())


class DamagedError(Exception):
    """An event file cannot be read from here on."""


def events(path: Path) -> Iterator[Event]:
    """The events of a file in the TFRecord format: length, its checksum, data, its checksum."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while header := file.read(12):
            if len(header) < 12:
                raise DamagedError("it ends within an event; it is still being written, or was cut off")
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                raise DamagedError("the checksum of a length does not match")
            if file.tell() + length + 4 > size:
                raise DamagedError("it ends within an event; it is still being written, or was cut off")
            data = file.read(length)
            if masked_crc32c(data) != struct.unpack("<I", file.read(4))[0]:
                raise DamagedError("the checksum of an event does not match")
            try:
                event = Event.FromString(data)
            except DecodeError as error:
                raise DamagedError(f"an event is whole and cannot be decoded ({error})") from error
            yield event


def _scalar(value: Summary.Value, kind: str) -> float | None:
    """The number that a value holds; None where it holds something else."""
    if value.HasField("simple_value"):
        return value.simple_value
    # By its shape first: a few bytes may say that they are a tensor of any size.
    if kind != "scalars" or not value.HasField("tensor") or any(d.size != 1 for d in value.tensor.tensor_shape.dim):
        return None
    try:
        return float(make_ndarray(value.tensor).item())
    except (TypeError, ValueError):  # of text, for example
        return None
