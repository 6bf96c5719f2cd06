"""Sets of tangent directions in parameter space, their verification, and the dimension of what they span."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

Array = NDArray[np.float64]

RANK_TOLERANCE = 1e-9
"""Unit directions span a dimension more if a singular value of what is new in them is above this."""

MOST_DENSE = 2000
"""Columns up to which a connected part is decomposed as a whole by default."""

_MOST_LINKING = 5000
"""Columns that may link the blocks of a larger part."""

_PIVOT = 1e-10
_WELL_CONDITIONED = 1e-3

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
    candidates: Sequence[Directions],
    effect: Callable[[Array], float],
    tolerance: float,
    rng: np.random.Generator,
    most_products: int,
) -> tuple[list[Directions], list[tuple[Directions, float]], list[Directions]]:
    """Split candidates into those that are zeros and those that are not.

    A normal combination of directions has, with probability one, an effect if any of them has: a set is tested by
    one product, and halved only where it fails. All kinds and layers get their turn before one is halved again.

    Args:
        candidates: What to test.
        effect: Relative size of what a direction changes, for a vector of shape ``(num_parameters,)``.
        tolerance: Effects up to this count as none.
        rng: Draws the combinations.
        most_products: Number of products after which the rest is left as it is.

    Returns:
        The verified ones, the others with their effects, and those of which neither is known.
    """
    kept: list[Directions] = []
    broken: list[tuple[Directions, float]] = []
    alike: dict[tuple[str, str], list[Directions]] = {}
    for candidate in candidates:
        alike.setdefault((candidate.kind, candidate.layer), []).append(candidate)
    waiting = deque(alike.values())
    for _ in range(most_products):
        if not waiting:
            break
        several = waiting.popleft()
        total = sum(c.matrix @ (rng.standard_normal(c.count) / np.sqrt(c.count)) for c in several)
        size = effect(np.asarray(total))
        if size <= tolerance:
            kept += several
        elif len(several) == 1:
            broken.append((several[0], size))
        else:
            middle = len(several) // 2
            waiting.extend([several[:middle], several[middle:]])
    return kept, broken, [c for several in waiting for c in several]


def added_dimensions(
    groups: Sequence[Sequence[scipy.sparse.csc_matrix]],
    generic: int,
    rng: np.random.Generator,
    most_dense: int = MOST_DENSE,
) -> tuple[list[int], bool]:
    """How many dimensions the columns of each group add to the span of the groups before it.

    Directions that share no parameter, not even through others, are independent; the rank is taken separately in
    each connected part. A small part is decomposed as a whole. A large one is eliminated block by block
    (:func:`_ranks_by_elimination`), first its generic groups and then all, so that what is generic stays so; which of
    two dependent groups of the same sort gets a dimension is then up to the elimination. The sum is a lower bound.

    Args:
        groups: Sets of directions as columns, in the order in which dimensions are credited.
        generic: How many of the groups come first for being generic.
        rng: Draws the sketch of small parts with many rows.
        most_dense: Columns up to which a part is small.

    Returns:
        The dimensions, and whether columns had to be left out because a part was too large.
    """
    if not groups:
        return [], False
    sets = [columns for group in groups for columns in group]
    matrix = scipy.sparse.hstack(sets, format="csc")
    owner = np.repeat(np.arange(len(groups)), [sum(columns.shape[1] for columns in group) for group in groups])
    set_of = np.repeat(np.arange(len(sets)), [columns.shape[1] for columns in sets])
    added = np.zeros(len(groups), dtype=np.int64)
    left_out = False
    for columns in _connected(matrix):
        part = matrix[:, columns]
        if len(columns) <= most_dense:
            rows = np.unique(part.indices)
            compressed = _compressed(scipy.sparse.csr_matrix(part)[rows], rng)
            for position, count in _incremental_ranks(compressed, owner[columns]):
                added[position] += count
            continue
        first = owner[columns] < generic
        generic_ranks, some_left = _ranks_by_elimination(
            part[:, first], owner[columns][first], set_of[columns][first], len(groups)
        )
        left_out |= some_left
        if first.all():
            added += generic_ranks
            continue
        ranks, some_left = _ranks_by_elimination(part, owner[columns], set_of[columns], len(groups))
        left_out |= some_left
        surplus = int(generic_ranks.sum() - ranks[:generic].sum())
        ranks[:generic] = generic_ranks[:generic]
        for position in range(len(groups) - 1, generic - 1, -1):
            taken = min(max(surplus, 0), int(ranks[position]))
            ranks[position] -= taken
            surplus -= taken
        added += ranks
    return added.tolist(), left_out


def _ranks_by_elimination(
    part: scipy.sparse.csc_matrix, owner: NDArray[np.intp], set_of: NDArray[np.intp], num_groups: int
) -> tuple[NDArray[np.int64], bool]:
    """Dimensions of the groups in a large connected part.

    Coordinates that are directions by themselves are taken out, then sets that share no parameter with one another,
    the largest first, and last what links them, by elimination in the Gram matrix. A pivot counts above
    ``_PIVOT``, the square of a singular value: squaring loses digits, and what is lost is not counted.
    """
    ranks = np.zeros(num_groups, dtype=np.int64)
    lengths = np.diff(part.indptr)
    single = lengths == 1
    coordinates, first = np.unique(part.indices[part.indptr[:-1][single]], return_index=True)
    np.add.at(ranks, owner[single][first], 1)
    kept = np.ones(part.shape[0])
    kept[coordinates] = 0.0
    part = scipy.sparse.csc_matrix(scipy.sparse.diags(kept) @ part)
    part.eliminate_zeros()
    rest = np.flatnonzero(np.diff(part.indptr) > 0)
    part, owner, set_of = part[:, rest], owner[rest], set_of[rest]

    blocks, linking = _disjoint_blocks(part, set_of)
    left_out = len(linking) > _MOST_LINKING
    linking = linking[:_MOST_LINKING]
    links = part[:, linking]
    gram = (links.T @ links).toarray()
    for columns in blocks:
        block = part[:, columns]
        cross = scipy.sparse.csc_matrix(block.T @ links)
        touched = np.flatnonzero(np.diff(cross.indptr))
        rank, reduced = _eliminate((block.T @ block).toarray(), cross[:, touched].toarray())
        ranks[owner[columns[0]]] += rank
        gram[np.ix_(touched, touched)] -= reduced.T @ reduced
    position = 0
    while position < len(linking):
        end = position + int(np.argmin(np.append(owner[linking][position:] == owner[linking][position], False)))
        rank, reduced = _eliminate(gram[position:end, position:end], gram[position:end, end:])
        ranks[owner[linking[position]]] += rank
        gram[end:, end:] -= reduced.T @ reduced
        position = end
    return ranks, left_out


def _eliminate(gram: Array, cross: Array) -> tuple[int, Array]:
    """Rank of a block from its Gram matrix, and ``R`` such that ``R^T R`` is to be taken off the Gram matrix beyond."""
    factor, failed = scipy.linalg.lapack.dpotrf(gram, lower=True)
    if not failed and float(np.diag(factor).min()) > _WELL_CONDITIONED:
        return len(gram), scipy.linalg.solve_triangular(factor, cross, lower=True, check_finite=False)
    if len(gram) == 1:
        value = float(gram[0, 0])
        return (1, cross / np.sqrt(value)) if value > _PIVOT else (0, cross[:0])
    values, vectors = scipy.linalg.eigh(gram, driver="evd", check_finite=False)
    above = values > _PIVOT
    return int(above.sum()), (vectors[:, above].T @ cross) / np.sqrt(values[above])[:, None]


def _disjoint_blocks(
    part: scipy.sparse.csc_matrix, set_of: NDArray[np.intp]
) -> tuple[list[NDArray[np.intp]], NDArray[np.intp]]:
    """Connected pieces of sets, none of which shares a row with another, and the columns that are left."""
    numbers, counts = np.unique(set_of, return_counts=True)
    taken = np.zeros(part.shape[0], dtype=bool)
    blocks, linking = [], []
    for number in numbers[np.argsort(-counts, kind="stable")]:
        columns = np.flatnonzero(set_of == number)
        for piece in _connected(part[:, columns]):
            chosen = columns[piece]
            rows = part[:, chosen].indices
            if taken[rows].any() or len(chosen) > MOST_DENSE:
                linking.append(chosen)
            else:
                taken[rows] = True
                blocks.append(chosen)
    return blocks, np.sort(np.concatenate(linking)) if linking else np.zeros(0, dtype=np.intp)


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
