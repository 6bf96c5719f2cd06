from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from phasewatch.record import RecordError
from phasewatch.tensorboard import find_event_files, read_scalars


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
