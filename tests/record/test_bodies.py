"""Lines whose checksum is right and whose content is not: all of it is a damaged line that is counted, or our error."""

from __future__ import annotations

import base64
import json
import random
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from mutants import mutated
from records import begin, measurement, write

from phasewatch.analysis import analyze_run
from phasewatch.record import Change, Flag, Journal, RecordError, Run, Transition, load_run
from phasewatch.record.trace import pack
from phasewatch.report import format_moved, format_table

LOSS = Change(1.0, 2.0, 1.0, 0.1, (0.8, 1.2), 10.0)
TRANSITION = Transition(
    start=10.0,
    end=20.0,
    step=15.0,
    interval=(12.0, 18.0),
    kind="A",
    changes={"loss": LOSS},
    score=9.0,
    p_value=0.01,
    seen_by=("loss",),
    consensus=1.0,
    free_energy=-1.0,
    equal_n=5.0,
    resolutions=("fine",),
)


def whole_record(directory: Path) -> Journal:
    journal = Journal(directory)
    header = {"schema_version": 2, "n": 100, "created": 1.75e9, "versions": {"phasewatch": "0"}, "alpha": 0.05}
    labels = {"kind": "class", "values": [0, 1]}
    monitors = [{"n": 3, "probe": {"samples": 2}}]
    journal.append("header", {**header, "total_steps": 100, "signals": [], "labels": labels, "monitors": monitors})
    journal.append("plan", {"left_out": ["zeros"], "chains_in_each": 2})
    for step in range(12):
        journal.append("measurement", measurement(10 * step).to_dict() | {"sample_losses": [0.1 * step, 0.2]})
    steps = list(range(60))
    journal.append("observed", pack({"loss": (steps, [1.0] * 60), "learning_rate": (steps, [0.1] * 30 + [0.01] * 30)}))
    journal.append("transition", Flag(0, "flagged", TRANSITION, 50).to_dict())
    journal.append("failure", {"step": 3, "what": "llc", "error": "E: x", "traceback": "", "time": 1e9})
    journal.append("resume", {"step": 100, "time": 1e9, "after": 15})
    journal.append("end", {"time": 1e9, "how": "finished", "error": ""})
    return journal


def members(journal: Journal) -> list[dict[str, Any]]:
    lines = journal.lines
    return [{"run_id": line.run_id, "sequence": line.sequence, "kind": line.kind, **line.body} for line in lines]


def encoded(value: Any) -> bytes:
    """Any value as a line with the right checksum."""
    text = json.dumps(value, separators=(",", ":"))
    text = text if text.startswith("{") else "{" + text
    return f'{{"crc32":"{zlib.crc32(text.encode()):08x}",{text[1:]}\n'.encode()


def look_at_all(run: Run) -> None:
    for name in run.names:
        run.series(name)
    assert run.rows() is not None and repr(run) and run.observed is not None
    for transition in run.transitions:
        run.moved(transition)
    assert json.dumps(analyze_run(run).to_dict(), allow_nan=False)
    format_table(run.transitions)
    format_moved(run, run.transitions)


