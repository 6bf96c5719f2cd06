"""What must stand in the lines of a record: a good checksum says that a line is as it was written, not what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from phasewatch.record.ending import Ending
from phasewatch.record.lines import Line
from phasewatch.record.measurement import Measurement
from phasewatch.record.plain import mapping, member, number, number_or_none, numbers, text, texts, truth, whole
from phasewatch.record.signals import Signal
from phasewatch.record.trace import unpack
from phasewatch.record.transition import Flag

Body = Mapping[str, Any]
LAST_SECOND = 2.5e11
"""Unix time beyond which there are no dates: the year 9892."""


def objection(line: Line) -> str | None:
    """What is wrong with the body of a line; None where it can be read. Of a kind unknown nothing is."""
    try:
        _CHECKS.get(line.kind, _anything)(line.body)
    except ValueError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        return f"is whole, and no {line.kind} line: {str(cause)[:200]}"
    if line.kind == "resume" and line.body["after"] >= line.sequence:
        return f"is whole, and no resume line: it comes after line {line.body['after']}, which is not before it"
    return None


def _anything(body: Body) -> None: ...


def _header(body: Body) -> None:
    whole(member(body, "schema_version"), "schema_version")
    _time(body, "created")
    for name in ("n", "total_steps", "num_parameters", "num_frozen"):
        if body.get(name) is not None:
            whole(body[name], name)
    alpha = number_or_none(body.get("alpha"), "alpha")
    if alpha is not None and not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; expected a probability")
    mapping(body.get("versions", {}), "versions")
    signals = body.get("signals", [])
    if not isinstance(signals, list):
        raise ValueError("signals are no list")
    for row in signals:
        _signal(mapping(row, "a signal"))
    if body.get("labels") is not None:
        _labels(mapping(body["labels"], "labels"))
    if "left_out" in body:
        _plan({name: body[name] for name in ("left_out", "chains_in_each") if name in body})


def _signal(row: Body) -> None:
    if row.keys() != {field.name for field in fields(Signal)}:
        raise ValueError(f"a signal has the entries {', '.join(map(str, row))}")
    for name in ("name", "title", "unit", "group", "family"):
        text(row[name], name)
    for name in ("count", "detected", "linear"):
        truth(row[name], name)
    if row["bounds"] is not None and len(texts(row["bounds"], "bounds")) != 2:
        raise ValueError("bounds are not two names")


def _labels(labels: Body) -> None:
    kind, values = member(labels, "kind"), member(labels, "values")
    if kind not in ("class", "tokens") or not isinstance(values, list):
        raise ValueError(f"labels are of the kind {kind!r}; expected classes or tokens")
    for value in values:
        for label in [value] if kind == "class" else numbers(value, "a sequence"):
            if not number(label, "a label").is_integer():
                raise ValueError(f"a label is {label}; expected a whole number")


def _plan(body: Body) -> None:
    if more := body.keys() - {"left_out", "chains_in_each"}:
        raise ValueError(f"it plans {', '.join(sorted(more))} too")
    texts(body.get("left_out", []), "left_out")
    whole(body.get("chains_in_each", 1), "chains_in_each")


def _resume(body: Body) -> None:
    whole(member(body, "step"), "step")
    whole(member(body, "after"), "after")


def _measurement(body: Body) -> None:
    Measurement.from_dict(body)


def _observed(body: Body) -> None:
    whole(member(body, "step"), "step")
    unpack([body])


def _transition(body: Body) -> None:
    Flag.from_dict(body)


def _failure(body: Body) -> None:
    whole(body.get("step", 0), "step")
    for name in ("what", "error", "traceback"):
        text(body.get(name, ""), name)


def _end(body: Body) -> None:
    Ending.from_dict(body)


def _time(body: Body, name: str) -> None:
    seconds = number_or_none(body.get(name), name)
    if seconds is not None and not 0 <= seconds < LAST_SECOND:
        raise ValueError(f"{name} is {seconds:g}; expected seconds since 1970")


_CHECKS: dict[str, Callable[[Body], None]] = {
    "header": _header,
    "resume": _resume,
    "plan": _plan,
    "measurement": _measurement,
    "observed": _observed,
    "transition": _transition,
    "failure": _failure,
    "end": _end,
}
