"""The reference runs: networks that are trained in seconds, at the checkpoints at which they are measured.

Fashion-MNIST is used where Debian's package dataset-fashion-mnist is installed.
"""

from __future__ import annotations

import copy
import functools
import gzip
import itertools
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cases import cross_entropy, deep_linear_network, half_squared_error
from torch import Tensor, nn
from torch.nn import functional

from phasewatch import Objective
from phasewatch.demo import BATCH, SMALL_START, STEPS
from phasewatch.estimators.enough import LARGE
from phasewatch.llc.behavioral import FINE

Batch = tuple[Tensor, ...]

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""
PROBE = 512
"""Samples of the probe, or positions of sequences: of more the product's signals look at no more."""
PEER_BATCH = 64

PRIME, WIDTH, TRAINED_ON = 53, 32, 0.35
MEMORISED, GENERALISED = 1_500, 10_000
Training = Literal["grokking", "no decay", "full data"]
MODES = (4.0, 1.5, 0.6)
LINEAR_STARTS = {(6, 6, 6): 0.001, (4, 8, 4): 0.001, (5, 6, 6, 5): 0.05}
LEARNT, UNSEEN = 0.9, 0.1
"""A mode is learnt from this share of its size on, and not seen up to this share of the fine resolution."""


@dataclass(frozen=True)
class Checkpoint:
    """A network at one step of its training, and what it is measured on.

    Attributes:
        training: The training set.
        probe: What the function is looked at on.
        held_out: What the network was not trained on, if there is such.
        exact: The learning coefficient where it is known.
        peer_batch: Rows that make up a minibatch of the peer.
    """

    run: str
    step: int
    module: nn.Module
    loss_fn: Callable[..., Tensor]
    training: Batch
    probe: Batch
    held_out: Batch | None = None
    exact: float | None = None
    stage: str = ""
    peer_batch: int = PEER_BATCH

    @functools.cached_property
    def objective(self) -> Objective:
        return Objective(self.module, [self.probe], loss_fn=self.loss_fn)

    @property
    def large(self) -> bool:
        return self.objective.num_parameters >= LARGE

    def training_loss(self) -> float:
        return self._loss(tuple(part[: len(self.probe[0])] for part in self.training))

    def held_out_loss(self) -> float | None:
        return None if self.held_out is None else self._loss(self.held_out)

    def _loss(self, batch: Batch) -> float:
        with torch.no_grad():
            return float(self.loss_fn(self.module, batch))


def train(
    module: nn.Module,
    data: Batch,
    loss_fn: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    keep: Sequence[int],
    batch: int | None,
    seed: int,
) -> Iterator[tuple[int, nn.Module]]:
    """The networks at the steps in ``keep``; batches are drawn with replacement, None is all of the data."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(max(keep) + 1):
        if step in keep:
            yield step, copy.deepcopy(module).eval()
        rows = torch.randint(len(data[0]), (batch,), generator=generator) if batch else slice(None)
        optimizer.zero_grad()
        loss_fn(module, tuple(part[rows] for part in data)).backward()
        optimizer.step()


def count_samples(data: Batch) -> int:
    """Labels, of sequences one at each position, or rows of targets."""
    targets = data[-1]
    return len(targets) if targets.is_floating_point() else targets.numel()


def first(data: Batch, count: int = PROBE) -> Batch:
    return tuple(part[:count] for part in data)


@functools.cache
def digits() -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def demo_network() -> nn.Module:
    """That of ``phasewatch demo``, with its start."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(SMALL_START)
    return module


def demo_run() -> Iterator[Checkpoint]:
    """The network of ``phasewatch demo``, with its start and its optimizer."""
    training, held_out = digits()
    module = demo_network()
    keep = (0, STEPS // 8, STEPS // 4, STEPS // 2, STEPS)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step, network in train(module, training, cross_entropy, optimizer, keep, BATCH, seed=0):
        yield Checkpoint("digits (demo)", step, network, cross_entropy, training, first(training), held_out)


def linear_run(widths: Sequence[int]) -> list[Checkpoint]:
    """One checkpoint for each rank that the network rests at, where the gradient is least: from a small start, each.

    It rests at a rank where that many modes are learnt and what there is of the others is below the fine resolution.
    """
    generator = torch.Generator().manual_seed(0)
    start, samples = LINEAR_STARTS[tuple(widths)], 4_000
    frames = [torch.linalg.qr(torch.randn(w, w, generator=generator))[0][:, :3] for w in (widths[-1], widths[0])]
    target = (frames[0] * torch.tensor(MODES)) @ frames[1].T
    x = torch.randn(samples, widths[0], generator=generator)
    y = x @ target.T + torch.randn(samples, widths[-1], generator=generator)
    module = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, start, generator=generator)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    plateaus: dict[int, tuple[float, Checkpoint]] = {}
    for step, network in train(module, (x, y), half_squared_error, optimizer, range(0, 4_001, 5), None, seed=0):
        product = network(torch.eye(widths[0])).T.detach()
        sizes = torch.linalg.svdvals(product)[: len(MODES)].tolist()
        rank = sum(size > LEARNT * mode for size, mode in zip(sizes, MODES, strict=True))
        # What a mode adds to the divergence is half its square.
        if any(size**2 / 2 > UNSEEN * FINE for size in sizes[rank:]):
            continue
        gradient = torch.autograd.grad(half_squared_error(network, (x, y)), list(network.parameters()))
        size = float(sum(part.square().sum() for part in gradient))
        if rank not in plateaus or size < plateaus[rank][0]:
            plateaus[rank] = (
                size,
                Checkpoint(
                    "linear " + "-".join(map(str, widths)),
                    step,
                    network,
                    half_squared_error,
                    (x, y),
                    first((x, y)),
                    exact=deep_linear_network(widths, rank)[0],
                    stage=f"rank {rank}",
                ),
            )
    return [plateaus[rank][1] for rank in sorted(plateaus)]


