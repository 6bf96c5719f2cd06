"""Transitions of runs whose courses are blurred by the scatter of their points."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from ruptures.base import BaseEstimator
from scipy.stats import t as student

from phasewatch.record.transition import Transition
from phasewatch.transitions.candidates import candidate_bounds
from phasewatch.transitions.odds import Odds, odds_of_changes
from phasewatch.transitions.regression import (
    LEAST_BESIDE,
    Boundary,
    BoundarySearch,
    Selection,
    SignalRegression,
    boundary_price,
    chance_of_gain,
    interval_of,
)
from phasewatch.transitions.series import Scaled
from phasewatch.transitions.wording import describe

# The widening of a change's error for having chosen boundaries, slopes and bends by the same data. Chosen.
SELECTION = 1.1


class NoisySearch:
    """Boundaries chosen among those of exact segmentations (lines, plateaus) by one regression on all of them.

    Attributes:
        transitions: what was found, in order.
        points: number of measurements.
    """

    def __init__(
        self,
        scaled: Scaled,
        alpha: float,
        drift: bool = True,
        search: BaseEstimator | None = None,
        known: Sequence[Transition] = (),
        further: bool = True,
    ) -> None:
        """Search.

        Args:
            scaled: the signals.
            alpha: wanted rate of false alarms.
            drift: whether stages may drift and bend; otherwise they are plateaus.
            search: a search of ``ruptures`` that says where boundaries may lie.
            known: transitions between the first measurement and the last that other observations have shown: what the
                signals did across them is found out, and further ones are looked for beside them.
            further: whether to look for further ones.
        """
        self.points, count = len(scaled.y), int(scaled.searched.sum())
        # In units of its span about its middle, no signal is too large or too small to be squared.
        every = [
            SignalRegression(
                scaled.steps, scaled.time, scaled.y[:, k], scaled.sigma[:, k], 1.0, scaled.trusted[:, k], drift
            )
            for k in range(len(scaled.signals))
        ]
        self._signals = [signal for signal, searched in zip(every, scaled.searched, strict=True) if searched]
        given = _among_measurements(scaled.steps, known)
        self._search = BoundarySearch(
            self._signals, self.points, boundary_price(alpha, self.points, count), list(given)
        )
        self._selection = self._search.best(candidate_bounds(scaled.searched_part, drift, search) if further else [[]])
        self._search.prepare(self._selection)
        described = self._search.described(self._selection, every)
        self._numbers: list[int] = []
        self._gains: list[float] = []
        self.transitions: list[Transition] = []
        for j, boundary in enumerate(self._selection.boundaries):
            if boundary in given:
                found = [_describe(scaled, *described, j, 0.0, one) for one in given[boundary]]
                gain = math.inf
            elif any(j in changes for changes in self._selection.changes):
                gain = self._search.gain(self._selection, j)
                chance = chance_of_gain(self._search.price + gain, self.points, count)
                found = [_describe(scaled, *described, j, min(1.0, chance))]
            else:
                continue
            self.transitions += found
            self._numbers += [j] * len(found)
            self._gains += [gain] * len(found)

    def gain(self, which: int) -> float:
        """Return what a transition, given by its number, brings beyond its price: twice a log-likelihood."""
        return self._gains[which]

    def odds(self, which: Collection[int], known: Collection[int]) -> Odds:
        """Return the odds of transitions against correlated noise, others being taken for granted.

        Args:
            which: their numbers in ``transitions``.
            known: the numbers of those that are taken for granted.
        """
        kept = sorted({self._numbers[k] for k in (*which, *known)})
        boundaries = [self._selection.boundaries[j] for j in kept]
        changes = [tuple(k for k, j in enumerate(kept) if j in own) for own in self._selection.changes]
        return odds_of_changes(self._signals, boundaries, changes, [kept.index(self._numbers[k]) for k in which])


def _among_measurements(steps: np.ndarray, known: Sequence[Transition]) -> dict[Boundary, list[Transition]]:
    """Where transitions lie among the measurements; those that no measurement parts are at one place."""
    index = np.arange(len(steps))
    groups: list[list[Transition]] = []
    for transition in sorted(known, key=lambda transition: transition.start):
        if groups and not ((steps >= groups[-1][-1].end) & (steps <= transition.start)).any():
            groups[-1].append(transition)
        else:
            groups.append([transition])
    found = {}
    for group in groups:
        first, last = np.interp([group[0].start, max(one.end for one in group)], steps, index).tolist()
        # Between two measurements a ramp is as good as a step, and where that is makes no difference.
        abrupt = math.floor(last) <= first
        found[(0.5 * (first + last), 0.0) if abrupt else (0.5 * (first + last), last - first)] = group
    return found


def _describe(
    scaled: Scaled,
    search: BoundarySearch,
    selection: Selection,
    j: int,
    p_value: float,
    known: Transition | None = None,
) -> Transition:
    place = selection.boundaries[j][0]
    gap = _gap(search, selection, j)
    first, last = _extent(search, selection, j)
    places, mass, spread = search.whereabouts(selection, j)
    low, middle, high = interval_of(places, mass)
    low, high = min(low, gap[0]), max(high, gap[1])
    if known is not None:
        spread = np.zeros_like(spread)
    effects = []
    for signal, changes in zip(search.signals, selection.changes, strict=True):
        sides = np.array([(signal.index < place).any(), (signal.index > place).any()])
        effects.append(signal.effect(changes, j) if sides.all() else (0.0, 0.0, math.inf, 3))
    before, change, error, freedom = (np.array(column) for column in zip(*effects, strict=True))
    error = SELECTION * np.hypot(error, spread)
    return describe(
        scaled,
        extent=(_step_at(scaled, first), _step_at(scaled, last)),
        step=_step_at(scaled, min(max(middle, first), last)),
        interval=(_step_at(scaled, low), _step_at(scaled, high)),
        before=before,
        change=change,
        error=error,
        z=np.where(np.isfinite(error), change / np.where(np.isfinite(error), error, 1.0), 0.0),
        quantile=student.ppf(0.975, freedom),
        seen=np.array([j in changes for changes in selection.changes]),
        sides=_stages_beside(search, selection, j),
        p_value=p_value,
        known=known,
    )


def _extent(search: BoundarySearch, selection: Selection, j: int) -> tuple[float, float]:
    """Return where a boundary begins and ends: its width, or the gap between measurements if that is wider."""
    place, width = selection.boundaries[j]
    gap = _gap(search, selection, j)
    return min(place - width / 2, gap[0]), max(place + width / 2, gap[1])


def _stages_beside(search: BoundarySearch, selection: Selection, j: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return [first, last + 1) of the stages before and after a boundary."""
    places = [-1.0, *(place for place, _ in selection.boundaries), float(search.points)]
    extents = [(-1.0, 0.0), *(_extent(search, selection, i) for i in range(len(selection.boundaries)))]
    extents.append((search.points - 1.0, float(search.points)))
    (_, start), (first, last), (stop, _) = extents[j : j + 3]
    return _stage((places[j], places[j + 1]), start, first), _stage((places[j + 1], places[j + 2]), last, stop)


