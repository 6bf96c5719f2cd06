"""What a measurement costs, part by part, in gradients of the training batch, and the memory that it takes.

Networks of the reference runs are trained, and at an early and a late step everything is measured that a watch measures
by default, on the probe that the callbacks would draw: 512 samples, as one batch where the network is small, else in
batches of the training size. A transformer of ten million parameters is measured after a few steps, without what no run
of it pays for, whose price is predicted. One gradient (forward and backward pass of the module in training mode,
nothing else) is timed before and after each estimator, in the same process and on one thread, in processor time, which
other processes hardly lengthen. Each checkpoint has a process of its own, whose peak memory is read off the operating
system (Linux). Prints the table; each row goes to benchmarks/results/price.json when it is there, and all rows of it to
price.md.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # what PyTorch imports with the first product is paid once a process
from reference_runs import (
    Checkpoint,
    Transformer,
    characters,
    convnet_run,
    count_samples,
    demo_run,
    token_cross_entropy,
    train,
    transformer_run,
)

from phasewatch import Objective
from phasewatch.estimators import Estimator, LearningCoefficient, ProbeLoss, behavioral, zeros
from phasewatch.objective.memory import give_back
from phasewatch.price import COARSE_CHAINS, FINE_CHAINS, Pace, predicted, size_of, without
from phasewatch.watch import DEFAULT_ESTIMATORS

RESULTS = Path(__file__).parent / "results" / "price.md"
ROWS = RESULTS.with_suffix(".json")
SAMPLES = 512
Row = dict[str, Any]


def large_transformer_run() -> Iterator[Checkpoint]:
    """Ten million parameters on the characters of the other transformer, after a few steps."""
    training, held_out = characters()
    torch.manual_seed(0)
    module = Transformer(width=320, depth=8)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step, network in train(module, training, token_cross_entropy, optimizer, (10,), 16, seed=0):
        yield Checkpoint(LARGE, step, network, token_cross_entropy, training, training, held_out)


@dataclass(frozen=True)
class Case:
    """A network whose measurements are priced.

    Attributes:
        run: Trains it.
        steps: At which it is measured.
        batch: Samples of a training batch.
        asked: Gradients of the training batch that a measurement may take.
        together: Whether the probe is one batch.
        left_out: Parts that are predicted and not measured.
    """

    run: Callable[[], Iterator[Checkpoint]]
    steps: tuple[int, ...]
    batch: int
    asked: int
    together: bool = False
    left_out: tuple[str, ...] = ()


LARGE = "transformer of 10 million"
NETWORKS = {
    "MLP (demo)": Case(demo_run, (500, 4_000), 64, 1_200, together=True),
    "convnet": Case(convnet_run, (30, 600), 64, 700),
    "transformer": Case(transformer_run, (30, 200), 16, 700),
    LARGE: Case(
        large_transformer_run, (10,), 16, 500, left_out=(LearningCoefficient().name, COARSE_CHAINS, FINE_CHAINS)
    ),
}

PARTS = (
    (behavioral, "estimate_behavioral_llc", "λ"),
    (behavioral, "prior_spread", "prior spread"),
    (behavioral, "effective_rank", "effective ranks"),
    (zeros, "explain_zeros", "ledger"),
    (zeros, "hessian_spectrum", "nullity of the Gauss-Newton matrix"),
)
"""Functions whose time within an estimator is listed by itself."""

TIMED = 0.5
"""Seconds for which gradients are timed before and after each estimator, two of them at least."""
OPTIMIZER = 2
"""Copies of the parameters that Adam keeps, on paper."""


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
    for network in arguments.networks:
        for checkpoint in NETWORKS[network].run():
            if checkpoint.step in NETWORKS[network].steps:
                row = in_a_process_of_its_own(network, checkpoint, arguments.only)
                print(table([row]), flush=True)
                if arguments.only is None:
                    keep(row)


def keep(row: Row) -> None:
    """In the place of an earlier one of the same network and step; what a longer run has found stays if it is ended."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    found = {(r["network"], r["step"]): r for r in [*rows, row]}
    order = list(NETWORKS)
    rows = sorted(found.values(), key=lambda r: (order.index(r["network"]), r["step"]))
    ROWS.write_text(json.dumps(rows, indent=1) + "\n")
    RESULTS.write_text(report(rows))


