"""What the signals at every step cost, as a share of the bare training step beside them.

Plain loops train in turns, with and without ``watch.at`` and ``watch.observe`` at every step, so that whatever else the
machine does falls on both. The share taken is the processor time in these calls over that of the bare steps, and of it
what goes into calls that have nothing to do, into losses and learning rates, and into the norms; beside it stands by
how much the steps with them are longer, which has the wear of the caches in it and is known to within its standard
error. What the observer counts of itself is what it keeps to its one per cent by. In Lightning, where one run cannot do
without its callback for a while, the time spent in the callback's hooks is set beside that of the whole fit. No
measurement is made. One thread; each row in a process of its own, whose peak of memory is told.
Prints the table and writes benchmarks/results/overhead.md.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from reference_runs import Transformer, token_cross_entropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from phasewatch import Watch
from phasewatch.callbacks import HessianMonitor
from phasewatch.callbacks.observing import TrainingSignals
from phasewatch.measuring_time import measuring
from phasewatch.observer import SHARE
from phasewatch.updates import UpdateReader

RESULTS = Path(__file__).parent / "results" / "overhead.md"
WHY = """\
Where it is more than 1 %: training leaves nothing of this in the caches of the processor, so that a call that returns \
at once takes microseconds (asking), and taking a loss and a learning rate tens of them, the more the larger what a \
step goes through is. Losses are read at every second, fifth ... step where that is too dear, but not more rarely than \
`schedule="auto"` looks at them, which must not depend on how fast a machine is: at 37 % of the steps of a run of \
10,000, 20 % of 40,000, 13 % of 100,000 (`phasewatch.activity.looked_at`). A first read of the norms also loads what \
it calls: 5 to 20 ms, and more where memory is short; it counts, and later reads wait for it.
"""
TURNS = 25
"""Of each kind."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """What is trained in a plain loop.

    Attributes:
        make: Its network.
        loss_fn: Its loss.
        inputs: The shape of one sample; whole numbers below 96 where there is one length alone.
        labels: The shape of the labels of a sample.
        batch: Samples.
        share: Of the steps asked for, so many are made.
    """

    make: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    inputs: tuple[int, ...]
    labels: tuple[int, ...]
    batch: int
    share: float = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="steps with signals of each row that is quick")
    parser.add_argument("--no-results", action="store_true", help="print only")
    given = parser.parse_args()
    rows, load = [], [os.getloadavg()[0]]
    for name in (*TRAININGS, LIGHTNING):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(row, name, given.steps).result())
        load.append(os.getloadavg()[0])
    text = report(rows, load)
    print(text)
    if not given.no_results:
        RESULTS.write_text(text)


def row(name: str, steps: int) -> Row:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = lightning(steps) if name == LIGHTNING else plain_loop(TRAININGS[name], steps)
    return found | {"name": name, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    """That of the reference run on Fashion-MNIST."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


LIGHTNING = "MLP (demo) in Lightning"
TRAININGS: dict[str, Training] = {
    "MLP (demo)": Training(lambda: mlp(64, 16, 16, 10), cross_entropy, (64,), (), 64),
    "bare loop of 2 ms steps": Training(lambda: mlp(64, 256, 256, 10), cross_entropy, (64,), (), 192, 0.5),
    "convnet": Training(convnet, cross_entropy, (1, 28, 28), (), 64, 0.2),
    "transformer": Training(Transformer, token_cross_entropy, (128,), (128,), 16, 0.01),
}


