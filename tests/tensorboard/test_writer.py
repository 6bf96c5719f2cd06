from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch.utils.tensorboard import SummaryWriter

from phasewatch.analysis import analyze_run
from phasewatch.record import Estimate, Histogram, Measurement, Run
from phasewatch.tensorboard import TensorBoardWriter, read_scalars
from phasewatch.tensorboard.writer import spectrum_edges
from phasewatch.transitions import Change, Flag, Transition

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
    events = accumulated(directory).Tensors(f"phasewatch/{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_writes_every_signal_and_the_bands_into_the_child_run(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for step in (0, 10, 20):
        writer.on_measurement(measurement(step, accuracy=math.nan if step == 10 else 0.5))
    writer.close()
    assert writer.directory == tmp_path / "phasewatch"
    assert not list(tmp_path.glob("*tfevents*"))
    scalars = {tag: (s.tolist(), v.tolist()) for tag, (s, v) in read_scalars(writer.directory).items()}
    assert scalars["phasewatch/loss"][1] == pytest.approx([1.0, 1 / 11, 1 / 21])
    assert scalars["phasewatch/accuracy"] == ([0, 20], [0.5, 0.5])
    assert scalars["phasewatch/llc"] == ([0, 10, 20], [5.0, 5.0, 5.0])
    assert scalars["phasewatch/llc_lower"][1] == pytest.approx([5 - 1.959964 * 0.5] * 3)
    assert scalars["phasewatch/llc_upper"][1] == pytest.approx([5 + 1.959964 * 0.5] * 3)
    assert scalars["phasewatch/unreliable"] == ([0, 10, 20], [0.0, 1.0, 0.0])


def test_without_scalars_only_what_another_logger_cannot_do_is_written(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, scalars=False)
    writer.on_measurement(measurement(0))
    writer.close()
    assert set(read_scalars(writer.directory)) == {
        f"phasewatch/{name}" for name in ("llc", "llc_lower", "llc_upper", "unreliable")
    }
    assert "phasewatch/hessian_eigenvalues" in accumulated(writer.directory).Tags()["histograms"]


@pytest.mark.parametrize("scalars", [True, False])
def test_each_number_is_written_once(tmp_path: Path, scalars: bool) -> None:
    writer = TensorBoardWriter(tmp_path, scalars=scalars)
    writer.on_measurement(measurement(0, nullity_lower=6.0, nullity_upper=9.0))
    writer.close()
    found = accumulated(writer.directory)
    # Measured bounds are scalars like any other: where the trainer's logger writes those, they are not written again.
    measured = ("nullity", "nullity_lower", "nullity_upper")
    for name in ("llc", "llc_lower", *(measured if scalars else ())):
        assert len(found.Scalars(f"phasewatch/{name}")) == 1
    assert scalars or not set(found.Tags()["scalars"]) & {f"phasewatch/{name}" for name in measured}


def test_a_count_that_is_unknown_shows_its_bounds(tmp_path: Path) -> None:
    """In a chart of lines: a margin chart is an error message where value and bounds have other steps."""
    writer = TensorBoardWriter(tmp_path)
    for step in range(3):
        writer.on_measurement(
            measurement(step, nullity=7.0 if step == 1 else math.nan, nullity_lower=6.0, nullity_upper=9.0)
        )
    writer.close()
    found = accumulated(writer.directory)
    steps = {name: [e.step for e in found.Scalars(f"phasewatch/{name}")] for name in ("nullity", "nullity_lower")}
    assert steps == {"nullity": [1], "nullity_lower": [0, 1, 2]}
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    [category] = layout(multiplexer, "phasewatch")["category"]  # type: ignore[misc, attr-defined]
    [chart] = [chart for chart in category["chart"] if "bounds" in chart["title"]]
    assert chart["multiline"]["tag"] == [
        f"^phasewatch/{name}$" for name in ("nullity", "nullity_lower", "nullity_upper")
    ]


def test_the_first_chart_is_lambda_of_the_function_at_both_resolutions(tmp_path: Path) -> None:
    """Charts of lines come first, and one of bands holds one signal: the values stand in both."""
    fine, coarse = "llc_behavioral", "llc_behavioral_coarse"
    writer = TensorBoardWriter(tmp_path)
    plain = measurement(0)
    found = {**plain.estimates, fine: Estimate(20.0, 1.0), coarse: Estimate(8.0, 0.5)}
    writer.on_measurement(dataclasses.replace(plain, estimates=found))
    doubted = {**found, coarse: Estimate(9.0, 0.5, ("R-hat",))}
    writer.on_measurement(dataclasses.replace(plain, step=1, estimates=doubted))
    writer.close()
    scalars = read_scalars(writer.directory)
    assert scalars[f"phasewatch/{coarse}_unreliable"][0].tolist() == [1]
    assert scalars[f"phasewatch/{coarse}"][1].tolist() == [8.0, 9.0]
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    [category] = layout(multiplexer, "phasewatch")["category"]  # type: ignore[misc, attr-defined]
    first = next(chart for chart in category["chart"] if "multiline" in chart)
    assert first["title"] == "learning coefficient λ of the function"
    assert first["multiline"]["tag"] == [f"^phasewatch/{name}$" for name in (fine, coarse, f"{coarse}_unreliable")]
    bands = [chart["margin"]["series"] for chart in category["chart"] if "margin" in chart]
    assert bands[:2] == [
        [{part: f"phasewatch/{name}{end}" for part, end in (("value", ""), ("lower", "_lower"), ("upper", "_upper"))}]
        for name in (fine, coarse)
    ]
    assert len({chart["title"] for chart in category["chart"]}) == len(category["chart"])


def layout(multiplexer: EventMultiplexer, run: str) -> dict[str, object]:
    *_, event = multiplexer.Tensors(run, CONFIG_SUMMARY_TAG)
    parsed = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return json_format.MessageToDict(parsed)


def test_the_layout_of_the_user_survives_as_tensorboard_reads_it(tmp_path: Path) -> None:
    user = SummaryWriter(str(tmp_path))
    user.add_custom_scalars({"mine": {"losses": ["Multiline", ["loss"]]}})
    writer = TensorBoardWriter(tmp_path)
    writer.on_measurement(measurement(0))
    writer.close()
    user.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    assert "mine" in str(layout(multiplexer, "."))
    ours = str(layout(multiplexer, "phasewatch"))
    for tag in ("llc", "llc_lower", "llc_upper"):
        assert f"'phasewatch/{tag}'" in ours
    assert "margin" in ours


def test_the_spectrum_keeps_its_counts_and_has_a_bin_for_zero(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.on_measurement(measurement(0))
    writer.close()
    [event] = accumulated(writer.directory).Histograms("phasewatch/hessian_eigenvalues")
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
    assert [column.tolist() for column in scalars["phasewatch/transition_at"]] == [[50, 90], [20.0, 60.0]]
    assert [column.tolist() for column in scalars["phasewatch/transitions"]] == [[50, 90], [1.0, 2.0]]
    (first, one), (last, both) = texts(writer.directory, "transitions_flagged")
    assert (first, last) == (50, 90) and one.count("| A |") == 1 and both.count("| A |") == 2
    images = accumulated(writer.directory).Images("phasewatch/run_so_far")
    assert [(image.step, image.encoded_image_string[:4]) for image in images] == [
        (50, b"\x89PNG"),
        (90, b"\x89PNG"),
    ]


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    flagged = dataclasses.replace(transition(20.0), flagged_at=50)
    before = Run(None, {}, tuple(measurement(step) for step in (0, 20, 50)), (flagged,), (), (), finished=False)
    writer = TensorBoardWriter(tmp_path)
    writer.on_resume(before)
    writer.on_measurement(measurement(90))
    writer.on_transitions(90, [flag(1, 60.0, 90)], [transition(20.0), transition(60.0)])
    writer.close()
    assert read_scalars(writer.directory)["phasewatch/transitions"][1].tolist() == [2.0]
    [(_, table)] = texts(writer.directory, "transitions_flagged")
    assert table.count("| A |") == 2


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
    [(step, table)] = texts(writer.directory, "transitions_found")
    assert step == 49 and "loss falls" in table
    assert [image.step for image in accumulated(writer.directory).Images("phasewatch/run")] == [49]


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
    assert read_scalars(tmp_path / "phasewatch")["phasewatch/loss"][0].tolist() == [0, 1, 2]


def test_the_package_imports_without_torch() -> None:
    code = "import sys, phasewatch.tensorboard; sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
