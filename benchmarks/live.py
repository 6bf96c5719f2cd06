"""The learning coefficient of the function while networks train, beside devinterp, on networks that the script trains.

Measures checkpoints of reference runs, modular addition over many seeds before and after it generalises, and how
the values depend on the resolution and on the prior's spread. Writes benchmarks/results/live.md and
docs/behavioral_llc.png. Everything runs on one thread from fixed seeds. Fashion-MNIST is used where Debian's package
dataset-fashion-mnist is installed, devinterp where it is: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gzip
import importlib.util
import io
import json
import logging
import math
import os
import platform
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from phasewatch import BehavioralLLC, Objective, estimate_behavioral_llc
from phasewatch.demo import BATCH, SMALL_START, STEPS
from phasewatch.hessian import effective_rank
from phasewatch.llc.behavioral import COARSE, FINE
from phasewatch.llc.diagnostics import split_rhat
from phasewatch.llc.spread import prior_spread

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "llc"))
from exact import cross_entropy, deep_linear_network, half_squared_error, linear_network  # noqa: E402

Batch = tuple[Tensor, ...]
State = dict[str, Tensor]

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""
PROBE = 512
LIVE = {"chains": 4, "burn_in": 300, "draws": 1_200}
LIVE_LARGE = {"chains": 2, "burn_in": 150, "draws": 100}
RESOLUTIONS = (COARSE, FINE)
ACCEPTED_RHAT = 1.1
PEER = {"num_chains": 4, "num_burnin_steps": 200, "num_draws": 300}
PEER_LARGE = {"num_chains": 2, "num_burnin_steps": 25, "num_draws": 50}
PEER_BATCH = 64

PRIME, WIDTH, TRAINED_ON = 53, 32, 0.35
MEMORISED, GENERALISED = 2_000, 7_000
MODES = (4.0, 1.5, 0.6)
LINEAR_STARTS = {(6, 6, 6): 0.02, (4, 8, 4): 0.02, (5, 6, 6, 5): 0.08}
OUTPUTS_RESOLUTION = COARSE * PRIME
"""In units of the outputs' variance, the coarse one of each output, as the signal ``llc_outputs_coarse`` has it; a
network of no use is half the number of outputs away, 26.5."""
CLEAR = 3.0
CURVE = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
SPREADS = (0.5, 1.0, 2.0)
LOCALIZED = ([6, 6, 6], 0), ([8, 4, 8], 2), ([5, 3, 5], 2), ([6, 6, 6, 6], 2)


@dataclass(frozen=True)
class Checkpoint:
    """A network at one step of its training, and what it is measured on.

    Attributes:
        samples: In the training set.
        training: Batches for the peer, of the training set.
        test: What is held out.
        exact: The learning coefficient where it is known.
    """

    run: str
    step: int
    module: nn.Module
    loss_fn: Callable[..., Tensor]
    probe: Batch
    samples: int
    training: Sequence[Batch]
    test: Batch | None = None
    exact: float | None = None
    large: bool = False
    stage: str = ""

    @functools.cached_property
    def objective(self) -> Objective:
        return Objective(self.module, [self.probe], loss_fn=self.loss_fn)


@dataclass
class Clock:
    """Seconds of processor time and of wall time of a section."""

    processor: float = field(default_factory=time.process_time)
    wall: float = field(default_factory=time.perf_counter)

    def passed(self) -> list[float]:
        return [round(time.process_time() - self.processor), round(time.perf_counter() - self.wall)]


def train(
    module: nn.Module,
    data: Batch,
    loss_fn: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    keep: Sequence[int],
    batch: int | None,
    seed: int,
) -> dict[int, State]:
    """States at the steps in ``keep``; batches are drawn with replacement, None is all of the data."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for step in range(max(keep) + 1):
        if step in keep:
            kept[step] = copy.deepcopy(module.state_dict())
        rows = torch.randint(len(data[0]), (batch,), generator=generator) if batch else slice(None)
        optimizer.zero_grad()
        loss_fn(module, tuple(part[rows] for part in data)).backward()
        optimizer.step()
    return kept


