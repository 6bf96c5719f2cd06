"""Which samples of the probe, and which classes of them, a transition moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.record.measurement import Measurement
from phasewatch.record.signals import NORMAL_95
from phasewatch.record.transition import Transition


@dataclass(frozen=True)
class MovedSample:
    """What a transition did to the loss of one sample.

    Attributes:
        index: Its place in the probe, from 0.
        before: Its loss at the last measurement before the transition.
        after: Its loss at the first measurement after it.
        label: Its class, or the first tokens of its sequence; None where the probe has no integer targets.
    """

    index: int
    before: float
    after: float
    label: int | tuple[int, ...] | None = None

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.after - self.before


@dataclass(frozen=True)
class MovedClass:
    """What a transition did to the mean loss of the samples of one class.

    Attributes:
        label: The class.
        samples: How many of its samples there are in the probe.
        change: Mean change of their losses.
        standard_error: That of the mean, from the scatter over the samples.
    """

    label: int
    samples: int
    change: float
    standard_error: float


@dataclass(frozen=True)
class Moved:
    """Which samples and classes a transition moved, those that changed most first.

    Attributes:
        before: Step of the measurement before.
        after: Step of the measurement after.
        samples: The samples, by the size of their change; those that did not change are left out.
        classes: The classes whose mean change is beyond its 95 % interval; none without classes.
    """

    before: int
    after: int
    samples: tuple[MovedSample, ...]
    classes: tuple[MovedClass, ...]


def moved(
    measurements: Sequence[Measurement], transition: Transition, labels: Mapping[str, Any] | None = None
) -> Moved | None:
    """Compare the losses of the samples before and after a transition; None where they were not recorded.

    Args:
        measurements: Those of the run, in order of their steps.
        transition: The transition.
        labels: As :func:`phasewatch.objective.labels.integer_targets` gives them.
    """
    known = [m for m in measurements if m.sample_losses]
    first = next((m for m in reversed(known) if m.step <= transition.start), None)
    last = next((m for m in known if m.step >= transition.end), None)
    if first is None or last is None or len(first.sample_losses) != len(last.sample_losses):
        return None
    before, after = np.array(first.sample_losses), np.array(last.sample_losses)
    change = after - before
    finite = np.isfinite(change)
    values = [] if labels is None else labels["values"][: len(change)]
    if len(values) != len(change):
        values = [None] * len(change)
    order = np.argsort(-np.abs(np.where(finite, change, 0.0)), kind="stable")
    samples = tuple(
        MovedSample(int(k), float(before[k]), float(after[k]), _label(values[k]))
        for k in order
        if finite[k] and change[k]
    )
    classes: list[MovedClass] = []
    if labels is not None and labels["kind"] == "class" and values[0] is not None:
        classes = _moved_classes(np.array(values)[finite], change[finite])
    return Moved(first.step, last.step, samples, tuple(classes))


def _label(value: Any) -> int | tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) else value


def _moved_classes(labels: np.ndarray, change: np.ndarray) -> list[MovedClass]:
    found = []
    for label in np.unique(labels):
        own = change[labels == label]
        if len(own) < 2:
            continue  # of one sample there is no scatter
        mean, error = float(own.mean()), float(own.std(ddof=1)) / math.sqrt(len(own))
        if abs(mean) > NORMAL_95 * error:
            found.append(MovedClass(int(label), len(own), mean, error))
    return sorted(found, key=lambda one: -abs(one.change))
