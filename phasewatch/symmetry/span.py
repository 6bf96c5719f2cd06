"""The dimension of what directions span, from their structure where they are too many to be written out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from phasewatch.symmetry.directions import Added, Array, Form, Indices, Mixed, Sparse
from phasewatch.symmetry.linear_algebra import CLEARLY_POSITIVE, least_singular, orthonormal, singular_values, svd

RANK_TOLERANCE = 1e-9
"""Unit directions span a dimension more if a singular value of what is new in them is above this. Chosen, some million
times the rounding of double precision."""

MOST_DENSE = 2000
"""Directions up to which a connected part is decomposed as a whole. Chosen: that takes some seconds."""

_MOST_ENTRIES = 3_000_000
"""Entries up to which directions are written out at all. Chosen."""

_ROUNDING = 1e-14
"""Entries of unit directions up to which they are rounding. Chosen: a million together stay far below the tolerance."""

_AT_ONCE = 1_000_000
"""Entries that are written out at a time where all of them are too many. Chosen."""

_SKETCH = 3
"""Rows left for every column where a matrix with many more rows is compressed before its rank is taken. Chosen."""


@dataclass(frozen=True, eq=False)
class Group:
    """Directions whose dimensions are credited together.

    Attributes:
        layer: Name of their module.
        forms: The directions.
        generic: Whether they come first for being generic.
    """

    layer: str
    forms: tuple[Form, ...]
    generic: bool


class Lines:
    """Rows of the weight matrices, each with its bias: what a unit is computed with.

    Attributes:
        line: Number of the row of each parameter, shape ``(num_parameters,)``; alone in it where it is in no matrix.
        column: Its place in the row.
        matrix: Number of its matrix; -1 where it is in none.
        rows: The coordinates of each row that is in a matrix.
        lines_of: The rows of each matrix.
    """

    def __init__(self, num_parameters: int, matrices: Iterable[Indices]) -> None:
        """Number the rows of matrices of coordinates; a parameter belongs to the first that has it."""
        self.line = np.full(num_parameters, -1)
        self.column = np.zeros(num_parameters, dtype=np.int64)
        self.matrix = np.full(num_parameters, -1)
        self.rows: list[Indices] = []
        self.lines_of: list[Indices] = []
        for rows in matrices:
            if not rows.size or (self.line[rows] >= 0).any():
                continue
            self.lines_of.append(len(self.rows) + np.arange(len(rows)))
            self.line[rows] = self.lines_of[-1][:, None]
            self.column[rows] = np.arange(rows.shape[1])
            self.matrix[rows] = len(self.lines_of) - 1
            self.rows.extend(rows)
        alone = np.flatnonzero(self.line < 0)
        self.line[alone] = len(self.rows) + np.arange(alone.size)
        self.count = len(self.rows) + alone.size


def added_dimensions(
    groups: Sequence[Group], lines: Lines, rng: np.random.Generator, most_dense: int = MOST_DENSE
) -> tuple[list[int], bool]:
    """How many dimensions the directions of each group add to the span of the groups before it.

    Directions that share no parameter, not even through others, are independent. Where all parts that are connected
    through parameters are small, each is decomposed as a whole. Otherwise the rank is found from the structure
    (:class:`_Structured`), first of the generic groups and then of all, so that what is generic stays so; which of two
    dependent groups of the same sort gets a dimension is then open. The sum is a lower bound in any case.

    Args:
        groups: The generic ones first, in the order in which dimensions are credited.
        lines: Rows of the weight matrices.
        rng: Draws the sketch of parts with many rows.
        most_dense: Directions up to which a part is small.

    Returns:
        The dimensions, and whether directions had to be left out.
    """
    forms = [form for group in groups for form in group.forms]
    owner = np.repeat(np.arange(len(groups)), [sum(form.count for form in group.forms) for group in groups])
    if sum(_num_entries(form) for form in forms) <= _MOST_ENTRIES:
        matrix = _written_out(forms, len(lines.line))
        parts = list(_connected(matrix))
        if max(map(len, parts), default=0) <= most_dense:
            return _ranks_of_parts(matrix, parts, owner, len(groups), rng), False
    of_all = _Structured(groups, lines, rng)
    if all(rank == sum(f.count for f in g.forms) for g, rank in zip(groups, of_all.ranks, strict=True) if g.generic):
        return of_all.ranks.tolist(), of_all.left_out
    alone = _Structured([group for group in groups if group.generic], lines, rng)
    ranks = _generic_first(of_all.ranks, alone.ranks, groups)
    return ranks.tolist(), of_all.left_out or alone.left_out


def basis_of_span(forms: Sequence[Form], size: int) -> Array:
    """Orthonormal rows that span all directions, shape ``(dimensions, size)``; all are written out for it."""
    matrix = _written_out(forms, size)
    basis = [np.zeros((0, size))]
    for columns in _connected(matrix):
        part = matrix[:, columns]
        rows = np.unique(part.indices)
        inside = _range(scipy.sparse.csr_matrix(part)[rows].toarray())
        basis.append(np.zeros((inside.shape[1], size)))
        basis[-1][:, rows] = inside.T
    return np.vstack(basis)


def _generic_first(ranks: NDArray[np.int64], alone: NDArray[np.int64], groups: Sequence[Group]) -> NDArray[np.int64]:
    """Give the generic groups what they span alone, at the cost of what is not generic in the same layer first."""
    ranks = ranks.copy()
    owed: dict[str, int] = defaultdict(int)
    for position, rank in enumerate(alone):
        owed[groups[position].layer] += int(rank - ranks[position])
        ranks[position] = rank
    others = range(len(alone), len(groups))
    due = sum(owed.values())
    for position, most in [*((p, owed[groups[p].layer]) for p in others), *((p, due) for p in reversed(others))]:
        taken = max(min(due, most, int(ranks[position])), 0)
        ranks[position] -= taken
        due -= taken
        owed[groups[position].layer] -= taken
    return ranks


def _num_entries(form: Form) -> int:
    if isinstance(form, Sparse):
        return len(form.rows)
    if isinstance(form, Added):
        return form.rows.size * len(form.vectors)
    assert isinstance(form, Mixed)
    return (form.written.size + form.read.size) * form.width


def _written_out(forms: Sequence[Form], size: int) -> scipy.sparse.csc_matrix:
    rows, columns, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    start = 0
    for form in forms:
        at, number, value = form.entries()
        rows.append(at)
        columns.append(number + start)
        values.append(value)
        start += form.count
    shape = (size, start)
    matrix = scipy.sparse.csc_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape
    )
    matrix.eliminate_zeros()
    return matrix


def _ranks_of_parts(
    matrix: scipy.sparse.csc_matrix,
    parts: Sequence[NDArray[np.intp]],
    owner: NDArray[np.intp],
    num_groups: int,
    rng: np.random.Generator,
) -> list[int]:
    added = np.zeros(num_groups, dtype=np.int64)
    for columns in parts:
        part = matrix[:, columns]
        rows = np.unique(part.indices)
        inside = scipy.sparse.csr_matrix(part)[rows]
        if rows.size * columns.size <= _MOST_ENTRIES and (np.diff(part.indptr) == 1).any():
            for position, number in _parameters_first(inside.toarray(), owner[columns]):
                added[position] += number
            continue
        for position, basis in _new_in_each(_compressed(inside, rng), owner[columns]):
            added[position] += basis.shape[1]
    return added.tolist()


def _parameters_first(columns: Array, owner: NDArray[np.intp]) -> Iterable[tuple[int, int]]:
    """For each owner, how many dimensions its columns add to those before: single parameters without a decomposition.

    With the parameters S among what is spanned, a direction counts by what it has outside of S.
    """
    alone = np.count_nonzero(columns, axis=0) == 1
    basis = np.zeros((columns.shape[0], 0))
    for position in np.unique(owner):
        own = owner == position
        places = np.flatnonzero(columns[:, own & alone].any(1))
        gained = len(places)
        if gained:
            gained -= basis.shape[1]
            columns, basis = np.delete(columns, places, axis=0), _range(np.delete(basis, places, axis=0))
            gained += basis.shape[1]
        block = columns[:, own & ~alone]
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        new = _range(block)
        basis = np.hstack([basis, new])
        yield int(position), gained + new.shape[1]


class _Structured:
    """Dimensions of groups of directions from how they are made.

    First what is added to single rows of a weight matrix, row by row: single parameters, then vectors. Then what is
    added to all columns of a matrix alike (``M (x) 1``): in rows ``I`` in which ``M`` is invertible it spans the sum of
    what the rows have left. Last what couples matrices, taken off one after another: a set of directions that has
    parameters of its own is independent of all others as far as it is, modulo the rows' subspaces, independent on
    these; then others have parameters of their own. What is left in the end is decomposed. Each step gives a lower
    bound of the rank that is left, and the whole rank where every set is independent on what it has of its own.

    Attributes:
        ranks: Dimensions of each group.
        left_out: Whether directions were left out for being too many.
    """

    def __init__(self, groups: Sequence[Group], lines: Lines, rng: np.random.Generator) -> None:
        self.ranks = np.zeros(len(groups), dtype=np.int64)
        self.left_out = False
        self._lines = lines
        self._rng = rng
        self._free = np.full(len(lines.line), -1)
        self._vectors: dict[int, list[tuple[int, Indices, Added]]] = defaultdict(list)
        self._mixtures: dict[int, list[tuple[int, Array]]] = defaultdict(list)
        self._bases: list[Array] = []
        self._basis_of = np.full(lines.count, -1)
        self._mixed: list[tuple[int, Mixed]] = []
        coupled: list[tuple[int, Sparse]] = []
        for position, group in enumerate(groups):
            for form in group.forms:
                if isinstance(form, Added) and self._placed(position, form):
                    continue
                if isinstance(form, Mixed):
                    self._mixed.append((position, form))
                elif isinstance(form, Sparse):
                    coupled.append((position, form))
                elif _num_entries(form) <= _MOST_ENTRIES:
                    coupled.append((position, Sparse(*form.entries(), form.count)))
                else:
                    self.left_out = True
        np.add.at(self.ranks, self._free[self._free >= 0], 1)
        self._subspaces_of_rows()
        self._add_mixtures()
        self._take_off(coupled)

    # what is added to rows and columns

    def _placed(self, position: int, form: Added) -> bool:
        """Note what is added to rows or to all columns of a matrix; False if it is neither."""
        rows, of = form.rows, self._lines
        if rows.shape[1] == 1:
            new = np.unique(rows[self._free[rows] < 0]) if form.vectors.any() else rows[:0].ravel()
            self._free[new] = position
            return True
        line = of.line[rows]
        if (line == line[:, :1]).all():
            for number, row in zip(line[:, 0].tolist(), rows, strict=True):
                self._vectors[number].append((position, of.column[row], form))
            return True
        column, matrix = of.column[rows], of.matrix[rows[0, 0]]
        alike = (column == column[:, :1]).all() and (line == line[:1]).all() and (of.matrix[rows] == matrix).all()
        if not alike or matrix < 0:
            return False
        lines = of.lines_of[matrix]
        if len(np.unique(column[:, 0])) < len(of.rows[lines[0]]):
            return False
        mixtures = np.zeros((len(form.vectors), len(lines)))
        mixtures[:, line[0] - lines[0]] = form.unit_vectors
        self._mixtures[int(matrix)].append((position, mixtures))
        return True

    def _subspaces_of_rows(self) -> None:
        self._dimension = np.zeros(self._lines.count, dtype=np.int64)
        np.add.at(self._dimension, self._lines.line[self._free >= 0], 1)
        known: dict[tuple[bytes, ...], tuple[list[tuple[int, int]], int]] = {}
        for line, several in self._vectors.items():
            free = self._free[self._lines.rows[line]] >= 0
            key = (free.tobytes(), *(bytes(str(id(form)), "ascii") + at.tobytes() for _, at, form in several))
            if key not in known:
                known[key] = self._subspace(free, several)
            credits, number = known[key]
            for position, rank in credits:
                self.ranks[position] += rank
                self._dimension[line] += rank
            self._basis_of[line] = number

    def _subspace(
        self, free: NDArray[np.bool_], several: list[tuple[int, Indices, Added]]
    ) -> tuple[list[tuple[int, int]], int]:
        several = sorted(several, key=lambda entry: entry[0])
        columns = np.zeros((len(free), sum(len(form.vectors) for _, _, form in several)))
        start = 0
        for _, at, form in several:
            columns[at, start : start + len(form.vectors)] = form.unit_vectors.T
            start += len(form.vectors)
        columns[free] = 0.0
        owner = np.repeat([position for position, _, _ in several], [len(form.vectors) for _, _, form in several])
        found = list(_new_in_each(columns, owner))
        basis = np.hstack([new for _, new in found])
        if not basis.shape[1]:
            return [], -1
        self._bases.append(basis)
        return [(position, new.shape[1]) for position, new in found], len(self._bases) - 1

    def _add_mixtures(self) -> None:
        for matrix, several in self._mixtures.items():
            lines = self._lines.lines_of[matrix]
            length, taken = len(self._lines.rows[lines[0]]), self._dimension[lines]
            stacked, before = np.zeros((0, len(lines))), 0
            for position in sorted({position for position, _ in several}):
                stacked = np.vstack([stacked, *(m for p, m in several if p == position)])
                total = rank = 0
                for dimension in np.unique(taken[taken < length]):  # rows with the most left come first
                    grown = _rank(stacked[:, taken <= dimension])
                    total += (grown - rank) * int(length - dimension)
                    rank = grown
                self.ranks[position] += total - before
                before = total

    # what couples matrices

    def _take_off(self, coupled: Sequence[tuple[int, Sparse]]) -> None:
        usable = self._free < 0
        for matrix in self._mixtures:
            usable[self._lines.matrix == matrix] = False
        counts = [form.count for _, form in coupled]
        starts = np.cumsum([0, *counts])
        owner = np.repeat([position for position, _ in coupled], counts).astype(np.int64)
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
        for (_, form), start in zip(coupled, starts, strict=False):
            at = usable[form.rows] & (form.values != 0)
            found.append((form.rows[at], form.columns[at] + start, form.values[at]))
        rows, columns, values = (np.concatenate(several) for several in zip(*found, strict=True))
        del found
        waiting = list(self._mixed)
        while len(rows) or waiting:
            sharing = np.bincount(rows, minlength=len(usable))
            covered = np.zeros(len(usable), dtype=bool)
            for _, mixed in waiting:
                for side in (mixed.written, mixed.read):
                    sharing[side] += 1
                    covered[side] = True
            own = usable & (sharing == 1)
            gone = self._with_parameters_of_their_own(rows, columns, values, own, covered)
            np.add.at(self.ranks, owner[gone], 1)
            ranks = [self._rank_of_mixed(mixed, own) for _, mixed in waiting]
            full = [rank == mixed.count for (_, mixed), rank in zip(waiting, ranks, strict=True)]
            if not gone.size and not any(full):
                if not waiting:
                    break
                full[int(np.argmax(ranks))] = True  # what it lacks is lost, and the bound less than the rank
            for (position, _), rank, done in zip(waiting, ranks, full, strict=True):
                self.ranks[position] += rank * done
            waiting = [entry for entry, done in zip(waiting, full, strict=True) if not done]
            left = ~np.isin(columns, gone)
            rows, columns, values = rows[left], columns[left], values[left]
        if len(rows):
            self._decompose(rows, columns, values, owner)

    def _with_parameters_of_their_own(
        self,
        rows: Indices,
        columns: Indices,
        values: Array,
        own: NDArray[np.bool_],
        covered: NDArray[np.bool_],
    ) -> Indices:
        """Directions that are independent of the others: by a parameter in a row without subspace, or a row."""
        line = self._lines.line[rows]
        basis = self._basis_of[line]
        gone = [columns[own[rows] & (basis < 0) & (np.abs(values) > RANK_TOLERANCE)]]
        shared = np.zeros(self._lines.count, dtype=bool)
        shared[self._lines.line[np.flatnonzero(covered)]] = True
        first = np.full(self._lines.count, np.iinfo(np.int64).max)
        last = np.full(self._lines.count, -1)
        np.minimum.at(first, line, columns)
        np.maximum.at(last, line, columns)
        alone = (basis >= 0) & (first[line] == last[line]) & ~shared[line]
        for number in np.unique(basis[alone]):
            chosen = alone & (basis == number)
            places, position = np.unique(line[chosen], return_inverse=True)
            parts = np.zeros((len(places), len(self._bases[number])))
            np.add.at(parts, (position, self._lines.column[rows[chosen]]), values[chosen])
            parts -= (parts @ self._bases[number]) @ self._bases[number].T
            gone.append(first[places[np.linalg.norm(parts, axis=1) > RANK_TOLERANCE]])
        return np.unique(np.concatenate(gone))

    def _rank_of_mixed(self, mixed: Mixed, own: NDArray[np.bool_]) -> int:
        """Rank of a change of basis on the parameters that are its own.

        On what is written it is a block for each unit, and so it is on what is read; what vanishes on both is the
        product of what vanishes on each.
        """
        written, same_written = self._ranks_by_unit(mixed.written, mixed.written_values, own)
        read, same_read = self._ranks_by_unit(mixed.read, mixed.read_values, own)
        rank = max(sum(written), sum(read))
        if same_written and same_read:
            rank = max(rank, mixed.count - (mixed.width - written[0]) * (mixed.width - read[0]))
        return rank

    def _ranks_by_unit(self, rows: Indices, values: Array, own: NDArray[np.bool_]) -> tuple[list[int], bool]:
        """Rank, for each unit, of all units' values on its row, and whether the same holds for each."""
        own_here, line = own[rows], self._lines.line[rows]
        basis = self._basis_of[line]
        pieces: list[tuple[Indices, NDArray[np.bool_]]] = []
        for number in np.unique(line[0][(basis >= 0).any(0)]):
            piece = line[0] == number
            in_rows = (line[:, piece] == line[:, piece][:, :1]).all() and len(np.unique(line[:, piece])) == len(rows)
            if in_rows:
                pieces.append((line[:, piece][:, 0], piece))
        plain = (basis < 0).all(0)
        own_here = own_here & (plain | np.any([piece for _, piece in pieces], axis=0)) if pieces else own_here & plain
        length = np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-300)
        known: dict[bytes, int] = {}
        ranks = []
        for unit in range(len(rows)):
            numbers = [int(self._basis_of[lines[unit]]) for lines, _ in pieces]
            key = own_here[unit].tobytes() + repr(numbers).encode()
            if key not in known:
                parts = [(values / length)[:, own_here[unit] & plain]]
                for (_, piece), number in zip(pieces, numbers, strict=True):
                    at = own_here[unit] & piece
                    part = (values / length)[:, at]
                    if number >= 0:
                        part = _modulo(part, self._bases[number][self._lines.column[rows[unit, at]]])
                    parts.append(part)
                known[key] = _rank(np.hstack(parts))
            ranks.append(known[key])
        return ranks, len(known) == 1

    def _decompose(self, rows: Indices, columns: Indices, values: Array, owner: Indices) -> None:
        """Ranks of the last coupled directions, whose parts in the rows' subspaces are taken off.

        What is left of a direction fills every row that it meets, so that it is only looked at row by row.
        """
        numbers, columns = np.unique(columns, return_inverse=True)
        single = self._basis_of[self._lines.line[rows]] < 0
        met = [(self._lines.count + rows[single], columns[single])]
        for line, present, left in self._left_in_rows(rows, columns, values):
            some = present[(np.abs(left) > _ROUNDING).any(1)]
            met.append((np.full(len(some), line), some))
        at, number = (np.concatenate(x) for x in zip(*met, strict=True))
        shape = (self._lines.count + len(self._free), len(numbers))
        parts = list(_connected(scipy.sparse.csc_matrix((np.ones(len(at)), (at, number)), shape=shape)))
        part_of, place = np.full(len(numbers), -1), np.zeros(len(numbers), dtype=np.int64)
        for index, part in enumerate(parts):
            self.left_out |= len(part) > MOST_DENSE
            few = part[:MOST_DENSE]
            part_of[few], place[few] = index, np.arange(len(few))
        order = np.argsort(part_of[columns], kind="stable")
        ends = np.searchsorted(part_of[columns[order]], np.arange(len(parts) + 1))
        for index, part in enumerate(parts):
            own, few = order[ends[index] : ends[index + 1]], part[:MOST_DENSE]
            matrix = self._combined_rows(rows[own], place[columns[own]], values[own], len(few))
            for position, basis in _new_in_each(matrix, owner[numbers[few]]):
                self.ranks[position] += basis.shape[1]

    def _left_in_rows(self, rows: Indices, columns: Indices, values: Array) -> Iterator[tuple[int, Indices, Array]]:
        """Each row that has a subspace, the directions that meet it, and what of them lies outside of the subspace."""
        line = self._lines.line[rows]
        order = np.argsort(line, kind="stable")
        order = order[self._basis_of[line[order]] >= 0]
        for own in np.split(order, np.flatnonzero(np.diff(line[order])) + 1):
            if not len(own):
                continue
            number = int(line[own[0]])
            present, position = np.unique(columns[own], return_inverse=True)
            left = np.zeros((len(present), len(self._lines.rows[number])))
            np.add.at(left, (position, self._lines.column[rows[own]]), values[own])
            vectors = self._bases[self._basis_of[number]]
            left -= (left @ vectors) @ vectors.T
            yield number, present, left

    def _combined_rows(self, rows: Indices, columns: Indices, values: Array, width: int) -> Array:
        """What is left of some directions as dense columns, its rows combined at random where they are many more."""
        single = self._basis_of[self._lines.line[rows]] < 0
        places, at = np.unique(rows[single], return_inverse=True)
        alone = scipy.sparse.csr_matrix((values[single], (at, columns[single])), shape=(len(places), width))
        in_rows = np.unique(self._lines.line[rows[~single]])
        combined = _SKETCH * width + 20
        blocks: Iterator[Array] = self._blocks(rows, columns, values, width)
        if len(places) + sum(len(self._lines.rows[line]) for line in in_rows) <= 2 * combined:
            return np.vstack([alone.toarray(), *blocks])
        total = np.asarray((_sketch(len(places), combined, self._rng) @ alone).todense())
        for block in blocks:
            total += _sketch(len(block), combined, self._rng) @ block
        return total

    def _blocks(self, rows: Indices, columns: Indices, values: Array, width: int) -> Iterator[Array]:
        """What is left in the rows that have a subspace, some of them at a time, shape ``(coordinates, width)``."""
        block: list[Array] = []
        for _, present, left in self._left_in_rows(rows, columns, values):
            block.append(np.zeros((left.shape[1], width)))
            block[-1][:, present] = left.T
            if sum(some.size for some in block) >= _AT_ONCE:
                yield np.vstack(block)
                block = []
        if block:
            yield np.vstack(block)


