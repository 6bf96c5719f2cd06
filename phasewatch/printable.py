"""Names and messages from files, as they may go to a terminal or a page."""

from __future__ import annotations

import re

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
"""Sequences of ECMA-48 that colour text, move the cursor or set a window's title."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What else a terminal or browser obeys and nobody sees, but for tabs and ends of lines."""


def printable(text: str) -> str:
    r"""The text without what steers a terminal, or turns the direction of writing.

    Example:
        >>> printable("\x1b[31mloss\x1b[0m\x07")
        'loss'
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", text))
