"""From the hooks of a Lightning trainer to the engine: what all callbacks here have in common."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from phasewatch.callbacks.checkpoints import TransitionCheckpoints
from phasewatch.callbacks.kept_probes import fits_into_checkpoint, kept_on_device, restored_probe
from phasewatch.callbacks.meeting import Meeting
from phasewatch.callbacks.metrics import TrainerMetrics, latest
from phasewatch.callbacks.observing import TrainingSignals
from phasewatch.callbacks.places import checkpoints_of_run, directory_of_run, is_a
from phasewatch.callbacks.progress import ShownProgress
from phasewatch.callbacks.summaries import prefixed, told_at_the_end
from phasewatch.callbacks.training_step import ADVICE
from phasewatch.failing import OnError
from phasewatch.interruption import held_back
from phasewatch.listener import Listener
from phasewatch.monitor import Monitor
from phasewatch.objective.batches import clone_batch
from phasewatch.printable import printable
from phasewatch.probe import StreamProbe
from phasewatch.record import Flag, Run
from phasewatch.record.state import usable
from phasewatch.tensorboard import TensorBoardWriter
from phasewatch.transitions import LiveDetector
from phasewatch.watch import Watch

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

_SHARDED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")
LONGEST_COLLECTION = 0.1
"""Share of a run after which a stream's probe is what it has given so far. Chosen."""


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

        With several processes it is made when the schedule stops by next, or at the end, unless it is asked for in
        ``on_transition``.

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
            ValueError: If the trainer has two of this class with one name, or the parameters are sharded.
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
            self._say(trainer, told_at_the_end(self._watch))
        if self._share(trainer, bool(self._flags)):
            self._keep_checkpoint(trainer, step)
        self._leave_meeting()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let other processes go, which would wait for this one; finish the record, and say where it is."""
        self._leave_meeting()
        if self._watch is not None and self._signals is not None:
            self._watch.close(error=exception)
            self._signals = None
            self._say(trainer, told_at_the_end(self._watch))

    def _leave_meeting(self) -> None:
        if self._meeting is not None:
            self._meeting.end()
            self._meeting = None

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
        probes = [restored_probe(probe, "probes") for probe in kept]
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
            keep = fits_into_checkpoint(stream.batches)
            probes.append(([clone_batch(b) for b in stream.batches], list(stream.sizes)) if keep else None)
        return {"watch": self._watch.state_dict(), "probes": probes}

    def _restore_probes(self, trainer: Any) -> None:
        assert self._restored is not None
        for (_, stream), kept in zip(self._streams, self._restored["probes"], strict=False):
            if kept is not None and kept.sizes is not None:
                stream.restore(kept_on_device(trainer, kept.batches), kept.sizes)
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
                listeners=[metrics := TrainerMetrics(trainer, self.name, partial(self._say, trainer))],
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
            metrics = {prefixed(name, self.name): value for name, value in latest(self._watch).items()}
        self._next_visit, metrics, measured = self._meeting.broadcast((self._next_visit, metrics, measured))
        if metrics and not trainer.is_global_zero:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        return bool(measured)


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


def _stream_length(trainer: Any, stream: StreamProbe) -> int | None:
    """Samples in an epoch, where the number of batches is known."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    return round(batches * trainer.world_size * sum(stream.sizes) / len(stream.sizes))


def _is_own(error: Exception) -> bool:
    """Whether it says by itself what to mend: raised by phasewatch, on purpose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return place.startswith("phasewatch.") and isinstance(error, (ValueError, TypeError, OSError))
