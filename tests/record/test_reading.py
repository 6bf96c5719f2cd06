"""What was recorded is read back as it was, or said to be lost: never changed, never of another run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from records import HEADER, begin, measurement, write

import phasewatch
from phasewatch.printable import printable
from phasewatch.record import (
    Change,
    Estimate,
    Gap,
    Journal,
    Measurement,
    RecordError,
    Run,
    Transition,
    load_run,
)
from phasewatch.record.lines import Line


def read(path: Path, run_id: str | None = None) -> Run:
    """The run, whatever is wrong with its record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_run(path, run_id)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write(tmp_path)
    run = load_run(tmp_path)
    assert run.header["n"] == 100
    assert run.measurements == tuple(measurement(step) for step in range(6))
    assert run.finished and run.gaps == () and run.damaged == ()
    series = run.series("llc")
    assert series.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert series.reliable.tolist() == [True, False] * 3
    np.testing.assert_array_equal(series.standard_errors, 0.1)
    assert np.isnan(run.series("loss").standard_errors).all()
    frame = run.to_pandas()
    assert frame.pivot(index="step", columns="name", values="value")["loss"].tolist() == [1 / (s + 1) for s in range(6)]
    assert "6 measurements" in repr(run) and "0 lines missing" in repr(run) and "3 unreliable" in repr(series)


def test_not_finite_values_come_back_as_nan(tmp_path: Path) -> None:
    Journal(tmp_path).append(
        "measurement", Measurement(0, {"llc": Estimate(math.nan), "trace": Estimate(math.inf)}).to_dict()
    )
    [found] = load_run(tmp_path).measurements
    assert found.estimates == {"llc": Estimate(math.nan), "trace": Estimate(math.nan)}


def test_each_line_is_json_and_names_its_run_and_its_number(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in write(tmp_path).read_text().splitlines()]
    assert [line["sequence"] for line in lines] == list(range(8))
    assert {line["run_id"] for line in lines} == {load_run(tmp_path).header["run_id"]}
    assert all("crc32" in line for line in lines)


@pytest.mark.parametrize("line", range(8))
def test_every_single_flipped_bit_is_found_and_costs_one_line(line: int, tmp_path: Path) -> None:
    file = write(tmp_path)
    lines = file.read_bytes().split(b"\n")
    rng = np.random.default_rng(line)
    for _ in range(25):
        torn = list(lines)
        flipped = bytearray(torn[line])
        flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
        torn[line] = bytes(flipped)
        file.write_bytes(b"\n".join(torn))
        with pytest.warns(UserWarning, match="damaged"):
            run = load_run(tmp_path)
        assert [m.step for m in run.measurements] == [step for step in range(6) if step != line - 1]
        assert run.damaged[0].number == line + 1
        # That the last line is missing cannot be seen; it is the one without which no run has finished.
        assert run.gaps == ((Gap(line, line),) if line < 7 else ())
        assert not run.finished


def two_runs(folder: Path) -> dict[str, Run]:
    """Two runs in one directory that overlap in time; each is the other's worst case, with the same steps."""
    first = begin(folder, range(4), llc=1.0)
    second = begin(folder, range(4), llc=2.0)
    for step in range(4, 9):
        for journal, llc in ((first, 1.0), (second, 2.0)):
            journal.append("measurement", measurement(step, llc).to_dict())
    for journal in (first, second):
        journal.append("end", {"time": 1e9})
        journal.close()
    return {journal.run_id: load_run(journal.path) for journal in (first, second) if journal.path}


