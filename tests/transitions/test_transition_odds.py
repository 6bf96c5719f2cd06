"""A change against correlated noise of unknown correlation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import toeplitz
from synthetic import noise

from phasewatch.transitions.odds import odds_of_changes
from phasewatch.transitions.regression import CORRELATIONS, SignalRegression

N = 60
STEPS = 10.0 * np.arange(1.0, N + 1)
TIME = np.log(STEPS + 10.0)


def signal(values: np.ndarray, sigma: np.ndarray | float = 0.2) -> SignalRegression:
    return SignalRegression(
        STEPS, TIME, values, np.broadcast_to(sigma, N).astype(float), span=1.0, trusted=np.ones(N, dtype=bool)
    )


@pytest.mark.parametrize("seed", range(3))
def test_evidence_is_the_restricted_likelihood(seed: int) -> None:
    """Against dense generalised least squares with the covariance written out, a step and a ramp being fitted."""
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(0.1, 0.3, N)
    values = sigma * noise(rng, N, "ar0.5") + 0.8 * (np.arange(N) >= 20)
    regression = signal(values, sigma)
    regression.use([(19.5, 0.0), (40.0, 6.5)])
    fit = regression.fit((0, 1), (0, 1))
    # Neither slopes that differ nor a bend.
    assert len(fit.columns) == 4 and fit.slopes == 0
    ramp = 1.0 / (1.0 + np.exp(-np.log(81.0) * (np.arange(N) - 40.0) / 6.5))
    columns = [np.ones(N), (TIME - TIME.mean()) / np.ptp(TIME), np.arange(N) > 19.5, ramp]
    x, y = np.column_stack(columns) / sigma[:, None], (values - values.mean()) / sigma
    expected = []
    for rho in CORRELATIONS:
        covariance = toeplitz(rho ** np.arange(N)) / (1.0 - rho**2)
        inverse = np.linalg.inv(covariance)
        gram = x.T @ inverse @ x
        coefficients = np.linalg.solve(gram, x.T @ inverse @ y)
        residual = y - x @ coefficients
        total = residual @ inverse @ residual + regression.unexplained
        determinants = np.linalg.slogdet(gram)[1] + np.linalg.slogdet(covariance)[1]
        expected.append(-0.5 * ((N - x.shape[1]) * np.log(total) + determinants))
    assert regression.evidence(fit) == pytest.approx(np.array(expected), abs=1e-4)


def step_odds(values: list[np.ndarray]) -> tuple[float, float]:
    odds = odds_of_changes([signal(v) for v in values], [(29.5, 0.0)], [(0,)] * len(values), [0])
    return odds.log_ratio, odds.correlation


@pytest.mark.parametrize("kind", ["gauss", "ar0.75"])
def test_chance_seldom_speaks_for_a_change(kind: str) -> None:
    """A ratio of likelihoods exceeds 20 in at most one of 20 cases without a change (Ville, Markov).

    Of 200, more than 20 would come by chance once in 500.
    """
    rng = np.random.default_rng(1)
    convinced = sum(step_odds([0.2 * noise(rng, N, kind) for _ in range(2)])[0] > np.log(20.0) for _ in range(200))
    assert convinced <= 20


def test_a_step_convinces_in_white_noise_and_less_where_the_level_wanders() -> None:
    rng = np.random.default_rng(2)
    step = 0.8 * (np.arange(N) >= 30)
    white, low = step_odds([step + 0.2 * rng.standard_normal(N) for _ in range(2)])
    wandering, high = step_odds([step + 0.2 * noise(rng, N, "ar0.8") for _ in range(2)])
    assert white > 20.0 and wandering < white and low < 0.5 < high


def test_the_correlation_is_that_of_the_noise_where_nothing_changes() -> None:
    rng = np.random.default_rng(4)
    white, wandering = (step_odds([0.2 * noise(rng, N, kind) for _ in range(3)])[1] for kind in ("gauss", "ar0.8"))
    assert white < 0.2 and 0.6 < wandering < 0.9


def test_what_is_taken_for_granted_is_no_correlation() -> None:
    """A second step that is left out looks like a level that wanders."""
    rng = np.random.default_rng(3)
    values = [0.8 * (np.arange(N) >= 15) + 0.8 * (np.arange(N) >= 45) + 0.2 * rng.standard_normal(N) for _ in range(2)]
    both = odds_of_changes([signal(v) for v in values], [(14.5, 0.0), (44.5, 0.0)], [(0, 1)] * 2, [1])
    alone = odds_of_changes([signal(v) for v in values], [(44.5, 0.0)], [(0,)] * 2, [0])
    assert both.log_ratio > alone.log_ratio and both.correlation < alone.correlation
