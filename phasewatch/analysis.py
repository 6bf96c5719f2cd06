"""The analysis of a whole run once it is recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from ruptures.base import BaseEstimator

from phasewatch.record import Moved, Run, Series, Transition
from phasewatch.record.signals import LOSS, TRAINING_LOSS, detected, searched
from phasewatch.record.transition import Flag, overlap, standing_flags
from phasewatch.transitions import detect_transitions
from phasewatch.transitions.dense import BLOCKS
from phasewatch.transitions.detect import MIN_POINTS
from phasewatch.transitions.events import Course, Event, find_events, named_by_events, without_passing
from phasewatch.transitions.kinds import read_beside

NOT_BORNE_OUT = "not borne out by the whole run"
"""Why what was flagged while a run went on is withdrawn at its end."""
MOST_SAMPLES = 20
"""Of the samples that a transition moved, so many stand in the data of a report. Chosen."""

_MORE = (
    "Train for longer, or measure more often: max_overhead=None lifts the limit on the time for measuring, "
    "schedule=100 measures at every 100th step."
)
_MORE_CHECKPOINTS = "Measure more checkpoints of the run."


@dataclass(frozen=True)
class Analysis:
    """A run and the transitions found in all of it.

    Attributes:
        run: The run.
        transitions: What was found, in order of steps.
        signals: Names of the signals that the detector saw.
        alpha: Wanted rate of false alarms in a run without transitions.
        note: Why nothing could be looked for; None where the detector had its say.
        events: What the schedule did to the run or what befell it, in order of steps; transitions within which one lies
            are named after it.
    """

    run: Run = field(repr=False)
    transitions: tuple[Transition, ...]
    signals: tuple[str, ...]
    alpha: float
    note: str | None
    events: tuple[Event, ...] = ()

    @property
    def not_borne_out(self) -> tuple[Flag, ...]:
        """What was flagged while the run went on, and stood at its end or still stands, and the whole does not show."""
        found = [(one.start, one.end) for one in self.transitions]
        said = [flag for flag in self.run.flags if flag.why != NOT_BORNE_OUT]
        return tuple(
            flag
            for flag in standing_flags(said)
            if not any(overlap((flag.transition.start, flag.transition.end), one) for one in found)
        )

    def unreliable(self) -> dict[str, int]:
        """Signal name to the number of its points that are not to be trusted, where there are any."""
        counts = {name: int((~self.run.series(name).reliable).sum()) for name in self.run.names}
        return {name: count for name, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """The analysis as JSON can hold it; a number that is not finite becomes None."""
        run = self.run
        plain = {
            "record": None if run.path is None else str(run.path),
            "header": run.header,
            "finished": run.finished,
            "ending": None if run.ending is None else run.ending.to_dict(),
            "measurements": len(run.measurements),
            "steps": [run.measurements[0].step, run.measurements[-1].step] if run.measurements else None,
            "signals": list(self.signals),
            "alpha": self.alpha,
            "note": self.note,
            "transitions": [transition.to_dict() for transition in self.transitions],
            "events": [event.to_dict() for event in self.events],
            "moved": [_plain_moved(run.moved(transition)) for transition in self.transitions],
            "flagged_live": [transition.to_dict() for transition in run.transitions],
            "unreliable": self.unreliable(),
            "failures": list(run.failures),
            "damaged_lines": [{"number": line.number, "reason": line.reason} for line in run.damaged],
            "missing_lines": [[gap.first, gap.last] for gap in run.gaps],
        }
        finite: dict[str, Any] = _finite(plain)
        return finite


def analyze_run(
    run: Run,
    alpha: float = 0.05,
    signals: Sequence[str] | None = None,
    search: BaseEstimator | None = None,
) -> Analysis:
    """Look for transitions in a recorded run.

    Args:
        run: The run, as given by :func:`phasewatch.load_run`.
        alpha: Wanted rate of false alarms in a run without transitions.
        signals: Names of the signals to look at, ``"training_loss"`` among them for the loss at every step, and those
            of ``run.observed`` under which the user gave a loss or metric; by default the loss at every step, and those
            of the run in which the catalogue (:mod:`phasewatch.record.signals`) says that transitions are looked for.
            What the others did is told, and not searched.
        search: A search of ``ruptures`` that says where transitions may lie; default our exact one. See
            :func:`phasewatch.detect_transitions`.

    Raises:
        KeyError: If the run has no signal of a name in ``signals``.
        TypeError: If ``search`` is no search.
        ValueError: If alpha is no probability.
    """
    events = find_events(run.observed, run.resumed)
    dense: dict[str, Course] = {}
    if LOSS in run.observed and (signals is None or TRAINING_LOSS in signals):
        dense[TRAINING_LOSS] = without_passing(run.observed[LOSS], events)
    for name in signals or ():
        if name not in run.names and name in run.observed and len(run.observed[name].steps) > BLOCKS:
            dense[name] = run.observed[name]
    often = run.names_known_often
    looked_at = searched(often) if signals is None else [name for name in signals if name not in dense]
    others = [*(detected(run.names) if signals is None else ()), *(read_beside(run.names) if looked_at else ())]
    beside = [name for name in others if name not in looked_at]
    names = [*looked_at, *dense]
    series = {name: _series(run, name) for name in (*looked_at, *beside)}
    steps = np.array(sorted({step for s in series.values() for step in s.steps.tolist()}), dtype=np.int64)
    values, errors, reliable = {}, {}, {}
    for name, s in series.items():
        at = np.searchsorted(steps, s.steps)
        values[name] = np.full(len(steps), np.nan)
        values[name][at] = np.where(np.isfinite(s.values), s.values, np.nan)
        errors[name] = np.full(len(steps), np.nan)
        errors[name][at] = np.where(np.isfinite(s.standard_errors), s.standard_errors, np.nan)
        reliable[name] = np.ones(len(steps), dtype=bool)
        reliable[name][at] = s.reliable
    measured = int(np.any([np.isfinite(values[name]) for name in looked_at], axis=0).sum()) if looked_at else 0
    note = None
    transitions: list[Transition] = []
    if measured < MIN_POINTS and not dense:
        mend = _MORE_CHECKPOINTS if run.header.get("source") == "checkpoints" else _MORE
        note = (
            f"Transitions were not looked for: the run holds {_counted(measured, 'usable measurement')}, and "
            f"it takes at least {MIN_POINTS}. {mend}"
        )
    else:
        detection = detect_transitions(
            steps,
            values,
            standard_errors=errors,
            reliable=reliable,
            read_beside=beside,
            dense=dense,
            alpha=alpha,
            n=run.header.get("n"),
            search=search,
        )
        transitions = detection
        note = None if detection.undecided is None else f"Undecided: {detection.undecided}"
    return Analysis(run, tuple(named_by_events(transitions, events)), tuple(names), alpha, note, tuple(events))


def _series(run: Run, name: str) -> Series:
    """What was measured, or else what the user gave under this name."""
    if name in run.names or name not in run.observed:
        return run.series(name)
    steps, values = run.observed[name]
    return Series(name, steps, values.astype(float), np.full(len(steps), np.nan), np.ones(len(steps), dtype=bool))


def _plain_moved(moved: Moved | None) -> dict[str, Any] | None:
    return None if moved is None else asdict(replace(moved, samples=moved.samples[:MOST_SAMPLES]))


def _counted(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _finite(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_finite(value) for value in plain]
    if isinstance(plain, float) and not math.isfinite(plain):
        return None
    return plain
