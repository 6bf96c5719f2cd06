"""Peak memory of estimators on a transformer, beside that of a training step; run in a process of its own.

Prints megabytes of the whole process: what is allowed (a training step times 1.3 and eight copies of the parameters),
and what each estimator took.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from phasewatch import Objective
from phasewatch.estimators import BehavioralCoefficient, Estimator, HessianSpectrum, ProbeLoss, SymmetryLedger
from phasewatch.objective.memory import give_back

WORDS, WIDTH, DEPTH, LENGTH, BATCH, BATCHES = 96, 128, 3, 128, 16, 3


class Transformer(nn.Module):
    """Some 600 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(tokens))).flatten(0, 1)


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1].flatten())


def peak_begins_anew() -> None:
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = Transformer()
    batches = [tuple(torch.randint(WORDS, (BATCH, LENGTH)) for _ in range(2)) for _ in range(BATCHES)]
    optimizer = torch.optim.AdamW(module.parameters())
    peak_begins_anew()
    loss_fn(module, batches[0]).backward()
    optimizer.step()
    size = sum(p.numel() for p in module.parameters())
    print("allowed", 1.3 * peak() + 8 * 4 * size / 1e6)
    optimizer.zero_grad()
    objective = Objective(module, batches, loss_fn=loss_fn)
    estimators: list[Estimator] = [
        ProbeLoss(),
        HessianSpectrum(),
        SymmetryLedger(),
        BehavioralCoefficient(sampled="none"),
    ]
    for estimator in estimators:
        peak_begins_anew()
        estimator.read(objective, 10_000, 0)
        print(estimator.name, peak())


if __name__ == "__main__":
    main()
