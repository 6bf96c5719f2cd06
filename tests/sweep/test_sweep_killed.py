"""Sweeps and workers killed at random moments: the record is that of an undisturbed sweep, and nothing is redone."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from sweep_cases import build, trained, what_was_found

from phasewatch import load_run, measure_checkpoints
from phasewatch.record import Measurement, Run
from phasewatch.sweep import sweep
from phasewatch.sweep.one import measured_at

pytestmark = pytest.mark.slow

STEPS = range(24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "checkpoints"
    trained(folder, STEPS)
    return folder


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> Run:
    return measure_checkpoints(build, finished, directory=finished.parent / "undisturbed")


@pytest.fixture
def checkpoints(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "checkpoints"))


def slowly(checkpoints: Path, workers: int, told: Connection) -> None:
    """Measure, and tell how it goes on and which workers there are."""

    def slow(*arguments: Any, **settings: Any) -> Any:
        time.sleep(0.05)
        found = measured_at(*arguments, **settings)
        time.sleep(0.05)
        return found

    sweep.measured_at = slow  # type: ignore[attr-defined]
    sweep.measure_checkpoints(
        build,
        checkpoints,
        workers=workers,
        say=lambda text: told.send((text, [process.pid for process in multiprocessing.active_children()])),
    )


def started(checkpoints: Path, workers: int = 1) -> tuple[BaseProcess, Connection]:
    """A process that measures, forked from one that has imported all and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["phasewatch.sweep.sweep", "phasewatch.watch", "sweep_cases"])
    ours, theirs = context.Pipe()
    process = context.Process(target=slowly, args=(checkpoints, workers, theirs))
    process.start()
    theirs.close()
    return process, ours


def test_a_sweep_killed_at_twenty_moments_ends_with_the_record_of_an_undisturbed_one(
    checkpoints: Path, undisturbed: Run
) -> None:
    """Moments between the first line of a sweep and its third checkpoint or so."""
    moments = [random.Random(k).uniform(0.0, 0.4) for k in range(20)]
    record = checkpoints / "measured"
    known: tuple[Measurement, ...] = ()
    counts = []
    for moment in moments:
        one, told = started(checkpoints)
        assert "to measure" in told.recv()[0]
        time.sleep(moment)
        one.kill()
        one.join()
        run = load_run(record)
        assert run.measurements[: len(known)] == known and not run.damaged and not run.gaps
        known = run.measurements
        counts.append(len(known))
    assert 0 < counts[10] < counts[-1]  # they fell into the sweep
    run = measure_checkpoints(build, checkpoints)
    assert run.measurements[: len(known)] == known and run.finished and not run.damaged
    assert what_was_found(run) == what_was_found(undisturbed) and [m.step for m in run.measurements] == list(STEPS)


def test_workers_killed_at_random_cost_their_checkpoints_until_they_are_tried_again(
    checkpoints: Path, undisturbed: Run
) -> None:
    draw = random.Random(0)
    killed: list[int] = []

    def kill_one(text: str) -> None:
        workers = multiprocessing.active_children()
        if workers and len(killed) < 3 and draw.random() < 0.4:
            one = draw.choice(workers)
            assert one.pid is not None
            os.kill(one.pid, signal.SIGKILL)
            killed.append(one.pid)

    with pytest.warns(UserWarning, match=r"is skipped: .*ended \(exit code -9\)"):
        run = measure_checkpoints(build, checkpoints, workers=2, say=kill_one)
    lost = {failure["step"] for failure in run.failures}
    assert len(killed) == 3 and 0 < len(lost) <= 3
    assert what_was_found(run) == [m for m in what_was_found(undisturbed) if m.step not in lost]
    again = measure_checkpoints(build, checkpoints, workers=2, retry=True)
    assert again.measurements != run.measurements and what_was_found(again) == what_was_found(undisturbed)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_the_sweep_that_is_killed(checkpoints: Path, undisturbed: Run) -> None:
    one, told = started(checkpoints, workers=2)
    workers = {process for _ in range(6) for process in told.recv()[1]}
    one.kill()
    one.join()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2 and not any(map(is_running, workers))
    known = load_run(checkpoints / "measured").measurements
    run = measure_checkpoints(build, checkpoints, workers=2)
    assert [m for m in run.measurements if m in known] == list(known)
    assert 0 < len(known) < len(STEPS) and what_was_found(run) == what_was_found(undisturbed)
