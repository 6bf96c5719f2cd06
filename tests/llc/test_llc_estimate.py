"""Learning-coefficient estimates against exact answers, and flags where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import (
    Parameters,
    deep_linear_network,
    half_squared_error,
    linear_network,
    monomial,
    monomial_expectation,
    reduced_rank_regression,
)
from torch import Tensor, nn

from phasewatch.hessian.operators import CurvatureOperator
from phasewatch.isolation import RandomState
from phasewatch.llc import LLCEstimate, Thresholds, estimate_llc
from phasewatch.llc.minibatches import balanced_batches
from phasewatch.objective import Objective


def regression(
    inputs: int, outputs: int, *, noise: float, batch_size: int, seed: int, samples: int = 5_000, shift: float = 0.0
) -> tuple[Objective, np.ndarray]:
    """Linear regression, w* at its least-squares solution plus ``shift``; also the Hessian's eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    x *= torch.linspace(0.5, 1.5, inputs, dtype=torch.float64)
    y = x @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    y += noise * torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    module = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.linalg.lstsq(x, y).solution.T + shift)
    objective = Objective(
        module, list(zip(x.split(batch_size), y.split(batch_size), strict=True)), loss_fn=half_squared_error
    )
    return objective, np.tile(torch.linalg.eigvalsh(x.T @ x / samples).numpy(), outputs)


def localized_quadratic(eigenvalues: np.ndarray, estimate: LLCEstimate) -> float:
    """The expectation that the estimate has in a quadratic well: sum of h / (h + gamma / nbeta) / 2."""
    return float(np.sum(eigenvalues / (eigenvalues + estimate.localization / estimate.nbeta)) / 2)


def test_formulas_on_known_cases() -> None:
    """Regular models are d / 2; (1,1,1) of rank 0 is the normal crossing (w1 w2)^2; the two formulas agree."""
    assert reduced_rank_regression(1, 1, 1, 0) == (0.5, 2)
    assert reduced_rank_regression(4, 9, 3, 3) == (6.0, 1)
    assert reduced_rank_regression(5, 3, 5, 2) == (9.5, 2)
    assert deep_linear_network([2, 2, 2, 2], 0)[0] == 1.5
    assert deep_linear_network([8] * 7, 4) == (pytest.approx(29), 9)
    for m, h, n in np.ndindex(5, 5, 5):
        for r in range(min(m, h, n) + 2):
            widths = (m + 1, h + 1, n + 1)
            if r <= min(widths):
                assert deep_linear_network(widths, r) == pytest.approx(reduced_rank_regression(*widths, r))


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 1), (7, 2), (12, 6)])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_regular_model(inputs: int, outputs: int, noise: float) -> None:
    """Lambda is d / 2, exact but for the localization; 4 standard errors, P(fail) < 1e-3 a case."""
    objective, eigenvalues = regression(inputs, outputs, noise=noise, batch_size=500, seed=inputs)
    estimate = estimate_llc(objective, seed=1, chains=16, draws=1_000, burn_in=400)
    exact = localized_quadratic(eigenvalues, estimate)
    assert exact == pytest.approx(inputs * outputs / 2, rel=0.02)
    assert estimate.reliable
    assert abs(estimate.learning_coefficient - exact) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.1 * exact
    assert abs(estimate.descent) < 0.3
    # nbeta L is chi-squared / 2 with inputs * outputs degrees of freedom: its variance is its mean.
    assert estimate.heat_capacity == pytest.approx(exact, rel=0.3)


def test_noise_of_small_batches_is_corrected() -> None:
    """Batches of 50: what their change adds is seen and taken off; 4 standard errors, P(fail) < 1e-3."""
    objective, eigenvalues = regression(10, 4, noise=0.0, batch_size=50, seed=5)
    estimate = estimate_llc(objective, seed=2)
    exact = localized_quadratic(eigenvalues, estimate)
    assert abs(estimate.learning_coefficient - exact) < 4 * estimate.standard_error
    assert estimate.heating > 0.02 * exact


