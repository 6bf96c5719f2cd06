"""Writing what was measured to TensorBoard, and reading its event files.

Nothing is imported before it is asked for: TensorBoard itself imports this package, and it is to start
without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phasewatch.tensorboard.events import find_event_files, read_scalars
    from phasewatch.tensorboard.writer import TensorBoardWriter

__all__ = ["TensorBoardWriter", "find_event_files", "read_scalars"]

_HOME = {
    "TensorBoardWriter": "writer",
    "find_event_files": "events",
    "read_scalars": "events",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
