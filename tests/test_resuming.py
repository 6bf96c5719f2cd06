"""A watch that goes on from a checkpoint is the watch that was never stopped, or says what is lost."""

from __future__ import annotations

import copy
import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from phasewatch.record import Estimate, Measurement, load_run
from phasewatch.watch import Watch

INPUTS = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS.sum(dim=1, keepdim=True)
NOISE = 0.01 * torch.randn(200, 3, generator=torch.Generator().manual_seed(1))


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


def make(directory: Path | None = None, on_error: Literal["raise", "warn"] = "raise") -> Watch:
    module = nn.Linear(3, 1, bias=False)
    return Watch(
        module,
        [(INPUTS, TARGETS)],
        loss_fn=loss_fn,
        estimators=(),
        schedule=1,
        directory=directory,
        on_error=on_error,
    )


def train(watch: Watch, first: int, stop: int, shift: float = 0.0) -> Watch:
    """The loss on the probe jumps at steps 20 and 40."""
    for step in range(first, stop):
        with torch.no_grad():
            level = 0.9 * (step >= 20) + 0.6 * (step >= 40) + shift
            watch.module.weight.copy_(NOISE[step] + level)  # type: ignore[union-attr, operator]
        watch.at(step)
    return watch


def saved(watch: Watch) -> dict[str, Any]:
    """The state as a checkpoint has it."""
    buffer = io.BytesIO()
    torch.save(watch.state_dict(), buffer)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, weights_only=True)
    assert json.loads(json.dumps(state)) == state
    return state


def values(measurements: tuple[Measurement, ...]) -> list[tuple[int, dict[str, Estimate]]]:
    """What was measured, without how long it took."""
    return [(m.step, {name: e for name, e in m.estimates.items() if name != "overhead"}) for m in measurements]


def same(watch: Watch, other: Watch) -> bool:
    """Whether two watches have seen and said the same, but that one of them was resumed."""
    assert watch.detector is not None and other.detector is not None
    seen = [{**vars(one.detector), "_resumed": None} for one in (watch, other)]
    return (
        seen[0] == seen[1]
        and values(watch.run.measurements) == values(other.run.measurements)
        and watch.run.flags == other.run.flags
    )


@pytest.fixture(scope="module")
def whole() -> Watch:
    watch = train(make(), 0, 60)
    assert len(watch.transitions) == 2
    return watch