@pytest.mark.parametrize(("widths", "rank"), [([4, 3, 6], 1), ([10, 6, 7], 3), ([5, 5, 5], 0), ([7, 5, 5, 7], 3)])
def test_singular_linear_networks(widths: list[int], rank: int) -> None:
    """Within 8 % of the formula with its finite-n term; d / 2 is wrong by 40 % and more.

    The standard error is 2 %, and localization takes off up to 2 %: P(fail) < 1e-2 a case.
    """
    value, multiplicity = deep_linear_network(widths, rank)
    estimates = [estimate_llc(linear_network(widths, rank, seed=seed), seed=seed) for seed in range(1)]
    expected = value - (multiplicity - 1) / math.log(estimates[0].nbeta)
    mean = np.mean([estimate.learning_coefficient for estimate in estimates])
    assert mean == pytest.approx(expected, rel=0.08)
    assert sum(estimate.reliable for estimate in estimates) >= 1


def test_refined_to_some_parameters() -> None:
    """The second layer alone is a regular model: lambda is half its parameters; 4 standard errors, P(fail) < 1e-3."""
    generator = torch.Generator().manual_seed(8)
    network = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 3, dtype=torch.float64))
    inputs = 2 * torch.randn(2_000, 6, generator=generator, dtype=torch.float64)
    batches = [(x, network(x).detach()) for x in inputs.split(500)]
    objective = Objective(network, batches, loss_fn=half_squared_error).restricted_to("2")
    estimate = estimate_llc(objective, n=1_000_000, seed=0, draws=1_000)
    assert estimate.learning_coefficient == pytest.approx(15 / 2, abs=4 * estimate.standard_error)
    assert estimate.standard_error < 0.5


def test_unequal_batches_are_weighted() -> None:
    """Each batch is used as often as its share says, exactly over many passes; a short one spoils nothing."""
    order = balanced_batches([0.4, 0.4, 0.15, 0.05], np.random.default_rng(0))
    counts = np.bincount([next(order) for _ in range(4_000)])
    assert counts / 4_000 == pytest.approx([0.4, 0.4, 0.15, 0.05], abs=0.02)
    inputs = torch.randn(1_050, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    batches = [(x, module(x).detach()) for x in inputs.split(500)]
    estimate = estimate_llc(
        Objective(module, batches, loss_fn=half_squared_error), n=5_000, seed=0, chains=8, draws=1_500
    )
    eigenvalues = np.tile(torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs)).numpy(), 3)
    exact = localized_quadratic(eigenvalues, estimate)
    assert abs(estimate.learning_coefficient - exact) < 4 * estimate.standard_error


SAMPLED_ANYWHERE = Thresholds(descent=math.inf)


def test_away_from_the_minimum() -> None:
    """Lambda falls by nbeta times the missing loss; that is measured, flagged, and not clipped when negative."""
    centred, eigenvalues = regression(5, 2, noise=1.0, batch_size=500, seed=3)
    shifted, _ = regression(5, 2, noise=1.0, batch_size=500, seed=3, shift=0.15)
    estimate = estimate_llc(shifted, seed=0, chains=8, draws=500, thresholds=SAMPLED_ANYWHERE)
    missing = estimate.nbeta * float(shifted.loss() - centred.loss())
    assert missing > 2 * localized_quadratic(eigenvalues, estimate)
    assert estimate.descent == pytest.approx(missing, rel=0.1)
    assert estimate.learning_coefficient < 0
    assert not estimate.reliable
    assert any("lower loss" in reason for reason in estimate.reasons)


def test_slightly_away_from_the_minimum() -> None:
    """An estimate that lacks a good part is still positive; what it lacks is known before, and nothing is sampled."""
    centred, eigenvalues = regression(5, 2, noise=1.0, batch_size=500, seed=3)
    shifted, _ = regression(5, 2, noise=1.0, batch_size=500, seed=3, shift=0.03)
    estimate = estimate_llc(shifted, seed=0, chains=8, draws=1_500, thresholds=SAMPLED_ANYWHERE)
    missing = estimate.nbeta * float(shifted.loss() - centred.loss())
    assert estimate.descent == pytest.approx(missing, rel=0.05)
    expected = localized_quadratic(eigenvalues, estimate) - missing
    assert abs(estimate.learning_coefficient - expected) < 4 * estimate.standard_error
    refused = estimate_llc(shifted, seed=0)
    assert refused.draws == 0 and math.isnan(refused.learning_coefficient)
    (reason,) = refused.reasons
    assert reason.startswith("w* is not near a minimum: nbeta L falls by")


