"""The effective rank against eigenvalues of the divergence's Hessian, and error bars against many seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import cross_entropy, half_squared_error, mlp, normal
from torch import Tensor, nn

from phasewatch.hessian import EffectiveRank, HessianOperator, effective_rank
from phasewatch.hessian.effective_rank import _Direction, _hidden
from phasewatch.hessian.lanczos import lanczos
from phasewatch.objective import Objective


def spread_of(objective: Objective) -> Tensor:
    """By tensor: its root mean square, and not less than one over the root of its fan-in."""
    pieces = objective.unflatten(objective.parameters)
    widths = [
        max(float(p.square().mean().sqrt()), p[0].numel() ** -0.5 if p.dim() > 1 else 0.1) for p in pieces.values()
    ]
    return torch.cat([torch.full_like(p.flatten(), width) for p, width in zip(pieces.values(), widths, strict=True)])


class Attention(nn.Module):
    """One head over five tokens, a norm and a readout of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.readout = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.norm(x + self.attend(x, x, x, need_weights=False)[0]).mean(1))


def of_kind(kind: str) -> Objective:
    torch.manual_seed(3)
    if kind == "linear":
        return Objective(
            mlp(9, 7, 5, activation=nn.Identity), [(normal(60, 9), normal(60, 5, seed=1))], loss_fn=half_squared_error
        )
    labels = torch.arange(60) % 4
    if kind == "attention":
        parts = [(normal(30, 5, 8, seed=2), labels[:30]), (normal(20, 5, 8, seed=3), labels[:20])]
        return Objective(Attention().double(), parts, loss_fn=cross_entropy)
    layers = [
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    ]
    net = nn.Sequential(*layers).double()
    net(normal(60, 1, 8, 8, seed=5))  # so that the running means are those of data
    return Objective(net.eval(), [(normal(60, 1, 8, 8, seed=4), labels)], loss_fn=cross_entropy)


def matrix_of(objective: Objective) -> Tensor:
    """The whitened matrix by another way: the Hessian of the divergence at its start."""
    spread = spread_of(objective)
    return spread[:, None] * HessianOperator(objective.behavioral()).dense() * spread


def exact(matrix: Tensor, nbeta: float) -> Tensor:
    """The diagonal of ``A (A + 1/b)^-1``."""
    return torch.linalg.solve(matrix + torch.eye(len(matrix)) / nbeta, matrix).diagonal()


KINDS = pytest.mark.parametrize("kind", ["linear", "convolution", "attention"])


