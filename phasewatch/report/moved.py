"""Which samples and classes the transitions of a run moved, in words."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.figures.numbers import format_value
from phasewatch.record import Moved, MovedClass, MovedSample, Run, Transition
from phasewatch.report.table import WIDTH, format_beside

SAMPLES_TOLD = 5
CLASSES_TOLD = 3
TOKENS_TOLD = 6
"""How many of each are told of a transition. Chosen."""


def format_moved(run: Run, transitions: Sequence[Transition], markdown: bool = False, width: int = WIDTH) -> str:
    """One paragraph a transition: the samples and classes whose loss changed most; empty where none is known.

    Args:
        run: The run.
        transitions: Its transitions.
        markdown: Whether to write a Markdown list instead of text.
        width: Columns that text may take.
    """
    return format_beside(transitions, lambda transition: describe_moved(run.moved(transition)), markdown, width)


def describe_moved(moved: Moved | None) -> list[str] | None:
    """The samples that changed most, and the classes; None where nothing is known or nothing changed."""
    if moved is None or not moved.samples:
        return None
    told = [f"samples that changed most: {', '.join(map(_sample, moved.samples[:SAMPLES_TOLD]))}"]
    if moved.classes:
        told.append(f"classes: {', '.join(map(_class, moved.classes[:CLASSES_TOLD]))}")
    return told


def _sample(one: MovedSample) -> str:
    tokens = ""
    if isinstance(one.label, tuple):
        tokens = f" [{' '.join(map(str, one.label[:TOKENS_TOLD]))} ...]"
    return f"{one.index}{tokens} ({format_value(one.before)} to {format_value(one.after)})"


def _class(one: MovedClass) -> str:
    return f"{one.label} ({format_value(one.change)} ± {format_value(one.standard_error, 2)})"
