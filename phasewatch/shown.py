"""How results show themselves in a notebook: as small tables, in the words that they print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape
from typing import Any

from phasewatch.printable import printable

LONGEST = 120
"""Characters of a list in a table. Chosen."""


def shown(heading: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with its heading, in HTML.

    Args:
        heading: A sentence over it.
        columns: Headings of the columns; none where the rows need none.
        rows: The cells, which are written as text.
    """
    head = f"<thead><tr>{''.join(f'<th>{_cell(column)}</th>' for column in columns)}</tr></thead>" if columns else ""
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<p>{_cell(heading)}</p><table>{head}<tbody>{body}</tbody></table>"


class Shown:
    """A dataclass that a notebook shows as what it prints, and a table of its numbers and words beneath."""

    def _repr_html_(self) -> str:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        return shown(repr(self), (), [(name, _written(value)) for name, value in values if _is_plain(value)])


def _is_plain(value: Any) -> bool:
    """Whether it is a number, words, or a few of them."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not known"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not known"
    if isinstance(value, tuple | list):
        words = ", ".join(map(_written, value)) or "none"
        return words if len(words) <= LONGEST else f"{words[:LONGEST]} … ({len(value)} in all)"
    return str(value)


def _cell(content: object) -> str:
    return escape(printable(str(content)))
