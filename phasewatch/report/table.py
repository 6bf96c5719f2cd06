"""The transitions of a run as a table in plain text or Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Sequence

from tabulate import MIN_PADDING, tabulate

from phasewatch.figures.numbers import format_change, format_span, format_step, format_value
from phasewatch.record import Transition
from phasewatch.record.signals import LLC_BEHAVIORAL, LLC_COARSE
from phasewatch.transitions.events import Event

NONE_FOUND = "No transitions were found: nothing stands out from how the run moves and scatters otherwise."
COLUMNS = ("step (95 % interval)", "from-to", "kind", "what changed", "score")
LEFT = ("kind", "what changed")
"""Columns of words; the others are of numbers."""
EVENT_COLUMNS = ("step", "event", "what happened")
# Columns of a table, unless the reader says how many. Chosen.
WIDTH = 100
# A signal's change is told when it is this many standard errors beyond the drift of the stages. Chosen.
LEAST_Z = 3.0
_FIRST = (LLC_BEHAVIORAL, LLC_COARSE)
_GAP = 2
_WIDEST_KIND = 18
_LEAST_ROOM = 30
"""Characters between two columns; of the kind at most; and of what changed, with fewer of which it is a narrow heap of
words. Chosen."""


def format_table(transitions: Sequence[Transition], markdown: bool = False, width: int = WIDTH) -> str:
    """The transitions as a table, one a row, or a sentence where there are none.

    Args:
        transitions: The transitions, in the order wanted.
        markdown: Whether to write a Markdown table instead of text.
        width: Columns that text may take; where a table does not fit, a paragraph stands for each of its rows.
    """
    if not transitions:
        return NONE_FOUND
    rows = table_rows(transitions, arrow="→" if markdown else "->")
    return _markdown(rows) if markdown else _text(rows, width)


def format_beside(
    transitions: Sequence[Transition],
    describe: Callable[[Transition], Sequence[str] | None],
    markdown: bool = False,
    width: int = WIDTH,
) -> str:
    """What there is to tell beside transitions, one paragraph each; nothing where that is nothing.

    Args:
        transitions: The transitions.
        describe: What there is to tell of one.
        markdown: Whether to write a Markdown list instead of text.
        width: Columns that text may take.
    """
    told = []
    for transition in transitions:
        if words := describe(transition):
            line = f"at {format_step(transition.step)}: {'; '.join(words)}"
            told.append(f"- {line}" if markdown else textwrap.fill(line, width, subsequent_indent="  "))
    return "\n".join(told)


def format_events(events: Sequence[Event]) -> str:
    """What the schedule did or what befell the run, a line each; nothing where there is nothing to tell."""
    return "\n".join(f"step {step}: {kind}: {description}" for step, kind, description in event_rows(events))


def event_rows(events: Sequence[Event]) -> list[tuple[str, ...]]:
    """The cells of their table, in the order of ``EVENT_COLUMNS``."""
    return [(format_step(event.step), event.kind, event.description) for event in events]


def table_rows(transitions: Sequence[Transition], arrow: str = "->") -> list[tuple[str, ...]]:
    """The cells of the table, in the order of ``COLUMNS``, with a line for each change."""
    return [
        (
            f"{format_step(t.step)} ({format_span(*t.interval)})",
            format_span(t.start, t.end),
            t.label,
            "\n".join(describe_changes(t, arrow)),
            format_value(t.score),
        )
        for t in transitions
    ]


def in_columns(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str], style: str = "simple"
) -> str:
    """Cells under their columns, as text.

    Args:
        columns: What the columns are called.
        rows: The cells, which may have several lines.
        left: The columns that are aligned at their left; the others are at their right.
        style: Of ``tabulate``.
    """
    alignment = ["left" if column in left else "right" for column in columns]
    return tabulate(rows, columns, style, disable_numparse=True, colalign=alignment)


def describe_changes(transition: Transition, arrow: str = "->") -> list[str]:
    """What each signal did, λ of the function first, then the most significant; at least one, else those beyond noise.

    A change is called unreliable where one of its stages holds no reliable point of the signal.
    """
    ranked = sorted(transition.changes.items(), key=lambda item: (item[0] not in _FIRST, -abs(item[1].z)))
    told = [(name, c) for name, c in ranked if abs(c.z) >= LEAST_Z]
    told = told or sorted(ranked, key=lambda item: -abs(item[1].z))[:1]
    return [
        f"{name} {format_change(c.before, c.after, arrow)}{'' if c.reliable else ' (unreliable)'}" for name, c in told
    ]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return in_columns(COLUMNS, cells, LEFT, style="pipe")


def _text(rows: Sequence[Sequence[str]], width: int) -> str:
    widths = [
        max(len(column) + MIN_PADDING, *(len(row[k].replace("\n", ", ")) for row in rows))
        for k, column in enumerate(COLUMNS)
    ]
    widths[2] = min(widths[2], _WIDEST_KIND)
    room = width - sum(widths[:3]) - widths[4] - _GAP * (len(COLUMNS) - 1)
    if room < min(widths[3], _LEAST_ROOM):
        return "\n".join(line for row in rows for line in _paragraph(row, width))
    cells = [
        (place, extent, textwrap.fill(kind, widths[2]), "\n".join(_wrap_changes(changed.split("\n"), room)), score)
        for place, extent, kind, changed, score in rows
    ]
    return in_columns(COLUMNS, cells, LEFT)


def _paragraph(row: Sequence[str], width: int) -> list[str]:
    """A row where there is no room for columns."""
    place, extent, kind, changed, score = row
    told = [f"step {place}: {kind}", f"  from-to {extent}, score {score}"]
    told += [f"  {line}" for line in _wrap_changes(changed.split("\n"), width - 2)]
    return [line for one in told for line in textwrap.wrap(one, width, initial_indent="", subsequent_indent="  ")]


def _wrap_changes(changes: Sequence[str], width: int) -> list[str]:
    """As many changes a line as fit; one is broken only where it is wider than the column."""
    lines: list[str] = []
    for k, change in enumerate(changes):
        listed = change if k == len(changes) - 1 else f"{change},"
        if lines and len(lines[-1]) + 1 + len(listed) <= width:
            lines[-1] += f" {listed}"
        else:
            lines += textwrap.wrap(listed, width)
    return lines
