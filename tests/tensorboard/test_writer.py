from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch.utils.tensorboard import SummaryWriter

from phasewatch.analysis import NOT_BORNE_OUT, analyze_run
from phasewatch.record import Estimate, Histogram, Measurement, Run
from phasewatch.report import verdict
from phasewatch.tags import STAGE, STAGE_OF_WHOLE_RUN, tagged
from phasewatch.tensorboard import TensorBoardWriter, read_scalars
from phasewatch.tensorboard.writer import FLAGGED, FOUND, RUN, RUN_SO_FAR, VERDICT, spectrum_edges
from phasewatch.transitions import Change, Flag, Transition

A_ROW = r"\| A +\|"
SPECTRUM = Histogram([-1.0, -1e-6, 0.0, 2e-6, 3.0], [1.0, 2.0, 40.0, 5.0, 2.0])


def measurement(step: int, **values: float) -> Measurement:
    return Measurement(
        step,
        {
            "loss": Estimate(1.0 / (step + 1)),
            "llc": Estimate(5.0, 0.5, ("R-hat",) if step == 10 else ()),
            "nullity": Estimate(7.0),
            "nullity_threshold": Estimate(1e-5),
            **{name: Estimate(value) for name, value in values.items()},
        },
        {"hessian_eigenvalues": SPECTRUM},
    )


def transition(step: float) -> Transition:
    change = Change(2.0, 1.0, -1.0, 0.1, (-1.2, -0.8), -10.0)
    return Transition(step - 5, step + 5, step, (step - 2, step + 2), "A", {"loss": change}, 10.0, 1e-6)


def flag(number: int, place: float, detected_at: int) -> Flag:
    return Flag(number, "flagged", transition(place), detected_at)


def accumulated(directory: Path) -> EventAccumulator:
    everything = {"scalars": 0, "tensors": 0, "histograms": 0, "images": 0}
    return EventAccumulator(str(directory), size_guidance=everything).Reload()


def texts(directory: Path, tag: str) -> list[tuple[int, str]]:
    events = accumulated(directory).Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_writes_every_signal_into_the_child_run_and_what_is_unreliable_apart(tmp_path: Path) -> None:
    """λ is doubted at step 10, and the accuracy is not known there."""
    writer = TensorBoardWriter(tmp_path)
    for step in (0, 10, 20):
        writer.on_measurement(measurement(step, accuracy=math.nan if step == 10 else 0.5))
    writer.close()
    assert writer.directory == tmp_path / "phasewatch"
    assert not list(tmp_path.glob("*tfevents*"))
    scalars = {tag: (s.tolist(), v.tolist()) for tag, (s, v) in read_scalars(writer.directory).items()}
    assert scalars["phasewatch/1_loss"][1] == pytest.approx([1.0, 1 / 11, 1 / 21])
    gap = math.nan
    expected = {
        "accuracy": [0.5, gap, 0.5],
        "llc": [5.0, gap, 5.0],
        "llc_lower": [5 - 1.959964 * 0.5, gap, 5 - 1.959964 * 0.5],
        "llc_upper": [5 + 1.959964 * 0.5, gap, 5 + 1.959964 * 0.5],
        "unreliable": [0.0, 1.0, 0.0],
    }
    for name, values in expected.items():
        steps, found = scalars[f"phasewatch_details/{name}"]
        assert steps == [0, 10, 20] and found == pytest.approx(values, nan_ok=True)
    steps, found = scalars["phasewatch_details/llc_unreliable"]
    assert steps == [10, 20] and found == pytest.approx([5.0, math.nan], nan_ok=True)
    assert "phasewatch_details/llc_lower_unreliable" not in scalars
    assert scalars["phasewatch/5_stage"] == ([0, 10, 20], [0.0, 0.0, 0.0])


