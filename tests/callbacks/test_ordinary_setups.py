"""Set-ups of every day: the final weights are those of the run without phasewatch, and its record can be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import FEW_DRAWS, OF_THE_LOSS, data, same
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, WeightAveraging
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from phasewatch.callbacks import PhaseWatch
from phasewatch.record import load_run

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Plain(pl.LightningModule):
    """What every set-up is tried on."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
        self.lr = 0.01
        self.batch_size = batch_size

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0].to(next(self.parameters()).dtype)), batch[1])
        if not torch.compiler.is_compiling():
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), batch_size=self.batch_size, shuffle=True)


class OwnAverage(Plain):
    """Keeps a moving average of the weights as ``torch.optim.swa_utils`` has it, in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.averaged = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.averaged.requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        self.averaged.update_parameters(self.net)


def compiled() -> Any:
    return torch.compile(Plain(), backend="eager")


def tuned(trainer: pl.Trainer, module: Any) -> None:
    tuner = Tuner(trainer)
    tuner.scale_batch_size(module, init_val=2, max_trials=3, steps_per_trial=1)
    tuner.lr_find(module, min_lr=1e-4, max_lr=0.1, num_training=8)
    trainer.fit(module)


def twice(trainer: pl.Trainer, module: Any) -> None:
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module)


def once(trainer: pl.Trainer, module: Any) -> None:
    trainer.fit(module)


class Stops(Callback):
    """Stands for a limit of time that is reached at a step known beforehand."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            timer = next(one for one in trainer.callbacks if type(one).__name__ == "Timer")
            timer._offset = 1e6


Make = Callable[[], Any]
Case = tuple[Make, dict[str, Any], Callable[[], list[Any]], Callable[[pl.Trainer, Any], None], list[int]]
EVERY_THIRD = [0, 3, 6, 9, 12]


def case(
    make: Make = Plain,
    callbacks: Callable[[], list[Any]] = list,
    run: Callable[[pl.Trainer, Any], None] = once,
    steps: list[int] = EVERY_THIRD,
    **options: Any,
) -> Case:
    return make, options, callbacks, run, steps


CASES: dict[str, Case] = {
    "bf16-true": case(precision="bf16-true"),
    "16-true": case(precision="16-true"),
    "accumulation and clipping": case(accumulate_grad_batches=2, gradient_clip_val=0.1, steps=[0, 3, 6]),
    "an average of the weights": case(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "an average that is trained with in validation": case(callbacks=lambda: [WeightAveraging()]),
    "an average of one's own": case(OwnAverage),
    "a compiled module": case(compiled),
    "limit_train_batches": case(limit_train_batches=2, max_epochs=3, steps=[0, 3, 6]),
    "a share of the batches": case(limit_train_batches=0.5, steps=[0, 3, 6]),
    "max_time": case(max_time={"hours": 1}, callbacks=lambda: [Stops()], steps=[0, 3]),
    "overfit_batches": case(overfit_batches=1, max_epochs=4, steps=[0, 3]),
    "barebones": case(barebones=True),
    "fit twice": case(run=twice, steps=[0, 3, 6, 9, 12, 15, 18]),
    "tuner": case(run=tuned),
}


def trained(chosen: Case, root: Path, *watch: PhaseWatch) -> tuple[dict[str, Any], pl.Trainer]:
    make, options, callbacks, run, _ = chosen
    pl.seed_everything(7, verbose=False)
    module = make()
    quiet = {key: value for key, value in QUIET.items() if not (options.get("barebones") and key != "accelerator")}
    trainer = pl.Trainer(
        **{"max_epochs": 2, **quiet, **options},
        callbacks=[*callbacks(), *watch],
        default_root_dir=str(root),
    )
    run(trainer, module)
    # numpy, by which they are compared, knows no bfloat16; float32 holds every value of it
    weights = {
        name: value.float() if value.is_floating_point() else value for name, value in module.state_dict().items()
    }
    return weights, trainer


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
def test_weights_are_those_without_it_and_the_record_is_one(name: str, tmp_path: Path) -> None:
    chosen = CASES[name]
    plain, _ = trained(chosen, tmp_path / "plain")
    watch = PhaseWatch(schedule=3, **OF_THE_LOSS)
    watched, trainer = trained(chosen, tmp_path / "watched", watch)
    assert same(plain, watched)
    run = watch.run
    assert [m.step for m in run.measurements] == chosen[-1]
    assert run.finished and not run.failures
    assert all(math.isfinite(value) for value in (*run.series("llc").values, *run.series("effective_rank").values))
    assert run.path is not None and load_run(run.path).measurements == run.measurements
    assert trainer.callback_metrics["llc"] == pytest.approx(run.series("llc").values[-1])


class LowRank(nn.Module):
    """An adapter by hand, its base a buffer: what ``peft`` makes of a linear layer, without a frozen parameter."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach().clone())
        self.register_buffer("bias", base.bias.detach().clone())
        self.down, self.up = nn.Parameter(down.detach().clone()), nn.Parameter(up.detach().clone())
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        base = nn.functional.linear(inputs, self.weight, self.bias)
        return base + nn.functional.linear(nn.functional.linear(inputs, self.down), self.up) * self.scale


def test_of_an_adapter_what_is_trained_is_measured_and_that_is_stated(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Plain:
        module = Plain()
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=False)
        module.net = peft.get_peft_model(module.net, config)
        pl.seed_everything(8, verbose=False)  # that the order of batches does not depend on how it was made
        return module

    def by_hand() -> Plain:
        other = adapted()
        module = Plain()
        layers = [layer for layer in other.modules() if hasattr(layer, "lora_A") and isinstance(layer, nn.Module)]
        for place, layer in zip((0, 2), layers, strict=True):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            module.net[place] = LowRank(layer.base_layer, down, up, layer.scaling["default"])
        pl.seed_everything(8, verbose=False)
        return module

    def watched(make: Make) -> tuple[dict[str, Any], Any]:
        watch = PhaseWatch(schedule=[0, 6], **{**OF_THE_LOSS, **FEW_DRAWS})
        weights, _ = trained(case(make), tmp_path, watch)
        return weights, watch.run

    weights, run = watched(adapted)
    assert same(weights, trained(case(adapted), tmp_path)[0])
    assert run.header["num_parameters"] == 2 * (6 + 6) + 2 * (6 + 2)
    assert run.header["num_frozen"] == 6 * 6 + 6 + 6 * 2 + 2
    _, twin = watched(by_hand)
    assert (twin.header["num_parameters"], twin.header["num_frozen"]) == (run.header["num_parameters"], 0)
    for name in ("loss", "llc", "llc_behavioral"):
        assert run.series(name).values.tolist() == pytest.approx(twin.series(name).values.tolist(), rel=1e-4), name
