"""From what was recorded to what is searched: validation, time, scale and noise of each signal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike
from scipy.ndimage import median_filter

from phasewatch.record.signals import look_up

NORMAL_MAD = 1.4826
"""Standard deviations in a median absolute deviation, of a normal distribution."""
# An unreliable point keeps a voice, a small one. Chosen.
UNRELIABLE_VARIANCE = 25.0
# Differences below this share of a signal's range are of no interest, however exactly it is known. Chosen.
NOISE_FLOOR = 0.002
# A signal that falls through more than this factor is followed on a logarithmic scale. Chosen.
LOG_SPAN = 10.0
# The logarithm's offset, as a share of the range. Chosen.
LOG_OFFSET = 0.01
# An isolated spike counts as so many standard deviations at most. Chosen.
SPIKE = 3.5
# Measurements over which a standard error is compared with those about it. Chosen.
ERROR_WINDOW = 9
# Measurements over which the noise is looked at by itself; it counts there where it exceeds this many times the noise
# of the whole run. Chosen.
NOISE_WINDOW = 25
LOUDER = 2.0
# Standard deviation, in white noise, of the change between neighbouring second differences of unit variance.
THIRD_DIFFERENCE = (10.0 / 3.0) ** 0.5


@dataclass(frozen=True)
class Signal:
    """One signal, ready to be searched.

    Attributes:
        name: its name.
        values: the values in own units, shape (n,); NaN where missing.
        scaled: the values on the scale that is searched (own units or logarithmic), shape (n,); NaN where missing.
        sigma: standard deviation of each point about its stage on that scale, shape (n,); infinite where missing.
        span: spread of ``scaled`` (2.5 to 97.5 %).
        log_offset: ``scaled = log(values + log_offset)``, or None where the scale is the signal's own.
    """

    name: str
    values: np.ndarray
    scaled: np.ndarray
    sigma: np.ndarray
    span: float
    log_offset: float | None

    @property
    def own_sigma(self) -> np.ndarray:
        """``sigma`` in own units, shape (n,)."""
        return self.sigma if self.log_offset is None else self.sigma * (self.values + self.log_offset)

    def own_units(self, scaled: float) -> tuple[float, float]:
        """Return the value in own units and its derivative with respect to the searched scale."""
        if self.log_offset is None:
            return scaled, 1.0
        shifted = float(np.exp(scaled))
        return shifted - self.log_offset, shifted

    def searched_scale(self, value: float) -> float:
        """Return where a value in own units lies on the scale that is searched."""
        return value if self.log_offset is None else float(np.log(value + self.log_offset))


@dataclass(frozen=True)
class Column:
    """A signal as it was measured.

    Attributes:
        values: shape (n,); NaN where missing.
        errors: standard errors, shape (n,), NaN where unknown; None where there are none.
        trusted: whether a value may be trusted, shape (n,).
    """

    values: np.ndarray
    errors: np.ndarray | None
    trusted: np.ndarray

    def at(self, kept: np.ndarray) -> Column:
        """The same at some of the measurements."""
        return Column(self.values[kept], None if self.errors is None else self.errors[kept], self.trusted[kept])


@dataclass(frozen=True)
class Scaled:
    """All signals as columns, each in units of its span about its middle, so that none is too large to be squared.

    Attributes:
        steps: steps of the measurements, shape (n,).
        time: log time of each, shape (n,).
        signals: the signals, in the order of the columns.
        y: values, shape (n, signals); 0 where missing.
        sigma: standard deviations, shape (n, signals); infinite where missing.
        trusted: whether a value is known and reliable, shape (n, signals).
        middle: median of each signal on its scale.
        span: spread of each signal on its scale.
        searched: of each signal whether transitions are looked for in it; what the others did is told.
        beside: what is only read, by name.
    """

    steps: np.ndarray
    time: np.ndarray
    signals: list[Signal]
    y: np.ndarray
    sigma: np.ndarray
    trusted: np.ndarray
    middle: np.ndarray
    span: np.ndarray
    searched: np.ndarray
    beside: Mapping[str, Column]

    @classmethod
    def of(
        cls,
        steps: np.ndarray,
        time: np.ndarray,
        signals: list[Signal],
        trusted: np.ndarray,
        searched: np.ndarray,
        beside: Mapping[str, Column],
    ) -> Scaled:
        """Bring signals to one scale; ``trusted`` has shape (n, signals), ``searched`` (signals,)."""
        middle = np.array([np.nanmedian(signal.scaled) for signal in signals])
        span = np.array([signal.span for signal in signals])
        sigma = np.column_stack([signal.sigma for signal in signals]) / span
        present = np.isfinite(sigma)
        y = np.where(present, (np.column_stack([signal.scaled for signal in signals]) - middle) / span, 0.0)
        return cls(steps, time, signals, y, sigma, trusted & present, middle, span, searched, beside)

    @cached_property
    def searched_part(self) -> Scaled:
        """The signals in which transitions are looked for."""
        if self.searched.all():
            return self
        kept = self.searched
        signals = [signal for signal, searched in zip(self.signals, kept, strict=True) if searched]
        return replace(
            self,
            signals=signals,
            y=self.y[:, kept],
            sigma=self.sigma[:, kept],
            trusted=self.trusted[:, kept],
            middle=self.middle[kept],
            span=self.span[kept],
            searched=kept[kept],
        )

    @property
    def present(self) -> np.ndarray:
        """Whether a value is known, shape (n, signals)."""
        return np.isfinite(self.sigma)

    @property
    def weights(self) -> np.ndarray:
        """Inverse variances, shape (n, signals); 0 where missing."""
        return 1.0 / self.sigma**2

    @property
    def noise(self) -> float:
        """Scatter of a typical point of a typical signal that is searched, in spans."""
        typical = [np.median(column[np.isfinite(column)]) for column in self.sigma.T[self.searched]]
        return float(np.median(typical))


def checked_steps(steps: ArrayLike) -> np.ndarray:
    """Return the steps as floats, or raise what is wrong with them."""
    array = _numeric(steps, "steps")
    if not np.all(np.isfinite(array)):
        raise ValueError("steps hold NaN or infinity; expected one finite number for each measurement: drop those rows")
    spacing = np.diff(array)
    if np.any(spacing == 0):
        repeated = array[1:][spacing == 0][0]
        raise ValueError(f"step {repeated:g} occurs twice; expected increasing steps: keep one measurement of each")
    if np.any(spacing < 0):
        raise ValueError("steps are not sorted; expected increasing steps: sort the steps and all values alike")
    return array


def checked_signals(
    steps: np.ndarray,
    values: Mapping[str, ArrayLike],
    standard_errors: Mapping[str, ArrayLike] | None,
    reliable: Mapping[str, ArrayLike] | None,
) -> dict[str, Column]:
    """Return each signal as it was measured, or raise what is wrong with it."""
    if not isinstance(values, Mapping):
        raise ValueError(f"values are a {type(values).__name__}; expected a mapping of name to array: {{'loss': loss}}")
    if not values:
        raise ValueError("there are no signals; expected at least one: pass {name: values}")
    for what, given in (("standard_errors", standard_errors), ("reliable", reliable)):
        unknown = sorted(set(given or {}) - set(values))
        if unknown:
            raise ValueError(f"{what} name {unknown}, but the signals are {sorted(values)}: use the same names in both")
    signals = {}
    for name, given_values in values.items():
        array = _column(given_values, f"values of {name!r}", len(steps))
        if np.any(np.isinf(array)):
            raise ValueError(f"values of {name!r} hold infinity; expected finite numbers, or NaN where one is missing")
        errors = None
        if standard_errors is not None and standard_errors.get(name) is not None:
            errors = _column(standard_errors[name], f"standard_errors of {name!r}", len(steps))
            if np.any(np.isinf(errors)):
                raise ValueError(f"standard_errors of {name!r} hold infinity; expected NaN where one is unknown")
            if np.any(errors < 0):
                raise ValueError(f"standard_errors of {name!r} are negative in places; expected them to be >= 0")
        trusted = np.ones(len(steps), dtype=bool)
        if reliable is not None and reliable.get(name) is not None:
            flags = _column(reliable[name], f"reliable of {name!r}", len(steps))
            if not np.all(np.isin(flags, (0.0, 1.0))):
                raise ValueError(f"reliable of {name!r} holds other values than true and false; expected booleans")
            trusted = flags == 1.0
        signals[name] = Column(array, errors, trusted)
    return signals


def checked_course(name: str, steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a signal that has steps of its own, or raise what is wrong with them.

    A value that is not finite is one: the loss of a bad batch.
    """
    checked = checked_steps(steps)
    array = _numeric(values, f"values of {name!r}")
    if len(array) != len(checked):
        raise ValueError(f"{name!r} has {len(array)} values at {len(checked)} steps; expected one for each")
    return checked, array


