"""The curvature that chains meet, tensor by tensor as a Kronecker product, learnt from the forces on them.

Where positions are drawn as often as a Gaussian of precision 1 + b A says, the forces b A x have the covariance
h^2 / (1 + h) in each eigendirection, h = b a: from it the curvature h follows. Of the matrix of a layer that covariance
is taken for a Kronecker product of one between its rows and one between its columns (Gupta, Koren & Singer 2018,
"Shampoo", lemma 8; Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature"),
whose eigenvectors are those of the factors: a few forces tell it, and no more than gradients is asked of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORGETTING = 0.9
"""Weight of what was learnt before each time that chains report their forces. Chosen: ten reports count."""
SMALL = 2**15
"""Entries up to which the Kronecker product of a tensor's two bases is formed: one product with it is faster then. With
four chains on a CPU, two to three times for 10 x 10 weights; for 16 x 16 both are alike, for 32 x 16 two products are
five times as fast."""
WIDEST = 4
"""A side of a matrix has a full factor if that takes at most so many times the memory of the matrix, else a diagonal
one. Chosen."""


@dataclass
class _Factors:
    """Of one tensor, taken as a matrix of its first dimension against all others."""

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    row_basis: Tensor | None = None
    column_basis: Tensor | None = None
    basis: Tensor | None = None

    def add(self, forces: Tensor) -> None:
        """Forces of all chains, shape ``(chains, *shape)``."""
        weight = (1 - FORGETTING) / len(forces)
        for factor, matrices in ((self.rows, forces.transpose(0, 1)), (self.columns, forces.permute(2, 0, 1))):
            if factor.dim() == 1:
                factor.mul_(FORGETTING).add_(matrices.square().sum(dim=(1, 2)), alpha=weight)
            else:
                seen = matrices.flatten(1)
                factor.addmm_(seen, seen.T, beta=FORGETTING, alpha=weight)

    def covariances(self) -> Tensor:
        """Finds the bases anew; the covariance of the forces in each of their directions, shape ``shape``."""
        along_rows, self.row_basis = _eigen(self.rows)
        along_columns, self.column_basis = _eigen(self.columns)
        if (
            self.row_basis is not None
            and self.column_basis is not None
            and self.rows.numel() * self.columns.numel() <= SMALL
        ):
            self.basis = torch.kron(self.row_basis, self.column_basis)
        total = along_rows.sum().clamp(min=torch.finfo(along_rows.dtype).tiny)
        return along_rows[:, None] / total * along_columns

    def turned(self, vectors: Tensor, back: bool) -> Tensor:
        """From coordinates in the bases to the tensor, or back; shape ``(vectors, rows * columns)``."""
        if self.row_basis is None and self.column_basis is None:
            return vectors
        if self.basis is not None:
            return vectors @ (self.basis if back else self.basis.mT)
        found = vectors.view(-1, *self.shape)
        if self.row_basis is not None:
            rows = self.row_basis.mT if back else self.row_basis
            found = torch.bmm(rows.expand(len(found), -1, -1), found)
        if self.column_basis is not None:
            columns = self.column_basis if back else self.column_basis.mT
            found = torch.mm(found.reshape(-1, len(columns)), columns)
        return found.reshape(len(vectors), -1)


class FactoredCurvature:
    """The curvature of D as far as the forces have shown it, and the Gaussian that goes with it."""

    def __init__(self, shapes: Sequence[torch.Size], like: Tensor) -> None:
        """Start with none at all.

        Args:
            shapes: Of the parameter tensors, in their order.
            like: Of the data type and on the device of the vectors.
        """
        matrices = [(shape[0], shape[1:].numel()) if len(shape) else (1, 1) for shape in shapes]
        self._tensors = []
        for rows, columns in matrices:
            sides = [
                (n,) if min(rows, columns) == 1 or n > WIDEST * m else (n, n)
                for n, m in ((rows, columns), (columns, rows))
            ]
            self._tensors.append(_Factors((rows, columns), *(like.new_zeros(side) for side in sides)))
        self._sizes = [rows * columns for rows, columns in matrices]
        self._curvatures = like.new_zeros(sum(self._sizes))
        self._weight = 0.0

    def copy(self) -> FactoredCurvature:
        """One that learns on by itself."""
        other = object.__new__(FactoredCurvature)
        other._tensors = [
            _Factors(t.shape, t.rows.clone(), t.columns.clone(), t.row_basis, t.column_basis, t.basis)
            for t in self._tensors
        ]
        other._sizes, other._curvatures, other._weight = self._sizes, self._curvatures, self._weight
        return other

    def learn(self, gradients: Tensor, nbeta: float) -> None:
        """Take up gradients of D.

        Args:
            gradients: At places of the chains, shape ``(chains, num_parameters)``; those not finite count as none.
            nbeta: The inverse temperature at which these places are met.
        """
        largest = torch.finfo(gradients.dtype).max ** 0.25  # the squares of larger ones might not be finite in sum
        forces = (gradients.nan_to_num(0.0, 0.0, 0.0) * nbeta**0.5).clamp(-largest, largest)
        for tensor, of_it in zip(self._tensors, forces.split(self._sizes, dim=1), strict=True):
            tensor.add(of_it.view(-1, *tensor.shape))
        self._weight = FORGETTING * self._weight + 1 - FORGETTING

    def refresh(self, nbeta: float) -> None:
        """Make use of what was learnt at this inverse temperature."""
        covariances = torch.cat([tensor.covariances().flatten() for tensor in self._tensors]) * (nbeta / self._weight)
        self._curvatures = (covariances + (covariances.square() + 4 * covariances).sqrt()) / (2 * nbeta)

    def roots(self, nbeta: float) -> Tensor:
        """Of (1 + nbeta A)^-1 in the bases, where it is diagonal; shape ``(num_parameters,)``."""
        return torch.rsqrt(1 + nbeta * self._curvatures)

    def out(self, inside: Tensor) -> Tensor:
        """Vectors whose coordinates in the bases are given, both of shape ``(vectors, num_parameters)``."""
        return self._turned(inside, back=False)

    def into(self, outside: Tensor) -> Tensor:
        """The coordinates of vectors in the bases."""
        return self._turned(outside, back=True)

    def _turned(self, vectors: Tensor, back: bool) -> Tensor:
        pieces = zip(self._tensors, vectors.split_with_sizes(self._sizes, dim=1), strict=True)
        return torch.cat([tensor.turned(piece, back) for tensor, piece in pieces], dim=1)

    def narrow(self, vectors: Tensor, nbeta: float) -> Tensor:
        """(1 + nbeta A)^(-1/2) times vectors, shape ``(vectors, num_parameters)``: of noise it makes such positions.

        The symmetric root depends on none of the choices that there are among eigenvectors.
        """
        return self.out(self.roots(nbeta) * self.into(vectors))


def _eigen(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    if factor.dim() == 1:
        return factor, None
    values, vectors = torch.linalg.eigh(factor)
    return values.clamp(min=0), vectors
