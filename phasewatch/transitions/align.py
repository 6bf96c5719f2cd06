"""The same transition in several runs: transitions aligned across seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phasewatch.record.transition import Transition

# Two matched transitions cost 1 for each such factor between their steps, and the second where their kinds differ; one
# that is left unmatched costs the third. Chosen.
FACTOR = 2.0
OTHER_KIND = 0.5
MISSING = 1.0


@dataclass(frozen=True)
class AlignedTransition:
    """One transition as several runs show it.

    Attributes:
        transitions: per run its transition, None where the run has none to match.
    """

    transitions: tuple[Transition | None, ...]

    @property
    def _present(self) -> list[Transition]:
        return [transition for transition in self.transitions if transition is not None]

    @property
    def step(self) -> float:
        """Median of the steps."""
        return float(np.median([transition.step for transition in self._present]))

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest step."""
        steps = [transition.step for transition in self._present]
        return min(steps), max(steps)

    @property
    def share(self) -> float:
        """Share of the runs that have it."""
        return len(self._present) / len(self.transitions)

    @property
    def kind(self) -> str:
        """The most frequent kind, the first of those that are equally frequent."""
        kinds = [transition.kind for transition in self._present]
        return max(dict.fromkeys(kinds), key=kinds.count)


def align_transitions(runs: Sequence[Sequence[Transition]], factor: float = 1.0) -> list[AlignedTransition]:
    """Align the transitions of several runs, in order of their steps as far as the order within each run allows.

    Runs are added one by one, those with the most transitions first, by the best order-preserving match to what is
    aligned already (Needleman & Wunsch 1970); a match costs the ratio of the steps, and more between kinds. What is
    matched has 95 % intervals of its place that overlap, each with each.

    Args:
        runs: per run its transitions.
        factor: by how much the same transition may come earlier or later in one run than in another: their intervals
            overlap once the steps of one are multiplied by a number between ``1 / factor`` and ``factor``.

    Raises:
        ValueError: if the factor is less than 1.

    Example:
        >>> def at(step, kind="A"):
        ...     return Transition(step - 5, step + 5, step, (step - 5, step + 5), kind, {}, 9.0, 1e-9)
        >>> runs = [[at(100), at(900)], [at(110), at(800)], [at(850)]]
        >>> [(one.step, round(one.share, 2)) for one in align_transitions(runs)]
        [(105.0, 0.67), (800.0, 0.33), (850.0, 0.33), (900.0, 0.33)]
        >>> first, second = align_transitions(runs, factor=1.2)
        >>> second.step, second.spread, second.share
        (850.0, (800, 900), 1.0)
    """
    if not factor >= 1:
        raise ValueError(f"factor is {factor}; expected how much later a transition may come, at least 1")
    aligned: list[dict[int, Transition]] = []
    for number in sorted(range(len(runs)), key=lambda k: -len(runs[k])):
        row = sorted(runs[number], key=lambda transition: transition.step)
        merged: list[dict[int, Transition]] = []
        for group, transition in _match(aligned, row, factor):
            column = dict(group or {})
            if transition is not None:
                column[number] = transition
            merged.append(column)
        aligned = _in_order(merged)
    return [AlignedTransition(tuple(group.get(k) for k in range(len(runs)))) for group in aligned]


def _in_order(groups: Sequence[dict[int, Transition]]) -> list[dict[int, Transition]]:
    """Sort groups by their median steps as far as the order within each run allows."""
    left, ordered = list(groups), []
    while left:
        # The first is free; another is where no run has something before it.
        free = [
            k
            for k, group in enumerate(left)
            if not any(other[run].step < group[run].step for other in left for run in group.keys() & other.keys())
        ]
        ordered.append(left.pop(min(free, key=lambda k: _median_step(left[k]))))
    return ordered


def _median_step(group: dict[int, Transition]) -> float:
    return float(np.median([transition.step for transition in group.values()]))


def _match(
    groups: Sequence[dict[int, Transition]], row: Sequence[Transition], factor: float
) -> list[tuple[dict[int, Transition] | None, Transition | None]]:
    """Pairs of a group and a transition, either of which may be missing, at the least cost."""
    cost = np.zeros((len(groups) + 1, len(row) + 1))
    cost[:, 0] = MISSING * np.arange(len(groups) + 1)
    cost[0] = MISSING * np.arange(len(row) + 1)
    for i, group in enumerate(groups, start=1):
        for j, transition in enumerate(row, start=1):
            cost[i, j] = min(
                cost[i - 1, j - 1] + _unlikeness(group, transition, factor),
                cost[i - 1, j] + MISSING,
                cost[i, j - 1] + MISSING,
            )
    pairs: list[tuple[dict[int, Transition] | None, Transition | None]] = []
    i, j = len(groups), len(row)
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + _unlikeness(groups[i - 1], row[j - 1], factor):
            i, j = i - 1, j - 1
            pairs.append((groups[i], row[j]))
        elif i and (not j or cost[i, j] == cost[i - 1, j] + MISSING):
            i -= 1
            pairs.append((groups[i], None))
        else:
            j -= 1
            pairs.append((None, row[j]))
    return pairs[::-1]


def _unlikeness(group: dict[int, Transition], transition: Transition, factor: float) -> float:
    low, high = transition.interval
    for other in group.values():
        if low > factor * other.interval[1] or other.interval[0] > factor * high:
            return math.inf
    ratio = abs(math.log(max(transition.step, 1e-9) / max(_median_step(group), 1e-9))) / math.log(FACTOR)
    kinds = {other.kind for other in group.values()}
    return ratio + OTHER_KIND * (transition.kind not in kinds)
