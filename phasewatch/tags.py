"""What our numbers are called in the logs of others, TensorBoard's and those of trainers.

They sort by name, so what a person looks at stands in a folder of its own, in the order of the numbers that its names
begin with; all else is in another folder. What is not to be trusted has a name of its own, in every log.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from phasewatch.record import Measurement, Transition
from phasewatch.record.signals import EFFECTIVE_RANK_COARSE, LLC_BEHAVIORAL, LLC_COARSE, LOSS, look_up

LOOKED_AT, DETAILS, SUMMARY = "phasewatch/", "phasewatch_details/", "phasewatch_summary/"
UNRELIABLE = "_unreliable"

_IN_ORDER = {
    name: f"{LOOKED_AT}{k}_{name}"
    for k, name in enumerate((LOSS, LLC_COARSE, LLC_BEHAVIORAL, EFFECTIVE_RANK_COARSE), start=1)
}
STAGE = f"{LOOKED_AT}5_stage"
"""How many transitions stand: at each measurement, as far as was known then."""
STAGE_OF_WHOLE_RUN = f"{LOOKED_AT}6_stage_of_whole_run"
"""The same as the whole run shows it, for each measurement, once it is over."""
_OURS = re.compile(rf"{LOOKED_AT}\d_|{DETAILS}")


def tag(name: str, reliable: bool = True) -> str:
    """What a signal is called.

    Args:
        name: The signal.
        reliable: Whether those of its values are meant that are to be trusted, or the others.

    Example:
        >>> tag("loss"), tag("llc", reliable=False)
        ('phasewatch/1_loss', 'phasewatch_details/llc_unreliable')
    """
    return _IN_ORDER.get(name, f"{DETAILS}{name}") + ("" if reliable else UNRELIABLE)


def name_of(tag: str) -> str:
    """The signal that a tag is of, the opposite of :func:`tag`; a tag that is none of ours stays as it is.

    Example:
        >>> name_of("phasewatch/1_loss"), name_of("train/loss")
        ('loss', 'train/loss')
    """
    return _OURS.sub("", tag, count=1) if _OURS.match(tag) else tag


def tagged(measurement: Measurement) -> dict[str, float]:
    """The finite numbers of a measurement under their tags.

    Beside each that has a standard error stand the ends of its 95 % interval; what is not to be trusted has none.
    """
    numbers = {f"{DETAILS}unreliable": float(sum(not found.reliable for found in measurement.estimates.values()))}
    for name, found in measurement.estimates.items():
        numbers[tag(name, found.reliable)] = found.value
        if found.reliable:
            for bound, value in zip(bounds_of(name), measurement.interval(name), strict=True):
                if bound not in measurement.estimates:
                    numbers[tag(bound)] = value
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def gaps(measurement: Measurement) -> dict[str, str]:
    """Tags under which there is no number at this measurement, so that no line leads across it.

    Those of the ends of an interval are among them, as they are drawn together with what lies between.

    Returns:
        Each with the tag of the signal that it is of: before that has a number there is no line, and no gap in one.
    """
    written = tagged(measurement)
    missing = {}
    for name in measurement.estimates:
        tags = [tag(name)]
        if look_up(name).bounds and not set(bounds_of(name)) & measurement.estimates.keys():
            tags += [tag(bound) for bound in bounds_of(name)]
        missing.update({one: tag(name) for one in tags if one not in written})
    return missing


def doubted(measurement: Measurement) -> set[str]:
    """Tags under which there is a number at this measurement that is not to be trusted."""
    names = (tag(name, reliable=False) for name, found in measurement.estimates.items() if not found.reliable)
    return set(names) & tagged(measurement).keys()


def bounds_of(name: str) -> tuple[str, str]:
    """Names of the ends of the interval of a signal."""
    return look_up(name).bounds or (f"{name}_lower", f"{name}_upper")


def stages(steps: Sequence[int], transitions: Sequence[Transition]) -> list[int]:
    """For each step, how many transitions lie before it or at it: 0, 1, 2, ..."""
    return [sum(one.step <= step for one in transitions) for step in steps]
