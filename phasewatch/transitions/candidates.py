"""Where boundaries may lie: where exact segmentations find too much on purpose, or where a search of ruptures says."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
from ruptures.base import BaseEstimator
from ruptures.exceptions import BadSegmentationParameters
from scipy.stats import chi2

from phasewatch.transitions.cost import CostWeightedLine
from phasewatch.transitions.search import OptimalPartition
from phasewatch.transitions.series import Scaled

# Candidates come from segmentations that find too much on purpose, by a penalty that white noise exceeds at half a
# place a run; more than one boundary for this many measurements is a sign of correlated noise, and the penalty is
# raised. Chosen.
LEAST_SPACING = 12
CANDIDATE_RATE = 0.5
# The penalty's factor from one try to the next, and how many tries there are: a cost may be in units of its own.
# Chosen.
STEP, MOST_TRIES = 1.5, 100


def candidate_bounds(scaled: Scaled, drift: bool = True, search: BaseEstimator | None = None) -> list[list[int]]:
    """Inner bounds of segmentations at penalties that let in too many.

    Args:
        scaled: the signals.
        drift: whether stages may drift; otherwise they are plateaus.
        search: a search of ``ruptures`` to ask in the place of our own, which segments into lines and into plateaus.
    """
    if search is not None:
        return [bounds_of(search, scaled)]
    return [
        _exact(scaled, CostWeightedLine(scaled.time, scaled.weights, 3 if sloped else 2, drift=sloped))
        for sloped in ((True, False) if drift else (False,))
    ]


def bounds_of(search: BaseEstimator, scaled: Scaled) -> list[int]:
    """Inner bounds that a search of ``ruptures`` finds where it is asked for as many as there may be candidates.

    It sees the signals in units of their noise, what is missing filled in by a line. What it takes decides how it is
    asked: by the number of boundaries, or by the penalty at which it finds about as many.

    Raises:
        ValueError: if it cannot be asked, or what it answers are no ends of segments.
    """
    points = len(scaled.y)
    most = _most_segments(points) - 1
    search = copy.deepcopy(search)
    fitted = search.fit(_filled(scaled))
    if "n_bkps" in inspect.signature(search.predict).parameters:
        ends = _by_number(fitted, most) or [points]
    else:
        start = float(chi2.isf(CANDIDATE_RATE / points, 2 * scaled.y.shape[1]))
        try:
            ends = _by_penalty(fitted, most, start)
        except BadSegmentationParameters:  # of so few measurements it makes no segments
            ends = [points]
    if ends != sorted(set(ends)) or not ends or ends[0] < 1 or ends[-1] != points:
        raise ValueError(
            f"search {type(search).__name__} answered {ends} for {points} measurements; expected increasing ends of "
            f"segments, the last of them {points}, as ruptures' own searches give"
        )
    return ends[:-1]


def checked_search(search: object) -> BaseEstimator | None:
    """Return a search of ``ruptures``, or raise what is wrong with it.

    Raises:
        TypeError: if it is none.
    """
    if search is None or (
        not isinstance(search, type) and all(callable(getattr(search, name, None)) for name in ("fit", "predict"))
    ):
        return search
    raise TypeError(
        f"search is {search!r}; expected a search of ruptures, made but not fitted, such as ruptures.Pelt(model='l2'), "
        "or None for the exact search"
    )


def _most_segments(points: int) -> int:
    return max(8, points // LEAST_SPACING)


def _exact(scaled: Scaled, cost: CostWeightedLine) -> list[int]:
    points, count = scaled.y.shape
    search = OptimalPartition(cost).fit(scaled.y)
    penalty = float(chi2.isf(CANDIDATE_RATE / points, (1 + cost.drift) * count))
    return _not_too_many(search, penalty, _most_segments(points))[1][:-1]


def _filled(scaled: Scaled) -> np.ndarray:
    filled = np.empty_like(scaled.y)
    for column, known in enumerate(scaled.present.T):
        in_noise = scaled.y[known, column] / float(np.median(scaled.sigma[known, column]))
        filled[:, column] = np.interp(scaled.time, scaled.time[known], in_noise)
    return filled


def _by_number(search: Any, most: int) -> list[int]:
    """With as many boundaries as the search will give, at most so many; nothing where it gives none."""
    for number in range(most, 0, -1):
        try:
            return [int(end) for end in search.predict(n_bkps=number)]
        except BadSegmentationParameters:
            continue
    return []


def _by_penalty(search: Any, most: int, start: float) -> list[int]:
    """At about the least penalty that gives at most so many boundaries."""
    penalty, ends = _not_too_many(search, start, most + 1)
    for _ in range(MOST_TRIES if penalty == start else 0):
        if len(ends) == most + 1:
            break
        penalty /= STEP
        more = _ends(search, penalty)
        if len(more) > most + 1:
            break
        ends = more
    return ends


def _not_too_many(search: Any, penalty: float, segments: int) -> tuple[float, list[int]]:
    """The penalty, raised until there are at most so many segments, and their ends."""
    ends = _ends(search, penalty)
    for _ in range(MOST_TRIES):
        if len(ends) <= segments:
            break
        penalty *= STEP
        ends = _ends(search, penalty)
    return penalty, ends


def _ends(search: Any, penalty: float) -> list[int]:
    return [int(end) for end in search.predict(pen=penalty)]
