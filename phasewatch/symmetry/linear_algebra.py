"""Singular values, and whether a matrix has full rank in less time than they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.linalg
import torch

from phasewatch.symmetry.directions import Array

CLEARLY_POSITIVE = 1e-6
"""Least singular value of unit columns from which on they are independent without a closer look. Chosen, a thousand
times ``RANK_TOLERANCE``."""

_ROWS_AT_ONCE = 2**14
"""Rows, or four times as many as there are columns if these are more. Chosen."""


def joined(lengths: Sequence[int], blocks: Iterable[Array], axis: int) -> Array:
    """Matrices of these lengths along an axis as one, each let go of when it is in its place."""
    matrix, start = np.empty((0, 0)), 0
    for length, block in zip(lengths, blocks, strict=True):
        if not start:
            shape = list(block.shape)
            shape[axis] = sum(lengths)
            matrix = np.empty(shape)
        places = (slice(None), slice(start, start + length)) if axis else slice(start, start + length)
        matrix[places] = block
        start += length
    return matrix


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Singular vectors and values as NumPy gives them, without those beyond the smaller side.

    Where its divide-and-conquer does not converge (seen on finite, well-scaled matrices of low rank), by QR iteration.
    """
    try:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        left, values, right = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
    return left, values, right


def singular_values(matrix: Array) -> Array:
    """The values alone, in less time."""
    try:
        return np.asarray(np.linalg.svd(matrix, compute_uv=False))
    except np.linalg.LinAlgError:
        return np.asarray(scipy.linalg.svd(matrix, compute_uv=False, lapack_driver="gesvd"))


def orthonormal(matrix: Array) -> tuple[Array, Array]:
    """Orthonormal columns and the triangular factor (PyTorch's is twice as fast as NumPy's)."""
    factors = torch.linalg.qr(torch.from_numpy(np.ascontiguousarray(matrix)))
    return np.asarray(factors.Q.numpy()), np.asarray(factors.R.numpy())


def triangle(matrix: Array) -> Array:
    """The triangular factor of a matrix, of some rows after another: a decomposition takes a copy of what it is of."""
    rows, upper = torch.from_numpy(matrix), torch.zeros(0, matrix.shape[1], dtype=torch.float64)
    for some in rows.split(max(_ROWS_AT_ONCE, 4 * matrix.shape[1])):
        upper = torch.linalg.qr(torch.cat([upper, some]), mode="r").R
    return np.asarray(upper.numpy())


def least_singular(upper: Array, iterations: int = 8) -> tuple[float, Array]:
    """Least singular value of a triangular matrix and the magnitudes of its right vector, by inverse iteration."""
    diagonal = np.abs(np.diag(upper))
    floor = np.finfo(float).eps * float(diagonal.max())
    vector = np.random.default_rng(0).standard_normal(len(upper))
    if floor == 0.0:
        return 0.0, np.abs(vector)
    regular = upper + np.diag(np.where(diagonal < floor, floor, 0.0))
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(iterations):
            vector = scipy.linalg.solve_triangular(regular, vector, trans="T", check_finite=False)
            vector = scipy.linalg.solve_triangular(regular, vector / np.linalg.norm(vector), check_finite=False)
            vector /= np.linalg.norm(vector)
    if not np.isfinite(vector).all():  # singular many times over
        vector = svd(upper)[2][-1]
    return float(np.linalg.norm(upper @ vector)), np.abs(vector)
