"""The space of certified zeros, and brackets of what is outside of it."""

from __future__ import annotations

import pytest
import torch
from cases import Attention, at_own_outputs, half_squared_error, mlp, normal, seeded, switching

import phasewatch
from phasewatch.hessian import HessianOperator
from phasewatch.objective import Objective


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_space_is_orthonormal_and_of_zeros(seed: int) -> None:
    x = normal(400, 5, seed=seed)
    module = switching(x, 5, 9, 6, 4)
    module[0].bias.data[seed] = -100.0
    objective = at_own_outputs(module, x)
    ledger = phasewatch.explain_zeros(module, objective)
    space = ledger.zero_space()
    assert space.shape == (ledger.certified, objective.num_parameters)
    assert torch.allclose(space @ space.T, torch.eye(len(space), dtype=space.dtype), atol=1e-10)
    hessian = HessianOperator(objective).dense()
    assert (hessian @ space.T).norm() < 1e-8 * hessian.norm()


@pytest.mark.parametrize("seed", range(4))
def test_bracket_outside_of_the_certified_zeros_is_the_narrower_one(seed: int) -> None:
    """At 99 % coverage and four fixed seeds, two brackets each."""
    module = seeded(Attention(8, 2, 4, 6, bias=True), seed)
    objective = at_own_outputs(module, normal(50, 5, 8, seed=seed))
    ledger = phasewatch.explain_zeros(module, objective)
    truth = 2 * (2 * 4**2 + 2 * 4)
    assert ledger.nullity == truth
    plain = phasewatch.hessian_spectrum(objective, dense_below=0, seed=seed).zeros
    narrow = phasewatch.hessian_spectrum(objective, dense_below=0, seed=seed, known_zeros=ledger.zero_space()).zeros
    assert plain.lower <= truth <= plain.upper
    assert narrow.lower == narrow.certified == truth <= narrow.upper
    assert narrow.upper - narrow.lower <= (plain.upper - plain.lower) / 2


def test_count_is_exact_where_nothing_else_is_near_zero() -> None:
    """Linear layers with singular values between 1 and 2, white inputs: h^2 zeros of 800, all others well above."""
    width = 10
    module = mlp(40, width, 40, activation=torch.nn.Identity, bias=False)
    with torch.no_grad():
        for weight in module.parameters():
            left, _, right = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(left * torch.linspace(1, 2, width, dtype=torch.float64) @ right)
    x = torch.linalg.qr(normal(60, 40)).Q * 60**0.5
    objective = at_own_outputs(module, x)
    space = phasewatch.explain_zeros(module, objective).zero_space()
    zeros = phasewatch.hessian_spectrum(objective, dense_below=0, known_zeros=space).zeros
    assert zeros.lower == zeros.count == 100
    assert zeros.upper <= 110  # each leading pair that is not exact may be wrong about one
    assert zeros.resolved


def test_what_is_no_zero_is_refused() -> None:
    x = normal(300, 4)
    module = switching(x, 4, 6, 3)
    away = Objective(module, [(x, normal(300, 3, seed=5))], loss_fn=half_squared_error)
    space = phasewatch.explain_zeros(module, away).zero_space()
    phasewatch.hessian_spectrum(away, "gauss-newton", dense_below=0, known_zeros=space)
    with pytest.raises(ValueError, match="only where the gradient is zero"):
        phasewatch.hessian_spectrum(away, dense_below=0, known_zeros=space)
    with pytest.raises(ValueError, match="orthonormal rows"):
        phasewatch.hessian_spectrum(away, "gauss-newton", dense_below=0, known_zeros=2 * space)
    with pytest.raises(ValueError, match="known_zeros has shape"):
        phasewatch.hessian_spectrum(away, dense_below=0, known_zeros=space[:, 1:])


@pytest.mark.parametrize(("inputs", "width", "heads"), [(48, 60, 4), (30, 40, 2)])
def test_ledger_of_a_large_net_is_what_theory_says(inputs: int, width: int, heads: int) -> None:
    """Attention with biases, a linear layer, tanh: heads 2 d^2 + 2 d each; between the two linear layers w^2 + w."""
    head = inputs // heads
    net = torch.nn.Sequential(
        Attention(inputs, heads, head, inputs, bias=True), torch.nn.Linear(inputs, width), torch.nn.Tanh(),
        torch.nn.Linear(width, 5),
    )  # fmt: skip
    seeded(net, scale=1.0)
    objective = at_own_outputs(net, normal(60, 6, inputs))
    ledger = phasewatch.explain_zeros(net, objective, dense_below=0)
    expected = heads * (2 * head**2 + 2 * head) + inputs**2 + inputs
    assert ledger.generic == expected, ledger.table()
    assert ledger.certified == max(expected, objective.num_parameters - 60 * 6 * 5)
    assert ledger.unknown == ()
