r"""The network and its loss linearised on one batch: what :math:`J^\top H_\ell J` is made of.

:math:`J` is the Jacobian of the outputs in the parameters, :math:`H_\ell` the Hessian of the loss in the outputs. All
is made, and called, while the objective is held at its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phasewatch.objective import Objective
from phasewatch.objective.outputs import total
from phasewatch.objective.relative_entropy import log_probability_dimension


class LossCurvature:
    r"""Products with :math:`H_\ell`; of the network no graph is held, of the loss alone.

    In log-probabilities their loss is linear. But exponentials that add up to one cannot be changed at will: with the
    logarithm of their sum, which is always zero, added to the loss its curvature makes the Fisher information, as that
    of a cross-entropy in the logits does (Martens 2020, "New insights and perspectives on the natural gradient method",
    sec. 9.2).

    Attributes:
        leaves: The outputs as leaves.
        slopes: Gradients of the loss in them, as functions of them.
    """

    def __init__(self, loss: Tensor, leaves: list[Tensor]) -> None:
        """Differentiate once; arguments as :meth:`phasewatch.Objective.split_loss` returns them."""
        self.leaves = leaves
        self.slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        normalization = _normalization(leaves, self.slopes)
        if normalization is not None and self._is_none():
            self.slopes = torch.autograd.grad(loss + normalization, leaves, create_graph=True, materialize_grads=True)

    def _is_none(self) -> bool:
        """Whether the loss is linear, along a change of no symmetry."""
        changes = [torch.cos(torch.arange(leaf.numel())).to(leaf).view_as(leaf) for leaf in self.leaves]
        return not any(bool((change != 0).any()) for change in self(changes))

    def __call__(self, changes: Sequence[Tensor], batched: bool = False) -> list[Tensor]:
        """How the slopes change along changes of the outputs."""
        return pull_back(self.slopes, self.leaves, changes, batched)


def _normalization(leaves: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor | None:
    """The logarithms of what probabilities sum to, as each weighs in the loss; None where outputs are none."""
    found = []
    for leaf, slope in zip(leaves, slopes, strict=True):
        if not bool((slope != 0).any()):
            continue
        dim = log_probability_dimension(leaf.detach())
        if dim is None:
            return None
        found.append((leaf.logsumexp(dim, keepdim=True) * -slope.detach().sum(dim, keepdim=True)).sum())
    return total(found) if found else None


class Jacobian:
    """Products with J and its transpose, while the graph of the outputs is held.

    Attributes:
        outputs: Functions of the parameters.
    """

    def __init__(self, outputs: Sequence[Tensor], parameters: Tensor) -> None:
        """Nothing is differentiated yet; arguments as for :meth:`phasewatch.Objective.split_loss`."""
        self.outputs = outputs
        self._parameters = parameters
        self._transposed: tuple[list[Tensor], Tensor] | None = None

    def transposed(self, cotangents: Sequence[Tensor], batched: bool = False) -> Tensor:
        r"""The product :math:`J^\top u`, of the shape of the parameters."""
        return pull_back(self.outputs, [self._parameters], cotangents, batched)[0]

    def by_backward(self, vectors: Tensor, batched: bool = False) -> list[Tensor]:
        r"""The product :math:`J v` as the derivative of :math:`u \mapsto J^\top u`.

        It is there wherever second derivatives are. The graph of that function is held from the first call on.
        """
        if self._transposed is None:
            cotangents = [torch.zeros_like(output, requires_grad=True) for output in self.outputs]
            (image,) = torch.autograd.grad(
                self.outputs, self._parameters, cotangents, create_graph=True, materialize_grads=True
            )
            self._transposed = cotangents, image
        cotangents, image = self._transposed
        return pull_back([image], cotangents, [vectors], batched)


def by_forward_mode(
    objective: Objective,
    direction: Tensor,
    batch: int,
    outputs: Sequence[Tensor],
    parameters: Tensor | None = None,
) -> list[Tensor] | None:
    """The product :math:`J v` without any graph; None where the model has no such derivative of each of the outputs.

    Args:
        objective: The loss on the probe.
        direction: v, shape ``(num_parameters,)``.
        batch: Index of the batch.
        outputs: Tensors of the shapes of the outputs.
        parameters: See :meth:`phasewatch.Objective.output_tangents`.
    """
    try:
        found = [t for t in objective.output_tangents(direction, batch, parameters) if t is not None]
    except Exception:  # the model's code may fail in its own ways without gradients
        return None
    return found if [t.shape for t in found] == [output.shape for output in outputs] else None


def pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], batched: bool = False
) -> list[Tensor]:
    """Vector-Jacobian products, of the rows of the cotangents if batched; zero where nothing depends on an input."""
    pairs = [(output, c) for output, c in zip(outputs, cotangents, strict=True) if output.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs:
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            inputs,
            [c for _, c in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    rows = cotangents[0].shape[:1] if batched else ()
    return [x.new_zeros(*rows, *x.shape) if g is None else g for x, g in zip(inputs, found, strict=True)]
