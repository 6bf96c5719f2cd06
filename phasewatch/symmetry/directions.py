"""Sets of tangent directions in parameter space, their verification, and the dimension of what they span."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

Array = NDArray[np.float64]

RANK_TOLERANCE = 1e-9
"""Unit directions span a dimension more if a singular value of what is new in them is above this."""

_SKETCH = 3
"""Rows kept for every column where a matrix with many more rows is compressed before its rank is taken."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Tangent directions that belong together.

    Attributes:
        kind: What makes them zeros.
        layer: Name of the module whose units they concern.
        units: The units that they concern; empty where they concern all of the layer.
        matrix: One direction a column, shape ``(num_parameters, count)``, sparse.
    """

    kind: str
    layer: str
    units: tuple[int, ...]
    matrix: scipy.sparse.csc_matrix

    @property
    def count(self) -> int:
        """Number of directions, not all independent perhaps."""
        return int(self.matrix.shape[1])


class Columns:
    """Collects sparse columns entry by entry."""

    def __init__(self, num_parameters: int) -> None:
        self.size = num_parameters
        self.count = 0
        self._rows: list[NDArray[np.int64]] = []
        self._columns: list[NDArray[np.int64]] = []
        self._values: list[Array] = []

    def add(self, column: int, rows: NDArray[np.int64], values: Array | float) -> None:
        """Add values to entries of a column; entries added twice are summed."""
        rows = rows.ravel()
        self._rows.append(rows)
        self._columns.append(np.full(rows.size, column, dtype=np.int64))
        self._values.append(np.broadcast_to(np.asarray(values, dtype=float).ravel(), rows.shape))
        self.count = max(self.count, column + 1)

    def add_each(self, rows: NDArray[np.int64]) -> None:
        """One column of its own for each coordinate."""
        rows = rows.ravel()
        self._rows.append(rows)
        self._columns.append(self.count + np.arange(rows.size))
        self._values.append(np.ones(rows.size))
        self.count += rows.size

    def matrix(self) -> scipy.sparse.csc_matrix:
        """The columns at unit length; those that are zero are left out."""
        if not self.count:
            return scipy.sparse.csc_matrix((self.size, 0))
        entries = (np.concatenate(self._values), (np.concatenate(self._rows), np.concatenate(self._columns)))
        matrix = scipy.sparse.csc_matrix(entries, shape=(self.size, self.count))
        norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(0)).ravel())
        kept = norms > 0
        return scipy.sparse.csc_matrix(matrix[:, kept] @ scipy.sparse.diags(1 / norms[kept]))


def verified(
    candidates: Sequence[Directions], effect: Callable[[Array], float], tolerance: float, rng: np.random.Generator
) -> tuple[list[Directions], list[tuple[Directions, float]]]:
    """Split candidates into those that are zeros and those that are not.

    A normal combination of directions has, with probability one, an effect if any of them has: a set is tested by
    one product, and halved only where it fails.

    Args:
        candidates: What to test.
        effect: Relative size of what a direction changes, for a vector of shape ``(num_parameters,)``.
        tolerance: Effects up to this count as none.
        rng: Draws the combinations.

    Returns:
        The verified ones, and the others with their effects.
    """
    if not candidates:
        return [], []
    total = sum(c.matrix @ (rng.standard_normal(c.count) / np.sqrt(c.count)) for c in candidates)
    size = effect(np.asarray(total))
    if size <= tolerance:
        return list(candidates), []
    if len(candidates) == 1:
        return [], [(candidates[0], size)]
    middle = len(candidates) // 2
    kept, broken = verified(candidates[:middle], effect, tolerance, rng)
    more_kept, more_broken = verified(candidates[middle:], effect, tolerance, rng)
    return kept + more_kept, broken + more_broken


def added_dimensions(groups: Sequence[Sequence[scipy.sparse.csc_matrix]], rng: np.random.Generator) -> list[int]:
    """How many dimensions the columns of each group add to the span of the groups before it.

    Directions that share no parameter, not even through others, are independent; the rank is taken separately in
    each connected part, where it is never overestimated: compressing the rows can only lower a rank.
    """
    if not groups:
        return []
    matrix = scipy.sparse.hstack([columns for group in groups for columns in group], format="csc")
    owner = np.repeat(np.arange(len(groups)), [sum(columns.shape[1] for columns in group) for group in groups])
    added = np.zeros(len(groups), dtype=int)
    for columns in _connected(matrix):
        part = matrix[:, columns]
        rows = np.unique(part.indices)
        compressed = _compressed(scipy.sparse.csr_matrix(part)[rows], rng)
        for position, count in _incremental_ranks(compressed, owner[columns]):
            added[position] += count
    return added.tolist()


def _connected(matrix: scipy.sparse.csc_matrix) -> Iterable[NDArray[np.intp]]:
    rows, columns = matrix.shape
    pattern = matrix.tocoo()
    links = scipy.sparse.coo_matrix(
        (np.ones(pattern.nnz, dtype=np.int8), (pattern.row, rows + pattern.col)), shape=(rows + columns,) * 2
    )
    _, labels = connected_components(links, directed=False)
    labels = labels[rows:]
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _compressed(part: scipy.sparse.csr_matrix, rng: np.random.Generator) -> Array:
    """The rows combined at random, with signs, into three times as many as there are columns."""
    rows, columns = part.shape
    kept = _SKETCH * columns + 20
    if rows <= 2 * kept:
        return np.asarray(part.todense())
    copies = 4
    target = rng.integers(kept, size=(copies, rows)).ravel()
    signs = rng.choice([-1.0, 1.0], size=copies * rows) / np.sqrt(copies)
    sketch = scipy.sparse.csr_matrix((signs, (target, np.tile(np.arange(rows), copies))), shape=(kept, rows))
    return np.asarray((sketch @ part).todense())


def _incremental_ranks(columns: Array, owner: NDArray[np.intp]) -> Iterable[tuple[int, int]]:
    basis = np.zeros((columns.shape[0], 0))
    for position in np.unique(owner):
        block = columns[:, owner == position]
        block = block / np.maximum(np.linalg.norm(block, axis=0), 1e-300)
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        left, values, _ = np.linalg.svd(block, full_matrices=False)
        rank = int((values > RANK_TOLERANCE).sum())
        yield int(position), rank
        basis = np.hstack([basis, left[:, :rank]])
