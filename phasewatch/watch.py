"""The engine: schedule, isolate, measure, record, detect. Knows no training framework."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ruptures.base import BaseEstimator
from torch import Tensor, nn
from torch.optim import Optimizer

from phasewatch import price
from phasewatch.activity import Activity
from phasewatch.analysis import NOT_BORNE_OUT, Analysis, analyze_run
from phasewatch.estimators import (
    BehavioralCoefficient,
    Estimator,
    HessianSpectrum,
    LearningCoefficient,
    SymmetryLedger,
)
from phasewatch.failing import Failing, OnError
from phasewatch.header import header_of, main_of
from phasewatch.interruption import Interrupted, held_back
from phasewatch.listener import Listener
from phasewatch.measure import Failure, Probe, measure, together
from phasewatch.measuring_time import measuring, seconds_measuring, training_clock
from phasewatch.monitor import Monitor
from phasewatch.objective import LossFn, OutputsFn
from phasewatch.objective.copies import KeptState
from phasewatch.observer import Observer
from phasewatch.outlay import Outlay
from phasewatch.printable import printable
from phasewatch.record import Ending, Estimate, Flag, Journal, Measurement, Run, Transition
from phasewatch.record.lines import Kind
from phasewatch.record.reading import assemble, standing_lines
from phasewatch.record.signals import detected, is_described, searched
from phasewatch.record.state import IN_CHECKPOINTS, STANDING, usable
from phasewatch.record.trace import unpack
from phasewatch.resuming import taken_up
from phasewatch.schedule import FREE_SECONDS, PROMPT, Clock, ScheduleLike, Spread, as_schedule
from phasewatch.settings import check_types
from phasewatch.transitions import LiveDetector
from phasewatch.transitions.kinds import read_beside

CHECKED_AT_THE_START = 2
"""Batches of a probe that are looked at before training, the second for what a module keeps from the first; the others
are in every measurement. Chosen."""
TIMED_STEPS = 10
"""Training steps after which it is known how long the run takes, and with it what it can pay for. Chosen."""
DEFAULT_ESTIMATORS: tuple[Estimator, ...] = (
    BehavioralCoefficient(),
    LearningCoefficient(),
    HessianSpectrum(),
    SymmetryLedger(),
)

NOTHING_LEFT_OUT: dict[str, Any] = {"left_out": [], "chains_in_each": 1}
# Seconds: what takes longer shows in a progress bar what it is at. Chosen.
SHOWN_FROM = 2.0


@dataclass(frozen=True)
class Start:
    """The first state, kept until it can be measured.

    Attributes:
        step: Its step.
        state: The module as it was.
        monitors: What is to be measured of it.
    """

    step: int
    state: KeptState
    monitors: Sequence[Monitor]


class Watch:
    """Watches the geometry of the loss during a training run.

    Call :meth:`at` once a step, before the batch is trained on; it measures when a measurement is due. The module, its
    modes, the optimizer and all random streams are left as they were.

    Under ``schedule="auto"`` the time spent measuring, first and last measurement included, is at most ``max_overhead``
    times the training time or ``free_seconds`` in all, whichever is more. What a measurement takes is predicted before
    the first one, and told in a line after ten steps, when it is known what share of the run that is. A first
    measurement of more than five seconds is put off: the state is kept, and measured once the budget pays for it and
    for the end; where it pays for one only, that is the end. What would leave the run fewer than eight measurements (or
    if it has to be, three) is left out of all: first the zeros by cause, then the spectrum, then λ of the loss, then λ
    of the function on other data. Where the chains of λ of the function are too dear for eight, they are drawn in each
    second or third measurement; where three of eight with them are not paid, at the coarse resolution alone; and where
    not even that is, in none: the effective ranks and the losses remain, and what else is as cheap.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> batch = (torch.randn(32, 3), torch.randn(32, 1))
        >>> def loss_fn(module, batch):
        ...     return 0.5 * (module(batch[0]) - batch[1]).square().mean()
        >>> with Watch(module, [batch], loss_fn=loss_fn, schedule=10) as watch:
        ...     for step in range(21):
        ...         _ = watch.at(step)
        ...         optimizer.zero_grad()
        ...         loss_fn(module, batch).backward()
        ...         _ = optimizer.step()
        >>> watch.run.series("llc").steps.tolist()
        [0, 10, 20]

    Attributes:
        monitors: What is measured, on which data and when.
        clock: Where the time went.
        observer: What :meth:`observe` was told.
        activity: Whether something is under way, by what :meth:`observe` was told.
        on_transition: Called with every flag of the detector (see :class:`phasewatch.transitions.Flag`).
        analysis: The transitions of the whole run, once it is over; what was flagged and is none of them is withdrawn.
    """

    def __init__(
        self,
        module: nn.Module,
        probe: Iterable[Any],
        *,
        loss_fn: LossFn,
        outputs_fn: OutputsFn | None = None,
        n: int | None = None,
        directory: str | os.PathLike[str] | None = None,
        total_steps: int | None = None,
        schedule: ScheduleLike = "auto",
        max_overhead: float | None = 0.1,
        free_seconds: float = FREE_SECONDS,
        estimators: Sequence[Estimator] = DEFAULT_ESTIMATORS,
        held_out: Iterable[Any] | None = None,
        other_data: Mapping[str, Iterable[Any]] | None = None,
        batch_sizes: Sequence[int] | None = None,
        mode: Literal["eval", "train"] = "eval",
        threads: int | None = 1,
        alpha: float = 0.05,
        search: BaseEstimator | None = None,
        seed: int = 0,
        on_error: OnError = "warn",
        listeners: Sequence[Listener] = (),
        on_transition: Callable[[Flag], object] | None = None,
        say: Callable[[str], object] | None = None,
    ) -> None:
        """Check everything that can be checked in seconds before the first step, and begin the record.

        Args:
            module: The network being trained.
            probe: Batches to measure on, a fixed sample of the training data.
            loss_fn: ``loss_fn(module, batch) -> scalar mean loss`` of the batch.
            outputs_fn: ``outputs_fn(module, batch)``: the network's outputs, where they cannot be seen in the calls of
                modules that ``loss_fn`` makes. The loss is ``loss_fn(outputs, batch)`` then.
            n: Size of the training set; default the samples in the probe.
            directory: Where the record is written, into a file of its own; default in memory only.
            total_steps: Steps that the run will make, if known; the default schedule spreads over them.
            schedule: ``"auto"``, ``"log"``, a number of steps, a list of steps, or a schedule.
            max_overhead: With ``"auto"``: time for measuring as a share of the time for training; None for no limit.
            free_seconds: With ``"auto"``: time for measuring that is free in any run, where the share is less.
            estimators: What to measure, beside the loss on the probe.
            held_out: Batches of the same kind that the network is not trained on: λ of the function is measured on
                them, with all that comes of its draws (``effective_rank``, ``llc_outputs``, ``misfit_change``,
                ``description_length``); default the probe.
            other_data: Name to batches of further data, on which the learning coefficient is measured too.
            batch_sizes: Samples in each batch of the probe; default what can be read off it.
            mode: Whether dropout and BatchNorm behave as in evaluation or as in training.
            threads: Threads of the CPU that measure, see :class:`phasewatch.measure.Probe`.
            alpha: Wanted rate of false alarms in a run without transitions.
            search: A search of ``ruptures`` that says where transitions may lie; default our exact one. See
                :func:`phasewatch.detect_transitions`.
            seed: Seeds every measurement, together with its step.
            on_error: What an estimator that fails does: warn once and go on (it is switched off after eight failures in
                a row), raise, or go on without it.
            listeners: Told of every measurement and transition.
            on_transition: Called with a :class:`phasewatch.transitions.Flag` whenever a transition is flagged, revised
                or withdrawn. What it raises is treated like a failing measurement.
            say: Given the line that tells what a measurement takes; default it goes to the standard error.

        Raises:
            TypeError: If a setting is of a type that cannot be used.
            ValueError: If the probe is empty, the loss cannot be used (see :class:`phasewatch.Objective`), or a
                setting is out of its range.
            RecordError: If the directory cannot be written.
        """
        check_types(
            loss_fn=loss_fn,
            outputs_fn=outputs_fn,
            n=n,
            directory=directory,
            total_steps=total_steps,
            max_overhead=max_overhead,
            free_seconds=free_seconds,
            threads=threads,
            seed=seed,
            listeners=listeners,
            on_transition=on_transition,
            say=say,
        )
        main = Probe(list(probe), loss_fn, n, mode, batch_sizes=batch_sizes, outputs_fn=outputs_fn, threads=threads)
        monitor = Monitor(tuple(estimators), main, as_schedule(schedule, max_overhead, free_seconds))
        others = [monitor.on_other_data(name, batches) for name, batches in (other_data or {}).items()]
        on_probe = [monitor] if held_out is None else monitor.on_held_out(list(held_out))
        self._begin(
            module,
            [*on_probe, *others],
            directory=directory,
            total_steps=total_steps,
            detector=LiveDetector(alpha, search),
            seed=seed,
            on_error=on_error,
            listeners=listeners,
            say=say,
        )
        self.on_transition: Callable[[Flag], object] | None = on_transition
        self.progress: Callable[[str | None], object] = lambda part: None

    @classmethod
    def from_monitors(
        cls,
        module: nn.Module,
        monitors: Sequence[Monitor],
        *,
        directory: str | os.PathLike[str] | None = None,
        total_steps: int | None = None,
        detector: LiveDetector | None = None,
        seed: int = 0,
        on_error: OnError = "warn",
        listeners: Sequence[Listener] = (),
        on_transition: Callable[[Flag], object] | None = None,
        say: Callable[[str], object] | None = None,
        progress: Callable[[str | None], object] = lambda part: None,
    ) -> Watch:
        """A watch that measures several things, each on its own data and schedule, into one record.

        Args:
            module: The network being trained.
            monitors: What to measure.
            directory: Where the record is written, into a file of its own; default in memory only.
            total_steps: Steps that the run will make, if known.
            detector: Flags transitions; None flags none.
            seed: Seeds every measurement, together with its step.
            on_error: What an estimator that fails does.
            listeners: Told of every measurement and transition.
            on_transition: Called with every flag of the detector.
            say: Given the line that tells what a measurement takes; default it goes to the standard error.
            progress: During measurements of more than two seconds given the name of what is measured, and None when
                they are over.
        """
        watch = cls.__new__(cls)
        watch._begin(
            module,
            list(monitors),
            directory=directory,
            total_steps=total_steps,
            detector=detector,
            seed=seed,
            on_error=on_error,
            listeners=listeners,
            say=say,
        )
        watch.on_transition = on_transition
        watch.progress = progress
        return watch

    def _begin(
        self,
        module: nn.Module,
        monitors: list[Monitor],
        *,
        directory: str | os.PathLike[str] | None,
        total_steps: int | None,
        detector: LiveDetector | None,
        seed: int,
        on_error: OnError,
        listeners: Sequence[Listener],
        say: Callable[[str], object] | None,
    ) -> None:
        self.module = module
        self.monitors = monitors
        self.detector = detector
        self.seed = seed
        names = {estimator.name for monitor in monitors for estimator in monitor.estimators}
        self._failing = Failing(on_error, names)
        self.listeners = list(listeners)
        self.clock = Clock(total_steps=total_steps)
        self.say = _to_standard_error if say is None else say
        self.activity = Activity(self.clock.scale)
        self.observer = Observer(self.activity)
        self._journal = Journal(directory)
        objectives = [monitor.probe.first(CHECKED_AT_THE_START).objective(module, seed) for monitor in monitors]
        self._header = header_of(
            module,
            monitors,
            objectives,
            seed=seed,
            total_steps=total_steps,
            alpha=detector.alpha if detector else None,
        )
        self._last_asked = -1
        self._requested = False
        self._idle_until = 0.0  # before this step there is nothing to do
        self._recording = False
        self._last_seen: tuple[int, float] | None = None
        self._last_taken = -1
        self._start: Start | None = None
        self._plan_at: int | None = None
        self._undescribed: set[str] = set()
        self._closed = False
        self.analysis: Analysis | None = None
        self._outlay = Outlay(monitors, self.clock)
        with self._guarded("price", 0):
            self._outlay.predict(objectives)

    @property
    def main(self) -> Monitor | None:
        """The monitor whose samples are those of the run: the first that measures on the main probe."""
        return main_of(self.monitors)

    @property
    def header(self) -> dict[str, Any]:
        """What its record says of it in the first line: the network, the data, the settings."""
        return dict(self._header)

    @property
    def next_visit(self) -> int | None:
        """The first step at which :meth:`at` may do something."""
        if self._requested:
            return self._last_asked
        visits = (self._plan_at, *(monitor.next_visit for monitor in self.monitors))
        return min((visit for visit in visits if visit is not None), default=None)

    @property
    def prices(self) -> dict[str, float]:
        """Seconds that each part of a measurement takes, as is known by now; what is left out is not among them."""
        return self._outlay.prices

    @property
    def last_taken(self) -> int:
        """The last step whose state was measured, or is kept to be measured; -1 before the first."""
        return self._last_taken

    @property
    def transitions(self) -> list[Transition]:
        """Transitions flagged so far, as they are seen now."""
        return [] if self.detector is None else self.detector.transitions

    @property
    def directory(self) -> Path | None:
        """Where the record is."""
        return self._journal.directory

    @property
    def run(self) -> Run:
        """What was recorded so far."""
        return assemble(self._journal.lines, path=self._journal.path)

    def at(self, step: int) -> Measurement | None:
        """Measure if a measurement is due.

        Args:
            step: Optimizer steps made so far.

        Returns:
            The measurement, which may be that of the first state if it was kept; None if none was due.

        Raises:
            TypeError: If the first step, or one at which something is due, is no whole number.
        """
        if self._last_asked < 0:
            check_types(step=step)
        if step < self._idle_until:  # at nearly every step: it must cost next to nothing
            self._last_asked = step
            return None
        check_types(step=step)
        if self._last_asked < 0:
            with self._guarded("record", step):
                self._record_header()  # a run that is killed in its first measurement has a record
            self._begin_to_count(step)
        self._last_asked = step
        due = self.next_visit
        measurement = self._at(step) if due is not None and step >= due else None
        due = self.next_visit
        self._idle_until = math.inf if due is None else due
        return measurement

    def _at(self, step: int) -> Measurement | None:
        """Do what is due at a step to stop by at."""
        self._advance_clock(step)
        self._look_for_activity()
        visited = [m for m in self.monitors if m.next_visit is not None and step >= m.next_visit]
        measurement = self._as_requested(step) if self._requested else self._visit(step, visited)
        for monitor in visited:
            monitor.go_on(step, self.clock)
        return measurement

    def _as_requested(self, step: int, at_the_end: bool = False) -> Measurement | None:
        self._requested = False
        return self._measure_all(step, at_the_end) if step > self._last_taken else None

    def _visit(self, step: int, visited: Sequence[Monitor]) -> Measurement | None:
        """Measure what the schedules of these monitors measure at a step that they stop by at."""
        measurement = None
        if self._plan_at is not None and step >= self._plan_at:
            self._plan()
            kept = [] if self._start is None else self._start.monitors
            if kept and all(m.pays(self.clock.due_seconds, self.clock) for m in kept):
                measurement = self._measure_start()
            for monitor in self.monitors:
                if isinstance(monitor.schedule, Spread) and monitor not in visited:
                    monitor.go_on(step, self.clock)
        if self._outlay.has_less:
            self._plan_again()
        measured = [m for m in visited if m.is_due(step, self.clock)]
        if self._last_taken < 0 and any(m not in measured and m.schedule.keeps_the_start for m in visited):
            self._keep(step, visited)
            measured = []
        elif measured and self._start is not None:
            measurement = self._measure_start()
            measured = [m for m in measured if m.is_due(step, self.clock)]
        if measured:
            measurement = self._measure(step, measured)
        return measurement

    def observe(self, step: int, optimizer: Optimizer | None = None, /, **values: Tensor | float | None) -> None:
        """Take what training has computed anyway; it is recorded in blocks, and read back as ``run.observed``.

        Tensors may lie on any device and are not waited for. What cannot be taken is told once and recorded, and
        training goes on.

        Args:
            step: Optimizer steps made before, as for :meth:`at`.
            optimizer: Is about to make the step with the gradients that are there: its learning rates are observed, and
                every so many steps, as time allows, the norms of gradient, weights and update and what the noise scale
                of the gradient is made of (:func:`phasewatch.record.noise_scale`). To be given at every step.
            values: Name to number, or tensor with one element, as ``loss=loss``; None is no value.
        """
        if self._closed or self.observer.leaves_out(step, values):
            return
        if not self.observer.take(step, values, optimizer, seconds_measuring()):
            return
        for what, error in self.observer.errors():
            self._note(Failure(what, error), step)
        if self.observer.is_due:
            self._record_observed(step)

    def _look_for_activity(self) -> None:
        """Let the schedules know whether something is under way."""
        with self._guarded("activity", max(self._last_asked, 0)):
            self.observer.look()
        self.clock.last_active = self.activity.last

    def _record_observed(self, step: int) -> None:
        with self._guarded("record", step):
            self._record()

    def _begin_to_count(self, step: int) -> None:
        """At the first step asked of: see when to plan, or say at once what a measurement takes where nothing does."""
        if self._outlay.planned_for is not None:
            return
        seconds, total = self.clock.measurement_seconds, self.clock.total_steps
        if self._outlay.budget is not None:
            self._plan_at = step + (TIMED_STEPS if total is None else max(1, min(TIMED_STEPS, total - step)))
        elif seconds > PROMPT:
            self._outlay.planned_for = []
            self.say(
                f"phasewatch: a measurement takes about {price.spoken(seconds)}, and the schedule does not limit the "
                "time for that; schedule='auto' keeps to a share of the training time, max_overhead."
            )

    def _plan(self) -> None:
        """Leave out what is too dear for the run, and say what a measurement takes."""
        self._plan_at = None
        plan = self._outlay.plan()
        if plan is None:
            return
        self._record_what_is_left_out()
        if plan.is_beyond_the_run:
            warnings.warn(f"phasewatch: {plan.with_what_mends_it()}", stacklevel=3)
        else:
            self.say(f"phasewatch: {plan.told(None if self._start is None else self._start.step)}")

    def _plan_again(self) -> None:
        if news := self._outlay.plan_again():
            self._record_what_is_left_out()
            self.say(f"phasewatch: {news}")

    def _record_what_is_left_out(self) -> None:
        settled = self._outlay.settled
        changed = any(self._header.get(what, before) != settled[what] for what, before in NOTHING_LEFT_OUT.items())
        self._header |= settled
        if changed and self._recording:
            with self._guarded("record", max(self._last_asked, 0)):
                self._record(("plan", settled))

    def _keep(self, step: int, monitors: Sequence[Monitor]) -> None:
        """Keep the state of the first step, to be measured later under that step and before all others."""
        self._last_taken = step
        for monitor in monitors:
            monitor.last_taken = step
        with self._guarded("start", step):
            self._start = Start(step, KeptState(self.module), list(monitors))

    def _measure_start(self) -> Measurement | None:
        """Measure the state that was kept, if one was."""
        if self._start is None:
            return None
        self._plan()
        start, self._start = self._start, None
        module = None
        with self._guarded("start", start.step):
            module = start.state.module()
        return None if module is None else self._measure(start.step, start.monitors, module)

    def request(self) -> None:
        """Ask for a measurement at the next step, or at the end, whatever schedule and budget say.

        Its time counts: what the schedule measures later has so much less left. May be called from ``on_transition``.
        """
        self._requested, self._idle_until = True, 0.0

    def measure(self, step: int) -> Measurement | None:
        """Measure now with every monitor, whatever the schedule says; before that the first state, if it was kept.

        At a step that is due it takes the place of the schedule's own.

        Returns:
            The measurement; None if every estimator failed.

        Raises:
            TypeError: If ``step`` is no whole number.
        """
        check_types(step=step)
        return self._measure_all(step)

    def _measure_all(self, step: int, at_the_end: bool = False) -> Measurement | None:
        """Measure with every monitor; at the end with the chains that were kept back for it, where they are paid."""
        self._advance_clock(step)
        self._measure_start()
        is_whole = at_the_end and all(m.schedule.left(self.clock) >= self.clock.end_seconds for m in self.monitors)
        measurement = self._measure(step, self.monitors, left_out_at_the_end=() if is_whole else None)
        for monitor in self.monitors:  # takes the place of what is due at this step
            if monitor.next_visit is not None and monitor.next_visit <= step:
                monitor.go_on(step, self.clock)
        return measurement

    def close(self, step: int | None = None, error: BaseException | None = None) -> None:
        """Measure the end of the run if the schedule wants it and the budget pays for it, and finish the record.

        Args:
            step: Optimizer steps made in the whole run; default no last measurement, nor one of the first state if it
                was kept.
            error: What ended the run, where it has not come to its end; the record tells it.
        """
        if self._closed:
            return
        if step is not None:
            self._advance_clock(step)
            try:
                if self._requested:
                    self._as_requested(step, at_the_end=True)
                self._measure_the_end(step)
            except BaseException as stopped:
                self._finish(step, stopped)
                raise
        self._finish(step or 0, error)

    def _finish(self, step: int, error: BaseException | None) -> None:
        with held_back():
            self._finish_record(step, error)

    def _finish_record(self, step: int, error: BaseException | None) -> None:
        self._record_observed(step)
        self._closed, self._start = True, None
        analysis = None
        with self._guarded("analysis", step):
            analysis = self._analysis()
            self._withdraw(analysis.not_borne_out)
        if self._recording:
            with self._guarded("record", step):
                self._journal.append("end", {"time": time.time(), **Ending.by(error).to_dict()})
        if analysis is not None:
            self.analysis = analysis = replace(analysis, run=self.run)
        for listener in self.listeners:
            with self._guarded(type(listener).__name__, step):
                if analysis is not None:
                    listener.on_end(analysis)
                listener.close()
        self._journal.close()

    def _analysis(self) -> Analysis:
        """The whole run, searched as it was while it went on."""
        if self.detector is None:
            return analyze_run(self.run)
        return analyze_run(self.run, self.detector.alpha, search=self.detector.search)

    def _withdraw(self, refuted: Sequence[Flag]) -> None:
        if self.detector is not None and (flags := self.detector.withdraw(refuted, self._last_taken, NOT_BORNE_OUT)):
            self._say_flags(self._last_taken, flags)

    def _measure_the_end(self, step: int) -> None:
        """Measure what the budget has left for: the end, of it what is not too dear, and before it the kept start."""
        self._plan()
        last = [m for m in self.monitors if m.schedule.measures_the_end or m.next_visit == step]
        last = last if step > self._last_taken else []
        due = [*last, *(self._start.monitors if self._start else [])]
        left = min((m.schedule.left(self.clock) for m in due), default=math.inf)
        clock, start = self.clock, self._start
        if start is not None and left >= clock.due_seconds + (clock.last_seconds if last else 0.0):
            self._measure_start()
            left, start = min(m.schedule.left(clock) for m in due), None
        parts = self._outlay.what_fits(left)
        unpaid = [f"the state of step {start.step}"] if start is not None else []
        unpaid += ["the end"] if last and parts is None else []
        if unpaid:
            takes = f"it takes about {price.spoken(clock.measurement_seconds)}"
            if last and parts is not None:
                takes = f"it and the end take about {price.spoken(clock.due_seconds + clock.last_seconds)}"
            self.say(
                f"phasewatch: {' and '.join(unpaid)} cannot be measured: {price.spoken(max(left, 0.0))} are left for "
                f"measuring, and {takes}."
            )
        if parts is None:
            last = [m for m in last if m.schedule.left(clock) == math.inf]
        elif last and (missing := [part for part in parts if part not in self._outlay.left_out]):
            self.say(f"phasewatch: the end is measured without {price.in_words(missing)}, which is not paid any more.")
        if last:
            self._measure(step, last, left_out_at_the_end=parts or ())
        for monitor in last:
            monitor.go_on(step, self.clock)

    def __enter__(self) -> Watch:
        """The watch itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the record; where all went well, measure the end: one step beyond the last that ``at`` was asked of."""
        went_on = error is None and (self._start is not None or self._last_asked > self._last_taken)
        self.close(self._last_asked + 1 if went_on else None, error)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue in another process: plain Python values only.

        What was measured is in the record, and stands here by its place there; only what is in memory alone, because
        there is no directory or it cannot be written, is here itself, without what was observed at every step.
        """
        if self._last_seen is not None:  # else what was trained since the last visit would not pay for anything
            self._advance_clock(max(self._last_asked, self._last_seen[0]))
        self._look_for_activity()
        self._record_observed(max(self._last_taken, 0))
        position = self._journal.position
        return {
            "run_id": self._journal.run_id,
            "record": position.to_dict() if position else None,
            "lines": [[line.kind, line.body] for line in self._journal.unwritten if line.kind in IN_CHECKPOINTS],
            "detector": self.detector.state_dict() if self.detector else None,
            "next_visits": [m.next_visit for m in self.monitors],
            "schedules": [repr(m.schedule) for m in self.monitors],
            "taken": [[m.taken, m.last_taken] for m in self.monitors],
            "activity": self.activity.state_dict(),
            "last_taken": self._last_taken,
            "start": None if self._start is None else self._start.step,
            **self._outlay.state_dict(),
            "clock": {
                "steps": self.clock.steps,
                "training_seconds": self.clock.training_seconds,
                "measuring_seconds": self.clock.measuring_seconds,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], places: Iterable[str | os.PathLike[str]] = ()) -> None:
        """Continue a run from what :meth:`state_dict` returned; to be called before the first step.

        The schedule is the one that this watch was made with, be it another one.

        In the directory of the run that was cut off its record goes on, with a line that says from where on it was
        resumed. Elsewhere a new record begins, under an id of its own, with all that was measured before; its header
        says which run it continues. The record is looked for in the directory of this watch, in ``places``, and where
        it was. If it is lost, or a part of it, a warning and the new record say so, and the watch goes on without. So
        they do of a first state that was kept and not measured by then: it is not in the state.

        Args:
            state: The state.
            places: Further directories in which the record may lie, for example beside the checkpoint.

        Raises:
            ValueError: If :meth:`at` was asked already. What a state lacks, or holds in a form that is not expected, is
                told in a warning; the watch goes on with the rest.
        """
        if self._recording:
            raise ValueError("load_state_dict came after the first step; call it right after creation.")
        kept, wrong = usable(state)
        if wrong:
            warnings.warn(
                f"phasewatch: in the state to resume from, {'; '.join(wrong)}: it is of another version, or was "
                "changed. The watch goes on with what there is; what was measured is in the record of that run.",
                stacklevel=2,
            )
        state = {**self.state_dict(), "run_id": None, **kept}
        self._recording = True
        self._last_taken = state["last_taken"]
        self.clock = Clock(total_steps=self.clock.total_steps, **state["clock"])
        self._outlay.load_state_dict(state, self.clock)
        if self._outlay.planned_for is not None:
            self._header |= self._outlay.settled
        with self._guarded("activity", max(self._last_taken, 0)):
            self.activity.load_state_dict(state["activity"])
        step = max(self._last_taken, 0)
        with self._guarded("record", step):
            self._journal, told, said = taken_up(self._journal, self._header, state, [Path(place) for place in places])
            self._journal.extend(told)
            for text in said:
                warnings.warn(f"phasewatch: {text}", stacklevel=3)
        lines = standing_lines(self._journal.lines)
        measured = [Measurement.from_dict(line.body) for line in lines if line.kind == "measurement"]
        self._last_taken = max([self._last_taken, *(measurement.step for measurement in measured)])
        stored = zip(*(state[name] for name in STANDING), strict=True)
        for monitor, (next_visit, schedule, (taken, last_taken)) in zip(self.monitors, stored, strict=False):
            if schedule == repr(monitor.schedule) and STANDING[0] in kept:
                monitor.next_visit, monitor.taken, monitor.last_taken = next_visit, taken, last_taken
            else:
                monitor.last_taken = self._last_taken
                monitor.go_on(self._last_taken, self.clock)
        if self.detector is not None:
            with self._guarded("detector", step):
                flags = [Flag.from_dict(line.body) for line in lines if line.kind == "transition"]
                self._resume_detector(self.detector, state["detector"], list(map(_seen, measured)), flags)
        for listener in self.listeners:
            with self._guarded(type(listener).__name__, step):
                listener.on_resume(self.run)

    def _resume_detector(
        self, detector: LiveDetector, state: Mapping[str, Any] | None, seen: Sequence[Any], flags: Sequence[Flag]
    ) -> None:
        """Let it go on from its state; where that is none, it has seen what was measured, and looks at it anew."""
        anew = detector.state_dict()
        try:
            detector.load_state_dict(anew if state is None else state, seen, flags)
        except ValueError as error:
            detector.load_state_dict(anew, seen, flags)
            warnings.warn(f"phasewatch: {error}. It looks anew at what was measured.", stacklevel=4)
        so_far = self.run
        detector.observe(so_far.observed, so_far.resumed)

    def _advance_clock(self, step: int) -> None:
        now = training_clock()
        if self._last_seen is not None:
            last_step, last_time = self._last_seen
            self.clock.steps += step - last_step
            self.clock.training_seconds += max(0.0, now - last_time)  # the clock may have been set back
        self._last_seen = (step, now)

    def _measure(
        self,
        step: int,
        monitors: Sequence[Monitor],
        module: nn.Module | None = None,
        left_out_at_the_end: Collection[str] | None = None,
    ) -> Measurement | None:
        """Measure a module, by default the network as it is; None where nothing comes of it, or a signal stops it."""
        began = time.perf_counter()
        measurement = None
        with measuring(), held_back():
            try:
                measurement = self._measured(
                    step, monitors, self.module if module is None else module, left_out_at_the_end
                )
            except Interrupted as stopped:
                self._show(step, None)
                self._note_interruption(step, time.perf_counter() - began, stopped)
        return measurement

    def _measured(
        self, step: int, monitors: Sequence[Monitor], module: nn.Module, left_out_at_the_end: Collection[str] | None
    ) -> Measurement | None:
        began = time.perf_counter()
        for monitor in monitors:
            monitor.taken, monitor.last_taken = monitor.taken + 1, max(step, monitor.last_taken)
        left_out = self._outlay.count(monitors, left_out_at_the_end)
        by_monitor: list[Measurement] = []
        of_main: Measurement | None = None
        measured: list[Estimator] = []
        is_long = self.clock.end_seconds > SHOWN_FROM
        for monitor in monitors:
            estimators = [price.without(e, left_out) for e in monitor.estimators]
            found, failures = measure(
                module,
                estimators,
                monitor.probe,
                step,
                progress=partial(self._show, step) if is_long else lambda part: None,
                seed=self.seed,
                without=self._failing.left_out | left_out,
            )
            for failure in failures:
                self._note(failure, step)
            self._failing.count(step, [estimator.name for estimator in estimators], failures)
            by_monitor.append(found)
            measured.extend(estimators)
            if monitor is self.main:
                of_main = found
        found = together(step, by_monitor, of_main, time.perf_counter() - began)
        if is_long:
            self._show(step, None)
        measurement = self._conclude(found) if found.estimates else None
        took = max(0.0, time.perf_counter() - began)
        self.clock.measuring_seconds += took
        is_first = self._outlay.take(measured, found, took, self._failing.left_out)
        if is_first and left_out_at_the_end is None:
            self._plan_again()
        return measurement

    def _note_interruption(self, step: int, seconds: float, stopped: Interrupted) -> None:
        """Record what a signal has stopped; its time counts."""
        self.clock.measuring_seconds += seconds
        with self._guarded("record", step):
            self._record_failure(step, "measurement", f"was stopped by {stopped} after {seconds:.1f} s")

    def _show(self, step: int, part: str | None) -> None:
        with self._guarded("progress", step):
            self.progress(part)

    def _conclude(self, found: Measurement) -> Measurement:
        """Record, tell the listeners, detect."""
        step, estimates = found.step, found.estimates
        if self.clock.training_seconds:
            overhead = (self.clock.measuring_seconds + found.seconds) / self.clock.training_seconds
            estimates = {**estimates, "overhead": Estimate(overhead)}
        measurement = replace(found, estimates=estimates, time=time.time())
        self._last_taken = max(step, self._last_taken)
        with self._guarded("record", step):
            self._record(("measurement", measurement.to_dict()))
        self._tell(step, lambda listener: listener.on_measurement(measurement))
        self._say_what_is_undescribed(measurement)
        with self._guarded("detector", step):
            self._detect(measurement)
        return measurement

    def _detect(self, measurement: Measurement) -> None:
        self._say_flags(measurement.step, self.detector.update(*_seen(measurement)) if self.detector else [])

    def _say_flags(self, step: int, flags: Sequence[Flag]) -> None:
        """Record what the detector says, and tell the listeners and the user's own function."""
        for flag in flags:
            self._record(("transition", flag.to_dict()))
        standing = self.transitions
        self._tell(step, lambda listener: listener.on_transitions(step, flags, standing))
        if self.on_transition is not None:
            for flag in flags:
                with self._guarded("on_transition", step):
                    self.on_transition(flag)

    def _tell(self, step: int, news: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            with self._guarded(type(listener).__name__, step):
                news(listener)

    def _say_what_is_undescribed(self, measurement: Measurement) -> None:
        new = [name for name in measurement.estimates if name not in self._undescribed and not is_described(name)]
        self._undescribed.update(new)
        if new:
            warnings.warn(
                f"phasewatch: the catalogue has no row for {', '.join(map(repr, new))}; recorded as a detail, in which "
                "no transition is looked for. Describe it before the run: from phasewatch.record import Signal, "
                f"describe; describe(Signal({new[0]!r}, 'what it is', group='heading of its chart', detected=True)).",
                stacklevel=2,
            )

    def _record(self, *told: tuple[Kind, dict[str, Any]]) -> None:
        """Write lines, and before them what was observed since the last ones."""
        block = self.observer.block()
        if block is not None and self.detector is not None:
            self.detector.observe(unpack([block]))
        observed: list[tuple[Kind, dict[str, Any]]] = [] if block is None else [("observed", block)]
        if not (observed or told):
            return
        self._record_header()
        self._journal.extend([*observed, *told])

    def _record_header(self) -> None:
        if not self._recording:
            self._recording = True
            self._journal.append("header", self._header)

    @contextmanager
    def _guarded(self, what: str, step: int) -> Iterator[None]:
        """Keep an error of phasewatch from ending the run."""
        try:
            yield
        except Exception as error:
            self._note(Failure(what, error), step)

    def _note(self, failure: Failure, step: int) -> None:
        """Record what failed, and do what follows from it."""
        with suppress(Exception):  # recording itself may be what failed; the warning is then all there is
            self._record_failure(step, failure.what, failure.error, failure.traceback)
        self._failing.note(failure, step)

    def _record_failure(self, step: int, what: str, error: str, trace: str = "") -> None:
        self._record(("failure", {"step": step, "what": what, "error": error, "traceback": trace, "time": time.time()}))


def _to_standard_error(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _seen(measurement: Measurement) -> tuple[int, dict[str, float], dict[str, float], dict[str, bool], list[str]]:
    """What the detector sees of a measurement, just made or read back: the arguments of ``LiveDetector.update``."""
    names = measurement.estimates
    main = searched(names)
    beside = [name for name in (*detected(names), *read_beside(names)) if name not in main]
    looked_at = {name: names[name] for name in (*main, *beside)}
    return (
        measurement.step,
        {name: _finite(estimate.value) for name, estimate in looked_at.items()},
        {name: _finite(estimate.standard_error) for name, estimate in looked_at.items()},
        {name: estimate.reliable for name, estimate in looked_at.items()},
        beside,
    )


def _finite(value: float) -> float:
    """NaN for what the record cannot hold either."""
    return value if math.isfinite(value) else math.nan
