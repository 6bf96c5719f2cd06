"""The layers of the house: who may import whom."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "phasewatch"

# Each room, from the bottom up, with the rooms of ours and the libraries that it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "isolation": {"numpy", "torch"},
    "interruption": set(),
    "printable": set(),
    "shown": {"printable"},
    "record": {"interruption", "printable", "shown", "numpy", "pandas"},
    "updates": {"torch"},
    "schedule": set(),
    "settings": set(),
    "tags": {"record"},
    "logs": {"record", "tags", "numpy"},
    "objective": {"interruption", "isolation", "torch", "numpy"},
    "probe": {"isolation", "objective", "torch", "numpy"},
    "hessian": {"isolation", "objective", "shown", "torch", "numpy", "scipy"},
    "llc": {"isolation", "objective", "hessian", "shown", "torch", "numpy", "scipy"},
    "symmetry": {"isolation", "objective", "hessian", "shown", "torch", "numpy", "scipy", "tabulate"},
    "transitions": {"record", "shown", "numpy", "scipy", "ruptures"},
    "analysis": {"record", "transitions", "numpy", "ruptures"},
    "estimators": {"objective", "hessian", "llc", "symmetry", "record", "torch", "numpy"},
    "measure": {"estimators", "hessian", "interruption", "isolation", "objective", "record", "torch", "numpy"},
    "activity": {"transitions", "numpy"},
    "observer": {"activity", "record", "transitions", "updates", "torch", "numpy"},
    "price": {"estimators", "isolation", "llc", "objective", "schedule", "transitions", "torch", "numpy"},
    "measuring_time": set(),
    "listener": {"analysis", "record"},
    "failing": {"measure"},
    "monitor": {"estimators", "measure", "record", "schedule"},
    "outlay": {"estimators", "monitor", "objective", "price", "record", "schedule"},
    "header": {"_version", "estimators", "monitor", "objective", "record", "torch", "numpy"},
    "resuming": {"record"},
    "watch": {
        *("activity", "analysis", "estimators", "failing", "header", "interruption", "listener", "measure"),
        *("measuring_time", "monitor", "objective", "observer", "outlay", "price", "printable", "record", "resuming"),
        *("schedule", "settings", "transitions", "torch", "ruptures"),
    },
    "figures": {"analysis", "record", "transitions", "numpy", "matplotlib"},
    "plot": {"analysis", "figures", "record", "transitions", "numpy", "matplotlib"},
    "report": {"analysis", "figures", "printable", "record", "transitions", "numpy", "matplotlib", "tabulate"},
    "tensorboard": {
        *("analysis", "figures", "google", "logs", "record", "report", "tags", "numpy", "tensorboard", "torch"),
        "matplotlib",
    },
    "demo": {"analysis", "callbacks", "record", "report", "torch", "pytorch_lightning", "sklearn", "tqdm"},
    "sweep": {"measure", "price", "record", "watch", "torch", "numpy", "safetensors"},
    "cli": {
        *("_version", "analysis", "callbacks", "demo", "figures", "logs", "printable", "record", "report", "sweep"),
        *("tensorboard", "transitions", "ruptures"),
    },
    "__main__": {"cli"},
}
ADAPTERS = "callbacks"
"""May import all that is ours, and the framework that they adapt to; only the demo and the command line import them."""


def rooms() -> list[str]:
    found = {path.name if path.is_dir() else path.stem for path in PACKAGE.iterdir() if path.name != "__init__.py"}
    return sorted(found - {"__pycache__", "py", ADAPTERS})


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(path: Path) -> Iterator[str]:
    """Rooms of ours and top-level names of libraries, wherever in the file they are imported."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "phasewatch":
                names = [f"phasewatch.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield parts[1] if parts[0] == "phasewatch" else parts[0]


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_from_those_below_it_alone(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room} | sys.stdlib_module_names
    for path in files_of(room):
        beyond = sorted(set(imported(path)) - allowed)
        assert not beyond, f"{path.relative_to(PACKAGE)} imports {beyond}; see CONTRIBUTING.md for who may import whom"


def test_no_room_of_ours_is_above_one_that_it_is_below() -> None:
    """The table itself has no circle: it is listed from the bottom up."""
    order = [*MAY_IMPORT, ADAPTERS]
    for room, allowed in MAY_IMPORT.items():
        above = [other for other in allowed & set(order) if order.index(other) > order.index(room)]
        assert above == ([ADAPTERS] if room in ("demo", "cli") else []), room


def test_every_room_is_in_the_table() -> None:
    assert set(rooms()) == set(MAY_IMPORT)