@KINDS
def test_of_small_networks_is_exact_in_all_and_by_layer(kind: str) -> None:
    objective = of_kind(kind)
    matrix = matrix_of(objective)
    rank = effective_rank(objective, spread_of(objective), 100.0)
    for nbeta in (100.0, 3.0, 1e5):
        diagonal = exact(matrix, nbeta)
        found = rank.at(nbeta)
        assert found.value == pytest.approx(float(diagonal.sum()), rel=1e-6)
        assert found.converged and found.standard_error == found.quadrature_error == 0.0
        by_layer: dict[str, float] = {}
        pieces = objective.unflatten(diagonal)
        for name, piece in pieces.items():
            layer = name.rpartition(".")[0]
            by_layer[layer] = by_layer.get(layer, 0.0) + float(piece.sum())
        assert {k: v.value for k, v in found.by_layer.items()} == pytest.approx(by_layer, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("dense_below", [0, 1000])
def test_layers_need_not_be_told_apart(dense_below: int) -> None:
    """The rank is the same, from all eigenvalues and from the same products."""
    objective = of_kind("attention")
    whole, by_layer = (
        effective_rank(objective, spread_of(objective), 100.0, dense_below=dense_below, by_layer=told)
        for told in (False, True)
    )
    assert whole.value == pytest.approx(by_layer.value, rel=1e-6)
    assert whole.at(3.0).value == pytest.approx(by_layer.at(3.0).value, rel=1e-6)
    assert whole.on_half == pytest.approx(by_layer.on_half, rel=1e-6)
    assert by_layer.by_layer and not whole.by_layer


@pytest.mark.slow
@KINDS
def test_sampled_it_lies_within_its_errors(kind: str) -> None:
    """Of 20 seeds at least 15 within two standard errors, in all and by layer; false failure 3e-4 each at 95 %."""
    objective = of_kind(kind)
    spread = spread_of(objective)
    truth = effective_rank(objective, spread, 300.0, check_probe=False)
    inside, inside_by_layer, errors = 0, dict.fromkeys(truth.by_layer, 0), []
    for seed in range(20):
        found = effective_rank(objective, spread, 300.0, seed=seed, dense_below=0, check_probe=False)
        assert found.products <= 64 < objective.num_parameters
        assert sum(layer.value for layer in found.by_layer.values()) == pytest.approx(found.value, rel=1e-9)
        assert set(found.by_layer) == set(truth.by_layer)
        inside += abs(found.value - truth.value) <= 2 * found.standard_error + found.quadrature_error + 1e-9
        for name, layer in found.by_layer.items():
            error = abs(layer.value - truth.by_layer[name].value)
            inside_by_layer[name] += error <= 2 * layer.standard_error + found.quadrature_error + 1e-9
        errors.append(found.value / truth.value - 1)
    assert inside >= 15 and min(inside_by_layer.values()) >= 15
    assert np.sqrt(np.mean(np.square(errors))) < 0.08


def regression(curvatures: Tensor, samples: int = 1) -> Objective:
    """A linear model whose whitened curvatures are these, and zero in as many directions again as it has."""
    rows = torch.diag((curvatures * len(curvatures)).sqrt())
    basis = torch.linalg.qr(normal(400, 400)).Q[: len(curvatures)]
    inputs = (rows @ basis).repeat(samples, 1)
    return Objective(
        nn.Linear(400, 1, bias=False).double(), [(inputs, torch.zeros(len(inputs), 1))], loss_fn=half_squared_error
    )


def test_few_large_eigenvalues_are_not_missed_without_a_word() -> None:
    """Eight equal ones, which a Lanczos run sees as one: within three standard errors for all of 30 seeds."""
    objective = regression(
        torch.full((8,), 1.0, dtype=torch.float64) * torch.linspace(0.99, 1.01, 8, dtype=torch.float64)
    )
    expected = 8 / (1 + 1 / 50.0)
    for seed in range(30):
        found = effective_rank(objective, torch.ones(400), 50.0, seed=seed, dense_below=0, check_probe=False)
        assert abs(found.value - expected) <= 3 * found.standard_error + found.quadrature_error + 1e-3
        assert found.standard_error < 0.05 * expected


def test_rules_enclose_the_quadratic_form() -> None:
    """At every number of steps, from both sides, for a spectrum over eight decades."""
    eigenvalues = 10.0 ** torch.linspace(-8, 0, 200, dtype=torch.float64)
    start = normal(200)
    start /= start.norm()

    class Diagonal:
        def __matmul__(self, vector: Tensor) -> Tensor:
            return eigenvalues * vector

    for nbeta in (10.0, 1e4):
        truth = float((start.square() * nbeta * eigenvalues / (nbeta * eigenvalues + 1)).sum())
        widths = []
        for steps in (1, 2, 5, 15, 40):
            run = lanczos(Diagonal(), start, steps)
            seen = _Direction.of_run(run, 1)
            gauss, radau = seen.gauss.image(nbeta), seen.radau.image(nbeta)
            assert radau[0] - 1e-12 <= truth <= gauss[0] + 1e-12
            widths.append(gauss[0] - radau[0])
        assert widths == sorted(widths, reverse=True) and widths[-1] < 0.2 * truth


def test_one_density_serves_all_resolutions() -> None:
    objective = of_kind("linear")
    spread = spread_of(objective)
    rank = effective_rank(objective, spread, 100.0)
    trace = float(matrix_of(objective).trace())
    for epsilon in (0.3 * trace, 1e-2, 1e-5):
        found = rank.at_resolution(epsilon)
        assert found.value / (2 * found.nbeta) == pytest.approx(epsilon, rel=1e-6)
        assert found.value == pytest.approx(float(exact(matrix_of(objective), found.nbeta).sum()), rel=1e-5)
    nothing = rank.at_resolution(0.51 * trace)  # on average half the trace under the prior alone
    assert (nothing.value, nothing.nbeta) == (0.0, 0.0)
    sampled = effective_rank(objective, spread, 100.0, dense_below=0, check_probe=False)
    for nbeta in (1.0, 10.0, 1000.0):
        error = abs(sampled.at(nbeta).value - rank.at(nbeta).value)
        rounding = 1e-13 * rank.at(nbeta).value
        assert error <= 3 * sampled.at(nbeta).standard_error + sampled.at(nbeta).quadrature_error + rounding


def of_single_precision(eigenvalues: Tensor) -> Objective:
    """As many samples as there are eigenvalues, of 3,000 inputs."""
    size = len(eigenvalues)
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0] for rows in (size, 3000)
    )
    inputs = (left * (size * eigenvalues).sqrt()) @ right.T
    module = nn.Linear(3000, 1, bias=False)
    return Objective(module, [(inputs.float(), torch.zeros(size, 1))], loss_fn=half_squared_error)


