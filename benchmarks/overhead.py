"""What the signals at every step cost, as a share of the bare training step beside them.

Plain loops train in turns of two hundred steps, with and without ``watch.observe`` at every step, so that whatever else
the machine does falls on both; the share is that of the sums of processor time. Beside it stands what the observer
counts of itself by the clock, which is what it keeps to its one per cent by. In Lightning, where one run cannot do
without its callback for a while, the time spent in the callback's hooks is set beside that of the whole fit. No
measurement is made. One thread.
Prints the table and writes benchmarks/results/overhead.md.
"""

from __future__ import annotations

import argparse
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from phasewatch import Watch
from phasewatch.callbacks import HessianMonitor
from phasewatch.callbacks.observing import TrainingSignals

RESULTS = Path(__file__).parent / "results" / "overhead.md"
TURN = 200
Row = dict[str, Any]

NETWORKS: dict[str, tuple[tuple[int, ...], int]] = {
    "MLP (demo)": ((64, 16, 16, 10), 64),
    "bare loop of 2 ms steps": ((64, 256, 256, 10), 192),
}
"""Widths and batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="steps of each plain loop and of the fit")
    parser.add_argument("--no-results", action="store_true", help="print only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [plain_loop(name, *network, given.steps) for name, network in NETWORKS.items()]
    rows.append(lightning(given.steps))
    text = report(rows, given.steps)
    print(text)
    if not given.no_results:
        RESULTS.write_text(text)


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def plain_loop(name: str, widths: tuple[int, ...], batch: int, steps: int) -> Row:
    module = mlp(widths)
    optimizer = torch.optim.Adam(module.parameters())
    inputs, labels = torch.randn(4096, widths[0]), torch.randint(widths[-1], (4096,))
    spent = {True: 0.0, False: 0.0}
    with tempfile.TemporaryDirectory() as directory:
        watch = Watch(
            module,
            [(inputs[:64], labels[:64])],
            loss_fn=cross_entropy,
            estimators=(),
            schedule=[10**9],
            directory=directory,
        )
        for step in range(2 * steps):
            observes = step // TURN % 2 == 1
            began, by_the_clock = time.process_time(), time.perf_counter()
            first = step * batch % (4096 - batch)
            optimizer.zero_grad()
            loss = cross_entropy(module, (inputs[first : first + batch], labels[first : first + batch]))
            loss.backward()
            if observes:
                watch.observe(step, optimizer, loss=loss)
            optimizer.step()
            spent[observes] += time.process_time() - began
            if not observes:  # as if it had been a measurement: no time of the run that is watched
                watch.clock.measuring_seconds += time.perf_counter() - by_the_clock
        watch.close()
        size = sum(len(line.encoded()) for line in watch._journal.lines if line.kind == "observed")
        counted = watch.observer.seconds / watch.observer.training_seconds
    return {
        "name": name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "step ms": 1e3 * spent[False] / steps,
        "share": spent[True] / spent[False] - 1,
        "counted": counted,
        "interval": watch.observer.interval,
        "MB": size / steps,
    }


class Digits(pl.LightningModule):
    """The network of the demo."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp((64, 16, 16, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net, batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lightning(steps: int) -> Row:
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    in_hooks = [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.process_time()
            try:
                return method(*arguments)
            finally:
                in_hooks[0] += time.process_time() - began

        return call

    for hook in ("batch_starts", "backward_starts", "optimizer_steps", "batch_ends"):
        setattr(TrainingSignals, hook, timed(getattr(TrainingSignals, hook)))
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4096, 64), torch.randint(10, (4096,)))
    with tempfile.TemporaryDirectory() as directory:
        callback = HessianMonitor(schedule=[10**9], directory=directory)
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began = time.process_time()
        trainer.fit(Digits(), DataLoader(data, 64, shuffle=True))
        whole = time.process_time() - began - in_hooks[0]
        watch = callback.watch
        assert watch is not None
        size = sum(len(line.encoded()) for line in watch._journal.lines if line.kind == "observed")
    return {
        "name": "MLP (demo) in Lightning",
        "parameters": sum(p.numel() for p in watch.module.parameters()),
        "step ms": 1e3 * whole / steps,
        "share": in_hooks[0] / whole,
        "counted": watch.observer.seconds / watch.observer.training_seconds,
        "interval": watch.observer.interval,
        "MB": size / steps,
    }


def report(rows: list[Row], steps: int) -> str:
    head = "| training | parameters | bare step | share taken | as counted | norms every | MB a million steps |"
    lines = [
        f"| {row['name']} | {row['parameters']:,} | {row['step ms']:.2f} ms | {row['share']:.2%} "
        f"| {row['counted']:.2%} | {row['interval']:,} steps | {row['MB']:.1f} |"
        for row in rows
    ]
    table = "\n".join([head, "|---|---|---|---|---|---|---|", *lines])
    return (
        "# What the signals at every step cost\n\n"
        f"Made by `make bench-overhead`: {steps:,} steps with them and, in plain loops, as many without in turns of "
        f"{TURN}, in processor time on one thread.\n"
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
