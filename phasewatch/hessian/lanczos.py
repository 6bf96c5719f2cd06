"""Lanczos tridiagonalisation with full reorthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.hessian.quadrature import eigensystem


class SymmetricOperator(Protocol):
    """What the product with a flat vector is all that is known of."""

    def __matmul__(self, vector: Tensor, /) -> Tensor:
        """The product."""
        ...


@dataclass(frozen=True, eq=False)
class LanczosRun:
    r"""A Krylov basis :math:`Q` with :math:`A Q = Q T + \beta_m q_{m+1} e_m^\top` and :math:`T` tridiagonal.

    Attributes:
        diagonal: Diagonal of ``T``, shape ``(m,)``.
        off_diagonal: Couplings; the last one leads out of the basis, shape ``(m,)``.
        basis: Orthonormal rows, shape ``(m, N)``.
        invariant: Whether the basis spans an invariant subspace, up to rounding: then Ritz values are eigenvalues.
        asymmetry: Root mean square of the entries of :math:`Q^\top A Q` that are zero for a symmetric matrix.
    """

    diagonal: NDArray[np.float64]
    off_diagonal: NDArray[np.float64]
    basis: Tensor
    invariant: bool
    asymmetry: float

    @property
    def dimension(self) -> int:
        """Number of basis vectors."""
        return len(self.diagonal)

    @cached_property
    def _decomposition(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return eigensystem(self.diagonal, self.off_diagonal[:-1])

    @property
    def ritz_values(self) -> NDArray[np.float64]:
        """Eigenvalues of ``T``, ascending."""
        return self._decomposition[0]

    @property
    def residuals(self) -> NDArray[np.float64]:
        r"""Norms :math:`\|A y - \theta y\|` of the Ritz pairs; some eigenvalue of ``A`` is within each of them."""
        coupling = 0.0 if self.invariant else self.off_diagonal[-1]
        return np.asarray(coupling * np.abs(self._decomposition[1][-1]))

    @property
    def weights(self) -> NDArray[np.float64]:
        """Share of the start vector in each Ritz vector, squared; they sum to 1."""
        return np.asarray(self._decomposition[1][0] ** 2)

    def ritz_vectors(self, chosen: NDArray[np.intp]) -> Tensor:
        """Ritz vectors as rows, shape ``(len(chosen), N)``."""
        rotation = torch.from_numpy(np.ascontiguousarray(self._decomposition[1][:, chosen].T))
        return rotation.to(self.basis) @ self.basis


def own_generator(seed: int) -> torch.Generator:
    """A random stream that no ``manual_seed(seed)`` starts.

    Weights drawn by ``torch.manual_seed(0)`` and a start vector drawn by the same seed would be made of the same random
    numbers; such a vector is no uniform direction with respect to the curvature at these weights.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([0x7068617365, seed]).generate_state(1)[0]))


def relative_rounding(dtype: torch.dtype, size: int) -> float:
    """Rounding error to allow for in a matrix of curvature, in units of its norm.

    In double precision N eps, as is usual, and not less than 100 eps. In single precision 32 eps, which is ten
    times what was measured: N eps would be far too much there.
    """
    eps = torch.finfo(dtype).eps
    return max(size, 100) * eps if dtype == torch.float64 else 32 * eps


def lanczos(
    operator: SymmetricOperator,
    start: Tensor,
    num_steps: int,
    *,
    deflated: Tensor | None = None,
    negligible: float = 0.0,
    enough: Callable[[LanczosRun], bool] | None = None,
) -> LanczosRun:
    """Build a Krylov basis, orthogonalised against all of itself at each step.

    Lanczos (1950); without reorthogonalisation converged eigenvalues come back as copies (Paige 1972). Stops early
    where the basis is invariant, since what follows would be made of rounding errors.

    Args:
        operator: Symmetric, of size N.
        start: Start vector, shape ``(N,)``; need not have unit length.
        num_steps: Greatest size of the basis, one product each.
        deflated: Orthonormal rows, shape ``(k, N)``, to stay orthogonal to.
        negligible: Couplings up to this count as zero too: outside of the deflated rows, where those of the run are
            smaller than what rounding makes of these.
        enough: Asked after each step whether the run so far is enough.

    Returns:
        The basis and the tridiagonal matrix.
    """
    size = start.numel()
    rounding = relative_rounding(start.dtype, size)
    locked = start.new_zeros(0, size) if deflated is None else deflated
    basis = start.new_empty(num_steps, size)
    diagonal: list[float] = []
    couplings: list[float] = []
    scale, strayed, entries = 0.0, 0.0, 0
    vector = orthogonalized(start / start.norm(), locked)[0]

    def so_far(invariant: bool) -> LanczosRun:
        asymmetry = (strayed / entries) ** 0.5 if entries else 0.0
        return LanczosRun(np.array(diagonal), np.array(couplings), basis[: len(diagonal)], invariant, asymmetry)

    for step in range(num_steps):
        basis[step] = vector / vector.norm()
        vector, coefficients = orthogonalized(operator @ basis[step], locked, basis[: step + 1], coupled=2)
        found = coefficients[len(locked) :].double().cpu().numpy()
        diagonal.append(float(found[step]))
        couplings.append(vector.norm().item())
        if step > 0:
            strayed += float(found[step - 1] - couplings[step - 1]) ** 2 + float(np.square(found[: step - 1]).sum())
            entries += step
        scale = max(scale, abs(diagonal[-1]), couplings[-1])
        invariant = couplings[-1] <= max(rounding * scale, negligible) or step + 1 + len(locked) == size
        if invariant or (enough is not None and enough(so_far(False))):
            break
    return so_far(invariant)


def orthogonalized(vector: Tensor, *rows: Tensor, coupled: int | None = None) -> tuple[Tensor, Tensor]:
    """The part orthogonal to the rows, by two passes of Gram-Schmidt, and the coefficients taken off.

    Args:
        vector: Shape ``(N,)``.
        rows: Orthonormal, all together, each of shape ``(k, N)``.
        coupled: The vector is orthogonal to all but the last rows, that many, up to rounding, so that one pass is over
            these alone: a product with the last vector of a Krylov basis is, to all but two.

    Returns:
        The part, shape ``(N,)``, and the coefficients, shape ``(k,)``, of all rows one after another.
    """
    blocks = [block for block in rows if len(block)]
    if not blocks:
        return vector, vector.new_zeros(0)
    near = [blocks[-1][-coupled:]] if coupled is not None and coupled <= len(blocks[-1]) else blocks
    taken_off = vector.new_zeros(sum(map(len, blocks)))
    for some in (near, blocks):
        found = []
        for block in some:
            found.append(block @ vector)
            vector = torch.addmv(vector, block.T, found[-1], alpha=-1)
        coefficients = torch.cat(found)
        taken_off[len(taken_off) - len(coefficients) :] += coefficients
    return vector, taken_off
