"""``phasewatch demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from phasewatch.cli.speaking import Failure


def add(commands: Any) -> None:
    """Say what it takes."""
    demo = commands.add_parser(
        "demo",
        help="train a small network, watched, and show what was found",
        description="Train a small network on real data with phasewatch watching, and show what was found.",
    )
    demo.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("runs/demo"),
        help="where to write (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
    demo.set_defaults(perform=perform)


def perform(arguments: argparse.Namespace) -> int:
    """Train, and show what was found."""
    try:
        from phasewatch.demo import run

        run(arguments.output, arguments.seed)
    except ImportError as error:
        raise Failure(error) from error
    return 0
