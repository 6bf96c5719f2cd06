"""The catalogue of signals against what is really measured, and a new signal by its recipe."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch import Tensor, nn

from phasewatch import Watch, estimators, load_run
from phasewatch.analysis import analyze_run
from phasewatch.estimators import BehavioralCoefficient, Estimator, LearningCoefficient, Reading
from phasewatch.figures import run_figure
from phasewatch.measure import Probe, measure
from phasewatch.objective import Objective
from phasewatch.record import Estimate, Signal, describe
from phasewatch.record.signals import CATALOGUE, DETAIL, detected, groups, is_described, look_up
from phasewatch.report import write_report
from phasewatch.tensorboard import TensorBoardWriter

QUICK: dict[str, Any] = {"chains": 2, "draws": 20, "burn_in": 20}
SAMPLERS = (BehavioralCoefficient, LearningCoefficient)


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def network_and_probe() -> tuple[nn.Module, Probe]:
    torch.manual_seed(0)
    batch = (torch.randn(40, 3), torch.randint(0, 2, (40,)))
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), Probe([batch], cross_entropy, n=500)


def all_estimators() -> list[Estimator]:
    """One of each class that the module has, whichever will be added."""
    kinds = [kind for _, kind in inspect.getmembers(estimators, inspect.isclass) if kind is not Estimator]
    own = [kind for kind in kinds if hasattr(kind, "read")]
    return [kind(**QUICK) if kind in SAMPLERS else kind() for kind in own]


def test_every_signal_that_is_measured_has_a_row_and_no_row_is_stale() -> None:
    network, probe = network_and_probe()
    names = {e.name for e in all_estimators()}
    assert {"llc_behavioral", "llc", "hessian", "zeros", "loss"} <= names
    with Watch(
        network,
        probe.batches,
        loss_fn=cross_entropy,
        n=500,
        schedule=1,
        estimators=[e for e in all_estimators() if e.name != "loss"],
        held_out=probe.batches,
        on_error="raise",
    ) as watch:
        watch.at(0)
        watch.at(1)
    of_layers = {f"effective_rank{at}_{layer}" for at in ("", "_coarse") for layer in (0, 2)}
    measured = set(watch.run.names) - of_layers
    assert measured <= set(CATALOGUE), "these need a row in phasewatch/record/signals.py"
    assert set(CATALOGUE) <= measured, "no estimator that phasewatch/estimators/__init__.py exports measures these rows"
    assert all(is_described(name) and look_up(name).group == DETAIL for name in of_layers)


def test_layers_and_other_data_are_of_the_families() -> None:
    """They are described, as details of which no transition is made, each by the row of its kind."""
    network, probe = network_and_probe()
    measured = {}
    for name in ("", "validation", "step_size_of"):
        estimator = LearningCoefficient(**QUICK, refined=("0", "*.bias", "2.weight"), data=name)
        other = Probe(probe.batches, cross_entropy, n=500, name=name)
        found, failures = measure(network, [estimator], other, 0)
        assert not failures
        measured.update(found.estimates)
    assert {"llc_*.bias", "llc_validation_rhat", "llc_validation_0", "loss_validation"} <= measured.keys()
    for name in measured.keys() - CATALOGUE.keys():
        row = look_up(name)
        assert is_described(name) and row.group == DETAIL and detected([name]) == [], name
        assert row.title != look_up(name.replace("validation", "other")).title or "validation" not in name
    assert look_up("llc_validation_rhat").unit == look_up("llc_rhat").unit
    assert look_up("llc_validation_ess").unit == look_up("llc_ess").unit != look_up("llc_validation").unit
    assert look_up("llc_validation").bounds == ("llc_validation_lower", "llc_validation_upper")
    assert look_up("llc_2.weight").unit == look_up("llc").unit


def test_parts_of_the_function_are_not_taken_for_parts_of_the_loss() -> None:
    """``llc_behavioral_<part>`` begins as ``llc_<part>`` does, and the coarse resolution as the fine one."""
    titles = {
        "llc_behavioral_encoder": "learning coefficient λ of the function, fine (encoder)",
        "llc_behavioral_coarse_encoder": "learning coefficient λ of the function, coarse (encoder)",
        "llc_behavioral_encoder_rhat": "λ of the function, fine: R-hat of the chains (encoder)",
        "llc_behavioral_coarse_encoder_heat_capacity": "λ of the function, coarse: heat capacity (encoder)",
        "llc_outputs_encoder": "half the effective rank in the output metric of fixed variance, fine (encoder)",
        "description_length_encoder": "description length n L + λ log n (encoder)",
        "llc_encoder": "learning coefficient λ of the loss (encoder)",
    }
    assert {name: look_up(name).title for name in titles} == titles
    assert detected(titles) == []


def test_lambda_of_the_function_comes_first() -> None:
    looked_at = ("loss", "llc", "nullity", "llc_behavioral_coarse", "llc_behavioral", "llc_outputs")
    assert detected(looked_at) == ["llc_behavioral", "llc_behavioral_coarse", "loss", "llc", "nullity"]
    assert [row.name for row in next(iter(groups().values()))] == ["llc_behavioral", "llc_behavioral_coarse"]


@pytest.mark.parametrize("arguments", [{"data": "rhat"}, {"data": "quadratic"}, {"refined": ("ess",)}])
def test_no_part_takes_the_name_of_another_signal(arguments: dict[str, Any]) -> None:
    """It would replace that signal's values without a word."""
    with pytest.raises(ValueError, match="would be called 'llc_.*as another signal is"):
        LearningCoefficient(**arguments)


