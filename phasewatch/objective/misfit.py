r"""A loss in two parts: how far the outputs have moved, and how that motion meets what the data still miss.

With r the slope of the loss in the network's outputs f at the start w*,
:math:`L(w) - L(w^*) = D(w) + R(w)`, :math:`R(w) = \langle r, f(w) - f(w^*) \rangle`. The divergence D (see
:meth:`Objective.behavioral`) is least at w* whatever the data say, and hardly depends on which samples are looked at.
The misfit R holds the noise of the data. Both see w through the outputs alone, so that moving along a symmetry of the
network changes neither. What a loss sees of w past the outputs (weight decay written into it) is a third part.
"""

from __future__ import annotations

from torch import Tensor

from phasewatch.objective.behavioral import first_order
from phasewatch.objective.loss import Objective
from phasewatch.objective.outputs import OutputReader
from phasewatch.objective.start import OutputsAtStart


def split_off_misfit(objective: Objective) -> tuple[Objective, Objective]:
    """A loss without its misfit, and the misfit, each an objective on the same parameters and batches.

    Args:
        objective: The loss; the outputs are those of the last outermost call of a module with parameters that its
            ``loss_fn`` makes on each batch.

    Returns:
        ``(remainder, misfit)``; batch by batch, the loss less the loss at the start is their sum. The remainder is
        :meth:`Objective.behavioral` where the loss depends on the parameters through these outputs alone; otherwise it
        holds what goes past them too.

    Raises:
        NoOutputsError: If the outputs cannot be seen (a loss computed inside ``forward``, or no module called).

    Example:
        >>> import torch
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
    start = OutputsAtStart(objective)
    return _read(objective, start, _remainder), _read(objective, start, _misfit)


def _read(objective: Objective, start: OutputsAtStart, reader: OutputReader) -> Objective:
    data = start.of_each_batch(lambda _, own: [own.loss, *own.outputs, *own.slopes])
    return objective.read_from_outputs(reader, data, again=lambda other: _read(other, OutputsAtStart(other), reader))


def _misfit(outputs: list[Tensor], _loss: Tensor, start: list[Tensor]) -> Tensor:
    return first_order(outputs, start[1:])


def _remainder(outputs: list[Tensor], loss: Tensor, start: list[Tensor]) -> Tensor:
    return loss - start[0] - first_order(outputs, start[1:])