def test_two_overlapping_runs_in_one_directory_are_each_whole(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    assert [run.series("llc").values.tolist() for run in runs.values()] == [[1.0] * 9, [2.0] * 9]
    assert all(run.finished and not run.gaps for run in runs.values())
    first, second = runs
    assert {path.name for path in tmp_path.iterdir()} == {"phasewatch.jsonl", f"phasewatch-{second}.jsonl"}
    with pytest.raises(RecordError) as told:
        load_run(tmp_path)
    heading, *listed = str(told.value).splitlines()
    assert heading == f"{tmp_path} holds 2 runs; give one of them:"
    for run_id, run in runs.items():
        [line] = [line for line in listed if str(run.path) in line]
        assert run_id in line and "9 measurements" in line and "created 2025-06-1" in line
        assert load_run(tmp_path, run_id).measurements == run.measurements
    with pytest.raises(RecordError, match="holds no run 1234"):
        load_run(tmp_path, "1234")


def test_no_flipped_bit_changes_a_value_or_mixes_two_runs(tmp_path: Path) -> None:
    """All in one file, which no phasewatch writes: what holds here holds where each has a file of its own."""
    runs = two_runs(tmp_path / "apart")
    file = tmp_path / "together.jsonl"
    whole = b"".join(run.path.read_bytes() for run in runs.values() if run.path)
    rng = np.random.default_rng(0)
    places = np.unique(np.concatenate([np.arange(0, len(whole), 23), rng.integers(len(whole), size=200)]))
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        lost = 0
        for run_id, run in runs.items():
            seen = read(file, run_id)
            assert seen.header["run_id"] == run_id
            assert all(m in run.measurements for m in seen.measurements)
            missing = sum(map(len, seen.gaps)) + (not seen.finished and not seen.gaps)
            assert len(run.measurements) - len(seen.measurements) <= missing
            lost += missing
        assert 1 <= lost <= 2  # two where a newline was hit
        assert read(file, run_id).damaged


def test_a_file_of_several_runs_is_not_guessed_at(tmp_path: Path) -> None:
    runs = two_runs(tmp_path / "apart")
    file = tmp_path / "together.jsonl"
    file.write_bytes(b"".join(run.path.read_bytes() for run in runs.values() if run.path))
    with pytest.raises(RecordError, match="holds 2 runs; give the run_id of one of them") as told:
        load_run(file)
    assert all(run_id in str(told.value) for run_id in runs)
    for run_id, run in runs.items():
        assert load_run(file, run_id).measurements == run.measurements


@pytest.mark.parametrize("line", range(8))
def test_a_deleted_line_is_reported(line: int, tmp_path: Path) -> None:
    file = write(tmp_path)
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join(lines[:line] + lines[line + 1 :]))
    if line < 7:
        with pytest.warns(UserWarning, match=rf"1 lines of the run are missing \(by their sequence numbers: {line}\)"):
            run = load_run(tmp_path)
        assert run.gaps == (Gap(line, line),) and "1 lines missing" in repr(run)
    run = read(tmp_path)
    assert [m.step for m in run.measurements] == [step for step in range(6) if step != line - 1]
    assert not run.finished
    assert run.header["run_id"] in file.read_text()


def test_nine_deleted_lines_are_nine_missing_lines_and_the_run_is_not_whole(tmp_path: Path) -> None:
    file = write(tmp_path, range(20))
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join(lines[:5] + lines[14:]))
    with pytest.warns(UserWarning, match="9 lines of the run are missing .*5-13"):
        run = load_run(tmp_path)
    assert run.gaps == (Gap(5, 13),) and len(run.gaps[0]) == 9
    assert not run.finished and len(run.measurements) == 11
    assert "9 lines missing" in repr(run)


def test_without_its_header_a_run_is_known_by_its_lines(tmp_path: Path) -> None:
    file = write(tmp_path)
    run_id = load_run(file).header["run_id"]
    file.write_bytes(file.read_bytes().partition(b"\n")[2])
    with pytest.warns(UserWarning, match="the header is among them"):
        run = load_run(tmp_path)
    assert run.header == {"run_id": run_id} and len(run.measurements) == 6


def resumed(directory: Path) -> Path:
    """Steps 0 to 5, resumed from before 3 up to 8, and from the first try at 4 once more, up to 6."""
    file = write(directory)
    run_id = load_run(file).header["run_id"]
    for after, steps, llc in ((3, range(3, 9), 7.0), (5, range(5, 7), 8.0)):
        journal = Journal.reopen(file, run_id)
        journal.append("resume", {"step": steps[0], "after": after})
        for step in steps:
            journal.append("measurement", measurement(step, llc).to_dict())
        journal.append("end", {"time": 1e9})
        journal.close()
    return file


def test_resuming_takes_back_what_came_after_the_line_that_it_follows(tmp_path: Path) -> None:
    resumed(tmp_path)
    run = load_run(tmp_path)
    assert run.series("llc").steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    # line 5 is the first try at step 4: of the second try, with 7, nothing is left
    assert run.series("llc").values.tolist() == [1.5] * 5 + [8.0] * 2
    assert run.finished and not run.gaps


def test_a_deleted_line_of_a_resumed_run_brings_nothing_back(tmp_path: Path) -> None:
    file = resumed(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    whole = load_run(tmp_path).measurements
    kinds = [json.loads(line)["kind"] for line in lines]
    last_resume = 16
    assert kinds[last_resume] == "resume"
    for number in range(len(lines) - 1):
        file.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        run = read(tmp_path)
        assert run.gaps == (Gap(number, number),) and not run.finished
        if number == last_resume:
            # Where it went back to is lost, so 3 and 4 are those of the second try; of what it made anew, none is.
            assert run.series("llc").values.tolist() == [1.5] * 3 + [7.0] * 2 + [8.0] * 2
        else:
            assert all(m in whole for m in run.measurements)
            assert len(whole) - len(run.measurements) <= (kinds[number] == "measurement")


def test_a_torn_last_line_is_skipped_and_later_lines_are_whole(tmp_path: Path) -> None:
    file = write(tmp_path)
    run_id = load_run(file).header["run_id"]
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:6]) + lines[6][:-40])
    Journal.reopen(file, run_id).append("measurement", measurement(9).to_dict())
    with pytest.warns(UserWarning, match="line 7 is torn"):
        assert [m.step for m in load_run(tmp_path).measurements] == [0, 1, 2, 3, 4, 9]