def checked_alpha(alpha: float) -> float:
    """Return alpha, or raise unless it is a probability strictly between 0 and 1."""
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0.0 < float(alpha) < 1.0:
        raise ValueError(f"alpha is {alpha!r}; expected a false-alarm rate strictly between 0 and 1, such as 0.05")
    return float(alpha)


def log_time(steps: np.ndarray) -> np.ndarray:
    """Return ``log(t + t_c)``, in which stages are of like length and drifts are straight.

    ``t_c`` is the larger of the smallest spacing and the first interval; up to a constant. Invariant under a change of
    the unit of time.
    """
    spacing = np.diff(steps)
    offset = max(float(spacing.min()), float(spacing[0]))
    # Counted from the first step, steps that are large beside their spacing stay apart.
    return np.asarray(np.log1p((steps - steps[0]) / (max(float(steps[0]), 0.0) + offset)))


def varies(values: np.ndarray) -> bool:
    """Tell whether a signal was measured at all and is not constant."""
    known = values[np.isfinite(values)]
    return bool(len(known) >= 4 and np.ptp(known) > 1e-12 * np.abs(known).max())


def prepare(name: str, time: np.ndarray, column: Column) -> Signal | None:
    """Return the signal on its scale with the noise of each point, or None if it is constant or nearly empty."""
    values, errors, trusted = column.values, column.errors, column.trusted
    if not varies(values):
        return None
    present = np.isfinite(values)
    scaled, offset = (values, None) if look_up(name).linear else _scale(values, present)
    y, x = scaled[present], time[present]
    span = _span(y)
    relative = np.ones(len(y))
    if errors is not None:
        own = errors[present]
        known = np.isfinite(own) & (own > 0)
        if known.any():
            # The scale's derivative turns a standard error in own units into one on the scale.
            own = np.where(known, own, np.median(own[known]))
            # A standard error from a few probes is small by chance now and then: no point weighs more than its like.
            own = np.maximum(own, median_filter(own, size=ERROR_WINDOW, mode="nearest"))
            relative = own if offset is None else own / np.exp(y)
    relative = relative / np.median(relative)
    sigma_present = np.hypot(_noise(x, y, relative) * relative, NOISE_FLOOR * span)
    # An isolated spike counts as a deviation of SPIKE sigma at most.
    middle = median_filter(y, size=5, mode="nearest")
    # At the ends the median is that of the outermost five: one or two new points are no new level yet.
    middle[:2], middle[-2:] = np.median(y[:5]), np.median(y[-5:])
    excess = np.abs(y - middle) / (SPIKE * sigma_present)
    sigma = np.full(len(values), np.inf)
    distrust = np.where(trusted[present], 1.0, np.sqrt(UNRELIABLE_VARIANCE))
    sigma[present] = sigma_present * np.maximum(excess, distrust)
    return Signal(name, values, scaled, sigma, span, offset)


