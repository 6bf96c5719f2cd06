"""Measurements as metrics of the trainer: for its loggers, and for callbacks that wait for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from phasewatch.analysis import Analysis
from phasewatch.callbacks.places import is_a
from phasewatch.callbacks.summaries import log_verdict, prefixed
from phasewatch.figures.numbers import format_step
from phasewatch.record import Flag, Measurement, Run, Transition
from phasewatch.record.signals import LOSS
from phasewatch.report import NAMES
from phasewatch.tags import STAGE, tagged
from phasewatch.watch import Watch

SINCE_TRANSITION = "steps_since_transition"
"""The metric that EarlyStopping can wait for: steps since the last transition ended, or since the run began."""


class TrainerMetrics:
    """Passes measurements on to every logger of the trainer and to ``callback_metrics``.

    Attributes:
        names: Of the metrics that it has put there.
    """

    def __init__(self, trainer: Any, name: str | None, say: Callable[[str], object]) -> None:
        """Nothing is put anywhere yet.

        Args:
            trainer: The trainer.
            name: Of the watch: its metrics are ``<name>/<signal>`` then.
            say: Given what a person is to know at once.
        """
        self._name = name
        self._in = partial(prefixed, name=name)
        self._transitions, self._since = self._in("transitions"), self._in(SINCE_TRANSITION)
        self.names = {self._transitions, self._since}
        self._trainer = trainer
        self._say = say
        self._told: dict[int, str] = {}
        self._standing: Sequence[Transition] = ()

    def on_measurement(self, measurement: Measurement) -> None:
        """Put its numbers where loggers and callbacks look."""
        self._log({**tagged(measurement), STAGE: float(len(self._standing))}, measurement.step)
        self._put(measurement)

    def on_resume(self, run: Run) -> None:
        """Go on from the transitions that stand, and the numbers measured last: callbacks wait for them from now on."""
        self._standing = run.transitions
        if run.measurements:
            self._put(run.measurements[-1])

    def on_transitions(self, step: int, flags: Sequence[Flag], standing: Sequence[Transition]) -> None:
        """Count them, and say what is new."""
        if not flags:
            return
        self._standing = standing
        self._log({STAGE: float(len(standing))}, step)
        self._trainer.callback_metrics[self._transitions] = torch.tensor(float(len(standing)))
        self._trainer.callback_metrics[self._since] = torch.tensor(_since_transition(step, standing))
        for flag in flags:
            news = self._news(flag)
            if news is not None:
                self._say(f"phasewatch: {news}, seen at {format_step(step)}")

    def _news(self, flag: Flag) -> str | None:
        """What a person wants to know at once: beginnings, ends and errors, but no better figures."""
        transition = flag.transition
        state = "withdrawn" if flag.action == "withdrawn" else "under way" if transition.under_way else "over"
        before = self._told.get(flag.number, None if flag.action == "flagged" else state)
        self._told[flag.number] = state
        if state == before:
            return None
        when, step = ("since", transition.start) if transition.under_way else ("at", transition.step)
        place = f"{when} step {format_step(step)}"
        if state == "withdrawn":
            return f"no transition ({transition.full_kind}) {place} after all"
        if state == "under way":
            return f"transition ({transition.full_kind}) under way {place}"
        ended = f" has ended by {format_step(transition.end)}" if before == "under way" else ""
        return f"transition ({transition.full_kind}) {place}{ended}"

    def on_end(self, analysis: Analysis) -> None:
        """Give every logger the verdict."""
        for logger in self._trainer.loggers:
            log_verdict(logger, analysis, self._name)

    def close(self) -> None:
        """Nothing is left open."""

    def _put(self, measurement: Measurement) -> None:
        metrics = _as_of(measurement, self._standing)
        own = {self._in(name): torch.tensor(value) for name, value in metrics.items()}
        self._trainer.callback_metrics.update(own)
        self.names.update(own)

    def _log(self, numbers: dict[str, float], step: int) -> None:
        for logger in self._trainer.loggers:
            if self._name is None or not is_a(logger, "TensorBoardLogger"):  # there it has a run of its own
                logger.log_metrics({self._in(name): number for name, number in numbers.items()}, step=step)
                logger.save()


def latest(watch: Watch | None) -> dict[str, float]:
    """The metrics as of the last measurement; none before the first."""
    measurements = () if watch is None else watch.run.measurements
    return {} if watch is None or not measurements else _as_of(measurements[-1], watch.transitions)


def _as_of(measurement: Measurement, standing: Sequence[Transition]) -> dict[str, float]:
    """The metrics at a measurement, given the transitions that stand."""
    return {
        **_metrics(measurement),
        "transitions": float(len(standing)),
        SINCE_TRANSITION: _since_transition(measurement.step, standing),
    }


def _since_transition(step: int, standing: Sequence[Transition]) -> float:
    """Steps since the last transition ended, or the run began; 0 while one is under way."""
    return max(0.0, step - max((step if one.under_way else one.end for one in standing), default=0.0))


def _metrics(measurement: Measurement) -> dict[str, float]:
    """The finite numbers, and whether each λ is reliable; not the loss, which may be a metric of the user's own."""
    found = {name: one.value for name, one in measurement.estimates.items() if math.isfinite(one.value)}
    marks = {f"{name}_reliable": float(measurement.estimates[name].reliable) for name in NAMES if name in found}
    return {name: value for name, value in {**found, **marks}.items() if name != LOSS}
