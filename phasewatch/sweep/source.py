"""Where network, data and settings come from: from a function of the user's, or from what a framework has saved."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from phasewatch.watch import Watch

Restore = Callable[[Any, int], object]
"""Given what is in a checkpoint and its step, before its weights are loaded: brings all else to where it was then."""
Take = Callable[[Watch, Restore], object]
First = Callable[[], Any]
Build = Callable[[], Any]
"""``build() -> (module, probe, loss_fn)``, or a :class:`phasewatch.Watch`."""


class Source(Protocol):
    """Gives what checkpoints are loaded into and what is measured of it."""

    def give(self, take: Take, first: First) -> None:
        """Make it, and have ``take`` use it: what it is made of may last for no longer than that.

        Args:
            take: Uses it.
            first: Reads the first checkpoint, in which some frameworks say what they were made with.
        """
        ...


@dataclass(frozen=True)
class FromBuild:
    """What a function makes.

    Attributes:
        build: The function, or where it is: ``"package.module:function"``.
    """

    build: Build | str

    def give(self, take: Take, first: First) -> None:
        """Call it.

        Raises:
            ValueError: If there is no such function, or it fails.
            TypeError: If it returns something else than it should.
        """
        build = imported(self.build, "a function that returns (module, probe, loss_fn)")
        if not callable(build):
            raise TypeError(f"{self.build} is {build!r}; expected a function that returns (module, probe, loss_fn).")
        name = getattr(build, "__qualname__", str(build))
        try:
            made = build()
        except Exception as error:
            raise ValueError(f"{name}() failed ({type(error).__name__}: {error}).") from error
        take(_watch(made, name), lambda content, step: None)


def look_here() -> str:
    """Let modules be found in the current directory, as ``python -m`` does and a command does not."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    return here


def imported(name: Any, expected: str) -> Any:
    """What a name such as ``package.module:Class`` stands for; what is no name is given back.

    Args:
        name: The name. Modules are also looked for in the current directory.
        expected: What it should name, for messages.

    Raises:
        ValueError: If there is no such module, or no such name in it.
    """
    if not isinstance(name, str):
        return name
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute) or "/" in module or module.endswith(".py"):
        raise ValueError(f"{name!r} was given; expected package.module:name of {expected}, such as my_code.train:name.")
    here = look_here()
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{module} cannot be imported: it needs {error.name}, which is not installed.") from error
        raise ValueError(
            f"There is no module {error.name}; {name!r} was looked for in {here} and in what is installed. Run the "
            "command in the folder that the module is in, or install it."
        ) from error
    except Exception as error:
        raise ValueError(f"{module} cannot be imported ({type(error).__name__}: {error}).") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = ", ".join(n for n in vars(found) if not n.startswith("_")) if hasattr(found, "__dict__") else ""
            raise ValueError(f"{module} has no {attribute}; expected {expected}. It has: {names or 'nothing'}.")
        found = getattr(found, part)
    return found


def _watch(made: Any, name: str) -> Watch:
    if isinstance(made, Watch):
        return made
    if isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module) and callable(made[2]):
        module, probe, loss_fn = made
        return Watch(module, probe, loss_fn=loss_fn)
    got = f"({', '.join(type(one).__name__ for one in made)})" if isinstance(made, tuple) else type(made).__name__
    raise TypeError(
        f"{name}() returned {got}; expected (module, probe, loss_fn): the network, a list of batches to measure on, "
        "and loss_fn(module, batch) -> scalar mean loss. For other settings return phasewatch.Watch(module, probe, "
        "loss_fn=loss_fn, n=..., estimators=...)."
    )
