"""The loss of a network that says the same of every sample: what any other is to be held against."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.objective.loss import Objective
from phasewatch.objective.outputs import NoOutputsError

MOST_EVALUATIONS = 12
"""Evaluations spent on fitting the constants. Chosen."""
VANISHED = 0.1
"""The constants are fitted once the slope of the loss in them is this share of the one at the mean output. Chosen."""


def loss_of_constant_prediction(objective: Objective, fitted: bool = True) -> float:
    """The mean loss where the network's outputs are the same for every sample.

    The outputs, see :meth:`Objective.split_loss`, are replaced by their mean at ``objective.parameters``, and if
    ``fitted`` by the constants of least loss: for a cross-entropy that gives the entropy of the class frequencies, for
    a squared error the variance of the targets. Those are looked for from zero and from the mean output, and kept where
    the slope in them has vanished; where it has not, as with log probabilities of which one is read, the loss of the
    mean output stands. (Probabilities whose logarithm is taken go past 1, and the loss below 0.) It takes the time of
    up to 16 evaluations on all batches.

    Args:
        objective: The loss.
        fitted: Whether the constants are fitted to the data.

    Returns:
        The loss; NaN where the outputs cannot be seen, or differ in shape between batches by more than the number of
        samples.
    """
    tried: list[tuple[float, float]] = []  # loss, norm of the slope
    with isolated(), torch.enable_grad(), suppress(NoOutputsError, RuntimeError, ValueError):
        means = _mean_outputs(objective)
        if means is None:
            return math.nan

        def evaluate(constants: list[Tensor]) -> float:
            total, slopes = 0.0, [torch.zeros_like(constant) for constant in constants]
            for batch, weight in enumerate(objective.batch_weights):
                loss = objective.loss_of_outputs(
                    batch, lambda number, output: constants[number].expand_as(output).clone()
                )
                found = torch.autograd.grad(loss, constants, allow_unused=True) if loss.requires_grad else []
                for slope, part in zip(slopes, found, strict=False):
                    if part is not None:
                        slope.add_(part, alpha=weight)
                total += weight * float(loss.detach())
            for constant, slope in zip(constants, slopes, strict=True):
                constant.grad = slope
            tried.append((total, math.hypot(*(float(slope.norm()) for slope in slopes))))
            return total

        constants = [mean.clone().requires_grad_() for mean in means]
        evaluate(constants)
        if fitted:
            zeros = [torch.zeros_like(mean).requires_grad_() for mean in means]
            start = zeros if evaluate(zeros) < tried[0][0] else constants
            optimizer = torch.optim.LBFGS(
                start, max_eval=MOST_EVALUATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe"
            )
            optimizer.step(lambda: evaluate(start))
    vanished = [loss for loss, slope in tried if slope <= VANISHED * tried[0][1] and math.isfinite(loss)]
    return min(vanished, default=tried[0][0]) if tried else math.nan


def _mean_outputs(objective: Objective) -> list[Tensor] | None:
    """The mean of each output over the samples; None where batches disagree on its shape."""
    means: list[Tensor] = []
    for batch, (size, share) in enumerate(zip(objective.batch_sizes, objective.batch_weights, strict=True)):
        outputs = objective.outputs_and_slopes(batch).outputs
        axes = [output.shape.index(size) if size in output.shape else 0 for output in outputs]
        own = [o.mean(axis, keepdim=True) if o.dim() else o for o, axis in zip(outputs, axes, strict=True)]
        if means and [mean.shape for mean in own] != [mean.shape for mean in means]:
            return None
        shares = [mean * share for mean in own]
        means = [mean + part for mean, part in zip(means, shares, strict=True)] if means else shares
    return means
