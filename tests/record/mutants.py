"""Plain values changed at random places, for readers that must take anything."""

from __future__ import annotations

import copy
import random
from typing import Any

HOSTILE: list[Any] = [None, True, 0, -1, 1, 2**31, 2**63, 2**70, 10**40, -(10**400), 1e308, -1e308, 1e-320]
HOSTILE += ["", "x", "\x1b[31mred", "NaN", [], {}, [[]], [None], {"a": 1}, [1] * 50, float("inf"), float("nan")]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


def mutated(value: Any, rng: random.Random) -> Any:
    value = copy.deepcopy(value)
    *way, last = rng.choice(places(value)[1:])
    owner = value
    for key in way:
        owner = owner[key]
    if rng.random() < 0.3:
        del owner[last]
    else:
        owner[last] = rng.choice(HOSTILE)
    return value
