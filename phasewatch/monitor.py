"""What is measured of a run, on which data and when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from phasewatch.estimators import BehavioralCoefficient, Estimator, LearningCoefficient, checked_estimators
from phasewatch.measure import Probe
from phasewatch.record.signals import HELD_OUT
from phasewatch.schedule import Clock, Schedule, Spread

COEFFICIENTS = (BehavioralCoefficient, LearningCoefficient)
"""What is measured on other data too, and of parts of the network."""


@dataclass(eq=False)
class Monitor:
    """What to measure, on which data and when.

    Attributes:
        estimators: What to measure.
        probe: On which data, and by which loss.
        schedule: When to measure.
        next_visit: The next step at which the schedule stops by.
        taken: Measurements made of it.
        last_taken: The step of the last one, or the first one where that is kept to be measured; -1 before.
    """

    estimators: tuple[Estimator, ...]
    probe: Probe
    schedule: Schedule
    next_visit: int | None = field(default=None, init=False)
    taken: int = field(default=0, init=False)
    last_taken: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        """Check the estimators, and ask the schedule for its first step."""
        self.estimators = checked_estimators(self.estimators)
        self.next_visit = self.schedule.next_visit(-1, Clock())

    def is_due(self, step: int, clock: Clock) -> bool:
        """Whether the schedule measures here."""
        return self.schedule.measures(step, self._own(clock))

    def pays(self, seconds: float, clock: Clock) -> bool:
        """Whether the schedule allows a measurement of so many seconds now."""
        if isinstance(self.schedule, Spread):
            return self.schedule.pays(seconds, self._own(clock))
        return self.schedule.left(clock) >= seconds

    def go_on(self, step: int, clock: Clock) -> None:
        """Ask the schedule for its next step after this one."""
        self.next_visit = self.schedule.next_visit(step, self._own(clock))

    def _own(self, clock: Clock) -> Clock:
        return replace(clock, taken=self.taken, last_taken=self.last_taken)

    def on_held_out(
        self, batches: Sequence[Any], source: str = "given", batch_sizes: Sequence[int] | None = None
    ) -> tuple[Monitor, Monitor]:
        """Measures λ of the function on samples that the network is not trained on, and all else as before.

        That λ needs inputs alone, no labels; those that a network was fitted to are no fair sample of what its function
        does elsewhere. Its signals keep their names.

        Args:
            batches: The samples.
            source: Where they are from, for the record.
            batch_sizes: Samples in each batch; default what can be read off.

        Returns:
            What is measured on the probe, and what on the held-out samples, at the same steps.

        Raises:
            ValueError: If there is no batch, or λ of the function is not measured.
        """
        if not batches:
            raise ValueError("held_out is empty; give at least one batch to measure on.")
        of_function = tuple(e for e in self.estimators if isinstance(e, BehavioralCoefficient))
        if not of_function:
            raise ValueError("held_out was given, but no BehavioralCoefficient to measure on it among the estimators.")
        rest = tuple(e for e in self.estimators if e not in of_function)
        held_out = replace(self.probe, batches=batches, batch_sizes=batch_sizes, name=HELD_OUT, source=source)
        return (
            Monitor(rest, self.probe, replace(self.schedule)),  # type: ignore[type-var]
            Monitor(of_function, held_out, replace(self.schedule)),  # type: ignore[type-var]
        )

    def on_other_data(self, name: str, probe: Iterable[Any]) -> Monitor:
        """Measures the learning coefficient on other batches, at the same steps and the same temperature.

        Args:
            name: What the signals are called: ``llc_<name>``, ``loss_<name>``.
            probe: The batches.

        Raises:
            ValueError: If the name is no identifier, there is no batch, or no learning coefficient is measured.
        """
        if name == HELD_OUT:
            raise ValueError(
                f"{name!r} is what signals on the samples given as held_out are called; name the data otherwise."
            )
        if not name.isidentifier():
            raise ValueError(
                f"{name!r} is no name for data; expected letters, digits and underscores, as 'validation'."
            )
        estimators = tuple(replace(e, data=name) for e in self.estimators if isinstance(e, COEFFICIENTS))
        if not estimators:
            raise ValueError(f"The learning coefficient on {name!r} was asked for, but none is among the estimators.")
        batches = list(probe)
        if not batches:
            raise ValueError(f"other_data[{name!r}] is empty; give at least one batch to measure on.")
        other = replace(self.probe, batches=batches, batch_sizes=None, name=name, source="given")
        return Monitor(estimators, other, replace(self.schedule))  # type: ignore[type-var]
