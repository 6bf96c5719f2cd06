"""A callback that measures: where its probes come from, its loss and its schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any, Literal

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from phasewatch.callbacks.kept_probes import fits_into_checkpoint, kept_on_device, restored_probe
from phasewatch.callbacks.places import checked_name
from phasewatch.callbacks.training_step import ADVICE, TrainingStepLoss, returns_nothing
from phasewatch.callbacks.watching import WatchingCallback
from phasewatch.estimators import BehavioralCoefficient, Estimator, checked_estimators
from phasewatch.estimators.enough import ROWS
from phasewatch.failing import OnError
from phasewatch.isolation import isolated
from phasewatch.measure import Probe
from phasewatch.monitor import Monitor
from phasewatch.objective import LossFn, NoOutputsError, OutputsFn
from phasewatch.objective.batches import UnknownSizeError, clone_batch, count_samples
from phasewatch.objective.merging import one_batch_serves
from phasewatch.price import size_of
from phasewatch.probe import DEFAULT_SAMPLES, DrawnProbe, StreamProbe, batch_size_of, draw_probe, support
from phasewatch.record.signals import HELD_OUT
from phasewatch.schedule import FREE_SECONDS, as_schedule
from phasewatch.settings import check_types
from phasewatch.watch import CHECKED_AT_THE_START

LARGEST_IN_ONE_BATCH = 100_000
"""Parameters up to which the probe may be one batch, see :meth:`MonitoringCallback._draw`. Chosen."""


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

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse at once what cannot work.

        Raises:
            ValueError: As the base does, or if the loss cannot come out of ``training_step``.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.loss_fn is None and returns_nothing(type(pl_module).training_step):
            raise ValueError(f"training_step of {type(pl_module).__name__} returns no loss. {ADVICE}")

    def _state(self) -> dict[str, Any]:
        """That of the run, and the held-out samples: a validation set that is split off anew would hold others."""
        kept = {
            what: None if drawn is None else (drawn.batches, drawn.sizes)
            for what, drawn in self._drawn.items()
            if drawn is None or fits_into_checkpoint(drawn.batches)
        }
        return {**super()._state(), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the run starts."""
        of_run = dict(state_dict)
        if HELD_OUT in of_run:
            kept = of_run.pop(HELD_OUT)
            probe = restored_probe(kept, HELD_OUT)
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
            kept_on_device(trainer, drawn.batches), "drawn from the validation loader", drawn.sizes
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
        if count > LARGEST_IN_ONE_BATCH or self.mode != "eval" or probe.sizes is None:
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


def _to_device(trainer: Any, batch: Any) -> Any:
    """The batch as ``training_step`` would get it, in memory of its own."""
    module = trainer.lightning_module
    batch = clone_batch(trainer.precision_plugin.convert_input(batch))
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
