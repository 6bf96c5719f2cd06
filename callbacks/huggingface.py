"""The callback for the ``Trainer`` of Hugging Face. No mathematics here.

Needs ``transformers``: ``pip install phasewatch[huggingface]``.
"""

from __future__ import annotations

import difflib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from phasewatch.failing import OnError
from phasewatch.isolation import isolated
from phasewatch.objective import LossFn, OutputsFn
from phasewatch.printable import printable
from phasewatch.probe import DEFAULT_SAMPLES, draw_probe
from phasewatch.report import verdict
from phasewatch.schedule import as_schedule
from phasewatch.settings import check_types
from phasewatch.tensorboard import TensorBoardWriter
from phasewatch.transitions import Flag
from phasewatch.watch import Watch

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "phasewatch.callbacks.huggingface needs transformers and accelerate: pip install phasewatch[huggingface]"
    ) from error

STATE_FILE = "phasewatch_state.json"
"""Stands in the folder of a checkpoint."""


def loss_of_model(module: nn.Module, batch: Any) -> Tensor:
    """What a model says of a batch with labels."""
    loss = getattr(module(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(module).__name__} returns no loss for a batch with {', '.join(batch)}; give "
            "PhaseWatchCallback(loss_fn=...), loss_fn(module, batch) -> scalar mean loss."
        )
    return loss


GIVEN_BY_THE_TRAINER = ("module", "batch_sizes", "total_steps", "listeners")
"""Settings of :class:`phasewatch.Watch` that are not the user's."""


def _check_names(settings: Iterable[str]) -> None:
    own = list(inspect.signature(PhaseWatchCallback).parameters)[:-1]
    of_watch = inspect.signature(Watch).parameters
    known = [*own, *(name for name in of_watch if name not in own and name not in GIVEN_BY_THE_TRAINER)]
    for name in settings:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            meant = f" Did you mean {nearest[0]}?" if nearest else ""
            raise TypeError(f"PhaseWatchCallback has no setting {name!r}; there are {', '.join(known)}.{meant}")