def test_a_chart_of_bands_has_its_three_series_at_the_same_steps(tmp_path: Path) -> None:
    """Which it asks for, where the value is unknown at first, then known without and with an error, then doubted."""
    writer = TensorBoardWriter(tmp_path)
    given = [Estimate(math.nan), Estimate(5.0), Estimate(5.0, 0.5), Estimate(9.0, 0.5, ("R-hat",)), Estimate(5.0, 0.5)]
    for step, llc in enumerate(given):
        writer.on_measurement(Measurement(step, {"loss": Estimate(1.0), "llc": llc}))
    writer.close()
    scalars = read_scalars(writer.directory)
    for end, known in (("", [1, 2, 4]), ("_lower", [2, 4]), ("_upper", [2, 4])):
        steps, values = scalars[f"phasewatch_details/llc{end}"]
        assert steps.tolist() == [1, 2, 3, 4] and steps[np.isfinite(values)].tolist() == known


def test_no_line_of_what_is_doubted_leads_across_what_is_not(tmp_path: Path) -> None:
    """One gap, where the doubt ends, and none before it began; a resumed run closes what the one before left open."""
    doubts = [(), ("R-hat",), ("R-hat",), (), (), ("R-hat",)]
    found = [Measurement(step, {"llc": Estimate(5.0, 0.5, doubt)}) for step, doubt in enumerate(doubts)]
    writer = TensorBoardWriter(tmp_path / "first")
    for one in found:
        writer.on_measurement(one)
    writer.close()
    steps, values = read_scalars(writer.directory)["phasewatch_details/llc_unreliable"]
    assert steps.tolist() == [1, 2, 3, 5] and np.isnan(values).tolist() == [False, False, True, False]
    resumed = TensorBoardWriter(tmp_path / "second")
    resumed.on_resume(Run(None, {}, tuple(found), (), (), (), finished=False))
    resumed.on_measurement(Measurement(6, {"llc": Estimate(5.0, 0.5)}))
    resumed.close()
    steps, values = read_scalars(resumed.directory)["phasewatch_details/llc_unreliable"]
    assert steps.tolist() == [6] and np.isnan(values).all()


