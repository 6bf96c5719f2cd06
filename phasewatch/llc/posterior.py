"""The localized tempered posterior around w*, seen through one minibatch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from phasewatch.objective import Objective

CONTROL_VARIATE_BYTES = 2**28
"""Gradients at w* of the single batches are kept while they fit into this; without them gradients are noisier."""


class LocalizedPosterior:
    r"""Minibatch views of :math:`U(w) = n\beta\,(L(w) - L(w^*)) + \tfrac{\gamma}{2} |w - w^*|^2`.

    The gradient of batch b is corrected by its known error at w* (a control variate: Baker et al. 2019,
    "Control variates for stochastic gradient MCMC"), so that its noise vanishes at w* and stays small near it.

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
        self._batch_losses = objective.batch_losses
        count = objective.num_batches
        size = self.center.numel() * self.center.element_size()
        self._kept = count * size <= CONTROL_VARIATE_BYTES
        self._corrections = self.center.new_empty(count if self._kept else 0, self.center.numel())
        self.full_gradient = torch.zeros_like(self.center)
        for batch, weight in enumerate(objective.batch_weights):
            _, gradient = self._loss_and_gradient(self.center, batch)
            self.full_gradient.add_(gradient, alpha=weight)
            if self._kept:
                self._corrections[batch] = gradient
        torch.sub(self.full_gradient, self._corrections, out=self._corrections)

    def excess_loss_and_force(self, position: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """L_b(w) - L_b(w*), a scalar, and minus the estimate from this batch of the gradient of U."""
        loss, force = self._loss_and_gradient(position, batch)
        if self._kept:
            force.add_(self._corrections[batch])
        force.mul_(-self.nbeta)
        if self.localization:
            force.add_(self.center, alpha=self.localization).sub_(position, alpha=self.localization)
        return loss - self._batch_losses[batch], force

    def potential(self, position: Tensor, batch: int, excess_loss: Tensor) -> Tensor:
        """The potential whose exact negative gradient is the force from this batch; a float64 scalar."""
        displacement = position - self.center
        energy = self.nbeta * excess_loss.double() + self.localization / 2 * displacement.square().sum().double()
        if self._kept:
            energy += self.nbeta * torch.dot(self._corrections[batch], displacement).double()
        return energy

    def slope(self, position: Tensor) -> Tensor:
        """First-order change of nbeta L from w* to ``position``, a scalar."""
        return self.nbeta * torch.dot(self.full_gradient, position - self.center)

    def _loss_and_gradient(self, position: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        self.gradients += 1
        return self.objective.loss_and_gradient(position, batch)
