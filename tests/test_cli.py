from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

import phasewatch
from phasewatch.cli import main
from phasewatch.logs import told_missing
from phasewatch.record import SCHEMA_VERSION, Estimate, Journal, Measurement


def record(directory: Path, points: int = 40, place: int = 2000) -> Path:
    """A record with one jump of 100 noise standard deviations in the loss, at step 2,000 of 4,000."""
    rng = np.random.default_rng(0)
    journal = Journal(directory)
    journal.append("header", {"schema_version": SCHEMA_VERSION, "n": 100, "seed": 0})
    for step in range(0, 100 * points, 100):
        loss = (2.0 if step < place else 1.0) + 0.01 * float(rng.standard_normal())
        journal.append("measurement", Measurement(step, {"loss": Estimate(loss)}).to_dict())
    journal.append("end", {"time": 0.0})
    journal.close()
    return directory / "phasewatch.jsonl"


def test_analyze_prints_the_table_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "version_0")
    assert main(["analyze", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "1,900-2,000" in printed.out and "loss falls" in printed.out and printed.err == ""
    for suffix in ("png", "json", "html"):
        path = tmp_path / "version_0" / "report" / f"phasewatch.{suffix}"
        assert path.is_file() and str(path) in printed.out
    data = json.loads((tmp_path / "version_0" / "report" / "phasewatch.json").read_text())
    assert data["alpha"] == 0.05 and len(data["transitions"]) == 1


def test_analyze_tells_the_samples_that_moved_also_where_lambda_cannot_be_printed(tmp_path: Path) -> None:
    """In a terminal of ASCII alone, where the kind is said with a λ."""
    rng = np.random.default_rng(0)
    journal = Journal(tmp_path)
    journal.append("header", {"schema_version": SCHEMA_VERSION, "n": 100, "seed": 0})
    for step in range(0, 4000, 100):
        late = step >= 2000
        found = {
            "loss": Estimate((1.0 if late else 2.0) + 0.01 * float(rng.standard_normal())),
            "llc_behavioral": Estimate(20.0 + 0.3 * float(rng.standard_normal()), 0.3),
        }
        losses = (1.0, 0.5 if late else 3.0, 1.0)
        journal.append("measurement", Measurement(step, found, sample_losses=losses).to_dict())
    journal.close()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "phasewatch", "analyze", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "loss falls at constant lambda" in " ".join(done.stdout.split())
    assert "at 1,950: samples that changed most: 1 (3.00 to 0.500)" in done.stdout


def test_output_and_alpha_are_obeyed(tmp_path: Path) -> None:
    path = record(tmp_path / "run")
    assert main(["analyze", str(path), "--alpha", "0.01", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "phasewatch.json").read_text())["alpha"] == 0.01
    assert not (tmp_path / "run" / "report").exists()


def test_too_short_a_run_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, points=3)
    assert main(["analyze", str(tmp_path)]) == 0
    assert "3 usable measurements" in capsys.readouterr().out


def test_damaged_lines_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"step":300,', b'"step":301,'))
    assert main(["analyze", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "1 damaged lines were skipped (line 5" in error


def _nowhere(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


def _empty(tmp_path: Path) -> Path:
    return tmp_path


def _several(tmp_path: Path) -> Path:
    record(tmp_path / "version_0")
    record(tmp_path / "version_1")
    return tmp_path


def _newer(tmp_path: Path) -> Path:
    Journal(tmp_path).append("header", {"schema_version": 99})
    return tmp_path


def _no_record(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("something else\n")
    return tmp_path / "notes.txt"


def _binary(tmp_path: Path) -> Path:
    (tmp_path / "phasewatch.jsonl").write_bytes(bytes(range(256)))
    return tmp_path


def _other_event_files(tmp_path: Path) -> Path:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("accuracy", 1.0, 0)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (_nowhere, "does not exist"),
        (_empty, "There is no phasewatch.jsonl"),
        (_several, "holds 2 runs; give one of them"),
        (_newer, "schema version 99"),
        (_no_record, "is no run record"),
        (_binary, "is no run record"),
        (_other_event_files, "nothing that looks like a loss; name some of its series by --signals. It has: accuracy"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_errors_are_told_without_a_traceback(
    given: types.FunctionType, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", str(given(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("phasewatch: ") and told in error and "Traceback" not in error
    assert error.count("\n") == (3 if given is _several else 1)


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["analyze", str(tmp_path), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "give another --output" in capsys.readouterr().err


@pytest.mark.parametrize("alpha", ["0", "1", "-3", "nan", "many"])
def test_a_bad_alpha_is_refused(alpha: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["analyze", "here", f"--alpha={alpha}"])
    assert ended.value.code == 2 and "between 0 and 1" in capsys.readouterr().err


def write_events(directory: Path) -> None:
    rng = np.random.default_rng(0)
    with SummaryWriter(str(directory)) as writer:
        for step in range(0, 4000, 20):
            writer.add_scalar("train_loss", (2.0 if step < 2000 else 1.0) + 0.01 * rng.standard_normal(), step)
            writer.add_scalar("accuracy", (0.1 if step < 3000 else 0.9) + 0.01 * rng.standard_normal(), step)


def test_event_files_are_read_where_there_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(tmp_path / "version_0")
    assert main(["analyze", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "No phasewatch record here; reading train_loss (they look like losses)" in printed
    assert "1,980-2,000" in printed
    assert (tmp_path / "version_0" / "report" / "phasewatch.html").is_file()
    [events] = (tmp_path / "version_0").glob("*tfevents*")
    assert main(["analyze", str(events)]) == 0


def test_tags_are_read_beside_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path)
    write_events(tmp_path)
    assert main(["analyze", str(tmp_path), "--signals", "accuracy"]) == 0
    assert "accuracy rises" in capsys.readouterr().out
    assert main(["analyze", str(tmp_path), "--signals", "nothing"]) == 2
    assert "no series 'nothing'; it has: train_loss, accuracy" in capsys.readouterr().err


def test_signals_of_a_record_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path)
    assert main(["analyze", str(tmp_path), "--signals", "loss"]) == 0
    assert "1 transition" in capsys.readouterr().out
    assert main(["analyze", str(tmp_path), "--signals", "loss", "accuracy"]) == 2
    assert "has no series 'accuracy'; it has: loss." in capsys.readouterr().err


def test_of_many_series_the_nearest_are_told() -> None:
    known = ["loss", "llc_behavioral", *(f"zeros_{k}" for k in range(100))]
    assert told_missing("here", ["llc_behavioural"], known) == (
        "here has no series 'llc_behavioural'; the nearest are llc_behavioral; it has 102, among them: loss, "
        "llc_behavioral, " + ", ".join(f"zeros_{k}" for k in range(10)) + " (--signals without a name says all)."
    )


def test_signals_without_a_name_says_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"metric_{k}" for k in range(30)]
    table = tmp_path / "metrics.csv"
    table.write_text("step," + ",".join(names) + "\n" + "".join(f"{k}{',1' * 30}\n" for k in range(10)))
    recorded = tmp_path / "recorded"
    record(recorded)
    assert main(["analyze", str(table), "--signals"]) == 2
    assert f"--signals names no series; {table} has: {', '.join(names)}." in " ".join(capsys.readouterr().err.split())
    assert main(["compare", str(recorded), str(recorded), "--signals"]) == 2
    assert "has: loss." in " ".join(capsys.readouterr().err.split())
    assert main(["analyze", str(table), "--signals", "metric_x"]) == 2
    assert "has 30, among them: metric_0, metric_1," in " ".join(capsys.readouterr().err.split())


def test_demo_is_given_its_output_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, int]] = []
    fake = types.ModuleType("phasewatch.demo")
    fake.run = lambda output, seed: calls.append((output, seed))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "phasewatch.demo", fake)
    monkeypatch.setattr(phasewatch, "demo", fake, raising=False)
    assert main(["demo", "--output", str(tmp_path), "--seed", "3"]) == 0
    assert calls == [(tmp_path, 3)]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["analyze", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from phasewatch.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'matplotlib', 'tensorboard', 'scipy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"phasewatch {phasewatch.__version__}" if arguments == ["--version"] else "usage:")


def test_analyze_does_without_torch(tmp_path: Path) -> None:
    record(tmp_path)
    code = "import sys; from phasewatch.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, "analyze", str(tmp_path)], check=False, capture_output=True)
    assert ran.returncode == 0, ran.stderr


def test_compare_matches_the_transitions_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "seeds" / name for name in ("a", "b", "c")]
    record(runs[0], place=1500)
    record(runs[1], place=2000)
    record(runs[2], points=5)
    assert main(["compare", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    header, _, row = printed.splitlines()[:3]
    assert header.split() == "median step (range) runs kind a b c".split()
    assert row.split() == "1,450 1 of 3 loss falls 1,450 - -".split()
    assert "c: Transitions were not looked for: the run holds 5 usable measurements" in printed
    assert f"page:   {tmp_path / 'seeds' / 'comparison' / 'phasewatch.html'}" in printed
    arguments = ["--factor", "1.5", "--output", str(tmp_path / "new" / "one")]
    assert main(["compare", *map(str, runs), *arguments]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.split() == "1,700 (1,450-1,950) 2 of 3 loss falls 1,450 1,950 -".split()
    for folder in (tmp_path / "seeds" / "comparison", tmp_path / "new" / "one"):
        assert (folder / "phasewatch.png").read_bytes().startswith(b"\x89PNG")
        assert "transitions" in (folder / "phasewatch.html").read_text()


def test_compare_looks_at_named_signals_and_leaves_out_what_has_written_nothing_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [record(tmp_path / "a").parent, record(tmp_path / "b").parent, tmp_path / "begun", tmp_path / "empty"]
    Journal(runs[2]).append("header", {"schema_version": SCHEMA_VERSION})
    (runs[3]).mkdir()
    (runs[3] / "phasewatch.jsonl").touch()
    assert main(["compare", *map(str, runs), "--signals", "loss", "--json"]) == 2
    assert "has no series 'loss'" in capsys.readouterr().err
    assert main(["compare", *map(str, runs), "--json"]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert data["headline"] == "1 transition, none of them in all 3 runs"
    assert "begun: Transitions were not looked for" in "\n".join(data["remarks"])
    assert "empty is left out, as it holds nothing yet" in printed.err
    assert main(["compare", *map(str, runs[:2]), "--signals", "loss", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "2 of 2" in printed.out and "page:" not in printed.out and printed.err == ""


def test_names_are_no_formulas_and_records_may_share_a_directory(tmp_path: Path) -> None:
    runs = [record(tmp_path / "lr=$LR_$SEED"), record(tmp_path / "a$_$b", place=1500)]
    assert main(["compare", *map(str, runs)]) == 0
    beside = runs[0].rename(tmp_path / "one.jsonl"), runs[1].rename(tmp_path / "two.jsonl")
    assert main(["compare", *map(str, beside)]) == 0


def test_a_tag_without_a_finite_value_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(20):
            writer.add_scalar("train/loss", float("nan"), step)
            writer.add_scalar("val $loss_$", 1.0 / (1 + step), step)
    assert main(["analyze", str(tmp_path)]) == 0
    assert main(["analyze", str(tmp_path), "--signals", "train/loss"]) == 2
    assert "no finite value of train/loss" in capsys.readouterr().err


def test_of_several_runs_in_a_directory_it_is_said_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = record(tmp_path)
    record(tmp_path, place=1500)
    [second] = tmp_path.glob("phasewatch-*.jsonl")
    assert main(["analyze", str(tmp_path)]) == 2
    heading, *listed = capsys.readouterr().err.splitlines()
    assert heading == f"phasewatch: {tmp_path} holds 2 runs; give one of them:"
    for path, line in zip((second, first), listed, strict=True):
        run_id = phasewatch.load_run(path).header["run_id"]
        assert line.startswith(f"  {path} (run {run_id}, created ") and line.endswith("40 measurements)")
    assert main(["analyze", str(first)]) == 0 and main(["analyze", str(second)]) == 0
    found = [
        json.loads((tmp_path / report / "phasewatch.json").read_text())["transitions"][0]["step"]
        for report in ("report", second.stem.replace("phasewatch", "report"))
    ]
    assert abs(found[0] - 2000) <= 100 and abs(found[1] - 1500) <= 100


def test_compare_needs_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(tmp_path / "run")
    for given in ([path], [path, path.parent]):
        assert main(["compare", *map(str, given)]) == 2
        assert "several different runs" in capsys.readouterr().err
    assert main(["compare", str(path), str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
