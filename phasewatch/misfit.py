r"""A loss in two parts: how far the outputs have moved, and how that motion meets what the data still miss.

With r the slope of the loss in the network's outputs f at the start w*,
:math:`L(w) - L(w^*) = D(w) + R(w)`, :math:`R(w) = \\langle r, f(w) - f(w^*) \\rangle`. The divergence D is least at w*
whatever the data say, hardly depends on which samples are looked at, and its Hessian at w* is the Gauss-Newton matrix
(Martens 2020, "New insights and perspectives on the natural gradient method", sec. 8). For a cross-entropy it is the
Kullback-Leibler divergence from the model at w*, for half a squared error half the squared distance of the outputs. The
misfit R holds the noise of the data. Both see w through the outputs alone, so that moving along a symmetry of the
network changes neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.objective import NoOutputsError, Objective

LARGEST_OUTPUTS = 2**28
"""Bytes that the outputs and their slopes may take over all batches."""


def split_off_misfit(objective: Objective) -> tuple[Objective, Objective]:
    """The divergence and the misfit of a loss, each an objective on the same parameters and batches.

    Args:
        objective: The loss; the outputs are those of the last outermost call of a module with parameters that its
            ``loss_fn`` makes.

    Returns:
        ``(divergence, misfit)``; batch by batch, the loss less the loss at the start is their sum. Where the loss
        depends on the parameters past the outputs too (weight decay written into it), that stays in the divergence.

    Raises:
        NoOutputsError: If the outputs cannot be seen (a loss computed inside ``forward``, or no module called), or
            take more memory than 256 MiB over all batches.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> module = torch.nn.Linear(2, 1)
        >>> batch = (torch.randn(6, 2), torch.randn(6, 1))
        >>> def half_squared_error(module, batch):
        ...     return 0.5 * (module(batch[0]) - batch[1]).square().mean()
        >>> objective = Objective(module, [batch], loss_fn=half_squared_error)
        >>> divergence, misfit = split_off_misfit(objective)
        >>> moved = objective.parameters + 1
        >>> torch.allclose(divergence.loss(moved) + misfit.loss(moved), objective.loss(moved) - objective.loss())
        True
        >>> bool(divergence.gradient().abs().max() < 1e-6), bool(divergence.loss(moved) > 0)
        (True, True)
    """
    data: list[list[Tensor]] = []
    kept = 0
    with isolated():
        for batch, loss in enumerate(objective.batch_losses):
            outputs, slopes, call = objective.outputs_and_slopes(batch)
            kept += 2 * sum(output.numel() * output.element_size() for output in outputs)
            if kept > LARGEST_OUTPUTS:
                raise NoOutputsError(
                    f"The outputs of the first {batch + 1} of {objective.num_batches} batches and their slopes take "
                    f"{kept / 2**20:,.0f} MiB; expected at most {LARGEST_OUTPUTS / 2**20:,.0f} over all batches."
                )
            data.append([loss, *outputs, *slopes])
    return objective.read_from_outputs(call, _divergence, data), objective.read_from_outputs(call, _misfit, data)


def _misfit(outputs: list[Tensor], _loss: Tensor, start: list[Tensor]) -> Tensor:
    values, slopes = start[1 : 1 + len(outputs)], start[1 + len(outputs) :]
    moved = zip(outputs, values, slopes, strict=True)
    return torch.stack([(slope * (output - value)).sum() for output, value, slope in moved]).sum()


def _divergence(outputs: list[Tensor], loss: Tensor, start: list[Tensor]) -> Tensor:
    return loss - start[0] - _misfit(outputs, loss, start)
