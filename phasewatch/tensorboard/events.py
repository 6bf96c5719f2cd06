"""Scalars out of TensorBoard's event files, for runs that phasewatch did not watch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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
    if any(path.glob("*tfevents*")):
        return path
    found = sorted({file.parent for file in path.rglob("*tfevents*")})
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
        Tag to steps, ascending, and values. Of several values at one step the one written last stands.
    """
    kept = {"scalars": 0, "tensors": 0, "histograms": 1, "compressedHistograms": 1, "images": 1, "audio": 1}
    accumulator = EventAccumulator(str(log_dir), size_guidance=kept)
    accumulator.Reload()
    points: dict[str, list[tuple[int, float, float]]] = {}
    for tag in accumulator.Tags()["scalars"]:
        points[tag] = [(event.step, event.wall_time, event.value) for event in accumulator.Scalars(tag)]
    for tag in accumulator.Tags()["tensors"]:
        if accumulator.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            points[tag] = [
                (event.step, event.wall_time, float(make_ndarray(event.tensor_proto).item()))
                for event in accumulator.Tensors(tag)
            ]
    scalars: Scalars = {}
    for tag, found in points.items():
        last = {step: value for step, _, value in sorted(found, key=lambda point: point[1])}
        steps = sorted(last)
        scalars[tag] = (
            np.array(steps, dtype=np.int64),
            np.array([last[step] for step in steps], dtype=np.float64),
        )
    return scalars
