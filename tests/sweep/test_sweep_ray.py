"""Workers on a local Ray: the record that one process makes, whatever befalls them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_cases import FATAL, STEPS, build, failing_build, fatal_build, trained, what_was_found
from torch import nn

from phasewatch import load_run, measure_checkpoints
from phasewatch.cli import main
from phasewatch.sweep import FromBuild
from phasewatch.sweep.cluster import Cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    """One for all tests, which find it connected and leave it so."""
    ray = pytest.importorskip("ray")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, on_sigterm)


def test_one_is_started_where_there_is_none_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the command, whose code lies in the current directory."""
    ray = pytest.importorskip("ray")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    live = trained(tmp_path / "checkpoints")
    (tmp_path / "own_code.py").write_text(Path(__file__).with_name("sweep_cases.py").read_text())
    monkeypatch.chdir(tmp_path)
    assert main(["measure", "checkpoints", "--build", "own_code:build", "--engine", "ray"]) == 0
    assert what_was_found(load_run("checkpoints/measured")) == what_was_found(live) and not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is on_sigterm


def test_actors_make_the_record_that_one_process_makes(
    local_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = trained(tmp_path / "checkpoints")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "checkpoints" / "model-50.pt")
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    with pytest.warns(UserWarning, match="step 50 is skipped: .*of another network"):
        run = measure_checkpoints(
            FromBuild("sweep_cases:build"), "checkpoints", workers=2, engine="ray", say=lines.append
        )
    assert what_was_found(run) == what_was_found(live) and run.finished and not run.gaps
    assert "6 of 6" in lines[-1] and local_ray.is_initialized()
    assert measure_checkpoints(build, tmp_path / "checkpoints").measurements == run.measurements


def test_an_actor_that_dies_costs_its_checkpoint_alone(local_ray: Any, tmp_path: Path) -> None:
    trained(tmp_path)
    undisturbed = measure_checkpoints(fatal_build, tmp_path, directory=tmp_path / "undisturbed")
    fatal = {name: torch.full_like(tensor, FATAL) for name, tensor in build().module.state_dict().items()}
    torch.save(fatal, tmp_path / "model-2.pt")
    with pytest.warns(UserWarning, match=r"step 2 is skipped: .*the process that was at it ended"):
        run = measure_checkpoints(FromBuild("sweep_cases:fatal_build"), tmp_path, workers=1, engine="ray")
    assert what_was_found(run) == what_was_found(undisturbed) and [f["step"] for f in run.failures] == [2]
    assert [m.step for m in run.measurements] == list(STEPS)


def test_an_actor_that_is_killed_is_survived(local_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its machine is lost."""
    live = trained(tmp_path)
    started: list[Any] = []
    start = Cluster.start
    monkeypatch.setattr(Cluster, "start", lambda self, task: started.append(start(self, task)) or started[-1])

    def kill_one(text: str) -> None:
        if "1 of 5" in text:
            local_ray.kill(started[0].handle)

    with pytest.warns(UserWarning, match="the process that was at it ended"):
        run = measure_checkpoints(FromBuild("sweep_cases:build"), tmp_path, engine="ray", say=kill_one)
    assert len(run.failures) == 1 and len(started) == 2
    again = measure_checkpoints(build, tmp_path, retry=True)
    assert what_was_found(again) == what_was_found(live)


def test_what_fails_in_building_ends_it(local_ray: Any, tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"failing_build\(\) failed .*data.csv"):
        measure_checkpoints(failing_build, tmp_path, engine="ray")