def in_a_process_of_its_own(network: str, checkpoint: Checkpoint, only: list[str] | None) -> Row:
    """Memory that an earlier checkpoint has taken from the system is not given back."""
    path = RESULTS.parent / "checkpoint.tmp"
    torch.save([network, checkpoint], path)
    try:
        command = [sys.executable, __file__, "--checkpoint", str(path), *(["--only", *only] if only else [])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        path.unlink()
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def price(saved: list[Any], only: list[str] | None) -> Row:
    """Of one checkpoint: gradients by estimator and part, and peak memory of each beside that of training."""
    network, checkpoint = saved
    case, batch = NETWORKS[network], NETWORKS[network].batch
    module, training = checkpoint.module, checkpoint.training
    first = tuple(part[:SAMPLES] for part in training)
    probe = [first] if case.together else [tuple(p[i : i + batch] for p in first) for i in range(0, SAMPLES, batch)]

    def gradient() -> float:
        times: list[float] = []
        while len(times) < 2 or sum(times) < TIMED:
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

    def step() -> None:
        checkpoint.loss_fn(module, tuple(part[:batch] for part in training)).backward()
        optimizer.step()
        optimizer.zero_grad()

    # What PyTorch loads for an optimizer is there in every training, and the optimizer's state from the first step on.
    optimizer = torch.optim.Adam(module.parameters())
    module.train()
    step()
    reset_peak()
    resident = peak()
    step()
    unit()
    row: Row = {"network": network, "step": checkpoint.step, "training MB": peak(), "gradients": {}, "MB": {}}
    row["resident MB"] = resident
    row["parameters"] = sum(p.numel() for p in module.parameters())
    row["tokens"] = count_samples(tuple(part[:batch] for part in training))
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
        if estimator.name not in case.left_out and (only is None or estimator.name in only):
            seen = without(estimator, case.left_out)
            cost(estimator.name, lambda e=seen: e.read(objective, count_samples(training), 0))
    row["predicted"] = {}
    if case.left_out:
        size = size_of(objective, len(probe))
        pace = Pace.of(objective.first_batches(1), size, chains=True)
        seconds = predicted(estimators, size, pace)
        row["predicted"] = {name: seconds[name] / pace.gradient for name in case.left_out}
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
    give_back()
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
            f"One gradient takes {unit:.3g} ms, training {row['training MB']:.0f} MB.\n\n"
            "| part | gradients | peak MB |\n|---|---|---|"
        )
        for name, gradients in row["gradients"].items():
            inner = ": " in name
            label = f"&nbsp;&nbsp;{name.split(': ')[1]}" if inner else f"**{name}**"
            memory = "" if inner else f"{row['MB'][name]:.0f}"
            lines.append(f"| {label} | {gradients:,.0f} | {memory} |")
        lines.append(f"| **all** | {whole(row):,.0f} | {max(row['MB'].values()):.0f} |")
        lines.append(f"| asked | {NETWORKS[row['network']].asked:,} | {row['allowed MB']:.0f} |")
        lines += [f"| not measured, predicted: {name} | {g:,.0f} | |" for name, g in row["predicted"].items()]
        lines.append("")
    return "\n".join(lines)


def whole(row: Row) -> float:
    """Gradients of all that was measured."""
    return float(sum(gradients for name, gradients in row["gradients"].items() if ": " not in name))


def summary(rows: list[Row]) -> str:
    lines = [
        "| network | step | gradients | asked | peak MB | allowed MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = f"{whole(row):,.0f}" + (" *" if row["predicted"] else "")
        lines.append(
            f"| {row['network']} | {row['step']:,} | {measured} | {NETWORKS[row['network']].asked:,} | "
            f"{max(row['MB'].values()):.0f} | {row['allowed MB']:.0f} |"
        )
    return "\n".join([*lines, "", "\\* without the parts that were predicted and not measured", ""])


PARAMETERS, SEQUENCES, LENGTH, DEVICES = 1.0e9, 16, 2048, 8
"""The model on paper, its training batch and its devices."""
FLOPS, USED = 495e12, 0.4
"""Multiplications and additions a second of an H100 with TF32 (NVIDIA's data sheet, without sparsity), and the share of
them that training reaches in practice."""
DEVICE_MEMORY = 80e9
"""Bytes of one of them."""


def on_paper(row: Row) -> str:
    """What a model of a billion parameters would take, from the measured row of ten million."""
    tokens = SEQUENCES * LENGTH
    gradient = 6 * PARAMETERS * tokens / (DEVICES * USED * FLOPS)
    chains = row["predicted"][COARSE_CHAINS] + row["predicted"][FINE_CHAINS]
    copies = (max(row["MB"].values()) - row["resident MB"]) / (4e-6 * row["parameters"])
    resident = 4 * (2 + OPTIMIZER) * PARAMETERS
    return f"""## On paper: a billion parameters on {DEVICES} devices

With {SEQUENCES} x {LENGTH:,} tokens a step, six operations a parameter and token, and {USED:.0%} of {FLOPS / 1e12:.0f}
TFLOPS on each of {DEVICES} devices, a gradient takes {gradient:.2g} s. Were everything shared out over the devices as
training is, a measurement would take, at the gradients measured on {row["parameters"] / 1e6:.0f} million parameters,

- {whole(row):,.0f} gradients, {whole(row) * gradient:,.0f} s, for all but the chains of λ;
- {chains:,.0f} gradients, {chains * gradient / 60:,.0f} min, for these (predicted): so many steps of training.

Its parameters, gradients and Adam's state take {resident / 1e9:.0f} GB in float32. The largest part of a measurement
took the memory of {copies:.0f} vectors of parameters here, activations among it, beside parameters and Adam's state:
{4 * copies * PARAMETERS / 1e9:.0f} GB there. {DEVICES} devices have {DEVICES * DEVICE_MEMORY / 1e9:.0f} GB, one of them
{DEVICE_MEMORY / 1e9:.0f} GB. What stands in the way:

- Sharded parameters (FSDP, DeepSpeed) are refused. The parameters are one flat vector on one device, and so is each
  vector of a Lanczos basis; both can be cut into pieces, as all that is done with them are products, sums and inner
  products.
- Second derivatives of attention go through PyTorch's math kernel, which writes all weights of attention out; at
  {LENGTH:,} positions that is {LENGTH**2 * 4 / 1e6:.0f} MB for each head and sequence. Gauss-Newton products in forward
  mode have the same limit.
- Zeros are explained up to a million parameters; beyond, they are bracketed.
- Chains of λ need hundreds of moves each, one after another: more devices make a move faster, not their number less.
- Everything is computed in float32. In bfloat16 differences of losses of .003 nats are lost.
"""


def report(rows: list[Row]) -> str:
    return (
        "# What a measurement costs\n\n"
        "Made by `make bench-price`. A part below a bold line is in it. The unit is one gradient of the training "
        "batch, timed beside each part on one thread, in processor time.\n"
        "Allowed are 1.3 times the memory of a training step and eight copies of the parameters.\n"
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}.\n\n"
        f"{summary(rows)}\n{table(rows)}" + "".join(f"\n{on_paper(row)}" for row in rows if row["network"] == LARGE)
    )


if __name__ == "__main__":
    main()
