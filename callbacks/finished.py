"""A finished run of Lightning, whose checkpoints are measured where it began to train."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phasewatch.callbacks.remade import Remade, base_of, framework_of, of_checkpoint, of_config
from phasewatch.sweep.source import First, Take, look_here
from phasewatch.watch import Watch


class _Measured(Exception):
    """Ends the fit in which a finished run was measured."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of Lightning, to be measured by :func:`phasewatch.measure_checkpoints`.

    The trainer begins to fit as it did then, with all hooks of module and data, and the probes are drawn by the
    callback's own code; before the first batch is trained on, the checkpoints are measured instead. Nothing is
    logged or saved.

    Attributes:
        config: The ``config.yaml`` that LightningCLI saved; module, data, trainer and callback are those in it.
        module: A LightningModule class, or where it is (``"package.module:Class"``). It is made with the
            hyper-parameters in the first checkpoint. Beside a config only where that names no class.
        data: A LightningDataModule class, or a function that returns one or a loader, or where it is. Not needed where
            the module has its own; beside a config only where that names no class.
        watch: The callback, or a function that returns it, or where that is; default that in the config, else
            ``PhaseWatch()``.
        trainer: Settings of the trainer, such as ``{"accelerator": "cpu"}``.
    """

    config: str | os.PathLike[str] | None = None
    module: Any = None
    data: Any = None
    watch: Any = None
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def give(self, take: Take, first: First) -> None:
        """Begin to fit, and have ``take`` use what is there.

        Raises:
            ValueError: If config, module or data cannot be found or made, or nothing is trained on.
            TypeError: If they are something else than they should be.
            ImportError: If a config is given and jsonargparse is not installed.
        """
        look_here()
        if self.config is not None:
            made = of_config(Path(self.config), self.module, self.data, self.watch)
        else:
            made = of_checkpoint(first(), self.module, self.data, self.watch)
        raised: list[BaseException] = []
        framework = framework_of(type(made.module))
        callbacks = [one for one in made.callbacks if one.name == made.callbacks[0].name]  # those that share a watch
        with _quiet():
            trainer = framework.Trainer(
                callbacks=callbacks,
                logger=importlib.import_module(f"{framework.__name__}.loggers.logger").DummyLogger(),
                devices=1,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **{**made.settings, **self.trainer},
            )

            def measure(watch: Watch) -> None:
                try:
                    take(watch, partial(_restore, trainer, made.module))
                except BaseException as error:
                    raised.append(error)
                raise _Measured

            callbacks[0].instead_of_training = measure
            try:
                _fit(trainer, made)
            except _Measured:
                if raised:
                    raise raised[0] from None
                return
            except (ValueError, TypeError, ImportError):  # of ours, or as clear
                raise
            except Exception as error:
                raise ValueError(
                    f"Training cannot begin as it did then ({type(error).__name__}: {error}). If that is for want of "
                    "the data, run the command where the run was started, or give a data module that knows where "
                    "they are."
                ) from error
            finally:
                callbacks[0].instead_of_training = None
        raise ValueError(
            "Training ends before its first batch with these settings, so that no probe could be drawn; give the data "
            "and the settings that the run was trained with."
        )


def _fit(trainer: Any, made: Remade) -> None:
    """Fit on a data module, on loaders, or on what the module has itself."""
    module, data = made.module, made.data
    base = base_of(type(module))
    if type(module).configure_optimizers is base.configure_optimizers:
        # LightningCLI may have given it an optimizer from the outside; nothing is trained here.
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    if hasattr(data, "setup"):
        trainer.fit(module, datamodule=data)
    elif isinstance(data, tuple):
        trainer.fit(module, *data)
    elif data is not None:
        trainer.fit(module, data)
    elif type(module).train_dataloader is base.train_dataloader:
        raise ValueError(
            f"{type(module).__name__} has no train_dataloader of its own, and no data was given; give --data "
            "package.module:Class, the LightningDataModule that it was trained on, or a function that returns a loader."
        )
    else:
        trainer.fit(module)


def _restore(trainer: Any, module: Any, content: Any, step: int) -> None:
    """Bring trainer and module to where they were, as Lightning does before it loads the weights."""
    if not isinstance(content, Mapping) or "pytorch-lightning_version" not in content:
        return
    loop = trainer.fit_loop
    if "fit_loop" in (content.get("loops") or {}):
        loop.load_state_dict(content["loops"]["fit_loop"])
        loop.epoch_loop._batches_that_stepped = step
        if loop.epoch_loop.batch_progress.is_last_batch:  # a watch measures before the next batch, in the next epoch
            epochs = loop.epoch_progress.current
            epochs.processed = epochs.completed = epochs.ready
    module.on_load_checkpoint(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning tells nothing of a training that does not happen; what phasewatch says through it is heard."""

    def is_ours(record: logging.LogRecord) -> bool:
        return record.getMessage().startswith("phasewatch")

    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in ("lightning.pytorch", "pytorch_lightning")]
    for logger in loggers:
        logger.addFilter(is_ours)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning)\.")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_ours)
