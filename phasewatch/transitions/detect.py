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
from phasewatch.transitions.detection import Detection, Stage
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

MIN_POINTS = 8
# Where the scatter is below this share of a signal's span, its course is resolved, and judged by its speed.
RESOLVED = 0.03
# A run in which only larger abrupt changes (in noise standard deviations) would be seen is not decided.
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
        read_beside: names of those in which no transition is looked for: they tell of what kind one is
            (:func:`phasewatch.transitions.kinds.read_beside`).
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
            infinite, a standard error negative, alpha no probability, or a choice unknown.
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
    scaled = scaled_run(steps, values, standard_errors, reliable, read_beside)
    if isinstance(scaled, Detection):
        return scaled
    count = len(scaled.steps)
    least = _least_change(alpha, int(scaled.present.sum(axis=0).max()), len(scaled.signals))
    if criterion == "plateau":
        found = plateau_boundaries(scaled)
    elif model == "auto" and scaled.noise < RESOLVED:
        found = resolved_transitions(scaled, alpha, search=search)
    else:
        found = NoisySearch(scaled, alpha, model != "plateau", search).transitions
    undecided = None
    if not found and scaled.noise >= RESOLVED and least > LARGEST_UNSEEN:
        undecided = (
            f"{count} measurements are too few to tell: an abrupt change of less than {least:.0f} noise standard "
            "deviations would not be seen. Measure more often."
        )
    found = completed(found, n)
    stages = () if undecided else _stages(scaled, found)
    return Detection(found, stages, undecided, least)


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
    searched = {name: column for name, column in given.items() if name not in read_beside}
    if not searched:
        raise ValueError(f"all signals, {sorted(given)}, are only read beside others; expected one to search")
    arrays = [column.values for column in searched.values()]
    # A signal that never changes tells nothing, not even when something was measured.
    measured = np.any(np.isfinite([array for array in arrays if varies(array)] or arrays), axis=0)
    count = int(measured.sum())
    if count < MIN_POINTS:
        return Detection(undecided=f"{count} measurements are too few; it takes {MIN_POINTS}: measure more often.")
    steps = steps[measured]
    time = log_time(steps)
    prepared = (prepare(name, time, column.at(measured)) for name, column in searched.items())
    signals = [signal for signal in prepared if signal is not None]
    if not signals:
        # Constant signals were seen to have no transition; signals that are nearly empty were not seen at all.
        enough = max(int(np.isfinite(array).sum()) for array in arrays) >= MIN_POINTS
        return Detection(undecided=None if enough else f"no signal was measured at {MIN_POINTS} steps or more.")
    trusted = np.column_stack([searched[signal.name].trusted[measured] for signal in signals])
    beside = {name: given[name].at(measured) for name in read_beside if name in given}
    return Scaled.of(steps, time, signals, trusted, beside)


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
