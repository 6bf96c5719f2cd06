"""What the example says of its units is what their activations show."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "symmetry_breaking.py"


@pytest.mark.slow
def test_units_die_at_the_steps_that_are_named(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The reference looks at the pre-activations alone, each time a measurement starts."""
    spec = importlib.util.spec_from_file_location("example_symmetry_breaking", EXAMPLE)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    explain_zeros, silent = script.explain_zeros, []

    def watched(model: Any, objective: Any) -> Any:
        inputs = objective.batches[0][0]
        with torch.no_grad():
            silent.append(set(torch.nonzero((model[0](inputs) <= 0).all(0)).flatten().tolist()))
        return explain_zeros(model, objective)

    monkeypatch.setattr(script, "explain_zeros", watched)
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(
        sys, "argv", ["symmetry_breaking.py", "--figure", str(figure), "--directory", str(tmp_path / "run")]
    )
    script.main()
    output = capsys.readouterr().out
    said = [
        (int(step), int(unit)) for step, unit in re.findall(r"^ +(\d+) .* unit (\d+) of layer 0 dies", output, re.M)
    ]
    truth = [(i, unit) for i in range(1, len(silent)) for unit in sorted(silent[i] - silent[i - 1])]
    assert said == truth != []
    assert figure.stat().st_size > 10_000
