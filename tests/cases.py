"""Networks, losses and data with exact answers: learning coefficients, curvatures, zeros, and the formulas that say so.

Squared errors are half the squared distance a sample, so that the loss is a negative log-likelihood with unit noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.nn import functional

from phasewatch.objective import LossFn, Objective

# Losses


def half_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Negative log-likelihood with unit noise, without its constant."""
    return 0.5 * (module(batch[0]) - batch[1]).square().flatten(1).sum(dim=1).mean()


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Negative log-likelihood of labels."""
    return functional.cross_entropy(module(batch[0]), batch[1])


# Networks and data


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def seeded(module: nn.Module, seed: int = 0, scale: float = 1.5) -> nn.Module:
    """The module in double precision with normal parameters, those of norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.double().named_parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(scale * draw / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.3 * draw + (1.0 if "weight" in name else 0.0))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def switching(inputs: Tensor, *widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A net in which every hidden unit is positive on 8 to 92 % of the samples."""
    for seed in range(500):
        module = seeded(mlp(*widths, activation=activation), seed, scale=1.0)
        hidden, shares = inputs, []
        for layer in list(module)[:-1]:
            hidden = layer(hidden)
            shares.append((hidden > 0).double().mean(0))
        share = torch.cat(shares[::2])
        if share.min() > 0.08 and share.max() < 0.92:
            return module
    raise AssertionError("no such net among 500")


def at_own_outputs(module: nn.Module, inputs: Tensor, batches: int = 1) -> Objective:
    """Squared error with the module's own outputs as targets: zero gradient, so that H is the Gauss-Newton matrix."""
    pairs = [(part, module(part).detach()) for part in inputs.chunk(batches)]
    return Objective(module, pairs, loss_fn=half_squared_error)


class Parameters(nn.Module):
    """A bare vector of parameters, for losses written down directly."""

    def __init__(self, values: Sequence[float]) -> None:
        """Start at ``values``."""
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def batched(module: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn, batch_size: int) -> Objective:
    """The objective on consecutive batches, in single precision."""
    targets = y.float() if y.is_floating_point() else y
    batches = list(zip(x.float().split(batch_size), targets.split(batch_size), strict=True))
    return Objective(module.float(), batches, loss_fn=loss_fn)


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


# Curvatures


class QuadraticForm(nn.Module):
    """A parameter ``w`` with the loss ``0.5 w' A w``."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.w = nn.Parameter(torch.linspace(-1, 1, len(matrix), dtype=matrix.dtype))


def planted(eigenvalues: Sequence[float], seed: int = 0) -> Objective:
    """A quadratic form with these eigenvalues in random directions."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T

    def loss_fn(module: nn.Module, _: Tensor) -> Tensor:
        return 0.5 * module.w @ (module.matrix @ module.w)

    return Objective(QuadraticForm((matrix + matrix.T) / 2), [torch.zeros(1)], loss_fn=loss_fn)


# Zeros


def dense_nullity(module: nn.Module, inputs: Tensor, softmax: bool = False, gap: float = 1e-9) -> int:
    """Parameters less the rank of the Jacobian by its singular values, none of which may lie below ``gap`` else."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(module, parameters, (inputs,))
        return logits.softmax(-1) if softmax else logits  # the softmax cannot tell apart what the loss cannot

    jacobian = torch.func.jacrev(outputs)(parameters)
    rows = next(iter(jacobian.values())).dim() - next(iter(parameters.values())).dim()
    matrix = torch.cat([jacobian[name].flatten(rows).flatten(0, rows - 1) for name in parameters], dim=1)
    values = torch.linalg.svdvals(matrix)
    values = torch.cat([values, values.new_zeros(max(matrix.shape[1] - len(values), 0))])
    relative = values / values[0]
    counts = [int((relative < threshold).sum()) for threshold in (1e-11, gap)]
    assert counts[0] == counts[1], "no gap: the case is ill conditioned"
    return counts[0]


class Attention(nn.Module):
    """Self-attention with projections of its own: grouped heads and rotary embeddings if wanted."""

    def __init__(
        self,
        inputs: int,
        heads: int,
        head: int,
        outputs: int,
        bias: bool,
        key_heads: int = 0,
        rotary: bool = False,
        by_hand: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.rotary, self.by_hand = heads, key_heads or heads, rotary, by_hand
        self.q_proj = nn.Linear(inputs, heads * head, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(inputs, self.key_heads * head, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(heads * head, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (self.key_heads, -1)).transpose(1, 2) for f in (self.k_proj, self.v_proj))
        if self.rotary:
            q, k = self._rotate(q), self._rotate(k)
        k, v = (z.repeat_interleave(self.heads // self.key_heads, dim=1) for z in (k, v))
        if self.by_hand:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            y = scores.softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequencies = 0.7 ** torch.arange(half, dtype=x.dtype)
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.cat([frequencies, frequencies])
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


# Learning coefficients


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


def local_reduced_rank(inputs: int, hidden: int, outputs: int, first: int, second: int, rank: int) -> tuple[float, int]:
    """Local learning coefficient where the layers have ranks ``first`` and ``second`` and their product ``rank``."""
    m, h, n, p, q, r = inputs, hidden, outputs, first, second, rank
    value, multiplicity = reduced_rank_regression(m - p, h - p - q + r, n - q, 0)
    return (r * (m + n - r) + (n - r) * (p - r) + (q - r) * (m - p)) / 2 + value, multiplicity


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


# Learning coefficients of functions, at a resolution


def white(samples: int, inputs: int, seed: int) -> Tensor:
    """Inputs whose second moments are the identity exactly."""
    x = torch.randn(samples, inputs, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(x)[0] * samples**0.5


def zero_network(inputs: int, hidden: int, outputs: int, seed: int) -> Objective:
    """Two linear layers, both zero."""
    net = nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs, bias=False))
    for weight in net.parameters():
        nn.init.zeros_(weight)
    x = white(64, inputs, seed)
    return Objective(net, [(x, torch.zeros(64, outputs))], loss_fn=half_squared_error)


def coefficient_of_zero_network(
    inputs: int, hidden: int, outputs: int, resolution: float, spread: float = 1.0
) -> float:
    """lambda at a resolution by quadrature, for one or two hidden units.

    The second layer is Gaussian for a given first one. What remains are the eigenvalues of a Wishart matrix (Muirhead
    1982, "Aspects of multivariate statistical theory", th. 3.2.18), on a logarithmic grid.
    """
    scale = spread**4 * (2 / inputs) * (2 / hidden)
    grid = np.exp(np.linspace(-25, math.log(inputs + 60), 400))
    if hidden == 1:
        values = grid[:, None]
        log_weights = inputs / 2 * np.log(grid) - grid / 2
    else:
        first, second = (axis.ravel() for axis in np.meshgrid(grid, grid))
        apart = first > second
        values = np.stack([first, second], axis=1)[apart]
        log_weights = ((inputs - 1) / 2 * np.log(values) - values / 2).sum(axis=1)
        log_weights += np.log(values[:, 0] - values[:, 1])

    def coefficient(log_nbeta: float) -> float:
        held = math.exp(log_nbeta) * scale * values
        log_density = log_weights - outputs / 2 * np.log1p(held).sum(axis=1)
        density = np.exp(log_density - log_density.max())
        energies = outputs / 2 * (held / (1 + held)).sum(axis=1)
        return float((density * energies).sum() / density.sum())

    log_nbeta = optimize.brentq(lambda x: coefficient(x) - resolution * math.exp(x), -5, 20)
    return coefficient(log_nbeta)


def regression(inputs: int, outputs: int, seed: int, dtype: torch.dtype = torch.float32) -> Objective:
    """A linear model of inputs of different sizes, on 200 samples."""
    torch.manual_seed(seed)
    net = nn.Linear(inputs, outputs, bias=False).to(dtype)
    x = (torch.randn(200, inputs) * torch.linspace(0.3, 2, inputs)).to(dtype)
    return Objective(net, [(x, torch.randn(200, outputs, dtype=dtype))], loss_fn=half_squared_error)


def coefficient_of_regression(objective: Objective, resolution: float) -> float:
    """lambda at a resolution: every direction counts as half of how far the divergence holds it."""
    x = objective.batches[0][0].double()
    outputs = objective.parameter_shapes["weight"][0]
    held = torch.linalg.eigvalsh(x.T @ x / len(x)).numpy() * 2 / x.shape[1]

    def coefficient(log_nbeta: float) -> float:
        stiff = math.exp(log_nbeta) * held
        return float(outputs / 2 * (stiff / (1 + stiff)).sum())

    return coefficient(optimize.brentq(lambda x: coefficient(x) - resolution * math.exp(x), -5, 20))
