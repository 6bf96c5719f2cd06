"""Estimates where the answer is known: noise, local values, classifiers, normal crossings, beyond linear networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import (
    Parameters,
    cross_entropy,
    deep_linear_network,
    descend,
    half_squared_error,
    linear_network,
    local_reduced_rank,
    logistic_regression,
    monomial,
    monomial_expectation,
    noisy_bottleneck,
    noisy_regression,
    two_linear_layers,
)
from torch import Tensor, nn

from phasewatch.llc import LLCEstimate, Thresholds, estimate_llc, llc_by_temperature, quadratic_llc
from phasewatch.objective import Objective


def check(estimate: LLCEstimate, exact: float) -> None:
    """Within 4 standard errors and what localization takes off, and within 12 %; P(fail) < 1e-2 a case."""
    assert abs(estimate.learning_coefficient - exact) < 4 * estimate.standard_error + 0.02 * exact, estimate
    assert estimate.learning_coefficient == pytest.approx(exact, rel=0.12)
    assert estimate.reliable, estimate


@pytest.mark.parametrize(("inputs", "hidden", "outputs"), [(5, 2, 6), (8, 3, 4), (4, 3, 7)])
def test_singular_with_noisy_targets(inputs: int, hidden: int, outputs: int) -> None:
    """The noise of the data does not reach the chains, however far they go along the symmetry of the hidden layer."""
    estimate = estimate_llc(noisy_bottleneck(inputs, hidden, outputs, seed=hidden, samples=8_000), seed=1)
    check(estimate, hidden * (inputs + outputs - hidden) / 2)


@pytest.mark.parametrize("ranks", [(5, 4, 6, 3, 2, 1), (4, 5, 5, 2, 2, 1), (6, 5, 5, 2, 3, 2)])
def test_local_value_where_the_layers_exceed_the_product(ranks: tuple[int, int, int, int, int, int]) -> None:
    """Other than the global value, by a formula of its own."""
    value, multiplicity = local_reduced_rank(*ranks)
    estimate = estimate_llc(two_linear_layers(*ranks, seed=4), seed=2)
    check(estimate, value - (multiplicity - 1) / math.log(estimate.nbeta))


@pytest.mark.parametrize(("inputs", "classes"), [(7, 2), (4, 5)])
def test_logistic_regression(inputs: int, classes: int) -> None:
    """A regular model but for the shift of the softmax."""
    check(estimate_llc(logistic_regression(inputs, classes, seed=7), seed=3), (inputs + 1) * (classes - 1) / 2)


def test_inputs_of_unequal_size() -> None:
    """The learning coefficient does not see them."""
    widths, rank = (6, 4, 6), 3
    value, multiplicity = deep_linear_network(widths, rank)
    objective = linear_network(widths, rank, seed=3, samples=8_000, input_scales=(0.3, 2.0))
    estimate = estimate_llc(objective, seed=4)
    check(estimate, value - (multiplicity - 1) / math.log(estimate.nbeta))


@pytest.mark.parametrize("exponents", [(1, 1), (1, 2), (2, 3)])
def test_normal_crossing(exponents: tuple[int, int]) -> None:
    """Against its expectation by quadrature; 4 standard errors, P(fail) < 1e-3 a case."""
    estimate = estimate_llc(monomial(exponents), n=20_000, seed=5)
    exact = monomial_expectation(exponents, estimate.nbeta, estimate.localization)
    assert abs(estimate.learning_coefficient - exact) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.15 * exact


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_tanh_networks_of_known_coefficient(hidden: int) -> None:
    """One input, one output, true function 0 (Aoyagi & Nagata 2012): (H + i^2 + i) / (4 i + 2), i the root of H.

    Checked at nbeta = 1e5 with the term for the multiplicity; terms beyond it are still 8 % there. A regular model of
    as many parameters would have lambda = H, half as much again to twice as much.
    """
    root = math.isqrt(hidden)
    exact = (hidden + root**2 + root) / (4 * root + 2)
    nodes, weights = np.polynomial.legendre.leggauss(24)

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outgoing, incoming = module.values[:hidden], module.values[hidden:]
        return 0.5 * (batch[1] * (torch.tanh(batch[0][:, None] * incoming) @ outgoing).square()).sum()

    batch = (2 * torch.tensor(nodes), torch.tensor(weights / 2))
    objective = Objective(Parameters([0.0] * 2 * hidden), [batch], loss_fn=loss_fn)
    estimate = estimate_llc(objective, n=10_000, nbeta=1e5, localization=1.0, draws=20_000, burn_in=4_000, seed=hidden)
    expected = exact - (1 if root**2 == hidden else 0) / math.log(1e5)
    assert estimate.learning_coefficient == pytest.approx(expected, rel=0.15)


def long_hmc(objective: Objective, nbeta: float, gamma: float, trajectories: int, seed: int) -> tuple[float, float]:
    """Textbook Hamiltonian Monte Carlo on all data at once (Neal 2011, fig. 2): nbeta (E L - L*), standard error."""
    generator = torch.Generator().manual_seed(seed)
    center, chains = objective.parameters, 8
    losses_and_gradients = torch.func.vmap(torch.func.grad_and_value(lambda w: objective.loss(w)))

    def potential(w: Tensor) -> tuple[Tensor, Tensor]:
        gradient, loss = losses_and_gradients(w)
        shift = w - center
        return nbeta * loss + gamma / 2 * shift.square().sum(1), nbeta * gradient + gamma * shift

    w = center.repeat(chains, 1)
    u, g = potential(w)
    step, kept = 0.01, []
    for trajectory in range(trajectories):
        p = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        new_w, new_p, new_u, new_g = w, p, u, g
        for _ in range(int(torch.randint(20, 60, (1,), generator=generator))):
            new_p = new_p - step / 2 * new_g
            new_w = new_w + step * new_p
            new_u, new_g = potential(new_w)
            new_p = new_p - step / 2 * new_g
        energy_error = new_u - u + (new_p.square().sum(1) - p.square().sum(1)) / 2
        accepted = torch.rand(chains, generator=generator) < torch.exp(-energy_error.clamp(min=0))
        row = accepted[:, None]
        w, g, u = torch.where(row, new_w, w), torch.where(row, new_g, g), torch.where(accepted, new_u, u)
        if trajectory < trajectories // 4:
            step *= math.exp(0.1 * (float(accepted.double().mean()) - 0.8))
        else:
            kept.append(u - gamma / 2 * (w - center).square().sum(1))
    means = torch.stack(kept).mean(0) - nbeta * float(objective.loss())
    return float(means.mean()), float(means.std() / math.sqrt(chains))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [False, True])
def test_networks_that_are_not_linear_agree_with_long_hmc(classes: bool) -> None:
    """A tanh network at its minimum for noisy targets or labels: no formula, but an independent sampler.

    4 standard errors of the difference: P(fail) < 1e-3.
    """
    torch.manual_seed(3)
    sizes = (3, 3, 2)
    teacher, network = (
        nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])).double() for _ in range(2)
    )
    x = torch.randn(1_000, 3, dtype=torch.float64)
    outputs = 3 * teacher(x).detach()
    loss_fn = cross_entropy if classes else half_squared_error
    y = outputs + 0.7 * torch.randn_like(outputs)
    if classes:
        y = torch.multinomial(torch.softmax(y, dim=1), 1)[:, 0]
    descend(network, x, y, loss_fn)
    nbeta, gamma = 1_000 / math.log(1_000), 1.0
    reference, error = long_hmc(Objective(network, [(x, y)], loss_fn=loss_fn), nbeta, gamma, 400, seed=1)
    batches = list(zip(x.split(250), y.split(250), strict=True))
    estimate = estimate_llc(Objective(network, batches, loss_fn=loss_fn), seed=2, localization=gamma)
    assert abs(estimate.learning_coefficient - reference) < 4 * math.hypot(error, estimate.standard_error)
    assert estimate.standard_error < 0.1 * reference


def test_fluctuations_of_a_linear_model() -> None:
    """Functional variance and Bayes training loss against the Gaussian posterior, sample by sample, in closed form.

    They scatter by some percent, and the change of batches warms them by as much: P(fail) < 1e-3.
    """
    objective = noisy_regression(6, 2, seed=5, samples=4_000)
    estimate = estimate_llc(objective, seed=6)
    x, y = (torch.cat([batch[k] for batch in objective.batches]).double() for k in (0, 1))
    weight = objective.parameters.double().view(2, 6)
    residual = x @ weight.T - y
    covariance = torch.linalg.inv(estimate.nbeta * x.T @ x / len(x) + estimate.localization * torch.eye(6))
    spread = ((x @ covariance) * x).sum(1, keepdim=True)
    variance = (residual.square() * spread + spread.square() / 2).sum(1)
    likelihood = (torch.exp(-residual.square() / (1 + spread) / 2) / (1 + spread).sqrt()).prod(1)
    assert estimate.fluctuations.functional_variance == pytest.approx(float(variance.sum()), rel=0.15)
    excess = float(-likelihood.log().mean()) - estimate.loss
    assert estimate.fluctuations.training_loss - estimate.loss == pytest.approx(excess, abs=2e-4)
    assert estimate.singular_fluctuation == pytest.approx(12 / 2, rel=0.2)
    beta = estimate.nbeta / 4_000
    expected = float(-likelihood.log().mean()) + beta * float(variance.mean())
    assert estimate.waic == pytest.approx(expected, abs=3e-4)


def test_fluctuations_need_a_mean_over_samples() -> None:
    """A loss that compares samples has none; the rest of the estimate stays."""

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).var() + module(batch).square().mean()

    torch.manual_seed(0)
    objective = Objective(nn.Linear(3, 1), [torch.randn(50, 3)], loss_fn=loss_fn)
    estimate = estimate_llc(objective, draws=100, burn_in=60, thresholds=Thresholds(descent=math.inf))
    assert math.isnan(estimate.waic)
    assert math.isfinite(estimate.learning_coefficient)


def test_temperatures() -> None:
    """A regular model has the same lambda at all of them; 4 standard errors, P(fail) < 1e-3."""
    objective = noisy_regression(5, 2, seed=2, samples=2_000)
    nbetas = [2_000.0, 200.0]
    estimates = llc_by_temperature(objective, nbetas, seed=1)
    assert [estimate.nbeta for estimate in estimates] == nbetas
    for estimate in estimates:
        assert abs(estimate.learning_coefficient - 5) < 4 * estimate.standard_error + 0.02 * 5
    with pytest.raises(ValueError, match=r"nbetas holds \[-1.0\]"):
        llc_by_temperature(objective, [10.0, -1.0])
    with pytest.raises(ValueError, match="nbetas is empty"):
        llc_by_temperature(objective, [])


def test_quadratic_check_agrees_where_the_loss_is_quadratic() -> None:
    """Two ways to the same number; 4 standard errors, P(fail) < 1e-3."""
    objective = noisy_regression(8, 1, seed=3, samples=3_000)
    x = torch.cat([batch[0] for batch in objective.batches]).double()
    estimate = estimate_llc(objective, localization=20.0, seed=1)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x)).numpy()
    expected = quadratic_llc(eigenvalues, nbeta=estimate.nbeta, localization=20.0)
    assert expected < 0.96 * 8 / 2
    assert abs(estimate.learning_coefficient - expected) < 4 * estimate.standard_error
    with pytest.raises(ValueError, match="nbeta is 0"):
        quadratic_llc(eigenvalues, nbeta=0)


@pytest.mark.slow
def test_compiled_is_the_same() -> None:
    """Only rounding differs, before it can grow; without a compiler a warning says so and nothing else changes."""
    objective = linear_network([5, 3, 5], 2, seed=1, samples=1_000)
    places = objective.parameters + 0.1 * torch.randn(4, objective.num_parameters)
    plain, compiled = (objective.losses_and_gradients(places, 0, compiled=c) for c in (False, True))
    assert torch.allclose(plain[0], compiled[0], rtol=1e-4)
    assert torch.allclose(plain[1], compiled[1], rtol=1e-3, atol=1e-5)
