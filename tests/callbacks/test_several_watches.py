"""Several callbacks of one class in a trainer: each is as it would be alone, and none gets in the way of another."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import LEAN, OF_THE_LOSS, Classifier, data, same
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from phasewatch.callbacks import LLCMonitor, PhaseWatch, TransitionDetector
from phasewatch.record import Run, load_run

OTHER = [[tensor[:12] for tensor in data(seed=5).tensors]]


def first(settings: dict[str, Any] = LEAN) -> PhaseWatch:
    return PhaseWatch(schedule=4, **settings)


def second(settings: dict[str, Any] = LEAN, name: str | None = "second") -> PhaseWatch:
    return PhaseWatch(schedule=3, probe=OTHER, name=name, **settings)


def train(root: Path, *callbacks: Any, max_steps: int = 8, loggers: Any = False, ckpt_path: Any = None) -> pl.Trainer:
    pl.seed_everything(7, verbose=False)
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=loggers,
        callbacks=list(callbacks),
        default_root_dir=str(root),
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data(), batch_size=8)
    trainer.fit(Classifier(), loader, loader, ckpt_path=ckpt_path)
    return trainer


def weights(trainer: pl.Trainer) -> dict[str, Any]:
    return dict(trainer.lightning_module.state_dict())


def measured(run: Run) -> list[tuple[int, Any]]:
    return [(m.step, {k: v for k, v in m.estimates.items() if k != "overhead"}) for m in run.measurements]


def test_each_measures_and_records_what_it_does_alone_and_training_is_the_same(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1), TensorBoardLogger(tmp_path / "tb")]
    both = first(OF_THE_LOSS), second()
    trainer = train(tmp_path, *both, loggers=loggers)
    assert same(weights(trainer), weights(train(tmp_path / "plain")))

    alone = first(OF_THE_LOSS), second(name=None)
    for callback in alone:
        train(tmp_path / "alone", callback)
    directory = Path(loggers[0].log_dir)
    runs = load_run(directory), load_run(directory / "second")
    for run, callback in zip(runs, alone, strict=True):
        assert run.finished and not run.failures and not run.gaps
        assert measured(run) == measured(callback.run)
        assert run.observed.keys() == callback.run.observed.keys()  # no metric of the other is taken for the user's own
    assert [m.step for m in runs[0].measurements] == [0, 4, 8] and [m.step for m in runs[1].measurements] == [0, 3, 6]

    for run, prefix in zip(runs, ("", "second/"), strict=True):
        metric = trainer.callback_metrics[f"{prefix}effective_rank_coarse"]
        assert float(metric) == pytest.approx(run.series("effective_rank_coarse").values[-1])
        with open(directory / "metrics.csv") as file:
            rows = [(int(r["step"]), float(v)) for r in csv.DictReader(file) if (v := r[f"{prefix}phasewatch/1_loss"])]
        assert rows == [(m.step, m.value("loss")) for m in run.measurements]
    # the unnamed one writes into the logger's run, the other into one of its own: no tag is written by two
    for run, at in zip(runs, (".", "second/phasewatch"), strict=True):
        written = Path(loggers[1].log_dir) / at
        assert len(list(written.glob("events*"))) == 1
        scalars = EventAccumulator(str(written)).Reload()
        assert [e.step for e in scalars.Scalars("phasewatch/1_loss")] == [m.step for m in run.measurements]
        assert not any("second" in tag for tag in scalars.Tags()["scalars"])


def test_two_of_one_name_are_refused_with_what_to_pass(tmp_path: Path) -> None:
    for pair in ((first(), first()), (second(), second())):
        with pytest.raises(ValueError, match=r"two PhaseWatch of the name .* PhaseWatch\(name='second', \.\.\.\)"):
            train(tmp_path, *pair)


@pytest.mark.parametrize("name", ["", "a/b", "..", "1st", 3, "a b"])
@pytest.mark.parametrize("kind", [PhaseWatch, LLCMonitor, TransitionDetector])
def test_what_is_no_name_is_refused(kind: Any, name: Any) -> None:
    with pytest.raises(ValueError, match="expected letters, digits and underscores, as 'second', or None"):
        kind(name=name)


def test_of_different_classes_those_of_one_name_share_a_record(tmp_path: Path) -> None:
    settings = {"schedule": 4, **{name: LEAN[name] for name in ("behavioral", "llc", "probe_samples", "on_error")}}
    callbacks = [LLCMonitor(**settings), TransitionDetector(name="late"), LLCMonitor(name="late", **settings)]
    train(tmp_path, *callbacks, max_steps=5)
    [base] = (tmp_path / "phasewatch_logs").iterdir()  # one directory for the run, though no logger has one for it
    assert sorted(str(path.relative_to(base)) for path in base.rglob("*.jsonl")) == [
        "late/phasewatch.jsonl",
        "phasewatch.jsonl",
    ]
    assert (load_run(base / "late").header["alpha"], load_run(base / "phasewatch.jsonl").header["alpha"]) == (
        0.05,
        None,
    )
    assert measured(load_run(base / "late")) == measured(load_run(base / "phasewatch.jsonl"))


def test_each_goes_on_from_its_own_state(tmp_path: Path) -> None:
    def checkpoint(root: Path) -> ModelCheckpoint:
        return ModelCheckpoint(
            root, filename="{step}", monitor="second/effective_rank", every_n_train_steps=6, save_top_k=-1
        )

    whole = first(), second()
    train(tmp_path / "whole", *whole, max_steps=12)
    train(tmp_path / "cut", first(), second(), checkpoint(tmp_path / "cut"), max_steps=6)
    resumed = first(), second()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="phasewatch")
        saved = tmp_path / "cut" / "step=6.ckpt"
        trainer = train(tmp_path / "cut", *resumed, checkpoint(tmp_path / "cut"), max_steps=12, ckpt_path=saved)
    for again, never_stopped in zip(resumed, whole, strict=True):
        expected = measured(never_stopped.run)
        assert [step for step, _ in measured(again.run)] == [step for step, _ in expected]
        for (_, ours), (_, theirs) in zip(measured(again.run), expected, strict=True):
            assert ours["effective_rank"].value == pytest.approx(theirs["effective_rank"].value, rel=1e-9)
        assert again.run.path is not None and again.run.header.get("continues") is None
        before = max(step for step, _ in expected if step < 6)
        assert load_run(again.run.path).resumed == (before + 1,)
    assert len(list((tmp_path / "cut" / "phasewatch_logs").iterdir())) == 1
    assert trainer.global_step == 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a watched run, at step 6."""
    directory = tmp_path_factory.mktemp("watched")
    train(directory, first(), ModelCheckpoint(directory, filename="{step}", every_n_train_steps=6), max_steps=6)
    return directory / "step=6.ckpt"


