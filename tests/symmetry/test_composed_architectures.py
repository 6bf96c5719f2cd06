"""Networks composed at random, attention to output, with a degeneracy planted in any layer, against dense nullities."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cases import Attention, at_own_outputs, dense_nullity, normal, seeded
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phasewatch.symmetry import explain_zeros

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "linear": nn.Identity,
}
FAULTS = ("", "dead", "zero outgoing", "zero incoming", "parallel", "annihilating")


class Block(NamedTuple):
    """A layer: linear, norm, activation."""

    width: int
    norm: str
    activation: str
    bias: bool


class Heads(NamedTuple):
    """An attention in front."""

    heads: int
    repeats: int
    bias: bool
    rotary: bool


blocks = st.builds(
    Block,
    st.integers(5, 8),
    st.sampled_from(["", "", "layer", "rms", "batch"]),
    st.sampled_from(list(ACTIVATIONS)),
    st.booleans(),
)
heads = st.none() | st.builds(Heads, st.integers(1, 2), st.integers(1, 2), st.booleans(), st.booleans())


def build(attention: Heads | None, layers: list[Block], outputs: int) -> tuple[nn.Sequential, int, list[int]]:
    """The network, the width of its inputs, and where its linear layers stand."""
    modules: list[nn.Module] = []
    width = inputs = 6
    if attention is not None:
        count, inputs, width = attention.heads * attention.repeats, 7, min(2 * attention.heads, 4)
        modules.append(Attention(7, count, 2, width, attention.bias, attention.heads, attention.rotary))
    linear = []
    for block in layers:
        linear.append(len(modules))
        modules.append(nn.Linear(width, block.width, bias=block.bias))
        if block.norm == "layer":
            modules.append(nn.LayerNorm(block.width, eps=0.0))
        elif block.norm == "rms":
            modules.append(nn.RMSNorm(block.width, eps=0.0))
        elif block.norm == "batch" and attention is None:
            modules.append(nn.BatchNorm1d(block.width))
        modules.append(ACTIVATIONS[block.activation]())
        width = block.width
    linear.append(len(modules))
    modules.append(nn.Linear(width, outputs))
    return nn.Sequential(*modules), inputs, linear


def plant(net: nn.Sequential, linear: list[int], layers: list[Block], where: int, fault: str) -> None:
    """A degeneracy in one layer, where its activation can have it."""
    where %= len(layers)
    block = layers[where]
    first, last = net[linear[where]], net[linear[where + 1]]
    homogeneous = block.activation in ("relu", "leaky relu", "linear")
    with torch.no_grad():
        if fault == "dead":
            assume(block.activation == "relu" and not block.norm and block.bias)
            first.bias[1] = -100.0
        elif fault == "zero outgoing":
            # Behind a norm that many units share, the others may make room for what such a unit does to it.
            assume(not homogeneous and block.norm not in ("layer", "rms"))
            last.weight[:, 1] = 0
        elif fault == "zero incoming":
            assume(not homogeneous and not block.norm)
            first.weight[1] = 0
        elif fault:
            assume(not homogeneous and not block.norm)
            for parameter in first.parameters():
                parameter[1] = parameter[0]
            if fault == "annihilating":
                last.weight[:, 1] = 0.6 * last.weight[:, 0]


def every_unit_switches(net: nn.Sequential, x: Tensor) -> bool:
    for module in net:
        x = module(x)
        if isinstance(module, (nn.ReLU, nn.LeakyReLU)):
            share = (x > 0).double().flatten(0, -2).mean(0)
            if share.min() < 0.05 or share.max() > 0.95:
                return False
    return bool(x.isfinite().all())


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    attention=heads,
    layers=st.lists(blocks, min_size=1, max_size=3),
    outputs=st.integers(2, 4),
    where=st.integers(0, 2),
    fault=st.sampled_from(FAULTS),
    seed=st.integers(0, 1000),
)
def test_composed(
    attention: Heads | None, layers: list[Block], outputs: int, where: int, fault: str, seed: int
) -> None:
    # A norm without activation, of what attention has narrowed to two dimensions before, is left unexplained in part.
    assume(attention is None or not any(block.norm and block.activation == "linear" for block in layers))
    # Nor are all zeros of a norm with nothing but a linear layer between it and another norm.
    assume(not any(a.norm and b.norm and a.activation == "linear" for a, b in zip(layers, layers[1:], strict=False)))
    net, inputs, linear = build(attention, layers, outputs)
    seeded(net, seed, scale=1.0)
    x = normal(300, inputs, seed=seed) if attention is None else normal(60, 5, inputs, seed=seed)
    assume(every_unit_switches(net, x))
    plant(net, linear, layers, where, fault)
    try:
        dense = dense_nullity(net, x)
    except AssertionError:
        assume(False)  # ill conditioned: there is no right answer
    ledger = explain_zeros(net, at_own_outputs(net, x))
    assert ledger.certified == dense, f"{net}\n{fault or 'nothing planted'}: {dense}\n{ledger.table()}"
