"""What a measurement is at, in the trainer's own progress bar."""

from __future__ import annotations

from typing import Any

from phasewatch.callbacks.places import is_a


class ShownProgress:
    """Writes over the description of the bar of training batches, and puts it back."""

    def __init__(self, trainer: Any) -> None:
        """Nothing is shown yet."""
        self._trainer = trainer
        self._before: str | None = None

    def __call__(self, part: str | None) -> None:
        """Show a part of a measurement.

        Args:
            part: Its name; None where the measurement is over.
        """
        bar = self._trainer.progress_bar_callback
        if bar is None or not bar.is_enabled:
            return
        if is_a(bar, "TQDMProgressBar"):
            shown = bar.train_progress_bar
            self._before = shown.desc if self._before is None else self._before
            shown.set_description_str(self._before if part is None else f"measuring {part}: ")
        elif is_a(bar, "RichProgressBar") and bar.progress is not None and bar.train_progress_bar_id is not None:
            task = bar.train_progress_bar
            self._before = task.description if self._before is None else self._before
            bar.progress.update(task.id, description=self._before if part is None else f"measuring {part}")
            bar.refresh()
        if part is None:
            self._before = None
