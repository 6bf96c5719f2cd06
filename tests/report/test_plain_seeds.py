"""Plain runs on real data: what was flagged while they went on is reconciled with the whole at their end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from phasewatch import Watch, load_run
from phasewatch.analysis import NOT_BORNE_OUT, analyze_run
from phasewatch.estimators import BehavioralCoefficient, HessianSpectrum
from phasewatch.record.transition import overlap

STEPS = 400


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_no_flag_is_left_standing_that_the_analysis_does_not_bear_out(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    network = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with Watch(
        network,
        [(images[:128], labels[:128])],
        loss_fn=cross_entropy,
        n=len(images),
        schedule=25,
        total_steps=STEPS,
        estimators=[BehavioralCoefficient(chains=2, draws=32, burn_in=20), HessianSpectrum(num_eigenvalues=2)],
        directory=tmp_path,
        on_error="raise",
    ) as watch:
        for step in range(STEPS):
            watch.at(step)
            drawn = torch.randint(0, len(images), (64,))
            optimizer.zero_grad()
            loss = cross_entropy(network, (images[drawn], labels[drawn]))
            loss.backward()
            watch.observe(step, optimizer, loss=loss)
            optimizer.step()
    run = load_run(tmp_path)
    found = analyze_run(run)
    assert found.note is None
    for standing in run.transitions:
        own = (standing.start, standing.end)
        assert any(overlap(own, (one.start, one.end)) for one in found.transitions), standing
    withdrawn = {flag.number for flag in run.flags if flag.why == NOT_BORNE_OUT}
    assert len(withdrawn) == len(found.not_borne_out)