def resident() -> float:
    """Memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def plain_loop(training: Training, steps: int) -> Row:
    module = training.make()
    optimizer = torch.optim.Adam(module.parameters())
    samples = 8 * training.batch
    tokens = training.loss_fn is token_cross_entropy
    inputs = torch.randint(96, (samples, *training.inputs)) if tokens else torch.randn(samples, *training.inputs)
    labels = torch.randint(96 if tokens else 10, (samples, *training.labels))
    steps = max(round(steps * training.share), 2 * TURNS)
    turn = steps // TURNS
    in_norms = [0.0]
    UpdateReader.read = timed(UpdateReader.read, in_norms)  # type: ignore[method-assign]
    spent, asking, taking, empty, resident_early = [0.0], 0.0, 0.0, _seconds_of_timing(time.thread_time), 0.0
    with tempfile.TemporaryDirectory() as directory:
        watch = Watch(
            module,
            [(inputs[:8], labels[:8])],
            loss_fn=training.loss_fn,
            estimators=(),
            schedule=[10**9],
            directory=directory,
        )
        observed = 0
        for step in range(2 * turn * TURNS):
            observes = step // turn % 2 == 1
            if step % turn == 0:
                spent.append(0.0)
            if step == 2 * turn * TURNS // 10:
                resident_early = resident()
            # what is not observed is as if it had been a measurement: no time of the run that is watched
            with nullcontext() if observes else measuring():
                began = time.process_time()
                rows = slice(step * training.batch % samples, step * training.batch % samples + training.batch)
                if observes:
                    called = time.thread_time()
                    watch.at(step)
                    asking += time.thread_time() - called - empty
                optimizer.zero_grad()
                loss = training.loss_fn(module, (inputs[rows], labels[rows]))
                loss.backward()
                if observes:
                    taken = watch.observer.steps_taken
                    called = time.thread_time()
                    watch.observe(observed, optimizer, loss=loss)
                    inside = time.thread_time() - called - empty
                    if watch.observer.steps_taken > taken:
                        taking += inside
                    else:
                        asking += inside
                    observed += 1
                optimizer.step()
                spent[-1] += time.process_time() - began
        grown = resident() - resident_early
        watch.close()
        size = sum(len(line.encoded()) for line in watch._journal.lines if line.kind == "observed")
    without, with_signals = spent[1::2], spent[2::2]
    longer = [a / b - 1 for a, b in zip(with_signals, without, strict=True)]
    bare, reading = sum(without), in_norms[0]
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "steps": observed,
        "step ms": 1e3 * bare / observed,
        "share": (asking + taking) / bare,
        "parts": f"{asking / bare:.2%} + {(taking - reading) / bare:.2%} + {reading / bare:.2%}",
        "longer": f"{statistics.median(longer):+.1%} ± {1.25 * statistics.stdev(longer) / TURNS**0.5:.1%}",
        "counted": watch.observer.seconds / watch.observer.training_seconds,
        "kept": watch.observer.steps_taken,
        "interval": watch.observer.interval,
        "MB": size / observed,
        "grown": grown,
    }


def _seconds_of_timing(clock: Callable[[], float]) -> float:
    """What a pair of readings of the clock shows where nothing is between them."""
    pairs = [-clock() + clock() for _ in range(10_000)]
    return statistics.median(pairs)


def timed(method: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    """A method whose processor time is added to a total."""
    empty = _seconds_of_timing(time.thread_time)

    def call(*arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return method(*arguments)
        finally:
            total[0] += time.thread_time() - began - empty

    return call


class Digits(pl.LightningModule):
    """The network of the demo."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 16, 16, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net, batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Resident(pl.Callback):
    """Notes how much memory is taken after a tenth of the steps."""

    def __init__(self, step: int) -> None:
        self.step, self.early = step, 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.early = resident()


def lightning(steps: int) -> Row:
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    in_hooks = [0.0]
    for hook in ("batch_starts", "backward_starts", "optimizer_steps", "batch_ends"):
        setattr(TrainingSignals, hook, timed(getattr(TrainingSignals, hook), in_hooks))
    data = TensorDataset(torch.randn(4096, 64), torch.randint(10, (4096,)))
    memory = Resident(steps // 10)
    with tempfile.TemporaryDirectory() as directory:
        callback = HessianMonitor(schedule=[10**9], directory=directory)
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            callbacks=[callback, memory],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began = time.thread_time()
        trainer.fit(Digits(), DataLoader(data, 64, shuffle=True))
        whole = time.thread_time() - began - in_hooks[0]
        grown = resident() - memory.early
        watch = callback.watch
        assert watch is not None
        size = sum(len(line.encoded()) for line in watch._journal.lines if line.kind == "observed")
    return {
        "parameters": sum(p.numel() for p in watch.module.parameters()),
        "steps": steps,
        "step ms": 1e3 * whole / steps,
        "share": in_hooks[0] / whole,
        "parts": "",
        "longer": "",
        "counted": watch.observer.seconds / watch.observer.training_seconds,
        "kept": watch.observer.steps_taken,
        "interval": watch.observer.interval,
        "MB": size / steps,
        "grown": grown,
    }


def report(rows: list[Row], load: list[float]) -> str:
    head = (
        "| training | parameters | steps | bare step | share taken | asking + losses + norms | step longer by "
        "| as counted | losses kept | norms every | MB a million steps | peak memory | grown over the last 90 % |"
    )
    lines = [
        f"| {row['name']} | {row['parameters']:,} | {row['steps']:,} | {row['step ms']:.2f} ms | {row['share']:.2%} "
        f"| {row['parts']} | {row['longer']} | {row['counted']:.2%} | {row['kept']:,} | {row['interval']:,} "
        f"| {row['MB']:.1f} "
        f"| {row['peak']:.0f} MiB | {row['grown']:.1f} MiB |"
        for row in rows
    ]
    table = "\n".join([head, "|" + "---|" * 13, *lines])
    beyond = [row["name"] for row in rows if row["share"] > SHARE]
    verdict = f"More than {SHARE:.0%}: {', '.join(beyond)}." if beyond else f"No row takes more than {SHARE:.0%}."
    return (
        "# What the signals at every step cost\n\n"
        f"Made by `make bench-overhead`: steps with them and, in plain loops, as many without, in {TURNS} turns of "
        "each, on one thread, of processor time. Asking is what calls take that have nothing to do.\n"
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}; {os.cpu_count()} "
        f"cores at a load of {min(load):.1f} to {max(load):.1f}.\n\n{table}\n\n{verdict} {WHY}"
    )


if __name__ == "__main__":
    main()