def at(module: nn.Module, state: State) -> nn.Module:
    other = copy.deepcopy(module)
    other.load_state_dict(state)
    return other.eval()


def in_batches(data: Batch, size: int = PEER_BATCH) -> list[Batch]:
    """Whole batches only."""
    whole = len(data[0]) // size * size
    return list(zip(*(part[:whole].split(size) for part in data), strict=True))


# ---- the reference runs


@functools.cache
def digits() -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def demo_run() -> Iterator[Checkpoint]:
    """The network of ``phasewatch demo``, with its start and its optimizer."""
    training, test = digits()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(SMALL_START)
    keep = (0, STEPS // 8, STEPS // 4, STEPS // 2, STEPS)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    states = train(module, training, cross_entropy, optimizer, keep, BATCH, seed=0)
    for step, state in states.items():
        yield Checkpoint(
            "digits (demo)",
            step,
            at(module, state),
            cross_entropy,
            tuple(part[:PROBE] for part in training),
            len(training[0]),
            in_batches(training),
            test,
        )


def linear_run(widths: Sequence[int]) -> list[Checkpoint]:
    """One checkpoint for each number of modes learnt, where the gradient is least: the plateau."""
    generator = torch.Generator().manual_seed(0)
    start, samples = LINEAR_STARTS[tuple(widths)], 4_000
    frames = [torch.linalg.qr(torch.randn(w, w, generator=generator))[0][:, :3] for w in (widths[-1], widths[0])]
    target = frames[0] * torch.tensor(MODES) @ frames[1].T
    x = torch.randn(samples, widths[0], generator=generator)
    y = x @ target.T + torch.randn(samples, widths[-1], generator=generator)
    module = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:], strict=False)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, start, generator=generator)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    states = train(module, (x, y), half_squared_error, optimizer, range(0, 4_001, 25), None, seed=0)
    plateaus: dict[int, tuple[float, int]] = {}
    for step, state in states.items():
        network = at(module, state)
        product = network(torch.eye(widths[0])).T.detach()
        learnt = torch.einsum("ik,ij,jk->k", frames[0], product, frames[1])
        # Within a twentieth of it, or not yet begun: in between is no plateau.
        known = sum(float(value) > 0.95 * mode for value, mode in zip(learnt, MODES, strict=True))
        gradient = torch.autograd.grad(half_squared_error(network, (x, y)), list(network.parameters()))
        size = float(sum(part.square().sum() for part in gradient))
        if known not in plateaus or size < plateaus[known][0]:
            plateaus[known] = (size, step)
    return [
        Checkpoint(
            "linear " + "-".join(map(str, widths)),
            step,
            at(module, states[step]),
            half_squared_error,
            (x[:PROBE], y[:PROBE]),
            samples,
            in_batches((x, y)),
            exact=deep_linear_network(list(widths), rank)[0],
            stage=f"rank {rank}",
        )
        for rank, (_, step) in sorted(plateaus.items())
    ]


def convnet_run() -> Iterator[Checkpoint]:
    """Two convolutions with BatchNorm on Fashion-MNIST; measured in evaluation mode."""
    if not FASHION.exists():
        return

    def read(name: str, header: int) -> np.ndarray[Any, Any]:
        return np.frombuffer(gzip.decompress((FASHION / name).read_bytes()), np.uint8, offset=header)

    images = torch.tensor(read("train-images-idx3-ubyte.gz", 16)).view(-1, 1, 28, 28)[:12_000].float() / 255
    labels = torch.tensor(read("train-labels-idx1-ubyte.gz", 8))[:12_000].long()
    training, test = (images[:10_000], labels[:10_000]), (images[10_000:], labels[10_000:])
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    states = train(module, training, cross_entropy, optimizer, (30, 600), 64, seed=0)
    for step, state in states.items():
        yield Checkpoint(
            "convnet, Fashion-MNIST",
            step,
            at(module, state),
            cross_entropy,
            tuple(part[:256] for part in training),
            len(images),
            in_batches(training)[:40],
            test,
            large=True,
        )


