"""From the hooks of a Lightning trainer to the engine: what all callbacks here have in common."""

from __future__ import annotations

import importlib
import importlib.util
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from phasewatch.analysis import Analysis
from phasewatch.callbacks.checkpoints import TransitionCheckpoints
from phasewatch.callbacks.meeting import Meeting
from phasewatch.callbacks.observing import TrainingSignals
from phasewatch.callbacks.places import checked_name, checkpoints_of_run, directory_of_run, is_a
from phasewatch.callbacks.progress import ShownProgress
from phasewatch.callbacks.summaries import log_verdict, prefixed
from phasewatch.callbacks.training_step import ADVICE, TrainingStepLoss, returns_nothing
from phasewatch.estimators import BehavioralCoefficient, Estimator, checked_estimators
from phasewatch.estimators.enough import ROWS
from phasewatch.interruption import held_back
from phasewatch.isolation import isolated
from phasewatch.listener import Listener
from phasewatch.measure import Probe
from phasewatch.monitor import Monitor
from phasewatch.objective import LossFn, NoOutputsError, OutputsFn
from phasewatch.objective.batches import UnknownSizeError, clone_batch, count_samples
from phasewatch.objective.merging import one_batch_serves
from phasewatch.price import size_of, what_would_help
from phasewatch.printable import printable
from phasewatch.probe import DEFAULT_SAMPLES, DrawnProbe, StreamProbe, batch_size_of, draw_probe, support
from phasewatch.record import FILE_NAME, Flag, Measurement, Run, Transition
from phasewatch.record.signals import HELD_OUT, LOSS
from phasewatch.record.state import usable
from phasewatch.report import NAMES, verdict
from phasewatch.schedule import FREE_SECONDS, Spread, as_schedule
from phasewatch.settings import check_types
from phasewatch.tags import STAGE, tagged
from phasewatch.tensorboard import TensorBoardWriter
from phasewatch.transitions import LiveDetector
from phasewatch.transitions.detect import MIN_POINTS
from phasewatch.watch import CHECKED_AT_THE_START, OnError, Watch

if TYPE_CHECKING:
    from pytorch_lightning import Callback as CallbackBase
else:

    def _callback_base() -> type:
        """The callback class of each namespace installed: a trainer of one rejects the other's."""
        bases = []
        for package in ("pytorch_lightning", "lightning.pytorch"):
            if importlib.util.find_spec(package.split(".")[0]):
                bases.append(importlib.import_module(package).Callback)
        if not bases:
            raise ImportError("phasewatch.callbacks needs Lightning: pip install pytorch-lightning")
        return type("CallbackBase", tuple(dict.fromkeys(bases)), {})

    CallbackBase = _callback_base()

SINCE_TRANSITION = "steps_since_transition"
"""The metric that EarlyStopping can wait for: steps since the last transition ended, or since the run began."""
_SHARDED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")
_LARGEST_NETWORK_FOR_ONE_BATCH = 100_000
_LARGEST_PROBE_IN_CHECKPOINT = 64 * 2**20
LONGEST_COLLECTION = 0.1
"""Share of a run after which a stream's probe is what it has given so far."""


