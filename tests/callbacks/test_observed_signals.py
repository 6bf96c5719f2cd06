"""What a trainer gives away at every step reaches the record, in every way of training, and training is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import QUICK, Classifier, ManualClassifier, data, fit, same
from torch import Tensor, nn
from torch.utils.data import DataLoader

from phasewatch import observer
from phasewatch.activity import Activity
from phasewatch.callbacks import HessianMonitor, PhaseWatch
from phasewatch.callbacks.observing import TrainingSignals
from phasewatch.estimators import HessianSpectrum
from phasewatch.record import Observed, load_run


@pytest.fixture(autouse=True)
def norms_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """At steps 0, 10, 20 ... however long they take on this machine."""
    monkeypatch.setattr(observer, "SHARE", 1e9)
    monkeypatch.setattr(observer, "FIRST_READ", 0)
    monkeypatch.setattr(observer, "FIRST_SECONDS", 0.0)


def shuffled() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, shuffle=True)


class Told(Classifier):
    """Keeps what it computes itself: the loss of each batch; at each optimizer step learning rate and gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.gradients: list[Tensor] = []

    def loss_of(self, batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss_of(batch), "extra": 3}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad.double().flatten() for p in self.parameters() if p.grad is not None]
        self.gradients.append(torch.cat([torch.zeros(0), *gradients]))


class ReturnsTensor(Told):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss_of(batch)


class Skips(Told):
    """Every third batch has no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 2 else self.loss_of(batch)


class ManualReturnsLoss(ManualClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        self.losses.append(output["loss"].item())
        return output


class ManualReturnsNothing(Told):
    """Its loss is logged under a name of its own and goes into two backward passes; returned is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss_of(batch)
        self.log("my_own_objective", loss)
        self.manual_backward(0.25 * loss, retain_graph=True)
        self.manual_backward(0.75 * loss)
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]


class TwoOptimizers(pl.LightningModule):
    """An adversary steps every batch, what it plays against every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(6, 1), nn.Linear(6, 1)
        self.losses: tuple[dict[int, float], dict[int, float]] = {}, {}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        step = sum(len(own) for own in self.losses[1:])
        for k, (optimizer, layer) in enumerate(zip(self.optimizers(), (self.one, self.two), strict=True)):  # type: ignore[arg-type]
            if k == 0 and step % 2:
                continue
            optimizer.zero_grad()
            loss = (layer(batch[0]) - 1).square().mean()
            self.losses[k][step] = loss.item()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.one.parameters(), lr=0.1), torch.optim.SGD(self.two.parameters(), lr=0.02)


def cross_entropy(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def of_the_first(module: Any, batch: Any) -> Tensor:
    return (module.one(batch[0]) - 1).square().mean()  # type: ignore[no-any-return]


def run_of(
    make: Callable[[], Any], tmp_path: Path, loss_fn: Any = None, **options: Any
) -> tuple[Any, dict[str, Observed]]:
    """Train; the module as it is at the end, and what was observed."""
    kept: list[Any] = []

    def made() -> Any:
        kept.append(make())
        return kept[0]

    watch = PhaseWatch(schedule=[10**6], directory=str(tmp_path / "record"), loss_fn=loss_fn, **QUICK)
    fit(tmp_path, made, shuffled, watch, **options)
    return kept[0], load_run(tmp_path / "record").observed


@pytest.mark.parametrize("make", [Told, ReturnsTensor])
def test_automatic_optimization(make: Any, tmp_path: Path) -> None:
    module, found = run_of(make, tmp_path, gradient_clip_val=0.01)
    assert found["loss"].steps.tolist() == found["learning_rate"].steps.tolist() == list(range(12))
    np.testing.assert_array_equal(found["loss"].values, np.float32(module.losses))
    np.testing.assert_array_equal(found["learning_rate"].values, np.float32(module.rates))
    assert module.rates[0] == 0.01 and module.rates[-1] == pytest.approx(0.001)  # the scheduler has worked
    lengths = [g.norm().item() for g in module.gradients]
    assert min(lengths) > 0.01  # clipped afterwards
    assert found["gradient_norm"].steps.tolist() == [0, 10]
    np.testing.assert_allclose(found["gradient_norm"].values, [lengths[0], lengths[10]], rtol=1e-5)
    pairs = zip(module.gradients[0::10], module.gradients[1::10], strict=True)
    np.testing.assert_allclose(
        found["gradient_variance"].values, [(a - b).square().sum() / 2 for a, b in pairs], rtol=1e-5
    )
    assert found["update_norm"].steps.tolist() == [0, 10]


@pytest.mark.parametrize(("batches", "groups"), [(2, [2, 2, 2]), (4, [4, 2])])
def test_accumulation(batches: int, groups: list[int], tmp_path: Path) -> None:
    """One value a step, the mean over its batches, also where an epoch ends before it is full."""
    module, found = run_of(Told, tmp_path, accumulate_grad_batches=batches)
    means, at = [], 0
    for size in 2 * groups:
        means.append(np.mean(module.losses[at : at + size]))
        at += size
    assert at == len(module.losses) == 12
    assert found["loss"].steps.tolist() == list(range(len(means)))
    np.testing.assert_allclose(found["loss"].values, means, rtol=1e-6)
    assert found["learning_rate"].steps.tolist() == list(range(len(means)))
    assert found["gradient_norm"].values[0] == pytest.approx(module.gradients[0].norm().item(), rel=1e-5)


def test_where_steps_are_left_out_those_that_are_taken_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third optimizer step of two batches: no batch of another step is in its mean."""
    monkeypatch.setattr(observer, "SHARE", 1e-12)
    monkeypatch.setattr(observer, "ASKING", 0.0)
    monkeypatch.setattr(observer, "FIRST_SECONDS", 1.0)
    monkeypatch.setattr(observer, "THINNED_ANEW", 2)
    monkeypatch.setattr(Activity, "every", lambda *_: 3)
    validation = {"make_validation": lambda: DataLoader(data(), batch_size=8), "check_val_every_n_epoch": 1}
    module, found = run_of(Told, tmp_path, accumulate_grad_batches=2, max_epochs=4, **validation)
    means = np.reshape(module.losses, (-1, 2)).mean(axis=1)
    assert found["loss"].steps.tolist() == found["learning_rate"].steps.tolist() == [0, 1, 3, 6, 9]
    np.testing.assert_allclose(found["loss"].values, means[[0, 1, 3, 6, 9]], rtol=1e-6)
    np.testing.assert_array_equal(found["learning_rate"].values, np.float32(np.array(module.rates)[[0, 1, 3, 6, 9]]))


