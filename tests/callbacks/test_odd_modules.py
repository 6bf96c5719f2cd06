"""Modules of every make, as people write them: measured, and trained on as if nobody looked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import same
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.demos.boring_classes import ManualOptimBoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from phasewatch.callbacks import HessianMonitor
from phasewatch.estimators import HessianSpectrum

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(48, 6, generator=GENERATOR)
TARGETS = (INPUTS[:, 0] > 0).long()


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=8)


class Scaled(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.scale * super().training_step(batch, batch_idx)


class MadeOnTrainStart(Scaled):
    def on_train_start(self) -> None:
        self.scale = 1.0


class MadeOnEpochStart(Scaled):
    def on_train_epoch_start(self) -> None:
        self.scale = 1.0


class MadeOnBatchStart(Scaled):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.scale = 1.0


class Lambda(Plain):
    training_step = lambda self, batch, batch_idx: nn.functional.cross_entropy(self.net(batch[0]), batch[1])  # noqa: E731


class TakesAnIterator(Plain):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2))


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.forward = torch.compile(self.net.forward, backend="aot_eager")  # type: ignore[method-assign]


class CallsCompiled(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return compiled_loss(self.net(batch[0]), batch[1])


compiled_loss = torch.compile(nn.functional.cross_entropy, backend="aot_eager")


class Manual(Plain):
    """Asserts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(optimizer.optimizer, torch.optim.SGD)
        assert type(self.optimizers(use_pl_optimizer=False).param_groups) is list
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss


class FixedBatchSize(Plain):
    """A hidden state of the batch's size, kept from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(8, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = torch.tanh(self.net[0](batch[0]) + 0.1 * self.hidden)
        self.hidden = hidden.detach()
        return nn.functional.cross_entropy(self.net[2](hidden), batch[1])


def trained(make: Any, tmp_path: Path, watch: HessianMonitor | None) -> dict[str, Tensor]:
    pl.seed_everything(7, verbose=False)
    module = make()
    trainer = pl.Trainer(
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        limit_val_batches=0,
        default_root_dir=str(tmp_path),
        callbacks=[] if watch is None else [watch],
    )
    trainer.fit(module)
    return dict(module.state_dict())


def watching() -> HessianMonitor:
    return HessianMonitor(schedule=2, hessian=HessianSpectrum(2), probe_samples=32, on_error="raise")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The trace at each step."""
    twin = watching()
    trained(Plain, tmp_path_factory.mktemp("plain"), twin)
    return {m.step: m.estimates["hessian_trace"].value for m in twin.run.measurements}


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (MadeOnTrainStart, [0, 2, 4]),
        (MadeOnEpochStart, [0, 2, 4]),
        (MadeOnBatchStart, [1, 2, 4]),
        (Lambda, [0, 2, 4]),
        (TakesAnIterator, [0, 2, 4]),
        (Lazy, [1, 2, 4]),
        (Compiled, [0, 2, 4]),
        (CallsCompiled, [0, 2, 4]),
        (Manual, [0, 2, 4]),
    ],
)
def test_measured_as_its_plain_twin_is(make: Any, steps: list[int], plain: dict[int, float], tmp_path: Path) -> None:
    watch = watching()
    weights = trained(make, tmp_path, None)
    assert same(weights, trained(make, tmp_path, watch))
    if make is not Lazy:  # whose weights are drawn in another order
        found = {m.step: m.estimates["hessian_trace"].value for m in watch.run.measurements}
        assert [found[step] for step in (2, 4)] == pytest.approx([plain[step] for step in (2, 4)], rel=1e-4)
    assert [m.step for m in watch.run.measurements] == steps and not watch.run.failures


@pytest.mark.parametrize("make", [ManualOptimBoringModel, FixedBatchSize])
def test_measured_and_trained_on_alike(make: Any, tmp_path: Path) -> None:
    weights, watch = trained(make, tmp_path, None), watching()
    assert same(weights, trained(make, tmp_path, watch))
    assert [m.step for m in watch.run.measurements] == [0, 2, 4] and not watch.run.failures


class Embedded(Plain):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6, sparse=sparse)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = self.embedding((3 * batch[0][:, 0].abs()).long().clamp(max=9))
        return nn.functional.cross_entropy(self.net(features), batch[1])


def test_an_embedding_with_sparse_gradients_is_measured_as_one_without(tmp_path: Path) -> None:
    sparse, dense = watching(), watching()
    weights = trained(lambda: Embedded(True), tmp_path, None)
    assert same(weights, trained(lambda: Embedded(True), tmp_path, sparse))
    trained(lambda: Embedded(False), tmp_path, dense)
    traces = [watch.run.series("hessian_trace").values.tolist() for watch in (sparse, dense)]
    assert traces[0] == pytest.approx(traces[1], rel=1e-4) and not sparse.run.failures


class NeverComputable(Plain):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx >= 0:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [AssertionError(), StopIteration("x"), KeyError("x"), TypeError("x"), OSError("x")])
def test_whatever_is_raised_the_user_reads_what_to_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"cannot be recomputed \({type(error).__name__}: .*Pass loss_fn="):
        trained(lambda: NeverComputable(error), tmp_path, watching())


def test_what_is_waited_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trained(MadeOnBatchStart, tmp_path, watching())
    assert sum("no attribute 'scale', so that the loss cannot be computed there" in m for m in caplog.messages) == 1
