"""Objectives whose curvature is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from phasewatch.objective import Objective


class QuadraticForm(nn.Module):
    """A parameter ``w`` with the loss ``0.5 w' A w``."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.w = nn.Parameter(torch.linspace(-1, 1, len(matrix), dtype=matrix.dtype))


def planted(eigenvalues: Sequence[float], seed: int = 0) -> Objective:
    """A quadratic form with these eigenvalues in random directions."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T

    def loss_fn(module: nn.Module, _: Tensor) -> Tensor:
        return 0.5 * module.w @ (module.matrix @ module.w)

    return Objective(QuadraticForm((matrix + matrix.T) / 2), [torch.zeros(1)], loss_fn=loss_fn)


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().flatten(1).sum(1).mean()


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at_own_outputs(module: nn.Module, inputs: Tensor) -> Objective:
    """Squared error with the module's own outputs as targets: zero residual, zero gradient."""
    return Objective(module, [(inputs, module(inputs).detach())], loss_fn=squared_error)
