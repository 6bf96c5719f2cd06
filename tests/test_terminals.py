"""The command at terminals and pipes of all kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from staircase import recorded_run

from phasewatch.cli import main
from phasewatch.cli.speaking import reason


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "phasewatch", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_where_the_reader_has_gone_it_ends_without_a_word(tmp_path: Path) -> None:
    """As under ``| head -1``: the pipe is closed before anything is written to it."""
    recorded_run(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-m", "phasewatch", "analyze", str(tmp_path)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert ran.returncode == 141 and ran.stderr == ""


@pytest.mark.parametrize("columns", [30, 60, 80])
def test_nothing_but_paths_is_wider_than_the_terminal(
    columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded_run(tmp_path)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["analyze", str(tmp_path)]) == 0
    told, _, paths = capsys.readouterr().out.rpartition("\n\n")
    assert max(map(len, told.splitlines())) <= columns and "llc" in told and "page:" in paths
    assert main(["analyze", str(tmp_path), "--quiet"]) == 0
    assert " ".join(told.split()).startswith(" ".join(capsys.readouterr().out.split()))


def test_a_terminal_without_greek_letters_is_told_in_others(tmp_path: Path) -> None:
    recorded_run(tmp_path)
    ran = command("analyze", str(tmp_path), PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert ran.returncode == 0 and "lambda" in ran.stdout and "?" not in ran.stdout


def test_what_is_replaced_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded_run(tmp_path)
    for expected in ("", f"phasewatch: an older report in {tmp_path / 'report'} was replaced.\n"):
        assert main(["analyze", str(tmp_path)]) == 0
        assert capsys.readouterr().err == expected
    assert main(["analyze", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_errors_of_the_system_are_told_by_file_and_words() -> None:
    assert reason(PermissionError(13, "Permission denied", "run/phasewatch.jsonl")) == (
        "run/phasewatch.jsonl: Permission denied"
    )
    assert reason(OSError(28, "No space left on device")) == "No space left on device"
    assert reason(FileNotFoundError(2, "No such file or directory", b"na\xc3\xafve")) == (
        "naïve: No such file or directory"
    )
    assert reason(FileNotFoundError("There is no record.")) == "There is no record."


def test_shells_complete_the_commands_where_shtab_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0 and "compare" in capsys.readouterr().out
