"""What a trainer computes at every step, passed on as it comes: losses, what optimizers give away, logged metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from phasewatch.watch import Watch

AT_EVERY_STEP = ("loss", "learning_rate", "gradient_norm", "weight_norm", "update_norm")
"""Metrics logged under these names are not taken: they would stand among what is observed at every step."""


class TrainingSignals:
    """Follows a trainer through the hooks of a batch, with one value of everything for each step.

    The loss is what ``training_step`` returned, averaged over the batches that were accumulated; where it returns
    none, as in manual optimization, the sum of what was passed to ``manual_backward`` since the optimizer stepped
    last: ``loss`` for the first optimizer of the trainer, ``loss_1`` for the second, and so on.
    """

    def __init__(self, watch: Watch, trainer: Any) -> None:
        """Nothing has happened yet.

        Args:
            watch: Observes.
            trainer: A Lightning trainer, at the start of training.
        """
        watch.observer.expect(trainer.optimizers)
        self._observe = watch.observe
        self._trainer = trainer
        self._epoch_loop = trainer.fit_loop.epoch_loop
        self._step = self._epoch_loop._batches_that_stepped
        self._leaves_out = watch.observer.leaves_out
        self._is_left_out = False
        self._returned: list[Tensor] = []
        self._backwards: list[Tensor] = []
        self._of_optimizers: dict[str, Tensor] = {}
        self._losses: Collection[str] = ()

    def batch_starts(self) -> None:
        """A batch is about to be trained on."""
        self._step = self._epoch_loop._batches_that_stepped
        self._is_left_out = self._leaves_out(self._step, self._losses)

    def backward_starts(self, loss: Tensor) -> None:
        """A gradient is about to be taken of ``loss``."""
        if self._is_left_out or self._trainer.lightning_module.automatic_optimization:
            return
        plain = loss.detach().clone()
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        # in mixed precision it is scaled by then; dividing by get_scale() would wait for the device
        self._backwards.append(plain if scaler is None else plain / scaler.scale(torch.ones_like(plain)))

    def optimizer_steps(self, optimizer: Any) -> None:
        """An optimizer is about to step with the gradients that are there."""
        if self._is_left_out:
            return
        self._observe(self._step, optimizer)
        if self._backwards:
            index = self._trainer.optimizers.index(optimizer) if optimizer in self._trainer.optimizers else 0
            total, self._backwards = sum(self._backwards[1:], self._backwards[0]), []
            self._of_optimizers[f"loss_{index}" if index else "loss"] = total

    def batch_ends(self, outputs: Any) -> None:
        """A batch was trained on.

        Args:
            outputs: Of ``training_step``, as the trainer gives them to its callbacks.
        """
        if self._is_left_out:
            return
        module = self._trainer.lightning_module
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # the trainer has divided it by the number of batches that are accumulated
            parts = self._trainer.accumulate_grad_batches if module.automatic_optimization else 1
            self._returned.append(loss.detach() * parts if parts > 1 else loss.detach())
        if self._epoch_loop._should_accumulate():
            return
        returned, of_optimizers = self._returned, self._of_optimizers
        self._returned, self._of_optimizers = [], {}
        losses = of_optimizers
        if returned:
            losses = {"loss": returned[0] if len(returned) == 1 else sum(returned[1:], returned[0]) / len(returned)}
        if losses:
            self._losses = losses.keys()
            self._observe(self._step, None, **losses)

    def validation_ends(self, own: Collection[str]) -> None:
        """Pass on the metrics that the user has logged, by their names.

        Args:
            own: Names that phasewatch itself has put among them.
        """
        logged = self._trainer.callback_metrics
        metrics = {name: value for name, value in logged.items() if name not in own and name not in AT_EVERY_STEP}
        # the trainer counts the step that it has just made after this validation
        made = self._epoch_loop._batches_that_stepped + (not self._epoch_loop._should_accumulate())
        self._observe(made, None, **metrics)
