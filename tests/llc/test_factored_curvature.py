"""Masses learnt from forces, against curvatures that are Kronecker products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phasewatch.llc.factored_curvature import FactoredCurvature

SHAPES = [torch.Size((6, 4)), torch.Size((5,)), torch.Size(()), torch.Size((2, 3, 2))]
NBETA = 50.0


def spectrum(size: int, generator: torch.Generator) -> Tensor:
    """A positive matrix with eigenvalues over two decades."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(-1, 1, size, dtype=torch.float64)) @ basis.T


def curvature(generator: torch.Generator) -> Tensor:
    blocks = []
    for shape in SHAPES:
        if len(shape) < 2:
            blocks.append(torch.diag(torch.rand(shape.numel(), generator=generator, dtype=torch.float64)))
        else:
            rows, columns = shape[0], shape[1:].numel()
            blocks.append(torch.kron(spectrum(rows, generator), spectrum(columns, generator)))
    return torch.block_diag(*blocks)


def learnt(matrix: Tensor, generator: torch.Generator, rounds: int) -> FactoredCurvature:
    """From forces on draws of the Gaussian of that curvature."""
    found = FactoredCurvature(SHAPES, matrix[0])
    size = len(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    for _ in range(rounds):
        noise = torch.randn(400, size, generator=generator, dtype=torch.float64)
        positions = (noise / (1 + NBETA * values).sqrt()) @ vectors.T
        found.learn(positions @ matrix, NBETA)
    found.refresh(NBETA)
    return found


def whitened(found: FactoredCurvature, matrix: Tensor) -> Tensor:
    """Eigenvalues of the potential's Hessian in units of the masses."""
    narrow = found.narrow(torch.eye(len(matrix), dtype=torch.float64), NBETA)
    assert torch.allclose(narrow, narrow.T)
    return torch.linalg.eigvalsh(narrow @ (torch.eye(len(matrix)) + NBETA * matrix) @ narrow)


def test_a_curvature_that_factors_is_found() -> None:
    """In units of the masses all directions have nearly the curvature 1, where they had 1 to 5,000 before."""
    generator = torch.Generator().manual_seed(0)
    matrix = curvature(generator)
    values = whitened(learnt(matrix, generator, rounds=30), matrix)
    assert values.min() > 0.5
    assert values.max() < 2.0
    assert torch.linalg.eigvalsh(matrix).max() * NBETA > 4_000


def test_no_forces_no_masses() -> None:
    """What has seen no force leaves vectors as they are; forces that are not finite are none."""
    found = FactoredCurvature(SHAPES, torch.zeros(1, dtype=torch.float64))
    vectors = torch.randn(3, 42, dtype=torch.float64)
    assert torch.equal(found.narrow(vectors, NBETA), vectors)
    found.learn(torch.full((2, 42), torch.nan, dtype=torch.float64), NBETA)
    found.learn(torch.full((2, 42), torch.inf, dtype=torch.float64), NBETA)
    found.refresh(NBETA)
    assert torch.allclose(found.narrow(vectors, NBETA), vectors)


def test_a_copy_learns_by_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = curvature(generator)
    found = learnt(matrix, generator, rounds=3)
    before = whitened(found, matrix)
    copied = found.copy()
    copied.learn(torch.randn(2, len(matrix), generator=generator, dtype=torch.float64), NBETA)
    copied.refresh(NBETA)
    assert torch.equal(whitened(found, matrix), before)
    assert not torch.allclose(whitened(copied, matrix), before)


@pytest.mark.parametrize(("shape", "sides"), [((100, 3), 1), ((10, 3), 2), ((3, 100), 1)])
def test_wide_matrices_have_a_diagonal_factor(shape: tuple[int, int], sides: int) -> None:
    """The factor of the longer side takes no more than four times the memory of the matrix."""
    found = FactoredCurvature([torch.Size(shape)], torch.zeros(1))
    (tensor,) = found._tensors
    assert (tensor.rows.dim() == 2) + (tensor.columns.dim() == 2) == sides
    assert max(tensor.rows.numel(), tensor.columns.numel()) <= 4 * shape[0] * shape[1]
