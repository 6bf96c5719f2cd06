"""R-hat and ESS against chains whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from phasewatch.llc.diagnostics import effective_sample_size, split_rhat, standard_error, standard_error_between_chains


def autoregressive(phi: float, chains: int, draws: int, seed: int) -> np.ndarray:
    """Stationary AR(1) chains with unit innovations."""
    noise = np.random.default_rng(seed).standard_normal((chains, draws + 1_000))
    return np.asarray(lfilter([1.0], [1.0, -phi], noise, axis=1))[:, 1_000:]


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.5, 0.9])
def test_ess_of_autoregressive_chains(phi: float) -> None:
    """ESS of AR(1) is size * (1 - phi) / (1 + phi); the estimator scatters by 5 % here: 4 sd, P(fail) < 1e-3."""
    draws = autoregressive(phi, chains=4, draws=5_000, seed=1)
    assert effective_sample_size(draws) == pytest.approx(draws.size * (1 - phi) / (1 + phi), rel=0.2)


def test_standard_error_is_the_scatter_of_the_mean() -> None:
    """Over 400 reruns the scatter of the mean is known to 3.5 %: 15 % is 4 sd, P(fail) < 1e-3."""
    runs = [autoregressive(0.8, chains=4, draws=300, seed=seed) for seed in range(400)]
    scatter = np.std([run.mean() for run in runs])
    for error in (standard_error, standard_error_between_chains):
        assert np.sqrt(np.mean([error(run) ** 2 for run in runs])) == pytest.approx(scatter, rel=0.15)


def test_rhat_by_its_definition() -> None:
    """The textbook formula, written with loops."""
    draws = autoregressive(0.5, chains=3, draws=101, seed=2)
    halves = [half for chain in draws for half in (chain[:50], chain[51:])]
    within = sum(np.var(half, ddof=1) for half in halves) / 6
    between = 50 * np.var([np.mean(half) for half in halves], ddof=1)
    assert split_rhat(draws) == pytest.approx(math.sqrt((49 / 50 * within + between / 50) / within), rel=1e-12)


def test_disagreement_and_drift_are_seen() -> None:
    """A chain elsewhere, and a common trend, both raise R-hat and leave few effective draws."""
    draws = autoregressive(0.0, chains=4, draws=200, seed=3)
    assert split_rhat(draws) < 1.02
    for spoilt in (draws + np.array([[0.0], [0.0], [0.0], [3.0]]), draws + np.linspace(0, 4, 200)):
        assert split_rhat(spoilt) > 1.2
        assert effective_sample_size(spoilt) < 40


def test_constant_draws_have_no_diagnostics() -> None:
    """Nothing varies: no bogus number, and no error of the mean."""
    draws = np.full((2, 10), 3.0)
    assert math.isnan(split_rhat(draws))
    assert math.isnan(effective_sample_size(draws))
    assert standard_error(draws) == 0


@pytest.mark.parametrize("shape", [(2, 1_000), (4, 501), (8, 2_000)])
@pytest.mark.parametrize("phi", [-0.7, 0.0, 0.5, 0.9])
def test_they_are_those_of_arviz(phi: float, shape: tuple[int, int]) -> None:
    """R-hat exactly; ArviZ takes half of one more term of Geyer's sum, and the variance of all draws for that of one.

    Both are less than 2 % where chains are long against their autocorrelation, agreeing (the first) or not.
    """
    oracle = pytest.importorskip("arviz_stats.base").array_stats
    axes = {"chain_axis": 0, "draw_axis": 1}
    for apart in (0.0, 0.5):
        draws = autoregressive(phi, *shape, seed=7) + np.linspace(0, apart, shape[0])[:, None]
        assert split_rhat(draws) == pytest.approx(float(oracle.rhat(draws, **axes, method="split")), rel=1e-10)
        assert effective_sample_size(draws) == pytest.approx(float(oracle.ess(draws, **axes, method="mean")), rel=0.02)
        assert standard_error(draws) == pytest.approx(float(oracle.mcse(draws, **axes, method="mean")), rel=0.02)