def test_the_verdict_does_not_wait_for_the_next_measurement(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for step in (0, 10):
        writer.on_measurement(measurement(step))
        writer.on_transitions(step, [], [])
        assert texts(writer.directory, VERDICT)[-1][0] == step
    writer.close()


def test_in_the_front_stands_what_a_person_looks_at_in_order(tmp_path: Path) -> None:
    names = ("llc_behavioral", "llc_behavioral_coarse", "effective_rank_coarse", "hessian_trace", "zeros_dead")
    writer = TensorBoardWriter(tmp_path)
    writer.on_measurement(measurement(0, **dict.fromkeys(names, 1.0)))
    writer.on_end(analyze_run(Run(None, {}, (measurement(0),), (), (), (), finished=True)))
    writer.close()
    assert sorted(tag for tag in read_scalars(writer.directory) if tag.startswith("phasewatch/")) == [
        "phasewatch/1_loss",
        "phasewatch/2_llc_behavioral_coarse",
        "phasewatch/3_llc_behavioral",
        "phasewatch/4_effective_rank_coarse",
        "phasewatch/5_stage",
        "phasewatch/6_stage_of_whole_run",
    ]


def test_without_scalars_only_what_another_logger_cannot_do_is_written(tmp_path: Path) -> None:
    """Into the run of the user's writer: the gaps, beside the numbers that the caller has logged there."""
    user = SummaryWriter(str(tmp_path))
    writer = TensorBoardWriter(user, scalars=False)
    for step in (0, 10):
        for tag, value in tagged(measurement(step)).items():
            user.add_scalar(tag, value, step)
        writer.on_measurement(measurement(step))
    writer.close()
    user.add_scalar("own", 1.0, 20)  # it is still open
    user.close()
    assert [file.parent for file in tmp_path.rglob("*tfevents*")] == [tmp_path]
    found = accumulated(tmp_path)
    assert "phasewatch_details/hessian_eigenvalues" in found.Tags()["histograms"] and "own" in found.Tags()["scalars"]
    for tag in found.Tags()["scalars"]:
        steps = [event.step for event in found.Scalars(tag)]
        assert len(set(steps)) == len(steps), tag
    band = [[e.step for e in found.Scalars(f"phasewatch_details/llc{end}")] for end in ("", "_lower", "_upper")]
    assert band == [[0, 10]] * 3


def test_a_count_that_is_unknown_shows_its_bounds(tmp_path: Path) -> None:
    """In a chart of lines: a margin chart is an error message where value and bounds have other steps."""
    writer = TensorBoardWriter(tmp_path)
    for step in range(3):
        writer.on_measurement(
            measurement(step, nullity=7.0 if step == 1 else math.nan, nullity_lower=6.0, nullity_upper=9.0)
        )
    writer.close()
    found = accumulated(writer.directory)
    for name, expected in (("nullity", [7.0, math.nan]), ("nullity_lower", [6.0] * 3)):  # no gap before there is a line
        values = [event.value for event in found.Scalars(f"phasewatch_details/{name}")]
        assert values == pytest.approx(expected, nan_ok=True)
    [chart] = [chart for chart in charts_of(tmp_path, "phasewatch") if "bounds" in chart["title"]]
    assert chart["multiline"]["tag"] == [
        f"^phasewatch_details/{name}(_unreliable)?$" for name in ("nullity", "nullity_lower", "nullity_upper")
    ]


def test_the_first_charts_are_lambda_of_the_function_at_both_resolutions_and_the_stage(tmp_path: Path) -> None:
    """Charts of lines come first, and one of bands holds one signal: the values stand in both."""
    fine, coarse = "3_llc_behavioral", "2_llc_behavioral_coarse"
    writer = TensorBoardWriter(tmp_path)
    plain = measurement(0)
    found = {**plain.estimates, "llc_behavioral": Estimate(20.0, 1.0), "llc_behavioral_coarse": Estimate(8.0, 0.5)}
    writer.on_measurement(dataclasses.replace(plain, estimates=found))
    writer.close()
    charts = charts_of(tmp_path, "phasewatch")
    first, second = [chart for chart in charts if "multiline" in chart][:2]
    assert first["title"] == "learning coefficient λ of the function"
    assert first["multiline"]["tag"] == [f"^phasewatch/{name}(_unreliable)?$" for name in (fine, coarse)]
    assert second["title"] == "stage"
    assert second["multiline"]["tag"] == ["^phasewatch/5_stage$", "^phasewatch/6_stage_of_whole_run$"]
    bands = [chart["margin"]["series"] for chart in charts if "margin" in chart]
    assert bands[:2] == [
        [{"value": f"phasewatch/{name}", **{end: f"phasewatch_details/{name[2:]}_{end}" for end in ("lower", "upper")}}]
        for name in (fine, coarse)
    ]
    assert len({chart["title"] for chart in charts}) == len(charts)


def test_several_runs_have_each_chart_once(tmp_path: Path) -> None:
    """Though other causes of zeros were seen in each, some points were doubted in one, and one has a λ more.

    TensorBoard joins the pages of all runs, and leaves out a chart that is the same to the last letter."""
    seen = [{"zeros_dead": 1.0}, {"zeros_dead": 0.0, "zeros_parallel": 2.0}, {"llc_behavioral": 3.0}]
    for k, values in enumerate(seen):
        writer = TensorBoardWriter(tmp_path / f"seed_{k}")
        for step in (0, 10) if k else (20, 30):
            writer.on_measurement(measurement(step, **values))
        writer.close()
    pages = [charts_of(tmp_path, f"seed_{k}/phasewatch") for k in range(3)]
    merged = {json.dumps(chart, sort_keys=True) for page in pages for chart in page}
    assert len(merged) == len({chart["title"] for page in pages for chart in page})


def charts_of(directory: Path, run: str) -> list[dict[str, Any]]:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    [category] = layout(multiplexer, run)["category"]  # type: ignore[misc, attr-defined]
    return list(category["chart"])


def layout(multiplexer: EventMultiplexer, run: str) -> dict[str, object]:
    *_, event = multiplexer.Tensors(run, CONFIG_SUMMARY_TAG)
    parsed = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return json_format.MessageToDict(parsed)


@pytest.mark.parametrize("shared", [False, True])
def test_the_layout_of_the_user_survives_as_tensorboard_reads_it(tmp_path: Path, shared: bool) -> None:
    user = SummaryWriter(str(tmp_path))
    user.add_custom_scalars({"mine": {"losses": ["Multiline", ["loss"]]}})
    writer = TensorBoardWriter(user if shared else tmp_path)
    writer.on_measurement(measurement(0))
    writer.close()
    user.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    assert "mine" in str(layout(multiplexer, "."))
    ours = str(layout(multiplexer, "phasewatch"))
    for tag in ("llc", "llc_lower", "llc_upper"):
        assert f"'phasewatch_details/{tag}'" in ours
    assert "margin" in ours
    holding, empty = (tmp_path, tmp_path / "phasewatch") if shared else (tmp_path / "phasewatch", tmp_path)
    assert "phasewatch/1_loss" in read_scalars(holding) and read_scalars(empty) == {}


def test_a_run_that_is_taken_up_again_keeps_our_page_in_it(tmp_path: Path) -> None:
    for step in (0, 10):
        user = SummaryWriter(str(tmp_path), filename_suffix=f".{step}")
        writer = TensorBoardWriter(user, scalars=False)
        writer.on_measurement(measurement(step))
        writer.close()
        user.close()
    assert not (tmp_path / "phasewatch").exists()
    assert charts_of(tmp_path, ".")


def test_the_spectrum_keeps_its_counts_and_has_a_bin_for_zero(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.on_measurement(measurement(0))
    writer.close()
    [event] = accumulated(writer.directory).Histograms("phasewatch_details/hessian_eigenvalues")
    value = event.histogram_value
    lefts = [value.min, *value.bucket_limit[:-1]]
    bins = {
        (round(left, 9), round(right, 9)): count
        for left, right, count in zip(lefts, value.bucket_limit, value.bucket, strict=True)
    }
    assert bins[-1e-5, 1e-5] == 47
    assert sum(bins.values()) == value.num == 50
    assert value.sum == pytest.approx(-1.0 - 2e-6 + 1e-5 + 6.0)


@pytest.mark.parametrize(
    ("positions", "threshold", "zero"),
    [
        ([-2.0, 5.0], 1e-3, 1e-3),
        ([1.0, 5.0], math.nan, 5e-9),
        ([-4.0, -1.0], 0.0, 4e-9),
        ([0.0, 0.0], math.nan, 1e-9),
        ([0.5], 0.7, 0.7),
    ],
)
def test_edges_rise_and_cover_all(positions: list[float], threshold: float, zero: float) -> None:
    edges = spectrum_edges(np.array(positions), threshold)
    assert np.all(np.diff(edges) > 0)
    assert edges[0] <= min(positions) and max(positions) <= edges[-1]
    at = int(np.searchsorted(edges, 0.0))
    assert (edges[at - 1], edges[at]) == pytest.approx((-zero, zero))
    assert len(edges) <= 64


def test_flags_are_logged_at_the_step_of_detection(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for step in range(0, 100, 10):
        writer.on_measurement(measurement(step))
        if step == 50:
            writer.on_transitions(step, [flag(0, 20.0, step)], [transition(20.0)])
        if step == 90:
            writer.on_transitions(step, [flag(1, 60.0, step)], [transition(20.0), transition(60.0)])
    writer.close()
    scalars = read_scalars(writer.directory)
    assert [column.tolist() for column in scalars["phasewatch_details/transition_at"]] == [[50, 90], [20.0, 60.0]]
    assert scalars[STAGE][0].tolist() == list(range(0, 100, 10))
    assert scalars[STAGE][1].tolist() == [0.0] * 5 + [1.0] * 4 + [2.0]
    (first, one), (last, both) = texts(writer.directory, FLAGGED)
    assert (first, last) == (50, 90) and len(re.findall(A_ROW, one)) == 1 and len(re.findall(A_ROW, both)) == 2
    images = accumulated(writer.directory).Images(RUN_SO_FAR)
    assert [(image.step, image.encoded_image_string[:4]) for image in images] == [
        (50, b"\x89PNG"),
        (90, b"\x89PNG"),
    ]


@pytest.mark.parametrize(
    ("shares", "drawn"),
    [((math.inf, math.inf), [20, 50, 60]), ((0.0, math.inf), [20, 60]), ((0.0, 0.0), [20, 90])],
    ids=["as it is flagged", "later", "at the end"],
)
@pytest.mark.parametrize("ends", [True, False])
def test_the_run_so_far_is_drawn_as_time_allows_and_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, float], drawn: list[int], ends: bool
) -> None:
    """Flagged at 20, 50 and 60; from 60 on another share of the time may be spent on it."""
    writer = TensorBoardWriter(tmp_path)
    for step in range(0, 100, 10):
        monkeypatch.setattr("phasewatch.tensorboard.writer.DRAWING", shares[step >= 60])
        writer.on_measurement(measurement(step))
        flags = [flag(0, 15.0, step)] if step in (20, 50, 60) else []
        writer.on_transitions(step, flags, [transition(15.0)] if step >= 20 else [])
    if ends:
        found = tuple(measurement(step) for step in range(0, 100, 10))
        writer.on_end(analyze_run(Run(None, {}, found, (), (), (), finished=True)))
    writer.close()
    assert [image.step for image in accumulated(writer.directory).Images(RUN_SO_FAR)] == drawn


def test_what_was_to_be_drawn_when_a_run_was_killed_is_drawn_when_it_goes_on(tmp_path: Path) -> None:
    seen = tuple(measurement(step) for step in (0, 10))
    killed = Run(None, {}, seen, (transition(5.0),), (), (), finished=False, flags=(flag(0, 5.0, 10),))
    writer = TensorBoardWriter(tmp_path)
    writer.on_resume(killed)
    for step in (20, 30):
        writer.on_measurement(measurement(step))
        writer.on_transitions(step, [], [transition(5.0)])
    writer.close()
    assert [image.step for image in accumulated(writer.directory).Images(RUN_SO_FAR)] == [20]


def test_a_picture_that_fails_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried again before there is something new, all else is written, and the file is closed."""
    tried: list[str] = []

    def fails(_: TensorBoardWriter, name: str, *__: Any) -> None:
        tried.append(name)
        raise MemoryError("planted")

    monkeypatch.setattr(TensorBoardWriter, "_figure", fails)
    writer = TensorBoardWriter(tmp_path)
    writer.on_measurement(measurement(0))
    with pytest.raises(MemoryError):
        writer.on_transitions(0, [flag(0, 0.0, 0)], [transition(0.0)])
    assert [step for step, _ in texts(writer.directory, VERDICT)] == [0]
    writer.on_measurement(measurement(10))
    writer.on_transitions(10, [], [transition(0.0)])
    assert tried == [RUN_SO_FAR]
    writer.on_measurement(measurement(20))
    monkeypatch.setattr("phasewatch.tensorboard.writer.DRAWING", 0.0)
    writer.on_transitions(20, [flag(0, 0.0, 20)], [transition(0.0)])
    with pytest.raises(MemoryError):
        writer.close()
    assert tried == [RUN_SO_FAR, RUN_SO_FAR]
    assert [step for step, _ in texts(writer.directory, VERDICT)] == [0, 10, 20]
    assert writer._own[0].all_writers is None  # how PyTorch's tells that it is closed


def test_the_verdict_is_said_once_a_step_and_of_each(tmp_path: Path) -> None:
    """Also where a flag is raised, at the last measurement too, and where one is withdrawn as the run ends."""
    writer = TensorBoardWriter(tmp_path)
    for step in range(0, 60, 10):
        writer.on_measurement(measurement(step))
        if step in (20, 50):
            writer.on_transitions(step, [flag(0, 15.0, step)], [transition(15.0)])
    run = Run(None, {}, tuple(measurement(step) for step in range(0, 60, 10)), (), (), (), finished=True)
    refuted = dataclasses.replace(flag(0, 15.0, 50), action="withdrawn", why=NOT_BORNE_OUT)
    writer.on_transitions(50, [refuted], [])
    writer.on_end(analyze_run(run))
    writer.close()
    said = texts(writer.directory, VERDICT)
    assert [step for step, _ in said] == [0, 10, 20, 30, 40, 50, 51]
    assert ["1 transition" in text for _, text in said] == [False, False, True, True, True, True, False]
    assert said[-1][1] == "\n".join(f"- {sentence}" for sentence in verdict(analyze_run(run)).sentences)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    flagged = dataclasses.replace(transition(20.0), flagged_at=50)
    before = Run(None, {}, tuple(measurement(step) for step in (0, 20, 50)), (flagged,), (), (), finished=False)
    writer = TensorBoardWriter(tmp_path)
    writer.on_resume(before)
    writer.on_measurement(measurement(90))
    writer.on_transitions(90, [flag(1, 60.0, 90)], [transition(20.0), transition(60.0)])
    writer.close()
    assert read_scalars(writer.directory)[STAGE][1].tolist() == [2.0]
    [(_, table)] = texts(writer.directory, FLAGGED)
    assert len(re.findall(A_ROW, table)) == 2


def test_the_end_is_written_at_the_last_step_under_tags_of_its_own(tmp_path: Path) -> None:
    """A jump of 1 in a loss with noise 0.01 is found with certainty."""
    rng = np.random.default_rng(0)
    losses = [(2.0 if k < 25 else 1.0) + 0.01 * rng.standard_normal() for k in range(50)]
    found = [Measurement(k, {"loss": Estimate(loss)}) for k, loss in enumerate(losses)]
    writer = TensorBoardWriter(tmp_path)
    for m in found:
        writer.on_measurement(m)
    writer.on_end(analyze_run(Run(None, {}, tuple(found), (), (), (), finished=True), alpha=0.01))
    writer.close()
    [(step, table)] = texts(writer.directory, FOUND)
    assert step == 49 and "loss falls" in table
    steps, stage = read_scalars(writer.directory)[STAGE_OF_WHOLE_RUN]
    assert steps.tolist() == list(range(50)) and abs(int(np.argmax(stage)) - 25) <= 1
    assert set(stage[:24].tolist()) == {0.0} and set(stage[26:].tolist()) == {1.0}
    assert [image.step for image in accumulated(writer.directory).Images(RUN)] == [49]


def test_an_empty_run_ends_quietly(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.on_end(analyze_run(Run(None, {}, (), (), (), (), finished=True)))
    writer.close()
    assert read_scalars(writer.directory) == {}


def test_what_was_measured_survives_a_kill(tmp_path: Path) -> None:
    """The process ends without closing anything, right after a measurement."""
    code = (
        "import os, sys\n"
        "from phasewatch.record import Estimate, Measurement\n"
        "from phasewatch.tensorboard import TensorBoardWriter\n"
        "writer = TensorBoardWriter(sys.argv[1])\n"
        "for step in range(3): writer.on_measurement(Measurement(step, {'loss': Estimate(1.0)}))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert read_scalars(tmp_path / "phasewatch")["phasewatch/1_loss"][0].tolist() == [0, 1, 2]


def test_the_package_imports_without_torch() -> None:
    code = "import sys, phasewatch.tensorboard; sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
