"""The verdict on a run, in a few sentences: when it changed, how, how surely, and what may be trusted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from phasewatch.analysis import Analysis
from phasewatch.figures.numbers import format_change, format_span, format_step, format_value
from phasewatch.record import Run, Transition
from phasewatch.record.signals import EFFECTIVE_RANK_COARSE, LLC, LLC_BEHAVIORAL, LLC_COARSE, LOSS
from phasewatch.report.table import LEAST_Z, NONE_FOUND, describe_changes, format_events
from phasewatch.transitions.detect import MIN_POINTS
from phasewatch.transitions.events import Event, EventKind

Finding = Literal["diverged", "transitions", "no transition", "undecided", "too little measured"]
EVENT_KINDS = get_args(EventKind)

NAMES = {
    LLC_BEHAVIORAL: "λ of the function (fine)",
    LLC_COARSE: "λ of the function (coarse)",
    LLC: "λ of the loss",
}
"""Of whose points it is said how many are reliable."""
_TOLD = {
    LOSS: "loss",
    LLC_COARSE: "λ (coarse)",
    LLC_BEHAVIORAL: "λ (fine)",
    LLC: "λ of the loss",
    EFFECTIVE_RANK_COARSE: "effective rank (coarse)",
}
"""What a transition did is told of these, where it did something to them."""
MOST_REASONS = 2
"""Changes that are told of a transition, and doubts of a signal. Chosen."""


@dataclass(frozen=True)
class Verdict:
    """What every view of a run says first.

    Attributes:
        finding: What came of looking for transitions; changes with a cause outside of the model are none. A run that
            diverged is called that before all else.
        sentences: The verdict in words.
        steps: Where the transitions lie.
        reliable: Name of each λ that was measured to how many of its points are reliable, and how many there are.
        not_borne_out: Steps at which a transition was flagged while the run went on that the whole run does not show.
    """

    finding: Finding
    sentences: tuple[str, ...]
    steps: tuple[float, ...]
    reliable: dict[str, tuple[int, int]]
    not_borne_out: tuple[float, ...]

    def __str__(self) -> str:
        """The sentences, one a line."""
        return "\n".join(self.sentences)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values that JSON can hold."""
        return {
            "finding": self.finding,
            "sentences": list(self.sentences),
            "steps": list(self.steps),
            "reliable": {name: list(counts) for name, counts in self.reliable.items()},
            "not_borne_out": list(self.not_borne_out),
        }

    def numbers(self) -> dict[str, float]:
        """Number and steps of the transitions, and the share of the points of each λ that are reliable."""
        steps = {f"transition_{k}_step": step for k, step in enumerate(self.steps, start=1)}
        shares = {f"{name}_reliable": trusted / points for name, (trusted, points) in self.reliable.items()}
        return {"transitions": float(len(self.steps)), **steps, **shares}


def verdict(analysis: Analysis) -> Verdict:
    """The verdict on an analysed run.

    Args:
        analysis: As given by :func:`phasewatch.analyze_run`.
    """
    run = analysis.run
    reliable = {name: _reliable(run, name) for name in NAMES if name in run.names}
    unseen = tuple(flag.transition.flagged_at or 0.0 for flag in analysis.not_borne_out)
    diverged = _divergences(analysis)
    sentences = [f"Diverged at step {format_step(event.step)}: {event.description}." for event in diverged]
    sentences += _found(analysis)
    sentences += format_events([event for event in analysis.events if event not in diverged]).splitlines()
    if analysis.note is None and len(run.measurements) < MIN_POINTS and run.observed:
        searched = "only the loss at every step was searched for transitions"
        sentences.append(f"Fewer than {MIN_POINTS} measurements, {len(run.measurements)}: {searched}.")
    sentences += [_trusted(run, name, *counts) for name, counts in reliable.items()]
    if run.measurements and not reliable:
        sentences.append(_without_lambda(run))
    if unseen:
        flagged = ", ".join(map(format_step, unseen))
        sentences.append(f"Flagged at step {flagged} while the run went on, and not borne out by the whole of it.")
    sentences += _state(run)
    steps = tuple(one.step for one in _own(analysis.transitions))
    return Verdict(_finding(analysis), tuple(sentences), steps, reliable, unseen)


def _divergences(analysis: Analysis) -> list[Event]:
    return [event for event in analysis.events if event.kind == "divergence"]


def _finding(analysis: Analysis) -> Finding:
    if _divergences(analysis):
        return "diverged"
    if _own(analysis.transitions):
        return "transitions"
    if analysis.note is None:
        return "no transition"
    return "undecided" if analysis.note.startswith("Undecided") else "too little measured"


