"""The localized tempered posterior around w*, seen through one minibatch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from phasewatch.objective import Objective

CONTROL_VARIATE_BYTES = 2**28
"""Gradients at w* of the single batches are kept while they fit into this; without them gradients are noisier."""


class LocalizedPosterior:
    r"""Minibatch views of :math:`U(w) = n\beta\,(L(w) - L(w^*)) + \tfrac{\gamma}{2} |w - w^*|^2`.

    The loss of batch b is corrected by its known slope at w* (a control variate: Baker et al. 2019, "Control
    variates for stochastic gradient MCMC"), so that the noise of its gradient vanishes at w* and stays small near it.

    Attributes:
        center: w*, shape ``(num_parameters,)``.
        full_gradient: Gradient of the loss on all batches at w*, shape ``(num_parameters,)``.
        gradients: Number of minibatch gradients evaluated so far.
    """

    def __init__(self, objective: Objective, nbeta: float, localization: float) -> None:
        """Evaluate the gradients at w*."""
        self.objective = objective
        self.nbeta = nbeta
        self.localization = localization
        self.center = objective.parameters
        self.gradients = 0
        count = objective.num_batches
        size = self.center.numel() * self.center.element_size()
        kept = count * size <= CONTROL_VARIATE_BYTES
        self._corrections = self.center.new_empty(count if kept else 0, self.center.numel())
        self.full_gradient = torch.zeros_like(self.center)
        for batch, weight in enumerate(objective.batch_weights):
            _, gradient = objective.loss_and_gradient(self.center, batch)
            self.gradients += 1
            self.full_gradient.add_(gradient, alpha=weight)
            if kept:
                self._corrections[batch] = gradient
        torch.sub(self.full_gradient, self._corrections, out=self._corrections)

    def evaluate(self, positions: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a batch says of U at several positions.

        Args:
            positions: Shape ``(chains, num_parameters)``.
            batch: Index of the batch.

        Returns:
            nbeta times the excess loss and U, shape ``(chains,)`` and in float64, and the exact gradient of that U,
            shape ``(chains, num_parameters)``.
        """
        losses, gradients = self.objective.losses_and_gradients(positions, batch)
        self.gradients += len(positions)
        displacements = positions - self.center
        excess = (losses - self.objective.batch_losses[batch]).double()
        if len(self._corrections):
            excess += (displacements @ self._corrections[batch]).double()
            gradients += self._corrections[batch]
        energies = self.nbeta * excess
        potentials = energies + self.localization / 2 * displacements.square().sum(dim=1).double()
        return energies, potentials, gradients.mul_(self.nbeta).add_(displacements, alpha=self.localization)

    def slopes(self, positions: Tensor) -> Tensor:
        """First-order change of nbeta L from w* to each position, shape ``(chains,)``."""
        return self.nbeta * ((positions - self.center) @ self.full_gradient)
