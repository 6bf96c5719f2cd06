"""A checkpoint before, at and after each transition: the last few are kept back until it is known which those are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phasewatch.transitions import Flag

FOLDER = "transitions"
_RECENT = re.compile(r"recent-step=(\d+)\.ckpt")


class TransitionCheckpoints:
    """Keeps the checkpoints of the last measured steps back, and saves those around a transition when it is flagged.

    Attributes:
        directory: Where they lie: ``transition-<number>-<before|at|after>-step=<step>.ckpt``.
    """

    def __init__(self, directory: Path, kept_back: int) -> None:
        """Take up what an earlier process kept back.

        Args:
            directory: The run's directory.
            kept_back: How many checkpoints to keep back.
        """
        self.directory = directory / FOLDER
        self._kept_back = kept_back

    def at_measurement(self, trainer: Any, step: int, flags: Sequence[Flag]) -> None:
        """Keep the trainer's state back, and save what lies around the transitions flagged just now. All ranks call."""
        self.directory.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.directory / f"recent-step={step}.ckpt")
        if not trainer.is_global_zero:
            return
        recent = self._recent()
        for flag in flags:
            if flag.action == "flagged":
                self._save(flag, recent)
        for old in sorted(recent)[: -self._kept_back]:
            recent[old].unlink()

    def _recent(self) -> dict[int, Path]:
        matches = ((_RECENT.fullmatch(path.name), path) for path in self.directory.iterdir())
        return {int(match[1]): path for match, path in matches if match}

    def _save(self, flag: Flag, recent: dict[int, Path]) -> None:
        transition = flag.transition
        earlier = [step for step in recent if step <= transition.start]
        later = [step for step in recent if step >= transition.end]
        wanted = {
            # Where the last checkpoint before it is not kept back any more, there is none.
            "before": max(earlier, default=None),
            "at": min(sorted(recent), key=lambda step: abs(step - transition.step)),
            "after": max(later, default=None),
        }
        for place, step in wanted.items():
            if step is not None:
                name = f"transition-{flag.number}-{place}-step={step}.ckpt"
                shutil.copyfile(recent[step], self.directory / name)
