"""A trainer does not wait for a measurement that takes long: its first state is kept, and measured in its own time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import Classifier, data, fit, same
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from phasewatch import price
from phasewatch.callbacks import PhaseWatch
from phasewatch.estimators import Price, Reading, Size
from phasewatch.objective import Objective
from phasewatch.record import Estimate, Signal, load_run
from phasewatch.record.signals import CATALOGUE

STEPS, STEP_SECONDS, SECONDS = 120, 10.0, 10.0


@dataclass(frozen=True)
class Slow:
    """How large the weights are; says that it takes 10 s, and moves the clock by what it takes."""

    clock: Any
    takes: float = SECONDS
    name: str = "slow"

    def price(self, size: Size) -> Price:
        return Price(gradients=SECONDS)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.clock.now += self.takes
        torch.rand(3)
        return Reading({"size": Estimate(float(objective.parameters.norm()))})


class Outside(Callback):
    """Moves the clock, and looks at the run from outside before each step."""

    def __init__(self, clock: Any, watch: PhaseWatch) -> None:
        self.clock, self.watch = clock, watch
        self.measured: dict[int, int] = {}
        self.sizes: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.measured[trainer.global_step] = len(self.watch.run.measurements)
        with torch.no_grad():
            trainable = [p.flatten() for p in pl_module.parameters() if p.requires_grad]
            self.sizes[trainer.global_step] = float(torch.cat(trainable).norm())

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.now += STEP_SECONDS


@pytest.fixture
def clock(monkeypatch: Any) -> Any:
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr("phasewatch.watch.time", fake)
    monkeypatch.setattr("phasewatch.measuring_time.time", fake)
    monkeypatch.setattr("phasewatch.measure.time", fake)
    monkeypatch.setattr(price.Pace, "of", lambda *_: price.Pace(1.0, 0.0))
    monkeypatch.setattr(price, "predicted", lambda estimators, *_: {"slow": SECONDS} if estimators else {})
    monkeypatch.setitem(CATALOGUE, "size", Signal("size", "size of the weights", group="tests", detected=False))
    return clock


def slow(clock: Any, takes: float = SECONDS, free_seconds: float = 0, **options: Any) -> PhaseWatch:
    nothing_else = dict.fromkeys(("behavioral", "llc", "hessian", "zeros"))
    settings = {"probe_samples": 16, "held_out": False, "on_error": "raise", "free_seconds": free_seconds, **options}
    return PhaseWatch(**nothing_else, extra=[Slow(clock, takes)], **settings)


def train(root: Path, watch: PhaseWatch, *others: Any, max_steps: int = STEPS, ckpt_path: Any = None) -> pl.Trainer:
    pl.seed_everything(7, verbose=False)
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        default_root_dir=str(root),
        callbacks=[watch, *others],
        enable_checkpointing=any(isinstance(other, ModelCheckpoint) for other in others),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data(), batch_size=8), ckpt_path=ckpt_path)
    return trainer


def test_training_starts_and_the_first_state_comes_first_in_the_record(clock: Any, tmp_path: Path) -> None:
    watch = slow(clock, save_checkpoints=100)
    outside = Outside(clock, watch)
    trainer = train(tmp_path, watch, outside)
    run = load_run(trainer.log_dir)
    # 10 s at a tenth, and as much kept for the end: 200 s, or 20 steps.
    assert [outside.measured[step] for step in (0, 19, 20)] == [0, 0, 1]
    sizes = run.series("size")
    assert sizes.steps[0] == 0 and sizes.steps[-1] == STEPS and len(sizes) >= 8
    assert sizes.values[:-1].tolist() == pytest.approx([outside.sizes[step] for step in sizes.steps[:-1]], rel=1e-6)
    assert outside.sizes[0] != pytest.approx(outside.sizes[20], rel=1e-3)
    assert run.measurements[-1].value("overhead") <= 0.1
    kept = {path.name for path in (Path(trainer.log_dir) / "transitions").iterdir()}
    assert kept == {f"recent-step={step}.ckpt" for step in sizes.steps[:-1]}


@pytest.mark.parametrize(
    ("takes", "measured"),
    [
        (10.0, 6),
        (40.0, 1),  # says 10 s: of the 60 too little is left for the end
        (60.0, 1),
    ],
)
def test_a_short_run_is_not_held_up_for_longer_than_the_free_seconds(
    takes: float, measured: int, clock: Any, tmp_path: Path
) -> None:
    """12 steps of 10 s are worth 12 s of measuring, and 60 s are free."""
    watch = slow(clock, takes, free_seconds=60)
    train(tmp_path, watch, Outside(clock, watch), max_steps=12)
    assert clock.now - 12 * STEP_SECONDS == measured * takes <= 60
    steps = [m.step for m in watch.run.measurements]
    assert len(steps) == measured and steps[0] == 0 and (steps[-1] == 12) is (measured > 1)


def test_where_nothing_was_paid_the_last_line_says_so_and_names_no_record(
    clock: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    said: list[str] = []
    monkeypatch.setattr("phasewatch.callbacks.watching.WatchingCallback._say", lambda self, _, text: said.append(text))
    watch = slow(clock)
    with pytest.warns(UserWarning, match="so nothing is measured"):
        train(tmp_path, watch, Outside(clock, watch), max_steps=6)
    assert clock.now == 6 * STEP_SECONDS
    assert (
        "0 measurements" in said[-1]
        and "free_seconds=0 and max_overhead=0.1 of" in said[-1]
        and "analyze" not in said[-1]
    )


def test_the_line_goes_where_the_trainer_says_things(clock: Any, tmp_path: Path, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr("phasewatch.callbacks.watching.WatchingCallback._say", lambda self, _, text: said.append(text))
    watch = slow(clock)
    train(tmp_path, watch, Outside(clock, watch))
    told = [text for text in said if "a measurement takes" in text]
    assert told == [
        "phasewatch: a measurement takes about 10 s; max_overhead=0.1 of about 20 min of training allows about 12; the "
        "state of step 0 is kept and measured when that is paid."
    ]


def test_the_run_is_the_run_that_is_not_watched(clock: Any, tmp_path: Path) -> None:
    """20 s are free and pay for two, of which the start is measured once that is known, and the end."""

    def loader() -> DataLoader[Any]:
        return DataLoader(data(), batch_size=8, shuffle=True)

    watch = slow(clock, free_seconds=20)
    assert same(fit(tmp_path, Classifier, loader, watch), fit(tmp_path, Classifier, loader, None))
    assert [m.step for m in watch.run.measurements] == [0, 12]


def test_resuming_before_it_is_measured_says_so_and_goes_on(clock: Any, tmp_path: Path) -> None:
    watch = slow(clock)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=15, save_top_k=-1)
    train(tmp_path / "first", watch, Outside(clock, watch), checkpoint, max_steps=15)
    state = torch.load(tmp_path / "step=15.ckpt", weights_only=True)["callbacks"]["PhaseWatch"]["watch"]
    assert state["start"] == 0 and not any(isinstance(value, torch.Tensor) for value in state.values())
    second = slow(clock)
    outside = Outside(clock, second)
    with pytest.warns(UserWarning, match="state of step 0 was kept to be measured later"):
        trainer = train(tmp_path / "second", second, outside, ckpt_path=tmp_path / "step=15.ckpt")
    steps = load_run(trainer.log_dir).series("size").steps
    assert steps[0] >= 20 and steps[-1] == STEPS and len(steps) >= 8