def _rank(matrix: Array) -> int:
    if not matrix.size:
        return 0
    return int((singular_values(matrix) > RANK_TOLERANCE).sum())


def _range(columns: Array) -> Array:
    """Orthonormal columns of the same span."""
    columns = columns[:, np.linalg.norm(columns, axis=0) > RANK_TOLERANCE]
    if 0 < columns.shape[1] <= columns.shape[0]:
        basis, upper = orthonormal(columns)
        if least_singular(upper)[0] > CLEARLY_POSITIVE:
            return basis
    left, values, _ = svd(columns)
    return np.asarray(left[:, values > RANK_TOLERANCE])


def _modulo(rows: Array, vectors: Array) -> Array:
    """What is left of rows outside of the span of some columns."""
    left = _range(vectors)
    for _ in range(2):
        rows = rows - (rows @ left) @ left.T
    return rows


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
    combined = _SKETCH * columns + 20
    if rows <= 2 * combined:
        return np.asarray(part.todense())
    return np.asarray((_sketch(rows, combined, rng) @ part).todense())


def _sketch(rows: int, combined: int, rng: np.random.Generator) -> scipy.sparse.csr_matrix:
    """Combines rows at random, each in four places with signs; the sum over blocks of rows is that of all of them."""
    copies = 4
    target = rng.integers(combined, size=(copies, rows)).ravel()
    signs = rng.choice([-1.0, 1.0], size=copies * rows) / np.sqrt(copies)
    return scipy.sparse.csr_matrix((signs, (target, np.tile(np.arange(rows), copies))), shape=(combined, rows))


def _new_in_each(columns: Array, owner: NDArray[np.intp]) -> Iterable[tuple[int, Array]]:
    """For each owner, orthonormal columns for what its columns add to the span of those before."""
    basis = np.zeros((columns.shape[0], 0))
    for position in np.unique(owner):
        block = columns[:, owner == position]
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        new = _range(block)
        yield int(position), new
        basis = np.hstack([basis, new])