def _bare(values: list[float], function: object) -> Objective:
    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return function(module.values) + 0 * batch.sum()  # type: ignore[operator]

    return Objective(Parameters(values), [torch.zeros(1)], loss_fn=loss_fn)


def test_unbounded_loss_is_flagged() -> None:
    """The chains fall for ever."""
    estimate = estimate_llc(_bare([0.1, 0.1], lambda w: -w.pow(4).sum()), n=1_000, chains=8, draws=300)
    assert not estimate.reliable
    assert estimate.reasons


def test_diverged_chains_are_masked_and_counted() -> None:
    """A hole some standard deviations away takes some chains while they spread; P(none or all of 8) < .1 a seed."""

    def with_hole(w: Tensor) -> Tensor:
        return torch.where(w[0] > 0.43, -1e9, 0.5 * w.square().sum())

    estimate = estimate_llc(_bare([0.0] * 6, with_hole), n=1_000, chains=8, seed=1, thresholds=SAMPLED_ANYWHERE)
    assert 0 < estimate.diverged_chains < 8
    assert estimate.learning_coefficient == pytest.approx(3, abs=0.7)
    assert any("diverged" in reason for reason in estimate.reasons)
    assert not estimate.reliable


def test_a_steep_wall_ends_no_chain() -> None:
    """Steps into a region where the loss is not finite are taken back; P(fail) < 1e-3 (4 se)."""
    walled = _bare([0.0] * 6, lambda w: torch.where(w[0] > 0.27, torch.nan, 0.5 * w.square().sum()))
    estimate = estimate_llc(walled, n=1_000, chains=8, draws=1_500)
    assert estimate.diverged_chains == 0
    assert abs(estimate.learning_coefficient - 3) < 4 * estimate.standard_error


def test_all_chains_diverged() -> None:
    """No number is made up."""
    objective = _bare([0.0], lambda w: torch.where(w[0].abs() > 1e-300, torch.nan, w.sum()))
    estimate = estimate_llc(objective, n=1_000, chains=8, draws=300, burn_in=100)
    assert estimate.diverged_chains == 8
    assert math.isnan(estimate.learning_coefficient)
    assert estimate.reasons == ("8 of 8 chains diverged",)


@pytest.mark.parametrize(("parameters", "chains"), [(1, 128), (2, 128), (10, 25), (31, 8), (32, 8)])
def test_the_fewer_parameters_the_more_chains(parameters: int, chains: int) -> None:
    """Never fewer than 8 nor more than 128."""
    estimate = estimate_llc(_bare([0.0] * parameters, lambda w: w.square().sum()), n=1_000, draws=20, burn_in=20)
    assert estimate.chains == chains