@pytest.fixture(scope="module")
def unwatched(checkpoint: Path) -> dict[str, Any]:
    """The weights of the run that goes on from there without phasewatch."""
    return weights(train(checkpoint.parent, max_steps=9, ckpt_path=checkpoint))


@pytest.mark.parametrize("entry", ["watch", "probes", "held_out", "clock", "taken", "record"])
@pytest.mark.parametrize("value", [None, "x"], ids=["gone", "text"])
def test_a_checkpoint_with_a_broken_state_trains_on(
    entry: str, value: Any, checkpoint: Path, unwatched: dict[str, Any], tmp_path: Path
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    state = saved["callbacks"]["PhaseWatch"]
    state["held_out"] = None
    broken = state if entry in ("watch", "probes", "held_out") else state["watch"]
    if value is None:
        del broken[entry]
    else:
        broken[entry] = value
    torch.save(saved, tmp_path / "broken.ckpt")
    watch = first()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(tmp_path, watch, max_steps=9, ckpt_path=tmp_path / "broken.ckpt")
    assert same(weights(trainer), unwatched)
    assert 8 in [m.step for m in watch.run.measurements] and watch.run.finished
    told = [str(one.message) for one in caught if "of another version, or was changed" in str(one.message)]
    # probes that are not there are none of a stream, or still to be drawn: of these there is nothing to tell
    assert bool(told) == (value is not None or entry not in ("probes", "held_out"))
