"""The command ``phasewatch``: one file a command, and what they have in common."""

from phasewatch.cli.entry import main

__all__ = ["main"]
