"""Losses whose learning coefficient is known, and the formulas that say so.

Squared errors are half the squared distance a sample, so that the loss is a negative log-likelihood with unit noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from phasewatch.objective import LossFn, Objective


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


def local_reduced_rank(inputs: int, hidden: int, outputs: int, first: int, second: int, rank: int) -> tuple[float, int]:
    """Local learning coefficient where the layers have ranks ``first`` and ``second`` and their product ``rank``."""
    m, h, n, p, q, r = inputs, hidden, outputs, first, second, rank
    value, multiplicity = reduced_rank_regression(m - p, h - p - q + r, n - q, 0)
    return (r * (m + n - r) + (n - r) * (p - r) + (q - r) * (m - p)) / 2 + value, multiplicity


def batched(module: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn, batch_size: int) -> Objective:
    """The objective on consecutive batches, in single precision."""
    targets = y.float() if y.is_floating_point() else y
    batches = list(zip(x.float().split(batch_size), targets.split(batch_size), strict=True))
    return Objective(module.float(), batches, loss_fn=loss_fn)


def _linear_layers(weights: Sequence[Tensor]) -> nn.Sequential:
    layers = [nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data.copy_(weight)
    return nn.Sequential(*layers)


def linear_network(
    widths: Sequence[int],
    rank: int,
    *,
    seed: int,
    samples: int = 5_000,
    batch_size: int = 500,
    input_scales: tuple[float, float] = (1.0, 1.0),
) -> Objective:
    """Noiseless targets; every layer has the rank of the product, so that w* is the worst singular.

    The standard deviations of the inputs go from one of ``input_scales`` to the other.
    """
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:, :rank] for width in widths]
    weights = []
    for before, after in itertools.pairwise(frames):
        strengths = (1 + torch.rand(rank, generator=generator)) ** (1 / (len(widths) - 1))
        weights.append((after * strengths) @ before.T)
    network = _linear_layers(weights)
    inputs = torch.randn(samples, widths[0], generator=generator) * torch.linspace(*input_scales, widths[0])
    return batched(network, inputs, network(inputs).detach(), half_squared_error, batch_size)


def two_linear_layers(
    inputs: int,
    hidden: int,
    outputs: int,
    first: int,
    second: int,
    rank: int,
    *,
    seed: int,
    samples: int = 10_000,
    batch_size: int = 500,
) -> Objective:
    """Noiseless; layers of ranks ``first`` and ``second`` that meet in ``rank`` hidden directions."""
    generator = torch.Generator().manual_seed(seed)
    left, middle, right = (
        torch.linalg.qr(torch.randn(width, width, generator=generator))[0] for width in (inputs, hidden, outputs)
    )
    strengths = [(1 + torch.rand(count, generator=generator)).sqrt() for count in (first, second)]
    read = [*range(rank), *range(first, first + second - rank)]
    weights = [
        (middle[:, :first] * strengths[0]) @ left[:, :first].T,
        (right[:, :second] * strengths[1]) @ middle[:, read].T,
    ]
    network = _linear_layers(weights)
    x = torch.randn(samples, inputs, generator=generator)
    return batched(network, x, network(x).detach(), half_squared_error, batch_size)


def noisy_bottleneck(
    inputs: int, hidden: int, outputs: int, *, seed: int, samples: int = 10_000, batch_size: int = 500
) -> Objective:
    """Two linear layers at the minimum for noisy targets (Eckart-Young).

    lambda = hidden (inputs + outputs - hidden) / 2: all zeros of the Hessian there belong to the change of basis of the
    hidden layer.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    x *= torch.linspace(0.5, 1.5, inputs, dtype=torch.float64)
    teacher = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((hidden, inputs), (outputs, hidden))
    ]
    y = x @ (teacher[1] @ teacher[0]).T / hidden**0.5
    y += torch.randn(y.shape, generator=generator, dtype=torch.float64)
    solution = torch.linalg.lstsq(x, y).solution.T
    directions = torch.linalg.svd(x @ solution.T, full_matrices=False)[2][:hidden]
    return batched(_linear_layers([directions @ solution, directions.T]), x, y, half_squared_error, batch_size)


def noisy_regression(
    inputs: int, outputs: int, *, seed: int, samples: int = 10_000, batch_size: int = 500
) -> Objective:
    """Linear regression at its least-squares solution; lambda = inputs * outputs / 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    x *= torch.linspace(0.4, 1.6, inputs, dtype=torch.float64)
    y = x @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    y += torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return batched(_linear_layers([torch.linalg.lstsq(x, y).solution.T]), x, y, half_squared_error, batch_size)


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Negative log-likelihood of labels."""
    return functional.cross_entropy(module(batch[0]), batch[1])


def logistic_regression(
    inputs: int, classes: int, *, seed: int, samples: int = 10_000, batch_size: int = 500
) -> Objective:
    """At its maximum-likelihood solution; lambda = (inputs + 1)(classes - 1) / 2, as the softmax takes no shift."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    teacher = torch.randn(classes, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    labels = torch.multinomial(torch.softmax(x @ teacher.T, dim=1), 1, generator=generator)[:, 0]
    module = nn.Linear(inputs, classes).double()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    descend(module, x, labels, cross_entropy)
    return batched(module, x, labels, cross_entropy, batch_size)


def descend(module: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn, steps: int = 400) -> None:
    """Go to a minimum by L-BFGS."""
    optimizer = torch.optim.LBFGS(
        module.parameters(),
        max_iter=steps,
        history_size=30,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(module, (x, y))
        loss.backward()
        return loss

    optimizer.step(closure)


def monomial(exponents: Sequence[int]) -> Objective:
    """The normal crossing w_1^(2 k_1) w_2^(2 k_2) ... at the origin."""

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        powers = [weight ** (2 * k) for weight, k in zip(module.values, exponents, strict=True)]
        return torch.stack(powers).prod() + 0 * batch.sum()

    return Objective(Parameters([0.0] * len(exponents)), [torch.zeros(1)], loss_fn=loss_fn)


def monomial_expectation(exponents: tuple[int, int], nbeta: float, localization: float) -> float:
    """What perfect sampling gives for two weights, by quadrature; tends to min 1 / (2 k) so slowly that it matters."""
    grid = np.exp(np.linspace(math.log(1e-7), math.log(12 / math.sqrt(localization)), 3_000))
    first, second = grid[:, None], grid[None, :]
    energy = nbeta * first ** (2 * exponents[0]) * second ** (2 * exponents[1])
    density = np.exp(-energy - localization * (first**2 + second**2) / 2) * first * second  # the grid is logarithmic
    return float((energy * density).sum() / density.sum())


class Parameters(nn.Module):
    """A bare vector of parameters, for losses written down directly."""

    def __init__(self, values: Sequence[float]) -> None:
        """Start at ``values``."""
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))
