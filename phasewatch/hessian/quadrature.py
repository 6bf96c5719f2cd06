"""Gauss quadrature of the spectral measure of a matrix, as a Lanczos run sees it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

Array = NDArray[np.float64]


def eigensystem(diagonal: Array, couplings: Array) -> tuple[Array, Array]:
    """Eigenvalues of a tridiagonal matrix, ascending, and its eigenvectors as columns.

    Args:
        diagonal: Of the matrix, shape ``(m,)``.
        couplings: Its off-diagonal, shape ``(m - 1,)``.
    """
    if len(diagonal) == 1:
        return diagonal, np.ones((1, 1))
    values, vectors = eigh_tridiagonal(diagonal, couplings)
    return values, vectors


def gauss(diagonal: Array, couplings: Array) -> tuple[Array, Array]:
    """Nodes and weights of the rule that belongs to a tridiagonal matrix; the weights sum to 1.

    Where derivatives of even order are positive, the integral is not below what this rule says, where they are negative
    not above (Golub & Meurant 2010, "Matrices, Moments and Quadrature", section 6.2).

    Args:
        diagonal: Of the matrix, shape ``(m,)``.
        couplings: Its off-diagonal, shape ``(m - 1,)``.
    """
    values, vectors = eigensystem(diagonal, couplings)
    return values, vectors[0] ** 2


def radau(diagonal: Array, couplings: Array) -> tuple[Array, Array]:
    """The rule with a node at zero, which encloses from the other side where no eigenvalue is negative.

    Args:
        diagonal: Of the matrix, shape ``(m,)``; the last entry does not count.
        couplings: Its off-diagonal, shape ``(m - 1,)``.
    """
    return gauss(diagonal_of_radau(diagonal, couplings), couplings)


def diagonal_of_radau(diagonal: Array, couplings: Array) -> Array:
    """The diagonal with another last entry, such that the matrix has an eigenvalue at zero (Golub 1973).

    Args:
        diagonal: Of the matrix, shape ``(m,)``.
        couplings: Its off-diagonal, shape ``(m - 1,)``.
    """
    return np.append(diagonal[:-1], _last_of_radau(diagonal[:-1], couplings))


def _last_of_radau(diagonal: Array, couplings: Array) -> float:
    """That entry, from those before it."""
    pivot = 0.0
    for number, entry in enumerate(diagonal):
        pivot = entry - (couplings[number - 1] ** 2 / pivot if number else 0.0)
        if pivot <= 0.0:  # rounding: an eigenvalue of zero has been found already
            return float(couplings[-1] ** 2 / np.abs(diagonal).max())
    return float(couplings[-1] ** 2 / pivot) if len(diagonal) else 0.0
