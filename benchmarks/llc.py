"""Learning coefficients against exact answers and peers, and what a draw costs, all measured in one process.

Prints two tables and draws a figure: the estimates of phasewatch (no argument given), of devinterp with its defaults
and with the step size that comes nearest to the known answer (nobody has that knowledge in practice), and of
canonical-interp; and the time of a chain's draw in units of one forward and backward pass. Writes them to
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
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import phasewatch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "llc"))
from exact import deep_linear_network, half_squared_error, linear_network  # noqa: E402

SAMPLES, BATCH = 10_000, 500
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
PEER_CHAINS, PEER_DRAWS, PEER_BURN_IN = 4, 1_500, 500


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
    """An objective whose learning coefficient is known, with the known term of finite n."""

    name: str
    fresh: bool
    objective: phasewatch.Objective
    exact: float


def drawn_case(seed: int) -> Case:
    """A linear network of drawn widths, depth and rank, or a regression with noisy targets."""
    random = np.random.default_rng(seed)
    if random.random() < 0.25:
        return noisy_regression(seed, int(random.integers(3, 12)), int(random.integers(1, 6)))
    widths = random.integers(3, 11, size=int(random.integers(3, 7))).tolist()
    return linear_case(widths, int(random.integers(0, min(widths))), seed, fresh=True)


def linear_case(widths: Sequence[int], rank: int, seed: int, fresh: bool) -> Case:
    value, multiplicity = deep_linear_network(widths, rank)
    exact = value - (multiplicity - 1) / math.log(SAMPLES / math.log(SAMPLES))
    objective = linear_network(widths, rank, seed=seed, samples=SAMPLES, batch_size=BATCH)
    return Case("-".join(map(str, widths)) + f" r{rank}", fresh, objective, exact)


def noisy_regression(seed: int, inputs: int, outputs: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, inputs, generator=generator) * torch.linspace(0.4, 1.6, inputs)
    y = x @ torch.randn(inputs, outputs, generator=generator) + torch.randn(SAMPLES, outputs, generator=generator)
    module = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    objective = phasewatch.Objective(module, batches, loss_fn=half_squared_error)
    return Case(f"{inputs}→{outputs} noisy", True, objective, inputs * outputs / 2)


def with_phasewatch(case: Case, seed: int) -> Row:
    estimate = phasewatch.estimate_llc(case.objective, seed=seed)
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


def devinterp_draws(case: Case, seed: int, lr: float | None) -> tuple[float, float]:
    """Mean and standard deviation over chains."""
    from devinterp.optim import SGLD
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary

    module, loader = case.objective._module, preloaded(case.objective._batches)
    nbeta = SAMPLES / math.log(SAMPLES)
    settings = {"nbeta": nbeta, "localization": 100.0} | ({"lr": lr, "localization": 1.0} if lr else {"lr": 1e-3})
    result = estimate_learning_coeff_with_summary(
        module,
        loader,
        evaluate=half_squared_error,
        sampling_method=SGLD,
        optimizer_kwargs=settings,
        num_chains=PEER_CHAINS,
        num_draws=PEER_DRAWS,
        num_burnin_steps=PEER_BURN_IN,
        init_loss=float(case.objective.loss()),
        seed=seed,
        verbose=False,
    )
    return float(result["llc/mean"]), float(result["llc/std"])


def with_devinterp(case: Case, seed: int) -> list[Row]:
    rows = []
    for tool, steps in (("devinterp lr 1e-3, γ 100", [None]), ("devinterp, best of 4 steps", list(STEP_SIZES))):
        found: list[tuple[float, float]] = []
        for lr in steps:
            with contextlib.suppress(RuntimeError):  # it stops at the first NaN
                found.append(devinterp_draws(case, seed, lr))
        finite = [f for f in found if math.isfinite(f[0])]
        mean, spread = min(finite, key=lambda f: abs(f[0] - case.exact), default=(math.nan, math.nan))
        used = (PEER_DRAWS + PEER_BURN_IN) * len(steps)
        margin = 1.96 * spread / math.sqrt(PEER_CHAINS)
        rows.append(Row(case.name, case.fresh, case.exact, tool, mean, mean - margin, mean + margin, used))
    return rows


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(dim=-1).mean()


def with_canonical_interp(case: Case, seed: int) -> Row:
    if not hasattr(itertools, "batched"):  # it is written for Python 3.12

        def batched(items: Any, size: int) -> Any:
            iterator = iter(items)
            return iter(lambda: tuple(itertools.islice(iterator, size)), ())

        itertools.batched = batched  # type: ignore[attr-defined]
    from canonical_interp.slt import LLCEstimator

    module, loader = case.objective._module, preloaded(case.objective._batches)
    torch.manual_seed(seed)
    estimator = LLCEstimator(PEER_DRAWS, PEER_CHAINS, PEER_BURN_IN, steps_bw_draws=1)
    result = estimator.estimate_llc(module, loader, half_square, compile=False, show_progress=False)
    value = float(result["llc/mean"] if isinstance(result, dict) else result)
    return Row(case.name, case.fresh, case.exact, "canonical-interp", value, value, value, PEER_DRAWS + PEER_BURN_IN)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def accuracy(cases: list[Case], peers: bool) -> list[Row]:
    rows = []
    for number, case in enumerate(cases):
        rows.append(with_phasewatch(case, seed=number))
        if peers and installed("devinterp"):
            rows.extend(with_devinterp(case, seed=number))
        if peers and installed("canonical_interp"):
            try:
                rows.append(with_canonical_interp(case, seed=number))
            except Exception as error:
                print(f"canonical-interp: {type(error).__name__}: {error}", file=sys.stderr)
        for row in rows:
            if row.case == case.name:
                print(
                    f"  {row.case:18s} {row.tool:28s} exact {row.exact:7.2f}  estimate {row.estimate:8.2f}", flush=True
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
    lines += ["", "| tool | cases | median error | worst error | NaN | interval holds λ |", "|---|---|---|---|---|---|"]
    for tool in dict.fromkeys(row.tool for row in rows):
        mine = [row for row in rows if row.tool == tool]
        errors = [abs(row.estimate / row.exact - 1) for row in mine if math.isfinite(row.estimate)]
        held = sum(row.low <= row.exact <= row.high for row in mine)
        median, worst = (f"{statistics.median(errors):.1%}", f"{max(errors):.1%}") if errors else ("–", "–")
        lines.append(
            f"| {tool} | {len(mine)} | {median} | {worst} | {len(mine) - len(errors)} | {held} of {len(mine)} |"
        )
    return "\n".join(lines)


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


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1].flatten())


def speed_cases() -> dict[str, tuple[nn.Module, list[tuple[Tensor, Tensor]], Callable[..., Tensor], int]]:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    mlp = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 24), nn.ReLU(), nn.Linear(24, 10))
    linear = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    inputs = torch.randn(2_048, 16)
    tokens = torch.randint(96, (128, 64))
    return {
        "MLP, digits": (mlp, list(zip(x.split(256)[:7], y.split(256)[:7], strict=True)), cross_entropy, 400),
        "deep linear network": (
            linear,
            [(part, linear(part).detach()) for part in inputs.split(512)],
            half_squared_error,
            400,
        ),
        "transformer": (
            Transformer().eval(),
            list(zip(tokens.split(32), tokens.roll(-1, 1).split(32), strict=True)),
            cross_entropy,
            12,
        ),
    }


def best_time(call: Callable[[], Any], repeats: int = 3) -> float:
    """Least wall-clock seconds; the first call, not counted, warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def speed_table() -> str:
    """Time of a chain's draw in units of one forward and backward pass on the same batch."""
    lines = ["| network | parameters | one gradient | phasewatch | devinterp 1.3.2 |", "|---|---|---|---|---|"]
    chains = 4
    for name, (module, batches, loss_fn, gradients) in speed_cases().items():
        parameters = list(module.parameters())
        objective = phasewatch.Objective(module, batches, loss_fn=loss_fn)

        def bare() -> None:
            for k in range(gradients):
                torch.autograd.grad(loss_fn(module, batches[k % len(batches)]), parameters)

        def ours(draws: int) -> Callable[[], Any]:
            return lambda: phasewatch.estimate_llc(objective, chains=chains, burn_in=20, draws=draws)

        def theirs(draws: int) -> Callable[[], Any]:
            from devinterp.optim import SGLD
            from devinterp.slt.sampler import estimate_learning_coeff_with_summary

            return lambda: estimate_learning_coeff_with_summary(
                module,
                preloaded(batches),
                evaluate=loss_fn,
                sampling_method=SGLD,
                optimizer_kwargs={"lr": 1e-6, "nbeta": 100.0, "localization": 1.0},
                num_chains=chains,
                num_draws=draws,
                init_loss=1.0,
                verbose=False,
            )

        gradient = best_time(bare) / gradients
        cells = [f"{gradient * 1e6:,.0f} µs"]
        for tool in (ours, theirs) if installed("devinterp") else (ours,):
            # The difference of two lengths leaves out what is done once.
            draw = (best_time(tool(3 * gradients)) - best_time(tool(gradients))) / (2 * gradients * chains)
            cells.append(f"{draw * 1e6:,.0f} µs = {draw / gradient:.2f} gradients")
        cells += ["not installed"] * (3 - len(cells))
        lines.append(f"| {name} | {objective.num_parameters:,} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", type=int, default=9, help="number of cases drawn afresh")
    parser.add_argument("--seed", type=int, default=2_000, help="seed of the first of them")
    parser.add_argument("--no-peers", action="store_true", help="measure phasewatch alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases = [linear_case(widths, rank, 1, fresh=False) for widths, rank in LISTED]
    cases += [drawn_case(arguments.seed + k) for k in range(arguments.fresh)]
    with contextlib.redirect_stderr(io.StringIO()) if not arguments.no_peers else contextlib.nullcontext():
        rows = accuracy(cases, not arguments.no_peers)
        speed = speed_table()
    table = accuracy_table(rows)
    text = (
        "# Learning coefficients\n\n"
        f"`make bench-llc`; torch {torch.__version__}, one thread, Python {platform.python_version()}, "
        f"{platform.machine()}.\nn = {SAMPLES:,}, batches of {BATCH}. phasewatch is called without an argument of the "
        f"sampler; devinterp and canonical-interp with\n{PEER_CHAINS} chains, {PEER_BURN_IN} + {PEER_DRAWS:,} draws; "
        "canonical-interp takes its own default step; the best of four step sizes is chosen with the answer known.\n\n"
        f"{table}\n\n## Time of a draw of a chain\n\n{speed}\n"
    )
    results = ROOT / "benchmarks" / "results"
    (results / "llc.md").write_text(text)
    (results / "llc.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    figure(rows, ROOT / "docs" / "llc_accuracy.png")
    print(text)


if __name__ == "__main__":
    main()