@pytest.mark.parametrize("stop", [1, 22, 45])
@pytest.mark.parametrize("places", ["one directory", "two directories", "memory", "memory to directory", "to memory"])
def test_the_next_measurement_and_the_detector_are_those_of_the_run_that_was_never_stopped(
    places: str, stop: int, whole: Watch, tmp_path: Path
) -> None:
    first_place, second_place = {
        "one directory": (tmp_path, tmp_path),
        "two directories": (tmp_path / "first", tmp_path / "second"),
        "memory": (None, None),
        "memory to directory": (None, tmp_path),
        "to memory": (tmp_path, None),
    }[places]
    first = train(make(first_place), 0, stop)
    state = saved(first)
    before = {**copy.deepcopy(vars(first.detector)), "_resumed": None}
    assert bool(state["lines"]) == (first_place is None)
    train(first, stop, stop + 3, shift=3.0).close()  # it went on for a while, and crashed

    second = make(second_place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(state)
        assert {**vars(second.detector), "_resumed": None} == before
        train(second, stop, 60).close()
        assert same(second, whole)
        if second_place is not None:
            run = load_run(second_place)
            assert run.finished and not run.gaps and not run.failures
            assert values(run.measurements) == values(whole.run.measurements)
            assert run.flags == whole.run.flags
            lines = (second_place / "phasewatch.jsonl").read_text()
            in_place = places == "one directory"
            assert lines.count('"kind":"header"') == 1 and lines.count('"kind":"resume"') == in_place
            continued = run.header.get("continues", {}).get("run_id")
            assert continued == (None if in_place else first.run.header["run_id"])
        if places == "two directories":
            assert len(load_run(tmp_path / "first").measurements) == stop + 3


def test_a_checkpoint_does_not_grow_with_the_run(tmp_path: Path) -> None:
    watch = make(tmp_path)
    sizes = []
    for stop in (8, 40, 80):
        train(watch, max(watch._last_taken, 0) + 1 if sizes else 0, stop)
        sizes.append(len(json.dumps(saved(watch))))
    assert max(sizes) - min(sizes) < 32  # digits; each measurement is a line of 300 bytes and more


def test_from_an_older_checkpoint_what_it_did_not_know_is_taken_back(whole: Watch, tmp_path: Path) -> None:
    """Also what was recorded between two tries: the record is that of the try that the checkpoint is of."""
    first = train(make(tmp_path), 0, 30)
    early = saved(first)
    late = saved(train(first, 30, 50))
    first.close()
    second = make(tmp_path)
    second.load_state_dict(early)
    train(second, 30, 55, shift=5.0).close()  # another data order, say
    third = make(tmp_path)
    third.load_state_dict(late)
    train(third, 50, 60).close()
    assert same(third, whole)
    run = load_run(tmp_path)
    assert values(run.measurements) == values(whole.run.measurements) and run.flags == whole.run.flags
    assert run.finished and [path.name for path in tmp_path.iterdir()] == ["phasewatch.jsonl"]


def test_while_the_first_still_writes_the_resumed_run_has_a_record_of_its_own(whole: Watch, tmp_path: Path) -> None:
    first = train(make(tmp_path), 0, 30)
    second = make(tmp_path)
    with pytest.warns(UserWarning, match="is being written by process .* a record of its own beside that one"):
        second.load_state_dict(saved(first))
    for step in range(30, 60):
        train(first, step, step + 1)
        train(second, step, step + 1)
    for watch in (first, second):
        watch.close()
        assert same(watch, whole)
        assert watch.run.path is not None
        run = load_run(watch.run.path)
        assert values(run.measurements) == values(whole.run.measurements)
        assert run.finished and not run.gaps and not run.damaged
    assert first.run.path != second.run.path
    assert ["is being written by" in failure["error"] for failure in second.run.failures] == [True]


def test_a_record_that_was_moved_is_found_in_the_directory_of_the_run_or_beside_the_checkpoint(
    whole: Watch, tmp_path: Path
) -> None:
    first = train(make(tmp_path / "first"), 0, 30)
    state = saved(first)
    first.close()
    shutil.move(tmp_path / "first", tmp_path / "moved")
    for directory, places in ((tmp_path / "new", [tmp_path / "moved"]), (tmp_path / "moved", [])):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            watch = make(directory)
            watch.load_state_dict(state, places)
            train(watch, 30, 60).close()
        assert same(watch, whole) and load_run(directory).finished
    assert {path.name for path in (tmp_path / "moved").iterdir()} == {"phasewatch.jsonl"}


@pytest.mark.parametrize("same_directory", [True, False])
def test_a_record_that_is_gone_is_told_and_the_run_goes_on(same_directory: bool, tmp_path: Path) -> None:
    first = train(make(tmp_path / "first"), 0, 30)
    state = saved(first)
    first.close()
    shutil.rmtree(tmp_path / "first")
    train(make(tmp_path / "first"), 0, 5, shift=9.0).close()  # another run took the place
    directory = tmp_path / ("first" if same_directory else "second")
    watch = make(directory)
    with pytest.warns(UserWarning, match="is not there any more.*measured until then is missing.*put the whole record"):
        watch.load_state_dict(state)
    train(watch, 30, 60).close()
    assert watch.run.path is not None
    run = load_run(watch.run.path)
    assert [m.step for m in run.measurements] == list(range(30, 60))
    assert ["is not there any more" in failure["error"] for failure in run.failures] == [True]
    assert run.header["continues"] == {"run_id": first.run.header["run_id"], "sequence": state["record"]["sequence"]}
    assert len(load_run(tmp_path / "first" / "phasewatch.jsonl").measurements) == 5
    # It knows its place in the run all the same: what it measures is what it would have measured.
    assert watch.clock.steps >= first.clock.steps


@pytest.mark.parametrize("in_place", [True, False])
def test_of_a_record_copied_by_half_the_rest_is_used_and_the_loss_stays_to_be_seen(
    in_place: bool, tmp_path: Path
) -> None:
    first = train(make(tmp_path / "first"), 0, 30)
    state = saved(first)
    first.close()
    file = tmp_path / "first" / "phasewatch.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:21]))  # the header and steps 0 to 19
    watch = make(tmp_path / ("first" if in_place else "second"))
    with pytest.warns(UserWarning, match=rf"phasewatch\.jsonl lacks {state['record']['sequence'] - 20} of the"):
        watch.load_state_dict(state)
    train(watch, 30, 60).close()
    assert watch.run.path is not None
    if in_place:
        with pytest.warns(UserWarning, match="lines of the run are missing .*: 21-"):
            run = load_run(watch.run.path)
    else:
        run = load_run(watch.run.path)
    assert [m.step for m in run.measurements] == [*range(20), *range(30, 60)]
    assert [failure["what"] for failure in run.failures] == ["resuming"]
    assert run.finished is not in_place  # the new one is whole in itself, and its header says what it continues


def test_a_whole_record_elsewhere_is_preferred_to_a_half_one_here(whole: Watch, tmp_path: Path) -> None:
    first = train(make(tmp_path / "first"), 0, 30)
    state = saved(first)
    first.close()
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    half = tmp_path / "copy" / "phasewatch.jsonl"
    half.write_bytes(half.read_bytes()[:3000])
    watch = make(tmp_path / "copy")
    watch.load_state_dict(state)
    train(watch, 30, 60).close()
    assert same(watch, whole)
    assert watch.run.path == tmp_path / "copy" / f"phasewatch-{watch.run.header['run_id']}.jsonl"
    assert half.stat().st_size == 3000


def test_a_copied_folder_goes_on_by_itself(whole: Watch, tmp_path: Path) -> None:
    """Two records of one id, of which each goes on: a checkpoint of one is never taken for one of the other."""
    first = train(make(tmp_path / "first"), 0, 12)
    early = saved(first)
    first.close()
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    original = make(tmp_path / "first")
    original.load_state_dict(early)
    late = saved(train(original, 12, 30))
    original.close()
    copy_ = make(tmp_path / "copy")
    copy_.load_state_dict(early)
    train(copy_, 12, 30, shift=7.0).close()
    watch = make(tmp_path / "copy")
    watch.load_state_dict(late)
    train(watch, 30, 60).close()
    assert same(watch, whole)
    assert watch.run.path is not None and watch.run.path.name != "phasewatch.jsonl"
    assert load_run(watch.run.path).header["continues"]["run_id"] == first.run.header["run_id"]


def test_what_could_not_be_written_yet_is_in_the_checkpoint(whole: Watch, tmp_path: Path) -> None:
    first = make(tmp_path / "first", on_error="warn")
    train(first, 0, 25)
    shutil.rmtree(tmp_path / "first")
    with pytest.warns(UserWarning, match="record failed"):
        train(first, 25, 30)
    state = saved(first)
    assert state["record"] is None and len([kind for kind, _ in state["lines"] if kind == "measurement"]) == 30
    watch = make(tmp_path / "second")
    watch.load_state_dict(state)
    train(watch, 30, 60).close()
    assert same(watch, whole)
    assert values(load_run(tmp_path / "second").measurements) == values(whole.run.measurements)


def test_two_watches_in_one_directory_are_each_read_back_alone_and_whole(tmp_path: Path) -> None:
    one, two = make(tmp_path), make(tmp_path)
    for step in range(12):
        train(one, step, step + 1)
        train(two, step, step + 1, shift=1.0)
    for watch in (one, two):
        watch.close()
    later = train(make(tmp_path), 0, 3)  # one after the other, and not even closed
    for watch, count in ((one, 12), (two, 12), (later, 3)):
        assert watch.run.path is not None
        run = load_run(watch.run.path)
        assert values(run.measurements) == values(watch.run.measurements) and len(run.measurements) == count
        assert run.header["run_id"] == watch.run.header["run_id"]
    assert len({watch.run.path for watch in (one, two, later)}) == 3


def test_a_resumed_run_follows_the_schedule_that_it_is_given_now(tmp_path: Path) -> None:
    state = saved(train(make(tmp_path), 0, 20))
    other = Watch(nn.Linear(3, 1, bias=False), [(INPUTS, TARGETS)], loss_fn=loss_fn, estimators=(), schedule=7)
    other.load_state_dict(state, [tmp_path])
    train(other, 20, 50)
    assert [m.step for m in other.run.measurements if m.step >= 20] == [21, 28, 35, 42, 49]


def test_a_measurement_that_is_asked_for_is_made_at_the_next_step_only() -> None:
    watch = Watch(nn.Linear(3, 1, bias=False), [(INPUTS, TARGETS)], loss_fn=loss_fn, estimators=(), schedule=[0, 30])
    train(watch, 0, 10)
    watch.request()
    train(watch, 10, 40)
    assert [m.step for m in watch.run.measurements] == [0, 10, 30]


def test_what_is_asked_for_at_a_step_of_the_schedule_takes_its_place() -> None:
    watch = Watch(nn.Linear(3, 1, bias=False), [(INPUTS, TARGETS)], loss_fn=loss_fn, estimators=(), schedule=5)
    train(watch, 0, 10)
    watch.request()
    train(watch, 10, 21)
    assert [m.step for m in watch.run.measurements] == [0, 5, 10, 15, 20]
