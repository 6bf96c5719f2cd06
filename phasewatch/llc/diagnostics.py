"""Convergence of several chains: split R-hat and effective sample size."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def split_chains(draws: FloatArray) -> FloatArray:
    """Each chain cut into its first and second half (the middle draw of an odd number is left out).

    Args:
        draws: Shape ``(chains, draws)``.

    Returns:
        Shape ``(2 * chains, draws // 2)``.
    """
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, draws.shape[1] - half :]])


def split_rhat(draws: FloatArray) -> float:
    """Potential scale reduction of the split chains (Gelman et al. 2013, Bayesian Data Analysis, eq. 11.4).

    Args:
        draws: Shape ``(chains, draws)``, at least 4 draws.

    Returns:
        About 1 where all halves of all chains agree; NaN where no draw differs from another.
    """
    halves = split_chains(draws)
    within = halves.var(axis=1, ddof=1).mean()
    if within == 0:
        return math.nan
    return float(np.sqrt(_pooled_variance(halves) / within))


def effective_sample_size(draws: FloatArray) -> float:
    """Number of independent draws whose mean is as precise as that of all split chains together.

    Autocovariances are combined over chains, so that chains that disagree count as correlated draws, and summed
    by Geyer's initial monotone sequence (Vehtari et al. 2021, eqs. 10-13; Geyer 1992).

    Args:
        draws: Shape ``(chains, draws)``, at least 4 draws.

    Returns:
        At most ``size * log10(size)`` (antithetic chains can beat independent draws); NaN where no draw differs
        from another.
    """
    halves = split_chains(draws)
    chains, length = halves.shape
    pooled = _pooled_variance(halves)
    if pooled == 0:
        return math.nan
    covariance = _autocovariance(halves)
    within = covariance[:, 0].mean() * length / (length - 1)
    correlation = 1 - (within - covariance.mean(axis=0)) / pooled
    correlation[0] = 1.0
    pairs = correlation[: length // 2 * 2].reshape(-1, 2).sum(axis=1)
    nonpositive = np.flatnonzero(pairs <= 0)
    pairs = np.minimum.accumulate(pairs[: nonpositive[0] if len(nonpositive) else None])
    total = chains * length
    autocorrelation_time = max(2 * pairs.sum() - 1, 1 / math.log10(total))
    return float(total / autocorrelation_time)


def standard_error(draws: FloatArray) -> float:
    """Standard error of the mean of all draws, from autocorrelation and the spread between chains.

    Args:
        draws: Shape ``(chains, draws)``, at least 4 draws.
    """
    pooled = _pooled_variance(split_chains(draws))
    return float(np.sqrt(pooled / effective_sample_size(draws))) if pooled else 0.0


def standard_error_between_chains(draws: FloatArray) -> float:
    """Standard error of the mean from the scatter of the chains alone, which sees what lasts as long as a chain.

    Args:
        draws: Shape ``(chains, draws)``, at least 2 chains.
    """
    return float(draws.mean(axis=1).std(ddof=1)) / math.sqrt(len(draws))


def _pooled_variance(chains: FloatArray) -> float:
    """Variance of a draw, overestimated while the chains disagree (var-plus in Vehtari et al. 2021, eq. 3)."""
    length = chains.shape[1]
    between = chains.mean(axis=1).var(ddof=1)
    return float(chains.var(axis=1, ddof=1).mean() * (length - 1) / length + between)


def _autocovariance(chains: FloatArray) -> FloatArray:
    """Biased autocovariance of each chain at lags 0, 1, ..., by FFT; same shape as ``chains``."""
    length = chains.shape[1]
    centred = chains - chains.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, n=2 * length, axis=1)
    covariance: FloatArray = np.fft.irfft(np.abs(spectrum) ** 2, n=2 * length, axis=1)[:, :length] / length
    return covariance