def _found(analysis: Analysis) -> list[str]:
    found, run = analysis.transitions, analysis.run
    if not found:
        return [analysis.note or NONE_FOUND]
    told = [f"{counted_changes(found)}:", *map(_told, found)]
    last = run.measurements[-1].step if run.measurements else found[-1].end
    if last > found[-1].end:
        told.append(f"Nothing since step {format_step(found[-1].end)}, up to step {format_step(last)}.")
    return told


def _own(found: Sequence[Transition]) -> list[Transition]:
    """Those without a cause outside of the model."""
    return [one for one in found if one.kind not in EVENT_KINDS]


def counted_changes(found: Sequence[Transition]) -> str:
    """How many transitions there are; what was done to the run or befell it made the others, which are none."""
    own = len(_own(found))
    caused = len(found) - own
    transitions = f"{own or 'No'} transition{'' if own == 1 else 's'}"
    if not caused:
        return transitions
    return f"{transitions}, and {caused} change{'s' if caused > 1 else ''} with a cause outside of the model"


def _told(one: Transition) -> str:
    """Place, kind, what it did to loss and λ (else what changed most), and how many signals see it."""
    changes = [
        f"{name} {format_change(one.changes[signal].before, one.changes[signal].after, '→')}"
        + ("" if one.changes[signal].reliable else " (unreliable)")
        for signal, name in _TOLD.items()
        if signal in one.changes and abs(one.changes[signal].z) >= LEAST_Z
    ]
    changes = changes or describe_changes(one, "→")[:MOST_REASONS]
    place = f"step {format_step(one.step)} ({format_span(*one.interval)}): {one.label}"
    seen = f"; seen by {len(one.seen_by)} signal{'s' if len(one.seen_by) > 1 else ''}" if one.seen_by else ""
    return f"{place}: {', '.join(changes)}{seen}."


def _reliable(run: Run, name: str) -> tuple[int, int]:
    trusted = run.series(name).reliable
    return int(trusted.sum()), len(trusted)


def _trusted(run: Run, name: str, reliable: int, points: int) -> str:
    sentence = f"{NAMES[name]}: {reliable} of {points} points are reliable"
    counted = [f"{reason} {count}" for reason, count in count_doubts(run, name)[:MOST_REASONS]]
    sentence += f" ({', '.join(counted)})" if counted else ""
    return ", ".join([sentence, *(f"{count} {note}" for note, count in count_notes(run, name))]) + "."


def _without_lambda(run: Run) -> str:
    """What there is in the place of λ."""
    if EFFECTIVE_RANK_COARSE not in run.names:
        failed = [failure for failure in run.failures if failure.get("what") in (LLC_BEHAVIORAL, LLC)]
        why = f": {failed[-1]['what']} failed ({_first_sentence(str(failed[-1].get('error')))})" if failed else ""
        return f"No λ was measured{why}."
    rank = run.series(EFFECTIVE_RANK_COARSE)
    known = rank.reliable
    counted = f"reliable at {known.sum()} of {len(known)} points"
    told = f"No λ was measured; in its place half the effective rank (coarse), from which λ may be far, {counted}"
    if known.sum() < 2:
        return f"{told}."
    steps, halves, errors = rank.steps[known], rank.values[known] / 2, np.nan_to_num(rank.standard_errors[known]) / 2
    where = f"step {format_step(steps[0])} to {format_step(steps[-1])}"
    told += f": {format_change(halves[0], halves[-1], '→')} from {where}"
    ends = np.array([0, -1])
    for name, there in (("least", halves.argmin()), ("most", halves.argmax())):
        beyond = np.abs(halves[ends] - halves[there]) > LEAST_Z * np.hypot(errors[ends], errors[there])
        told += f", {name} {format_value(halves[there])} at step {format_step(steps[there])}" if beyond.all() else ""
    return f"{told}."


def _first_sentence(error: str) -> str:
    return re.split(r"\.\s|\n", error, maxsplit=1)[0].rstrip(".")


def count_doubts(run: Run, name: str) -> list[tuple[str, int]]:
    """Why points of a signal are not to be trusted, without the figures, and of how many it is said."""
    found = (m.estimates[name].doubts for m in run.measurements if name in m.estimates)
    return Counter(re.split(r"[:(]", doubt)[0].strip() for doubts in found for doubt in doubts).most_common()


def count_notes(run: Run, name: str) -> list[tuple[str, int]]:
    """What is noted of points of a signal, without its figures, and of how many."""
    found = (m.estimates[name].notes for m in run.measurements if name in m.estimates)
    return Counter(note.split(":")[0] for notes in found for note in notes).most_common()


def _state(run: Run) -> list[str]:
    """What is missing, and how the run ended where it did not come to its end; of one in memory it is not known."""
    missing = ["Part of the record is missing or damaged."] if run.gaps or run.damaged else []
    return [*missing, run.told_ending] if run.told_ending and run.path is not None else missing