class WatchingCallback(CallbackBase):
    """Base of all callbacks here. The first in a trainer of those with one name drives one watch for all of them."""

    name: str | None = None
    directory: str | None
    seed: int
    on_error: OnError
    on_transition: Callable[[Flag], Any] | None = None
    save_checkpoints: int = 0
    instead_of_training: Callable[[Watch], object] | None = None
    """Set where a finished run is measured: it is given the watch before the first batch, once the probes are drawn."""

    def __init__(self) -> None:
        """Nothing is set up before the run starts."""
        self._watch: Watch | None = None
        self._signals: TrainingSignals | None = None
        self._own_metrics: set[str] = set()
        self._run: Run | None = None
        self._restored: dict[str, Any] | None = None
        self._streams: list[tuple[Monitor, StreamProbe]] = []
        self._captured: list[tuple[Monitor, StreamProbe]] = []
        self._next_visit: int | None = None
        self._run_directory: Path | None = None
        self._shared_directory: Path | None = None
        self._flags: list[Flag] = []
        self._checkpoints: TransitionCheckpoints | None = None
        self._kept_back = 0
        self._began_at = 0
        self._alone = True
        self._unprepared: Sequence[WatchingCallback] = ()
        self._waited_for = ""
        self._meeting: Meeting | None = None

    @property
    def state_key(self) -> str:
        """What its state is called in a checkpoint."""
        return super().state_key if self.name is None else self._generate_state_key(name=self.name)

    @property
    def run(self) -> Run:
        """What was recorded so far; after the fit the whole run.

        Raises:
            RuntimeError: Before the first fit, or on a callback that does not drive the watch.
        """
        if self._watch is None:
            raise RuntimeError(
                "There is no run: fit has not started, this process is not rank zero, or another phasewatch callback "
                "that stands before this one in the trainer holds the run."
            )
        return self._watch.run

    @property
    def watch(self) -> Watch | None:
        """The engine, once training has started (on rank zero)."""
        return self._watch

    def request(self) -> None:
        """Ask for a measurement before the next batch, see :meth:`phasewatch.Watch.request`.

        With several processes it is made when the schedule stops by next, unless it is asked for in ``on_transition``.

        Raises:
            RuntimeError: If this callback does not drive a watch: before training, or beside another one that does.
        """
        if self._watch is None:
            raise RuntimeError(
                "Nothing can be requested: training has not started, this process is not rank zero, or another "
                "phasewatch callback that stands before this one in the trainer measures."
            )
        self._watch.request()
        # Several ranks meet at steps that all of them know beforehand.
        if self._alone:
            self._next_visit = 0

    def monitors(self, trainer: Any, module: Any) -> list[Monitor]:
        """What this callback measures."""
        return []

    def detector(self) -> LiveDetector | None:
        """The detector this callback brings; None if none."""
        return None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse at once what cannot work.

        Raises:
            ValueError: If the trainer has two of this class with one name, the parameters are sharded, or the loss
                cannot come out of ``training_step``.
        """
        kind = type(self).__name__
        if any(type(other) is type(self) and other is not self for other in self._family(trainer)):
            raise ValueError(
                f"The trainer has two {kind} of the name {self.name!r}, which checkpoint, record and metrics could not "
                f"tell apart. Give each further one a name of its own: {kind}(name='second', ...)."
            )
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDED_STRATEGIES:
            raise ValueError(
                f"{kind} needs whole parameters on each device, and {strategy} shards them. Train with "
                "strategy='ddp' or on a single device, or measure saved checkpoints afterwards."
            )
        needs_training_step = isinstance(self, MonitoringCallback) and self.loss_fn is None
        if stage == "fit" and needs_training_step and returns_nothing(type(pl_module).training_step):
            raise ValueError(f"training_step of {type(pl_module).__name__} returns no loss. {ADVICE}")

    def _family(self, trainer: Any) -> list[WatchingCallback]:
        """The callbacks here that share a watch with this one, itself included, in the trainer's order."""
        return [c for c in trainer.callbacks if isinstance(c, WatchingCallback) and c.name == self.name]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Choose where to record; all else waits until the hooks of the module that come first have been called."""
        self._shared_directory = None
        family = self._family(trainer)
        if family[0] is not self:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        # A trainer that begins at zero begins a run of its own, whatever this callback has watched before.
        if self._watch is not None and self._restored is None and step > 0:
            self._restored = self._driver_state()
        self._run_directory = None if self.instead_of_training else self._choose_directory(trainer)
        self._next_visit = 0
        self._flags = []
        self._hooks = [c.on_transition for c in family if c.on_transition is not None]
        self._kept_back = max(c.save_checkpoints for c in family)
        self._checkpoints = None
        self._began_at = step
        self._alone = trainer.world_size == 1
        self._meeting = Meeting(trainer)
        if not trainer.is_global_zero:
            return
        self._watch = self._signals = None
        self._streams = []
        self._unprepared = family
        self._waited_for = ""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure the weights before this batch is trained on, if a measurement is due."""
        if self._signals is not None:
            self._signals.batch_starts()
        if self._next_visit is None:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if not (self._unprepared or self._streams or step >= self._next_visit):
            return
        # All ranks handle a signal after what they do together: Lightning's handler of SIGTERM is such a thing too.
        with held_back():
            if self._unprepared:
                self._prepare(trainer, pl_module)
            if self._streams:
                self._collect(trainer, pl_module, batch, step)
            if step >= self._next_visit and self.instead_of_training is None:
                self._visit(trainer, step)
        if self.instead_of_training is not None and self._watch is not None:
            self.instead_of_training(self._watch)

    def _prepare(self, trainer: Any, module: Any) -> None:
        """Draw the probes and begin the record; what is seen in seconds not to be measurable is an error here.

        Attributes and parameters that the first batch makes are waited for.
        """
        if not self._waited_for and any(isinstance(p, UninitializedParameter) for p in module.parameters()):
            self._waited_for = "a parameter was not initialised"
            return
        try:
            monitors = [monitor for callback in self._unprepared for monitor in callback.monitors(trainer, module)]
            self._streams = [(m, m.probe.batches) for m in monitors if isinstance(m.probe.batches, StreamProbe)]
            self._pending = monitors, next((d for c in self._unprepared if (d := c.detector()) is not None), None)
            if self._restored is not None:
                self._restore_probes(trainer)
            if not self._streams:
                self._start(trainer, module)
        except Exception as error:
            cause = error if isinstance(error, AttributeError) else error.__cause__
            if self._waited_for or not isinstance(cause, AttributeError):
                raise
            self._waited_for = str(cause)
            return
        self._unprepared = []
        if self._waited_for:
            self._say(
                trainer,
                f"phasewatch: before the first batch {self._waited_for}, so that the loss cannot be computed there: "
                "measuring begins after it.",
            )

    def _visit(self, trainer: Any, step: int) -> None:
        """Measure if it is due, and tell the other ranks, which meet here."""
        measured = False
        if self._watch is not None:
            self._watch.at(step)
            measured = self._watch.last_taken == step
            self._next_visit = self._watch.next_visit
        elif trainer.is_global_zero:
            self._next_visit = step + 1
        measured = self._share(trainer, measured)
        if measured:
            self._keep_checkpoint(trainer, step)
        self._flags = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Read a loss that ``training_step`` may not return."""
        if self._signals is not None:
            self._signals.backward_starts(loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Read learning rates and, now and then, the norms of gradient, weights and update."""
        if self._signals is not None:
            self._signals.optimizer_steps(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the loss."""
        if self._signals is not None:
            self._signals.batch_ends(outputs)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the metrics that the user has logged."""
        if self._signals is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            watching = (c for c in trainer.callbacks if isinstance(c, WatchingCallback))
            self._signals.validation_ends({name for callback in watching for name in callback._own_metrics})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Make do with what a stream has given for the probe in the first epoch; the next would only repeat it."""
        if any(stream.batches for _, stream in self._streams):
            self._finish_streams(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the end, finish the record and say where it is."""
        if self._meeting is None:
            return
        if self._watch is None and trainer.is_global_zero and any(s.batches for _, s in self._streams):
            self._finish_streams(trainer, pl_module)
        if self.instead_of_training is not None:
            if self._watch is not None:
                self.instead_of_training(self._watch)
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self._watch is not None:
            if self._captured and not self._watch.run.measurements:
                self._watch.measure(step)  # the probe was complete after all that the schedule asked for
            self._watch.close(step)
            self._signals = None
            self._say(trainer, _summary(self._watch))
        if self._share(trainer, bool(self._flags)):
            self._keep_checkpoint(trainer, step)
        self._meeting.end()
        self._meeting = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the record of a run that was cut short, and say where it is."""
        if self._watch is not None and self._signals is not None:
            self._watch.close(error=exception)
            self._signals = None
            self._say(trainer, _summary(self._watch))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the state where Lightning has those of all callbacks.

        With a ``state_dict`` of its own a second callback of this class would be refused before :meth:`setup` can say
        what to pass.
        """
        if state := self._state():
            checkpoint.setdefault("callbacks", {})[self.state_key] = state

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain Python values and tensors."""
        return self._driver_state() if self._watch is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the run starts; what of it cannot be used is warned of there, or here."""
        self._restored = None
        if not state_dict:
            return
        found = state_dict.get("probes") or []
        kept = found if isinstance(found, list) else [found]
        probes = [_restored_probe(probe, "probes") for probe in kept]
        self._restored = {"watch": state_dict.get("watch", {}), "probes": probes}

    def _choose_directory(self, trainer: Any) -> Path | None:
        """Where to record, the same on every rank; all must ask. A named watch has a folder of its own there."""
        directory = self._directory_of_run(trainer) if self.directory is None else Path(self.directory)
        return directory if directory is None or self.name is None else directory / self.name

    def _directory_of_run(self, trainer: Any) -> Path | None:
        """The directory that all callbacks share which are not given one."""
        before = takewhile(lambda c: c is not self, (c for c in trainer.callbacks if isinstance(c, WatchingCallback)))
        shared = next((c._shared_directory for c in before if c._shared_directory is not None), None)
        if shared is None and not trainer.fast_dev_run:
            shared = directory_of_run(trainer, self._earlier_directory())
        self._shared_directory = trainer.strategy.broadcast(shared)
        return self._shared_directory

    def _earlier_directory(self) -> Path | None:
        """That of the run which is resumed, where its record is still there."""
        record = usable(self._restored["watch"])[0].get("record") if self._restored else None
        if record is None or not Path(record["path"]).is_file():
            return None
        return Path(record["path"]).parents[0 if self.name is None else 1]

    def _driver_state(self) -> dict[str, Any]:
        assert self._watch is not None
        probes: list[Any] = []
        for _, stream in self._captured:
            keep = _fits_into_checkpoint(stream.batches)
            probes.append(([clone_batch(b) for b in stream.batches], list(stream.sizes)) if keep else None)
        return {"watch": self._watch.state_dict(), "probes": probes}

    def _restore_probes(self, trainer: Any) -> None:
        assert self._restored is not None
        for (_, stream), kept in zip(self._streams, self._restored["probes"], strict=False):
            if kept is not None and kept.sizes is not None:
                stream.restore(_kept_on_device(trainer, kept.batches), kept.sizes)
        if all(stream.complete for _, stream in self._streams):
            self._use_captured(trainer)

    def _collect(self, trainer: Any, module: Any, batch: Any, step: int) -> None:
        for _, stream in self._streams:
            stream.capture(batch)
        total = trainer.estimated_stepping_batches
        late = 1 <= total < math.inf and step >= LONGEST_COLLECTION * total
        if late or all(stream.complete for _, stream in self._streams):
            self._finish_streams(trainer, module)

    def _finish_streams(self, trainer: Any, module: Any) -> None:
        for _, stream in self._streams:
            if not stream.complete:
                self._say(
                    trainer,
                    f"phasewatch: the stream of batches gave {sum(stream.sizes)} samples for the probe, of "
                    f"{stream.samples} asked for, in the first epoch or tenth of the run; measuring on these. "
                    "probe_samples=, or a probe= of your own, sets what is measured on.",
                )
        self._use_captured(trainer)
        self._start(trainer, module)

    def _use_captured(self, trainer: Any) -> None:
        self._captured, self._streams = self._streams, []
        for monitor, stream in self._captured:
            monitor.probe = replace(monitor.probe, batches=stream.batches, batch_sizes=stream.sizes)
        for _, stream in self._captured[:1]:
            length = _stream_length(trainer, stream)
            for monitor in self._pending[0]:
                monitor.probe = replace(monitor.probe, n=monitor.probe.n or length)

    def _start(self, trainer: Any, module: Any) -> None:
        monitors, detector = self._pending
        total_steps = trainer.estimated_stepping_batches
        try:
            watch = Watch.from_monitors(
                module,
                monitors,
                directory=self._run_directory,
                total_steps=None if math.isinf(total_steps) or total_steps < 1 else int(total_steps),
                detector=detector,
                seed=self.seed,
                on_error=self.on_error,
                listeners=[metrics := _TrainerMetrics(trainer, self.name, partial(self._say, trainer))],
                on_transition=self._on_flag,
                say=partial(self._say, trainer),
                progress=ShownProgress(trainer),
            )
        except Exception as error:
            if _is_own(error):
                raise
            raise ValueError(
                f"The loss of {type(module).__name__} cannot be recomputed ({type(error).__name__}: {error}). {ADVICE}"
            ) from error
        if self.instead_of_training is not None:
            self._watch = watch
            return
        watch.listeners.extend(_tensorboard_writers(trainer, self._run_directory, self.name))
        if self._restored is not None:
            watch.load_state_dict(self._restored["watch"], _beside_checkpoint(trainer, self.name))
            self._restored = None
        self._watch = watch
        self._signals = TrainingSignals(watch, trainer)
        self._own_metrics = metrics.names
        if self._alone:  # else the others come to where they were told to, and hear the next step there
            self._next_visit = watch.next_visit

    def _keep_checkpoint(self, trainer: Any, step: int) -> None:
        """Keep the state at a measurement back, and what lies around a transition; all ranks must ask."""
        if not self._kept_back or self._run_directory is None:
            return
        if self._checkpoints is None:
            record = None if self._watch is None else self._watch.run.path
            folder = checkpoints_of_run(self._run_directory, record)
            self._checkpoints = TransitionCheckpoints(folder, self._kept_back)
            if trainer.is_global_zero:
                self._checkpoints.start(self._began_at)
        self._checkpoints.at_measurement(trainer, step, self._flags)

    def _on_flag(self, flag: Flag) -> None:
        self._flags.append(flag)
        for hook in self._hooks:
            hook(flag)

    def _say(self, trainer: Any, message: str) -> None:
        """Say it where the trainer says things, with the name of this watch."""
        if self.name is not None:
            message = message.replace("phasewatch:", f"phasewatch {self.name}:", 1)
        namespace = type(trainer).__module__.partition(".trainer")[0]
        importlib.import_module(f"{namespace}.utilities.rank_zero").rank_zero_info(printable(message))

    def _share(self, trainer: Any, measured: bool) -> bool:
        """Give every rank the next step to meet at and the metrics, so that all stop early or save alike.

        Returns:
            What rank zero gave as ``measured``.
        """
        if trainer.world_size == 1:
            return measured
        assert self._meeting is not None
        metrics = {}
        if trainer.is_global_zero:
            metrics = {prefixed(name, self.name): value for name, value in _latest(self._watch).items()}
        self._next_visit, metrics, measured = self._meeting.broadcast((self._next_visit, metrics, measured))
        if metrics and not trainer.is_global_zero:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        return bool(measured)


class MonitoringCallback(WatchingCallback):
    """A callback that measures: it has a probe, a loss and a schedule."""

    def __init__(
        self,
        estimators: Iterable[Estimator | None],
        schedule: int | list[int] | Literal["auto", "log"] = "auto",
        max_overhead: float | None = 0.1,
        free_seconds: float = FREE_SECONDS,
        probe: Iterable[Any] | None = None,
        probe_samples: int = DEFAULT_SAMPLES,
        batch_size: int | None = None,
        loss_fn: LossFn | None = None,
        outputs_fn: OutputsFn | None = None,
        n: int | None = None,
        held_out: Iterable[Any] | bool = False,
        other_data: dict[str, Any] | None = None,
        mode: Literal["eval", "train"] = "eval",
        threads: int | None = 1,
        directory: str | None = None,
        seed: int = 0,
        on_error: OnError = "warn",
        name: str | None = None,
    ) -> None:
        """Check the settings; nothing is drawn before the run starts. ``None`` among the estimators is left out."""
        super().__init__()
        check_types(
            max_overhead=max_overhead,
            free_seconds=free_seconds,
            probe_samples=probe_samples,
            batch_size=batch_size,
            loss_fn=loss_fn,
            outputs_fn=outputs_fn,
            n=n,
            threads=threads,
            directory=directory,
            seed=seed,
        )
        self.estimators = checked_estimators(given for given in estimators if given is not None)
        self.schedule = as_schedule(schedule, max_overhead, free_seconds)
        self.probe = probe
        self.probe_samples = probe_samples
        self.batch_size = batch_size
        self.loss_fn = loss_fn
        self.outputs_fn = outputs_fn
        self.n = n
        self.held_out = held_out
        self.other_data = other_data
        self.mode = mode
        self.threads = threads
        self.directory = directory
        self.seed = seed
        self.on_error = on_error
        self.name = checked_name(name)
        self._drawn: dict[str, DrawnProbe | None] = {}  # held-out samples, once drawn; None where there are none

    def _state(self) -> dict[str, Any]:
        """That of the run, and the held-out samples: a validation set that is split off anew would hold others."""
        kept = {
            what: None if drawn is None else (drawn.batches, drawn.sizes)
            for what, drawn in self._drawn.items()
            if drawn is None or _fits_into_checkpoint(drawn.batches)
        }
        return {**super()._state(), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the run starts."""
        of_run = dict(state_dict)
        if HELD_OUT in of_run:
            kept = of_run.pop(HELD_OUT)
            probe = _restored_probe(kept, HELD_OUT)
            self._drawn = {} if probe is None and kept is not None else {HELD_OUT: probe}
        super().load_state_dict(of_run)

    def monitors(self, trainer: Any, module: Any) -> list[Monitor]:
        """Estimators, probe, loss and schedule, on the trainer's device; one more for each set of other data.

        Raises:
            ValueError: If a probe is empty, ``probe_samples`` is not positive, or ``outputs_fn`` has no ``loss_fn``.
        """
        if self.outputs_fn is not None and self.loss_fn is None:
            raise ValueError(
                "outputs_fn was given without loss_fn; expected both: outputs_fn(module, batch) -> outputs, and "
                "loss_fn(outputs, batch) -> scalar mean loss."
            )
        loss_fn = self.loss_fn or TrainingStepLoss(trainer)
        batches, sizes, source, n = self._find_probe(trainer, loss_fn)
        probe = Probe(
            batches,
            loss_fn,
            self.n or n,
            self.mode,
            source=source,
            batch_sizes=sizes,
            outputs_fn=self.outputs_fn,
            threads=self.threads,
        )
        monitor = Monitor(self.estimators, probe, replace(self.schedule))  # type: ignore[type-var]
        others = []
        for name, batches in (self.other_data or {}).items():
            with isolated():
                others.append(monitor.on_other_data(name, [_to_device(trainer, batch) for batch in batches]))
        return [*self._with_held_out(trainer, monitor), *others]

    def _find_probe(self, trainer: Any, loss_fn: LossFn) -> tuple[Any, Sequence[int] | None, str, int | None]:
        if self.probe_samples < 1:
            raise ValueError(f"probe_samples is {self.probe_samples}; expected a positive number of samples")
        loader = trainer.train_dataloader
        indices = support(loader)
        n = None if indices is None else len(indices)
        if self.probe is not None:
            probe = self._given(self.probe, "probe", "the training set")
        elif indices is None:
            stream = StreamProbe(self.probe_samples, self.batch_size, getattr(loader, "batch_size", None))
            return stream, None, "captured from the stream", None
        else:
            probe = self._draw(trainer, loader, loss_fn)
        probe = self._on_device(trainer, probe)
        return probe.batches, probe.sizes, "given" if self.probe is not None else "drawn from the training set", n

    def _given(self, given: Iterable[Any], what: str, otherwise: str) -> DrawnProbe:
        """What the user gave to measure on; a loader as if it were not shuffled, and without moving its stream."""
        if isinstance(given, DataLoader) and (known := support(given)) is not None:
            return draw_probe(given, len(known), self.seed).without_short_rest()
        with isolated():
            batches = list(given)
        if not batches:
            raise ValueError(f"{what} is empty; give at least one batch, or leave it out to draw from {otherwise}")
        return DrawnProbe(batches, None)

    def _on_device(self, trainer: Any, probe: DrawnProbe) -> DrawnProbe:
        with isolated():
            batches = [_to_device(trainer, batch) for batch in probe.batches]
        sizes = probe.sizes
        if self.batch_size is not None and sizes is None:
            sizes = [self.batch_size] * len(batches)
        return DrawnProbe(batches, sizes)

    def _with_held_out(self, trainer: Any, monitor: Monitor) -> Sequence[Monitor]:
        """The monitor, its λ of the function on held-out samples where there are some."""
        if self.held_out is False:
            return [monitor]
        if self.held_out is not True:
            given = self._on_device(trainer, self._given(self.held_out, "held_out", "the validation loader"))
            return monitor.on_held_out(given.batches, "given", given.sizes)
        if not any(isinstance(e, BehavioralCoefficient) for e in monitor.estimators):
            return [monitor]
        if trainer.fit_loop.epoch_loop._batches_that_stepped == 0:
            self._drawn = {}
        if HELD_OUT not in self._drawn:
            self._drawn[HELD_OUT] = self._draw_held_out(trainer, monitor)
        drawn = self._drawn[HELD_OUT]
        if drawn is None:
            return [monitor]
        return monitor.on_held_out(
            _kept_on_device(trainer, drawn.batches), "drawn from the validation loader", drawn.sizes
        )

    def _draw_held_out(self, trainer: Any, monitor: Monitor) -> DrawnProbe | None:
        """Samples of the first validation loader; None where they do not serve, of which the reason is told."""
        if not trainer.enable_validation:
            return None
        try:
            found = self._find_held_out(trainer, monitor)
        except NoOutputsError:  # nor will they be seen on the probe, of which the watch tells
            return None
        except Exception as error:
            if isinstance(error, AttributeError) and not self._waited_for:
                raise  # it may be there after the first batch
            found = f"the loss cannot be taken on them ({type(error).__name__}: {error})"
        if isinstance(found, str):
            self._say(
                trainer,
                "phasewatch: λ of the function is measured on the samples of the training probe and not on some of the "
                f"validation loader: {found}. held_out=[batches] sets others, held_out=False says that this is meant.",
            )
            return None
        return found

    def _find_held_out(self, trainer: Any, monitor: Monitor) -> DrawnProbe | str:
        """Samples of the first validation loader, or why they do not serve."""
        loader = next(iter(tree_leaves(trainer.val_dataloaders)), None)
        if loader is None:
            return "it is not loaded yet when training starts, without a sanity check of validation"
        indices = support(loader)
        if indices is None:
            return "it cannot be drawn from without moving its stream"
        if getattr(trainer.train_dataloader, "dataset", None) is loader.dataset and not set(indices).isdisjoint(
            support(trainer.train_dataloader) or indices
        ):
            return "it draws from the training samples"
        # Where it has larger batches than training, they are made for evaluations without a gradient.
        size = min(filter(None, map(batch_size_of, (trainer.train_dataloader, loader))), default=None)
        drawn = self._on_device(trainer, self._draw(trainer, loader, monitor.probe.loss_fn, size))
        with isolated():
            probe = replace(monitor.probe, batches=drawn.batches, batch_sizes=drawn.sizes)
            objective = probe.first(CHECKED_AT_THE_START).objective(trainer.lightning_module, self.seed)
            objective.outputs(objective.parameters, 0)
        wanted, there = self._size_of(monitor.probe), sum(probe.sizes)
        # λ looks at no more positions of sequences than ROWS, of however many samples
        if 2 * there < wanted and size_of(objective, 1).rows * len(drawn.batches) < ROWS:
            return f"it has {there} samples, less than half of the {wanted} of the probe"
        return drawn

    def _size_of(self, probe: Probe) -> int:
        """Samples in the probe, or asked for where it is still to come."""
        if isinstance(probe.batches, StreamProbe):
            return probe.batches.samples
        try:
            return sum(probe.batch_sizes or map(count_samples, probe.batches))
        except UnknownSizeError:  # refused when the watch begins
            return self.probe_samples

    def _draw(self, trainer: Any, loader: Any, loss_fn: LossFn, batch_size: int | None = None) -> DrawnProbe:
        """Samples of a data set: in one batch where that is small and the same loss, else in batches as for training.

        In one batch it is free of noise, which λ from few gradients needs.
        """
        probe = draw_probe(loader, self.probe_samples, self.seed, batch_size=batch_size)
        count = sum(parameter.numel() for parameter in trainer.lightning_module.parameters())
        if count > _LARGEST_NETWORK_FOR_ONE_BATCH or self.mode != "eval" or probe.sizes is None:
            return probe.without_short_rest()

        @cache
        def whole() -> DrawnProbe:
            return draw_probe(loader, self.probe_samples, self.seed, batch_size=self.probe_samples)

        with isolated(), suppress(Exception):  # a loss that cannot be used is refused when the watch begins
            batches = [_to_device(trainer, batch) for batch in probe.batches]
            if one_batch_serves(
                trainer.lightning_module,
                batches,
                probe.sizes,
                lambda: _to_device(trainer, whole().batches[0]),
                loss_fn=loss_fn,
                outputs_fn=self.outputs_fn,
                seed=self.seed,
            ):
                return whole()
        return probe.without_short_rest()


class _TrainerMetrics:
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
        self._log({**tagged(measurement), STAGE: float(len(self._standing))}, measurement.step)
        own = {self._in(name): torch.tensor(value) for name, value in _metrics(measurement).items()}
        own.setdefault(self._transitions, self._trainer.callback_metrics.get(self._transitions, torch.tensor(0.0)))
        own[self._since] = torch.tensor(_since_transition(measurement.step, self._standing))
        self._trainer.callback_metrics.update(own)
        self.names.update(own)

    def on_resume(self, run: Run) -> None:
        self._standing = run.transitions

    def on_transitions(self, step: int, flags: Sequence[Flag], standing: Sequence[Transition]) -> None:
        if not flags:
            return
        self._standing = standing
        self._log({STAGE: float(len(standing))}, step)
        self._trainer.callback_metrics[self._transitions] = torch.tensor(float(len(standing)))
        self._trainer.callback_metrics[self._since] = torch.tensor(_since_transition(step, standing))
        for flag in flags:
            news = self._news(flag)
            if news is not None:
                self._say(f"phasewatch: {news}, seen at {step}")

    def _news(self, flag: Flag) -> str | None:
        """What a person wants to know at once: beginnings, ends and errors, but no better figures."""
        transition = flag.transition
        state = "withdrawn" if flag.action == "withdrawn" else "under way" if transition.under_way else "over"
        before = self._told.get(flag.number, None if flag.action == "flagged" else state)
        self._told[flag.number] = state
        if state == before:
            return None
        place = f"since step {transition.start:g}" if transition.under_way else f"at step {transition.step:g}"
        if state == "withdrawn":
            return f"no transition ({transition.full_kind}) {place} after all"
        if state == "under way":
            return f"transition ({transition.full_kind}) under way {place}"
        ended = f" has ended by {transition.end:g}" if before == "under way" else ""
        return f"transition ({transition.full_kind}) {place}{ended}"

    def on_end(self, analysis: Analysis) -> None:
        for logger in self._trainer.loggers:
            log_verdict(logger, analysis, self._name)

    def close(self) -> None: ...

    def _log(self, numbers: dict[str, float], step: int) -> None:
        for logger in self._trainer.loggers:
            if self._name is None or not is_a(logger, "TensorBoardLogger"):  # there it has a run of its own
                logger.log_metrics({self._in(name): number for name, number in numbers.items()}, step=step)
                logger.save()


def _beside_checkpoint(trainer: Any, name: str | None) -> list[Path]:
    """Where the record may lie if the run's directory was moved: loggers have checkpoints in a folder beside it."""
    beside = [] if trainer.ckpt_path is None else list(Path(trainer.ckpt_path).absolute().parents[:2])
    return [place if name is None else place / name for place in beside]


def _tensorboard_writers(trainer: Any, directory: Path | None, name: str | None) -> list[Listener]:
    found = [logger for logger in trainer.loggers if is_a(logger, "TensorBoardLogger")]
    if found:
        if name is not None:  # in a run of its own, so that TensorBoard lays the same tags of several over one another
            return [TensorBoardWriter(Path(logger.log_dir) / name) for logger in found]
        return [TensorBoardWriter(logger.experiment, scalars=False) for logger in found]
    return [] if directory is None else [TensorBoardWriter(directory)]


def _to_device(trainer: Any, batch: Any) -> Any:
    """The batch as ``training_step`` would get it, in memory of its own."""
    module = trainer.lightning_module
    batch = clone_batch(trainer.precision_plugin.convert_input(batch))
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _stream_length(trainer: Any, stream: StreamProbe) -> int | None:
    """Samples in an epoch, where the number of batches is known."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    return round(batches * trainer.world_size * sum(stream.sizes) / len(stream.sizes))


def _latest(watch: Watch | None) -> dict[str, float]:
    if watch is None or not watch.run.measurements:
        return {}
    latest = watch.run.measurements[-1]
    return {
        **_metrics(latest),
        "transitions": float(len(watch.transitions)),
        SINCE_TRANSITION: _since_transition(latest.step, watch.transitions),
    }


def _since_transition(step: int, standing: Sequence[Transition]) -> float:
    """Steps since the last transition ended, or the run began; 0 while one is under way."""
    return max(0.0, step - max((step if one.under_way else one.end for one in standing), default=0.0))


def _metrics(measurement: Measurement) -> dict[str, float]:
    """The finite numbers, and whether each λ is reliable; not the loss, which may be a metric of the user's own."""
    found = {name: one.value for name, one in measurement.estimates.items() if math.isfinite(one.value)}
    marks = {f"{name}_reliable": float(measurement.estimates[name].reliable) for name in NAMES if name in found}
    return {name: value for name, value in {**found, **marks}.items() if name != LOSS}


def _kept_on_device(trainer: Any, batches: Sequence[Any]) -> list[Any]:
    """Batches as a checkpoint gives them back, which training_step's hooks have seen already."""
    device = trainer.strategy.root_device
    return [tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch) for batch in batches]


def _restored_probe(kept: Any, what: str) -> DrawnProbe | None:
    """Batches and their sizes out of a checkpoint; None where there are none, of which it is told if it is odd."""
    match kept:
        case None:
            return None
        case (list() as batches, None | list() as sizes) if batches and (
            sizes is None or (len(sizes) == len(batches) and all(type(size) is int and size > 0 for size in sizes))
        ):
            return DrawnProbe(batches, sizes)
    warnings.warn(
        f"phasewatch: what the checkpoint holds as {what} is no list of batches with a list of their sizes: it is of "
        "another version, or was changed. What is measured on is drawn anew.",
        stacklevel=3,
    )
    return None


def _fits_into_checkpoint(batches: Sequence[Any]) -> bool:
    size = sum(t.nbytes for t in tree_leaves(batches) if isinstance(t, Tensor))
    return size <= _LARGEST_PROBE_IN_CHECKPOINT and _is_plain(list(batches))


def _is_plain(tree: Any) -> bool:
    """Whether a checkpoint with this in it loads with ``weights_only=True``."""
    if isinstance(tree, dict):
        return type(tree) is dict and all(_is_plain(v) for v in tree.values())
    if isinstance(tree, (list, tuple)):
        return type(tree) in (list, tuple) and all(_is_plain(v) for v in tree)
    return type(tree) is Tensor or isinstance(tree, (int, float, str, bool, type(None)))


def _is_own(error: Exception) -> bool:
    """Whether it says by itself what to mend: raised by phasewatch, on purpose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return place.startswith("phasewatch.") and isinstance(error, (ValueError, TypeError, OSError))


def _summary(watch: Watch) -> str:
    measured = len(watch.run.measurements)
    said = "" if watch.analysis is None else textwrap.indent(f"\n{verdict(watch.analysis)}", "  ")
    text = f"phasewatch: {measured} measurements"
    if watch.clock.training_seconds:
        text += (
            f", {watch.clock.measuring_seconds:.1f} s measuring beside {watch.clock.training_seconds:.1f} s of training"
        )
    if watch.directory is None:
        return f"{text}.{said}"
    # where several records share the directory, the file says which
    alone = watch.run.path is None or watch.run.path.name == FILE_NAME
    record = watch.directory if alone else watch.run.path
    text += f".{said}"
    if measured:
        text += f"\n  phasewatch analyze {record}\n  tensorboard --logdir {watch.directory}"
    budgets = [m.schedule for m in watch.monitors if isinstance(m.schedule, Spread) and m.schedule.max_overhead]
    short = measured < MIN_POINTS and bool(budgets) and len(watch.prices) > 0
    # where the seconds would have paid for one more, it is the run that was short
    if short and budgets[0].left(watch.clock) < watch.clock.measurement_seconds:
        helps = what_would_help(watch.prices, budgets[0], watch.clock.training_seconds)
        text += f"\n  Little was measured: {helps}"
    return text
