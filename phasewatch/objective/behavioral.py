r"""How far the function that a network computes is from the one at the start w*, as an objective of its own.

Measured by the loss it is the Bregman divergence of the loss in the outputs f,
:math:`D(w) = L(w) - L(w^*) - \\langle r, f(w) - f(w^*) \\rangle` with r the slope of the loss in f at w*: the
Kullback-Leibler divergence from the model at w* for a cross-entropy, half the squared distance for half a squared error
(Bushnaq et al. 2024, arXiv 2405.10927, sec. 2). Its Hessian at w* is the Gauss-Newton matrix (Martens 2020, "New
insights and perspectives on the natural gradient method", sec. 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.objective.output_distance import output_distance
from phasewatch.objective.outputs import NoOutputsError
from phasewatch.objective.start import OutputsAtStart

if TYPE_CHECKING:
    from phasewatch.objective.loss import Objective

Metric = Literal["loss", "outputs"]


def behavioral(objective: Objective, metric: Metric, nats_per_loss: float) -> Objective:
    """See :meth:`Objective.behavioral`."""
    if metric not in ("loss", "outputs"):
        raise ValueError(f"metric is {metric!r}; expected 'loss' or 'outputs'.")
    if not nats_per_loss > 0 or nats_per_loss == float("inf"):
        raise ValueError(f"nats_per_loss is {nats_per_loss}; expected a positive number, as 1 / noise variance.")
    if metric == "outputs" and nats_per_loss != 1.0:
        raise ValueError(
            "nats_per_loss has no meaning with metric='outputs', which is measured in units of the outputs' variance; "
            "leave it out there."
        )
    start = OutputsAtStart(objective)
    if start.earlier_outputs:
        raise NoOutputsError(
            "loss_fn makes the loss of the outputs of several calls of the network, and how far it has moved cannot be "
            "seen in the last one alone. Call the network once in loss_fn(module, batch), on all that it is to see."
        )
    if metric == "outputs":
        return _in_the_outputs(objective, start)
    if not start.recomputed:
        start = OutputsAtStart(objective.widened())
    return _in_the_loss(start, nats_per_loss)


def first_order(outputs: list[Tensor], start: Sequence[Tensor]) -> Tensor:
    """What the slopes at the start say of the motion of the outputs; ``start`` is ``[*outputs, *slopes]`` there."""
    values, slopes = start[: len(outputs)], start[len(outputs) :]
    moved = zip(outputs, values, slopes, strict=True)
    return torch.stack([(slope * (output - value)).sum() for output, value, slope in moved]).sum()


def _in_the_loss(start: OutputsAtStart, nats_per_loss: float) -> Objective:
    objective = start.objective
    nats = torch.tensor(nats_per_loss, dtype=objective.dtype, device=objective.device)
    data = start.of_each_batch(lambda _, own: [nats, own.loss, *own.outputs, *own.slopes])
    return objective.read_from_outputs(
        _divergence, data, held=start.past_outputs, again=lambda other: behavioral(other, "loss", nats_per_loss)
    )


def _divergence(outputs: list[Tensor], loss: Tensor, start: list[Tensor]) -> Tensor:
    return start[0] * (loss - start[1] - first_order(outputs, start[2:]))


def _in_the_outputs(objective: Objective, start: OutputsAtStart) -> Objective:
    with isolated():
        distance, data = output_distance(objective, start)
    return objective.read_from_outputs(distance, data, again=lambda other: behavioral(other, "outputs", 1.0))
