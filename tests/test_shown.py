"""What results show of themselves in a notebook."""

from __future__ import annotations

from xml.dom import minidom

import numpy as np
import pytest
import torch
from staircase import HEADER, measurements
from torch import nn

import phasewatch
from phasewatch.record import Run
from phasewatch.transitions import Detection


def cells(result: object) -> list[list[str]]:
    """The rows of the table, which has to be well formed."""
    page = minidom.parseString(f"<div>{result._repr_html_()}</div>")  # type: ignore[attr-defined]

    def text(node: minidom.Node) -> str:
        return "".join(child.nodeValue or text(child) for child in node.childNodes)

    return [[text(cell) for cell in row.getElementsByTagName("td")] for row in page.getElementsByTagName("tr")]


def heading(result: object) -> str:
    page = minidom.parseString(f"<div>{result._repr_html_()}</div>")  # type: ignore[attr-defined]
    return str(page.getElementsByTagName("p")[0].firstChild.nodeValue)


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, phasewatch.Objective]:
    torch.manual_seed(0)
    module = nn.Linear(3, 1).double()
    inputs = torch.randn(32, 3).double()
    batch = (inputs, inputs.sum(1, keepdim=True))
    loss = lambda module, batch: 0.5 * (module(batch[0]) - batch[1]).square().mean()  # noqa: E731
    return module, phasewatch.Objective(module, [batch], loss_fn=loss)


def test_estimates_and_spectra_show_what_they_print_and_their_numbers(
    problem: tuple[nn.Module, phasewatch.Objective],
) -> None:
    module, objective = problem
    coarse, *_ = phasewatch.estimate_behavioral_llc(objective, (0.1,), chains=2, draws=20, burn_in=20)
    spectrum = phasewatch.hessian_spectrum(objective)
    for result in (coarse, spectrum):
        assert heading(result) == repr(result)
    assert ["learning_coefficient", f"{coarse.learning_coefficient:.4g}"] in cells(coarse)
    assert ["num_parameters", "4"] in cells(spectrum)
    ledger = phasewatch.explain_zeros(module, objective)
    shown = dict(row for row in cells(ledger) if row)
    assert int(shown["generic"]) == ledger.generic and heading(ledger) == repr(ledger)


def test_a_run_shows_its_signals_with_how_many_points_to_trust() -> None:
    found = tuple(measurements(np.arange(0, 2000, 100), [1000.0]))
    run = Run(None, HEADER, found, (), (), (), finished=False)
    rows = {row[0]: row[1:] for row in cells(run) if row}
    doubted = sum(not m.estimates["llc"].reliable for m in found)
    assert rows["llc"][-1] == f"{20 - doubted} of 20"
    assert rows["loss"][1] == f"{found[-1].value('loss'):.4g} at step 1,900"
    assert "llc_rhat" not in rows and "was not closed" in heading(run)
    assert cells(Run(None, {}, (), (), (), (), finished=True)) == []


def test_detections_show_their_transitions_or_why_there_are_none() -> None:
    steps = np.arange(60)
    loss = np.where(steps < 30, 2.0, 1.0) + 0.01 * np.random.default_rng(0).standard_normal(60)
    found = phasewatch.detect_transitions(steps, {"loss": loss})
    assert heading(found) == "1 transition"
    assert cells(found)[1][1:3] == ["loss falls", "loss"]
    assert heading(Detection(undecided="too <few> points")) == "too <few> points"