class Transformer(nn.Module):
    """Decoder only, of 0.6 million parameters."""

    def __init__(self, vocabulary: int = 96, width: int = 128, depth: int = 3, length: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x)).flatten(0, 1)


def token_cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1].flatten())


def transformer_run() -> Iterator[Checkpoint]:
    """The next character of the standard library's sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    text = "".join(file.read_text(errors="ignore") for file in files)
    # Printable ASCII, and 0 for everything else, line ends among it.
    codes = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in text])
    count = (len(codes) - 1) // 128
    x, y = codes[: 128 * count].view(-1, 128), codes[1 : 128 * count + 1].view(-1, 128)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    training, test = (x[order[64:]], y[order[64:]]), (x[order[:64]], y[order[:64]])
    torch.manual_seed(0)
    module = Transformer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    states = train(module, training, token_cross_entropy, optimizer, (30, 200), 16, seed=0)
    for step, state in states.items():
        yield Checkpoint(
            "transformer, characters",
            step,
            at(module, state),
            token_cross_entropy,
            tuple(part[:16] for part in training),
            training[0].numel(),
            in_batches(training, 8)[:40],
            test,
            large=True,
        )


class ModularAddition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PRIME, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, PRIME)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(pairs).sum(1))))


Kind = Literal["grokking", "no decay", "full data"]


@functools.cache
def modular_addition(kind: Kind, seed: int) -> list[Checkpoint]:
    """At the start, after it has memorised, and after it has generalised, or at the same steps where it does not."""
    torch.manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    order = torch.randperm(len(pairs))
    pairs, sums = pairs[order], pairs[order].sum(1) % PRIME
    cut = int(TRAINED_ON * len(pairs))
    known = len(pairs) if kind == "full data" else cut
    training = pairs[:known], sums[:known]
    test = (pairs[known:], sums[known:]) if known < len(pairs) else None
    module = ModularAddition()
    decay = 0.0 if kind == "no decay" else 0.5
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=decay, betas=(0.9, 0.98))
    # With all pairs a step takes as many of them as the others see, drawn anew.
    batch = cut if kind == "full data" else None
    states = train(module, training, cross_entropy, optimizer, (0, MEMORISED, GENERALISED), batch, seed)
    names = ("start", "memorised", "generalised") if kind == "grokking" else ("start", "earlier", "later")
    return [
        Checkpoint(
            f"modular addition, {kind}",
            step,
            at(module, state),
            cross_entropy,
            tuple(part[:PROBE] for part in training),
            known,
            in_batches(training),
            test,
            stage=stage,
        )
        for (step, state), stage in zip(states.items(), names, strict=True)
    ]


def wrong_labels(name: str, share: float) -> Iterator[Checkpoint]:
    """A share of the labels of 512 digits is drawn at random; the test set has the right ones."""
    (x, y), test = digits()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(PROBE, generator=generator) < share
    labels = torch.where(drawn, torch.randint(10, (PROBE,), generator=generator), y[:PROBE])
    training = x[:PROBE], labels
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    states = train(module, training, cross_entropy, optimizer, (100, 400, 3_000), None, seed=0)
    for step, state in states.items():
        network = at(module, state)
        yield Checkpoint(name, step, network, cross_entropy, training, PROBE, in_batches(training), test)


def reference_runs() -> Iterator[Checkpoint]:
    yield from demo_run()
    for widths in LINEAR_STARTS:
        yield from linear_run(widths)
    yield from convnet_run()
    yield from modular_addition("grokking", 0)
    yield from modular_addition("no decay", 0)[1:]
    yield from modular_addition("full data", 0)[1:]
    yield from wrong_labels("digits, random labels", 1.0)
    yield from wrong_labels("digits, a fifth random", 0.2)
    yield from transformer_run()


# ---- measurements


def runs() -> list[dict[str, Any]]:
    rows = []
    for checkpoint in reference_runs():
        clock = Clock()
        row = {
            "run": checkpoint.run,
            "step": checkpoint.step,
            "stage": checkpoint.stage,
            "parameters": checkpoint.objective.num_parameters,
            "loss": float(checkpoint.objective.loss()),
            "test": loss_at(checkpoint, checkpoint.test),
            "exact": checkpoint.exact,
        }
        settings = LIVE_LARGE if checkpoint.large else LIVE
        found = estimate_behavioral_llc(checkpoint.objective, RESOLUTIONS, **settings)
        row["seconds"] = clock.passed()
        row["measured"] = [as_row(one) for one in found]
        for one, rank in zip(row["measured"], half_ranks(checkpoint, found), strict=True):
            one["half rank"] = rank
        row["peer"] = with_devinterp(checkpoint) if installed("devinterp") else []
        row["all seconds"] = clock.passed()
        rows.append(row)
        print(f"  {checkpoint.run:28s} {checkpoint.step:6d} {found} {row['seconds']} {row['all seconds']}", flush=True)
        for peer in row["peer"]:
            print(f"      {peer}", flush=True)
    return rows


def loss_at(checkpoint: Checkpoint, batch: Batch | None) -> float | None:
    if batch is None:
        return None
    with torch.no_grad():
        return float(checkpoint.loss_fn(checkpoint.module, batch))


def as_row(found: BehavioralLLC) -> dict[str, Any]:
    return {
        "resolution": found.resolution,
        "value": found.learning_coefficient,
        "error": found.standard_error,
        "interval": found.interval,
        "reasons": found.reasons,
        "nbeta": found.nbeta,
        "divergence": found.divergence,
        "virial": found.virial,
        "rhat": found.rhat,
        "gradients": found.gradients,
    }


def half_ranks(checkpoint: Checkpoint, found: Sequence[BehavioralLLC]) -> list[dict[str, Any] | None]:
    """Half of the effective rank where the chains were; of the large networks both from the same products."""
    spread = prior_spread(checkpoint.objective)
    ranks: list[dict[str, Any] | None] = []
    seen = None
    for one in found:
        if not one.nbeta:
            ranks.append(None)
            continue
        if checkpoint.large and seen:
            rank = seen.at(one.nbeta)
        else:
            products = 16 if checkpoint.large else 64
            rank = effective_rank(checkpoint.objective, spread, one.nbeta, check_probe=False, max_products=products)
        seen = rank
        error = (rank.standard_error + rank.quadrature_error) / 2
        ranks.append({"value": rank.value / 2, "error": error, "converged": rank.converged})
    return ranks


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def with_devinterp(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Its step size and localization, at the temperature of the definition and at the one that it fills in."""
    from devinterp.optim import SGLD
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary
    from devinterp.utils import default_nbeta

    batches = list(checkpoint.training)
    loader: DataLoader[Any] = DataLoader(batches, batch_size=1, shuffle=True, collate_fn=lambda one: one[0])  # type: ignore[arg-type]
    with torch.no_grad():
        start = statistics.fmean(float(checkpoint.loss_fn(checkpoint.module, batch)) for batch in batches)
    size = PEER_LARGE if checkpoint.large else PEER
    rows = []
    for name, nbeta in (
        ("n / log n", checkpoint.samples / math.log(checkpoint.samples)),
        ("its default_nbeta", float(default_nbeta(len(batches[0][0])))),
    ):
        mean, rhat = math.nan, math.nan
        with contextlib.suppress(RuntimeError), contextlib.redirect_stderr(io.StringIO()):  # stops at the first NaN
            result = estimate_learning_coeff_with_summary(
                copy.deepcopy(checkpoint.module),
                loader,
                evaluate=checkpoint.loss_fn,
                sampling_method=SGLD,
                optimizer_kwargs={"lr": 1e-3, "localization": 100.0, "nbeta": nbeta},
                init_loss=start,
                seed=0,
                verbose=False,
                **size,
            )
            mean, rhat = float(result["llc/mean"]), float(split_rhat(result["loss/trace"].astype(float)))
        gradients = size["num_chains"] * (size["num_burnin_steps"] + size["num_draws"])
        rows.append({"nbeta": name, "value": mean, "rhat": rhat, "gradients": gradients})
    return rows


