r"""How far the function that a network computes is from the one at the start w*, as an objective of its own.

Measured by the loss it is the Bregman divergence of the loss in the outputs f,
:math:`D(w) = L(w) - L(w^*) - \langle r, f(w) - f(w^*) \rangle` with r the slope of the loss in f at w*: the
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
from phasewatch.objective.convexity import Bend, bend
from phasewatch.objective.output_distance import output_distance
from phasewatch.objective.outputs import NoOutputsError, OutputsAndSlopes, total
from phasewatch.objective.relative_entropy import RelativeEntropy, log_probability_dimension
from phasewatch.objective.start import OutputsAtStart

if TYPE_CHECKING:
    from phasewatch.objective.loss import Objective

Metric = Literal["loss", "outputs"]

_NOT_CONVEX = "the loss is not convex in the network's outputs: the divergence from w* is negative at some of them"


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
    if start.earlier_outputs or (start.past_outputs and start.inside_of_a_call):
        raise NoOutputsError(
            "The loss is made of the outputs of several calls of modules, or inside of one of them of its parameters "
            "too, and how far the network has moved cannot be seen in the last call alone. Call the network once in "
            "loss_fn(module, batch), on all that it is to see, and make the loss of what it returns, or give "
            "outputs_fn(module, batch) -> outputs beside loss_fn(outputs, batch) -> scalar mean loss."
        )
    if not all(bool(output.isfinite().all()) for output in start[0].outputs):
        raise ValueError(
            "Some of the network's outputs are not finite, and neither is how far they move. Mask with a large "
            "negative number in the place of -inf, or inside of the loss."
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
    return total([(slope * (output - value)).sum() for output, value, slope in moved])


def _in_the_loss(start: OutputsAtStart, nats_per_loss: float) -> Objective:
    objective, first = start.objective, start[0]
    nats = torch.tensor(nats_per_loss, dtype=objective.dtype, device=objective.device)

    def again(other: Objective) -> Objective:
        return behavioral(other, "loss", nats_per_loss)

    bent = _bend(start)
    if bent is Bend.LINEAR:
        entropy = _relative_entropy(first)
        data = start.of_each_batch(lambda _, own: [nats, *entropy.given(own)])
        return objective.read_from_outputs(entropy, data, again=again)
    data = start.of_each_batch(lambda _, own: [nats, own.loss, *own.outputs, *own.slopes])
    return objective.read_from_outputs(
        _divergence,
        data,
        held=start.past_outputs,
        doubts=(_NOT_CONVEX,) if bent is Bend.NOT_CONVEX else (),
        again=again,
    )


def _bend(start: OutputsAtStart) -> Bend:
    """As the first batch shows it; where the loss is flat in all of that, as with every label ignored, the next."""
    with isolated():
        for batch in range(start.objective.num_batches):
            own = start[batch]
            bent = bend(start.objective, batch, own)
            if bent is not Bend.LINEAR or any(bool((slope != 0).any()) for slope in own.slopes):
                break
    return bent


def _divergence(outputs: list[Tensor], loss: Tensor, start: list[Tensor]) -> Tensor:
    return start[0] * (loss - start[1] - first_order(outputs, start[2:]))


def _relative_entropy(start: OutputsAndSlopes) -> RelativeEntropy:
    seen = [bool((slope != 0).any()) for slope in start.slopes]
    dimensions = tuple(
        log_probability_dimension(output) if used else None for output, used in zip(start.outputs, seen, strict=True)
    )
    if not any(seen) or any(dim is None for dim, used in zip(dimensions, seen, strict=True) if used):
        raise NoOutputsError(
            "The loss is linear in the network's outputs, so that how far they have moved cannot be measured by it: "
            "only what is not linear has a divergence. Have the module return what the loss is made of in a convex "
            "way, such as logits for a cross-entropy, or use metric='outputs'."
        )
    return RelativeEntropy(dimensions)


def _in_the_outputs(objective: Objective, start: OutputsAtStart) -> Objective:
    with isolated():
        distance, data = output_distance(objective, start)
    return objective.read_from_outputs(distance, data, again=lambda other: behavioral(other, "outputs", 1.0))
