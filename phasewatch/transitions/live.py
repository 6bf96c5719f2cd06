"""Detection while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phasewatch.transitions.detect import MIN_POINTS, detect_transitions
from phasewatch.transitions.series import checked_alpha
from phasewatch.transitions.transition import Transition


class LiveDetector:
    """Flags each transition once, at the measurement at which it is certain.

    Every measurement runs the detection again on all that is known, at a stricter rate that shares ``alpha`` out over
    the run. A transition is flagged when two detections in a row agree on it, so a single point raises nothing.

    Attributes:
        alpha: wanted rate of false alarms in a run without transitions.
        flagged: the transitions flagged so far, as they were when flagged.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        """Start with an empty history.

        Raises:
            ValueError: if alpha is not strictly between 0 and 1.
        """
        self.alpha = checked_alpha(alpha)
        self.flagged: list[Transition] = []
        self._steps: list[float] = []
        self._values: dict[str, list[float | None]] = {}
        self._errors: dict[str, list[float | None]] = {}
        self._reliable: dict[str, list[bool]] = {}
        self._candidates: list[tuple[float, float]] = []

    def update(
        self,
        step: float,
        values: Mapping[str, float],
        standard_errors: Mapping[str, float] | None = None,
        reliable: Mapping[str, bool] | None = None,
    ) -> list[Transition]:
        """Take the measurement of one step and return the transitions that are certain as of now.

        Args:
            step: the step, later than all before.
            values: name to value; a signal that was not measured is left out or NaN.
            standard_errors: name to standard error.
            reliable: name to whether the value may be trusted; trusted where left out.

        Raises:
            ValueError: if the step is not a later one, or for the reasons of ``detect_transitions``. The measurement is
                then not taken.
        """
        before = self.state_dict()
        try:
            self._append(step, values, standard_errors or {}, reliable or {})
            found = self._detect()
        except ValueError:
            self.load_state_dict(before)
            raise
        certain = [
            transition
            for transition in found
            if any(_overlap((transition.start, transition.end), candidate) for candidate in self._candidates)
            and not any(_overlap((transition.start, transition.end), (old.start, old.end)) for old in self.flagged)
        ]
        self._candidates = [(transition.start, transition.end) for transition in found]
        self.flagged.extend(certain)
        return certain

    def state_dict(self) -> dict[str, Any]:
        """Return all that the detector knows, as plain Python values."""
        return {
            "alpha": self.alpha,
            "steps": list(self._steps),
            "values": {name: list(column) for name, column in self._values.items()},
            "standard_errors": {name: list(column) for name, column in self._errors.items()},
            "reliable": {name: list(column) for name, column in self._reliable.items()},
            "candidates": [list(candidate) for candidate in self._candidates],
            "flagged": [transition.to_dict() for transition in self.flagged],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned.

        Raises:
            ValueError: if the state lacks an entry.
        """
        try:
            self.alpha = checked_alpha(state["alpha"])
            self._steps = list(state["steps"])
            self._values = {name: list(column) for name, column in state["values"].items()}
            self._errors = {name: list(column) for name, column in state["standard_errors"].items()}
            self._reliable = {name: list(column) for name, column in state["reliable"].items()}
            self._candidates = [(start, end) for start, end in state["candidates"]]
            self.flagged = [Transition.from_dict(plain) for plain in state["flagged"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"not the state of a LiveDetector ({error!r}): expected what LiveDetector.state_dict() returned"
            ) from error

    def _append(
        self,
        step: float,
        values: Mapping[str, float],
        standard_errors: Mapping[str, float],
        reliable: Mapping[str, bool],
    ) -> None:
        step = _number(step, "step")
        if step != step or (self._steps and step <= self._steps[-1]):
            raise ValueError(f"step {step:g} does not follow {self._steps[-1:]}; expected increasing steps")
        for what, given in (("standard_errors", standard_errors), ("reliable", reliable)):
            unknown = sorted(set(given) - set(values))
            if unknown:
                raise ValueError(f"{what} name {unknown}, but the values are those of {sorted(values)}")
        for name in values:
            if name not in self._values:
                self._values[name] = [None] * len(self._steps)
                self._errors[name] = [None] * len(self._steps)
                self._reliable[name] = [True] * len(self._steps)
        self._steps.append(step)
        for name, column in self._values.items():
            column.append(_optional(values.get(name), f"value of {name!r}"))
            self._errors[name].append(_optional(standard_errors.get(name), f"standard error of {name!r}"))
            self._reliable[name].append(bool(reliable.get(name, True)))

    def _detect(self) -> list[Transition]:
        if not self._values:
            return []
        looks = max(len(self._steps), MIN_POINTS)
        return detect_transitions(
            self._steps,
            self._values,  # type: ignore[arg-type]  # None marks a missing value
            standard_errors=self._errors,  # type: ignore[arg-type]
            reliable=self._reliable,
            alpha=4.0 * self.alpha / (looks + 4.0),
        )


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _number(given: float, what: str) -> float:
    try:
        return float(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is {given!r}; expected a number") from error


def _optional(given: float | None, what: str) -> float | None:
    """Return a plain float, or None for a missing value (which JSON can hold, as it cannot NaN)."""
    if given is None:
        return None
    number = _number(given, what)
    return None if number != number else number
