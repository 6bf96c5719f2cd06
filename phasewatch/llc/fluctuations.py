"""How the losses of single samples vary over the posterior: functional variance and WAIC."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from phasewatch.objective import Objective


@dataclass(frozen=True)
class Fluctuations:
    """Averages over draws and samples; NaN where the loss is not a mean over samples.

    Attributes:
        functional_variance: Sum over all n samples of the variance of the sample's loss over the posterior.
        training_loss: Bayes training loss, minus the mean over samples of log E[exp(-loss)].
    """

    functional_variance: float = math.nan
    training_loss: float = math.nan

    def waic(self, nbeta: float, n: int) -> float:
        """Estimate of the Bayes generalization loss at inverse temperature nbeta / n.

        The training loss plus nbeta / n^2 times the functional variance (Watanabe 2010, "Asymptotic equivalence of
        Bayes cross validation and widely applicable information criterion in singular learning theory", sec. 2).
        """
        return self.training_loss + nbeta / n * self.functional_variance / n


class SampleLosses:
    """Running moments of the loss of every sample, from draws of a chain or of several."""

    def __init__(self, objective: Objective) -> None:
        """Nothing is evaluated yet."""
        self._objective = objective
        self._moments: dict[int, Tensor] = {}
        self._available = True

    def add(self, positions: Tensor, batch: int) -> int:
        """Take in the losses on one batch.

        Args:
            positions: Draws, shape ``(draws, num_parameters)``.
            batch: Index of the batch.

        Returns:
            Number of batch losses evaluated.
        """
        if not self._available:
            return 0
        try:
            losses = self._objective.sample_losses(positions, batch).double()
        except ValueError:
            self._available = False
            return 0
        fine = losses.isfinite().all(dim=1)
        losses = losses[fine]
        moments = torch.stack(
            [torch.ones_like(losses).sum(0), losses.sum(0), losses.square().sum(0), torch.exp(-losses).sum(0)]
        )
        self._moments[batch] = self._moments.get(batch, 0) + moments
        return len(positions)

    def result(self, n: int) -> Fluctuations:
        """What the draws so far say of a data set of size n; NaN before each sample was seen twice."""
        if not self._available or not self._moments:
            return Fluctuations()
        count, total, squares, likelihood = torch.cat(list(self._moments.values()), dim=1)
        if int(count.min()) < 2:
            return Fluctuations()
        variance = (squares - total.square() / count) / (count - 1)
        training_loss = -(likelihood / count).log()
        return Fluctuations(n * float(variance.mean()), float(training_loss.mean()))
