"""Learning coefficients against exact answers and peers, and what they cost, all measured in one process.

Prints its tables and draws a figure: the estimates of phasewatch (no argument given), of devinterp with its defaults
and with the step size that comes nearest to the known answer (nobody has that knowledge in practice), and of
canonical-interp; how many gradients reach 5 %; the time that each takes for a gradient, in units of the bare one; the
peak memory beside that of a training step; and what other values of the samplers' constants would do. Writes them to
benchmarks/results/ and docs/. Peers are used where they are installed: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

# Before torch is loaded: else a second run of this file would find everything compiled.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
import sensitivity
import torch
from cases import (
    cross_entropy,
    deep_linear_network,
    half_squared_error,
    linear_network,
    local_reduced_rank,
    logistic_regression,
    monomial,
    monomial_expectation,
    noisy_bottleneck,
    noisy_regression,
    two_linear_layers,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import phasewatch

ROOT = Path(__file__).parents[1]

SAMPLES, BATCH = 10_000, 500
NBETA = SAMPLES / math.log(SAMPLES)
LISTED = [
    ([8, 8], 8),
    ([5, 3, 5], 2),
    ([8, 4, 8], 2),
    ([6, 6, 6], 0),
    ([6, 6, 6, 6], 2),
    ([10, 8, 6, 10], 3),
    ([8] * 7, 4),
]
STEP_SIZES = (1e-5, 3e-5, 1e-4, 3e-4)
"""devinterp's lr over which the best is taken; its step is half of it."""
BUDGETS = (250, 500, 1_000, 2_000, 4_000)
PEER_BUDGETS = (250, 500, 1_000, 2_000, 4_000, 8_000)
BUDGETED = ([6, 6, 6], 0), ([7, 5, 6, 7], 3)
PEER_CHAINS, PEER_DRAWS, PEER_BURN_IN = 4, 1_500, 500
SPEED_CHAINS, SPEED_NBETA = 8, 100.0


@dataclass(frozen=True)
class Row:
    """One estimate of one tool; NaN where it gave none."""

    case: str
    fresh: bool
    exact: float
    tool: str
    estimate: float
    low: float
    high: float
    gradients_per_chain: int
    reliable: bool | None = None


@dataclass(frozen=True)
class Case:
    """An objective whose learning coefficient is known, with the known term of finite n.

    ``loss_fn`` is what the peers are given; None where they cannot take the case.
    """

    name: str
    fresh: bool
    objective: phasewatch.Objective
    exact: float
    loss_fn: Callable[..., Tensor] | None = half_squared_error


def finite(value: float, multiplicity: int) -> float:
    """With the known term of finite n."""
    return value - (multiplicity - 1) / math.log(NBETA)


def drawn_case(seed: int) -> Case:
    """One of the families with an exact answer, with drawn sizes; the seed's remainder chooses the family."""
    random = np.random.default_rng(seed)

    def draw(low: int, high: int) -> int:
        return int(random.integers(low, high + 1))

    match seed % 8:
        case 0 | 1 | 2:
            widths = [draw(3, 10) for _ in range(draw(3, 6))]
            return linear_case(widths, draw(0, min(widths) - 1), seed, fresh=True, scaled=seed % 8 == 2)
        case 3:
            hidden = draw(2, 4)
            first, last = draw(hidden + 1, 9), draw(hidden + 1, 9)
            objective = noisy_bottleneck(first, hidden, last, seed=seed)
            return Case(f"{first}-{hidden}-{last} noisy targets", True, objective, hidden * (first + last - hidden) / 2)
        case 4:
            sizes = draw(4, 7), draw(4, 6), draw(4, 7)
            ranks = draw(2, 3), draw(2, 3), 1
            value = finite(*local_reduced_rank(*sizes, *ranks))
            name = "-".join(map(str, sizes)) + " ranks " + ",".join(map(str, ranks))
            return Case(name, True, two_linear_layers(*sizes, *ranks, seed=seed), value)
        case 5:
            inputs, outputs = draw(3, 12), draw(1, 5)
            objective = noisy_regression(inputs, outputs, seed=seed)
            return Case(f"{inputs}→{outputs} noisy", True, objective, inputs * outputs / 2)
        case 6:
            inputs, classes = draw(4, 10), draw(2, 5)
            objective = logistic_regression(inputs, classes, seed=seed)
            exact = (inputs + 1) * (classes - 1) / 2
            return Case(f"{inputs}→{classes} logistic", True, objective, exact, cross_entropy)
        case _:
            exponents = (draw(1, 2), draw(1, 3))
            exact = monomial_expectation(exponents, NBETA, 0.3)
            return Case(f"w1^{2 * exponents[0]} w2^{2 * exponents[1]}", True, monomial(exponents), exact, None)


