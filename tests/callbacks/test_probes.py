"""Which data a callback measures on, where the loss or the batches are not the usual ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import FEW_DRAWS
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from phasewatch.callbacks import PhaseWatch
from phasewatch.estimators import ProbeLoss

SAMPLES = 128


def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 6, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Contrastive(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.network(batch[0])
        return nn.functional.cross_entropy(outputs @ self.network(batch[0] + 0.1).T, torch.arange(len(outputs)))


class OfOneSize(Module):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]) + self.offsets, batch[1])


def fitted(module: pl.LightningModule, loader: Any, path: Path, epochs: int = 1, **settings: Any) -> PhaseWatch:
    watch = PhaseWatch(schedule=10, directory=str(path), on_error="raise", **FEW_DRAWS, **settings)
    watch.estimators = (ProbeLoss("again"),)  # the loss says all that is asked here
    trainer = pl.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        callbacks=[watch],
        accelerator="cpu",
    )
    trainer.fit(module, loader)
    return watch


def mean_of_training_losses(module: Module) -> float:
    """What training sees on the average batch of 16."""
    x, y = tensors()
    with torch.no_grad():
        losses = [module.training_step((a, b), 0) for a, b in zip(x.split(16), y.split(16), strict=True)]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(("kind", "one_batch"), [(Module, True), (Contrastive, False), (OfOneSize, False)])
def test_the_loss_of_the_probe_is_that_of_training(kind: type[Module], one_batch: bool, tmp_path: Path) -> None:
    """All samples are in the probe. Other batches of 16 change a contrastive loss a little, one of 128 by far more."""
    watch = fitted(kind(), DataLoader(TensorDataset(*tensors()), batch_size=16), tmp_path)
    assert watch.run.header["monitors"][0]["probe"]["batches"] == (1 if one_batch else 8)
    measured = watch.run.series("loss").values[0]
    expected = mean_of_training_losses(kind())
    assert measured == pytest.approx(expected, rel=1e-4 if kind is Module else 0.1)


def test_outputs_can_be_given_beside_the_loss_of_them(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*tensors()), batch_size=16)
    functions = {
        "outputs_fn": lambda module, batch: module.network(batch[0]),
        "loss_fn": lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
    }
    given, found = (fitted(Module(), loader, tmp_path / name, **s) for name, s in (("1", functions), ("2", {})))
    assert given.run.series("loss").values == pytest.approx(found.run.series("loss").values, rel=1e-6)
    with pytest.raises(ValueError, match="outputs_fn was given without loss_fn"):
        fitted(Module(), loader, tmp_path / "3", outputs_fn=functions["outputs_fn"])


class Stream(IterableDataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


def test_a_stream_that_never_fills_its_probe_is_measured_on_what_it_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    x, y = tensors()
    batches = list(zip(x.split(8), y.split(8), strict=True))[:5]
    with caplog.at_level("INFO"):
        watch = fitted(Module(), DataLoader(Stream(batches), batch_size=None), tmp_path, epochs=6)
    assert watch.run.header["monitors"][0]["probe"]["samples"] == 40
    assert watch.run.series("loss").steps.tolist() == [5, 10, 20, 30]
    assert "gave 40 samples for the probe, of 512 asked for" in caplog.text + capsys.readouterr().err


@dataclass
class Record:
    rows: Tensor
    table: Tensor
    inputs: Tensor
    labels: Tensor


class OfRecords(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch.inputs, batch.labels), batch_idx)


def records() -> DataLoader[Any]:
    x, y = tensors()
    parts = zip(x.split(16), y.split(16), strict=True)
    return DataLoader(Stream([Record(torch.zeros(3), torch.zeros(5, 2), a, b) for a, b in parts]), batch_size=None)


def test_a_size_that_cannot_be_read_off_a_stream_is_asked_for_and_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lengths 3, 5, 16\. Give it: .*batch_size=\.\.\. to a callback"):
        fitted(OfRecords(), records(), tmp_path / "asked")
    watch = fitted(OfRecords(), records(), tmp_path / "given", batch_size=16)
    assert watch.run.header["monitors"][0]["probe"]["samples"] == SAMPLES
    assert watch.run.series("loss").values[0] == pytest.approx(mean_of_training_losses(Module()), rel=1e-5)