@pytest.mark.parametrize("nbeta", [1e5, 1e6])
@pytest.mark.parametrize("max_products", [64, 200])
def test_rounding_passes_for_no_rank(nbeta: float, max_products: int) -> None:
    """400 samples of 3,000 inputs, with eigenvalues from 50 down to 1e-8; single precision adds noise beyond 1e-5.

    Long runs see that noise in each of 3,000 directions, and took it for a rank of 1,025 in the place of 317.
    """
    eigenvalues = torch.logspace(np.log10(50), -8, 400, dtype=torch.float64)
    objective = of_single_precision(eigenvalues)
    exact = float((nbeta * eigenvalues / (1 + nbeta * eigenvalues)).sum())
    found = effective_rank(
        objective, torch.ones(3000), nbeta, max_products=max_products, check_probe=False, by_layer=False
    )
    assert abs(found.value - exact) <= 3 * found.standard_error + found.quadrature_error
    assert found.value <= 400 and (not found.converged or abs(found.value - exact) <= 0.1 * exact)


def test_where_rounding_is_in_the_way_no_products_are_spent_on_it() -> None:
    """As above: of 400 products all were spent on the noise, a run of a single one each."""
    eigenvalues = torch.logspace(np.log10(50), -8, 400, dtype=torch.float64)
    objective, settings = of_single_precision(eigenvalues), {"max_products": 400, "check_probe": False}
    found = effective_rank(objective, torch.ones(3000), 1e6, **settings)
    assert found.products < 300 and not found.converged
    assert found.reasons[0].endswith(" for rounding; double precision would narrow it")
    exact = float((1e6 * eigenvalues / (1 + 1e6 * eigenvalues)).sum())
    assert abs(found.value - exact) <= 3 * found.standard_error + found.quadrature_error
    double = effective_rank(objective.to(torch.float64), torch.ones(3000), 1e6, **settings)
    assert double.converged and abs(double.value - exact) <= 3 * double.standard_error + double.quadrature_error


@pytest.mark.parametrize("seed", range(3))
def test_many_small_eigenvalues_beside_a_large_one_are_seen_once_it_is_out(seed: int) -> None:
    """In units of 1/b one of 3e5 and 400 of up to 1, which couple a random direction of 3,000 no more than by 0.2.

    Rounding of the largest may pass for 0.07; runs that took couplings of 1 for zero were of a single step each.
    """
    eigenvalues = torch.cat([torch.tensor([3e5], dtype=torch.float64), torch.linspace(0.05, 1, 400).double()])
    exact = float((eigenvalues / (1 + eigenvalues)).sum())
    found = effective_rank(
        of_single_precision(eigenvalues), torch.ones(3000), 1.0, seed=seed, max_products=400, check_probe=False
    )
    assert min(len(direction.diagonal) for direction in found.spectrum.directions) > 1
    assert found.converged and abs(found.value - exact) <= 3 * found.standard_error + found.quadrature_error


def test_rescaling_a_layer_with_its_spread_changes_nothing() -> None:
    torch.manual_seed(0)
    net = mlp(6, 8, 3, activation=nn.ReLU)
    before = Objective(net, [(normal(50, 6), torch.arange(50) % 3)], loss_fn=cross_entropy)
    rank = effective_rank(before, spread_of(before), 200.0)
    factors = {"0.weight": 2.0, "0.bias": 2.0, "2.weight": 0.5, "2.bias": 1.0}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(factors[name])
    after = Objective(net, [(normal(50, 6), torch.arange(50) % 3)], loss_fn=cross_entropy)
    spread = torch.cat(
        [f * p.flatten() for f, p in zip(factors.values(), before.unflatten(spread_of(before)).values(), strict=True)]
    )
    assert effective_rank(after, spread, 200.0).value == pytest.approx(rank.value, rel=1e-8)


