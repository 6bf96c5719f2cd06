"""Where runs are recorded: each in a place of its own, and none where a logger keeps its books."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from lightning_cases import LEAN, Classifier, data
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from phasewatch.callbacks import PhaseWatch
from phasewatch.record import RecordError, load_run


class OneDirectoryForAll(Logger):
    """What the loggers of MLflow and W&B have in common: no ``log_dir``, and a ``save_dir`` for all runs."""

    def __init__(self, save_dir: Path) -> None:
        super().__init__()
        save_dir.mkdir(exist_ok=True)
        self._save_dir = save_dir
        self.logged: list[int] = []

    @property
    def name(self) -> str:
        return "experiment"

    @property
    def version(self) -> str:
        return "d3b07384"

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is not None and "phasewatch/1_loss" in metrics:
            self.logged.append(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class MLFlowLogger(OneDirectoryForAll):
    run_id = "d3b07384"
    experiment = SimpleNamespace(set_tag=lambda *_: None, log_artifacts=lambda *_: None)


class WandbLogger(OneDirectoryForAll):
    experiment = SimpleNamespace(id="d3b07384", summary={}, log_artifact=lambda *_, **__: None)


class OwnLogger(TensorBoardLogger):
    pass


def train(root: Path, logger: Any, max_steps: int = 6, ckpt_path: Any = None, **options: Any) -> PhaseWatch:
    pl.seed_everything(3, verbose=False)
    watch = PhaseWatch(**{**LEAN, "schedule": 2, **options})
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        default_root_dir=str(root),
        logger=logger,
        callbacks=[watch, ModelCheckpoint(root / "kept", filename="{step}", every_n_train_steps=2, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data(), batch_size=8), ckpt_path=ckpt_path)
    return watch


def steps(path: Path) -> list[int]:
    return [m.step for m in load_run(path).measurements]


@pytest.mark.parametrize("kind", [MLFlowLogger, WandbLogger, None])
def test_runs_one_after_the_other_are_each_read_back_alone_and_whole(kind: Any, tmp_path: Path) -> None:
    books = tmp_path / "mlruns"
    loggers = [kind(books) if kind else False for _ in range(2)]
    watches = [train(tmp_path, logger, max_steps) for logger, max_steps in zip(loggers, (4, 6), strict=True)]
    paths = [watch.run.path for watch in watches]
    assert paths[0] is not None and paths[1] is not None and paths[0].parent != paths[1].parent
    for watch, path, expected in zip(watches, paths, ([0, 2, 4], [0, 2, 4, 6]), strict=True):
        run = load_run(path.parent)
        assert [m.step for m in run.measurements] == expected
        assert run.measurements == watch.run.measurements
        assert run.finished and not run.gaps and run.header["run_id"] == watch.run.header["run_id"]
        assert path.parent.parent == tmp_path / "phasewatch_logs"
        events = EventAccumulator(str(path.parent / "phasewatch"), size_guidance={"scalars": 0}).Reload()
        assert [event.step for event in events.Scalars("phasewatch/1_loss")] == expected
    with pytest.raises(RecordError, match="holds 2 runs") as told:
        load_run(tmp_path)
    assert all(str(path) in str(told.value) for path in paths)
    if kind:
        assert not list(books.rglob("*"))
        assert [logger.logged for logger in loggers] == [[0, 2, 4], [0, 2, 4, 6]]


def test_a_resumed_run_goes_on_in_its_place(tmp_path: Path) -> None:
    first = train(tmp_path, MLFlowLogger(tmp_path / "mlruns"), 4)
    second = train(tmp_path, MLFlowLogger(tmp_path / "mlruns"), 8, ckpt_path=tmp_path / "kept" / "step=4.ckpt")
    assert first.run.path == second.run.path
    assert steps(tmp_path) == [0, 2, 4, 6, 8]


def test_loggers_that_have_a_directory_for_each_run_share_it(tmp_path: Path) -> None:
    csv, own = CSVLogger(tmp_path / "csv"), OwnLogger(tmp_path / "own")
    for loggers, directory in (
        ([WandbLogger(tmp_path / "wandb"), csv], lambda: Path(csv.log_dir)),
        ([own], lambda: Path(own.log_dir)),
    ):
        watch = train(tmp_path, loggers)
        assert watch.run.path is not None and watch.run.path.parent == directory()
        assert not (tmp_path / "phasewatch_logs").exists()


def test_a_fixed_version_gives_each_run_a_file_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        one, two = (train(tmp_path, TensorBoardLogger(tmp_path, name="", version="v")) for _ in range(2))
    assert one.run.path == tmp_path / "v" / "phasewatch.jsonl"
    assert two.run.path == tmp_path / "v" / f"phasewatch-{two.run.header['run_id']}.jsonl"
    for watch in (one, two):
        assert watch.run.path is not None
        assert load_run(watch.run.path).measurements == watch.run.measurements
        assert steps(watch.run.path) == [0, 2, 4, 6]
    told = [line.split("phasewatch analyze ")[1].splitlines()[0] for line in caplog.messages if "analyze" in line]
    assert told == [str(tmp_path / "v"), str(two.run.path)]


def test_the_directory_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    train(tmp_path, MLFlowLogger(tmp_path / "mlruns"), directory=str(tmp_path / "mine"))
    assert steps(tmp_path / "mine") == [0, 2, 4, 6]
    assert not (tmp_path / "phasewatch_logs").exists() and not list((tmp_path / "mlruns").iterdir())


def test_a_lost_record_does_not_end_the_run_it_was_of(tmp_path: Path) -> None:
    first = train(tmp_path, False, 4)
    assert first.run.path is not None
    first.run.path.unlink()
    with pytest.warns(UserWarning, match="is not there any more"):
        second = train(tmp_path, False, 8, ckpt_path=tmp_path / "kept" / "step=4.ckpt", on_error="warn")
    assert second.run.path is not None and second.run.path.parent != first.run.path.parent
    assert steps(second.run.path) == [4, 6, 8]