def test_steps_without_a_loss(tmp_path: Path) -> None:
    module, found = run_of(Skips, tmp_path)
    assert found["loss"].steps.tolist() == [k for k in range(12) if k % 3 != 2]
    np.testing.assert_array_equal(found["loss"].values, np.float32(module.losses))
    assert found["learning_rate"].steps.tolist() == list(range(12))


def test_manual_optimization_that_returns_its_loss(tmp_path: Path) -> None:
    module, found = run_of(ManualReturnsLoss, tmp_path)
    np.testing.assert_array_equal(found["loss"].values, np.float32(module.losses))
    np.testing.assert_array_equal(found["learning_rate"].values, np.float32(0.01 * 0.1 ** np.arange(12)))


def test_manual_optimization_that_returns_nothing(tmp_path: Path) -> None:
    """The sum of what went into its backward passes."""
    module, found = run_of(ManualReturnsNothing, tmp_path, cross_entropy)
    np.testing.assert_allclose(found["loss"].values, module.losses, rtol=1e-6)
    assert found["loss"].steps.tolist() == list(range(12))
    assert found["gradient_norm"].values[0] == pytest.approx(module.gradients[0].norm().item(), rel=1e-5)


def test_several_optimizers(tmp_path: Path) -> None:
    module, found = run_of(TwoOptimizers, tmp_path, of_the_first)
    assert dict(zip(*map(list, found["loss"]), strict=True)) == pytest.approx(module.losses[0])
    assert dict(zip(*map(list, found["loss_1"]), strict=True)) == pytest.approx(module.losses[1])
    assert found["loss"].steps.tolist() == [0, 2, 4, 6, 8, 10]
    assert set(found["learning_rate"].values) == {np.float32(0.1)}
    assert set(found["learning_rate_1"].values) == {np.float32(0.02)}
    assert found["gradient_norm"].steps.tolist() == found["gradient_norm_1"].steps.tolist() == [0, 10]
    assert found["update_norm_1"].steps.tolist() == [0, 10]
    assert "update_norm" not in found  # what came between two of its steps is not one update


def test_metrics_that_the_user_logs_at_validation(tmp_path: Path) -> None:
    class Validated(Told):
        accuracies: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss_of(batch)
            self.log("loss", loss + 100)  # the name of a signal of our own
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                with torch.no_grad():
                    whole = data().tensors
                    self.accuracies.append((self(whole[0]).argmax(1) == whole[1]).float().mean().item())

    validation = {"make_validation": lambda: DataLoader(data(), batch_size=8), "val_check_interval": 2}
    module, found = run_of(Validated, tmp_path, num_sanity_val_steps=2, **validation)
    assert found["val/accuracy"].steps.tolist() == [2, 4, 6, 8, 10, 12]
    np.testing.assert_allclose(found["val/accuracy"].values, module.accuracies, rtol=1e-6)
    np.testing.assert_array_equal(found["loss"].values, np.float32(module.losses))
    assert not {"llc", "llc_behavioral", "nullity", "transitions"} & found.keys()


