"""Modules and runs that the callback tests share."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from phasewatch.callbacks import PhaseWatch
from phasewatch.estimators import BehavioralCoefficient, HessianSpectrum, LearningCoefficient

FEW_DRAWS: dict[str, Any] = {
    "behavioral": BehavioralCoefficient(chains=2, draws=32, burn_in=20),
    "llc": LearningCoefficient(chains=2, draws=6, burn_in=20),
}
QUICK: dict[str, Any] = {
    **FEW_DRAWS,
    "hessian": HessianSpectrum(num_eigenvalues=2),
    "probe_samples": 16,
    "on_error": "raise",
}
LEAN: dict[str, Any] = {
    "behavioral": BehavioralCoefficient(sampled="none"),
    "llc": None,
    "hessian": None,
    "zeros": None,
    "probe_samples": 16,
    "on_error": "raise",
}
"""Measured without chains, in a tenth of the time: for tests that hold whatever is measured."""
OF_THE_LOSS: dict[str, Any] = {**LEAN, "llc": FEW_DRAWS["llc"]}
EVERY_ESTIMATOR: dict[str, Any] = {**QUICK, "behavioral": LEAN["behavioral"]}
"""All estimators, in half the time of ``QUICK``: chains of the loss alone, beside effective ranks of the function."""


def data(samples: int = 48, seed: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long())


class Augmented(Dataset[Any]):
    """A data set whose items draw from every global random stream."""

    def __init__(self) -> None:
        self.data = data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.data[index]
        return inputs + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand()), target


class Classifier(pl.LightningModule):
    """BatchNorm, dropout, a tied weight, a frozen parameter, logging, a metric of its own and Python state."""

    def __init__(self, dropout: float = 0.0, freeze_norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout))
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.body[0].weight
        self.head = nn.Linear(6, 2)
        self.frozen = nn.Linear(6, 2).requires_grad_(False)
        self.calls: list[int] = []
        if freeze_norm:
            self.body[1].eval()

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.tied(self.body(inputs))
        return self.head(features) + self.frozen(features)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.calls.append(batch_idx)
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        self.log_dict({"twice": 2 * loss}, on_step=True, on_epoch=True)
        return {"loss": loss, "extra": loss.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class ManualClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        output = super().training_step(batch, batch_idx)
        self.manual_backward(output["loss"])
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        self.lr_schedulers().step()
        return output


class Recorder(Callback):
    """Sees the run from outside: batch order, module modes, hooks."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0].sum().item() if isinstance(batch, (list, tuple)) else 0)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append(batch[0].sum().item())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([m.training for m in pl_module.modules()])
        self.seen.append([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.modules()])
        self.seen.append(sorted(vars(pl_module)))
        self.seen.append([None if p.grad is None else p.grad.sum().item() for p in pl_module.parameters()])


def fingerprint(module: pl.LightningModule, trainer: pl.Trainer, recorder: Recorder) -> list[Any]:
    """Everything about a finished run that watching must not change."""
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    streams = [torch.get_rng_state(), np.random.get_state(), random.getstate()]
    return [dict(module.state_dict()), getattr(module, "calls", None), optimizers, streams, recorder.seen]


def same(left: Any, right: Any) -> bool:
    """Equality to the last bit through containers."""
    if isinstance(left, (Tensor, np.ndarray)):
        return bool(np.array_equal(np.asarray(left), np.asarray(right)))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def fit(
    tmp_path: Any,
    make_module: Any,
    make_loader: Any,
    watch: PhaseWatch | None,
    make_validation: Any = None,
    **trainer_options: Any,
) -> list[Any]:
    """Train from a fixed seed and return the fingerprint."""
    pl.seed_everything(7, verbose=False)
    module = make_module()
    loader = make_loader()
    recorder = Recorder()
    callbacks = [recorder] if watch is None else [recorder, watch]
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
        **trainer_options,
    }
    trainer = pl.Trainer(callbacks=callbacks, **options)
    trainer.fit(module, loader, make_validation() if make_validation else None)
    return fingerprint(module, trainer, recorder)
