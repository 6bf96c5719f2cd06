from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from staircase import recorded_run

from phasewatch.analysis import analyze_run
from phasewatch.record import load_run
from phasewatch.report import format_moved, write_report

VOID = {"meta", "img", "br"}


class Checked(HTMLParser):
    """Collects the text and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                assert value is not None and value.startswith("data:"), f"an external resource: {value}"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"


def parsed(page: Path) -> Checked:
    checked = Checked()
    checked.feed(page.read_text(encoding="utf-8"))
    assert checked.open == []
    return checked


def test_writes_a_figure_the_data_and_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    paths = write_report(analyze_run(recorded_run(tmp_path)), tmp_path / "new" / "report")
    assert [path.name for path in (paths.png, paths.json, paths.html)] == [
        f"phasewatch.{suffix}" for suffix in ("png", "json", "html")
    ]
    assert paths.png.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(paths.json.read_text())["transitions"]) == 2
    page = parsed(paths.html)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?:|url\(|@import", paths.html.read_text(encoding="utf-8"))
    for told in (
        "2 transitions",
        "1,900-2,000",
        "nullity 60.0 → 50.0",
        "num_parameters",
        "650",
        "7 of 60",
        "R-hat 1.4",
    ):
        assert told in page.text
    assert "monitors.0.estimators.llc.chains" in page.text


def test_failures_and_what_the_user_named_are_escaped(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, finished=False)
    evil = "<script>alert(1)</script>"
    run = dataclasses.replace(
        run,
        header={**run.header, "module": evil},
        failures=({"step": 120, "what": "llc", "error": f"RuntimeError: {evil}"},),
    )
    page = parsed(write_report(analyze_run(run), tmp_path / "out").html)
    assert "script" not in page.tags
    assert page.text.count(evil) == 2
    assert "was not closed" in page.text


def test_samples_that_moved_are_told_and_their_labels_listed_nowhere(tmp_path: Path) -> None:
    """Sample 3 is learnt at step 2,000, sample 1 and its class unlearnt at 4,000; the labels are 512 numbers."""
    run = recorded_run(tmp_path)
    moving = []
    for m in run.measurements:
        losses = [1.0] * 512
        losses[3] = 2.5 if m.step < 2000 else 0.5
        losses[1] = losses[9] = 0.25 if m.step < 4000 else 4.0 + 0.5 * (m.step % 200 == 0)
        moving.append(dataclasses.replace(m, sample_losses=tuple(losses)))
    labels = {"kind": "class", "values": [8 if k in (1, 9) else 40_000 + k // 8 for k in range(512)]}
    run = dataclasses.replace(run, measurements=tuple(moving), header={**run.header, "labels": labels})
    analysis = analyze_run(run)
    paths = write_report(analysis, tmp_path / "out")
    page = parsed(paths.html)
    assert "samples that changed most: 3 (2.50 to 0.500)" in page.text
    assert "samples that changed most: 1 (0.250 to 4.50), 9 (0.250 to 4.50)\nclasses: 8 (4.25 ± 0)" in page.text
    assert "40063" not in page.text, "labels"
    told = json.loads(paths.json.read_text())["moved"]
    assert [[one["index"] for one in of_transition["samples"]] for of_transition in told] == [[3], [1, 9]]
    assert (
        format_moved(run, analysis.transitions).splitlines()[0].startswith("at 1,950: samples that changed most: 3 (")
    )
    assert (
        parsed(write_report(analyze_run(recorded_run(tmp_path / "b")), tmp_path / "c").html).text.count("Samples") == 1
    )


def test_damaged_lines_are_listed(tmp_path: Path) -> None:
    path = recorded_run(tmp_path).path
    assert path is not None
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3][:40]
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match="1 damaged lines"):
        run = load_run(tmp_path)
    page = parsed(write_report(analyze_run(run), tmp_path / "out").html)
    assert "Damaged lines" in page.text and "\n4\n" in page.text
    assert "1 lines of the record are missing" in page.text and "was not closed" not in page.text
    assert analyze_run(run).to_dict()["missing_lines"] == [[3, 3]]


def test_flags_of_the_live_detector_are_shown_with_the_step_of_detection(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    flagged = tuple(dataclasses.replace(t, flagged_at=2300) for t in analyze_run(run).transitions[:1])
    page = parsed(write_report(analyze_run(dataclasses.replace(run, transitions=flagged)), tmp_path / "out").html)
    assert "Flagged while the run went on" in page.text and "2,300" in page.text
    under_way = tuple(dataclasses.replace(t, under_way=True, start=1777.0) for t in flagged)
    page = parsed(write_report(analyze_run(dataclasses.replace(run, transitions=under_way)), tmp_path / "out").html)
    assert "since 1,777" in page.text


def test_too_few_measurements_are_said_to_be_too_few(tmp_path: Path) -> None:
    page = parsed(write_report(analyze_run(recorded_run(tmp_path, points=5)), tmp_path / "out").html)
    assert "5 usable measurements" in page.text and "No transitions were found" not in page.text
