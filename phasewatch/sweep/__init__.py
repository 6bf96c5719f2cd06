"""Measuring the checkpoints of a finished run, as if it had been watched."""

from phasewatch.sweep.checkpoints import Checkpoint, find_checkpoints
from phasewatch.sweep.formats import CheckpointError, UnsafeCheckpointError
from phasewatch.sweep.source import FromBuild, Source
from phasewatch.sweep.sweep import measure_checkpoints

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "FromBuild",
    "Source",
    "UnsafeCheckpointError",
    "find_checkpoints",
    "measure_checkpoints",
]