@pytest.mark.slow
def test_small_learning_coefficients() -> None:
    """24 normal crossings with lambda from 0.14 to 0.41, within 10 % of the exact expectation; none is flagged.

    A relative standard error of 2.5 % and a bias of up to 2 % make more than 10 % a matter of 3 standard errors: in
    one of 24 with a probability of .03. 19 of 24 intervals hold with a probability above .99 at a coverage of .93.
    """
    held = 0
    for number in range(24):
        exponents = (1 + number % 2, 1 + number // 2 % 3)
        estimate = estimate_llc(monomial(exponents), n=10_000, seed=300 + number)
        exact = monomial_expectation(exponents, estimate.nbeta, estimate.localization)
        assert estimate.reliable
        assert estimate.learning_coefficient == pytest.approx(exact, rel=0.1)
        held += estimate.interval[0] <= exact <= estimate.interval[1]
    assert held >= 19


def test_same_seed_same_numbers_and_no_trace() -> None:
    """Global random streams stay, the objective's vector too; another seed gives other numbers."""
    objective = linear_network([4, 3, 4], 2, seed=0)
    before, parameters = RandomState.capture(), objective.parameters.clone()
    first = estimate_llc(objective, seed=3, draws=20, burn_in=20)
    with torch.inference_mode():
        second = estimate_llc(objective, seed=3, draws=20, burn_in=20)
    assert RandomState.capture() == before
    assert torch.equal(objective.parameters, parameters)
    assert first == second
    assert estimate_llc(objective, seed=4, draws=20, burn_in=20) != first


def test_cost_and_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients spent are counted where they are evaluated."""
    objective = linear_network([4, 3, 4], 2, seed=0)
    objective.losses_and_gradients(objective.parameters.repeat(2, 1), 0)  # the first call compares with single ones
    calls = 0.0
    one, several, losses = Objective.loss_and_gradient, Objective.losses_and_gradients, Objective.losses
    of_samples, product = Objective.sample_losses, CurvatureOperator.__matmul__

    def counted(self: Objective, *args: object) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += self.num_batches if len(args) < 2 or args[1] is None else 1
        return one(self, *args)  # type: ignore[arg-type]

    def counted_together(
        self: Objective, vectors: Tensor, batch: int | None = None, *, compiled: bool = False
    ) -> tuple[Tensor, Tensor]:
        nonlocal calls
        batches = self.num_batches if batch is None else 1
        calls += len(vectors) * batches if len(vectors) > 1 else 0  # one alone is counted above
        return several(self, vectors, batch, compiled=compiled)

    def counted_losses(self: Objective, vectors: Tensor, batch: int | None = None) -> Tensor:
        nonlocal calls
        calls += len(vectors) * (self.num_batches if batch is None else 1) / 3
        return losses(self, vectors, batch)

    def counted_samples(self: Objective, vectors: Tensor, batch: int) -> Tensor:
        nonlocal calls
        calls += len(vectors) / 3
        return of_samples(self, vectors, batch)

    def counted_product(self: CurvatureOperator, vector: Tensor) -> Tensor:
        nonlocal calls
        calls += 2 * self.objective.num_batches
        return product(self, vector)

    monkeypatch.setattr(CurvatureOperator, "__matmul__", counted_product)
    monkeypatch.setattr(Objective, "sample_losses", counted_samples)
    monkeypatch.setattr(Objective, "loss_and_gradient", counted)
    monkeypatch.setattr(Objective, "losses_and_gradients", counted_together)
    monkeypatch.setattr(Objective, "losses", counted_losses)
    estimate = estimate_llc(objective, draws=200, burn_in=100, chains=2)
    assert 0 <= calls - estimate.gradients <= 24  # a few calls only check what is called for several places
    before = objective.num_batches * (2 * 4 * 32 + 40)  # four Krylov spaces of 32, and a pilot descent
    assert 2 * 300 <= calls <= 2 * (300 + objective.num_batches + 30) + before
    assert f"lambda = {estimate.learning_coefficient:.4g}" in repr(estimate)
    assert estimate.loss == pytest.approx(float(objective.loss()))
    assert estimate.n == 5_000
    draws_mean = estimate.loss + estimate.learning_coefficient / estimate.nbeta
    assert estimate.free_energy == pytest.approx(5_000 * draws_mean)  # n E[L], the definition of WBIC
    assert estimate.nbeta == pytest.approx(5_000 / math.log(5_000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nbeta": 0.0}, "nbeta is 0.0"),
        ({"nbeta": math.inf}, "nbeta is inf"),
        ({"chains": 0}, "chains is 0"),
        ({"draws": 3}, "draws is 3"),
        ({"burn_in": 2}, "burn_in is 2"),
        ({"n": 1}, "n is 1"),
        ({"localization": -1.0}, "localization is -1.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    """Each is named with what was expected."""
    with pytest.raises(ValueError, match=message):
        estimate_llc(linear_network([2, 2], 2, seed=0, samples=500), **arguments)  # type: ignore[arg-type]
