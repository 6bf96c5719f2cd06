"""The examples and the demo run, and what they claim to find they find."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import phasewatch
from phasewatch import demo
from phasewatch.analysis import analyze_run
from phasewatch.record import load_run

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: Any) -> Any:
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


def test_the_deep_linear_network_learns_its_modes_at_the_times_predicted(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    script = example("deep_linear_network")
    monkeypatch.setattr(sys, "argv", ["deep_linear_network.py", "--directory", str(tmp_path / "run")])
    script.main()
    output = capsys.readouterr().out

    # learning rate 0.005, a strength that starts at 1e-4 and grows as exp(2 s t), by hand
    by_hand = {s: math.log((s - 1e-4) / 1e-4) / (2 * s * 0.005) for s in (4.0, 1.5, 0.6)}
    rows = re.findall(r"^ *([\d.]+) +(\d+) +(\d+)  +\d+ - \d+ +(\d+) - (\d+)$", output, re.MULTILINE)
    assert [float(mode) for mode, *_ in rows] == list(by_hand)
    for (_, predicted, detected, start, end), expected in zip(rows, by_hand.values(), strict=True):
        assert int(predicted) == round(expected)
        assert int(start) <= expected <= int(end)
        assert abs(int(detected) - expected) < 0.1 * expected
    assert "0 detected transitions belong to no mode" in output
    assert "missed" not in output

    run = load_run(tmp_path / "run")
    assert run.finished and not run.failures
    assert run.series("loss").steps.tolist() == list(range(0, 2401, 30))
    # once learnt, a mode of strength s no longer adds s^2 / 2 to the loss of white inputs
    loss = dict(zip(run.series("loss").steps.tolist(), run.series("loss").values, strict=True))
    np.testing.assert_allclose(loss[480] - loss[960], 1.5**2 / 2, rtol=0.25)


def test_the_deep_linear_network_follows_its_closed_form() -> None:
    """The example's initial state is the one to which its formula applies: balanced, aligned, small."""
    script = example("deep_linear_network")
    network, inputs, targets = script.make_problem(seed=3)
    torch.testing.assert_close(inputs.T @ inputs / len(inputs), torch.eye(script.WIDTH), atol=1e-4, rtol=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=script.LEARNING_RATE)
    for _ in range(round(script.half_learnt(4.0))):
        optimizer.zero_grad()
        script.half_mean_squared_error(network, (inputs, targets)).backward()
        optimizer.step()
    strengths = torch.linalg.svdvals((network[1].weight @ network[0].weight).detach())
    assert strengths[0].item() == pytest.approx(2.0, rel=0.15)  # half of 4; the noise in the targets moves it a little
    assert strengths[1] < 0.05


def test_the_plain_loop(monkeypatch: Any, capsys: Any) -> None:
    script = example("plain_pytorch")
    monkeypatch.setattr(script, "STEPS", 100)
    script.main()
    run = phasewatch.load_run("runs/plain_pytorch")
    assert [m.step for m in run.measurements] == [0, 50, 100]
    assert run.finished and not run.failures
    assert {"loss", "llc", "nullity", "hessian_max"} <= set(run.names)
    assert "3 measurements" in capsys.readouterr().out


def test_the_lightning_script(monkeypatch: Any) -> None:
    script = example("digits")
    trainer = script.pl.Trainer

    def short(**options: Any) -> Any:
        return trainer(**{**options, "max_epochs": 2, "enable_progress_bar": False})

    monkeypatch.setattr(script.pl, "Trainer", short)
    # Two epochs take no time, in which a busy machine might not get its minute of measuring done.
    monkeypatch.setattr(script, "PhaseWatch", partial(script.PhaseWatch, free_seconds=300.0))
    script.main()
    run = phasewatch.load_run("lightning_logs/version_0")
    assert run.measurements[0].step == 0 and run.measurements[-1].step == 2 * math.ceil(1797 / 64)
    assert run.finished and not run.failures
    assert run.header["n"] == 1797
    loss = run.series("loss").values
    assert loss[-1] < 0.5 * loss[0]


def test_the_demo(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(demo, "STEPS", 50)
    monkeypatch.setattr(demo, "MEASURE_EVERY", 25)
    demo.run(Path("out"))
    run = phasewatch.load_run("out/version_0")
    assert [m.step for m in run.measurements] == [0, 25, 50]
    assert run.finished and not run.failures
    output = capsys.readouterr().out
    report = Path(re.search(r"Look at the report +(\S+)", output).group(1))  # type: ignore[union-attr]
    assert report.is_file() and os.stat(report).st_size > 1000
    assert analyze_run(run).transitions == ()  # three points are too few, and it says so
    assert "Fewer than 8 measurements, 3: only the loss at every step was searched" in output
