"""From the arguments of the process to one of the commands, and its exit status."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from phasewatch._version import __version__
from phasewatch.cli import analyze, compare, demo, measure
from phasewatch.cli.speaking import Failure, reason, say, spell_out

_EXAMPLES = """\
examples:
  phasewatch demo                               train a small network, watched, and show what was found
  phasewatch analyze lightning_logs/version_0   find the transitions of a recorded run
  phasewatch measure checkpoints --build train:build
                                                measure the checkpoints of a run that was not watched
  phasewatch compare lightning_logs/version_*   which transitions do several runs have in common?
"""
NOBODY_READS = 141
"""Status of a process whose reader has gone, as a shell gives it: 128 and the number of SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; default those of the process.

    Returns:
        The exit status: 0, or 2 where what was asked for cannot be done; 141 where its output is read no further.
    """
    arguments = _parser().parse_args(argv)
    spell_out(sys.stdout, sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Of other packages, to their developers.
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            status: int = arguments.perform(arguments)
            sys.stdout.flush()
            return status
    except Failure as failure:
        say(f"phasewatch: {failure}", file=sys.stderr)
    except BrokenPipeError:
        # what is left in the buffer would be tried again at exit
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except OSError as error:
        say(f"phasewatch: {reason(error)}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phasewatch",
        description="Watch the geometry of the loss while a network trains: when does it change phase?",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"phasewatch {__version__}")
    with suppress(ImportError):  # for shells, where shtab is installed
        import_module("shtab").add_argument_to(parser, "--print-completion")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (analyze, measure, compare, demo):
        command.add(commands)
    return parser


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"phasewatch: {str(message).removeprefix('phasewatch: ')}", file=sys.stderr)
