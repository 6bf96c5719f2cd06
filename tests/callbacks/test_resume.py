"""A run that was stopped and resumed measures and flags what the run that was never stopped does."""

from __future__ import annotations

import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import EVERY_ESTIMATOR, FEW_DRAWS, LEAN, Classifier, data
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from phasewatch.callbacks import HessianMonitor, LLCMonitor, PhaseWatch, TransitionDetector
from phasewatch.estimators import HessianSpectrum
from phasewatch.record import load_run
from phasewatch.record.reading import assemble, read_runs


def repeated() -> TensorDataset:
    """Six equal batches an epoch: Lightning itself restarts a plain loader when it resumes inside an epoch."""
    return TensorDataset(*(tensor[:8].repeat(6, *[1] * (tensor.dim() - 1)) for tensor in data().tensors))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from repeated()


def train(root: Any, watch: PhaseWatch, max_steps: int, stream: bool = False, ckpt_path: Any = None) -> Any:
    pl.seed_everything(11, verbose=False)
    module = Classifier()
    loader = DataLoader(Stream(), batch_size=8) if stream else DataLoader(repeated(), batch_size=8)
    checkpoint = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        default_root_dir=str(root),
        callbacks=[watch, checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


# inside an epoch a stream starts anew when Lightning resumes, and the epoch gets longer: that is another run
@pytest.mark.parametrize(
    ("stopped_at", "until", "stream", "settings"),
    [(7, 15, False, EVERY_ESTIMATOR), (12, 16, False, LEAN), (12, 16, True, LEAN)],
)
def test_resumed_equals_uninterrupted(
    stopped_at: int, until: int, stream: bool, settings: dict[str, Any], tmp_path: Any
) -> None:
    # 6 batches an epoch: 7 is inside an epoch, 12 at the end of one; at 16 the end of the run is measured too
    whole, first, second = (PhaseWatch(schedule=4, **settings) for _ in range(3))
    train(tmp_path / "whole", whole, until, stream)
    train(tmp_path / "cut", first, stopped_at, stream)
    trainer = train(tmp_path / "cut", second, until, stream, ckpt_path=tmp_path / "cut" / f"step={stopped_at}.ckpt")

    resumed = load_run(trainer.log_dir)
    assert trainer.log_dir.endswith("version_1")
    assert resumed.header["continues"]["run_id"] == first.run.header["run_id"]
    assert resumed.header["run_id"] not in (first.run.header["run_id"], whole.run.header["run_id"])
    assert resumed.finished and not resumed.gaps
    # What was measured before is taken over bit for bit, and so is what the detector has seen of it.
    before = sum(m.step < stopped_at for m in first.run.measurements)
    assert resumed.measurements[:before] == first.run.measurements[:before]
    assert [m.step for m in resumed.measurements] == [m.step for m in whole.run.measurements]
    for ours, theirs in zip(resumed.measurements, whole.run.measurements, strict=True):
        # the threshold is 100 x a rounding error, which depends on how the memory happens to be aligned
        for name in theirs.estimates.keys() - {"overhead", "nullity_threshold"}:
            np.testing.assert_allclose(ours.value(name), theirs.value(name), rtol=1e-9, err_msg=f"{name} {ours.step}")
    assert second.watch is not None and whole.watch is not None and first.watch is not None
    stopped, state, expected = (vars(w.watch.detector) for w in (first, second, whole))  # type: ignore[union-attr]
    for columns in ("_values", "_errors", "_reliable"):
        of_both = [{name: column[:before] for name, column in each[columns].items()} for each in (state, stopped)]
        assert of_both[0] == of_both[1]
    assert state["_steps"][:before] == stopped["_steps"][:before]
    assert _rounded(state) == _rounded(expected)


def _rounded(detector: dict[str, Any]) -> dict[str, Any]:
    """What the detector knows, but for the last digits, which depend on how the memory happens to be aligned."""
    values = {
        name: [None if v is None else round(v, 9) for v in column] for name, column in detector["_values"].items()
    }
    # At which steps losses were kept depends on the time that steps take; tests/test_resuming.py compares them.
    beside = dict.fromkeys(("_observed", "_looked_until", "_resumed"))
    return {**detector, **beside, "_values": values, "_errors": detector["_errors"].keys()}


def test_a_checkpoint_loads_with_weights_only_and_holds_a_place_in_the_record(tmp_path: Any) -> None:
    watch = PhaseWatch(schedule=2, **LEAN)
    trainer = train(tmp_path, watch, 5)
    states = [
        torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"]["PhaseWatch"]["watch"]
        for step in (1, 5)
    ]
    sizes = []
    path = Path(trainer.log_dir) / "phasewatch.jsonl"
    lines = read_runs(path)[0][watch.run.header["run_id"]]
    for state, step, measured in zip(states, (1, 5), (1, 3), strict=True):
        assert (state["record"]["path"], state["record"]["run_id"]) == (str(path), watch.run.header["run_id"])
        before = assemble(lines[: state["record"]["sequence"] + 1])
        assert len(before.measurements) == measured
        assert before.observed["loss"].steps.tolist() == list(range(step))  # what was observed until then is there
        assert state["lines"] == []
        buffer = io.BytesIO()
        torch.save(state, buffer)
        sizes.append(buffer.tell())
    assert sizes[1] - sizes[0] < 512  # two measurements are 5 kB; what follows the losses fills its twenty blocks


class InMemory(PhaseWatch):
    def _choose_directory(self, trainer: Any) -> None:
        return None


def test_a_run_that_has_no_directory_keeps_its_measurements_in_the_checkpoint(tmp_path: Any) -> None:
    train(tmp_path, InMemory(schedule=2, **LEAN), 5)
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["callbacks"]["InMemory"]["watch"]
    assert state["record"] is None
    assert [body["step"] for _, body in state["lines"]] == [0, 2, 4]


def test_resuming_in_the_directory_of_the_run(tmp_path: Any) -> None:
    options = {**LEAN, "directory": str(tmp_path / "record"), "schedule": 2}
    train(tmp_path, PhaseWatch(**options), 12)
    train(tmp_path, PhaseWatch(**options), 12, ckpt_path=tmp_path / "step=6.ckpt")
    assert [m.step for m in load_run(tmp_path / "record").measurements] == [0, 2, 4, 6, 8, 10, 12]
    assert [file.name for file in (tmp_path / "record").glob("*.jsonl")] == ["phasewatch.jsonl"]
    lines = (tmp_path / "record" / "phasewatch.jsonl").read_text()
    assert lines.count('"kind":"resume"') == 1 and lines.count('"kind":"header"') == 1


def test_the_metrics_are_there_before_anything_is_measured_anew(tmp_path: Any) -> None:
    """EarlyStopping ends training with an error where the metric is missing that it waits for."""
    options = {**LEAN, "schedule": [2, 20]}
    before = train(tmp_path, PhaseWatch(**options), 6).callback_metrics
    after = train(tmp_path, PhaseWatch(**options), 9, ckpt_path=tmp_path / "step=6.ckpt").callback_metrics
    own = {"effective_rank_coarse", "transitions", "steps_since_transition"}
    assert {name: after[name] for name in own} == {name: before[name] for name in own}


def test_a_directory_that_was_moved_is_found_beside_the_checkpoint(tmp_path: Any) -> None:
    first = PhaseWatch(schedule=2, **LEAN)
    trainer = train(tmp_path / "here", first, 6)
    (Path(trainer.log_dir) / "checkpoints").mkdir()
    (tmp_path / "here" / "step=6.ckpt").rename(Path(trainer.log_dir) / "checkpoints" / "last.ckpt")
    shutil.move(tmp_path / "here" / "lightning_logs" / "version_0", tmp_path / "there")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="phasewatch")
        trainer = train(
            tmp_path / "new", PhaseWatch(schedule=2, **LEAN), 8, ckpt_path=tmp_path / "there/checkpoints/last.ckpt"
        )
    resumed = load_run(trainer.log_dir)
    assert resumed.measurements[:3] == first.run.measurements[:3]
    assert [m.step for m in resumed.measurements] == [0, 2, 4, 6, 8]


