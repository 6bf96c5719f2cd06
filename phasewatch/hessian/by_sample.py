r"""The Gauss-Newton matrix of a network with few outputs as a sum over its samples.

A product with the matrix goes through all samples. Where the outputs of each depend on this sample alone, their
Jacobian is had by as many backward passes as a sample has outputs, and :math:`\sum J_n^\top H_n J_n` is formed by
products of matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from scipy.linalg import get_blas_funcs
from torch import Tensor

from phasewatch.hessian.lanczos import own_generator
from phasewatch.hessian.linearization import LossCurvature
from phasewatch.hessian.operators import GaussNewtonOperator
from phasewatch.objective import Objective

MOST_OUTPUTS = 16
"""Of a sample. With ten, 1.5 thousand parameters and 360 samples it takes 0.6 of the time of the products, and that
grows with them."""

BLOCK_MEMORY = 2**22
"""Bytes of Jacobian that are held at a time. Chosen: larger blocks are no faster."""


def gauss_newton_by_sample(operator: GaussNewtonOperator) -> Tensor | None:
    """The whole matrix, symmetric, in place of :meth:`GaussNewtonOperator.dense`.

    It is compared with a product of the operator, which also finds what is not finite.

    Args:
        operator: The matrix by its products.

    Returns:
        Shape ``(num_parameters, num_parameters)``, on the CPU; None where samples have too many outputs, cannot be told
        apart or depend on one another, and where the loss is not convex in the outputs.

    Raises:
        ValueError: If the product is not finite.
        RuntimeError: If an operation of the model has no second derivative.
    """
    objective = operator.objective
    draw = torch.randn(operator.shape[0], generator=own_generator(0), dtype=torch.float64)
    vector = draw.to(objective.parameters)
    product = (operator @ vector).cpu()
    if operator.num_outputs() > MOST_OUTPUTS * objective.num_samples:
        return None
    upper: Any = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # slow batching rules of single operators, and variances of one sample
            for batch, weight in enumerate(objective.batch_weights):
                for factor in _factors(objective, batch):
                    rows = factor.cpu().numpy()
                    (add_square,) = get_blas_funcs(("syrk",), (rows,))
                    upper = add_square(weight, rows.T, beta=1.0, c=upper, overwrite_c=True)
    except Exception:  # the module or the loss does not take a batch of one, or vmap does not know an operation
        return None
    matrix = torch.from_numpy(upper)
    matrix += matrix.triu(1).T
    tolerance = torch.finfo(objective.dtype).eps ** 0.5
    agrees = (matrix @ vector.cpu() - product).norm() <= tolerance * product.norm()
    return matrix if agrees else None


def _factors(objective: Objective, batch: int) -> Iterator[Tensor]:
    r"""What :math:`J^\top H_\ell J` is the square of, for a few samples at a time, ``(outputs, num_parameters)``."""
    size = objective.batch_sizes[batch]
    roots = _roots(_curvatures(objective, batch))
    step = max(BLOCK_MEMORY // (roots[0].shape[0] * objective.parameters.nbytes), 1)
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        places = objective.parameters.detach().expand(rows.stop - rows.start, -1).requires_grad_()
        outputs = objective.outputs_by_sample(places, batch, rows)
        slopes = [torch.autograd.grad(output.sum(), places, retain_graph=True)[0] for output in outputs.T]
        yield (roots[rows] @ torch.stack(slopes, dim=1)).flatten(0, 1)


def _roots(curvatures: Tensor) -> Tensor:
    r"""R with :math:`R^\top R` the matrices, of which what bends down is left out."""
    values, vectors = torch.linalg.eigh((curvatures + curvatures.mT) / 2)
    return values.clamp(min=0.0).sqrt()[:, :, None] * vectors.mT


def _curvatures(objective: Objective, batch: int) -> Tensor:
    """The Hessians of the loss in the outputs of each sample alone, shape ``(samples, outputs, outputs)``."""
    parameters = objective.parameters.detach().clone().requires_grad_()
    size = objective.batch_sizes[batch]
    with objective.holding(objective.tensors_at(parameters)):
        _, leaves, loss = objective.split_loss(parameters, batch)
        widths = [leaf.numel() // size for leaf in leaves]
        units = torch.eye(sum(widths), dtype=loss.dtype, device=loss.device)[:, None].expand(-1, size, -1)
        changes = [
            own.reshape(-1, *leaf.shape).to(leaf) for own, leaf in zip(units.split(widths, dim=2), leaves, strict=True)
        ]
        curved = LossCurvature(loss, leaves)(changes, batched=True)
    return torch.cat([own.reshape(len(units), size, -1) for own in curved], dim=2).movedim(0, 2)
