from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phasewatch
from phasewatch.record import (
    FILE_NAME,
    SCHEMA_VERSION,
    Estimate,
    Histogram,
    Ledger,
    Measurement,
    RecordError,
    load_run,
)

HEADER: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "n": 100, "run_id": "a"}


def measurement(step: int, llc: float = 1.5) -> Measurement:
    return Measurement(
        step,
        {"loss": Estimate(1 / (step + 1)), "llc": Estimate(llc, 0.1, ("too few draws",) if step % 2 else ())},
        {"hessian_eigenvalues": Histogram([0.0, 1.0], [3.0, 4.0])},
        0.5,
        1e9,
    )


def write(path: Path, steps: range = range(6)) -> Path:
    ledger = Ledger(path / FILE_NAME)
    ledger.append("header", HEADER)
    for step in steps:
        ledger.append("measurement", measurement(step).to_dict())
    return path / FILE_NAME


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write(tmp_path)
    run = load_run(tmp_path)
    assert run.header["n"] == 100
    assert run.measurements == tuple(measurement(step) for step in range(6))
    series = run.series("llc")
    assert series.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert series.reliable.tolist() == [True, False] * 3
    np.testing.assert_array_equal(series.standard_errors, 0.1)
    assert np.isnan(run.series("loss").standard_errors).all()
    frame = run.to_pandas()
    assert frame.pivot(index="step", columns="name", values="value")["loss"].tolist() == [1 / (s + 1) for s in range(6)]
    assert "6 measurements" in repr(run) and "3 unreliable" in repr(series)


def test_not_finite_values_come_back_as_nan(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FILE_NAME)
    ledger.append("measurement", Measurement(0, {"llc": Estimate(math.nan), "trace": Estimate(math.inf)}).to_dict())
    [found] = load_run(tmp_path).measurements
    assert found.estimates == {"llc": Estimate(math.nan), "trace": Estimate(math.nan)}


@pytest.mark.parametrize("line", range(7))
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
        kept = [step for step in range(6) if step != line - 1]
        assert [m.step for m in run.measurements] == kept
        assert run.damaged[0].number == line + 1


def test_a_torn_last_line_is_skipped_and_later_lines_are_whole(tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    Ledger(file).append("measurement", measurement(9).to_dict())
    with pytest.warns(UserWarning, match="line 7 is torn"):
        assert [m.step for m in load_run(tmp_path).measurements] == [0, 1, 2, 3, 4, 9]


def test_kill_minus_nine_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from phasewatch.record import Estimate, Ledger, Measurement\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for step in range(5): ledger.append('measurement', Measurement(step, {'x': Estimate(1.0)}).to_dict())\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / FILE_NAME)], check=False)
    assert result.returncode == -9
    assert len(load_run(tmp_path).measurements) == 5


def test_resume_supersedes_what_came_later(tmp_path: Path) -> None:
    file = write(tmp_path)
    ledger = Ledger(file)
    ledger.append("resume", {"step": 3})
    ledger.append("measurement", measurement(4, llc=7.0).to_dict())
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == [0, 1, 2, 4]
    assert run.measurements[-1].value("llc") == 7.0


def test_the_last_of_several_runs_in_a_file_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, range(2))
    assert len(load_run(tmp_path).measurements) == 2


def test_each_line_is_json(tmp_path: Path) -> None:
    for line in write(tmp_path).read_text().splitlines():
        assert "crc32" in json.loads(line)


def test_errors_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give the log directory"):
        load_run(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no phasewatch.jsonl"):
        load_run(tmp_path)
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night.\n")
    with pytest.raises(RecordError, match="is no run record"):
        load_run(tmp_path / "novel.txt")
    for name in ("one", "two"):
        write(tmp_path / name)
    with pytest.raises(RecordError, match="holds 2 runs; give one of them"):
        load_run(tmp_path)
    Ledger(tmp_path / "new" / FILE_NAME).append("header", {**HEADER, "schema_version": 99})
    with pytest.raises(RecordError, match="schema version 99.*upgrade"):
        load_run(tmp_path / "new")
    with pytest.raises(KeyError, match="it has: loss, llc"):
        load_run(tmp_path / "one").series("trace")


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a place where nobody can write")
def test_a_directory_that_cannot_be_written() -> None:
    with pytest.raises(RecordError, match="cannot be written.*may write"):
        Ledger("/proc/nowhere/phasewatch.jsonl")


def test_importing_phasewatch_is_light() -> None:
    script = (
        "import sys, phasewatch\n"
        "for name in phasewatch.__all__: getattr(phasewatch, name)\n"
        "heavy = {'pytorch_lightning', 'lightning', 'tensorboard', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert phasewatch.__version__
