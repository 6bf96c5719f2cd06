"""What the schedule did to a run, or what befell it: no phase transitions, though the measured signals jump there.

They are read off what is observed at every step, the loss and the learning rate as training computed them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter

from phasewatch.record.signals import LOSS, TRAINING_LOSS
from phasewatch.record.transition import Transition
from phasewatch.transitions.series import NORMAL_MAD
from phasewatch.transitions.spikes import SMOOTHED_OVER, Spike, loss_spikes

EventKind = Literal[
    "learning-rate drop", "learning-rate rise", "end of a warm-up", "resumed", "bad batch", "loss spike", "divergence"
]

LEARNING_RATE = "learning_rate"
OF_RATES: tuple[EventKind, ...] = ("learning-rate drop", "learning-rate rise", "end of a warm-up")

ABRUPT = 1.5
"""Factor by which the learning rate changes from one step to the next where that is an event of its own; schedules that
decay by the step or by the epoch (cosine, exponential) change it by less. Chosen."""
GRADUAL = 3.0
"""After a smaller change, one that is at most so many times as large goes on with it, as where a cosine ends.
Chosen."""
WARM_UP, NO_CHANGE = 3, 1e-6
"""So many times, from the first on, the learning rate rises in a warm-up at least; by less than a relative change of
the second it stays. Chosen."""
AROUND = 100
"""Observations on each side that a loss is held against, and of which the loss before and after an event is told.
Chosen."""
OUTLYING, BEYOND_THE_NEXT = 10.0, 5.0
"""A bad batch has a loss so many standard deviations above the median around it, and so many times as far above it as
any other there. Of noise with tails as heavy as Student's t with three degrees of freedom, one step in 10,000 has."""
LONGEST_SPIKE = 2
"""Steps after which the loss is back, or it is no bad batch. Chosen."""
DIVERGED = 2.0
"""A run has diverged where the loss ends at so many times what it was at the start of the run, or is no number.
Chosen."""
LOST = 0.9
"""It has diverged as well where so much is lost again of a fall by ``DIVERGED``: a network whose units have all died
ends at the loss of chance, where it began. Chosen."""
MEMORY = 30
"""Steps by which the loss at every step may lag behind what made it change: three times the ten that a momentum of 0.9
remembers. Chosen."""

