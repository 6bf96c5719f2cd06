"""Arguments that several commands take, and how what is typed is read."""

from __future__ import annotations

import argparse
import math


def add_alpha(command: argparse.ArgumentParser) -> None:
    """The rate of false alarms."""
    command.add_argument(
        "--alpha",
        type=probability,
        default=0.05,
        help="wanted rate of false alarms in a run without transitions (default: %(default)s)",
    )


def add_signals(command: argparse.ArgumentParser) -> None:
    """Which signals to look at."""
    command.add_argument(
        "--signals",
        metavar="NAME",
        nargs="*",
        help="analyse these signals, of the record, the event files or the table; without a NAME, say which there are",
    )


def add_form(command: argparse.ArgumentParser) -> None:
    """What is printed, and as what."""
    form = command.add_mutually_exclusive_group()
    form.add_argument("--quiet", "-q", action="store_true", help="print the verdict alone")
    form.add_argument("--json", action="store_true", help="print the data as JSON and nothing else")


def probability(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; give a number between 0 and 1, such as 0.05")
    return value


def at_least_one(text: str) -> float:
    """A number that is 1 or more."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no factor; give a number of 1 or more, such as 1.5")
    return value


def shard(text: str) -> tuple[int, int]:
    """``3/8``: the third of eight."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give I/N with I from 1 to N, such as 3/8")
    return int(first), int(count)


def seconds(text: str) -> float:
    """``2h``, ``30m`` or ``90s``."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        value = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; give a number and its unit, such as 2h, 30m or 90s")
    return value
