"""Runs that phasewatch did not watch, out of the logs of others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel
from pytorch_lightning.loggers import CSVLogger

from phasewatch.analysis import analyze_run
from phasewatch.cli import main
from phasewatch.logs import chosen, find_table, own_names, read_table, run_of_scalars
from phasewatch.record import RecordError

STEPS = np.arange(0, 4000, 50)
LOSSES = np.where(STEPS < 2000, 2.0, 1.0) + 0.01 * np.random.default_rng(0).standard_normal(len(STEPS))
FRAME = pandas.DataFrame({"step": STEPS, "train_loss": LOSSES, "note": "x", "epoch": STEPS // 100})


def write(path: Path, frame: pandas.DataFrame = FRAME) -> Path:
    if ".jsonl" in path.name:
        frame.to_json(path, orient="records", lines=True)
    elif ".tsv" in path.name:
        frame.to_csv(path, sep="\t", index=False)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.jsonl", "train.v2.csv"])
def test_a_table_of_any_form_gives_its_numbers_at_their_steps(name: str, tmp_path: Path) -> None:
    scalars = read_table(write(tmp_path / name))
    assert list(scalars) == ["train_loss"]
    steps, values = scalars["train_loss"]
    assert steps.tolist() == STEPS.tolist() and values == pytest.approx(LOSSES)


@pytest.mark.parametrize("column", ["Step", "_step", "global_step", "trainer/global_step", "iteration"])
def test_steps_have_many_names(column: str, tmp_path: Path) -> None:
    scalars = read_table(write(tmp_path / "log.csv", FRAME.rename(columns={"step": column}).drop(columns="note")))
    assert list(scalars) == ["train_loss"] and scalars["train_loss"][0].tolist() == STEPS.tolist()


def test_of_a_step_made_again_the_last_row_with_a_value_stands(tmp_path: Path) -> None:
    """A run that goes on from step 20 after it had come to 30; the second row of step 30 has no loss."""
    (tmp_path / "log.csv").write_text("step,loss,acc\n10,3,\n20,2,.5\n30,1,.6\n20,2.5,\n30,,.7\n40,nan,\n,9,9\n")
    scalars = read_table(tmp_path / "log.csv")
    assert [column.tolist() for column in scalars["loss"]] == [[10, 20, 30], [3.0, 2.5, 1.0]]
    assert [column.tolist() for column in scalars["acc"]] == [[20, 30], [0.5, 0.7]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column of steps; expected one of step, .* It has: a, b"),
        ("step,name\n1,x\n", "holds no numbers beside its steps"),
        ("", "cannot be read as a table"),
        ("step\n1\n", "holds no numbers beside its steps"),
        ("step,loss\nfirst,1\nsecond,2\n", "has 'first' in its column of steps .'step'.; expected whole numbers"),
        ("epoch,loss\n0.5,1\n1.5,2\n", "has 0.5 in its column of steps .'epoch'.; expected .* steps 'step'"),
    ],
)
def test_what_is_no_table_is_refused_with_what_it_has(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(RecordError, match=message):
        read_table(tmp_path / "log.csv")
    with pytest.raises(RecordError, match="expected a file that ends in .csv"):
        read_table(tmp_path / "log.txt")


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "log.csv")
    with pytest.raises(RecordError, match="log.csv is no file; expected one that ends in .csv"):
        read_table(tmp_path / "log.csv")
    assert main(["analyze", str(tmp_path / "log.csv")]) == 2
    assert "is a pipe or a device" in capsys.readouterr().err


def test_rows_whose_step_is_none_are_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n1,3.0\nstep,loss\n2.5,9.0\n1e300,8.0\n,7.0\n4,1.0\n")
    with pytest.warns(UserWarning, match=r"log.csv: 3 rows are left out, whose step is 'step' or the like"):
        scalars = read_table(tmp_path / "log.csv")
    assert [column.tolist() for column in scalars["loss"]] == [[1, 4], [3.0, 1.0]]


def test_torn_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    with pytest.raises(RecordError, match="cannot be read as a table"):
        read_table(tmp_path / "log.jsonl")


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip"])
def test_what_is_called_compressed_and_is_not_is_no_table(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"log.csv.{ending}"
    with pytest.raises(FileNotFoundError):
        read_table(file)
    file.write_bytes(b"step,loss\n1,2\n")
    with pytest.raises(RecordError, match="cannot be read as a table"):
        read_table(file)


def test_what_is_looked_at_where_nobody_says_it() -> None:
    assert chosen({"train/Loss": 0, "lr": 0, "val_loss_epoch": 0, "acc": 0})[0] == ["train/Loss", "val_loss_epoch"]
    assert chosen({"loss": 0, "acc": 0}) == (["loss"], "they look like losses")
    names, why = chosen({"loss": 0, "acc": 0, "llc_behavioral": 0, "train_loss": 0})
    assert names == ["llc_behavioral", "loss"] and why == "the signals of phasewatch"
    series = (np.arange(2), np.ones(2))
    tags = "phasewatch_details/llc", "phasewatch/1_loss", "loss", "phasewatch/3_llc_behavioral_unreliable"
    assert list(own_names(dict.fromkeys(tags, series))) == [
        "llc_behavioral",
        "llc",
        "phasewatch/1_loss",
        "loss",
        "llc_behavioral_unreliable",
    ]


def test_what_was_logged_as_unreliable_is_so_when_it_is_read_back() -> None:
    """Of five points the second and third were doubted, where TensorBoard has a gap in the series of the others."""
    nan = np.nan
    logged = {
        "phasewatch/3_llc_behavioral": (np.arange(5), np.array([1.0, nan, nan, 4.0, 5.0])),
        "phasewatch/3_llc_behavioral_unreliable": (np.arange(1, 3), np.array([20.0, 30.0])),
    }
    series = run_of_scalars(own_names(logged), ["llc_behavioral"], "here").series("llc_behavioral")
    assert series.values.tolist() == [1.0, 20.0, 30.0, 4.0, 5.0]
    assert series.reliable.tolist() == [True, False, False, True, True]


def test_analyze_reads_a_table_and_lightnings_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "log.csv")
    assert main(["analyze", str(table), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "reading train_loss (they look like losses)" in printed and "1 transition" in printed
    [one] = json.loads((tmp_path / "out" / "phasewatch.json").read_text())["transitions"]
    assert one["start"] <= 2000 <= one["end"]
    assert main(["analyze", str(table), "--signals", "accuracy"]) == 2
    assert "no series 'accuracy'; it has: train_loss" in capsys.readouterr().err


def test_a_folder_that_lightning_logged_into_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Logged(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().training_step(batch, batch_idx)
            self.log("my_loss", torch.as_tensor(1.0 if self.global_step < 32 else 3.0) + 0.01 * torch.rand(()))
            return result

    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(
        max_steps=64,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logged(), BoringDataModule())
    assert find_table(tmp_path) == Path(logger.log_dir) / "metrics.csv"
    assert main(["analyze", str(logger.log_dir), "--signals", "my_loss"]) == 0
    assert "my_loss" in capsys.readouterr().out
    assert read_table(Path(logger.log_dir) / "metrics.csv")["my_loss"][0].tolist() == list(range(64))


def test_long_series_are_averaged_and_keep_their_jump() -> None:
    """Group means against the same by reshaping; the jump is 30 of their standard deviations high.

    A false alarm beside it has a chance of 5 % for a seed; the seed is fixed."""
    rng = np.random.default_rng(0)
    steps = np.arange(2400)
    values = np.where(steps < 1200, 2.0, 1.0) + 0.1 * rng.standard_normal(2400)
    run = run_of_scalars({"train/loss": (steps, values), "lr": (steps, values)}, ["train/loss"], "here")
    series = run.series("train/loss")
    assert run.names == ["train/loss"] and len(series) == 240
    assert series.values == pytest.approx(values.reshape(240, 10).mean(axis=1))
    assert series.steps.tolist() == list(range(9, 2400, 10))
    [transition] = analyze_run(run, signals=["train/loss"]).transitions
    assert transition.start <= 1200 <= transition.end


def test_values_that_are_not_finite_are_left_out() -> None:
    values = np.array([1.0, np.nan, 3.0, np.inf])
    assert run_of_scalars({"loss": (np.arange(4), values)}, ["loss"], "here").series("loss").steps.tolist() == [0, 2]
    assert run_of_scalars({"loss": (np.arange(1), values[1:2])}, ["loss"], "here").measurements == ()


def test_an_unknown_tag_is_named_with_those_there_are() -> None:
    with pytest.raises(RecordError, match="no series 'acc'; it has: loss"):
        run_of_scalars({"loss": (np.arange(2), np.ones(2))}, ["acc"], "here")
