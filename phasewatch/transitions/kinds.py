"""What kind of transition it was.

The loss and the learning coefficient of the function say it, at each resolution at which that was measured: its
change must be trusted, and keep its sign where the prior's spread or the resolution is doubled or halved. In records
without it, the learning coefficient of the loss says it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from phasewatch.record.signals import (
    LLC,
    LLC_BEHAVIORAL,
    LLC_COARSE,
    LLC_OUTPUTS,
    LLC_OUTPUTS_COARSE,
    LOSS,
    NORMAL_95,
    TRAINING_LOSS,
)
from phasewatch.record.transition import Change

# In standard errors: what is not constant, and whose direction is known. Chosen.
SIGNIFICANT = 3.0
SURE = 1.0

OCTAVE = math.log(2.0)
"""By so much, up and down, the logarithms of spread and resolution are moved where a change must keep its sign.
Chosen: a factor of two."""

LOSS_ALONE = 4
"""Place, in the order of how much is said, of words that say nothing of the learning coefficient."""

UNSTABLE = "λ differs, but by less than it depends on prior and resolution"
UNKNOWN_DEPENDENCE = "λ differs, its dependence on prior and resolution not known"


@dataclass(frozen=True)
class Resolution:
    """Where the learning coefficient of the function is found at one resolution, and what its kinds need beside it.

    Attributes:
        name: What it is called.
        coefficient: The learning coefficient.
        outputs: The same in the output metric of fixed variance.
    """

    name: str
    coefficient: str
    outputs: str

    @property
    def spread_slope(self) -> str:
        """Its slope in the logarithm of the prior's spread."""
        return f"{self.coefficient}_spread_slope"

    @property
    def heat_capacity(self) -> str:
        """Its heat capacity, which gives the slope in the logarithm of the resolution."""
        return f"{self.coefficient}_heat_capacity"

    @property
    def nats(self) -> str:
        """The resolution itself."""
        return f"{self.coefficient}_resolution"


RESOLUTIONS = (
    Resolution("fine", LLC_BEHAVIORAL, LLC_OUTPUTS),
    Resolution("coarse", LLC_COARSE, LLC_OUTPUTS_COARSE),
)
COEFFICIENTS = tuple(resolution.coefficient for resolution in RESOLUTIONS)
"""What kinds are told by; each measurement states its error."""


@dataclass(frozen=True)
class Kind:
    """The kind of a transition.

    Attributes:
        name: ``"A"``, ``"B"``, or what happened, in words.
        resolutions: At which it is so; none where it does not rest on the learning coefficient of the function.
    """

    name: str
    resolutions: tuple[str, ...] = ()


def read_beside(names: Collection[str]) -> list[str]:
    """Those of the names that tell kinds and no more: no transition is looked for in them, and no change told."""
    told = [name for r in RESOLUTIONS for name in (r.outputs, r.spread_slope, r.heat_capacity, r.nats)]
    return [name for name in told if name in names]


def name_kind(
    changes: Mapping[str, Change], changed: Mapping[str, bool], beside: Mapping[str, Change] | None = None
) -> Kind:
    """Name a transition by what the loss and the learning coefficient did.

    Kind A: the loss falls and the learning coefficient rises. Kind B: the loss is about constant and the learning
    coefficient falls, in the output metric of fixed variance too; where it does not fall there, the network has become
    more confident. A loss that was measured to differ by more than a resolution is not constant at that resolution.
    Anything else is said in words; the other signals are named where these say nothing.

    Args:
        changes: what each signal did that may name a kind.
        changed: of each signal that was measured, whether its change is beyond its noise and worth speaking of.
        beside: what the signals of :func:`read_beside` did, and by how much the loss was measured to differ.
    """
    beside = beside or {}
    directions = [_direction(name, changes, changed) for name in (TRAINING_LOSS, LOSS)]
    # What is seen at every step sees more; where it sees no change, what was measured has its say.
    loss = next((direction for direction in directions if direction in ("rises", "falls")), directions[1])
    measured = [resolution for resolution in RESOLUTIONS if resolution.coefficient in changed]
    if measured:
        found = _at_resolutions(loss, {r: _movement(r, changes, changed, beside) for r in measured}, beside)
    else:
        found = _by_the_loss(loss, _direction(LLC, changes, changed))
    if found is not None:
        return found
    others = {name: _direction(name, changes, changed) for name in changes if changed[name]}
    said = [f"{name} {direction}" for name, direction in others.items() if direction in ("rises", "falls")]
    return Kind(", ".join(said) if said else "several signals change a little")


