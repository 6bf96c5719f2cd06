"""The verdict as loggers keep it: by those that are installed, else by small stand-ins of what is used of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytorch_lightning.loggers import CSVLogger

from phasewatch.analysis import Analysis, analyze_run
from phasewatch.callbacks.summaries import log_verdict
from phasewatch.record import Estimate, Measurement, Run
from phasewatch.report import verdict


def analysis(points: int = 60) -> Analysis:
    """The loss falls from 2 to 1 at step 30 with noise of 0.01; of λ, which does nothing, every third is doubted."""
    rng = np.random.default_rng(0)
    found = []
    for step in range(points):
        doubts = ("R-hat",) if step % 3 == 0 else ()
        loss = (2.0 if step < 30 else 1.0) + 0.01 * rng.standard_normal()
        llc = Estimate(10 + 0.3 * rng.standard_normal(), 0.3, doubts)
        found.append(Measurement(step, {"loss": Estimate(loss), "llc_behavioral": llc}))
    return analyze_run(Run(None, {}, tuple(found), (), (), (), finished=True))


class Recorder:
    """Keeps what it is told, as MlflowClient and a run of W&B do."""

    id = "r1"

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.tags: dict[str, str] = {}
        self.files: list[str] = []

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.tags[key] = value

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str) -> None:
        self.files = [f"{artifact_path}/{path.name}" for path in Path(local_dir).iterdir()]

    def log_artifact(self, path: str, name: str, type: str) -> None:
        self.files = [f"{name}/{path.name}" for path in Path(path).iterdir()]


class StandIn:
    run_id = "r1"

    def __init__(self) -> None:
        self.experiment, self.metrics = Recorder(), {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.update(metrics)

    def save(self) -> None: ...


MLFlowLogger, WandbLogger = (type(name, (StandIn,), {}) for name in ("MLFlowLogger", "WandbLogger"))


def test_number_and_steps_of_transitions_and_shares_are_metrics_of_csv(tmp_path: Path) -> None:
    found = analysis()
    logger = CSVLogger(tmp_path)
    log_verdict(logger, found)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        [row] = csv.DictReader(file)
    assert row.pop("step") == "59"
    [one] = found.transitions
    assert {name: float(value) for name, value in row.items()} == {
        "phasewatch_summary/transitions": 1.0,
        "phasewatch_summary/transition_1_step": one.step,
        "phasewatch_summary/llc_behavioral_reliable": pytest.approx(40 / 60),
    }


@pytest.mark.parametrize("kind", [MLFlowLogger, WandbLogger])
def test_words_and_report_where_there_is_a_place_for_them(kind: Any) -> None:
    logger = kind()
    log_verdict(logger, analysis())
    said = [*logger.experiment.tags.values(), *logger.experiment.summary.values()]
    assert said == [str(verdict(analysis()))]
    assert sorted(path.rpartition("/")[2] for path in logger.experiment.files) == [
        f"phasewatch.{suffix}" for suffix in ("html", "json", "png")
    ]
    assert logger.metrics["phasewatch_summary/transitions"] == 1


def test_of_a_run_without_measurements_nothing_is_logged() -> None:
    logger = MLFlowLogger()
    log_verdict(logger, analyze_run(Run(None, {}, (), (), (), (), finished=True)))
    assert logger.metrics == {} and logger.experiment.files == []


def test_mlflow_itself_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    from pytorch_lightning.loggers import MLFlowLogger as Real

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = Real("digits", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    log_verdict(logger, analysis())
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path / 'mlruns'}")
    run = client.get_run(logger.run_id)
    assert run.data.metrics["phasewatch_summary/transitions"] == 1
    assert run.data.tags["phasewatch.verdict"] == str(verdict(analysis()))
    assert len(client.list_artifacts(logger.run_id, "phasewatch")) == 3


def test_wandb_itself_keeps_it_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from pytorch_lightning.loggers import WandbLogger as Real

    logger = Real(project="digits", save_dir=str(tmp_path), offline=True)
    log_verdict(logger, analysis())
    run = logger.experiment
    assert run.summary["phasewatch_summary/verdict"] == str(verdict(analysis()))
    assert run.summary["phasewatch_summary/transitions"] == 1
    wandb.finish()
    json.dumps(dict(run.summary), default=str)
