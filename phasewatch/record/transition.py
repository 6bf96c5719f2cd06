"""A transition, what it did to each signal, and what was said of it while the run went on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from phasewatch.printable import printable
from phasewatch.record.plain import mapping, member, number, number_or_none, numbers, place, text, texts, truth, whole

Action = Literal["flagged", "revised", "withdrawn"]


@dataclass(frozen=True)
class Change:
    """What one signal did across a transition, in the signal's own units.

    The levels are those of the stages on both sides, each continued to the location of the transition, so a drift
    within a stage is not counted. Each lies among the points of its stage nearest to the transition; by what it had to
    be moved for that, the standard error is larger. All figures are conditional on the transition having been detected.

    Attributes:
        before: level of the stage before, continued to the location as far as its last points go.
        after: level of the stage after, continued to the location as far as its first points go.
        change: ``after - before``.
        standard_error: standard error of ``change``, from the scatter of the points within the stages.
        interval: 95 % interval of ``change``.
        z: the change in standard errors, on the scale that is searched, beyond the drift that both stages share; less
            than 1 where the points go the other way.
        reliable: whether both levels are made of reliable points; False where one stage has none.
    """

    before: float
    after: float
    change: float
    standard_error: float
    interval: tuple[float, float]
    z: float
    reliable: bool = True

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Change:
        """Rebuild a change from what ``asdict`` returned.

        Raises:
            ValueError: if a field is missing, unknown or something else than is expected.
        """
        _check_names(mapping(plain, "a change"), cls)
        low, high = numbers(member(plain, "interval"), "interval", 2)
        names = ("before", "after", "change", "standard_error", "z")
        before, after, change, error, z = (number(member(plain, name), name) for name in names)
        return cls(before, after, change, error, (low, high), z, truth(plain.get("reliable", True), "reliable"))

    def __repr__(self) -> str:
        """Return e.g. ``Change(1.9 -> 0.7, -1.2 +- 0.05, z=-21.3)``."""
        state = "" if self.reliable else ", unreliable"
        return (
            f"Change({self.before:.4g} -> {self.after:.4g}, "
            f"{self.change:+.4g} +- {self.standard_error:.2g}, z={self.z:+.1f}{state})"
        )


@dataclass(frozen=True)
class Transition:
    """A short stretch of a run that is faster than the stages before and after it.

    Attributes:
        start: the step where the transition begins (the last measurement of the stage before, for an abrupt one).
        end: the step where the transition ends.
        step: the location: where half of the change has happened.
        interval: 95 % credible interval of the location, in steps.
        kind: ``"A"`` (the loss falls, the learning coefficient of the function rises), ``"B"`` (the loss is about
            constant, the learning coefficient falls, in the output metric of fixed variance too), or what happened, in
            words.
        changes: per signal, what it did.
        score: strength, the root of the summed squares of the signals' z: about 4 is barely seen, 10 is plain.
        p_value: chance of so strong a change anywhere in a run of this length without transitions; 2.2e-308 where it is
            less than that.
        adjusted_p_value: the same, adjusted for the number of transitions reported (Holm).
        seen_by: signals whose change is beyond noise, in their order.
        consensus: share of the signals measured on both sides that see it.
        free_energy: change of the free energy ``n L + llc log n`` at the n of the run; None where n, the loss or the
            llc is not known, or only from unreliable points. Negative: the new phase is the preferred one.
        equal_n: the n at which both sides would have the same free energy, ``n / log n = -d llc / d loss``; None where
            one side has the lower free energy at every n.
        under_way: whether the end is still to come: then ``end``, ``step``, ``interval`` and ``changes`` are those of
            what was seen of it so far. Only while a run goes on.
        flagged_at: the step of the measurement at which it was first flagged; None where it was found in a whole run.
        resolutions: at which resolutions of the learning coefficient of the function the kind holds (``"fine"``,
            ``"coarse"``); none where it does not rest on that.
    """

    start: float
    end: float
    step: float
    interval: tuple[float, float]
    kind: str
    changes: dict[str, Change]
    score: float
    p_value: float
    adjusted_p_value: float = 1.0
    seen_by: tuple[str, ...] = ()
    consensus: float = 0.0
    free_energy: float | None = None
    equal_n: float | None = None
    under_way: bool = False
    flagged_at: float | None = None
    resolutions: tuple[str, ...] = ()

    @property
    def full_kind(self) -> str:
        """The kind, and its resolution where it holds at one alone: ``"A (fine)"``."""
        return f"{self.kind} ({self.resolutions[0]})" if len(self.resolutions) == 1 else self.kind

    @property
    def label(self) -> str:
        """The full kind, and that it is under way, where it is."""
        return f"{self.full_kind}, under way" if self.under_way else self.full_kind

    def __repr__(self) -> str:
        """Return one line with the place, the kind and the signals that changed."""
        low, high = self.interval
        changed = ", ".join(f"{name} {change.change:+.3g}" for name, change in self.changes.items())
        return printable(
            f"Transition(kind={self.label!r}, step={self.step:g} [{low:g}, {high:g}], "
            f"start={self.start:g}, end={self.end:g}, score={self.score:.1f}, {changed})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the transition as plain Python values that JSON can hold."""
        plain = asdict(self)
        plain["interval"] = list(self.interval)
        plain["seen_by"] = list(self.seen_by)
        plain["resolutions"] = list(self.resolutions)
        for change in plain["changes"].values():
            change["interval"] = list(change["interval"])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Transition:
        """Rebuild a transition from what ``to_dict`` returned.

        Raises:
            ValueError: if a field is missing, unknown or something else than is expected.
        """
        try:
            _check_names(mapping(plain, "a transition"), cls)
            low, high = (place(end, "interval") for end in numbers(member(plain, "interval"), "interval", 2))
            changes = mapping(member(plain, "changes"), "changes")
            start, end, step = (place(member(plain, name), name) for name in ("start", "end", "step"))
            score, p_value = (number(member(plain, name), name) for name in ("score", "p_value"))
            return cls(
                start,
                end,
                step,
                (low, high),
                text(member(plain, "kind"), "kind"),
                {name: Change.from_dict(change) for name, change in changes.items()},
                score,
                p_value,
                number(plain.get("adjusted_p_value", 1.0), "adjusted_p_value"),
                tuple(texts(plain.get("seen_by", ()), "seen_by")),
                number(plain.get("consensus", 0.0), "consensus"),
                number_or_none(plain.get("free_energy"), "free_energy"),
                number_or_none(plain.get("equal_n"), "equal_n"),
                truth(plain.get("under_way", False), "under_way"),
                None if plain.get("flagged_at") is None else place(plain["flagged_at"], "flagged_at"),
                tuple(texts(plain.get("resolutions", ()), "resolutions")),
            )
        except ValueError as error:
            raise ValueError(
                f"not a transition: expected a mapping as written by Transition.to_dict(), got {plain!r} ({error})"
            ) from error