def _by_the_loss(loss: str, llc: str) -> Kind | None:
    if (loss, llc) == ("falls", "rises"):
        return Kind("A")
    if (loss, llc) == ("constant", "falls"):
        return Kind("B")
    words = _in_words(loss, llc, "llc")
    return None if words is None else Kind(words[1])


def _at_resolutions(told_loss: str, movements: Mapping[Resolution, str], beside: Mapping[str, Change]) -> Kind | None:
    """What says most at any of the resolutions, and at which of them it holds."""
    said: dict[tuple[int, str], list[str]] = {}
    for resolution, movement in movements.items():
        loss = _loss_at(resolution, told_loss, beside)
        if (loss, movement) == ("falls", "rises"):
            words: tuple[int, str] | None = (0, "A")
        elif (loss, movement) == ("constant", "falls"):
            words = _simpler_or_more_confident(beside.get(resolution.outputs))
        else:
            words = _in_words(loss, movement, "λ")
        if words is not None:
            said.setdefault(words, []).append(resolution.name)
    if not said:
        return None
    (place, name), resolutions = min(said.items(), key=lambda item: item[0][0])
    return Kind(name, () if place == LOSS_ALONE else tuple(resolutions))


def _loss_at(resolution: Resolution, told: str, beside: Mapping[str, Change]) -> str:
    """What the loss did, which the noise of its course may hide though each of its values is known exactly."""
    measured, nats = beside.get(LOSS), beside.get(resolution.nats)
    if told in ("rises", "falls") or measured is None or nats is None or abs(measured.change) <= nats.after:
        return told
    return "rises" if measured.change > 0 else "falls"


def _simpler_or_more_confident(outputs: Change | None) -> tuple[int, str]:
    if outputs is None:
        return 1, "λ falls at constant loss, output metric not measured"
    if outputs.z <= -SIGNIFICANT:
        return 0, "B"
    if outputs.z > -SURE:
        return 1, "more confident"
    return 1, "λ falls at constant loss, output metric undecided"


def _in_words(loss: str, llc: str, name: str) -> tuple[int, str] | None:
    """What the two did, after how much it says: the less the later."""
    moves = ("falls", "rises")
    if llc in (UNSTABLE, UNKNOWN_DEPENDENCE):
        return 2, f"loss {loss}; {llc}" if loss in moves else llc
    if loss in moves and llc in moves:
        return 1, f"loss {loss}, {name} {llc}"
    if llc in moves:
        return 1, f"{name} {llc} at constant loss" if loss == "constant" else f"{name} {llc}"
    if loss in moves:
        return (3, f"loss {loss} at constant {name}") if llc == "constant" else (LOSS_ALONE, f"loss {loss}")
    return None


def _movement(
    resolution: Resolution, changes: Mapping[str, Change], changed: Mapping[str, bool], beside: Mapping[str, Change]
) -> str:
    """What the learning coefficient did; where that has a direction, only if the prior does not decide it."""
    direction = _direction(resolution.coefficient, changes, changed)
    if direction not in ("rises", "falls"):
        return direction
    slope, capacity = (beside.get(name) for name in (resolution.spread_slope, resolution.heat_capacity))
    if slope is None or capacity is None or not min(capacity.before, capacity.after) > 0:
        return UNKNOWN_DEPENDENCE
    return direction if keeps_its_sign(changes[resolution.coefficient], slope, capacity) else UNSTABLE


def keeps_its_sign(coefficient: Change, spread_slope: Change, heat_capacity: Change) -> bool:
    """Whether a change has one sign at double and half the prior's spread, and at double and half the resolution ε.

    To first order: in the logarithm of the spread the slope is measured, in that of ε it is
    :func:`slope_in_resolution`. Both stages are moved alike. Both slopes come from few chains and are noisy: what of
    them may be chance speaks against nothing.
    """
    stages = [(coefficient.before, heat_capacity.before), (coefficient.after, heat_capacity.after)]
    before, after = (slope_in_resolution(*stage) for stage in stages)
    error = heat_capacity.standard_error * max((level / capacity) ** 2 for level, capacity in stages)
    slopes = [(spread_slope.change, spread_slope.standard_error), (after - before, error)]
    # The same sign at both ends is that of the change itself.
    return all(OCTAVE * (abs(slope) - NORMAL_95 * chance) < abs(coefficient.change) for slope, chance in slopes)


def slope_in_resolution(level: float, heat_capacity: float) -> float:
    """The derivative of λ in ln ε: ``-(λ - C) λ / C`` with the heat capacity C, as dλ/d ln b = λ - C and ε = λ / b."""
    return -(level - heat_capacity) * level / heat_capacity


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
