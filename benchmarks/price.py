"""What a measurement costs, part by part, in gradients of the training batch, and the memory that it takes.

Networks of the reference runs are trained, and at an early and a late step everything is measured that a watch measures
by default, on the probe that the callbacks would draw: 512 samples, as one batch where the network is small, else in
batches of the training size. One gradient (forward and backward pass of the module in training mode, nothing else) is
timed before and after each estimator, in the same process and on one thread, in processor time, which other processes
hardly lengthen. Each checkpoint has a process of its own, whose peak memory is read off the operating system (Linux).
Prints the table and writes benchmarks/results/price.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # what PyTorch imports with the first product is paid once a process
from reference_runs import Checkpoint, convnet_run, count_samples, demo_run, transformer_run

from phasewatch import Objective
from phasewatch.estimators import Estimator, ProbeLoss, behavioral, zeros
from phasewatch.watch import DEFAULT_ESTIMATORS

RESULTS = Path(__file__).parent / "results" / "price.md"
SAMPLES = 512
Row = dict[str, Any]

NETWORKS: dict[str, tuple[Callable[[], Iterator[Checkpoint]], tuple[int, int], int, bool]] = {
    "MLP (demo)": (demo_run, (500, 4_000), 64, True),
    "convnet": (convnet_run, (30, 600), 64, False),
    "transformer": (transformer_run, (30, 200), 16, False),
}
"""The run, an early and a late step, the training batch, and whether the probe is one batch."""

PARTS = (
    (behavioral, "estimate_behavioral_llc", "λ"),
    (behavioral, "prior_spread", "prior spread"),
    (behavioral, "effective_rank", "effective ranks"),
    (zeros, "explain_zeros", "ledger"),
    (zeros, "hessian_spectrum", "nullity of the Gauss-Newton matrix"),
)
"""Functions whose time within an estimator is listed by itself."""

SPEED = {"MLP (demo)": 200, "convnet": 20, "transformer": 4}
"""Gradients timed before and after each estimator."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", nargs="*", help="names of the estimators to be measured; default all")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.checkpoint:
        print(json.dumps(price(torch.load(arguments.checkpoint, weights_only=False), arguments.only)))
        return
    rows = []
    for network in arguments.networks:
        run, steps, batch, together = NETWORKS[network]
        for checkpoint in run():
            if checkpoint.step in steps:
                rows.append(in_a_process_of_its_own(network, checkpoint, batch, together, arguments.only))
                print(table([rows[-1]]), flush=True)
    if arguments.only is None and arguments.networks == list(NETWORKS):
        RESULTS.write_text(report(rows))


def in_a_process_of_its_own(
    network: str, checkpoint: Checkpoint, batch: int, together: bool, only: list[str] | None
) -> Row:
    """Memory that an earlier checkpoint has taken from the system is not given back."""
    path = RESULTS.parent / "checkpoint.tmp"
    torch.save([network, checkpoint, batch, together], path)
    try:
        command = [sys.executable, __file__, "--checkpoint", str(path), *(["--only", *only] if only else [])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        path.unlink()
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def price(saved: list[Any], only: list[str] | None) -> Row:
    """Of one checkpoint: gradients by estimator and part, and peak memory of each beside that of training."""
    network, checkpoint, batch, together = saved
    module, training = checkpoint.module, checkpoint.training
    first = tuple(part[:SAMPLES] for part in training)
    probe = [first] if together else [tuple(p[i : i + batch] for p in first) for i in range(0, SAMPLES, batch)]

    def gradient() -> float:
        times = []
        for _ in range(SPEED[network]):
            began = time.process_time()
            module.zero_grad()
            checkpoint.loss_fn(module, tuple(part[:batch] for part in training)).backward()
            times.append(time.process_time() - began)
        module.zero_grad()
        return statistics.median(times)

    # In training mode buffers move; what is measured is the network as it was saved.
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def unit() -> float:
        module.train()
        found = gradient()
        module.load_state_dict(state)
        module.eval()
        return found

    reset_peak()
    optimizer = torch.optim.Adam(module.parameters())
    optimizer.zero_grad()
    unit()
    row: Row = {"network": network, "step": checkpoint.step, "training MB": peak(), "gradients": {}, "MB": {}}
    row["parameters"] = sum(p.numel() for p in module.parameters())
    row["allowed MB"] = 1.3 * row["training MB"] + 8 * 4 * row["parameters"] / 1e6
    objective: Objective | None = None

    def cost(name: str, work: Callable[[], Any]) -> Any:
        before = unit()
        reset_peak()
        with parts() as spent:
            began = time.process_time()
            found = work()
            seconds = time.process_time() - began
        row["MB"][name] = peak()
        one = (before + unit()) / 2
        row.setdefault("unit ms", []).append(1e3 * one)
        row["gradients"][name] = seconds / one
        for part, own in spent.items():
            row["gradients"][f"{name}: {part}"] = own / one
        return found

    warm(checkpoint)
    objective = cost("set-up", lambda: Objective(module, probe, loss_fn=checkpoint.loss_fn))
    estimators: list[Estimator] = [ProbeLoss(), *DEFAULT_ESTIMATORS]
    for estimator in estimators:
        if only is None or estimator.name in only:
            cost(estimator.name, lambda e=estimator: e.read(objective, count_samples(training), 0))
    return row


def warm(checkpoint: Checkpoint) -> None:
    """What PyTorch compiles with the first forward-mode derivative is paid once a process."""
    few = tuple(part[:2] for part in checkpoint.training)
    objective = Objective(checkpoint.module, [few], loss_fn=checkpoint.loss_fn)
    with suppress(Exception):
        objective.output_tangents(torch.ones_like(objective.parameters), 0)


@contextmanager
def parts() -> Iterator[dict[str, float]]:
    """Seconds spent in the functions of ``PARTS``."""
    spent: dict[str, float] = defaultdict(float)
    originals = [getattr(module, name) for module, name, _ in PARTS]

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - began

        return call

    try:
        for (module, name, part), original in zip(PARTS, originals, strict=True):
            setattr(module, name, timed(original, part))
        yield spent
    finally:
        for (module, name, _), original in zip(PARTS, originals, strict=True):
            setattr(module, name, original)


def reset_peak() -> None:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Largest resident memory of the process since then, in MB."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        unit = statistics.median(row["unit ms"])
        lines.append(
            f"### {row['network']}, {row['parameters']:,} parameters, step {row['step']:,}\n\n"
            f"One gradient takes {unit:.3g} ms, training {row['training MB']:.0f} MB; 1.3 times that and eight copies "
            f"of the parameters are {row['allowed MB']:.0f} MB.\n\n| part | gradients | peak MB |\n|---|---|---|"
        )
        for name, gradients in row["gradients"].items():
            inner = ": " in name
            label = f"&nbsp;&nbsp;{name.split(': ')[1]}" if inner else f"**{name}**"
            memory = "" if inner else f"{row['MB'][name]:.0f}"
            lines.append(f"| {label} | {gradients:,.0f} | {memory} |")
        whole = sum(gradients for name, gradients in row["gradients"].items() if ": " not in name)
        lines.append(f"| **all** | {whole:,.0f} | {max(row['MB'].values()):.0f} |\n")
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    return (
        "# What a measurement costs\n\n"
        "Made by `make bench-price`. A part below a bold line is in it. The unit is one gradient of the training "
        "batch, timed beside each part on one thread, in processor time.\n"
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
