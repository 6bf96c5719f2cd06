"""Nullities known by theory against what phasewatch counts, certifies and brackets, on sizes drawn afresh.

Every row is a formula for the number of zero eigenvalues of the Hessian of squared error at zero residual (or as said).
The seed draws sizes and weights; another seed gives other instances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import phasewatch
from phasewatch.hessian import ZeroCount

Batch = tuple[Tensor, Tensor]
Instance = tuple[nn.Module, Tensor, int]


@dataclass(frozen=True)
class NullityRow:
    """One network: what theory says and what was found."""

    case: str
    parameters: int
    formula: int
    matrix: str
    dense: ZeroCount
    lanczos: ZeroCount
    deflated: ZeroCount
    certified: int
    unexplained: int

    @property
    def right(self) -> bool:
        """Whether the count is the formula to the last unit, the ledger complete and both brackets true."""
        exact = self.dense.lower == self.dense.upper == self.formula == self.certified and self.unexplained == 0
        return exact and all(z.lower <= self.formula <= z.upper for z in (self.lanczos, self.deflated))


def squared_error(module: nn.Module, batch: Batch) -> Tensor:
    """Half the mean squared distance."""
    return 0.5 * (module(batch[0]) - batch[1]).square().flatten(1).sum(1).mean()


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class Attention(nn.Module):
    """Self-attention with projections of its own."""

    def __init__(self, inputs: int, heads: int, head: int, outputs: int, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(inputs, heads * head, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(heads * head, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shape ``(batch, positions, outputs)``."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in projections)
        if self.rotary:
            q, k = _rotated(q), _rotated(k)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = 0.7 ** torch.arange(half, dtype=x.dtype)
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.cat([frequencies, frequencies])
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Drawn:
    """Sizes, weights and data from one seed."""

    def __init__(self, seed: int) -> None:
        self.numbers = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, low: int, high: int) -> int:
        """A size, both ends included."""
        return int(self.numbers.integers(low, high + 1))

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def weights(self, module: nn.Module, scale: float = 1.5) -> nn.Module:
        """The module with normal weights."""
        with torch.no_grad():
            for p in module.double().parameters():
                p.copy_(self.normal(*p.shape) * (scale / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.3))
        return module.eval()

    def mlp(self, *widths: int, act: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
        """A net, all its weights normal."""
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs, bias=bias), act()]
        net = nn.Sequential(*layers[:-1])
        self.weights(net)
        return net

    def switching(self, x: Tensor, *widths: int) -> nn.Sequential:
        """A ReLU net whose units are on for 8 to 92 % of the samples, and each together with each of the layer before.

        A unit that is never on while one before it is does not see it, which is a zero that the formulas leave out.
        """
        while True:
            net, hidden, on = self.mlp(*widths, act=nn.ReLU), x, []
            for layer in list(net)[:-1]:
                hidden = layer(hidden)
                on.append((hidden > 0).double())
            share = torch.cat([o.mean(0) for o in on[::2]])
            together = [a.T @ b for a, b in zip(on[::2], on[2::2], strict=False)]
            if share.min() > 0.08 and share.max() < 0.92 and all(t.min() > 5 for t in together):
                return net


def _rank(*factors: Tensor) -> int:
    return int(torch.linalg.matrix_rank(torch.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]))


def deep_linear(d: Drawn) -> Instance:
    """Any weights and data: N - [sum a_i b_i - sum a_i b_(i+1)]."""
    widths = [d.size(3, 8) for _ in range(4)]
    net, x = d.mlp(*widths, act=nn.Identity, bias=False), d.normal(40, 3) @ d.normal(3, widths[0])
    weights = [w.detach() for w in net.parameters()]
    after = [_rank(*weights[:i:-1]) if i + 1 < 3 else widths[-1] for i in range(3)]
    before = [_rank(*weights[:i][::-1], x.T) if i else _rank(x) for i in range(3)]
    rank = sum(a * b for a, b in zip(after, before, strict=True))
    rank -= sum(a * b for a, b in zip(after, before[1:], strict=False))
    return net, x, sum(w.numel() for w in weights) - rank


def bottleneck(d: Drawn) -> Instance:
    """Full-rank weights, bottleneck q: N - q (rank X + outputs - q)."""
    inputs, q, outputs = d.size(6, 9), d.size(2, 4), d.size(5, 8)
    net = d.mlp(inputs, q, outputs, act=nn.Identity, bias=False)
    return net, d.normal(40, inputs), q * (inputs + outputs) - q * (inputs + outputs - q)


def overparametrised(d: Drawn) -> Instance:
    """Two linear layers, width h beyond inputs and outputs: h (m + n) - [r2 n + m r1 - r2 r1]."""
    n, m = d.size(3, 5), d.size(2, 4)
    h = max(n, m) + d.size(1, 3)
    net = d.mlp(n, h, m, act=nn.Identity, bias=False)
    return net, d.normal(40, n), h * (m + n) - (m * n + m * n - m * n)


def relu(d: Drawn) -> Instance:
    """Every unit switches: the hidden widths."""
    widths = [d.size(4, 6), d.size(5, 9), d.size(4, 7), d.size(2, 4)]
    x = d.normal(600, widths[0])
    return d.switching(x, *widths), x, widths[1] + widths[2]


def softmax(d: Drawn) -> Instance:
    """ReLU under cross-entropy, GGN: the hidden widths and d_last + 1."""
    widths = [d.size(4, 6), d.size(5, 8), d.size(3, 5)]
    x = d.normal(500, widths[0])
    return d.switching(x, *widths), x, widths[1] + widths[1] + 1


def dead(d: Drawn) -> Instance:
    """A dead ReLU unit: d_in + 1 + d_out in place of its 1."""
    inputs, width, outputs = d.size(4, 7), d.size(5, 8), d.size(2, 4)
    x = d.normal(500, inputs)
    net = d.switching(x, inputs, width, outputs)
    net[0].bias.data[d.size(0, width - 1)] = -100.0
    return net, x, width - 1 + inputs + 1 + outputs


def always_on(d: Drawn) -> Instance:
    """K units that are always on: k^2 + k in place of k."""
    k, width = d.size(2, 4), d.size(7, 9)
    x = d.normal(500, 4)
    net = d.switching(x, 4, width, 6)
    net[0].bias.data[:k] = 20.0
    return net, x, width + k * k


def finite_data(d: Drawn) -> Instance:
    """Few samples, wide outputs: #alive + sum (d_in + 1 - rank of what the unit sees), no two units alike.

    Nor may a unit be able to do on its few samples what others do, which is one more zero each that the formula leaves
    out (and the ledger unexplained).
    """
    while True:
        inputs, width = d.size(5, 7), d.size(4, 6)
        outputs = width + d.size(2, 3)
        x = d.normal(3 * inputs, inputs)
        net = d.mlp(inputs, width, outputs, act=nn.ReLU)
        on, hidden = net[0](x) > 0, net[1](net[0](x)).detach()
        distinct = len({tuple(column.tolist()) for column in on.T}) == width
        if not (distinct and on.any(0).all() and not on.all(0).any() and _rank(hidden) == width):
            continue
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        extended = torch.cat([x, ones], 1)
        unseen = [inputs + 1 - _rank(extended[column]) for column in on.T]
        of_all = [torch.cat([extended * column[:, None], hidden, ones], 1) for column in on.T]
        # what a unit sees and what all units say are independent, but for what it says itself
        if all(m.shape[1] - _rank(m) == u + 1 for m, u in zip(of_all, unseen, strict=True)):
            return net, x, width + sum(unseen)


def tanh(d: Drawn) -> Instance:
    """A generic tanh net has none."""
    widths = d.size(3, 6), d.size(4, 7), d.size(1, 4)
    return d.mlp(*widths), d.normal(400, widths[0]), 0


def zero_outgoing(d: Drawn) -> Instance:
    """A tanh unit without outgoing weights: d_in + 1."""
    inputs, width = d.size(3, 6), d.size(4, 7)
    net = d.mlp(inputs, width, d.size(1, 4))
    net[2].weight.data[:, d.size(0, width - 1)] = 0
    return net, d.normal(400, inputs), inputs + 1


def zero_incoming(d: Drawn) -> Instance:
    """A tanh unit without incoming weights: d_out + 1."""
    width, outputs = d.size(4, 7), d.size(1, 4)
    net = d.mlp(5, width, outputs)
    net[0].weight.data[d.size(0, width - 1)] = 0
    return net, d.normal(400, 5), outputs + 1


def _parallel(d: Drawn, outputs: int, collinear: bool) -> tuple[nn.Sequential, Tensor, int]:
    inputs = d.size(3, 6)
    net = d.mlp(inputs, d.size(4, 7), outputs)
    net[0].weight.data[1], net[0].bias.data[1] = -net[0].weight.data[0], -net[0].bias.data[0]
    if collinear:
        net[2].weight.data[:, 1] = 0.7 * net[2].weight.data[:, 0]
    return net, d.normal(400, inputs), inputs


def parallel(d: Drawn) -> Instance:
    """A parallel pair of tanh units: d_out."""
    outputs = d.size(2, 4)
    net, x, _ = _parallel(d, outputs, False)
    return net, x, outputs


def annihilating(d: Drawn) -> Instance:
    """... with collinear outgoing weights: d_out + d_in + 1."""
    outputs = d.size(1, 4)
    net, x, inputs = _parallel(d, outputs, True)
    return net, x, outputs + inputs + 1


def layer_norm(d: Drawn) -> Instance:
    """Linear, LayerNorm without affine and epsilon, tanh: (d_in + 1) + 1."""
    inputs, width = d.size(4, 6), d.size(5, 7)
    norm = nn.LayerNorm(width, eps=0.0, elementwise_affine=False)
    net = nn.Sequential(nn.Linear(inputs, width), norm, nn.Tanh(), nn.Linear(width, 3))
    return d.weights(net), d.normal(400, inputs), inputs + 2


def affine_layer_norm(d: Drawn) -> Instance:
    """... with affine parameters, before ReLU: 1 a unit more."""
    inputs, width = d.size(4, 6), d.size(5, 7)
    x = d.normal(400, inputs)
    while True:
        layers = nn.Linear(inputs, width), nn.LayerNorm(width, eps=0.0), nn.ReLU(), nn.Linear(width, 3)
        net = nn.Sequential(*layers)
        d.weights(net)
        share = (net[:3](x) > 0).double().mean(0)
        if share.min() > 0.1 and share.max() < 0.9 and (net[1].weight.abs() > 0.05).all():
            return net, x, inputs + 2 + width


def _attention(d: Drawn, bias: bool, rotary: bool) -> tuple[nn.Module, Tensor, int, int]:
    inputs, heads, head = d.size(5, 8), d.size(1, 2), 4 if rotary else d.size(2, 4)
    net = d.weights(Attention(inputs, heads, head, d.size(4, 6), bias, rotary))
    return net, d.normal(50, 5, inputs), heads, head


def attention(d: Drawn) -> Instance:
    """No biases: 2 d_h^2 a head."""
    net, x, heads, head = _attention(d, False, False)
    return net, x, heads * 2 * head**2


def biased_attention(d: Drawn) -> Instance:
    """With biases: 2 d_h^2 + 2 d_h a head."""
    net, x, heads, head = _attention(d, True, False)
    return net, x, heads * (2 * head**2 + 2 * head)


def rotary_attention(d: Drawn) -> Instance:
    """Rotary embedding, no biases: d_h + d_h^2 a head."""
    net, x, heads, head = _attention(d, False, True)
    return net, x, heads * (head + head**2)


CASES: tuple[Callable[[Drawn], Instance], ...] = (
    *(deep_linear, bottleneck, overparametrised, relu, softmax, dead, always_on, finite_data, tanh, zero_outgoing),
    *(zero_incoming, parallel, annihilating, layer_norm, affine_layer_norm),
    *(attention, biased_attention, rotary_attention),
)


def rows(seed: int, instances: int) -> Iterator[NullityRow]:
    """Every case on so many instances; another seed draws others."""
    for number, case in enumerate(CASES):
        for instance in range(instances):
            d = Drawn(1000 * seed + 50 * number + instance)
            module, x, formula = case(d)
            loss_fn, targets, matrix = squared_error, module(x).detach(), "hessian"
            if case is softmax:
                loss_fn, matrix = cross_entropy, "gauss-newton"
                targets = torch.arange(len(x)) % targets.shape[-1]
            objective = phasewatch.Objective(module, [(x, targets)], loss_fn=loss_fn)
            ledger = phasewatch.explain_zeros(module, objective)
            assert ledger.unexplained is not None
            yield NullityRow(
                f"{case.__name__.replace('_', ' ')}",
                objective.num_parameters,
                formula,
                matrix,
                phasewatch.hessian_spectrum(objective, matrix).zeros,
                phasewatch.hessian_spectrum(objective, matrix, dense_below=0).zeros,
                phasewatch.hessian_spectrum(objective, matrix, dense_below=0, known_zeros=ledger.zero_space()).zeros,
                ledger.certified,
                ledger.unexplained,
            )


def two_white_layers(seed: int) -> NullityRow:
    """Noisy targets, white inputs, Eckart-Young minimum: h^2; of H only, as the residual is not zero."""
    d = Drawn(seed)
    inputs, width, outputs = d.size(5, 7), d.size(2, 3), d.size(5, 7)
    x = torch.linalg.qr(d.normal(60, inputs)).Q * math.sqrt(60)
    y = x @ d.normal(inputs, outputs) + d.normal(60, outputs)
    u, s, vh = torch.linalg.svd(y.T @ x / 60)
    net = d.mlp(inputs, width, outputs, act=nn.Identity, bias=False)
    first, second = net.parameters()
    first.data.copy_(s[:width].sqrt()[:, None] * vh[:width])
    second.data.copy_(u[:, :width] * s[:width].sqrt())
    objective = phasewatch.Objective(net, [(x, y)], loss_fn=squared_error)
    ledger = phasewatch.explain_zeros(net, objective)
    return NullityRow(
        "two linear layers, noisy, Eckart-Young",
        objective.num_parameters,
        width**2,
        "hessian",
        phasewatch.hessian_spectrum(objective).zeros,
        phasewatch.hessian_spectrum(objective, dense_below=0).zeros,
        phasewatch.hessian_spectrum(objective, "gauss-newton", dense_below=0, known_zeros=ledger.zero_space()).zeros,
        ledger.certified,
        ledger.unexplained or 0,
    )


def table(seed: int = 0, instances: int = 3) -> tuple[str, list[NullityRow]]:
    """All rows as Markdown, and how many are right."""
    found = [*rows(seed, instances), *(two_white_layers(1000 * seed + i) for i in range(instances))]
    lines = [
        "| case | N | matrix | formula | count | certified | unexplained | bracket | certified left out | right |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        brackets = " | ".join(f"[{z.lower}, {z.upper}]" for z in (r.lanczos, r.deflated))
        exact = r.dense.lower == r.dense.upper
        count = f"{r.dense.count}" if exact else f"{r.dense.count} in [{r.dense.lower}, {r.dense.upper}]"
        lines.append(
            f"| {r.case} | {r.parameters} | {r.matrix} | {r.formula} | {count} | {r.certified} | {r.unexplained} | "
            f"{brackets} | {'yes' if r.right else 'NO'} |"
        )
    right = sum(r.right for r in found)
    lines.append(f"\n{right} of {len(found)} instances are right to the last unit, with a ledger that explains all.")
    return "\n".join(lines), found


if __name__ == "__main__":
    print(table()[0])
