"""Learning coefficients of parts of a network and on other data: how their settings and signals' names are checked."""

from __future__ import annotations

from collections.abc import Iterable

from phasewatch.objective import Objective
from phasewatch.record.signals import CATALOGUE


def check_refined(refined: object) -> None:
    """Refuse a single string, whose letters would be taken for names.

    Raises:
        TypeError: If it is one.
    """
    if isinstance(refined, str):
        raise TypeError(f"refined is the string {refined!r}; expected a list of names, as [{refined!r}].")


def check_names(names: Iterable[str]) -> None:
    """Refuse names for the signals of parts, or of other data, that other signals have.

    Raises:
        ValueError: If one is taken.
    """
    taken = [name for name in names if name in CATALOGUE]
    if taken:
        raise ValueError(
            f"the signal of a part or of other data would be called {taken[0]!r}, as another signal is: "
            f"{CATALOGUE[taken[0]].title}. Name the data otherwise, or the part by a glob."
        )


def named(name: str, part: str) -> str:
    """What a signal is called, of a part or on other data; its own name for an empty one."""
    return f"{name}_{part}" if part else name


def restricted(objective: Objective, refined: Iterable[str]) -> dict[str, Objective]:
    """The loss as a function of each of the parts alone.

    Raises:
        ValueError: If a name matches no module or parameter.
    """
    return {name: objective.restricted_to(name) for name in refined}