def readings_of_mutants(directory: Path, count: int, seed: int) -> tuple[int, int, int]:
    """How many were read, how many of them with lines that are told to be damaged, and how many were refused."""
    rng = random.Random(seed)
    journal = whole_record(directory)
    file, given = directory / "phasewatch.jsonl", members(journal)
    journal.close()
    read = damaged = refused = 0
    for _ in range(count):
        lines = list(given)
        # as often one of the many measurements as each of the other lines
        which = rng.choice([0, 1, rng.randrange(2, 14), *range(14, len(lines))])
        lines[which] = mutated(lines[which], rng)
        file.write_bytes(b"".join(map(encoded, lines)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = load_run(directory)
                look_at_all(run)
        except RecordError:
            refused += 1
        else:
            read += 1
            damaged += bool(run.damaged)
    return read, damaged, refused


def test_mutated_bodies_are_damaged_lines_or_our_own_error(tmp_path: Path) -> None:
    read, damaged, refused = readings_of_mutants(tmp_path, 60, seed=0)
    assert read + refused == 60 and damaged > 20


@pytest.mark.slow
def test_many_mutated_bodies_are_damaged_lines_or_our_own_error(tmp_path: Path) -> None:
    read, damaged, refused = readings_of_mutants(tmp_path, 3000, seed=1)
    assert read + refused == 3000 and damaged > 1000


@pytest.mark.parametrize(
    ("line", "change", "reason"),
    [
        (0, {"schema_version": "two"}, "schema_version is 'two'; expected a whole number"),
        (0, {"created": 1e300}, "created is 1e[+]300; expected seconds since 1970"),
        (1, {"seed": 3}, "it plans seed too"),
        (5, {"step": 10**40}, "step is a number of 133 bits; expected a whole number"),
        (5, {"estimates": {"loss": {"value": "1"}}}, "value is '1'; expected a number"),
        (
            5,
            {"histograms": {"a": {"positions": [1.0], "weights": []}}},
            "weights is .*; expected a list of 1 numbers",
        ),
        (14, {"signals": [{"names": ["a"], "count": 2**50, "packed": ""}]}, "it says that it holds 1351.* bytes"),
        (14, {"signals": [{"names": ["a"], "count": 3, "packed": "x"}]}, "observed line"),
        (15, {"transition": {"start": 1.0}}, "has no 'interval'"),
        (15, {"action": "made up"}, "action is 'made up'; expected one of flagged, revised, withdrawn"),
        (17, {"after": 17}, "it comes after line 17, which is not before it"),
        (18, {"how": "well"}, "a run that ended as 'well'"),
    ],
)
def test_what_is_wrong_is_said(line: int, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    journal = whole_record(tmp_path)
    lines = members(journal)
    whole = load_run(tmp_path)
    lines[line] = {**lines[line], **change}
    (tmp_path / "phasewatch.jsonl").write_bytes(b"".join(map(encoded, lines)))
    with pytest.warns(UserWarning, match=f"1 damaged lines were skipped .line {line + 1} is whole, and no .*{reason}"):
        run = load_run(tmp_path)
    assert [one.number for one in run.damaged] == [line + 1] and not run.finished
    assert len(run.measurements) == len(whole.measurements) - (line == 5)
    look_at_all(run)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"run_id":"a","sequence":0,"kind":"header","a":' + "[" * 5000 + "]" * 5000 + "}", "cannot be read"),
        ('{"run_id":"a","sequence":0,"kind":"header","a":' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
        ('{"run_id":"a","sequence":0,"kind":"header","a":' + "9" * 5000 + "}", "cannot be read"),
        ('{"run_id":["a"],"sequence":0,"kind":"header"}', "run_id is .* expected text"),
        ('{"run_id":"a","sequence":true,"kind":"header"}', "sequence is True"),
        ('{"run_id":"a","sequence":0}', "has no 'kind'"),
        ("{nonsense", "cannot be read"),
    ],
)
def test_a_line_that_is_none_is_said_to_be_none(text: str, reason: str, tmp_path: Path) -> None:
    checksum = zlib.crc32(text.encode())
    file = tmp_path / "phasewatch.jsonl"
    file.write_text(f'{{"crc32":"{checksum:08x}",{text[1:]}\n')
    with pytest.raises(RecordError, match=f"is no run record: line 1 .*{reason}"):
        load_run(file)


def test_a_block_that_unpacks_to_more_than_it_says_takes_no_memory(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    bomb = base64.b64encode(zlib.compress(bytes(2**28), 9)).decode()
    journal.append("observed", {"step": 0, "signals": [{"names": ["a"], "count": 3, "packed": bomb}]})
    tracemalloc.start()
    with pytest.warns(UserWarning, match="it does not hold what it says"):
        run = load_run(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(run.damaged) == 1 and peak < 2**24


@pytest.mark.parametrize("edited", [lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\xef\xbb\xbf" + b])
def test_what_editors_of_windows_do_to_a_file_harms_nothing(edited: Any, tmp_path: Path) -> None:
    file = write(tmp_path)
    whole = load_run(file)
    file.write_bytes(edited(file.read_bytes()))
    assert load_run(file) == whole and whole.finished and not whole.damaged