@dataclass(frozen=True)
class Flag:
    """What the detector says about one transition at one measurement.

    Attributes:
        number: which of its transitions, counted from 0 in the order of flagging.
        action: ``"flagged"``: it is new; ``"revised"``: with more seen it has ended, lies elsewhere (by more than a
            measurement) or is of another kind; ``"withdrawn"``: with more seen it is none.
        transition: as it is seen now; as it was last seen, where withdrawn.
        detected_at: the step of the measurement at which this was said.
        why: the reason, where withdrawn.
    """

    number: int
    action: Action
    transition: Transition
    detected_at: float
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the flag as plain Python values that JSON can hold."""
        return {
            "number": self.number,
            "action": self.action,
            "detected_at": self.detected_at,
            "why": self.why,
            "transition": self.transition.to_dict(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Flag:
        """Rebuild a flag from what ``to_dict`` returned.

        Raises:
            ValueError: if a field is missing, or something else than is expected.
        """
        action = member(plain, "action")
        if action not in get_args(Action):
            raise ValueError(f"action is {action!r}; expected one of {', '.join(get_args(Action))}")
        return cls(
            whole(member(plain, "number"), "number"),
            action,
            Transition.from_dict(member(plain, "transition")),
            place(member(plain, "detected_at"), "detected_at"),
            text(member(plain, "why"), "why"),
        )


def _check_names(plain: Mapping[str, Any], kind: type) -> None:
    if unknown := plain.keys() - {field.name for field in fields(kind)}:
        raise ValueError(f"unknown: {', '.join(map(str, sorted(unknown)))}")


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two extents, first and last step of each, have a step in common."""
    return max(one[0], other[0]) <= min(one[1], other[1])


def standing_flags(flags: Iterable[Flag]) -> list[Flag]:
    """The last flag of each transition that stands, in order of their steps.

    Its transition's ``flagged_at`` is the step of the first; those withdrawn are left out.

    Args:
        flags: all that was said, in order.
    """
    first: dict[int, float] = {}
    last: dict[int, Flag] = {}
    for flag in flags:
        first.setdefault(flag.number, flag.detected_at)
        last[flag.number] = flag
    standing = [
        replace(flag, transition=replace(flag.transition, flagged_at=first[number]))
        for number, flag in last.items()
        if flag.action != "withdrawn"
    ]
    return sorted(standing, key=lambda flag: flag.transition.step)


def standing_transitions(flags: Iterable[Flag]) -> list[Transition]:
    """The transitions that stand, as their last flags have them, in order of their steps.

    Args:
        flags: all that was said, in order.
    """
    return [flag.transition for flag in standing_flags(flags)]
