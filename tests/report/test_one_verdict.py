"""Ten runs, watched and recorded: terminal, page, JSON, TensorBoard, logger and record say one thing of each."""

from __future__ import annotations

import csv
import json
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from staircase import measurements, with_lambda_of_function
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from phasewatch import Watch, load_run
from phasewatch.analysis import analyze_run
from phasewatch.callbacks.summaries import log_verdict
from phasewatch.cli import main
from phasewatch.estimators import Reading
from phasewatch.objective import Objective
from phasewatch.record import Estimate
from phasewatch.record.ending import NOT_CLOSED
from phasewatch.report import verdict
from phasewatch.report.verdict import counted_changes
from phasewatch.tags import STAGE_OF_WHOLE_RUN, SUMMARY
from phasewatch.tensorboard import TensorBoardWriter, read_scalars
from phasewatch.tensorboard.writer import VERDICT

STEPS = np.arange(0, 5000, 100)
# Where λ of the function and the Hessian jump, of each seed; the loss stays as it is.
JUMPS: list[list[float]] = [[], [1500.0], [], [2000.0, 3500.0], [], [2500.0], [], [1000.0, 3000.0], [], [3500.0]]
UNFINISHED = (4, 5)


class Played:
    """Gives what was made beforehand, one measurement after another."""

    name = "played"

    def __init__(self, made: list[dict[str, Estimate]]) -> None:
        self._made = iter(made)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        return Reading(next(self._made))


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def watched(directory: Path, seed: int) -> Watch:
    found = with_lambda_of_function(measurements(STEPS, JUMPS[seed], seed), JUMPS[seed], seed=100 + seed)
    made = [{name: one for name, one in m.estimates.items() if name != "loss"} for m in found]
    torch.manual_seed(seed)
    watch = Watch(
        nn.Linear(3, 2),
        [(torch.randn(40, 3), torch.randint(0, 2, (40,)))],
        loss_fn=cross_entropy,
        n=1437,
        schedule=100,
        estimators=[Played(made)],
        directory=directory,
        listeners=[TensorBoardWriter(directory)],
        on_error="raise",
    )
    for step in STEPS.tolist():
        watch.at(step)
    if seed not in UNFINISHED:
        watch.close()
    return watch


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_of_each_run_one_thing_is_said(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest's workers have it, which a pipe has not
    watch = watched(tmp_path / "run", seed)
    run = load_run(tmp_path / "run")
    analysis = analyze_run(run)
    said = verdict(analysis)
    expected = list(said.sentences)

    # what is true of the run
    assert len(said.steps) == len(JUMPS[seed])
    assert all(abs(step - jump) <= 200 for step, jump in zip(said.steps, JUMPS[seed], strict=True))
    assert said.finding == ("transitions" if JUMPS[seed] else "no transition")
    assert (NOT_CLOSED in expected) is (seed in UNFINISHED)

    # terminal, page, JSON
    assert main(["analyze", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    report = tmp_path / "run" / "report" / "phasewatch"
    assert "".join(f"<li>{escape(line)}</li>" for line in expected) in report.with_suffix(".html").read_text()
    assert main(["analyze", str(tmp_path / "run" / "phasewatch"), "--json"]) == 0  # found from its event files too
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(report.with_suffix(".json").read_text())
    assert printed["verdict"] == json.loads(json.dumps(said.to_dict()))

    # what the logger keeps
    logger = CSVLogger(tmp_path / "csv")
    log_verdict(logger, analysis)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        [row] = csv.DictReader(file)
    assert [float(row.pop(f"{SUMMARY}transition_{k + 1}_step")) for k in range(len(said.steps))] == list(said.steps)
    assert float(row[f"{SUMMARY}transitions"]) == len(said.steps)
    trusted, points = said.reliable["llc_behavioral"]
    assert float(row[f"{SUMMARY}llc_behavioral_reliable"]) == trusted / points

    # record and TensorBoard, which for a run that goes on say what was seen so far
    events = EventAccumulator(str(tmp_path / "run" / "phasewatch"), size_guidance={"tensors": 0}).Reload()
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"{VERDICT}/text_summary")]
    assert len({step for step, _ in texts}) == len(texts) >= len(STEPS) - 1
    if seed in UNFINISHED:
        standing = counted_changes(run.transitions) if run.transitions else "No transition was flagged so far"
        assert texts[-1][1].startswith(f"- {standing}")
    else:
        assert watch.analysis is not None and verdict(watch.analysis) == said
        assert texts[-1][1] == "\n".join(f"- {line}" for line in expected)
        stage = read_scalars(tmp_path / "run" / "phasewatch")[STAGE_OF_WHOLE_RUN][1]
        assert stage.max() == len(said.steps)
        for flagged in run.transitions:  # what still stands in the record, the whole run bears out
            assert any(max(one.start, flagged.start) <= min(one.end, flagged.end) for one in analysis.transitions)