def test_our_own_metrics_are_not_taken_for_the_users(tmp_path: Path) -> None:
    kept: Any = HessianMonitor(schedule=4, hessian=HessianSpectrum(2), probe_samples=16, on_error="raise")
    fit(tmp_path, Classifier, shuffled, kept, make_validation=lambda: DataLoader(data(), batch_size=8))
    own = {"loss", "learning_rate", "gradient_norm", "weight_norm", "update_norm", "gradient_variance"}
    logged = {"val_loss", "train_loss", "twice", "twice_step", "twice_epoch"}
    assert kept.run.observed.keys() - logged == own | {"gradient_product"}
    assert kept.run.observed["val_loss"].steps.tolist() == [6, 12]
    assert len(kept.run.measurements) >= 3


def test_a_later_validation_leaves_the_record_alone(tmp_path: Path) -> None:
    watch = PhaseWatch(schedule=[10**6], directory=str(tmp_path / "record"), **QUICK)
    module = Classifier()
    trainer = pl.Trainer(max_epochs=1, callbacks=[watch], logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(module, shuffled())
    before = (tmp_path / "record" / "phasewatch.jsonl").read_bytes()
    trainer.validate(module, DataLoader(data(), batch_size=8), verbose=False)
    assert (tmp_path / "record" / "phasewatch.jsonl").read_bytes() == before


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "automatic": (Classifier, {}),
    "accumulation": (Classifier, {"accumulate_grad_batches": 2}),
    "clipping": (Classifier, {"gradient_clip_val": 0.1}),
    "manual": (ManualClassifier, {}),
    "two optimizers": (TwoOptimizers, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_to_the_last_bit(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    plain = fit(tmp_path, make, shuffled, None, max_epochs=4, **options)
    watch: Any = HessianMonitor(
        schedule=[3],
        hessian=HessianSpectrum(2),
        probe_samples=16,
        on_error="raise",
        loss_fn=of_the_first if make is TwoOptimizers else None,
    )
    assert same(plain, fit(tmp_path, make, shuffled, watch, max_epochs=4, **options))
    assert {"loss", "learning_rate", "gradient_norm", "weight_norm"} <= watch.run.observed.keys()


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """What came after the checkpoint is made again, here from other batches."""

    def trainer(epochs: int, watch: PhaseWatch) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs,
            callbacks=[watch, pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=9, save_top_k=-1)],
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
        )

    def watching() -> PhaseWatch:
        return PhaseWatch(schedule=[10**6], directory=str(tmp_path / "record"), **QUICK)

    pl.seed_everything(1, verbose=False)
    first, second = Told(), Told()
    trainer(2, watching()).fit(first, shuffled())
    (checkpoint,) = tmp_path.glob("*step=9.ckpt")
    pl.seed_everything(2, verbose=False)
    trainer(3, watching()).fit(second, shuffled(), ckpt_path=str(checkpoint), weights_only=False)
    found = load_run(tmp_path / "record").observed["loss"]
    assert found.steps.tolist() == list(range(18))
    np.testing.assert_array_equal(found.values, np.float32([*first.losses[:9], *second.losses]))


def test_a_loss_that_is_scaled_for_half_precision_is_scaled_back() -> None:
    """Without a GPU the trainer is a stand-in: its scaler multiplies by 2^16, before the hook is called."""
    scaler = SimpleNamespace(scale=lambda tensor: tensor * 2**16)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    trainer = SimpleNamespace(
        optimizers=[optimizer],
        precision_plugin=SimpleNamespace(scaler=scaler),
        lightning_module=SimpleNamespace(automatic_optimization=False),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=4, _should_accumulate=lambda: False)),
    )
    seen: list[Any] = []
    watch: Any = SimpleNamespace(
        observer=SimpleNamespace(expect=lambda _: None, leaves_out=lambda *_: False),
        observe=lambda *what, **values: seen.append((what, values)),
    )
    signals = TrainingSignals(watch, trainer)
    signals.batch_starts()
    signals.backward_starts(torch.tensor(0.3) * 2**16)
    signals.optimizer_steps(optimizer)
    signals.batch_ends({})
    assert seen == [((4, optimizer), {}), ((4, None), {"loss": torch.tensor(0.3)})]
