"""Transitions of runs whose courses are blurred by the scatter of their points."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from ruptures.base import BaseEstimator
from scipy.stats import t as student

from phasewatch.record.transition import Transition
from phasewatch.transitions.candidates import candidate_bounds
from phasewatch.transitions.odds import Odds, odds_of_changes
from phasewatch.transitions.regression import (
    BoundarySearch,
    Selection,
    SignalRegression,
    boundary_price,
    chance_of_gain,
)
from phasewatch.transitions.series import Scaled
from phasewatch.transitions.wording import describe

# Measurements that stand for a stage at least, even where they lie within a wide transition.
LEAST_BESIDE = 3
# The widening of a change's error for having chosen boundaries, slopes and bends by the same data.
SELECTION = 1.1


class NoisySearch:
    """Boundaries chosen among those of exact segmentations (lines, plateaus) by one regression on all of them.

    Attributes:
        transitions: what was found, in order.
        points: number of measurements.
    """

    def __init__(self, scaled: Scaled, alpha: float, drift: bool = True, search: BaseEstimator | None = None) -> None:
        """Search.

        Args:
            scaled: the signals.
            alpha: wanted rate of false alarms.
            drift: whether stages may drift and bend; otherwise they are plateaus.
            search: a search of ``ruptures`` that says where boundaries may lie.
        """
        self.points, count = scaled.y.shape
        # In units of its span about its middle, no signal is too large or too small to be squared.
        self._signals = [
            SignalRegression(
                scaled.steps, scaled.time, scaled.y[:, k], scaled.sigma[:, k], 1.0, scaled.trusted[:, k], drift
            )
            for k in range(count)
        ]
        self._search = BoundarySearch(self._signals, self.points, boundary_price(alpha, self.points, count))
        self._selection = self._search.best(candidate_bounds(scaled, drift, search))
        self._search.prepare(self._selection)
        self._numbers = [
            j
            for j in range(len(self._selection.boundaries))
            if any(j in changes for changes in self._selection.changes)
        ]
        self._gains = [self._search.gain(self._selection, j) for j in self._numbers]
        chances = [chance_of_gain(self._search.price + gain, self.points, count) for gain in self._gains]
        self.transitions = [
            _describe(scaled, self._search, self._selection, j, min(1.0, chance))
            for j, chance in zip(self._numbers, chances, strict=True)
        ]

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


def _describe(scaled: Scaled, search: BoundarySearch, selection: Selection, j: int, p_value: float) -> Transition:
    place = selection.boundaries[j][0]
    gap = _gap(search, selection, j)
    first, last = _extent(search, selection, j)
    places, mass, spread = search.whereabouts(selection, j)
    low, middle, high = _interval(places, mass)
    low, high = min(low, gap[0]), max(high, gap[1])
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


def _interval(places: np.ndarray, mass: np.ndarray) -> tuple[float, float, float]:
    """Return the 95 % interval of a place and its median; no narrower than the gap between two measurements."""
    order = np.argsort(places, kind="stable")
    below = np.cumsum(mass[order])
    low, middle, high = (
        float(places[order][min(int(np.searchsorted(below, q)), len(places) - 1)]) for q in (0.025, 0.5, 0.975)
    )
    return min(low, middle) - 0.5, middle, max(high, middle) + 0.5


def _step_at(scaled: Scaled, place: float) -> float:
    return float(np.interp(place, np.arange(len(scaled.steps)), scaled.steps))
