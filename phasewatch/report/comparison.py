"""Several runs side by side: their transitions, aligned, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.figures.numbers import format_span, format_step
from phasewatch.report.table import WIDTH as TEXT_WIDTH
from phasewatch.transitions import AlignedTransition

NONE_FOUND = "No transitions were found in any of the runs."


def format_comparison(names: Sequence[str], aligned: Sequence[AlignedTransition]) -> str:
    """The aligned transitions as a table in plain text, one a row, with the step in each run where there is room.

    Args:
        names: What the runs are called.
        aligned: As given by :func:`phasewatch.transitions.align_transitions` for these runs, in their order.
    """
    if not aligned:
        return NONE_FOUND
    rows = [("median step (range)", "runs", "kind", *names)]
    for one in aligned:
        steps = ["-" if t is None else format_step(t.step) for t in one.transitions]
        low, high = one.spread
        spread = f" ({format_span(low, high)})" if low < high else ""
        found = sum(t is not None for t in one.transitions)
        rows.append((f"{format_step(one.step)}{spread}", f"{found} of {len(names)}", one.kind, *steps))
    if len(_lines(rows)[0]) > TEXT_WIDTH:
        rows = [row[:3] for row in rows]
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join(
            cell.ljust(width) if column == 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
