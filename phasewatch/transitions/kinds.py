"""What kind of transition it was."""

from __future__ import annotations

from collections.abc import Mapping

from phasewatch.record.signals import LLC, LOSS
from phasewatch.record.transition import Change

# In standard errors: what is not constant, and whose direction is known.
SIGNIFICANT = 3.0
SURE = 1.0


def name_kind(changes: Mapping[str, Change], changed: Mapping[str, bool]) -> str:
    """Name a transition by what the loss and the learning coefficient did.

    Kind A: the loss falls and the learning coefficient rises. Kind B: the loss is about constant and the learning
    coefficient falls. Anything else is said in words; the other signals are named where these two say nothing.

    Args:
        changes: what each signal did.
        changed: whether each signal's change is beyond its noise and worth speaking of.
    """
    loss, llc = (_direction(name, changes, changed) for name in (LOSS, LLC))
    if (loss, llc) == ("falls", "rises"):
        return "A"
    if (loss, llc) == ("constant", "falls"):
        return "B"
    if loss in ("falls", "rises") and llc in ("falls", "rises"):
        return f"loss {loss}, llc {llc}"
    if loss in ("falls", "rises"):
        return f"loss {loss} at constant llc" if llc == "constant" else f"loss {loss}"
    if llc in ("falls", "rises"):
        return f"llc {llc} at constant loss" if loss == "constant" else f"llc {llc}"
    others = {name: _direction(name, changes, changed) for name in changes if changed[name]}
    told = [f"{name} {direction}" for name, direction in others.items() if direction != "unknown"]
    return ", ".join(told) if told else "several signals change a little"


def _direction(name: str, changes: Mapping[str, Change], changed: Mapping[str, bool]) -> str:
    if name not in changes:
        return "unknown"
    z = abs(changes[name].z)
    if not changed[name]:
        # What changes beyond its noise, but too little to speak of, is not constant either.
        return "constant" if z < SIGNIFICANT else "unknown"
    if z < SURE:
        return "unknown"
    return "rises" if changes[name].change > 0 else "falls"
