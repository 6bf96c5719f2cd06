"""What was measured at one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phasewatch.record.plain import mapping, member, number, numbers, texts, whole
from phasewatch.record.signals import NORMAL_95, look_up


@dataclass(frozen=True)
class Estimate:
    """A number, how well it is known, and what speaks against it.

    Two are equal where all of it is, NaN being equal to NaN.

    Attributes:
        value: The number.
        standard_error: Its standard error; NaN where none is known.
        doubts: Reasons not to trust the number; none where it is trusted.
        notes: What else is to be known of it, as that it is limited by the probe: it may be compared with others on the
            same probe, and would be another on a larger one.

    Raises:
        TypeError: If ``doubts`` or ``notes`` is a string, or value or standard error is no number.
        ValueError: If the standard error is negative.
    """

    value: float
    standard_error: float = math.nan
    doubts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check, and make plain floats and strings of what is as good."""
        for name in ("doubts", "notes"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise TypeError(f"{name} is the string {given!r}; expected a tuple of sentences: ({given!r},)")
            object.__setattr__(self, name, tuple(str(sentence) for sentence in given))
        for name in ("value", "standard_error"):
            given = getattr(self, name)
            try:
                if isinstance(given, str):
                    raise TypeError("a string is no number")
                object.__setattr__(self, name, float(given))
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"{name} is {given!r}; expected a number") from error
        if self.standard_error < 0:
            raise ValueError(f"standard_error is {self.standard_error:g}; expected it to be >= 0, or NaN if unknown")

    @property
    def reliable(self) -> bool:
        """Whether nothing speaks against the number."""
        return not self.doubts

    def __eq__(self, other: object) -> bool:
        """Whether all is equal, or unknown in both."""
        return self._key == other._key if isinstance(other, Estimate) else NotImplemented

    def __hash__(self) -> int:
        """That of what is compared."""
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        value, error = (None if math.isnan(number) else number for number in (self.value, self.standard_error))
        return value, error, self.doubts, self.notes

    def to_dict(self) -> dict[str, Any]:
        """Plain Python: the value (None if it is not finite), and the rest only where there is something to say."""
        plain: dict[str, Any] = {"value": self.value if math.isfinite(self.value) else None}
        if math.isfinite(self.standard_error):
            plain["standard_error"] = self.standard_error
        if self.doubts:
            plain["doubts"] = list(self.doubts)
        if self.notes:
            plain["notes"] = list(self.notes)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Estimate:
        """Inverse of :meth:`to_dict`; what was not finite comes back as NaN.

        Raises:
            ValueError: If it is none.
        """
        value = member(mapping(plain, "an estimate"), "value")
        return cls(
            math.nan if value is None else number(value, "value"),
            number(plain.get("standard_error", math.nan), "standard_error"),
            tuple(texts(plain.get("doubts", ()), "doubts")),
            tuple(texts(plain.get("notes", ()), "notes")),
        )


@dataclass(frozen=True)
class Histogram:
    """A distribution as weighted points, for example the eigenvalues of the Hessian.

    Attributes:
        positions: Where the mass lies, ascending.
        weights: How much lies there, in counts.
    """

    positions: list[float]
    weights: list[float]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Histogram:
        """The distribution as it stands in the record.

        Raises:
            ValueError: If it is none.
        """
        positions = numbers(member(mapping(plain, "a histogram"), "positions"), "positions")
        return cls(positions, numbers(member(plain, "weights"), "weights", len(positions)))


@dataclass(frozen=True)
class Measurement:
    """All numbers measured on the weights as they were at one training step.

    Attributes:
        step: Optimizer steps made before the measurement.
        estimates: Signal name to what was found.
        histograms: Name to distribution.
        seconds: Wall time that the measurement took.
        time: Unix time when it was finished.
        sample_losses: The loss of each sample of the probe, in its order, NaN where it was not finite; empty where the
            loss cannot be taken sample by sample.
        seconds_by_part: Wall time of each estimator, by its name; the rest went into what all of them share.
    """

    step: int
    estimates: dict[str, Estimate] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    seconds: float = 0.0
    time: float = 0.0
    sample_losses: tuple[float, ...] = ()
    seconds_by_part: dict[str, float] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """The value of a signal; NaN where it was not measured."""
        return self.estimates[name].value if name in self.estimates else math.nan

    def interval(self, name: str) -> tuple[float, float]:
        """The 95 % interval of a signal.

        It lies between the bounds measured with it; where there are none, its standard error makes it. NaN if unknown.
        """
        found = self.estimates.get(name, Estimate(math.nan))
        lower, upper = look_up(name).bounds or ("", "")
        reach = NORMAL_95 * found.standard_error
        low = self.value(lower) if lower in self.estimates else found.value - reach
        high = self.value(upper) if upper in self.estimates else found.value + reach
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, as it stands in the record and in checkpoints."""
        plain: dict[str, Any] = {
            "step": self.step,
            "estimates": {name: estimate.to_dict() for name, estimate in self.estimates.items()},
            "histograms": {
                name: {"positions": list(h.positions), "weights": list(h.weights)}
                for name, h in self.histograms.items()
            },
            "seconds": self.seconds,
            "time": self.time,
        }
        if self.sample_losses:
            plain["sample_losses"] = [loss if math.isfinite(loss) else None for loss in self.sample_losses]
        if self.seconds_by_part:
            plain["seconds_by_part"] = dict(self.seconds_by_part)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Measurement:
        """Inverse of :meth:`to_dict`; a number that was not finite comes back as NaN.

        Raises:
            ValueError: If a field is missing, or something else than is expected.
        """
        try:
            return cls(
                step=whole(member(plain, "step"), "step"),
                estimates={
                    name: Estimate.from_dict(estimate)
                    for name, estimate in mapping(member(plain, "estimates"), "estimates").items()
                },
                histograms={
                    name: Histogram.from_dict(h)
                    for name, h in mapping(member(plain, "histograms"), "histograms").items()
                },
                seconds=number(member(plain, "seconds"), "seconds"),
                time=number(member(plain, "time"), "time"),
                sample_losses=tuple(numbers(plain.get("sample_losses", ()), "sample_losses")),
                seconds_by_part={
                    name: number(seconds, "seconds_by_part")
                    for name, seconds in mapping(plain.get("seconds_by_part", {}), "seconds_by_part").items()
                },
            )
        except ValueError as error:
            raise ValueError(
                f"not a measurement: expected a mapping as written by Measurement.to_dict(), got one of "
                f"{', '.join(plain)} ({error})"
            ) from error
