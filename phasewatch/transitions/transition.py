"""What the detector returns: a transition, and what it did to each signal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """What one signal did across a transition, in the signal's own units.

    The levels are those of the stages on both sides, each continued to the edge of the transition, so a drift within
    a stage is not counted. All figures are conditional on the transition having been detected.

    Attributes:
        before: level of the signal where the stage before the transition ends.
        after: level of the signal where the stage after the transition begins.
        change: ``after - before``.
        standard_error: standard error of ``change``, from the scatter of the points within the stages.
        interval: 95 % interval of ``change``.
        z: the change beyond what the drift of the two stages would have brought, in standard errors.
    """

    before: float
    after: float
    change: float
    standard_error: float
    interval: tuple[float, float]
    z: float

    def __repr__(self) -> str:
        """Return e.g. ``Change(1.9 -> 0.7, -1.2 +- 0.05, z=-21.3)``."""
        return (
            f"Change({self.before:.4g} -> {self.after:.4g}, "
            f"{self.change:+.4g} +- {self.standard_error:.2g}, z={self.z:+.1f})"
        )


@dataclass(frozen=True)
class Transition:
    """A short stretch of a run that is faster than the stages before and after it.

    Attributes:
        start: the step where the transition begins (the last measurement of the stage before, for an abrupt one).
        end: the step where the transition ends.
        step: the location: where half of the change has happened.
        interval: 95 % credible interval of the location, in steps.
        kind: ``"A"`` (loss falls, llc rises), ``"B"`` (loss about constant, llc falls), or what happened, in words.
        changes: per signal, what it did.
        score: strength, the root of the summed squares of the signals' z: about 4 is barely seen, 10 is plain.
        p_value: chance of so strong a change anywhere in a run of this length without transitions.
    """

    start: float
    end: float
    step: float
    interval: tuple[float, float]
    kind: str
    changes: dict[str, Change]
    score: float
    p_value: float

    def __repr__(self) -> str:
        """Return one line with the place, the kind and the signals that changed."""
        low, high = self.interval
        changed = ", ".join(f"{name} {change.change:+.3g}" for name, change in self.changes.items())
        return (
            f"Transition(kind={self.kind!r}, step={self.step:g} [{low:g}, {high:g}], "
            f"start={self.start:g}, end={self.end:g}, score={self.score:.1f}, {changed})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the transition as plain Python values that JSON can hold."""
        plain = asdict(self)
        plain["interval"] = list(self.interval)
        for change in plain["changes"].values():
            change["interval"] = list(change["interval"])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Transition:
        """Rebuild a transition from what ``to_dict`` returned.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        try:
            changes = {
                name: Change(**{**change, "interval": tuple(change["interval"])})
                for name, change in plain["changes"].items()
            }
            return cls(**{**plain, "interval": tuple(plain["interval"]), "changes": changes})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"not a transition: expected a mapping as written by Transition.to_dict(), got {plain!r} ({error})"
            ) from error