@pytest.mark.parametrize("dense_below", [0, 1000])
@pytest.mark.parametrize("num_batches", [1, 4])
def test_a_probe_that_is_too_small_is_said(dense_below: int, num_batches: int) -> None:
    """A linear model sees as many directions as it has samples, or inputs, whichever is less."""

    def rank_of(samples: int, features: int) -> EffectiveRank:
        x = normal(samples, features)
        batches = [(part, torch.zeros(len(part), 1)) for part in x.chunk(num_batches)]
        objective = Objective(nn.Linear(features, 1, bias=False).double(), batches, loss_fn=half_squared_error)
        return effective_rank(objective, torch.ones(features), 1e4, dense_below=dense_below, tolerance=0.01)

    small, large = rank_of(40, 300), rank_of(2000, 10)
    assert small.limited_by_probe is True and any("limited by the probe" in reason for reason in small.reasons)
    assert large.limited_by_probe is False and not large.reasons
    assert small.value == pytest.approx(40, rel=0.02) and large.value == pytest.approx(10, rel=0.05)


def test_too_few_products_are_said() -> None:
    """Curvatures over six decades, of which 16 products cannot tell the small ones."""
    objective = regression(10.0 ** torch.linspace(-6, 0, 300, dtype=torch.float64))
    found = effective_rank(objective, torch.ones(400), 1e5, dense_below=0, max_products=16, check_probe=False)
    assert not found.converged and "more products" in found.reasons[0]
    truth = effective_rank(objective, torch.ones(400), 1e5, check_probe=False)
    assert abs(found.value - truth.value) < found.quadrature_error + 3 * found.standard_error


def test_arguments_are_checked() -> None:
    objective = of_kind("linear")
    spread = spread_of(objective)
    with pytest.raises(ValueError, match="expected shape"):
        effective_rank(objective, spread[:-1], 1.0)
    with pytest.raises(ValueError, match="standard deviation"):
        effective_rank(objective, -spread, 1.0)
    with pytest.raises(ValueError, match="nbeta is 0"):
        effective_rank(objective, spread, 0.0)
    with pytest.raises(ValueError, match="max_products is 3"):
        effective_rank(objective, spread, 1.0, max_products=3)
    with pytest.raises(ValueError, match="tolerance is 2"):
        effective_rank(objective, spread, 1.0, tolerance=2.0)
    rank = effective_rank(objective, spread, 1.0)
    with pytest.raises(ValueError, match="nbeta is -1"):
        rank.at(-1.0)
    with pytest.raises(ValueError, match="epsilon is 0"):
        rank.at_resolution(0.0)


def test_a_resolution_stands_for_its_temperature() -> None:
    """One run finds both, dense or sampled; and neither is taken for the other."""
    objective = of_kind("linear")
    spread = spread_of(objective)
    exact_rank = effective_rank(objective, spread, 1.0).at_resolution(1e-3)
    for dense_below in (0, 1000):
        found = effective_rank(objective, spread, resolution=1e-3, dense_below=dense_below, check_probe=False)
        assert found.nbeta == pytest.approx(exact_rank.nbeta, rel=0.05 if dense_below == 0 else 1e-9)
        assert abs(found.value - exact_rank.value) <= 3 * found.standard_error + found.quadrature_error + 1e-9
    for settings in ({}, {"nbeta": 1.0, "resolution": 1e-3}):
        with pytest.raises(ValueError, match="expected one of the two"):
            effective_rank(objective, spread, **settings)


@pytest.mark.parametrize("given", [np.float32(0.25), torch.tensor(0.25), np.array([0.25, 1]), (0.25,)])
def test_a_resolution_may_be_any_number_or_several(given: Any) -> None:
    objective = of_kind("linear")
    spread = spread_of(objective)
    found = effective_rank(objective, spread, resolution=given, check_probe=False)
    assert found.value == effective_rank(objective, spread, resolution=0.25, check_probe=False).value


@pytest.mark.parametrize("given", [0, 0.0, math.nan, math.inf, [], (0.1, -1)])
def test_other_resolutions_are_named(given: Any) -> None:
    objective = of_kind("linear")
    with pytest.raises(ValueError, match="resolution is .*; expected a positive number"):
        effective_rank(objective, spread_of(objective), resolution=given)


