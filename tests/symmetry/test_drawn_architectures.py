"""Architectures drawn at random, with degeneracies planted: the ledger must be the dense nullity to the last unit."""

from __future__ import annotations

import pytest
import torch
from cases import Attention, at_own_outputs, dense_nullity, mlp, normal, seeded
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phasewatch.symmetry import explain_zeros

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def agrees(module: nn.Module, inputs: Tensor) -> None:
    try:
        dense = dense_nullity(module, inputs)
    except AssertionError:
        assume(False)  # ill conditioned: there is no right answer
    ledger = explain_zeros(module, at_own_outputs(module, inputs))
    assert ledger.certified == dense, f"{dense}\n{ledger.table()}"
    try:
        dense_nullity(module, inputs, gap=1e-6)
    except AssertionError:
        return  # an eigenvalue is less than rounding, though not zero: it is counted, and rightly unexplained
    assert ledger.unexplained == 0, ledger.table()


def plant(module: nn.Sequential, fault: str, seed: int) -> None:
    """A degeneracy in the first hidden layer."""
    first, last = module[0], module[2]
    unit, other = seed % first.out_features, (seed + 1) % first.out_features
    with torch.no_grad():
        if fault == "dead":
            first.bias[unit] = -100.0
        elif fault == "always on":
            first.bias[unit], first.bias[other] = 30.0, 25.0
        elif fault == "zero outgoing":
            last.weight[:, unit] = 0
        elif fault == "zero incoming":
            first.weight[unit] = 0
            first.bias[unit].abs_()
        elif fault in ("parallel", "annihilating"):
            first.weight[unit], first.bias[unit] = 1.3 * first.weight[other], 1.3 * first.bias[other]
            if isinstance(module[1], nn.Tanh):
                first.weight[unit], first.bias[unit] = -first.weight[other], -first.bias[other]
            if fault == "annihilating":
                last.weight[:, unit] = 0.6 * last.weight[:, other]


@pytest.mark.slow
@SETTINGS
@given(
    widths=st.lists(st.integers(2, 7), min_size=3, max_size=4),
    activation=st.sampled_from([nn.ReLU, nn.LeakyReLU]),
    fault=st.sampled_from(["", "dead", "always on", "zero outgoing", "zero incoming", "parallel", "annihilating"]),
    seed=st.integers(0, 1000),
)
def test_piecewise_linear_nets(widths: list[int], activation: type[nn.Module], fault: str, seed: int) -> None:
    """Every unit that is not planted switches on at least 5 % of the samples."""
    inputs = normal(300, widths[0], seed=seed)
    module = seeded(mlp(*widths, activation=activation), seed, scale=1.0)
    hidden = inputs
    for layer in list(module)[:-1]:
        hidden = layer(hidden)
        if isinstance(layer, nn.Linear):
            share = (hidden > 0).double().mean(0)
            assume(share.min() > 0.05 and share.max() < 0.95)
    plant(module, fault, seed)
    agrees(module, inputs)


@pytest.mark.slow
@SETTINGS
@given(
    widths=st.lists(st.integers(2, 6), min_size=3, max_size=4),
    fault=st.sampled_from(["", "zero outgoing", "zero incoming", "parallel", "annihilating"]),
    seed=st.integers(0, 1000),
)
def test_tanh_nets(widths: list[int], fault: str, seed: int) -> None:
    module = seeded(mlp(*widths, activation=nn.Tanh), seed)
    plant(module, fault, seed)
    agrees(module, normal(300, widths[0], seed=seed))


@pytest.mark.slow
@SETTINGS
@given(
    widths=st.lists(st.integers(1, 6), min_size=3, max_size=5),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_nets(widths: list[int], bias: bool, seed: int) -> None:
    agrees(seeded(mlp(*widths, activation=nn.Identity, bias=bias), seed), normal(60, widths[0], seed=seed))


@pytest.mark.slow
@SETTINGS
@given(
    inputs=st.integers(4, 7),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 2),
    head=st.sampled_from([2, 4]),
    bias=st.booleans(),
    rotary=st.booleans(),
    by_hand=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention(
    inputs: int, groups: int, repeats: int, head: int, bias: bool, rotary: bool, by_hand: bool, seed: int
) -> None:
    """Heads no wider than what they read and write, as the formula wants it."""
    module = Attention(inputs, groups * repeats, head, 6, bias, groups, rotary, by_hand)
    assume(head <= inputs and not (bias and rotary))
    agrees(seeded(module, seed), normal(50, 5, inputs, seed=seed))


@pytest.mark.slow
@SETTINGS
@given(
    inputs=st.integers(3, 7),
    width=st.integers(3, 7),
    outputs=st.integers(2, 5),
    norm=st.sampled_from([nn.LayerNorm, nn.RMSNorm]),
    affine=st.booleans(),
    activation=st.sampled_from([nn.Identity, nn.Tanh]),
    seed=st.integers(0, 1000),
)
def test_norms(
    inputs: int,
    width: int,
    outputs: int,
    norm: type[nn.Module],
    affine: bool,
    activation: type[nn.Module],
    seed: int,
) -> None:
    layers = [
        nn.Linear(inputs, width),
        norm(width, eps=0.0, elementwise_affine=affine),
        activation(),
        nn.Linear(width, outputs),
    ]
    agrees(seeded(nn.Sequential(*layers), seed), normal(300, inputs, seed=seed))