def linear_case(widths: Sequence[int], rank: int, seed: int, fresh: bool, scaled: bool = False) -> Case:
    scales = (0.4, 1.6) if scaled else (1.0, 1.0)
    objective = linear_network(widths, rank, seed=seed, samples=SAMPLES, batch_size=BATCH, input_scales=scales)
    name = "-".join(map(str, widths)) + f" r{rank}" + (" unequal inputs" if scaled else "")
    return Case(name, fresh, objective, finite(*deep_linear_network(widths, rank)))


def with_phasewatch(case: Case, seed: int) -> Row:
    estimate = phasewatch.estimate_llc(case.objective, n=SAMPLES, seed=seed)
    low, high = estimate.interval
    return Row(
        case.name,
        case.fresh,
        case.exact,
        "phasewatch",
        estimate.learning_coefficient,
        low,
        high,
        estimate.gradients // estimate.chains,
        estimate.reliable,
    )


def preloaded(batches: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    """What the peers take: the same batches, ready in memory."""
    return DataLoader(batches, batch_size=1, shuffle=True, collate_fn=lambda one: one[0])  # type: ignore[arg-type]


def devinterp_draws(
    case: Case, seed: int, lr: float | None, draws: int = PEER_DRAWS, burn_in: int = PEER_BURN_IN
) -> dict[str, Any]:
    """What its summary says."""
    from devinterp.optim import SGLD
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary

    module, loader = case.objective.module, preloaded(case.objective.batches)
    settings = {"nbeta": NBETA, "localization": 100.0} | ({"lr": lr, "localization": 1.0} if lr else {"lr": 1e-3})
    return estimate_learning_coeff_with_summary(
        module,
        loader,
        evaluate=case.loss_fn,
        sampling_method=SGLD,
        optimizer_kwargs=settings,
        num_chains=PEER_CHAINS,
        num_draws=draws,
        num_burnin_steps=burn_in,
        init_loss=float(case.objective.loss()),
        seed=seed,
        verbose=False,
    )


def with_devinterp(case: Case, seed: int) -> list[Row]:
    rows = []
    for tool, steps in (("devinterp lr 1e-3, γ 100", [None]), ("devinterp, best of 4 steps", list(STEP_SIZES))):
        found: list[tuple[float, float]] = []
        for lr in steps:
            with contextlib.suppress(RuntimeError):  # it stops at the first NaN
                result = devinterp_draws(case, seed, lr)
                found.append((float(result["llc/mean"]), float(result["llc/std"])))
        finite = [f for f in found if math.isfinite(f[0])]
        mean, spread = min(finite, key=lambda f: abs(f[0] - case.exact), default=(math.nan, math.nan))
        used = (PEER_DRAWS + PEER_BURN_IN) * len(steps)
        margin = 1.96 * spread / math.sqrt(PEER_CHAINS)
        rows.append(Row(case.name, case.fresh, case.exact, tool, mean, mean - margin, mean + margin, used))
    return rows


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(dim=-1).mean()


def with_canonical_interp(case: Case, seed: int) -> Row:
    criterion = half_square if case.loss_fn is half_squared_error else functional.cross_entropy
    value = canonical_interp(case, seed, criterion, PEER_DRAWS, PEER_BURN_IN, PEER_CHAINS)
    return Row(case.name, case.fresh, case.exact, "canonical-interp", value, value, value, PEER_DRAWS + PEER_BURN_IN)


def canonical_interp(
    case: Case, seed: int, criterion: Callable[..., Tensor], draws: int, burn_in: int, chains: int
) -> float:
    if not hasattr(itertools, "batched"):  # it is written for Python 3.12

        def batched(items: Any, size: int) -> Any:
            iterator = iter(items)
            return iter(lambda: tuple(itertools.islice(iterator, size)), ())

        itertools.batched = batched  # type: ignore[attr-defined]
    from canonical_interp.slt import LLCEstimator

    module, loader = case.objective.module, preloaded(case.objective.batches)
    torch.manual_seed(seed)
    estimator = LLCEstimator(draws, chains, burn_in, steps_bw_draws=1)
    result = estimator.estimate_llc(module, loader, criterion, compile=False, show_progress=False)
    return float(result["llc/mean"] if isinstance(result, dict) else result)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def accuracy(cases: list[Case], peers: bool) -> list[Row]:
    rows = []
    for number, case in enumerate(cases):
        rows.append(with_phasewatch(case, seed=number))
        if not (peers and case.loss_fn):
            pass
        elif installed("devinterp"):
            rows.extend(with_devinterp(case, seed=number))
        if peers and case.loss_fn and installed("canonical_interp"):
            try:
                rows.append(with_canonical_interp(case, seed=number))
            except Exception as error:
                print(f"canonical-interp: {type(error).__name__}: {error}", file=sys.stderr)
        for row in rows:
            if row.case == case.name:
                print(
                    f"  {row.case:28s} {row.tool:28s} exact {row.exact:7.2f}  estimate {row.estimate:8.2f}", flush=True
                )
    return rows


def accuracy_table(rows: list[Row]) -> str:
    lines = [
        "| case | λ with its finite-n term | tool | estimate | error | 95 % interval | holds it | gradients a chain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = f"{row.estimate / row.exact - 1:+.1%}" if math.isfinite(row.estimate) else "NaN"
        tool = row.tool + (" (flagged unreliable)" if row.reliable is False else "")
        holds = "yes" if row.low <= row.exact <= row.high else "no"
        lines.append(
            f"| {row.case}{' (fresh)' if row.fresh else ''} | {row.exact:.2f} | {tool} | {row.estimate:.2f} | {error} "
            f"| {row.low:.2f} to {row.high:.2f} | {holds} | {row.gradients_per_chain:,} |"
        )
    lines += [
        "",
        "| tool | cases | median error | worst error | NaN | flagged unreliable | interval holds λ |",
        "|---|---|---|---|---|---|---|",
    ]
    for tool in dict.fromkeys(row.tool for row in rows):
        mine = [row for row in rows if row.tool == tool]
        errors = [abs(row.estimate / row.exact - 1) for row in mine if math.isfinite(row.estimate)]
        held = sum(row.low <= row.exact <= row.high for row in mine)
        median, worst = (f"{statistics.median(errors):.1%}", f"{max(errors):.1%}") if errors else ("–", "–")
        flagged = sum(row.reliable is False for row in mine) if mine[0].reliable is not None else "–"
        lines.append(
            f"| {tool} | {len(mine)} | {median} | {worst} | {len(mine) - len(errors)} | {flagged} "
            f"| {held} of {len(mine)} |"
        )
    return "\n".join(lines)


def budget_table(cases: list[Case], seeds: Sequence[int] = range(4)) -> str:
    """Least gradients a chain, burn-in included, from which the root mean square error over seeds stays below 5 %."""
    lines = ["| case | phasewatch | devinterp, best of 4 steps | ratio |", "|---|---|---|---|"]
    for case in cases:
        ours: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
        theirs: dict[float, dict[int, list[float]]] = {lr: {b: [] for b in PEER_BUDGETS} for lr in STEP_SIZES}
        for seed in seeds:
            for budget in BUDGETS:
                estimate = phasewatch.estimate_llc(
                    case.objective, seed=seed, chains=PEER_CHAINS, burn_in=budget // 4, draws=budget - budget // 4
                )
                ours[budget].append(estimate.learning_coefficient / case.exact - 1)
            for lr in STEP_SIZES if installed("devinterp") else ():
                trace = np.full((PEER_CHAINS, PEER_BUDGETS[-1]), np.nan)
                with contextlib.suppress(RuntimeError):  # it stops at the first NaN
                    trace = devinterp_draws(case, seed, lr, PEER_BUDGETS[-1], 0)["loss/trace"]
                for budget in PEER_BUDGETS:
                    excess = trace[:, budget // 4 : budget].mean() - float(case.objective.loss())
                    theirs[lr][budget].append(NBETA * float(excess) / case.exact - 1)
        mine, best = first_below(ours), min(first_below(errors) for errors in theirs.values())
        shown = [
            f"{x:,}" if math.isfinite(x) else f"more than {most:,}"
            for x, most in ((mine, BUDGETS[-1]), (best, PEER_BUDGETS[-1]))
        ]
        ratio = f"{mine / best:.2f}" if math.isfinite(mine) and math.isfinite(best) else "–"
        lines.append(f"| {case.name} | {shown[0]} | {shown[1]} | {ratio} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def first_below(errors: dict[int, list[float]], bar: float = 0.05) -> float:
    """The least budget from which on the error stays below the bar; infinite if there is none."""
    reached = math.inf
    for budget in sorted(errors, reverse=True):
        rms = math.sqrt(statistics.fmean(error**2 for error in errors[budget]))
        if not rms <= bar:
            return reached
        reached = budget
    return reached


def figure(rows: list[Row], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    tools = list(dict.fromkeys(row.tool for row in rows))
    figure, axes = pyplot.subplots(1, len(tools), figsize=(3.6 * len(tools), 3.8), sharex=True, sharey=True)
    largest = 1.25 * max(row.exact for row in rows)
    for axis, tool in zip(np.atleast_1d(axes), tools, strict=True):
        for row in rows:
            if row.tool != tool or not math.isfinite(row.estimate):
                continue
            estimate = min(row.estimate, 2 * largest)
            error = [[max(estimate - row.low, 0)], [max(row.high - estimate, 0)]]
            axis.errorbar(
                row.exact, estimate, error, fmt="o", ms=4, capsize=2, color="tab:orange" if row.fresh else "tab:blue"
            )
        missing = sum(row.tool == tool and not math.isfinite(row.estimate) for row in rows)
        if missing:
            axis.text(0.05, 0.92, f"{missing} estimates are NaN", transform=axis.transAxes, fontsize=8)
        axis.plot([0, largest], [0, largest], color="0.6", lw=1, zorder=0)
        axis.set(title=tool, xlabel="exact λ", ylim=(0, largest), xlim=(0, largest))
        axis.title.set_fontsize(9)
    np.atleast_1d(axes)[0].set_ylabel("estimate (blue: listed, orange: drawn afresh)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


class Transformer(nn.Module):
    """A causal language model of about 0.8 M parameters."""

    def __init__(self, vocabulary: int = 96, width: int = 128, depth: int = 4, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x).flatten(0, 1)


def token_cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1].flatten())


def speed_cases() -> dict[str, tuple[nn.Module, list[tuple[Tensor, Tensor]], Callable[..., Tensor], int]]:
    """Name to network, batches, loss and number of gradients in a timed run; the MLP has been trained for a while."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    mlp = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(mlp.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in zip(x.split(64), y.split(64), strict=True):
            optimizer.zero_grad()
            cross_entropy(mlp, batch).backward()
            optimizer.step()
    linear = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    inputs = torch.randn(2_048, 16)

    def digits(size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x[:1_792].split(size), y[:1_792].split(size), strict=True))

    return {
        "MLP, digits, batches of 32": (mlp, digits(32), cross_entropy, 800),
        "MLP, digits, batches of 64": (mlp, digits(64), cross_entropy, 800),
        "MLP, digits, batches of 256": (mlp, digits(256), cross_entropy, 800),
        "deep linear network, batches of 512": (
            linear,
            [(part, linear(part).detach()) for part in inputs.split(512)],
            half_squared_error,
            800,
        ),
        "transformer, batches of 32 x 64 tokens": (*transformer_case(), token_cross_entropy, 24),
    }


def transformer_case() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    tokens = torch.randint(96, (128, 64))
    return Transformer().eval(), list(zip(tokens.split(32), tokens.roll(-1, 1).split(32), strict=True))


def best_time(call: Callable[[], Any], repeats: int = 3) -> float:
    """Least seconds of processor time, as other work on the machine counts less in it; the first call warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def wall_time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


SECTIONS = ("accuracy", "budgets", "memory", "speed", "sensitivity")
MEASUREMENTS = 20
"""Estimates with default draws over which the time of compilation is spread."""


def speed_table(network: str, kept: dict[str, str]) -> dict[str, str]:
    """Time that a chain takes for a gradient, in units of one forward and backward pass on the same batch."""
    rows = dict(kept)
    cases = {name: case for name, case in speed_cases().items() if network in name}
    for name, (module, batches, loss_fn, gradients) in cases.items():
        parameters = list(module.parameters())
        objective = phasewatch.Objective(module, batches, loss_fn=loss_fn)
        small = objective.num_parameters < 100_000
        chains, burn_in = (SPEED_CHAINS, 1_000) if small else (2, 20)
        case = Case(name, True, objective, 1.0, loss_fn)

        def bare() -> None:
            for k in range(gradients):
                torch.autograd.grad(loss_fn(module, batches[k % len(batches)]), parameters)

        def ours(draws: int, compiled: bool = False) -> Any:
            found = phasewatch.estimate_llc(
                objective, chains=chains, burn_in=burn_in, draws=draws, nbeta=SPEED_NBETA, compiled=compiled
            )
            if math.isnan(found.rhat):
                raise RuntimeError(f"Nothing was sampled on {name}, so there is no time of a draw: {found}")
            return found

        def theirs(draws: int) -> Any:
            from devinterp.optim import SGLD
            from devinterp.slt.sampler import estimate_learning_coeff_with_summary

            return estimate_learning_coeff_with_summary(
                module,
                preloaded(batches),
                evaluate=loss_fn,
                sampling_method=SGLD,
                optimizer_kwargs={"lr": 1e-6, "nbeta": SPEED_NBETA, "localization": 1.0},
                num_chains=chains,
                num_draws=draws,
                init_loss=1.0,
                verbose=False,
            )

        def canonical(draws: int) -> Any:
            return canonical_interp(case, 0, functional.cross_entropy, draws, 0, chains)

        gradient = best_time(bare) / gradients

        def draw(estimate: Callable[[int], Any], shorter: int = gradients) -> float:
            # The difference of two lengths leaves out what is done once.
            long, short = (best_time(lambda: estimate(length * shorter)) for length in (2, 1))
            return (long - short) / (shorter * chains)

        default = 2_950 if small else gradients  # whether moves see the whole probe depends on the length
        first, second = (wall_time(lambda: ours(default, compiled=True)) for _ in range(2))
        compilation = first - second
        plain, compiled = draw(ours, default), draw(lambda draws: ours(draws, compiled=True), default)
        peer = draw(theirs) if installed("devinterp") else math.nan
        other = math.nan
        if installed("canonical_interp") and loss_fn is not token_cross_entropy:
            with contextlib.suppress(Exception):
                other = draw(canonical)
        length = MEASUREMENTS * 8 * 4_000
        gain = max(length * peer / (length * plain), length * peer / (length * compiled + compilation))
        cells = [
            f"{x * 1e6:,.0f} µs = {x / gradient:.2f} gradients" if math.isfinite(x) else "–"
            for x in (plain, compiled, peer, other)
        ]
        rows[name] = (
            f"| {name} | {objective.num_parameters:,} | {gradient * 1e6:,.0f} µs | "
            + " | ".join(cells)
            + f" | {gain:.1f} (compiling took {compilation:.0f} s) |"
        )
        print(rows[name], flush=True)
    return rows


def memory_table() -> str:
    """Peak memory of the transformer above what the process held before, each in a process of its own (Linux)."""
    peaks = {}
    for what in ("step", "estimate"):
        command = [sys.executable, __file__, "--memory", what]
        # Large blocks go back to the system when they are freed: how the heap is cut up by chance is not counted.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        peaks[what] = int(output.split()[-1])
    return (
        "| | MiB above the model |\n|---|---|\n"
        f"| one training step (forward, backward, SGD) | {peaks['step'] / 1024:,.0f} |\n"
        f"| `estimate_llc`, one chain at a time | {peaks['estimate'] / 1024:,.0f} = "
        f"{peaks['estimate'] / peaks['step']:.2f} steps |"
    )


def peak_memory(what: str) -> int:
    """KiB by which the resident memory of this process comes to grow."""
    module, batches = transformer_case()
    phasewatch.estimate_llc(monomial((1, 1)), n=100, chains=1, burn_in=20, draws=20)  # loads what it needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = resident("VmRSS")
    if what == "step":
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            token_cross_entropy(module, batches[0]).backward()
            optimizer.step()
    else:
        objective = phasewatch.Objective(module, batches, loss_fn=token_cross_entropy)
        phasewatch.estimate_llc(objective, chains=2, burn_in=20, draws=20)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A line of what the kernel says of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", type=int, default=12, help="number of cases drawn afresh")
    parser.add_argument("--seed", type=int, default=2_000, help="seed of the first of them")
    parser.add_argument("--no-peers", action="store_true", help="measure phasewatch alone")
    parser.add_argument("--memory", choices=("step", "estimate"), help=argparse.SUPPRESS)
    parser.add_argument("--network", default="", help="time only the networks with this in their name, keep the others")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure these parts anew, keep the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.memory:
        print(peak_memory(arguments.memory))
        return
    results = ROOT / "benchmarks" / "results"
    file = results / "llc.json"
    found = json.loads(file.read_text()) if file.exists() and arguments.only else {}
    with contextlib.redirect_stderr(io.StringIO()) if not arguments.no_peers else contextlib.nullcontext():
        for section in arguments.only or SECTIONS:
            if section == "accuracy":
                cases = [linear_case(widths, rank, 1, fresh=False) for widths, rank in LISTED]
                cases += [drawn_case(arguments.seed + k) for k in range(arguments.fresh)]
                found[section] = [asdict(row) for row in accuracy(cases, not arguments.no_peers)]
            elif section == "budgets":
                found[section] = budget_table([linear_case(*case, 1, fresh=False) for case in BUDGETED])
            elif section == "speed":
                found[section] = speed_table(arguments.network, found.get(section, {}) if arguments.network else {})
            elif section == "sensitivity":
                found[section] = sensitivity.measure()
            else:
                found[section] = memory_table()
            found[f"{section} load"] = round(os.getloadavg()[1], 1)
            file.write_text(json.dumps(found, indent=1) + "\n")
    rows = [Row(**row) for row in found["accuracy"]]
    loads = ", ".join(f"{section} {found[f'{section} load']}" for section in SECTIONS)
    text = (
        "# Learning coefficients\n\n"
        f"`make bench-llc`; torch {torch.__version__}, one thread, Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} processors.\nLoad of the machine at the end of each part (times are "
        f"only as good as it is idle): {loads}.\n"
        f"n = {SAMPLES:,}, batches of {BATCH}. phasewatch is called without an argument of the "
        f"sampler; devinterp and canonical-interp with\n{PEER_CHAINS} chains, {PEER_BURN_IN} + {PEER_DRAWS:,} draws; "
        "canonical-interp takes its own default step; the best of four step sizes is chosen with the answer known.\n"
        "The exact value of a normal crossing is its expectation at this n and localization, by quadrature.\n\n"
        f"{accuracy_table(rows)}\n\n## Gradients a chain to 5 %\n\nRoot mean square error over four seeds, 4 chains, "
        "burn-in counted; devinterp at the step that does best, chosen with the answer known.\n\n"
        f"{found['budgets']}\n\n## Time of a minibatch gradient of a chain\n\n"
        "All that an estimate does is counted: moves, looks at the whole probe, losses of samples, random numbers.\n"
        f"phasewatch and devinterp at nbeta = {SPEED_NBETA:g}: at that of its own choice phasewatch says that the MLP "
        "is not near a minimum,\nand draws nothing.\n"
        "devinterp and canonical-interp make a draw of each gradient, phasewatch of one or, on the noisy MLP, of one a "
        "batch.\nProcessor time, the least of several runs.\n\n"
        "| network | parameters | one gradient | phasewatch | compiled | devinterp 1.3.2 | canonical-interp "
        f"| {MEASUREMENTS} measurements, compilation counted: devinterp / phasewatch |\n"
        "|---|---|---|---|---|---|---|---|\n"
        + "\n".join(found["speed"].values())
        + f"\n\n## Memory\n\n{found['memory']}\n\n"
        f"## What other values of the samplers' constants do\n\n{found['sensitivity']}\n"
    )
    (results / "llc.md").write_text(text)
    figure(rows, ROOT / "docs" / "llc_accuracy.png")
    print(text)


if __name__ == "__main__":
    main()