def test_errors_at_a_resolution_tell_that_its_temperature_is_sampled_too() -> None:
    """Curvatures that fall with the square of their number: there a rank is off twice as much as at a given b.

    Of 40 seeds at least 34 within two standard errors, at two resolutions asked for together; false failure 3e-3 each
    at 95 %.
    """
    objective = regression(2.0 / torch.arange(1, 201, dtype=torch.float64) ** 2)
    truth = effective_rank(objective, torch.ones(400), 1.0, check_probe=False)
    resolutions = 0.05, 0.1
    settings = {"dense_below": 0, "max_products": 300, "tolerance": 0.05, "check_probe": False}
    inside = dict.fromkeys(resolutions, 0)
    for seed in range(40):
        sampled = effective_rank(objective, torch.ones(400), resolution=resolutions, seed=seed, **settings)
        for resolution in resolutions:
            found, exact_rank = sampled.at_resolution(resolution), truth.at_resolution(resolution)
            assert sampled.products < 300 and found.standard_error <= 0.05 * found.value
            given = sampled.at(found.nbeta)
            assert (given.value, given.amplification) == (found.value, 1.0)
            assert 1.6 < found.amplification < 2.2
            assert found.standard_error == pytest.approx(found.amplification * given.standard_error)
            inside[resolution] += abs(found.value - exact_rank.value) <= 2 * found.standard_error + 1e-3
    assert exact_rank.standard_error == 0.0 and min(inside.values()) >= 34, inside


def linear_of_falling_inputs(samples: int) -> Objective:
    """One output of 300 inputs, each of a size that is one over its number."""
    x = normal(samples, 300) / torch.arange(1, 301, dtype=torch.float64)
    batch = (x, torch.zeros(samples, 1))
    return Objective(nn.Linear(300, 1, bias=False).double(), [batch], loss_fn=half_squared_error)


def test_half_of_the_probe_is_compared_at_one_temperature() -> None:
    """However that was found: these were limited by the probe at a given temperature, and not at its resolution."""
    objective = linear_of_falling_inputs(90)
    for seed, resolution in ((1, 0.03), (3, 0.025), (4, 0.03)):
        settings = {"dense_below": 0, "tolerance": 0.06, "max_products": 300}
        sampled = effective_rank(objective, torch.ones(300), resolution=0.03, seed=seed, **settings)
        found = sampled.at_resolution(resolution)
        given = sampled.at(found.nbeta)
        assert found.amplification > 1.4 and found.limited_by_probe is given.limited_by_probe is True


def test_a_rank_that_is_all_that_there_can_be_has_a_temperature() -> None:
    """A short run says 20 of twenty samples: half of that over 1,000, an end of a bracket, is just the resolution."""
    objective = linear_of_falling_inputs(40).on_half()
    assert objective is not None
    exact_rank = effective_rank(objective, torch.ones(300), resolution=0.01, check_probe=False)
    settings = {"dense_below": 0, "tolerance": 0.18, "max_products": 300, "check_probe": False}
    found = effective_rank(objective, torch.ones(300), resolution=0.01, **settings)
    assert found.standard_error <= 0.18 * found.value
    assert abs(found.value - exact_rank.value) <= 3 * found.standard_error + found.quadrature_error


def test_a_prior_that_moves_the_function_by_less_than_the_resolution_leaves_no_rank() -> None:
    """Also of a network too large for a whole matrix, whose runs are asked whether they are long enough."""
    torch.manual_seed(0)
    module = nn.Linear(2000, 1)
    objective = Objective(module, [(torch.randn(50, 2000), torch.zeros(50, 1))], loss_fn=half_squared_error)
    found = effective_rank(objective, torch.full((2001,), 1e-4), resolution=0.1)
    assert found.value == 0.0 and found.nbeta == 0.0 and found.converged
    assert found.at_resolution(1e-6).value > 1


def test_no_more_is_seen_than_the_outputs_are_many() -> None:
    """Thirty samples of one output among 600 parameters, of which a short run says next to nothing."""
    x = normal(30, 600) * torch.logspace(0, -4, 600)
    objective = Objective(nn.Linear(600, 1, bias=False).double(), [(x, torch.zeros(30, 1))], loss_fn=half_squared_error)
    found = effective_rank(objective, torch.ones(600), 1e9, dense_below=0, max_products=4, check_probe=False)
    exact_value = float(exact(matrix_of(objective), 1e9).sum())
    assert exact_value <= 30 and found.value + found.quadrature_error <= 30 + 3 * found.standard_error
    assert abs(found.value - exact_value) <= 3 * found.standard_error + found.quadrature_error
    assert not found.converged


def test_squares_that_are_nothing_but_rounding_hide_nothing() -> None:
    """As of a layer that does nothing after a run has diverged. Of one direction the chance is erf(sqrt(x / 2))."""
    assert _hidden(np.array([[-1e-58, 2.0]])).tolist() == [0.0, pytest.approx(math.erf(1.0))]
