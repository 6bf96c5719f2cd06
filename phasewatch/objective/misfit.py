r"""A loss in two parts: how far the outputs have moved, and how that motion meets what the data still miss.

With r the slope of the loss in the network's outputs f at the start w*,
:math:`L(w) - L(w^*) = D(w) + R(w)`, :math:`R(w) = \\langle r, f(w) - f(w^*) \\rangle`. The divergence D is least at w*
whatever the data say, hardly depends on which samples are looked at, and its Hessian at w* is the Gauss-Newton matrix
(Martens 2020, "New insights and perspectives on the natural gradient method", sec. 8). For a cross-entropy it is the
Kullback-Leibler divergence from the model at w*, for half a squared error half the squared distance of the outputs. The
misfit R holds the noise of the data. Both see w through the outputs alone, so that moving along a symmetry of the
network changes neither. What a loss sees of w past the outputs (weight decay written into it) is a third part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.objective.loss import Objective, OutputsAndSlopes
from phasewatch.objective.outputs import NoOutputsError, OutputReader

LARGEST_OUTPUTS = 2**28
"""Bytes that the outputs and their slopes may take over all batches."""


def split_off_misfit(objective: Objective) -> tuple[Objective, Objective]:
    """A loss without its misfit, and the misfit, each an objective on the same parameters and batches.

    Args:
        objective: The loss; the outputs are those of the last outermost call of a module with parameters that its
            ``loss_fn`` makes on each batch.

    Returns:
        ``(remainder, misfit)``; batch by batch, the loss less the loss at the start is their sum. The remainder is the
        :func:`divergence` where the loss depends on the parameters through these outputs alone; otherwise it holds
        what goes past them too.

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
        >>> remainder, misfit = split_off_misfit(objective)
        >>> moved = objective.parameters + 1
        >>> torch.allclose(remainder.loss(moved) + misfit.loss(moved), objective.loss(moved) - objective.loss())
        True
        >>> bool(remainder.gradient().abs().max() < 1e-6), bool(remainder.loss(moved) > 0)
        (True, True)
    """
    start = _start(objective)
    return _read(objective, start, _remainder), _read(objective, start, _misfit)


def divergence(objective: Objective) -> Objective:
    """How far the outputs are from those at the start, as the loss sees it; least there, and zero.

    Whatever the loss sees of the parameters past the outputs (weight decay written into it) is held as it is at the
    start.

    Args:
        objective: The loss, as for :func:`split_off_misfit`.

    Raises:
        NoOutputsError: As for :func:`split_off_misfit`, and if the loss is made of the outputs of several calls of the
            network, of which one alone does not say how far it has moved.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> module = torch.nn.Linear(2, 1)
        >>> def decayed(module, batch):
        ...     return 0.5 * module(batch).square().mean() + module.weight.square().sum()
        >>> moved = divergence(Objective(module, [torch.eye(2)], loss_fn=decayed))
        >>> float(moved.gradient().abs().max())
        0.0
    """
    start = _start(objective)
    if any(batch.earlier_outputs for batch in start):
        raise NoOutputsError(
            "loss_fn makes the loss of the outputs of several calls of the network, and how far it has moved cannot be "
            "seen in the last one alone. Call the network once in loss_fn(module, batch), on all that it is to see."
        )
    return _read(objective, start, _remainder, held=any(batch.past_outputs for batch in start))


def _start(objective: Objective) -> list[OutputsAndSlopes]:
    found = []
    kept = 0
    with isolated():
        for batch in range(objective.num_batches):
            found.append(objective.outputs_and_slopes(batch))
            kept += 2 * sum(output.numel() * output.element_size() for output in found[-1].outputs)
            if kept > LARGEST_OUTPUTS:
                raise NoOutputsError(
                    f"The outputs of the first {batch + 1} of {objective.num_batches} batches and their slopes take "
                    f"{kept / 2**20:,.0f} MiB; expected at most {LARGEST_OUTPUTS / 2**20:,.0f} over all batches."
                )
    return found


def _read(objective: Objective, start: list[OutputsAndSlopes], reader: OutputReader, held: bool = False) -> Objective:
    data = [[loss, *b.outputs, *b.slopes] for loss, b in zip(objective.batch_losses, start, strict=True)]
    return objective.read_from_outputs(
        reader, data, held=held, again=lambda other: _read(other, _start(other), reader, held)
    )


def _misfit(outputs: list[Tensor], _loss: Tensor, start: list[Tensor]) -> Tensor:
    values, slopes = start[1 : 1 + len(outputs)], start[1 + len(outputs) :]
    moved = zip(outputs, values, slopes, strict=True)
    return torch.stack([(slope * (output - value)).sum() for output, value, slope in moved]).sum()


def _remainder(outputs: list[Tensor], loss: Tensor, start: list[Tensor]) -> Tensor:
    return loss - start[0] - _misfit(outputs, loss, start)
