"""The worked example from checkpoints to a figure runs, and finds what the theory says."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "after_the_run.py"


def test_it_goes_from_checkpoints_to_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It finds each mode around the step at which half of it is learnt, by hand, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    threads = torch.get_num_threads()
    try:
        left = runpy.run_path(str(EXAMPLE))
    finally:
        torch.set_num_threads(threads)
    found = left["analysis"].transitions
    half_learnt = [math.log((s - 1e-4) / 1e-4) / (2 * s * 0.005) for s in (4.0, 1.5, 0.6)]
    assert len(found) == 3
    for transition, step in zip(found, half_learnt, strict=True):
        assert transition.start <= step <= transition.end
    assert len(left["run"].measurements) == 41 and {"step", "name", "value"} <= set(left["table"].columns)
    assert left["fine"].to_xarray()["divergence"].dims == ("chain", "draw")
    # W2 W1 stays as it is where W1 -> G W1, W2 -> W2 inv(G): six times six directions, and no others at full rank
    assert "nullity 36" in capsys.readouterr().out
    assert (tmp_path / "runs" / "after_the_run" / "after_the_run.png").stat().st_size > 10_000