def seeds(count: int) -> list[dict[str, Any]]:
    """Modular addition at the two steps, over seeds: so many that grok, and as many that do not."""
    kinds: list[tuple[Kind, range]] = [
        ("grokking", range(count)),
        ("no decay", range(count // 2)),
        ("full data", range(count - count // 2)),
    ]
    rows = []
    for kind, chosen in kinds:
        for seed in chosen:
            stages = modular_addition(kind, seed)[1:]
            row: dict[str, Any] = {"kind": kind, "seed": seed, "stages": []}
            for checkpoint in stages:
                found = estimate_behavioral_llc(checkpoint.objective, RESOLUTIONS, **LIVE)
                inside = in_the_outputs(checkpoint.objective)
                row["stages"].append(
                    {
                        "loss": float(checkpoint.objective.loss()),
                        "test": loss_at(checkpoint, checkpoint.test),
                        "measured": [*map(as_row, found), *inside],
                    }
                )
            rows.append(row)
            shown = [[f"{one['value']:.4g}" for one in stage["measured"]] for stage in row["stages"]]
            print(f"  {kind} {seed}: {shown} test {[stage['test'] for stage in row['stages']]}", flush=True)
    return rows


def in_the_outputs(objective: Objective) -> list[dict[str, Any]]:
    """Sampled, and half of the effective rank, both at the coarse resolution of the outputs' own metric."""
    spread = prior_spread(objective, "outputs")
    (found,) = estimate_behavioral_llc(objective, (OUTPUTS_RESOLUTION,), metric="outputs", spread=spread, **LIVE)
    ranks = effective_rank(
        objective.behavioral("outputs"), spread, 1 / OUTPUTS_RESOLUTION, max_products=256, check_probe=False
    )
    rank = ranks.at_resolution(OUTPUTS_RESOLUTION)
    return [
        as_row(found),
        {"value": rank.value / 2, "error": rank.standard_error / 2, "reasons": rank.reasons},
    ]


def dependence() -> dict[str, Any]:
    """Two stages of two runs over the resolution and the spread, and exact cases over the spread."""
    addition, linear = modular_addition("grokking", 0), linear_run((6, 6, 6))
    cases = {"modular addition": addition[1:], "linear 6-6-6": [linear[0], linear[-1]]}
    curves = []
    for case, checkpoints in cases.items():
        for checkpoint in checkpoints:
            for spread in SPREADS:
                found = estimate_behavioral_llc(checkpoint.objective, CURVE, spread=spread, **LIVE)
                curves.append(
                    {
                        "case": case,
                        "stage": checkpoint.stage,
                        "spread": spread,
                        "exact": checkpoint.exact,
                        "measured": [as_row(one) for one in found],
                    }
                )
                print(f"  {case} {checkpoint.stage} spread {spread}: {found}", flush=True)
    exact = []
    for widths, rank in LOCALIZED:
        objective = linear_network(widths, rank, seed=1, samples=PROBE, batch_size=PROBE)
        values = {}
        for factor in (10**-0.5, 1.0, 10**0.5):
            found = estimate_behavioral_llc(objective, (COARSE, FINE), spread=factor)
            values[f"{factor:.2f}"] = [as_row(one) for one in found]
        name = "-".join(map(str, widths)) + f" rank {rank}"
        exact.append({"case": name, "exact": deep_linear_network(widths, rank)[0], "values": values})
        print(f"  {name} {values}", flush=True)
    return {"curves": curves, "exact": exact}


# ---- the page


def number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    return "NaN" if math.isnan(value) else f"{value:,.{digits}g}" if abs(value) < 1_000 else f"{value:,.0f}"


def runs_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| run | step | loss | test loss | at nats | λ | 95 % interval | exact | verdict | ½ effective rank | E[D] "
        "| virial | R-hat | gradients |",
        "|" + "---|" * 14,
    ]
    for row in rows:
        for one in row["measured"]:
            rank = one["half rank"]
            low, high = one["interval"]
            doubt = "" if not rank or rank["converged"] else " (not converged)"
            cells = [
                row["run"],
                f"{row['step']:,} {row['stage']}".strip(),
                number(row["loss"], 3),
                number(row["test"], 3),
                f"{one['resolution']:g}",
                f"{number(one['value'])} ± {number(one['error'], 2)}",
                f"{number(low)} to {number(high)}",
                number(row["exact"]),
                "; ".join(one["reasons"]) or "reliable",
                number(rank and rank["value"]) + doubt,
                number(one["divergence"], 3),
                number(one["virial"], 2),
                number(one["rhat"], 3),
                f"{one['gradients']:,}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peer_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| run | step | λ of the loss at nβ = n / log n | R-hat | at its default_nbeta | R-hat | minibatch gradients |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        cells = [f"{number(one['value'])} | {number(one['rhat'], 3)}" for one in row["peer"]]
        spent = "2 × " + f"{row['peer'][0]['gradients']:,}"
        lines.append(f"| {row['run']} | {row['step']:,} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Shares of the values that are finite, not negative, converged and called reliable."""
    groups: dict[str, list[dict[str, Any]]] = {
        f"phasewatch at {resolution:g} nats": [row["measured"][k] for row in rows]
        for k, resolution in enumerate(RESOLUTIONS)
    }
    if rows[0]["peer"]:
        for k, name in enumerate(("n / log n", "its default_nbeta")):
            groups[f"devinterp 1.3.2, nβ = {name}"] = [row["peer"][k] for row in rows]
    lines = [
        "| | values | finite | finite and not negative | R-hat at most 1.1 too | reliable by its own checks "
        "| gradients, median |",
        "|" + "---|" * 7,
    ]
    for name, values in groups.items():
        finite = [one for one in values if math.isfinite(one["value"])]
        positive = [one for one in finite if one["value"] >= 0]
        # Where the whole prior is nearer than the resolution nothing is sampled: zero is exact.
        mixed = [one for one in positive if one["rhat"] <= ACCEPTED_RHAT or one.get("nbeta") == 0]
        trusted = sum(not one["reasons"] for one in values) if "reasons" in values[0] else None
        spent = statistics.median(one["gradients"] for one in values)
        lines.append(
            f"| {name} | {len(values)} | {len(finite)} | {len(positive)} | {len(mixed)} "
            f"| {trusted if trusted is not None else '–'} | {spent:,.0f} |"
        )
    return "\n".join(lines)


def exactness(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| at nats | plateaus | median error | worst | interval holds the exact value |", "|---|---|---|---|---|"]
    known = [row for row in rows if row["exact"] is not None]
    for k, resolution in enumerate(RESOLUTIONS):
        errors = [abs(row["measured"][k]["value"] / row["exact"] - 1) for row in known]
        held = sum(
            row["measured"][k]["interval"][0] <= row["exact"] <= row["measured"][k]["interval"][1] for row in known
        )
        lines.append(
            f"| {resolution:g} | {len(known)} | {statistics.median(errors):.1%} | {max(errors):.1%} "
            f"| {held} of {len(known)} |"
        )
    return "\n".join(lines)


COLUMNS = ("λ at 0.1 nats", "λ at 0.003 nats", "outputs, λ", "outputs, ½ effective rank")


def seeds_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"| runs | seed | test loss at {MEMORISED:,}, {GENERALISED:,} | "
        + " | ".join(f"{column}: before → after (change / error)" for column in COLUMNS)
        + " | called reliable |",
        "|" + "---|" * (4 + len(COLUMNS)),
    ]
    falls: dict[str, list[list[bool]]] = {}
    for row in rows:
        before, after = (stage["measured"] for stage in row["stages"])
        cells, fell = [], []
        for one, other in zip(before, after, strict=True):
            change = other["value"] - one["value"]
            error = math.hypot(one["error"], other["error"])
            ratio = change / error if error else math.inf * (change > 0) - math.inf * (change < 0) if change else 0.0
            fell.append(ratio < -CLEAR)
            cells.append(f"{number(one['value'])} → {number(other['value'])} ({ratio:+.1f})")
        falls.setdefault(row["kind"], []).append(fell)
        trusted = sum(not one["reasons"] for one in (*before, *after))
        tests = ", ".join(number(stage["test"], 3) for stage in row["stages"])
        lines.append(
            f"| {row['kind']} | {row['seed']} | {tests} | {' | '.join(cells)} | {trusted} of {2 * len(before)} |"
        )
    lines += [
        "",
        f"Falls beyond {CLEAR:g} standard errors:",
        "",
        "| runs | seeds | " + " | ".join(COLUMNS) + " | 0.1 nats and outputs, λ | 0.1 nats and outputs, ½ rank |",
        "|" + "---|" * (4 + len(COLUMNS)),
    ]
    for kind, found in falls.items():
        counts = [sum(one[k] for one in found) for k in range(len(COLUMNS))]
        both = [sum(one[0] and one[k] for one in found) for k in (2, 3)]
        lines.append(f"| {kind} | {len(found)} | " + " | ".join(map(str, (*counts, *both))) + " |")
    return "\n".join(lines)


def dependence_table(curves: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| run, later less earlier stage | spread | " + " | ".join(f"ε = {epsilon:g}" for epsilon in CURVE) + " |",
        "|" + "---|" * (2 + len(CURVE)),
    ]
    signs: dict[str, list[int]] = {}
    for case in dict.fromkeys(curve["case"] for curve in curves):
        for spread in SPREADS:
            earlier, later = (
                curve["measured"] for curve in curves if curve["case"] == case and curve["spread"] == spread
            )
            cells = []
            for one, other in zip(earlier, later, strict=True):
                change, error = other["value"] - one["value"], math.hypot(one["error"], other["error"])
                clear = abs(change) > CLEAR * error
                signs.setdefault(case, []).append(int(np.sign(change)) if clear else 0)
                doubt = "" if not (one["reasons"] or other["reasons"]) else " ?"
                cells.append(f"{one['value']:.1f} → {other['value']:.1f}: {change:+.1f} ± {error:.1f}{doubt}")
            lines.append(f"| {case} | {spread:g} | " + " | ".join(cells) + " |")
    lines += ["", "| | differences | rise clearly | fall clearly | neither |", "|---|---|---|---|---|"]
    for case, found in signs.items():
        lines.append(f"| {case} | {len(found)} | {found.count(1)} | {found.count(-1)} | {found.count(0)} |")
    return "\n".join(lines)


def localization_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| case | exact | at nats | spread × 0.32 | × 1 | × 3.16 | largest change from × 1 | of the exact value |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        for k, resolution in enumerate(RESOLUTIONS):
            values = [found[k] for found in row["values"].values()]
            middle = values[1]["value"]
            largest = max((values[0], values[2]), key=lambda one: abs(one["value"] - middle))["value"] - middle
            cells = " | ".join(
                f"{one['value']:.2f} ± {one['error']:.2f}{' ?' if one['reasons'] else ''}" for one in values
            )
            lines.append(
                f"| {row['case']} | {row['exact']:g} | {resolution:g} | {cells} | {largest / middle:+.1%} "
                f"| {largest / row['exact']:+.1%} |"
            )
    return "\n".join(lines)


def figure(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """The coefficient over the resolution, at two stages of two runs, for three spreads of the prior."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(curve["case"] for curve in curves))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4.6 * len(cases), 3.8), layout="constrained")
    styles = dict(zip(SPREADS, (":", "-", "--"), strict=True))
    for axis, case in zip(axes, cases, strict=True):
        mine = [curve for curve in curves if curve["case"] == case]
        colours = dict(zip(dict.fromkeys(curve["stage"] for curve in mine), ("tab:blue", "tab:orange"), strict=True))
        for curve in mine:
            found = curve["measured"]
            axis.errorbar(
                [one["resolution"] for one in found],
                [one["value"] for one in found],
                [2 * one["error"] for one in found],
                color=colours[curve["stage"]],
                linestyle=styles[curve["spread"]],
                capsize=2,
                label=f"{curve['stage']}, spread × {curve['spread']:g}",
            )
            if curve["exact"] is not None and curve["spread"] == 1:
                axis.axhline(curve["exact"], color=colours[curve["stage"]], alpha=0.3, linewidth=3, zorder=0)
        axis.set_xscale("log")
        axis.set_xlabel("resolution E[D] in nats")
        axis.set_ylabel("learning coefficient of the function")
        axis.set_title(case)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def page(found: dict[str, Any]) -> str:
    rows = found["runs"]
    times = ", ".join(f"{name} {found['seconds'][name][0]} s ({found['seconds'][name][1]} s)" for name in SECTIONS)
    total = [sum(found["seconds"][name][k] for name in SECTIONS) / 60 for k in (0, 1)]
    smaller, larger = (
        f"{one['chains']} chains, {one['burn_in']} + at most {one['draws']:,} draws" for one in (LIVE, LIVE_LARGE)
    )
    peers = (
        "\n## λ of the loss by devinterp 1.3.2 on the same checkpoints\n\n"
        "lr 1e-3, localization 100. Chains, burn-in and draws: "
        f"{', '.join(str(x) for x in PEER.values())} (convnet and transformer "
        f"{', '.join(str(x) for x in PEER_LARGE.values())}), minibatches of {PEER_BATCH} (transformer 8 sequences). "
        "n is the size of the training set (of the transformer in characters). NaN: it stopped at one.\n\n"
        + peer_table(rows)
        + "\n"
        if rows[0]["peer"]
        else ""
    )
    curves = found["dependence"]["curves"]
    return (
        "# The learning coefficient of the function during training\n\n"
        f"`make bench-live`; torch {torch.__version__}, one thread, Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} processors.\nProcessor time (wall time) of the parts: {times}; "
        f"together {total[0]:.1f} ({total[1]:.1f}) minutes.\nSampler: {smaller}; convnet and transformer {larger}. "
        f"Probe: {PROBE} samples; convnet 256 images, transformer 16 sequences of 128 characters.\n\n"
        f"## Summary\n\n{summary(rows)}\n\n"
        "R-hat is the same split R-hat for both. Linear networks against Aoyagi's exact value at the present rank:\n\n"
        f"{exactness(rows)}\n\n## Reference runs\n\n"
        "± is one standard error. Half the effective rank is the coefficient were the divergence quadratic, at the "
        f"same nβ.\n\n{runs_table(rows)}\n{peers}\n"
        f"## Modular addition over seeds, at steps {MEMORISED:,} and {GENERALISED:,}\n\n"
        "Without weight decay it goes on memorising; with all pairs it never has to. Outputs: D in units of the "
        f"outputs' variance, at {COARSE:g} of each ({OUTPUTS_RESOLUTION:g} in all).\n\n"
        f"{seeds_table(found['seeds'])}\n\n"
        "## Dependence on resolution and spread\n\n"
        "Figure: docs/behavioral_llc.png. A question mark: not called reliable at one of the two stages (or, on exact "
        f"cases, there).\n\n{dependence_table(curves)}\n\n"
        "Exact cases under a factor 10 in the localization, which is 10^½ in the spread, with default draws:\n\n"
        f"{localization_table(found['dependence']['exact'])}\n"
    )


SECTIONS = ("runs", "seeds", "dependence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="modular additions that grok, and as many that do not")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="measure these parts anew, keep the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = ROOT / "benchmarks" / "results"
    file = results / "live.json"
    found = json.loads(file.read_text()) if file.exists() and arguments.only is not None else {"seconds": {}}
    measure: dict[str, Callable[[], Any]] = {
        "runs": runs,
        "seeds": functools.partial(seeds, arguments.seeds),
        "dependence": dependence,
    }
    for section in SECTIONS if arguments.only is None else arguments.only:
        clock = Clock()
        found[section] = measure[section]()
        found["seconds"][section] = clock.passed()
        file.write_text(json.dumps(found, indent=1) + "\n")
    # As read back, whether measured now or kept.
    found = json.loads(file.read_text())
    text = page(found)
    (results / "live.md").write_text(text)
    figure(found["dependence"]["curves"], ROOT / "docs" / "behavioral_llc.png")
    print(text)


if __name__ == "__main__":
    main()
