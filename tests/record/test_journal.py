"""Writing a record: what was appended is there, whatever happens next, and no second writer gets in between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from records import begin, measurement, write

from phasewatch.record import Journal, RecordError, load_run

HOLDS_A_RECORD = """
import os, sys, time
from phasewatch.record import Estimate, Journal, Measurement
journal = Journal(sys.argv[1])
journal.append("header", {"schema_version": 2})
for step in range(5):
    journal.append("measurement", Measurement(step, {"x": Estimate(1.0)}).to_dict())
child = 0
if "fork" in sys.argv:
    wait_for, begun = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begun, b".")
        time.sleep(600)
    os.read(wait_for, 1)
print(journal.run_id, child, flush=True)
time.sleep(600)
"""


def other_process(directory: Path, *arguments: str) -> tuple[subprocess.Popen[str], str, int]:
    """A process that writes to a record: itself, the id of its run, and its child."""
    command = [sys.executable, "-c", HOLDS_A_RECORD, str(directory), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id, child = process.stdout.readline().split()
    return process, run_id, int(child)


def test_kill_minus_nine_loses_nothing_and_lets_go_of_the_record(tmp_path: Path) -> None:
    process, run_id, _ = other_process(tmp_path)
    file = tmp_path / "phasewatch.jsonl"
    assert len(load_run(tmp_path).measurements) == 5  # reading needs no lock
    with pytest.raises(RecordError, match=f"is being written by process {process.pid} on .*one writer at a time"):
        Journal.reopen(file, run_id)
    process.kill()
    process.wait()
    journal = Journal.reopen(file, run_id)
    journal.append("measurement", measurement(9).to_dict())
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == [0, 1, 2, 3, 4, 9] and not run.gaps


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_that_outlives_the_writer_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As workers of a DataLoader do for some seconds."""
    process, run_id, child = other_process(tmp_path, "fork")
    try:
        with pytest.raises(RecordError, match=f"process {process.pid} "):
            Journal.reopen(tmp_path / "phasewatch.jsonl", run_id)
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        Journal.reopen(tmp_path / "phasewatch.jsonl", run_id).close()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_neither_writes_nor_lets_others_write(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            journal.append("end", {"time": 0.0})
        except RecordError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(RecordError, match=f"is being written by process {os.getpid()} "):
        Journal.reopen(tmp_path / "phasewatch.jsonl", journal.run_id)
    journal.append("end", {"time": 0.0})
    assert load_run(tmp_path).finished


def test_a_second_run_in_a_directory_has_a_file_of_its_own(tmp_path: Path) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)
    assert not list(tmp_path.iterdir())  # the first line makes the file
    for journal in (second, first):
        journal.append("header", {"schema_version": 2})
    third = begin(tmp_path)
    assert [journal.path for journal in (first, second, third)] == [
        tmp_path / f"phasewatch-{first.run_id}.jsonl",
        tmp_path / "phasewatch.jsonl",
        tmp_path / f"phasewatch-{third.run_id}.jsonl",
    ]
    assert len({first.run_id, second.run_id, third.run_id}) == 3