def test_bounds_and_families_in_the_catalogue_are_sound() -> None:
    for row in CATALOGUE.values():
        assert row.title and row.name.startswith(row.family)
        assert not row.detected or row.group, "what is detected is what a person looks at"
    assert len({row.title for row in CATALOGUE.values()}) == len(CATALOGUE)


@dataclass
class Sharpness:
    """Known at every step: 1 until step 30, 2 from there on."""

    name: str = "sharpness"
    calls: int = 0

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        self.calls += 1
        noise = 0.02 * torch.randn(1, generator=torch.Generator().manual_seed(seed)).item()
        return Reading({"sharpness": Estimate((1.0 if self.calls <= 30 else 2.0) + noise, 0.02)})


@pytest.fixture
def row() -> Iterator[Signal]:
    row = Signal("sharpness", "sharpness of the loss", "loss / radius", group="sharpness", detected=True)
    describe(row)
    yield row
    CATALOGUE.pop("sharpness", None)


def watched(directory: Path) -> Watch:
    network, probe = network_and_probe()
    with Watch(
        network,
        probe.batches,
        loss_fn=cross_entropy,
        schedule=1,
        estimators=[Sharpness()],
        directory=directory,
        listeners=[TensorBoardWriter(directory)],
        on_error="raise",
    ) as watch:
        for step in range(60):
            watch.at(step)
    return watch


def layout(directory: Path) -> dict[str, Any]:
    accumulator = EventAccumulator(str(directory / "phasewatch"), size_guidance={"tensors": 0}).Reload()
    [event] = accumulator.Tensors(CONFIG_SUMMARY_TAG)[-1:]
    [category] = json_format.MessageToDict(layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]))["category"]
    return {chart["title"]: chart for chart in category["chart"]}


def titles(directory: Path) -> list[str]:
    figure = run_figure(analyze_run(load_run(directory)))
    return [title.split(",")[0] for axis in figure.axes if (title := axis.get_title(loc="left"))]


def test_one_row_and_one_estimator_are_a_new_signal_everywhere(row: Signal, tmp_path: Path) -> None:
    watch = watched(tmp_path)
    run = load_run(tmp_path)
    assert len(run.series("sharpness")) == 60
    [live], [found] = watch.transitions, analyze_run(run).transitions
    for transition in (live, found):
        assert transition.start <= 30 <= transition.end and transition.kind == "sharpness rises"
    assert run.transitions == (live,)
    assert layout(tmp_path)["sharpness"]["multiline"]["tag"] == ["^phasewatch_details/sharpness(_unreliable)?$"]
    assert titles(tmp_path) == ["loss on the probe", "sharpness of the loss"]
    page = write_report(analyze_run(run), tmp_path / "report").html.read_text(encoding="utf-8")
    assert "<td>sharpness</td><td>sharpness of the loss</td><td>loss / radius</td>" in page
    del CATALOGUE["sharpness"]
    assert analyze_run(run).signals == ("loss",)
    # Another process, whose catalogue has no such row, reads it from the record: one verdict.
    assert analyze_run(load_run(tmp_path)).signals == ("loss", "sharpness") and CATALOGUE["sharpness"] == row


def test_a_signal_that_nobody_has_described_is_recorded_as_a_detail_and_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        watch = watched(tmp_path)
    said = [str(warning.message) for warning in caught if "sharpness" in str(warning.message)]
    assert len(said) == 1
    assert "no row for 'sharpness'" in said[0] and "describe(Signal('sharpness'" in said[0]
    assert len(load_run(tmp_path).series("sharpness")) == 60
    assert watch.transitions == [] and "sharpness" not in layout(tmp_path)


def test_a_second_row_of_a_name_is_refused(row: Signal) -> None:
    describe(row)  # the same again does no harm
    with pytest.raises(ValueError, match="'sharpness' is described already"):
        describe(Signal("sharpness", "something else"))
    with pytest.raises(ValueError, match="'llc' is described already.*another name"):
        describe(Signal("llc", "length of the longest cycle"))
