"""Losses whose learning coefficient is known, and the formulas that say so.

Squared errors are half the squared distance a sample, so that the loss is a negative log-likelihood with unit noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from phasewatch.objective import Objective


def reduced_rank_regression(inputs: int, hidden: int, outputs: int, rank: int) -> tuple[float, int]:
    """Learning coefficient and multiplicity of a two-layer linear network (Aoyagi & Watanabe 2005)."""
    m, h, n, r = inputs, hidden, outputs, rank
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    if m + n < h + r:
        return m * n / 2, 1
    q = -((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * m + 2 * (h + r) * n + 2 * m * n
    return (q / 8, 1) if (m + h + n + r) % 2 == 0 else ((q + 1) / 8, 2)


def deep_linear_network(widths: Sequence[int], rank: int) -> tuple[float, int]:
    """Learning coefficient and multiplicity of a deep linear network (Aoyagi 2024)."""
    excess = [width - rank for width in widths]
    for size in range(2, len(excess) + 1):
        for chosen in itertools.combinations(range(len(excess)), size):
            inside = [excess[i] for i in chosen]
            outside = [excess[i] for i in range(len(excess)) if i not in chosen]
            total, ell = sum(inside), size - 1
            if total < ell * max(inside) or (outside and not max(inside) < min(outside) > total / ell):
                continue
            a = total - (math.ceil(total / ell) - 1) * ell
            pairs = sum(x * y for x, y in itertools.combinations(inside, 2))
            value = (
                (-(rank**2) + rank * (widths[0] + widths[-1])) / 2
                + a * (ell - a) / (4 * ell)
                - ell * (ell - 1) / 4 * (total / ell) ** 2
                + pairs / 2
            )
            return value, a * (ell - a) + 1
    raise AssertionError(f"no subset of {list(widths)} fits rank {rank}")


def half_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Negative log-likelihood with unit noise, without its constant."""
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()


def linear_network(
    widths: Sequence[int], rank: int, *, seed: int, samples: int = 5_000, batch_size: int = 500
) -> Objective:
    """White inputs, noiseless targets; every layer has the rank of the product, so that w* is the worst singular."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:, :rank] for width in widths]
    layers = []
    for before, after in itertools.pairwise(frames):
        layer = nn.Linear(len(before), len(after), bias=False)
        strengths = (1 + torch.rand(rank, generator=generator)) ** (1 / (len(widths) - 1))
        with torch.no_grad():
            layer.weight.copy_((after * strengths) @ before.T)
        layers.append(layer)
    network = nn.Sequential(*layers)
    inputs = torch.randn(samples, widths[0], generator=generator)
    targets = network(inputs).detach()
    batches = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
    return Objective(network, batches, loss_fn=half_squared_error)


class Parameters(nn.Module):
    """A bare vector of parameters, for losses written down directly."""

    def __init__(self, values: Sequence[float]) -> None:
        """Start at ``values``."""
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))
