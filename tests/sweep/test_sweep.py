"""A sweep over checkpoints: the numbers of the live run, once each, whatever befalls it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_cases import STEPS, batches, build, network, plain_build, squared_error, trained, what_was_found
from torch import nn

import phasewatch
from phasewatch import Watch, load_run, measure_checkpoints
from phasewatch.estimators import HessianSpectrum, Reading
from phasewatch.record import Estimate, RecordError, Run
from phasewatch.sweep import CheckpointError
from phasewatch.sweep.record import LOCK


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("finished") / "checkpoints"
    return folder, trained(folder)


@pytest.fixture
def checkpoints(finished: tuple[Path, Run], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "checkpoints"))


def test_the_numbers_are_those_of_the_live_run_to_the_bit(finished: tuple[Path, Run], checkpoints: Path) -> None:
    folder, live = finished
    torch.manual_seed(99)
    run = measure_checkpoints(build, checkpoints)
    assert run.path == Path(os.path.relpath(checkpoints)) / "measured" / "phasewatch.jsonl"
    assert what_was_found(run) == what_was_found(live) and [m.step for m in run.measurements] == list(STEPS)
    assert what_was_found(load_run(checkpoints / "measured")) == what_was_found(live)
    assert load_run(checkpoints / "measured").finished
    assert run.header["n"] == 500 and run.header["seed"] == 3 and run.header["source"] == "checkpoints"
    values = run.series("hessian_max").values
    assert len(set(values)) == len(STEPS)  # each checkpoint is another network


def test_a_plain_build_has_the_defaults_of_a_watch(tmp_path: Path) -> None:
    module, probe, loss_fn = plain_build()
    torch.save(module.state_dict(), tmp_path / "model-7.pt")
    run = measure_checkpoints(plain_build, tmp_path)
    watch = Watch(module, probe, loss_fn=loss_fn)
    watch.measure(7)
    assert what_was_found(run) == what_was_found(watch.run)
    assert {"llc_behavioral", "hessian_max", "nullity"} <= set(run.names)


def test_a_second_sweep_measures_only_what_is_new(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checkpoints.parent / "later.pt"
    (checkpoints / "model-100.pt").rename(kept)
    first = measure_checkpoints(build, checkpoints)
    kept.rename(checkpoints / "model-100.pt")
    lines: list[str] = []
    second = measure_checkpoints(build, checkpoints, say=lines.append)
    assert second.measurements[:4] == first.measurements  # the very same, with their times
    assert [m.step for m in second.measurements] == list(STEPS) and second.finished
    assert "5 checkpoints, 4 measured before; 1 to measure" in lines[0] and "1 of 1, step 100" in lines[1]
    before = (checkpoints / "measured" / "phasewatch.jsonl").read_bytes()
    monkeypatch.setattr("phasewatch.sweep.one.read_checkpoint", None)  # nothing is left to read
    assert measure_checkpoints(build, checkpoints).measurements == second.measurements
    assert (checkpoints / "measured" / "phasewatch.jsonl").read_bytes() == before


def other_seed() -> Watch:
    return Watch(network(), batches(), loss_fn=squared_error, n=500, estimators=[HessianSpectrum(2)], seed=4)


def other_estimator() -> Watch:
    return Watch(network(), batches(), loss_fn=squared_error, n=500, estimators=[HessianSpectrum(3)], seed=3)


def other_data() -> Watch:
    probe = [(x + 1e-6, y) for x, y in batches()]
    return Watch(network(), probe, loss_fn=squared_error, n=500, estimators=[HessianSpectrum(2)], seed=3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (other_seed, "seed is 3 there and 4 here"),
        (other_estimator, "settings of what is measured are others"),
        (other_data, "the samples are others .*draws them at random, it has to seed them"),
    ],
)
def test_what_is_measured_otherwise_does_not_get_into_the_same_record(
    other: Any, message: str, checkpoints: Path
) -> None:
    before = measure_checkpoints(build, checkpoints)
    with pytest.raises(RecordError, match=message):
        measure_checkpoints(other, checkpoints)
    assert load_run(checkpoints / "measured").measurements == before.measurements
    elsewhere = measure_checkpoints(other, checkpoints, directory=checkpoints / "elsewhere")
    assert len(elsewhere.measurements) == len(STEPS)


def test_a_record_of_the_live_run_in_the_same_directory_is_left_alone(checkpoints: Path) -> None:
    watch = Watch(network(), batches(), loss_fn=squared_error, directory=checkpoints, estimators=[], schedule=1)
    watch.at(0)
    watch.close()
    before = (checkpoints / "phasewatch.jsonl").read_bytes()
    run = measure_checkpoints(build, checkpoints, directory=checkpoints)
    assert run.path is not None and run.path.name.startswith("phasewatch-") and len(run.measurements) == len(STEPS)
    assert measure_checkpoints(build, checkpoints, directory=checkpoints).measurements == run.measurements
    assert (checkpoints / "phasewatch.jsonl").read_bytes() == before


def test_a_checkpoint_that_fails_is_skipped_and_tried_again_on_request(
    finished: tuple[Path, Run], checkpoints: Path
) -> None:
    whole = (checkpoints / "model-8.pt").read_bytes()
    (checkpoints / "model-8.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(nn.Linear(3, 2).state_dict(), checkpoints / "model-16.pt")
    with pytest.warns(UserWarning) as warned:
        run = measure_checkpoints(build, checkpoints)
    told = [str(warning.message) for warning in warned]
    assert any("step 8 is skipped: " in text and "model-8.pt cannot be read" in text for text in told)
    assert any("step 16 is skipped: " in text and "is of another network than Sequential" in text for text in told)
    assert [m.step for m in run.measurements] == [0, 4, 100]
    assert [f["step"] for f in run.failures] == [8, 16]
    (checkpoints / "model-8.pt").write_bytes(whole)
    lines: list[str] = []
    assert measure_checkpoints(build, checkpoints, say=lines.append).measurements == run.measurements
    assert "2 failed before (--retry tries them again)" in lines[0]
    with pytest.warns(UserWarning, match="step 16 is skipped"):
        again = measure_checkpoints(build, checkpoints, retry=True)
    live = [m for m in what_was_found(finished[1]) if m.step != 16]
    assert what_was_found(again) == live


def test_a_torn_file_without_a_step_in_its_name_is_said_and_left_out(checkpoints: Path) -> None:
    (checkpoints / "last.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"last\.pt cannot be read as a checkpoint .* It is left out"):
        assert len(measure_checkpoints(build, checkpoints).measurements) == len(STEPS)


def test_jobs_that_know_nothing_of_each_other_make_one_record(
    finished: tuple[Path, Run], checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [measure_checkpoints(build, checkpoints, shard=(i, 2)) for i in (1, 2)]
    assert [[m.step for m in part.measurements] for part in parts] == [[0, 8, 100], [4, 16]]
    measure_checkpoints(
        other_seed, checkpoints, directory=checkpoints / "measured" / "shard-9-of-9"
    )  # of another sweep
    monkeypatch.setattr("phasewatch.sweep.one.read_checkpoint", None)  # nothing is left to read
    run = measure_checkpoints(build, checkpoints)
    assert what_was_found(run) == what_was_found(finished[1])
    assert what_was_found(load_run(checkpoints / "measured")) == what_was_found(run)
    assert len(run.failures) == 0 and run.header["seed"] == 3
    for wrong in [(0, 2), (3, 2)]:
        with pytest.raises(ValueError, match="expected .i, n. with i from 1 to n"):
            measure_checkpoints(build, checkpoints, shard=wrong)
    with pytest.raises(CheckpointError, match="none is left for 6 of 6"):
        measure_checkpoints(build, checkpoints, shard=(6, 6))


class Fragile:
    """An estimator that fails on one network."""

    name = "fragile"

    def read(self, objective: Any, n: int, seed: int) -> Reading:
        if objective.loss().item() < self.least:
            raise FloatingPointError("planted")
        return Reading({"fragile": Estimate(1.0)})

    least = 0.0


def test_an_estimator_that_fails_costs_only_its_numbers(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile() -> Watch:
        return Watch(network(), batches(), loss_fn=squared_error, estimators=[HessianSpectrum(2), Fragile()])

    losses = measure_checkpoints(build, checkpoints, directory=checkpoints / "1").series("loss").values
    monkeypatch.setattr(Fragile, "least", float(sorted(losses)[2]))
    with pytest.warns(UserWarning) as warned:
        run = measure_checkpoints(fragile, checkpoints, directory=checkpoints / "2")
    assert len([w for w in warned if "fragile failed at step" in str(w.message)]) == 1
    assert len(run.series("fragile")) == 3 and len(run.series("hessian_max")) == 5
    assert [f["what"] for f in run.failures] == ["fragile", "fragile"]


def test_if_none_can_be_measured_it_says_why(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save(nn.Linear(5, 1).state_dict(), tmp_path / f"model-{step}.pt")
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(CheckpointError, match=r"None of 2 checkpoints .* of another network than Sequential"),
    ):
        measure_checkpoints(build, tmp_path)
    assert not (tmp_path / "measured").exists()  # so that the right network can be given next


def test_two_sweeps_do_not_meet_in_one_directory(checkpoints: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from phasewatch.sweep.record import _locked;"
        f"lock = _locked(Path({str(checkpoints / 'measured' / LOCK)!r})); print('locked', flush=True); time.sleep(60)"
    )
    measure_checkpoints(build, checkpoints)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(RecordError, match=r"are being measured into .*measured by another process"):
            measure_checkpoints(build, checkpoints)
        other.kill()
    assert len(measure_checkpoints(build, checkpoints).measurements) == len(STEPS)


@pytest.mark.parametrize("function", ["build", "plain_build"])
def test_what_is_built_need_not_have_the_weights(function: str) -> None:
    """A sanity check of the cases: the numbers of a sweep cannot come from what ``build`` has made."""
    made = [{"build": lambda: build().module, "plain_build": lambda: plain_build()[0]}[function]() for _ in range(2)]
    assert not torch.equal(next(made[0].parameters()), next(made[1].parameters()))


def _race(folder: Path, results: Any) -> None:
    try:
        results.put(len(measure_checkpoints(build, folder).measurements))
    except RecordError as error:
        results.put(str(error))


@pytest.mark.slow
def test_of_two_sweeps_that_begin_at_once_one_is_refused_or_finds_all_done(checkpoints: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    both = [context.Process(target=_race, args=(checkpoints, results)) for _ in range(2)]
    for process in both:
        process.start()
    told = [results.get(timeout=120) for _ in both]
    for process in both:
        process.join()
    assert len(STEPS) in told and all(one == len(STEPS) or "by another process" in one for one in told)
    assert [path.name for path in (checkpoints / "measured").glob("*.jsonl")] == ["phasewatch.jsonl"]
    run = phasewatch.load_run(checkpoints / "measured")
    assert [m.step for m in run.measurements] == list(STEPS) and not run.damaged and not run.gaps
