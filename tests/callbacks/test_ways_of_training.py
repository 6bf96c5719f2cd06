"""Trainer options, samplers and stateful modules: none of them may tell a watched run from an unwatched one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_cases import EVERY_ESTIMATOR, LEAN, Classifier, data, fit, same
from pytorch_lightning.callbacks import LearningRateMonitor, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from phasewatch.callbacks import PhaseWatch


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from data()


class Counting(nn.Module):
    """Keeps Python state and a moving average, as many people's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.calls = 0
        self.seen: dict[str, Tensor] = {}
        self.register_buffer("average", torch.zeros(6))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        self.calls += 1
        self.seen["last"] = outputs
        if self.training:
            self.average.mul_(0.9).add_(0.1 * outputs.detach().mean(0))
        return outputs


class Free(Classifier):
    """Another body, arguments by other names, and losses kept with their graphs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(layer, nn.Tanh())
        self.tied = nn.Linear(6, 6)
        self.kept: list[Tensor] = []

    def training_step(self, samples: Any, number: int) -> Tensor:  # type: ignore[override]
        loss = super().training_step(samples, number)["loss"]
        self.kept.append(loss)
        assert self.trainer.global_step >= 0 and self.current_epoch >= 0 and self.optimizers() is not None
        return loss


class Skipping(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


class Plateau(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def shuffled() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, shuffle=True)


LAYERS = {
    "counting": Counting,
    "weight norm by hook": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "spectral norm by hook": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "weight norm parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "spectral norm parametrized": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
}

LOADERS = {
    "sampler of batches": lambda: DataLoader(data(), batch_sampler=BatchSampler(RandomSampler(data()), 8, False)),
    "weighted": lambda: DataLoader(data(), 8, sampler=WeightedRandomSampler(torch.ones(48), 48)),
    "subset": lambda: DataLoader(data(), 8, sampler=SubsetRandomSampler(range(24))),
    "stream": lambda: DataLoader(Stream(), 8),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"precision": "bf16-mixed"},
    "float64": {"precision": "64-true"},
    "overfit batches": {"overfit_batches": 2},
    "reloading": {"reload_dataloaders_every_n_epochs": 1},
    "fast_dev_run": {"fast_dev_run": True},
    "anomalies": {"detect_anomaly": True},
}


def identical(
    tmp_path: Any,
    make_module: Any,
    make_loader: Any = shuffled,
    settings: dict[str, Any] = EVERY_ESTIMATOR,
    **options: Any,
) -> PhaseWatch:
    watch = PhaseWatch(schedule=[0, 3], **settings)
    unwatched = fit(tmp_path, make_module, make_loader, None, **options)
    assert same(unwatched, fit(tmp_path, make_module, make_loader, watch, **options))
    assert watch.run.measurements and all(measurement.estimates for measurement in watch.run.measurements)
    return watch


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_with_state(layer: str, tmp_path: Any) -> None:
    identical(tmp_path, lambda: Free(LAYERS[layer]()))


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders(loader: str, tmp_path: Any) -> None:
    identical(tmp_path, Classifier, LOADERS[loader], LEAN)


@pytest.mark.parametrize("option", OPTIONS)
def test_trainer_options(option: str, tmp_path: Any) -> None:
    identical(tmp_path, Classifier, **OPTIONS[option])


def test_steps_without_a_loss(tmp_path: Any) -> None:
    identical(tmp_path, Skipping)


def test_a_scheduler_that_looks_at_a_metric(tmp_path: Any) -> None:
    identical(tmp_path, Plateau, make_validation=lambda: DataLoader(data(), batch_size=8))


def test_a_sampler_of_batches_is_drawn_from_what_it_samples() -> None:
    from phasewatch.probe import draw_probe, support

    half = BatchSampler(SubsetRandomSampler(range(24)), 8, drop_last=False)
    loader = DataLoader(data(), batch_sampler=half)
    assert support(loader) == list(range(24))
    batches = draw_probe(loader, samples=16).batches
    assert [tuple(batch[0].shape) for batch in batches] == [(8, 6), (8, 6)]
    rows = torch.cat([batch[0] for batch in batches])
    first_half = data().tensors[0][:24]
    assert all((first_half == row).all(dim=1).any() for row in rows)


def test_other_callbacks_that_change_weights(tmp_path: Any) -> None:
    def run(*watch: PhaseWatch) -> dict[str, Tensor]:
        import pytorch_lightning as pl

        pl.seed_everything(7, verbose=False)
        module = Classifier()
        trainer = pl.Trainer(
            max_epochs=3,
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=[StochasticWeightAveraging(1e-2, swa_epoch_start=1), LearningRateMonitor(), *watch],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, shuffled())
        return dict(module.state_dict())

    assert same(run(), run(PhaseWatch(schedule=[0, 7, 13], **EVERY_ESTIMATOR)))
