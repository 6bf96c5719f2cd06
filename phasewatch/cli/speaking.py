"""How the commands speak: to terminals and pipes of any width and encoding."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
import textwrap
from typing import TextIO

from phasewatch.printable import printable

WIDTH = 100
"""Columns of what is printed, at most. Chosen."""
_SPELLED = {"λ": "lambda", "→": "->", "±": "+-", "ε": "epsilon", "β": "beta", "ν": "nu", "²": "^2", "×": "x", "·": "-"}


class Failure(Exception):
    """What the user is told before the command ends."""


def say(text: object = "", file: TextIO | None = None) -> None:
    """Print, without what would steer a terminal."""
    print(printable(str(text)), file=file)


def spell_out(*streams: TextIO) -> None:
    """Have streams that lack a character say it in others, so that a terminal without λ is no reason to fail."""
    codecs.register_error("spelled", _spelled)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SPELLED.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def columns() -> int:
    """How wide what is printed may be: as the terminal, where one is written to, and 100 at most."""
    if "COLUMNS" not in os.environ and not sys.stdout.isatty():
        return WIDTH
    return max(20, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def fitted(text: object) -> str:
    """Sentences, one a line, wrapped where the terminal is narrower than what is written elsewhere."""
    width = columns()
    if width == WIDTH:
        return str(text)
    return "\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in str(text).splitlines())


def reason(error: BaseException) -> str:
    """What an error says, and of one of the system which file it is about, without its number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    about = error.filename or error.filename2
    return error.strerror if about is None else f"{os.fsdecode(about)}: {error.strerror}"