def test_separate_callbacks_share_one_record_and_resume(tmp_path: Any) -> None:
    def callbacks() -> list[Any]:
        few = {"probe_samples": 16, "on_error": "raise"}
        return [
            LLCMonitor(schedule=4, behavioral=None, llc=FEW_DRAWS["llc"], **few),
            HessianMonitor(schedule=3, hessian=HessianSpectrum(2), **few),
            TransitionDetector(),
        ]

    def fit(root: Any, max_steps: int, ckpt_path: Any = None) -> Any:
        pl.seed_everything(11, verbose=False)
        checkpoint = ModelCheckpoint(root, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            default_root_dir=str(root),
            callbacks=[*callbacks(), checkpoint],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), DataLoader(repeated(), batch_size=8), ckpt_path=ckpt_path)
        return load_run(trainer.log_dir)

    whole = fit(tmp_path / "whole", 10)
    assert whole.series("llc").steps.tolist() == [0, 4, 8]
    assert whole.series("nullity").steps.tolist() == [0, 3, 6, 9]
    fit(tmp_path / "cut", 5)
    resumed = fit(tmp_path / "cut", 10, tmp_path / "cut" / "step=5.ckpt")
    for name in ("llc", "nullity", "hessian_trace"):
        np.testing.assert_array_equal(resumed.series(name).steps, whole.series(name).steps)
        np.testing.assert_allclose(resumed.series(name).values, whole.series(name).values, rtol=1e-9)


def test_a_second_fit_of_the_same_trainer_continues_the_record(tmp_path: Any) -> None:
    watch = PhaseWatch(schedule=3, **LEAN)
    trainer = train(tmp_path, watch, 6)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(trainer.lightning_module, DataLoader(repeated(), batch_size=8))
    assert [m.step for m in load_run(trainer.log_dir).measurements] == [0, 3, 6, 9, 12]
