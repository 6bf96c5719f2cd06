"""What fails costs only itself: it is warned of once, and left out where it would fail again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

from phasewatch.measure import Failure

OnError = Literal["warn", "raise", "disable"]
GIVEN_UP_AFTER = 8
"""Measurements in a row in which an estimator may fail, as many as make a run; then it is switched off.
Chosen."""


class Failing:
    """What has failed in a run so far, and what follows from it."""

    def __init__(self, on_error: OnError, estimators: Collection[str]) -> None:
        """Nothing has failed yet.

        Args:
            on_error: What an error does: warn once and go on, raise, or go on without what has failed.
            estimators: Their names.

        Raises:
            ValueError: If ``on_error`` is none of the three.
        """
        if on_error not in ("warn", "raise", "disable"):
            raise ValueError(f"on_error is {on_error!r}; expected 'warn', 'raise' or 'disable'")
        self._on_error = on_error
        self._estimators = estimators
        self._failed: set[str] = set()
        self._impossible: set[str] = set()
        self._in_a_row: Counter[str] = Counter()
        self._told: set[str] = set()

    @property
    def left_out(self) -> set[str]:
        """Names of what is not tried any more."""
        return self._impossible | (self._failed if self._on_error == "disable" else set())

    def note(self, failure: Failure, step: int) -> None:
        """Warn once of what failed and go on, or raise it."""
        what = failure.what
        first = what not in self._failed
        self._failed.add(what)
        if failure.is_permanent:
            self._impossible.add(what)
            if failure.error not in self._told:
                self._told.add(failure.error)
                warnings.warn(
                    f"phasewatch: {what} cannot be measured in this run, all else is ({failure.error}).", stacklevel=3
                )
            return
        if self._on_error == "raise":
            raise failure.exception
        if failure.is_out_of_memory and what in self._estimators:
            self._impossible.add(what)
            warnings.warn(
                f"phasewatch: {what} takes more memory than there is, with one chain after another and in smaller "
                f"batches too ({failure.error}). It is left out from step {step} on; all else is measured, and "
                "training goes on. A smaller probe takes less.",
                stacklevel=3,
            )
        elif first:
            warnings.warn(
                f"phasewatch: {what} failed at step {step} ({failure.error}). Training goes on; further failures are "
                "only recorded.",
                stacklevel=3,
            )

    def count(self, step: int, tried: Collection[str], failures: Sequence[Failure]) -> None:
        """Leave out from here on what has failed in so many measurements in a row, and say so.

        Args:
            step: Of a measurement.
            tried: Names of the estimators that it was made by.
            failures: Which of them failed.
        """
        failed = {failure.what: failure for failure in failures}
        for name in set(tried) - self._impossible:
            self._in_a_row[name] = self._in_a_row[name] + 1 if name in failed else 0
            if self._in_a_row[name] == GIVEN_UP_AFTER and self._on_error == "warn":
                self._impossible.add(name)
                warnings.warn(
                    f"phasewatch: {name} has failed in {GIVEN_UP_AFTER} measurements in a row, last at step {step} "
                    f"({failed[name].error}). It is switched off; all else is measured, and training goes on.",
                    stacklevel=2,
                )
