"""Lightning modules and data that a command can name, for runs that are measured after their end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

from phasewatch.callbacks import PhaseWatch
from phasewatch.estimators import BehavioralCoefficient, HessianSpectrum


def lean(on_held_out: bool = False, **settings: Any) -> PhaseWatch:
    """Quick; what is measured on held-out samples takes longer."""
    behavioral = BehavioralCoefficient(sampled="none") if on_held_out else None
    hessian = HessianSpectrum(num_eigenvalues=2)
    chosen = {"schedule": [4, 8, 12], "probe_samples": 16, "seed": 5, "on_error": "raise", **settings}
    return PhaseWatch(behavioral=behavioral, llc=None, hessian=hessian, zeros=None, **chosen)


class Module(pl.LightningModule):
    """Its loss is another one in every epoch and at every step."""

    def __init__(self, outputs: int, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(3, outputs), nn.BatchNorm1d(outputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = 1 + self.current_epoch + 0.01 * self.trainer.global_step
        loss = weight * nn.functional.mse_loss(self.network(batch[0]).sum(dim=1), batch[1])
        self.log("train_loss", loss)
        self.logger.experiment.add_scalar("own", 1.0, 0)  # a logger that can do this, or everything
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.network(batch[0]).sum(dim=1), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Wider(Module):
    def __init__(self, outputs: int, more: int = 1, lr: float = 0.1) -> None:
        super().__init__(outputs + more, lr)


class OfTwoOptimizers(Module):
    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.network]


class ByDictionary(Module):
    """All hyper-parameters in one argument."""

    def __init__(self, hparams: Any) -> None:
        super().__init__(hparams["outputs"])
        self.save_hyperparameters(hparams)


class Data(pl.LightningDataModule):
    """Split at random when it is set up."""

    def __init__(self, samples: int = 50, seed: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        samples, seed = self.hparams["samples"], self.hparams["seed"]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(samples, 3, generator=generator)
        drawn = torch.Generator().manual_seed(seed) if seed is not None else torch.default_generator
        self.train, self.val = random_split(TensorDataset(x, x[:, 0] * x[:, 1]), [0.6, 0.4], generator=drawn)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=4)


class Lost(Data):
    """Whose samples have been moved meanwhile."""

    def setup(self, stage: str) -> None:
        open("no/such/samples.csv")  # noqa: SIM115


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(24):
            yield torch.randn(3, generator=generator), torch.randn((), generator=generator)


def stream() -> Any:
    return DataLoader(Stream(), batch_size=4)


class WithoutSavedArguments(Module):
    def __init__(self, outputs: int) -> None:
        pl.LightningModule.__init__(self)
        self.network = nn.Sequential(nn.Linear(3, outputs), nn.BatchNorm1d(outputs))


no_class = 3
