"""What our pages are made of: one file each, which needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape as escape_markup

from phasewatch.printable import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2b2b;
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
img { width: 100%; height: auto; } .where { color: #6b6b6b; margin-top: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top;
  padding: .3rem .9rem .3rem 0; }
th { font-weight: 600; } tr { border-bottom: 1px solid #dde1e7; }
td { overflow-wrap: anywhere; white-space: pre-line; }
td:first-child { white-space: nowrap; }
.transitions td:not(:nth-child(3)) { white-space: pre; } .transitions td:nth-child(3) { min-width: 9rem; }
.verdict { padding-left: 1.2rem; } .verdict li:first-child { font-weight: 600; }
.warning { border-left: 4px solid #d55e00; background: #fdf3ea; padding: .5rem 1rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.2rem; } summary { cursor: pointer; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A page of its parts, headed by its title."""
    head = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>phasewatch: {escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>", ""])


def escape(text: str) -> str:
    """As it may stand in the page."""
    return escape_markup(printable(text))


def picture(png: bytes, what: str) -> str:
    """A figure, within the page."""
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def sentences(lines: Iterable[str], style: str = "verdict") -> str:
    """Sentences, one a line."""
    return f'<ul class="{style}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """Cells under their columns."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
