"""What the detector makes of a whole run: its transitions, and the stages between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from phasewatch.record.transition import Transition
from phasewatch.shown import shown


@dataclass(frozen=True)
class Stage:
    """A stretch of a run between two transitions.

    Attributes:
        start: its first step.
        end: its last step.
        measurements: number of measurements in it.
        levels: per signal the median of its reliable points; absent where there are none.
    """

    start: float
    end: float
    measurements: int
    levels: dict[str, float]


class Detection(list[Transition]):
    """The transitions of a run in order: a list that knows more.

    Attributes:
        stages: the stretches between the transitions, one more than there are transitions; empty if undecided.
        undecided: why nothing can be said of the run, None where the detector had its say.
        least_change: the smallest abrupt change, in noise standard deviations of one signal, that would have been seen
            half-way through; NaN where nothing was looked for.
    """

    def __init__(
        self,
        transitions: Iterable[Transition] = (),
        stages: Iterable[Stage] = (),
        undecided: str | None = None,
        least_change: float = math.nan,
    ) -> None:
        """Take the transitions and what goes with them."""
        super().__init__(transitions)
        self.stages = tuple(stages)
        self.undecided = undecided
        self.least_change = least_change

    def _repr_html_(self) -> str:
        found = f"{len(self)} transition{'' if len(self) == 1 else 's'}"
        rows = [
            (f"{one.step:,.0f} ({one.interval[0]:,.0f}-{one.interval[1]:,.0f})", one.label, *_changes(one))
            for one in self
        ]
        columns = ("step (95 % interval)", "kind", "seen by", "score")
        return shown(self.undecided or found, columns if rows else (), rows)


def _changes(one: Transition) -> tuple[str, str]:
    return ", ".join(one.seen_by), f"{one.score:.3g}"
