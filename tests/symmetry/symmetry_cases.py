"""Networks whose zeros are known, and a nullity that owes nothing to phasewatch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from phasewatch.objective import Objective


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
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


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().flatten(1).sum(1).mean()


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def at_own_outputs(module: nn.Module, inputs: Tensor, batches: int = 1) -> Objective:
    """Squared error with the module's own outputs as targets: zero gradient, so that H is the Gauss-Newton matrix."""
    pairs = [(part, module(part).detach()) for part in inputs.chunk(batches)]
    return Objective(module, pairs, loss_fn=squared_error)


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
