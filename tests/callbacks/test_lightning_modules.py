"""Lightning's own demos and other people's ways of writing modules, unmodified but for the callback."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import QUICK, fit, same
from pytorch_lightning.demos import transformer
from pytorch_lightning.demos.boring_classes import BoringModel, RandomIterableDataset
from pytorch_lightning.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from phasewatch.callbacks import PhaseWatch


class Tokens(Dataset[Any]):
    """Sequences that repeat a pattern, with their shift by one as targets."""

    vocab_size = 12

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sequence = (torch.arange(9) * (1 + index % 3) + index) % self.vocab_size
        return sequence[:-1], sequence[1:]


class Transformer(LightningTransformer):
    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.model = transformer.Transformer(vocab_size, ninp=32, nhid=32)  # 200 by default, and slow

    def prepare_data(self) -> None:
        """The original downloads a text here; the tokens are generated instead."""


class ConvNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["image"]), batch.pop("label"))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Images(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.randn(1, 8, 8, generator=generator), "label": torch.tensor(index % 3)}


class GAN(pl.LightningModule):
    """Two optimizers, manual optimization, and no loss returned."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_discriminator = self.optimizers()
        for_generator.zero_grad()
        g_loss = nn.functional.softplus(-self.discriminator(self.generator(torch.randn(8, 2)))).mean()
        self.manual_backward(g_loss)
        for_generator.step()
        for_discriminator.zero_grad()
        d_loss = discriminator_loss(self, batch)
        self.manual_backward(d_loss)
        for_discriminator.step()
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss})

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.generator, self.discriminator)]


class GANReturningLoss(GAN):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        return discriminator_loss(self, batch)


def discriminator_loss(module: Any, batch: Any) -> Tensor:
    fake = module.generator(torch.randn(8, 2))
    real = nn.functional.softplus(-module.discriminator(batch[0])).mean()
    return real + nn.functional.softplus(module.discriminator(fake)).mean()


def points() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(32, 2, generator=torch.Generator().manual_seed(0))), batch_size=8)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "BoringModel": (BoringModel, lambda: DataLoader(torch.randn(32, 32), batch_size=4), {}),
    "LightningTransformer": (
        lambda: Transformer(vocab_size=Tokens.vocab_size),
        lambda: DataLoader(Tokens(), batch_size=8),
        {},
    ),
    "BatchNorm convnet": (ConvNet, lambda: DataLoader(Images(), batch_size=8, shuffle=True), {}),
    "GAN with loss_fn": (GAN, points, {"loss_fn": discriminator_loss}),
    "GAN that returns a loss": (GANReturningLoss, points, {}),
    "IterableDataset": (BoringModel, lambda: DataLoader(RandomIterableDataset(32, 24), batch_size=4), {}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if "Transformer" in name else name for name in CASES]
)
def test_plausible_measurements_and_identical_weights(case: str, tmp_path: Any) -> None:
    make_module, make_loader, options = CASES[case]
    plain = fit(tmp_path, make_module, make_loader, None)
    watch = PhaseWatch(schedule=[0, 3, 6], **QUICK, **options)
    watched = fit(tmp_path, make_module, make_loader, watch)
    assert same(plain[0], watched[0]) and same(plain[2:], watched[2:])

    run = watch.run
    num_parameters = run.header["num_parameters"]
    assert [m.step for m in run.measurements][-2:] == [3, 6]
    for name in ("loss", "hessian_max", "hessian_min", "hessian_trace", "nullity_lower", "nullity_upper"):
        assert np.isfinite(run.series(name).values).all(), name
    if "GAN" in case:  # two networks are called in one loss: which outputs are meant is for outputs_fn to say
        assert {failure["what"] for failure in run.failures} >= {"llc_behavioral"}
    else:
        for name in ("llc_behavioral", "llc_behavioral_coarse"):
            assert (run.series(name).values > 0).all(), name
    for coefficient in (m.estimates["llc"] for m in run.measurements):
        assert np.isfinite(coefficient.value) or coefficient.doubts
    largest, smallest = run.series("hessian_max").values, run.series("hessian_min").values
    assert (smallest <= largest).all()
    fewest, most, nullity = (run.series(f"nullity{end}").values for end in ("_lower", "_upper", ""))
    assert ((fewest >= 0) & (fewest <= most) & (most <= num_parameters)).all()
    # A count where the bracket is no wider than 1 % of the parameters, and none where it is.
    known = most - fewest <= 0.01 * num_parameters
    assert ((fewest <= nullity) & (nullity <= most))[known].all() and np.isnan(nullity[~known]).all()
    if case == "BoringModel":  # mean of the squared outputs of a linear layer; every sample is in the probe or its like
        assert (run.series("hessian_min").values > -1e-5 * largest).all()


def test_defaults_need_no_argument(tmp_path: Any) -> None:
    watch = PhaseWatch()
    fit(tmp_path, BoringModel, lambda: DataLoader(torch.randn(64, 32), batch_size=16), watch, max_epochs=1)
    run = watch.run
    assert run.measurements[0].step == 0 and run.measurements[-1].step == 4
    assert not run.failures and run.finished
    assert run.header["n"] == 64


def test_a_module_without_a_loss_is_refused_with_the_mend(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"training_step of GAN returns no loss.*loss_fn=\(module, batch\)"):
        fit(tmp_path, GAN, points, PhaseWatch(**QUICK))


def test_a_loss_that_calls_backward_itself_is_refused_with_the_mend(tmp_path: Any) -> None:
    class CallsBackward(GANReturningLoss):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = discriminator_loss(self, batch)
            loss.backward()
            return loss

    with pytest.raises(ValueError, match="cannot be recomputed.*loss_fn"):
        fit(tmp_path, CallsBackward, points, PhaseWatch(**QUICK))


def test_sharded_strategies_are_refused() -> None:
    class FSDPStrategy:
        pass

    class FakeTrainer:
        strategy = FSDPStrategy()
        callbacks: list[Any] = []

    with pytest.raises(ValueError, match="shards them.*ddp"):
        PhaseWatch().setup(FakeTrainer(), BoringModel(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": []}, "probe is empty"),
        ({"probe_samples": 0}, "probe_samples is 0"),
        ({"loss_fn": lambda module, batch: module(batch).sum() * math.inf}, "finite"),
        ({"loss_fn": lambda module, batch: torch.zeros((), requires_grad=True)}, "does not depend"),
        ({"directory": "/proc/nowhere"}, "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_the_first_step(
    options: dict[str, Any], message: str, tmp_path: Any
) -> None:
    watch = PhaseWatch(**{**QUICK, **options})
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, BoringModel, lambda: DataLoader(torch.randn(32, 32), batch_size=4), watch)


def test_no_trainable_parameters(tmp_path: Any) -> None:
    class Frozen(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer.requires_grad_(False)

        def configure_optimizers(self) -> None:
            return None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.step(batch).requires_grad_()

    with pytest.raises(ValueError, match="no trainable parameters"):
        fit(tmp_path, Frozen, lambda: DataLoader(torch.randn(8, 32), batch_size=4), PhaseWatch(**QUICK))
