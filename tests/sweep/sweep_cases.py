"""A run of a tiny network in a plain loop, watched, with a checkpoint at every step that is measured."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phasewatch import Watch
from phasewatch.estimators import HessianSpectrum, Reading
from phasewatch.objective import Objective
from phasewatch.record import Estimate, Measurement, Run

STEPS = (0, 4, 8, 16, 100)


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(10, 3, generator=generator), torch.randn(10, 1, generator=generator)) for _ in range(2)]


def build() -> Watch:
    """As a user writes it: weights of its own, which are none of the run's."""
    return Watch(network(), batches(), loss_fn=squared_error, n=500, estimators=[HessianSpectrum(2)], seed=3)


def plain_build() -> Any:
    """The three alone; a linear layer, so that all that is measured by default is quick."""
    return nn.Linear(3, 1), batches(), squared_error


class Slow:
    """An estimator that takes long enough for other processes to begin."""

    name = "slow"

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        time.sleep(2.0)
        return Reading({"slow": Estimate(1.0)})


def unseeded_build() -> Watch:
    probe = [(torch.randn(10, 3), torch.randn(10, 1))]
    return Watch(nn.Linear(3, 1), probe, loss_fn=squared_error, estimators=[Slow()])


FATAL = 77.0
"""Weights that end the process which evaluates them, as a lack of memory does."""


def fatal_build() -> Watch:
    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if (next(module.parameters()) == FATAL).all():
            os.kill(os.getpid(), signal.SIGKILL)
        return squared_error(module, batch)

    return Watch(network(), batches(), loss_fn=loss_fn, n=500, estimators=[HessianSpectrum(2)], seed=3)


def failing_build() -> Any:
    raise KeyError("data.csv")


def trained(folder: Path, steps: Collection[int] = STEPS) -> Run:
    """Train, watched, and save the weights of each measured step."""
    torch.manual_seed(1)
    watch = build()
    module = watch.module
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(max(steps) + 1):
        if step in steps:
            torch.save(module.state_dict(), folder / f"model-{step}.pt")
            watch.measure(step)
        optimizer.zero_grad()
        squared_error(module, batches()[step % 2]).backward()
        optimizer.step()
    watch.close()
    return watch.run


def what_was_found(run: Run) -> list[Measurement]:
    """The measurements without what the clock says of them."""
    return [
        Measurement(
            m.step,
            {name: estimate for name, estimate in m.estimates.items() if name != "overhead"},
            m.histograms,
            sample_losses=m.sample_losses,
        )
        for m in run.measurements
    ]
