"""``phasewatch measure``: what is printed, what is written, and what is told of bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from sweep_cases import STEPS, trained
from torch import nn

from phasewatch import load_run
from phasewatch.cli import main

CASES = Path(__file__).parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    trained(folder / "checkpoints")
    return folder


@pytest.fixture(autouse=True)
def directory(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With checkpoints and a user's code in it, of which Python knows nothing."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "own_code.py").write_text(
        "from sweep_cases import build, plain_build\n"
        "number = 3\n"
        "def nothing(): return None\n"
        "def other_order(): module, probe, loss_fn = plain_build(); return probe, module, loss_fn\n"
        "def raises(): raise KeyError('data.csv')\n"
        "def empty(): return plain_build()[0], [], plain_build()[2]\n"
    )
    (tmp_path / "broken_code.py").write_text("1 / 0\n")
    (tmp_path / "needing_code.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_measures_and_ends_with_what_analyze_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "checkpoints", "--build", "own_code:build"]) == 0
    printed = capsys.readouterr()
    assert "Transitions were not looked for" in printed.out and "Measure more checkpoints" in printed.out
    assert printed.out.endswith("record: checkpoints/measured\n")
    assert f"5 of 5, step {STEPS[-1]}" in printed.err
    assert [m.step for m in load_run("checkpoints/measured").measurements] == list(STEPS)
    assert Path("checkpoints/measured/report/phasewatch.html").is_file()
    events = list(Path("checkpoints/measured/phasewatch").glob("*tfevents*"))
    assert main(["analyze", "checkpoints/measured"]) == 0
    analyzed = capsys.readouterr().out
    assert printed.out.startswith(analyzed)
    command = ["measure", *map(str, Path("checkpoints").glob("*.pt")), "--build", "own_code:build", "--quiet"]
    assert main(command) == 0  # the same checkpoints by name: nothing is left to do
    printed = capsys.readouterr()
    assert printed.out.startswith(analyzed) and printed.err == ""
    assert len(events) == 1 and list(Path("checkpoints/measured/phasewatch").glob("*tfevents*")) == events


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none", "--build", "own_code:build"], "none does not exist"),
        (["checkpoints"], "it is not known of what network"),
        (["checkpoints", "--build", "own_code"], "'own_code' was given; expected package.module:name"),
        (["checkpoints", "--build", "own_code.py:build"], "expected package.module:name"),
        (["checkpoints", "--build", "own_cod:build"], "There is no module own_cod"),
        (["checkpoints", "--build", "own_code:buildd"], "own_code has no buildd; expected a function that returns"),
        (["checkpoints", "--build", "own_code:number"], "own_code:number is 3; expected a function"),
        (["checkpoints", "--build", "own_code:nothing"], "nothing() returned NoneType; expected (module, probe"),
        (["checkpoints", "--build", "own_code:other_order"], "returned (list, Linear, function); expected (module"),
        (["checkpoints", "--build", "own_code:raises"], "raises() failed (KeyError: 'data.csv')"),
        (["checkpoints", "--build", "own_code:empty"], "batch"),
        (["checkpoints", "--build", "broken_code:build"], "broken_code cannot be imported (ZeroDivisionError"),
        (["checkpoints", "--build", "needing_code:build"], "it needs no_such_package, which is not installed"),
    ],
)
def test_bad_input_is_told_with_its_mend(
    arguments: list[str], told: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", *arguments]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and "Traceback" not in printed.err and printed.out == ""
    assert not (directory / "checkpoints" / "measured").exists()


def test_what_is_skipped_is_told_in_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(9, 1).state_dict(), "checkpoints/model-7.pt")
    assert main(["measure", "checkpoints", "--build", "own_code:build", "--quiet"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("phasewatch: step 7 is skipped: ") and err.count("\n") == 1


def test_what_would_run_code_is_refused_until_it_is_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(3, 1), "checkpoints/model-7.pt")
    command = ["measure", "checkpoints/model-7.pt", "--build", "own_code:plain_build"]
    assert main(command) == 2
    assert "model-7.pt is no plain checkpoint" in (err := capsys.readouterr().err) and "Linear" in err
    assert main([*command, "--trust"]) == 0
