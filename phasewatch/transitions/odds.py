"""How a change compares with correlated noise whose correlation is not known.

A level that wanders makes ramps and steps by itself, and while a run is short nothing tells the two apart. Both
explanations are therefore weighed with every correlation that the data allow: the ratio of their marginal likelihoods.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from phasewatch.transitions.regression import CORRELATIONS, Boundary, SignalRegression


@dataclass(frozen=True)
class Odds:
    """What speaks for one or more changes.

    Attributes:
        log_ratio: log of the ratio of the marginal likelihoods with and without them (the log Bayes factor).
        correlation: posterior mean of the noise's correlation from one measurement to the next, were there none.
    """

    log_ratio: float
    correlation: float


def odds_of_changes(
    signals: Sequence[SignalRegression],
    boundaries: Sequence[Boundary],
    changes: Sequence[tuple[int, ...]],
    which: Collection[int],
) -> Odds:
    """Weigh changes against their absence.

    Args:
        signals: the signals.
        boundaries: the boundaries of the changes and those taken for granted.
        changes: for each signal, at which of them it changes.
        which: the numbers of the boundaries in question.
    """
    every = tuple(range(len(boundaries)))
    others = tuple(j for j in every if j not in which)
    with_it, without = [], []
    for signal, own in zip(signals, changes, strict=True):
        signal.use(boundaries)
        with_it.append(signal.evidence(signal.fit(every, own)))
        without.append(signal.evidence(signal.fit(others, tuple(j for j in own if j not in which))))
    rival, correlation = _over_correlations(np.array(without))
    return Odds(_over_correlations(np.array(with_it))[0] - rival, correlation)


def _over_correlations(evidence: np.ndarray) -> tuple[float, float]:
    """Average likelihoods, shape (signals, correlations), over the correlation; also return its posterior mean.

    As likely as not, all signals share one correlation: they are measured on the same weights. A short history says
    little about the noise of one signal, and three times as much if it may be pooled.
    """
    count = evidence.shape[1]
    shared = evidence.sum(axis=0)
    of_shared = logsumexp(shared) - np.log(count)
    of_own = logsumexp(evidence, axis=1) - np.log(count)
    likelihood = float(np.logaddexp(of_shared, of_own.sum()) - np.log(2.0))
    weight = 0.5 * np.exp(of_shared - likelihood)
    posterior = weight * np.exp(shared - logsumexp(shared))
    posterior += (1.0 - weight) * np.exp(evidence - logsumexp(evidence, axis=1)[:, None]).mean(axis=0)
    return likelihood, float(posterior @ CORRELATIONS)
