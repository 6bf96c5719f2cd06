from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from phasewatch.record import RecordError
from phasewatch.report import analyze_run
from phasewatch.tensorboard import find_event_files, read_scalars, run_of_scalars
from phasewatch.tensorboard.events import loss_tags


def test_reads_all_points_sorted_with_the_last_written_standing(tmp_path: Path) -> None:
    """A run of 1,500 steps that was resumed at step 1,000 and went another way from there."""
    now = time.time()
    with SummaryWriter(str(tmp_path)) as first:
        for step in range(1500):
            first.add_scalar("loss", step, step, walltime=now + step)
    with SummaryWriter(str(tmp_path), filename_suffix=".resumed") as second:
        for step in range(1000, 1200):
            second.add_scalar("loss", -step, step, walltime=now + 5000 + step)
        second.add_scalar("new", 0.5, 3, new_style=True)
    scalars = read_scalars(tmp_path)
    steps, values = scalars["loss"]
    assert steps.tolist() == list(range(1500))
    expected = np.arange(1500.0)
    expected[1000:1200] *= -1
    assert values.tolist() == expected.tolist()
    assert [column.tolist() for column in scalars["new"]] == [[3], [0.5]]


def test_finds_the_only_run_and_names_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        SummaryWriter(str(tmp_path / "two" / name)).close()
    SummaryWriter(str(tmp_path / "one" / "deep")).close()
    assert find_event_files(tmp_path / "one") == tmp_path / "one" / "deep"
    with pytest.raises(RecordError, match=r"2 TensorBoard runs; give one of them:\n.*a\n.*b"):
        find_event_files(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_event_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no TensorBoard event file"):
        find_event_files(tmp_path / "empty")


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
    with pytest.raises(RecordError, match="no scalar 'acc'; it has: loss"):
        run_of_scalars({"loss": (np.arange(2), np.ones(2))}, ["acc"], "here")


def test_tags_that_look_like_a_loss() -> None:
    assert loss_tags({"train/Loss": 0, "lr": 0, "val_loss_epoch": 0, "acc": 0}) == [
        "train/Loss",
        "val_loss_epoch",
    ]