def test_a_closed_record_is_opened_by_what_is_appended_unless_another_went_on_with_it(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.close()
    journal.append("measurement", measurement(6).to_dict())
    journal.close()
    other = Journal.reopen(tmp_path / "phasewatch.jsonl", journal.run_id)
    with pytest.raises(RecordError, match="is being written by"):
        journal.append("measurement", measurement(7).to_dict())
    other.append("measurement", measurement(8).to_dict())
    other.close()
    with pytest.raises(RecordError, match="not as this run left it"):
        journal.append("measurement", measurement(9).to_dict())
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == [*range(7), 8]
    assert not run.gaps and not run.damaged


def test_a_file_that_is_removed_is_written_again(tmp_path: Path) -> None:
    journal = begin(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        journal.append("measurement", measurement(6).to_dict())
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.warns(UserWarning, match="was removed while the run went on: all .* once more"):
        journal.append("measurement", measurement(7).to_dict())
    run = load_run(tmp_path / "run")
    assert [m.step for m in run.measurements] == list(range(8)) and not run.gaps


def harmed(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "removed":
        file.unlink()
    elif how == "emptied":
        os.truncate(file, 0)
    elif how == "cut off":
        os.truncate(file, len(content) // 2)
    elif how == "replaced by nothing":
        file.unlink()
        file.touch()
    elif how == "replaced by a part":
        file.unlink()
        file.write_bytes(content[: len(content) // 3])


@pytest.mark.parametrize("how", ["removed", "emptied", "cut off", "replaced by nothing", "replaced by a part"])
@pytest.mark.parametrize("closed", [False, True])
def test_what_is_taken_from_a_record_under_the_run_is_written_again(how: str, closed: bool, tmp_path: Path) -> None:
    whole = begin(tmp_path / "whole", range(8))
    journal = begin(tmp_path / "run")
    if closed:
        journal.close()
    harmed(tmp_path / "run" / "phasewatch.jsonl", how)
    with pytest.warns(UserWarning, match="while the run went on: all .* once more") as warned:
        for step in (6, 7):
            journal.append("measurement", measurement(step).to_dict())
    assert len(warned) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["phasewatch.jsonl"]
    run = load_run(tmp_path / "run")
    assert run.measurements == load_run(tmp_path / "whole").measurements and not run.gaps and not run.damaged
    whole.close()


@pytest.mark.parametrize("special", ["pipe", "directory"])
def test_what_cannot_be_read_in_the_place_of_a_record_is_not_waited_for(special: str, tmp_path: Path) -> None:
    journal = begin(tmp_path)
    file = tmp_path / "phasewatch.jsonl"
    file.unlink()
    os.mkfifo(file) if special == "pipe" else file.mkdir()
    with pytest.warns(UserWarning, match=f"{journal.run_id}.jsonl takes the place of phasewatch.jsonl"):
        journal.append("measurement", measurement(6).to_dict())
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == list(range(7)) and not run.gaps


@pytest.mark.parametrize("way", ["moved there", "copied over it", "written there"])
def test_what_was_put_in_the_place_of_a_record_is_left_alone(way: str, tmp_path: Path) -> None:
    journal = begin(tmp_path / "run")
    file = tmp_path / "run" / "phasewatch.jsonl"
    other = write(tmp_path / "other", range(3), llc=7.0)
    content = other.read_bytes()
    if way == "moved there":
        os.replace(other, file)
    elif way == "copied over it":
        file.write_bytes(content)  # into the same file
    else:
        file.unlink()
        running = begin(tmp_path / "run", range(3), llc=7.0)
        content = file.read_bytes()
    with pytest.warns(UserWarning, match=f"{journal.run_id}.jsonl takes the place of phasewatch.jsonl") as warned:
        journal.append("measurement", measurement(6).to_dict())
    assert len(warned) == 1 and file.read_bytes() == content
    assert journal.path == tmp_path / "run" / f"phasewatch-{journal.run_id}.jsonl"
    run = load_run(tmp_path / "run", journal.run_id)
    assert [m.step for m in run.measurements] == list(range(7)) and not run.gaps
    assert journal.position is not None and journal.position.path == journal.path
    if way == "written there":
        running.close()


def test_what_another_has_added_to_a_record_is_no_reason_to_leave_it(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    file = tmp_path / "phasewatch.jsonl"
    file.write_bytes(file.read_bytes() + b"a note\n")
    journal.append("measurement", measurement(6).to_dict())
    with pytest.warns(UserWarning, match="1 damaged lines were skipped"):
        run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == list(range(7)) and not run.gaps


def test_a_run_goes_on_behind_a_line_that_it_is_known_to_have_written(tmp_path: Path) -> None:
    file = write(tmp_path)
    run_id = load_run(file).header["run_id"]
    journal = Journal.reopen(file, run_id, sequence=20)
    journal.append("measurement", measurement(9).to_dict())
    with pytest.warns(UserWarning, match="13 lines of the run are missing .*8-20"):
        load_run(tmp_path)


def test_only_the_run_asked_for_is_gone_on_with(tmp_path: Path) -> None:
    file = write(tmp_path)
    with pytest.raises(RecordError, match="holds no line of the run 1234"):
        Journal.reopen(file, "1234")
    Journal.reopen(file, load_run(file).header["run_id"]).close()  # nobody holds it


def test_the_position_is_the_last_line_that_is_in_the_file(tmp_path: Path) -> None:
    journal = begin(tmp_path / "run")
    position = journal.position
    assert position is not None and position.path == tmp_path / "run" / "phasewatch.jsonl"
    assert (position.run_id, position.sequence, journal.unwritten) == (journal.run_id, 6, [])
    assert position.checksum in (tmp_path / "run" / "phasewatch.jsonl").read_text().splitlines()[-1]
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        journal.append("measurement", measurement(6).to_dict())
    assert journal.position is None and [line.sequence for line in journal.unwritten] == list(range(8))
    memory = Journal(None)
    memory.append("header", {})
    assert memory.position is None and len(memory.unwritten) == 1


def test_a_relative_directory_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = begin(Path("run"))
    assert journal.path == Path("run/phasewatch.jsonl")
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    journal.append("end", {"time": 0.0})
    assert load_run(tmp_path / "run").finished and not list((tmp_path / "elsewhere" / "run").iterdir())
    assert journal.position is not None and journal.position.path == tmp_path / "run" / "phasewatch.jsonl"


@pytest.mark.parametrize("body", [{"x": float("nan")}, {"run_id": "b"}, {"sequence": 3}])
def test_a_line_that_cannot_be_written_is_no_line(body: dict[str, object], tmp_path: Path) -> None:
    journal = begin(tmp_path)
    with pytest.raises(ValueError):
        journal.append("failure", body)
    journal.append("end", {"time": 0.0})
    run = load_run(tmp_path)
    assert run.finished and not run.gaps and not run.failures


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a place where nobody can write")
def test_a_directory_that_cannot_be_written() -> None:
    with pytest.raises(RecordError, match=r"cannot be written.*may write"):
        Journal("/proc/nowhere")


@pytest.mark.slow
def test_sixty_kills_lose_no_measurement(tmp_path: Path) -> None:
    """A writer that tells of each line once it is appended is killed at times drawn at random, and resumed."""
    script = (
        "import sys\n"
        "from phasewatch.record import Estimate, Journal, Measurement\n"
        "run_id, first = sys.argv[2], int(sys.argv[3])\n"
        "journal = Journal.reopen(sys.argv[1], run_id)\n"
        "for step in range(first, first + 100000):\n"
        "    journal.append('measurement', Measurement(step, {'x': Estimate(float(step))}).to_dict())\n"
        "    print(step, flush=True)\n"
    )
    journal = begin(tmp_path, range(1))
    journal.close()
    assert journal.path is not None
    told = 0
    for kill in range(60):
        command = [sys.executable, "-c", script, str(journal.path), journal.run_id, str(told + 1)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first
        time.sleep(0.0007 * kill)
        process.kill()
        rest = process.stdout.read().split("\n")[:-1]  # a number cut short is of a line that was written
        told = int(rest[-1] if rest else first)
        process.wait()
        run = load_run(tmp_path)
        assert [m.step for m in run.measurements][: told + 1] == list(range(told + 1))
        assert not run.gaps
        told = run.measurements[-1].step