def _scale(values: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Follow a positive signal that falls through a decade or more on a logarithmic scale.

    The logarithm keeps late stages, which are small in own units, as visible as early ones. Its offset of 1 % of the
    range bounds the scale, since the decay of a loss towards zero is not a change that matters for ever.
    """
    y = values[present]
    quarter = max(1, len(y) // 4)
    falls = np.median(y[-quarter:]) < np.median(y[:quarter])
    if y.min() <= 0 or not falls or y.max() < LOG_SPAN * y.min():
        return values, None
    offset = LOG_OFFSET * _span(y)
    return np.log(values + offset), offset


def _span(y: np.ndarray) -> float:
    """Spread of a signal without its rarest values; all of it where nothing else varies."""
    low, high = np.quantile(y, [0.025, 0.975])
    return float(high - low) if high > low else float(np.ptp(y))


def _noise(time: np.ndarray, y: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """Scale of the noise at each point in units of ``relative``, from second differences at irregular spacing.

    It is that of the whole run; more where the points about one are plainly louder, as SGD is once it has found a way.
    """
    left = (time[2:] - time[1:-1]) / (time[2:] - time[:-2])
    difference = y[1:-1] - left * y[:-2] - (1 - left) * y[2:]
    spread = np.sqrt(relative[1:-1] ** 2 + (left * relative[:-2]) ** 2 + ((1 - left) * relative[2:]) ** 2)
    # What rounding leaves of a constant is no jitter.
    bent = np.where(np.abs(difference) > 1e-9 * np.ptp(y), difference, 0.0) / spread
    # A course may bend in one place more than in all of the run: there, only what changes from bend to bend is noise.
    shaken = np.abs(np.diff(bent)) / THIRD_DIFFERENCE
    windows = sliding_window_view(shaken, min(NOISE_WINDOW, len(shaken)))
    local = _typical(windows)
    nearest = np.clip(np.arange(len(y)) - 1 - windows.shape[1] // 2, 0, len(windows) - 1)
    return np.maximum(_typical(np.abs(bent)), local[nearest] / LOUDER)


def _typical(sizes: np.ndarray) -> np.ndarray:
    """Standard deviation behind the sizes of differences, along the last axis; they do not see a level or a drift.

    Their median does not see a few steps; the upper quartile, where that is zero, does see the jitter of a count that
    is mostly constant.
    """
    middle = np.median(sizes, axis=-1) / 0.6745
    return np.where(middle > 0, middle, np.quantile(sizes, 0.75, axis=-1) / 1.1503)


def _numeric(given: ArrayLike, what: str) -> np.ndarray:
    """Return a one-dimensional array of floats, None becoming NaN, or raise what is wrong with it."""
    try:
        array = (
            np.ma.array(given, dtype=float).filled(np.nan)
            if isinstance(given, np.ma.MaskedArray)
            else np.asarray(given)
        )
        if array.dtype.kind not in "biuf":
            # None marks a missing value in lists; strings of digits are not numbers.
            if array.dtype.kind in "USMmc":
                raise TypeError(f"dtype {array.dtype}")
            array = np.array([np.nan if value is None else value for value in array.tolist()], dtype=float)
        array = array.astype(float)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{what} are not numeric ({error}); expected a one-dimensional array of numbers") from error
    if array.ndim != 1:
        raise ValueError(f"{what} have shape {array.shape}; expected a one-dimensional array of numbers")
    return array


def _column(given: ArrayLike, what: str, length: int) -> np.ndarray:
    """Return an array with one entry for each step, or raise what is wrong with it."""
    array = _numeric(given, what)
    if len(array) != length:
        raise ValueError(
            f"{what} have {len(array)} entries, but there are {length} steps; expected one for each step: "
            "fill in NaN where a signal was not measured"
        )
    return array
