"""Several processes measure: the same record as one makes, whatever befalls them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_cases import FATAL, STEPS, build, failing_build, fatal_build, trained, unseeded_build, what_was_found
from torch import nn

from phasewatch import measure_checkpoints
from phasewatch.sweep import FromBuild


def test_two_workers_make_the_record_that_one_makes(tmp_path: Path) -> None:
    live = trained(tmp_path)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "model-50.pt")
    lines: list[str] = []
    with pytest.warns(UserWarning, match="step 50 is skipped: .*of another network"):
        run = measure_checkpoints(FromBuild("sweep_cases:build"), tmp_path, workers=2, say=lines.append)
    assert what_was_found(run) == what_was_found(live) and run.finished and not run.gaps
    assert "6 of 6" in lines[-1] and [f["step"] for f in run.failures] == [50]
    again = measure_checkpoints(build, tmp_path)  # by another number of workers nothing changes
    assert again.measurements == run.measurements


def test_what_cannot_be_passed_to_a_worker_is_told(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match="cannot be passed to it .*give it by name"):
        measure_checkpoints(lambda: build(), tmp_path, workers=2)
    with pytest.raises(ValueError, match="workers is 0; expected a number of processes"):
        measure_checkpoints(build, tmp_path, workers=0)
    with pytest.raises(ValueError, match="engine is 'slurm'; expected one of processes, ray"):
        measure_checkpoints(build, tmp_path, engine="slurm")  # type: ignore[arg-type]


def test_without_ray_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'phasewatch\[ray\]'"):
        measure_checkpoints(build, tmp_path, engine="ray")


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_checkpoint_alone(tmp_path: Path) -> None:
    trained(tmp_path)
    undisturbed = measure_checkpoints(fatal_build, tmp_path, directory=tmp_path / "undisturbed")
    fatal = {name: torch.full_like(tensor, FATAL) for name, tensor in build().module.state_dict().items()}
    torch.save(fatal, tmp_path / "model-2.pt")
    torch.save(fatal, tmp_path / "model-12.pt")
    with pytest.warns(UserWarning, match=r"step 2 is skipped: .*ended \(exit code -9\), as where memory is short"):
        run = measure_checkpoints(fatal_build, tmp_path, workers=2)
    assert what_was_found(run) == what_was_found(undisturbed) and [f["step"] for f in run.failures] == [2, 12]
    assert [m.step for m in run.measurements] == list(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (failing_build, r"failing_build\(\) failed .*data.csv"),
        (unseeded_build, "The workers measure on different samples"),
    ],
)
def test_what_fails_in_building_ends_it(function: Any, message: str, tmp_path: Path) -> None:
    for step in range(30):
        torch.save(nn.Linear(3, 1).state_dict(), tmp_path / f"model-{step}.pt")
    with pytest.raises(ValueError, match=message):
        measure_checkpoints(function, tmp_path, workers=2)