def test_a_copied_folder_is_told_and_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "one")
    run_id = load_run(tmp_path).header["run_id"]
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    with pytest.raises(RecordError, match="holds 2 runs") as told:
        load_run(tmp_path)
    assert str(told.value).count(run_id) == 2
    with pytest.raises(RecordError, match=f"holds 2 records of the run {run_id}; give one of these"):
        load_run(tmp_path, run_id)
    assert load_run(tmp_path / "copy").measurements == load_run(tmp_path / "one").measurements
    both = tmp_path / "both.jsonl"
    both.write_bytes((tmp_path / "one" / "phasewatch.jsonl").read_bytes() * 2)
    with pytest.warns(UserWarning, match="8 damaged lines .*line 9 has the sequence number 0 of an earlier line"):
        assert load_run(both).measurements == load_run(tmp_path / "one").measurements


def test_a_record_that_is_copied_by_half_claims_no_more_than_it_has(tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(UserWarning, match="is torn"):
        run = load_run(tmp_path)
    assert 0 < len(run.measurements) < 6 and not run.finished


def test_errors_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give the log directory"):
        load_run(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no phasewatch\.jsonl"):
        load_run(tmp_path)
    (tmp_path / "phasewatch.jsonl").touch()  # of a run that has not recorded anything yet
    with pytest.raises(FileNotFoundError, match=r"no phasewatch\.jsonl"):
        load_run(tmp_path)
    (tmp_path / "phasewatch.jsonl").unlink()
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night.\n")
    with pytest.raises(RecordError, match="is no run record: line 1 is torn, or its checksum does not match"):
        load_run(tmp_path / "novel.txt")
    checksum = zlib.crc32(b'{"kind":"header"}')
    (tmp_path / "old.jsonl").write_text(f'{{"crc32":"{checksum:08x}","kind":"header"}}\n')
    with pytest.raises(RecordError, match="earlier version of phasewatch"):
        load_run(tmp_path / "old.jsonl")
    for name in ("one", "two"):
        write(tmp_path / name)
    with pytest.raises(RecordError, match="holds 2 runs; give one of them"):
        load_run(tmp_path)
    Journal(tmp_path / "new").append("header", {**HEADER, "schema_version": 99})
    with pytest.raises(RecordError, match=r"schema version 99.*upgrade"):
        load_run(tmp_path / "new")
    with pytest.raises(KeyError, match="it has: loss, llc"):
        load_run(tmp_path / "one").series("trace")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "record"
    os.mkfifo(pipe)
    for told in (lambda: load_run(pipe), lambda: load_run(pipe, "1234")):
        with pytest.raises(RecordError, match="record is a pipe or a device, which would be waited for; write"):
            told()
    os.mkfifo(tmp_path / "phasewatch.jsonl")
    with pytest.raises(FileNotFoundError, match="There is no phasewatch.jsonl"):
        load_run(tmp_path)
    write(tmp_path)  # beside the pipe, into a file of another name
    assert len(load_run(tmp_path).measurements) == 6


def test_what_is_quoted_of_a_file_does_not_steer_the_terminal(tmp_path: Path) -> None:
    red, named = "\x1b[31mred\x1b[0m\x9b\u202e", "red"
    journal = Journal(tmp_path)
    journal.append("header", {**HEADER, "signals": [{red: 1}]})
    journal.append("plan", {red: 1})
    journal.append("measurement", measurement(0).to_dict())
    with pytest.warns(UserWarning, match=named) as caught:
        load_run(tmp_path)
    told = [str(one.message) for one in caught]
    file = journal.path
    assert file is not None
    file.write_bytes(Line(red, 0, "header", {**HEADER, "schema_version": 1, "versions": {"phasewatch": red}}).encoded())
    for given in ({}, {"run_id": red}, {"run_id": "1"}):
        with pytest.raises(RecordError, match=named) as refused:
            load_run(tmp_path, **given)
        told.append(str(refused.value))
    change = Change(1.0, 2.0, 1.0, 0.1, (0.8, 1.2), 10.0)
    told.append(repr(Transition(0.0, 2.0, 1.0, (0.0, 2.0), "A", {red: change}, 1.0, 0.1)))
    for text in told:
        assert named in text and printable(text) == text


def test_importing_phasewatch_is_light() -> None:
    script = (
        "import sys, phasewatch\n"
        "for name in phasewatch.__all__: getattr(phasewatch, name)\n"
        "heavy = {'pytorch_lightning', 'lightning', 'tensorboard', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert phasewatch.__version__
