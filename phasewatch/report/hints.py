"""What was measured beside a transition and may explain it, and what there is to look at: nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from phasewatch.figures.numbers import format_change, format_value
from phasewatch.record import Run, Transition
from phasewatch.record.signals import CATALOGUE
from phasewatch.record.transition import overlap, standing_flags
from phasewatch.report.table import LEAST_Z, WIDTH, format_beside

LEARNING_RATE = "learning_rate"
CAUSES = "zeros_"


def describe_hints(run: Run, transition: Transition) -> list[str]:
    """Directions that died or revived, the learning rate, and the checkpoints that were saved around it.

    Args:
        run: The run.
        transition: Of this run; flagged while it went on, or found in all of it.
    """
    return [*_zeros(transition), *_learning_rates(run, transition), *_checkpoints(run, transition)]


def format_hints(run: Run, transitions: Sequence[Transition], markdown: bool = False, width: int = WIDTH) -> str:
    """One paragraph a transition; empty where nothing is known beside it.

    Args:
        run: The run.
        transitions: Its transitions.
        markdown: Whether to write a Markdown list instead of text.
        width: Columns that text may take.
    """
    return format_beside(transitions, lambda transition: describe_hints(run, transition), markdown, width)


def _zeros(transition: Transition) -> Iterator[str]:
    for name, change in transition.changes.items():
        if name.startswith(CAUSES) and name in CATALOGUE and change.reliable and abs(change.z) >= LEAST_Z:
            yield f"{CATALOGUE[name].title} {format_change(change.before, change.after, '->')}"


def _learning_rates(run: Run, transition: Transition) -> Iterator[str]:
    for name in run.observed:
        if name != LEARNING_RATE and not name.startswith(f"{LEARNING_RATE}_"):
            continue
        steps, rates = run.observed[name]
        within = rates[(steps >= transition.start) & (steps <= transition.end)]
        within = within[np.isfinite(within)]
        if len(within):
            first, last = within[0], within[-1]
            same = first == last
            told = f"{format_value(first)} throughout" if same else f"goes {format_change(first, last, '->')}"
            yield f"{name.replace('_', ' ')} {told}"


def _checkpoints(run: Run, transition: Transition) -> Iterator[str]:
    if run.path is None:
        return
    folder = run.path.parent / run.path.stem.replace("phasewatch", "transitions", 1)
    own = (transition.start, transition.end)
    for flag in standing_flags(run.flags):
        if overlap(own, (flag.transition.start, flag.transition.end)):
            saved: list[Path] = sorted(folder.glob(f"transition-{flag.number}-*-step=*.ckpt"))
            if saved:
                yield f"checkpoints: {', '.join(map(str, saved))}"
