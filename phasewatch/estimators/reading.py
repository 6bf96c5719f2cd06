"""What an estimator is, and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from phasewatch.objective import Objective
from phasewatch.record import Estimate, Histogram


@dataclass(frozen=True)
class Reading:
    """The numbers of one estimator at one step.

    Attributes:
        estimates: Signal name to what was found.
        histograms: Name to distribution.
        sample_losses: The loss of each sample of the main probe; none where it is not told.
    """

    estimates: Mapping[str, Estimate]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    sample_losses: tuple[float, ...] = ()


@runtime_checkable
class Estimator(Protocol):
    """Anything that can be measured.

    Each signal that it emits has a row in the catalogue (:mod:`phasewatch.record.signals`), which says what it is
    called, how it is shown and whether transitions are looked for in it; one without is recorded as a detail. What an
    estimator takes is predicted where it says its price (:class:`phasewatch.estimators.Priced`).
    """

    @property
    def name(self) -> str:
        """What failures are recorded under."""
        ...

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Measure on frozen weights.

        Args:
            objective: The loss on the probe.
            n: Size of the training set.
            seed: Seeds all randomness.
        """
        ...


def checked_estimators(estimators: Iterable[Estimator]) -> tuple[Estimator, ...]:
    """The same as a tuple.

    Raises:
        TypeError: If one is no estimator.
        ValueError: If two have the same name.
    """
    checked = tuple(estimators)
    for given in checked:
        if isinstance(given, type) or not isinstance(given, Estimator):
            raise TypeError(
                f"{given!r} was given as an estimator; expected an object with a name and read(objective, n, seed), "
                "such as LearningCoefficient(draws=800)"
            )
    names = [given.name for given in checked]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several estimators are called {twice}; expected names that tell them apart")
    return checked