Array = NDArray[np.float64]
Course = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class Event:
    """Something that was done to a run or befell it.

    Attributes:
        kind: what it was.
        step: the first step that it concerns.
        description: the same with its figures, in words.
        until: the first step that it does not concern any more, where the loss shows that.
    """

    kind: EventKind
    step: float
    description: str
    until: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values that JSON can hold."""
        return {"kind": self.kind, "step": self.step, "description": self.description, "until": self.until}


def find_events(observed: Mapping[str, Course], resumed: Sequence[float] = ()) -> list[Event]:
    """Read off what is observed at every step what was done to the run and what befell it, in order of steps.

    Args:
        observed: name to steps (increasing) and values, as :attr:`phasewatch.record.Run.observed` has them. Of these
            ``"loss"`` and ``"learning_rate"`` are looked at, and those of further optimizers (``"learning_rate_1"``).
        resumed: steps at which the run was taken up again.
    """
    loss = observed.get(LOSS)
    found = [Event("resumed", float(step), f"resumed at step {step:,.0f}") for step in resumed]
    rates: dict[tuple[EventKind, float], str] = {}
    for name, course in observed.items():
        if name.startswith(LEARNING_RATE):
            for kind, step, words in _of_learning_rate(*_floats(course)):
                rates.setdefault((kind, step), words)  # those of several optimizers change together
    found += [Event(kind, step, words + _told_loss(loss, step)) for (kind, step), words in rates.items()]
    if loss is not None:
        steps, values = _floats(loss)
        diverged = _divergence(steps, values)
        found += [] if diverged is None else [diverged]
        healthy = len(steps) if diverged is None else int(np.searchsorted(steps, diverged.step))
        steps, values = steps[:healthy], values[:healthy]
        rises = [event.step for event in found if event.kind == "learning-rate rise"]
        bad = _bad_batches(steps, values)
        for spike in loss_spikes(steps, values):
            made_by = [one for one in bad if _may_have_made(spike, one.step)]
            if made_by:  # what it takes the network to recover from it
                bad = [replace(one, until=spike.ends) if one in made_by else one for one in bad]
            elif not any(_may_have_made(spike, step) for step in rises):
                found.append(_of_spike(spike))
        found += bad
    return sorted(found, key=lambda event: event.step)


def without_passing(observed: Course, events: Sequence[Event]) -> Course:
    """What was observed where no event was passing: the loss of a spike is no stage of a run."""
    steps, values = (np.asarray(part) for part in observed)
    away = np.zeros(len(steps), dtype=bool)
    for event in events:
        if event.until is not None:
            away |= (steps >= event.step) & (steps < event.until)
    return steps[~away], values[~away]


def named_by_events(transitions: Sequence[Transition], events: Sequence[Event]) -> list[Transition]:
    """The transitions, those within which an event lies named after it.

    An event that comes when more than half of a change has happened, as the transition's interval has it, did not make
    it. The loss at every step places a change so exactly that what made it may come before its beginning, by as much as
    the change and the doubt of its place are wide, and after a change of the learning rate as an optimizer remembers.
    After a divergence there is no network left that could go through one. A loss spike names what lies within it: what
    was measured before and after it may have changed for a reason of its own.
    """
    named = []
    diverged = min((event.step for event in events if event.kind == "divergence"), default=math.inf)
    for transition in transitions:
        low, high = transition.interval
        latest, lag, settling = max(transition.step, high), 0.0, 0.0
        if TRAINING_LOSS in transition.seen_by:
            lag = transition.end - transition.start + high - low
            settling = max(lag, MEMORY)
        causes = [
            event
            for event in events
            if event.kind != "loss spike"
            and transition.start - (settling if event.kind in OF_RATES else lag) <= event.step <= latest
            or _is_within(transition, event)
        ]
        kind = causes[0].kind if causes else "divergence" if transition.start >= diverged else None
        named.append(transition if kind is None else replace(transition, kind=kind, resolutions=()))
    return named


def _floats(course: Course) -> tuple[Array, Array]:
    steps, values = course
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def _of_learning_rate(steps: Array, rates: Array) -> list[tuple[EventKind, float, str]]:
    known = np.isfinite(rates) & (rates > 0)
    steps, rates = steps[known], rates[known]
    if len(rates) < 2:
        return []
    found: list[tuple[EventKind, float, str]] = []
    ratios = np.diff(np.log(rates))
    changes = np.flatnonzero(np.abs(ratios) > NO_CHANGE)
    falls = np.flatnonzero(ratios[changes] < 0)
    rises = int(falls[0]) if len(falls) else len(changes)
    if rises < WARM_UP:
        rises = 0
    elif (top := changes[rises - 1] + 1) < len(rates) - 1:
        words = f"the learning rate has risen to {rates[top]:.3g} by step {steps[top]:,.0f}"
        found.append(("end of a warm-up", float(steps[top]), words))
    before = 0.0  # the size of the change before, where that was gradual
    for k in changes[rises:]:
        size = abs(float(ratios[k]))
        if size < math.log(ABRUPT) or size <= GRADUAL * before:
            before = size
            continue
        kind: EventKind = "learning-rate drop" if ratios[k] < 0 else "learning-rate rise"
        words = f"the learning rate goes from {rates[k]:.3g} to {rates[k + 1]:.3g} at step {steps[k + 1]:,.0f}"
        found.append((kind, float(steps[k + 1]), words))
        before = 0.0
    return found


def _told_loss(loss: Course | None, step: float) -> str:
    """The loss before and after, where it was observed on both sides."""
    if loss is None:
        return ""
    steps, values = _floats(loss)
    at = int(np.searchsorted(steps, step))
    sides = [
        side[np.isfinite(side)] for side in (values[max(at - AROUND, 0) : at], values[at:][AROUND // 2 :][:AROUND])
    ]
    if not all(len(side) for side in sides):
        return ""
    before, after = (float(np.median(side)) for side in sides)
    return f"; loss {before:.3g} -> {after:.3g}"


def _bad_batches(steps: Array, losses: Array) -> list[Event]:
    """One or two steps whose loss stands out from all around them, and is back after them."""
    known = np.isfinite(losses)
    spoiled = [
        Event("bad batch", float(steps[k]), f"a loss of {losses[k]:g} at step {steps[k]:,.0f}, back at the next ones")
        for k in _lone(~known)
    ]
    steps, losses = steps[known], losses[known]
    if len(losses) < AROUND:
        return spoiled
    above = losses - median_filter(losses, size=2 * AROUND + 1, mode="nearest")
    scale = NORMAL_MAD * median_filter(np.abs(above), size=2 * AROUND + 1, mode="nearest")
    outlying = above > OUTLYING * np.maximum(scale, np.finfo(float).tiny)
    found = []
    for k in np.flatnonzero(outlying).tolist():
        beside = np.r_[above[max(k - AROUND, 0) : max(k - LONGEST_SPIKE + 1, 0)], above[k + LONGEST_SPIKE : k + AROUND]]
        near = above[max(k - LONGEST_SPIKE, 0) : k + LONGEST_SPIKE + 1]
        if above[k] == near.max() and len(beside) and above[k] > BEYOND_THE_NEXT * np.abs(beside).max():
            usual = losses[k] - above[k]
            words = f"a loss of {losses[k]:.3g} at step {steps[k]:,.0f} among {usual:.3g}"
            # The batch has the first of the losses that stand out; the next are those of the network after it.
            begins = k
            while begins > max(k - LONGEST_SPIKE, 0) and outlying[begins - 1]:
                begins -= 1
            found.append(Event("bad batch", float(steps[begins]), words))
    return sorted(spoiled + found, key=lambda event: event.step)


def _is_within(transition: Transition, spike: Event) -> bool:
    return spike.kind == "loss spike" and spike.step <= transition.start and transition.end <= (spike.until or 0.0)


def _may_have_made(spike: Spike, step: float) -> bool:
    """Whether what befell the run at a step comes before the loss has left, as exactly as that is known."""
    return spike.begins - MEMORY <= step <= spike.begins + SMOOTHED_OVER // 2


def _of_spike(spike: Spike) -> Event:
    words = f"the loss leaves {spike.before:.3g} for {spike.top:.3g}, and is back at step {spike.ends:,.0f}"
    return Event("loss spike", spike.begins, words, until=spike.ends)


def _lone(flags: NDArray[np.bool_]) -> list[int]:
    """Beginnings of the stretches of true that are short and end within the run."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False]))
    return [int(a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a <= LONGEST_SPIKE and b < len(flags)]


def _divergence(steps: Array, losses: Array) -> Event | None:
    """Where the loss leaves for good: it ends as no number, or above where it began or nearly there."""
    if not len(losses):
        return None
    finite = np.isfinite(losses)
    if not finite[-1]:
        first = len(losses) - int(np.argmax(finite[::-1])) if finite.any() else 0
        return Event(
            "divergence", float(steps[first]), f"the loss is {losses[first]:g} from step {steps[first]:,.0f} on"
        )
    steps, losses = steps[finite], losses[finite]
    few = max(min(AROUND, len(losses) // 10), 1)
    course = median_filter(losses, size=2 * few + 1, mode="nearest")
    began, ended, least = float(course[0]), float(course[-1]), float(course.min())
    # A loss may be negative: what it has to exceed is told by how far it had fallen, too.
    level = max(DIVERGED * began, began + (DIVERGED - 1) * (began - least))
    scatter = NORMAL_MAD * float(np.median(np.abs(losses - course)))
    if began > DIVERGED * least and began - least > OUTLYING * scatter:
        level = least + LOST * (began - least)
    if len(losses) < AROUND or not ended > level:
        return None
    first = int(np.flatnonzero(course <= least + OUTLYING * scatter)[-1]) + 1
    first = min(first, len(steps) - 1)
    words = f"the loss leaves {course[first - 1]:.3g} for {ended:.3g} from step {steps[first]:,.0f} on"
    return Event("divergence", float(steps[first]), words)