def _stage(half_way: tuple[float, float], start: float, end: float) -> tuple[int, int]:
    """Return [first, last + 1) of the measurements from one place to another.

    Where wide transitions leave few between them, those in the middle, no further than half-way through either.
    """
    first, last = math.ceil(start), math.floor(end) + 1
    if last - first < LEAST_BESIDE:
        first = max(math.ceil(0.5 * (start + end - LEAST_BESIDE)), math.ceil(half_way[0]))
        last = min(first + LEAST_BESIDE, math.ceil(half_way[1]))
        first = max(min(first, last - LEAST_BESIDE), math.ceil(half_way[0]))
    return max(first, 0), last


def _gap(search: BoundarySearch, selection: Selection, j: int) -> tuple[float, float]:
    """Return the measurements before and after a boundary of the signals that change there, the nearest of each."""
    place = selection.boundaries[j][0]
    own = [signal.index for signal, changes in zip(search.signals, selection.changes, strict=True) if j in changes]
    before = max((float(index[index <= place].max()) for index in own if (index <= place).any()), default=place - 0.5)
    after = min((float(index[index > place].min()) for index in own if (index > place).any()), default=place + 0.5)
    return before, after


def _step_at(scaled: Scaled, place: float) -> float:
    return float(np.interp(place, np.arange(len(scaled.steps)), scaled.steps))
