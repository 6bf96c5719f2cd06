"""The callbacks that users put into their trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from ruptures.base import BaseEstimator

from phasewatch.callbacks.monitoring import MonitoringCallback
from phasewatch.callbacks.places import checked_name
from phasewatch.callbacks.watching import WatchingCallback
from phasewatch.estimators import (
    BehavioralCoefficient,
    Estimator,
    HessianSpectrum,
    LearningCoefficient,
    SymmetryLedger,
)
from phasewatch.failing import OnError
from phasewatch.objective import LossFn, OutputsFn
from phasewatch.probe import DEFAULT_SAMPLES
from phasewatch.schedule import FREE_SECONDS
from phasewatch.transitions import Flag, LiveDetector


class PhaseWatch(MonitoringCallback):
    """Measures λ, the Hessian spectrum and the causes of its zeros while a model trains, and flags phase transitions.

    λ is that of the function that the model computes (``llc_behavioral`` and ``llc_behavioral_coarse``, at every step)
    and, where the weights are near a minimum, that of the loss (``llc``). Everything goes to the trainer's loggers (as
    ``phasewatch/<signal>``), to TensorBoard, to the run record, and to ``trainer.callback_metrics``. The run itself is
    not changed in a single bit.

    Args:
        schedule: When to measure: ``"auto"`` spreads over the run within ``max_overhead``; ``"log"`` log-spaced; a
            number of steps; a list of steps.
        max_overhead: With ``"auto"``: time for measuring as a share of the time for training, None for no limit. The
            start, where that takes more than five seconds, is measured from a copy later in the run. What a run cannot
            pay for is left out and said, see :class:`phasewatch.Watch`.
        free_seconds: With ``"auto"``: time for measuring that is free in any run, where the share is less.
        probe: Batches to measure on; default ``probe_samples`` samples of the training set, drawn once.
        probe_samples: Size of the probe that is drawn.
        batch_size: Samples in each batch of a stream or a given probe; default what can be read off.
        loss_fn: ``loss_fn(module, batch) -> scalar mean loss``; default what ``training_step`` returns.
        outputs_fn: ``outputs_fn(module, batch)``: the network's outputs, where they cannot be seen in the calls of
            modules that the loss makes; needs ``loss_fn(outputs, batch) -> scalar mean loss``.
        n: Size of the training set, default as found; sets the temperature of λ, nβ = n / log n.
        behavioral: Settings of λ of the function, such as its resolutions and the parts that are measured alone; None
            leaves it out, as for the next three.
        llc: Settings of λ of the loss.
        hessian: Settings of the Hessian spectrum.
        zeros: Settings of the zeros by cause.
        extra: Further estimators, of one's own (:class:`phasewatch.estimators.Estimator`).
        held_out: What λ of the function is measured on, with all that comes of its draws (``effective_rank``,
            ``llc_outputs``, ``misfit_change``, ``description_length``). True: ``probe_samples`` samples of the first
            validation loader, which need no labels for it but the form of training's batches; where there is none that
            can be drawn from, or the loss cannot be taken on them, the probe. False: the probe. Else batches of one's
            own.
        other_data: Name to batches of further data, on which λ is measured too, under names of the same form.
        mode: Whether dropout and BatchNorm behave as in evaluation or as in training while measuring.
        threads: Threads of the CPU that measure. On one the numbers are the same on every machine, and nothing waits
            for cores on which something else is at work, such as a DataLoader's workers; for a large network on free
            cores more are faster. None: as many as PyTorch uses.
        alpha: Wanted rate of false alarms in a run without transitions.
        search: A search of ``ruptures``, such as ``ruptures.Pelt(model="rbf")``, that says where transitions may lie;
            default our exact one. See :func:`phasewatch.detect_transitions`.
        on_transition: Called with a :class:`phasewatch.transitions.Flag` when a transition is flagged, revised or
            withdrawn.
        save_checkpoints: With k > 0, a checkpoint before, at and after each transition is saved beside the record; the
            last k measured steps are kept back for that. 0 saves none.
        directory: Where the record is written; default the directory that a TensorBoard or CSV logger has for the run,
            else a new one in ``phasewatch_logs`` in the root directory of the trainer.
        seed: Seeds the probe and every measurement.
        on_error: What a failing measurement does: ``"warn"`` once and go on, ``"raise"``, or ``"disable"`` it.
        name: Needed where the trainer has several of one class, such as one for each of two probes: each has a record,
            metrics (``<name>/<signal>``) and a TensorBoard run of its own, in a folder of that name. Callbacks of
            different classes with one name, or none, share a record.

    Raises:
        TypeError: If ``schedule`` is none of the above, ``search`` no search, or an estimator no estimator.
        ValueError: If a setting is out of its range, or two estimators have the same name.
    """

    def __init__(
        self,
        schedule: int | list[int] | Literal["auto", "log"] = "auto",
        max_overhead: float | None = 0.1,
        free_seconds: float = FREE_SECONDS,
        probe: Iterable[Any] | None = None,
        probe_samples: int = DEFAULT_SAMPLES,
        batch_size: int | None = None,
        loss_fn: LossFn | None = None,
        outputs_fn: OutputsFn | None = None,
        n: int | None = None,
        behavioral: BehavioralCoefficient | None = BehavioralCoefficient(),
        llc: LearningCoefficient | None = LearningCoefficient(),
        hessian: HessianSpectrum | None = HessianSpectrum(),
        zeros: SymmetryLedger | None = SymmetryLedger(),
        extra: list[Estimator] | None = None,
        held_out: Iterable[Any] | bool = True,
        other_data: dict[str, Any] | None = None,
        mode: Literal["eval", "train"] = "eval",
        threads: int | None = 1,
        alpha: float = 0.05,
        search: BaseEstimator | None = None,
        on_transition: Callable[[Flag], Any] | None = None,
        save_checkpoints: int = 0,
        directory: str | None = None,
        seed: int = 0,
        on_error: OnError = "warn",
        name: str | None = None,
    ) -> None:
        super().__init__(
            [behavioral, llc, hessian, zeros, *(extra or ())],
            schedule,
            max_overhead,
            free_seconds,
            probe,
            probe_samples,
            batch_size,
            loss_fn,
            outputs_fn,
            n,
            held_out,
            other_data,
            mode,
            threads,
            directory,
            seed,
            on_error,
            name,
        )
        checked = LiveDetector(alpha, search)
        self.alpha, self.search = checked.alpha, checked.search
        self.on_transition = _checked_hook(on_transition)
        self.save_checkpoints = _checked_count(save_checkpoints)

    def detector(self) -> LiveDetector:
        """A detector at the rate asked for."""
        return LiveDetector(self.alpha, self.search)


class LLCMonitor(MonitoringCallback):
    """Measures the learning coefficients λ of function and loss alone.

    Args:
        behavioral: Settings of λ of the function; None leaves it out.
        llc: Settings of λ of the loss; None leaves it out.
        held_out: As for :class:`PhaseWatch`.
        settings: Schedule, data and the rest, as for :class:`PhaseWatch`.
    """

    def __init__(
        self,
        behavioral: BehavioralCoefficient | None = BehavioralCoefficient(),
        llc: LearningCoefficient | None = LearningCoefficient(),
        held_out: Iterable[Any] | bool = True,
        **settings: Any,
    ) -> None:
        super().__init__([behavioral, llc], held_out=held_out, **settings)


class HessianMonitor(MonitoringCallback):
    """Measures the Hessian spectrum and the causes of its zeros alone.

    Args:
        hessian: Settings of the spectrum; None leaves it out.
        zeros: Settings of the zeros by cause; None leaves them out.
        settings: Schedule, data and the rest, as for :class:`PhaseWatch`.
    """

    def __init__(
        self,
        hessian: HessianSpectrum | None = HessianSpectrum(),
        zeros: SymmetryLedger | None = SymmetryLedger(),
        **settings: Any,
    ) -> None:
        super().__init__([hessian, zeros], **settings)


class TransitionDetector(WatchingCallback):
    """Flags phase transitions in what the other phasewatch callbacks of the trainer measure.

    Args:
        alpha: Wanted rate of false alarms in a run without transitions.
        search: A search of ``ruptures``, such as ``ruptures.Pelt(model="rbf")``, that says where transitions may lie;
            default our exact one. See :func:`phasewatch.detect_transitions`.
        on_transition: Called with a :class:`phasewatch.transitions.Flag` when a transition is flagged, revised or
            withdrawn.
        save_checkpoints: With k > 0, a checkpoint before, at and after each transition is saved beside the record; the
            last k measured steps are kept back for that. 0 saves none.
        directory: Where the record is written, if this callback stands first.
        seed: Seeds every measurement, if this callback stands first.
        on_error: What a failing measurement does, if this callback stands first.
        name: That of the callbacks in whose measurements it looks, where they have one.

    Raises:
        TypeError: If ``search`` is no search.
        ValueError: If ``alpha`` is not strictly between 0 and 1, or ``save_checkpoints`` negative.
    """

    def __init__(
        self,
        alpha: float = 0.05,
        search: BaseEstimator | None = None,
        on_transition: Callable[[Flag], Any] | None = None,
        save_checkpoints: int = 0,
        directory: str | None = None,
        seed: int = 0,
        on_error: OnError = "warn",
        name: str | None = None,
    ) -> None:
        super().__init__()
        checked = LiveDetector(alpha, search)
        self.alpha, self.search = checked.alpha, checked.search
        self.on_transition = _checked_hook(on_transition)
        self.save_checkpoints = _checked_count(save_checkpoints)
        self.directory = directory
        self.seed = seed
        self.on_error = on_error
        self.name = checked_name(name)

    def detector(self) -> LiveDetector:
        """A detector at the rate asked for."""
        return LiveDetector(self.alpha, self.search)


def _checked_count(save_checkpoints: int) -> int:
    if isinstance(save_checkpoints, bool) or not isinstance(save_checkpoints, int) or save_checkpoints < 0:
        raise ValueError(
            f"save_checkpoints is {save_checkpoints!r}; expected how many checkpoints to keep back, such as 10, or 0"
        )
    return save_checkpoints


def _checked_hook(on_transition: Callable[[Flag], Any] | None) -> Callable[[Flag], Any] | None:
    if on_transition is not None and not callable(on_transition):
        raise ValueError(f"on_transition is {on_transition!r}; expected a callable that takes a Flag, or None")
    return on_transition