def convnet_run() -> Iterator[Checkpoint]:
    """Two convolutions with BatchNorm on Fashion-MNIST; measured in evaluation mode."""
    if not FASHION.exists():
        return

    def read(name: str, header: int) -> np.ndarray[Any, Any]:
        return np.frombuffer(gzip.decompress((FASHION / name).read_bytes()), np.uint8, offset=header)

    images = torch.tensor(read("train-images-idx3-ubyte.gz", 16)).view(-1, 1, 28, 28)[:12_000].float() / 255
    labels = torch.tensor(read("train-labels-idx1-ubyte.gz", 8))[:12_000].long()
    training, held_out = (images[:10_000], labels[:10_000]), (images[10_000:], labels[10_000:])
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for step, network in train(module, training, cross_entropy, optimizer, (30, 600), 64, seed=0):
        yield Checkpoint("convnet, Fashion-MNIST", step, network, cross_entropy, training, first(training), held_out)


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


@functools.cache
def characters() -> tuple[Batch, Batch]:
    """Sequences of 128 characters of the standard library's sources, and the next character at each position."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    text = "".join(file.read_text(errors="ignore") for file in files)
    # Printable ASCII, and 0 for everything else, line ends among it.
    codes = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in text])
    count = (len(codes) - 1) // 128
    x, y = codes[: 128 * count].view(-1, 128), codes[1 : 128 * count + 1].view(-1, 128)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (x[order[64:]], y[order[64:]]), (x[order[:64]], y[order[:64]])


def transformer_run() -> Iterator[Checkpoint]:
    """The next character of the standard library's sources."""
    training, held_out = characters()
    torch.manual_seed(0)
    module = Transformer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step, network in train(module, training, token_cross_entropy, optimizer, (30, 200), 16, seed=0):
        yield Checkpoint(
            "transformer, characters",
            step,
            network,
            token_cross_entropy,
            training,
            first(training, PROBE // 128),
            held_out,
            peer_batch=8,
        )


class ModularAddition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PRIME, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, PRIME)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(pairs).sum(1))))


@functools.cache
def modular_addition(kind: Training, seed: int) -> list[Checkpoint]:
    """At the start, after it has memorised, and after it has generalised, or at the same steps where it does not.

    Measured on pairs that it was not trained on, where there are such.
    """
    torch.manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    order = torch.randperm(len(pairs))
    data = pairs[order], pairs[order].sum(1) % PRIME
    cut = int(TRAINED_ON * len(pairs))
    if kind == "full data":
        training, held_out = data, None
    else:
        training, held_out = first(data, cut), tuple(part[cut:] for part in data)
    module = ModularAddition()
    decay = 0.0 if kind == "no decay" else 0.5
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=decay, betas=(0.9, 0.98))
    # With all pairs a step takes as many of them as the others see, drawn anew.
    batch = cut if kind == "full data" else None
    kept = train(module, training, cross_entropy, optimizer, (0, MEMORISED, GENERALISED), batch, seed)
    stages = ("start", "memorised", "generalised") if kind == "grokking" else ("start", "earlier", "later")
    return [
        Checkpoint(
            f"modular addition, {kind}",
            step,
            network,
            cross_entropy,
            training,
            first(held_out or training),
            held_out,
            stage=stage,
        )
        for (step, network), stage in zip(kept, stages, strict=True)
    ]


def wrong_labels(name: str, share: float) -> Iterator[Checkpoint]:
    """A share of the labels of 512 digits is drawn at random; what is held out has the right ones."""
    (x, y), held_out = digits()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(PROBE, generator=generator) < share
    labels = torch.where(drawn, torch.randint(10, (PROBE,), generator=generator), y[:PROBE])
    training = x[:PROBE], labels
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for step, network in train(module, training, cross_entropy, optimizer, (100, 400, 3_000), None, seed=0):
        yield Checkpoint(name, step, network, cross_entropy, training, training, held_out)


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