class PhaseWatchCallback(TrainerCallback):
    """Watches a run of the Hugging Face ``Trainer`` as :class:`phasewatch.callbacks.PhaseWatch` does one of Lightning.

    ``Trainer(callbacks=[PhaseWatchCallback()])``. The record and a TensorBoard run lie in ``output_dir``. With
    ``logging_steps=1`` the loss of every step is observed, else its mean between two logs. Checkpoints of the trainer
    hold where the watch was; a run that is resumed from one in ``output_dir`` goes on from there. The first process
    measures, and the others wait for it.

    Args:
        schedule: When to measure, as for ``PhaseWatch``.
        probe: Batches to measure on; default ``probe_samples`` samples of the training set, drawn once.
        probe_samples: Size of the probe that is drawn.
        loss_fn: ``loss_fn(module, batch) -> scalar mean loss``; default the ``loss`` that the model returns, a mean
            over the labels that it predicts. What the trainer makes of it, such as label smoothing,
            ``compute_loss_func`` or a mean over another number of tokens, is to be given here.
        outputs_fn: As for ``PhaseWatch``.
        n: Size of the training set, default as found; sets the temperature of λ, nβ = n / log n.
        directory: Where the record is written; default ``output_dir``.
        on_transition: Called with a :class:`phasewatch.transitions.Flag` when a transition is flagged, revised or
            withdrawn.
        seed: Seeds the probe and every measurement.
        on_error: What a failing measurement does: ``"warn"`` once and go on, ``"raise"``, or ``"disable"`` it.
        settings: Others of :class:`phasewatch.Watch`, such as ``estimators``, ``held_out`` or ``max_overhead``.
    """

    def __init__(
        self,
        schedule: Any = "auto",
        probe: Iterable[Any] | None = None,
        probe_samples: int = DEFAULT_SAMPLES,
        loss_fn: LossFn = loss_of_model,
        outputs_fn: OutputsFn | None = None,
        n: int | None = None,
        directory: str | None = None,
        on_transition: Callable[[Flag], Any] | None = None,
        seed: int = 0,
        on_error: OnError = "warn",
        **settings: Any,
    ) -> None:
        """Take the settings; nothing is measured before training begins.

        Raises:
            TypeError: If there is no setting of a name, or one is of a type that cannot be used.
        """
        check_types(
            probe_samples=probe_samples,
            loss_fn=loss_fn,
            outputs_fn=outputs_fn,
            n=n,
            directory=directory,
            seed=seed,
            on_transition=on_transition,
        )
        as_schedule(schedule)
        _check_names(settings)
        self.watch: Watch | None = None
        self._probe = probe
        self._probe_samples = probe_samples
        self._n = n
        self._directory = directory
        self._settings = {
            **settings,
            "schedule": schedule,
            "loss_fn": loss_fn,
            "outputs_fn": outputs_fn,
            "on_transition": on_transition,
            "seed": seed,
            "on_error": on_error,
        }

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Draw the probe and begin the record, or go on with it.

        Raises:
            ValueError: If the parameters are sharded, or what is trained on cannot be drawn from.
        """
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ValueError(
                "PhaseWatchCallback needs whole parameters on each device, and FSDP and DeepSpeed shard them. Train "
                "without them, or measure saved checkpoints afterwards (phasewatch measure)."
            )
        self.watch = None
        if not state.is_world_process_zero:
            return
        batches, sizes, n = self._drawn(train_dataloader)
        directory = Path(self._directory or args.output_dir)
        self.watch = Watch(
            model,
            [_on_device(batch, args.device) for batch in batches],
            batch_sizes=sizes,
            n=self._n or n,
            directory=directory,
            total_steps=state.max_steps if state.max_steps > 0 else None,
            listeners=[TensorBoardWriter(directory)],
            **self._settings,
        )
        if state.global_step:
            self._resume(self.watch, _checkpoint(args, state) / STATE_FILE)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the weights before this step, if a measurement is due."""
        if self.watch is not None:
            self.watch.at(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Read learning rates and, now and then, the norms of gradient, weights and update."""
        if self.watch is not None and optimizer is not None:
            self.watch.observe(state.global_step, getattr(optimizer, "optimizer", optimizer))  # as accelerate wraps it

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Read the loss of the step that was made last, or its mean since the log before."""
        loss = (logs or {}).get("loss")
        if self.watch is not None and loss is not None:
            self.watch.observe(state.global_step - 1, None, loss=float(loss))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Keep the metrics of an evaluation, but for its times."""
        if self.watch is None:
            return
        numbers = {name: value for name, value in (metrics or {}).items() if isinstance(value, (int, float))}
        timed = ("_runtime", "_per_second", "epoch")
        self.watch.observe(state.global_step, None, **{k: v for k, v in numbers.items() if not k.endswith(timed)})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put beside the trainer's checkpoint where the watch is."""
        folder = _checkpoint(args, state)
        if self.watch is not None and folder.is_dir():
            (folder / STATE_FILE).write_text(json.dumps(self.watch.state_dict()), encoding="utf-8")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the end, finish the record and say where it is."""
        if self.watch is None or self.watch.analysis is not None:
            return
        self.watch.close(state.global_step)
        said = "" if self.watch.analysis is None else f"{verdict(self.watch.analysis)}\n"
        print(printable(f"phasewatch: {said}phasewatch analyze {self.watch.run.path}"), file=sys.stderr)

    def _drawn(self, loader: Any) -> tuple[list[Any], list[int] | None, int | None]:
        """Batches of the training set, their sizes, and how many samples it has."""
        if self._probe is not None:
            with isolated():
                return list(self._probe), None, None
        if not hasattr(getattr(loader, "dataset", None), "__len__"):
            raise ValueError(
                "The training set cannot be drawn from, as it has no length; give PhaseWatchCallback(probe=[batches], "
                "n=size of the training set)."
            )
        # The trainer's own loader has samplers of accelerate's; this one is never iterated, and moves no stream.
        size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", 1)
        plain: DataLoader[Any] = DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn)
        probe = draw_probe(plain, self._probe_samples, self._settings["seed"]).without_short_rest()
        return probe.batches, probe.sizes, len(loader.dataset)

    def _resume(self, watch: Watch, file: Path) -> None:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            warnings.warn(
                f"phasewatch: {file} does not say where the watch was ({error}). It watches from here on, into a "
                "record of its own.",
                stacklevel=2,
            )
            return
        watch.load_state_dict(state)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _on_device(batch: Any, device: torch.device) -> Any:
    batch = dict(batch) if hasattr(batch, "keys") else batch
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
