"""A checkpoint before, at and after each transition: the last few are kept back until it is known which those are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phasewatch.transitions import Flag

_RECENT = re.compile(r"recent-step=(\d+)\.ckpt")


class TransitionCheckpoints:
    """Keeps the checkpoints of the last measured steps back, and saves those around a transition when they are known.

    That is when it is flagged, but for a transition that is then under way: where it ends is known when it has ended.

    Attributes:
        directory: Where they lie: ``transition-<number>-<before|at|after>-step=<step>.ckpt``.
    """

    def __init__(self, directory: Path, kept_back: int) -> None:
        """Nothing is written yet.

        Args:
            directory: Of this run alone; is made if need be.
            kept_back: How many checkpoints to keep back.
        """
        self.directory = directory
        self._kept_back = kept_back

    def start(self, step: int) -> None:
        """Take up what this run kept back before a step; what lies there from that step on is of another one."""
        if self.directory.is_dir():
            recent = self._recent()
            for later in [kept for kept in recent if kept >= step]:
                recent[later].unlink()

    def at_measurement(self, trainer: Any, step: int, flags: Sequence[Flag]) -> None:
        """Keep the trainer's state back, and save what lies around the transitions flagged just now. All ranks call."""
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.directory / f"recent-step={step}.ckpt", weights_only=False)
        if not trainer.is_global_zero:
            return
        recent = self._recent()
        for flag in flags:
            if flag.action == "flagged":
                for left_by_another_run in self._saved(flag):
                    left_by_another_run.unlink()
            if flag.action != "withdrawn":
                self._save(flag, recent)
        for old in sorted(recent)[: -self._kept_back]:
            recent[old].unlink()

    def _recent(self) -> dict[int, Path]:
        matches = ((_RECENT.fullmatch(path.name), path) for path in self.directory.iterdir())
        return {int(match[1]): path for match, path in matches if match}

    def _saved(self, flag: Flag, place: str = "*") -> list[Path]:
        return list(self.directory.glob(f"transition-{flag.number}-{place}-step=*.ckpt"))

    def _save(self, flag: Flag, recent: dict[int, Path]) -> None:
        """Save what is known by now and was not saved before."""
        transition = flag.transition
        earlier = [step for step in recent if step <= transition.start]
        # What is not kept back any more cannot be saved.
        wanted = {"before": max(earlier, default=None)}
        if not transition.under_way:
            later = [step for step in recent if step >= transition.end]
            within = [step for step in recent if transition.start <= step <= transition.end]
            wanted["at"] = min(sorted(within), key=lambda step: abs(step - transition.step), default=None)
            wanted["after"] = max(later, default=None)
        for place, step in wanted.items():
            if step is not None and not self._saved(flag, place):
                shutil.copyfile(recent[step], self.directory / f"transition-{flag.number}-{place}-step={step}.ckpt")
