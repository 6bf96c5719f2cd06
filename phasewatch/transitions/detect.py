"""Transitions of a run from its recorded series."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from ruptures.base import BaseEstimator

from phasewatch.record.transition import Transition
from phasewatch.transitions.candidates import checked_search
from phasewatch.transitions.dense import DenseSignals
from phasewatch.transitions.detection import Detection, Stage
from phasewatch.transitions.kinds import read_beside as tell_kinds
from phasewatch.transitions.noisy import NoisySearch
from phasewatch.transitions.plateaus import plateau_boundaries
from phasewatch.transitions.regression import CHANGE_PRICE, boundary_price
from phasewatch.transitions.resolved import resolved_transitions
from phasewatch.transitions.series import (
    Scaled,
    checked_alpha,
    checked_signals,
    checked_steps,
    log_time,
    prepare,
    varies,
)
from phasewatch.transitions.wording import free_energy_change

# Fewer measurements are not looked at. Chosen.
MIN_POINTS = 8
# Where the scatter is below this share of a signal's span, its course is resolved, and judged by its speed. Chosen.
RESOLVED = 0.03
# A run in which only larger abrupt changes (in noise standard deviations) would be seen is not decided. Chosen.
LARGEST_UNSEEN = 5.0

Model = Literal["auto", "drift", "plateau"]
Criterion = Literal["transition", "plateau"]


def detect_transitions(
    steps: ArrayLike,
    values: Mapping[str, ArrayLike],
    *,
    standard_errors: Mapping[str, ArrayLike] | None = None,
    reliable: Mapping[str, ArrayLike] | None = None,
    read_beside: Collection[str] = (),
    dense: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    alpha: float = 0.05,
    n: int | None = None,
    model: Model = "auto",
    criterion: Criterion = "transition",
    search: BaseEstimator | None = None,
) -> Detection:
    """Find the transitions of a run.

    Candidates are the boundaries of exact segmentations into lines in log time and into plateaus. Where the points
    scatter, those are kept that one regression on all of them, with correlated noise and bends as rival explanations,
    finds worth their price; it follows from ``alpha``. Where the course is resolved (a scatter below 3 % of what the
    signals do), a transition is a stretch that is faster than the stages before and after it.

    Args:
        steps: increasing steps of the measurements, shape (k,).
        values: name to values of each signal, shape (k,); NaN where one was not measured. ``"loss"`` and
            ``"llc_behavioral"`` at its resolutions, or else ``"llc"``, decide the kind.
        standard_errors: name to standard errors of the values. Only their course counts, not their scale.
        reliable: name to booleans; unreliable points carry a 25th of the weight of others.
        read_beside: names of those in which no transition is looked for. What they did is told, or of what kind one is
            (:func:`phasewatch.transitions.kinds.read_beside`).
        dense: signals that have steps of their own, many more: name to steps and values. A transition that one of them
            shows lies where it shows it, and what the others did across it comes from the measurements around it.
            ``"training_loss"`` decides the kind with, or in the place of, ``"loss"``. Half of ``alpha`` is theirs.
        alpha: wanted rate of false alarms in a run without transitions.
        n: size of the training set, for the change of the free energy.
        model: what a stage is: ``"plateau"`` (constant), ``"drift"`` (a line in log time, which may bend), or what the
            data say.
        criterion: ``"transition"``, or ``"plateau"`` for the boundaries of the developmental literature (Hoogland et
            al. 2024): the steps at which the smoothed learning coefficient (the first signal where there is none) has
            slope zero in log time. What is returned is then of kind ``"plateau"``.
        search: a search of ``ruptures`` (Pelt, Dynp, Binseg, BottomUp, Window, KernelCPD, with any cost, or one's own
            with their ``fit`` and ``predict``) that says where boundaries may lie; default our exact one. It is asked
            for too many, in the signals in units of their noise, and what it finds is judged as ever.

    Returns:
        The transitions in order, a list with ``stages`` and, where too little was measured, ``undecided``.

    Raises:
        ValueError: if steps are unsorted, repeated or not numeric, lengths differ, names are unknown, a value is
            infinite, a standard error negative, alpha no probability, or a choice unknown; if a signal of ``dense``
            has the name of another.
        TypeError: if ``search`` is no search.

    Example:
        >>> import numpy as np
        >>> steps = np.arange(0, 4000, 50)
        >>> loss = np.where(steps < 2000, 2.0, 1.0) + 0.02 * np.sin(17.0 * steps)
        >>> [transition] = detect_transitions(steps, {"loss": loss})
        >>> transition.start, transition.end, transition.kind
        (1950.0, 2000.0, 'loss falls')
    """
    alpha = checked_alpha(alpha)
    search = checked_search(search)
    if model not in ("auto", "drift", "plateau"):
        raise ValueError(f"model is {model!r}; expected 'auto', 'drift' or 'plateau'")
    if criterion not in ("transition", "plateau"):
        raise ValueError(f"criterion is {criterion!r}; expected 'transition' or 'plateau'")
    if n is not None and (not isinstance(n, Real) or not math.isfinite(n)):
        raise ValueError(f"n is {n!r}; expected the number of training samples, or None where it is not known")
    observed = dense_signals(dense or {}, values)
    known: list[Transition] = []
    if observed is not None and criterion == "transition":
        alpha = 0.5 * alpha
        found = Search(observed.scaled, alpha, model, search).transitions
        known = [placed for placed in observed.placed(found) if placed is not None]
    scaled: Scaled | Detection
    if dense and not values:
        scaled = Detection(undecided=f"too few steps were observed; it takes {MIN_POINTS}: train for longer.")
    else:
        scaled = scaled_run(steps, values, standard_errors, reliable, read_beside)
    if isinstance(scaled, Detection):
        if observed is None:
            return scaled
        return Detection(completed(known, n), _stages(observed.scaled, known))
    if criterion == "plateau":
        found = plateau_boundaries(scaled)
    else:
        found = sorted(Search(scaled, alpha, model, search, known).transitions, key=lambda one: one.step)
    count = len(scaled.steps)
    most = int(scaled.present[:, scaled.searched].sum(axis=0).max())
    least = _least_change(alpha, most, int(scaled.searched.sum()))
    undecided = None
    if not found and observed is None and scaled.noise >= RESOLVED and least > LARGEST_UNSEEN:
        undecided = (
            f"{count} measurements are too few to tell: an abrupt change of less than {least:.0f} noise standard "
            "deviations would not be seen. Measure more often."
        )
    found = completed(found, n)
    stages = () if undecided else _stages(scaled, found)
    return Detection(found, stages, undecided, least)


def dense_signals(dense: Mapping[str, tuple[ArrayLike, ArrayLike]], values: Collection[str]) -> DenseSignals | None:
    """Check what was observed at every step; None where it is too little to look at.

    Raises:
        ValueError: if it is not sound.
    """
    twice = sorted(set(dense) & set(values))
    if twice:
        raise ValueError(f"dense signals have the names {twice} of measured ones; expected names of their own")
    return DenseSignals.of(dense, MIN_POINTS)


class Search:
    """The transitions of some signals, among them those that are known from other observations.

    Attributes:
        transitions: what was found; then what is known and lies before the first measurement or after the last.
        noisy: the search of points that scatter; None where the course is resolved.
    """

    def __init__(
        self,
        scaled: Scaled,
        alpha: float,
        model: Model = "auto",
        search: BaseEstimator | None = None,
        known: Sequence[Transition] = (),
        goes_on: bool = False,
    ) -> None:
        """Search: as ``detect_transitions`` says; where the run ``goes_on``, the last one may be under way."""
        within = [one for one in known if one.start >= scaled.steps[0] and one.end <= scaled.steps[-1]]
        self.noisy = None
        if model != "auto" or scaled.noise >= RESOLVED:
            self.noisy = NoisySearch(scaled, alpha, model != "plateau", search, within)
            self.transitions = list(self.noisy.transitions)
        else:
            self.transitions = resolved_transitions(scaled, alpha, goes_on, search, within)
            placed = {(one.start, one.end) for one in self.transitions}
            rest = [one for one in within if (one.start, one.end) not in placed]
            if rest:
                described = NoisySearch(scaled, alpha, search=search, known=rest, further=False)
                self.transitions += described.transitions
        self.transitions += [one for one in known if one not in within]
        places = {(one.start, one.end) for one in known}
        self._known = {k for k, one in enumerate(self.transitions) if (one.start, one.end) in places}

    def is_known(self, which: int) -> bool:
        """Whether a transition, given by its number, is known from other observations."""
        return which in self._known


def scaled_run(
    steps: ArrayLike,
    values: Mapping[str, ArrayLike],
    standard_errors: Mapping[str, ArrayLike] | None,
    reliable: Mapping[str, ArrayLike] | None,
    read_beside: Collection[str] = (),
) -> Scaled | Detection:
    """Check what was given and bring it to one scale, or say why nothing can be said."""
    steps = checked_steps(steps)
    given = checked_signals(steps, values, standard_errors, reliable)
    telling_kinds = tell_kinds(read_beside)
    described = {name: column for name, column in given.items() if name not in telling_kinds}
    if not set(given) - set(read_beside):
        raise ValueError(f"all signals, {sorted(given)}, are only read beside others; expected one to search")
    arrays = [column.values for name, column in described.items() if name not in read_beside]
    # A signal that never changes tells nothing, not even when something was measured.
    measured = np.any(np.isfinite([array for array in arrays if varies(array)] or arrays), axis=0)
    count = int(measured.sum())
    if count < MIN_POINTS:
        return Detection(undecided=f"{count} measurements are too few; it takes {MIN_POINTS}: measure more often.")
    steps = steps[measured]
    time = log_time(steps)
    prepared = (prepare(name, time, column.at(measured)) for name, column in described.items())
    signals = [signal for signal in prepared if signal is not None]
    searched = np.array([signal.name not in read_beside for signal in signals], dtype=bool)
    if not searched.any():
        # Constant signals were seen to have no transition; signals that are nearly empty were not seen at all.
        enough = max(int(np.isfinite(array).sum()) for array in arrays) >= MIN_POINTS
        return Detection(undecided=None if enough else f"no signal was measured at {MIN_POINTS} steps or more.")
    trusted = np.column_stack([described[signal.name].trusted[measured] for signal in signals])
    beside = {name: given[name].at(measured) for name in telling_kinds if name in given}
    return Scaled.of(steps, time, signals, trusted, searched, beside)


def _least_change(alpha: float, points: int, signals: int) -> float:
    """Smallest abrupt change half-way, in noise standard deviations of one signal, that pays its price."""
    price = boundary_price(alpha, points, signals) + CHANGE_PRICE
    return 2.0 * math.sqrt(math.expm1(min(price / max(points - 4, 1), 30.0)))


def completed(found: Sequence[Transition], n: int | None) -> list[Transition]:
    """Add what takes all transitions (Holm's adjustment of the p-values) and the n of the run (the free energy)."""
    adjusted = {}
    largest = 0.0
    for rank, k in enumerate(sorted(range(len(found)), key=lambda k: found[k].p_value)):
        largest = max(largest, min(1.0, (len(found) - rank) * found[k].p_value))
        adjusted[k] = largest
    complete = []
    for k, transition in enumerate(found):
        at_n, equal_n = free_energy_change(transition, n)
        complete.append(replace(transition, adjusted_p_value=adjusted[k], free_energy=at_n, equal_n=equal_n))
    return complete


def _stages(scaled: Scaled, found: Sequence[Transition]) -> list[Stage]:
    stages = []
    steps = scaled.steps
    starts = [-math.inf, *(t.end for t in found)]
    ends = [*(t.start for t in found), math.inf]
    for start, end in zip(starts, ends, strict=True):
        inside = np.flatnonzero((steps >= start) & (steps <= end))
        if len(inside) == 0:
            # Two transitions that meet: the stage between them is a moment.
            stages.append(Stage(start, max(start, end), 0, {}))
            continue
        levels = {}
        for k, signal in enumerate(scaled.signals):
            values = signal.values[inside][scaled.trusted[inside, k]]
            if len(values):
                levels[signal.name] = float(np.median(values))
        stages.append(Stage(float(steps[inside[0]]), float(steps[inside[-1]]), len(inside), levels))
    return stages
