"""The localized tempered posterior around w*, seen through one minibatch at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from phasewatch.objective import NoOutputsError, Objective, split_off_misfit

LARGEST_GRADIENTS = 2**28
"""Bytes that the gradients at w* of the single batches may take; beyond, minibatches are noisier. Chosen."""
LOSS_PER_GRADIENT = 1 / 3
"""Cost of a loss without its gradient: a backward pass takes the arithmetic of two forward ones."""


class LocalizedPosterior:
    r"""Minibatch views of :math:`U(w) = n\beta\,(L(w) - L(w^*)) + \tfrac{\gamma}{2} |w - w^*|^2`.

    Most of the noise of a batch is the misfit of its samples (:mod:`phasewatch.objective.misfit`). A view therefore
    shows the loss of a batch without its misfit, and in place of that the slope at w* of the misfit on all batches. It
    misses the nonlinear misfit, which :meth:`nonlinear_misfit` evaluates on all batches. Where the outputs cannot be
    seen, the loss of a batch is corrected by its slope at w* instead (Baker et al. 2019, "Control variates for
    stochastic gradient MCMC"): then nothing is missed, but the noise grows with the distance from w*.

    Attributes:
        center: w*, shape ``(num_parameters,)``.
        nbeta: Inverse temperature times n; may be changed.
        compiled: Whether evaluations are compiled.
        full_gradient: Gradient of the loss on all batches at w*, shape ``(num_parameters,)``.
        gradients: Number of minibatch gradients evaluated so far; a loss alone counts a third.
        cost_of_nonlinear_misfit: What a look at it costs for one chain, in minibatch gradients; 0 where there is none.
    """

    def __init__(self, objective: Objective, nbeta: float, localization: float, compiled: bool = False) -> None:
        """Evaluate the gradients at w*."""
        self.objective = objective
        self.nbeta = nbeta
        self.localization = localization
        self.compiled = compiled
        self.center = objective.parameters
        self.gradients = 0.0
        weights = torch.tensor(objective.batch_weights, dtype=torch.float64, device=objective.device)
        self._loss = objective.batch_losses.double() @ weights
        self._seen = objective
        self._misfit: Objective | None = None
        self._slopes: list[Tensor] | None = None
        if objective.num_batches == 1:
            self.full_gradient = self._full_gradient(objective)
            return
        try:
            self._seen, self._misfit = split_off_misfit(objective)
        except NoOutputsError:
            gradients = [self._gradient(objective, batch) for batch in range(objective.num_batches)]
            self.full_gradient = _mean(gradients, objective.batch_weights)
            if len(gradients) * self.center.numel() * self.center.element_size() <= LARGEST_GRADIENTS:
                self._slopes = [self.full_gradient - gradient for gradient in gradients]
        else:
            slope = self._full_gradient(self._misfit)
            self.full_gradient = self._full_gradient(self._seen) + slope
            self._slopes = [slope] * objective.num_batches

    @property
    def cost_of_nonlinear_misfit(self) -> float:
        """See the class."""
        return 0.0 if self._misfit is None else self.objective.num_batches * LOSS_PER_GRADIENT

    def ignore_nonlinear_misfit(self) -> None:
        """From now on it counts as nothing."""
        self._misfit = None

    def evaluate(self, positions: Tensor, batch: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """What a batch says of U less the nonlinear misfit at several positions, or all batches of U.

        Args:
            positions: Shape ``(chains, num_parameters)``.
            batch: Index of the batch, or None for all.

        Returns:
            nbeta times the excess loss and U, shape ``(chains,)`` and in float64, and the exact gradient of that U,
            shape ``(chains, num_parameters)``.
        """
        displacements = positions - self.center
        objective = self.objective if batch is None else self._seen
        losses, gradients = objective.losses_and_gradients(positions, batch, compiled=self.compiled)
        self.gradients += len(positions) * (objective.num_batches if batch is None else 1)
        start = self._loss if batch is None else objective.batch_losses[batch]
        excess = (losses - start).double()
        slope = self._slopes[batch] if batch is not None and self._slopes is not None else None
        if slope is not None:
            excess = excess + (displacements @ slope).double()
        energies = self.nbeta * excess
        potentials = energies + self.localization / 2 * torch.linalg.vecdot(displacements, displacements).double()
        forces = displacements.mul_(self.localization).add_(gradients, alpha=self.nbeta)
        return energies, potentials, forces if slope is None else forces.add_(slope, alpha=self.nbeta)

    def nonlinear_misfit(self, positions: Tensor) -> Tensor:
        """The misfit on all batches less its slope at w*, times nbeta, shape ``(chains,)``, in float64."""
        if self._misfit is None:
            return torch.zeros(len(positions), dtype=torch.float64, device=positions.device)
        assert self._slopes is not None
        self.gradients += len(positions) * self.cost_of_nonlinear_misfit
        linear = (positions - self.center) @ self._slopes[0]
        return self.nbeta * (self._misfit.losses(positions).double() - linear.double())

    def _gradient(self, objective: Objective, batch: int) -> Tensor:
        self.gradients += 1
        return objective.loss_and_gradient(self.center, batch)[1]

    def _full_gradient(self, objective: Objective) -> Tensor:
        gradients = (self._gradient(objective, batch) for batch in range(objective.num_batches))
        return _mean(gradients, objective.batch_weights)


def _mean(tensors: Iterable[Tensor], weights: list[float]) -> Tensor:
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        total = tensor * weight if total is None else total.add_(tensor, alpha=weight)
    assert total is not None
    return total
