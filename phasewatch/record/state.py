"""What a checkpoint holds of a watch, checked: of one that another version wrote or someone changed, some is of use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from phasewatch.record.bodies import objection
from phasewatch.record.lines import Kind, Line
from phasewatch.record.plain import mapping, member, number, number_or_none, numbers, text, texts, whole

IN_CHECKPOINTS: tuple[Kind, ...] = ("measurement", "transition", "failure")
"""The lines of a record that a checkpoint holds where they are in memory alone: what happened in the run, without what
was observed at every step, which is too long."""
STANDING = ("next_visits", "schedules", "taken")
"""Entries with a value for each monitor, which are of use together alone."""


def usable(state: Any) -> tuple[dict[str, Any], list[str]]:
    """The entries of a state from which a watch can go on.

    Args:
        state: What :meth:`phasewatch.Watch.state_dict` returned, or was once.

    Returns:
        Those that are as they should be, and what is wrong with the others, in words.
    """
    if not isinstance(state, Mapping):
        return {}, [f"it is {type(state).__name__}, and no names and values"]
    kept: dict[str, Any] = {}
    wrong: list[str] = []
    for name, check in _CHECKS.items():
        if name not in state:
            wrong.append(f"it lacks {name}")
            continue
        try:
            check(state[name], name)
        except ValueError as error:
            wrong.append(str(error) if name in str(error) else f"{name} {error}")
        else:
            kept[name] = state[name]
    if (lines := kept.get("lines")) is not None:
        kept["lines"] = [line for line in lines if _is_line(line)]
        if lost := len(lines) - len(kept["lines"]):
            wrong.append(f"{lost} of the {len(lines)} lines that no file held cannot be read")
    if "run_id" not in kept and kept.get("record"):
        kept["run_id"] = kept["record"]["run_id"]
    together = [kept[name] for name in STANDING if name in kept]
    if len(together) < len(STANDING) or len({len(values) for values in together}) > 1:
        wrong += [] if len(together) < len(STANDING) else [f"{', '.join(STANDING)} are of different lengths"]
        kept = {name: value for name, value in kept.items() if name not in STANDING}
    return kept, wrong


def _or_none(check: Callable[[Any, str], object]) -> Callable[[Any, str], object]:
    return lambda value, what: None if value is None else check(value, what)


def _each(check: Callable[[Any, str], object]) -> Callable[[Any, str], object]:
    def checked(value: Any, what: str) -> None:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{what} is of the type {type(value).__name__}; expected a list")
        for entry in value:
            check(entry, what)

    return checked


def _pair(value: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{what} holds something of the type {type(value).__name__}; expected pairs")
    return value[0], value[1]


def _integer(value: Any, what: str, least: int | None = None) -> None:
    if not number(value, what).is_integer() or isinstance(value, float) or (least is not None and value < least):
        raise ValueError(f"{what} is {value!r}; expected a whole number{'' if least is None else f' from {least}'}")


def _step(value: Any, what: str) -> None:
    """A step; -1 before the first."""
    _integer(value, what, -1)


def _list(value: Any, what: str) -> None:
    _each(lambda entry, what: None)(value, what)


def _is_line(value: Any) -> bool:
    try:
        kind, body = _pair(value, "a line")
        return kind in IN_CHECKPOINTS and objection(Line("", 0, kind, dict(mapping(body, "a line")))) is None
    except ValueError:
        return False


def _record(value: Any, what: str) -> None:
    place = mapping(value, what)
    for name in ("path", "run_id", "checksum"):
        text(member(place, name), f"{name} of {what}")
    whole(member(place, "sequence"), f"sequence of {what}")


def _taken(value: Any, what: str) -> None:
    count, last = _pair(value, what)
    whole(count, what)
    _step(last, what)


def _prices(value: Any, what: str) -> None:
    for part, seconds in mapping(value, what).items():
        text(part, what)
        if not 0 <= number(seconds, what):
            raise ValueError(f"{what} holds {seconds!r} for {part}; expected seconds")


def _clock(value: Any, what: str) -> None:
    clock = mapping(value, what)
    whole(member(clock, "steps"), f"steps of {what}")
    for name in ("training_seconds", "measuring_seconds"):
        if not 0 <= number(member(clock, name), f"{name} of {what}"):
            raise ValueError(f"{name} of {what} is {clock[name]!r}; expected seconds")
    if len(clock) > 3:
        raise ValueError(f"{what} holds {', '.join(map(str, clock))}; expected three of these")


def _activity(value: Any, what: str) -> None:
    activity = mapping(value, what)
    number_or_none(member(activity, "rate"), f"rate of {what}")
    _or_none(whole)(member(activity, "changed"), f"changed of {what}")
    for course in mapping(member(activity, "courses"), f"courses of {what}").values():
        mapping(course, f"a course of {what}")


_CHECKS: dict[str, Callable[[Any, str], object]] = {
    "run_id": text,
    "record": _or_none(_record),
    "lines": _list,
    "detector": _or_none(mapping),
    "next_visits": _each(_or_none(whole)),
    "schedules": texts,
    "taken": _each(_taken),
    "activity": _activity,
    "last_taken": _step,
    "start": _or_none(whole),
    "planned_for": _or_none(numbers),
    "planned_seconds": number,
    "left_out": texts,
    "chains_in_each": lambda value, what: _integer(value, what, 1),
    "until_chains": _integer,
    "measured": texts,
    "prices": _prices,
    "clock": _clock,
}
