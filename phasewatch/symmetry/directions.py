"""Sets of tangent directions in parameter space, by their structure, and their verification."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

Entries = tuple[Indices, Indices, Array]
"""Coordinates, numbers of the directions and values of what is not zero; entries at the same place add up."""


class Form(Protocol):
    """Directions of unit length that are known by how they are made, so that they need not be written out."""

    @property
    def count(self) -> int:
        """Number of directions, not all independent perhaps."""
        ...

    def add_combination(self, rng: np.random.Generator, total: Array) -> None:
        """Add a normal combination of the directions to a vector of parameters."""
        ...

    def entries(self) -> Entries:
        """The directions written out."""
        ...


@dataclass(frozen=True, eq=False)
class Sparse:
    """Directions that are written out.

    Attributes:
        rows: Coordinates.
        columns: Number of the direction of each.
        values: The values there.
        count: Number of directions; a direction without entries is zero.
    """

    rows: Indices
    columns: Indices
    values: Array
    count: int

    def add_combination(self, rng: np.random.Generator, total: Array) -> None:
        """Add a normal combination of the directions to a vector of parameters."""
        np.add.at(total, self.rows, self.values * rng.standard_normal(self.count)[self.columns])

    def entries(self) -> Entries:
        """The directions written out."""
        return self.rows, self.columns, self.values

    def part(self, start: int, end: int) -> Sparse:
        """Some of the directions."""
        chosen = (self.columns >= start) & (self.columns < end)
        return Sparse(self.rows[chosen], self.columns[chosen] - start, self.values[chosen], end - start)


@dataclass(frozen=True, eq=False)
class Added:
    """Any of some vectors may be added to any of some rows of parameters.

    Attributes:
        rows: Coordinates, one row each, shape ``(rows, length)``.
        vectors: The vectors, shape ``(number, length)``.
    """

    rows: Indices
    vectors: Array

    @property
    def count(self) -> int:
        """Number of directions: one for each row and vector."""
        return len(self.rows) * len(self.vectors)

    @cached_property
    def unit_vectors(self) -> Array:
        """The vectors at unit length."""
        return self.vectors / np.maximum(np.linalg.norm(self.vectors, axis=1, keepdims=True), 1e-300)

    def add_combination(self, rng: np.random.Generator, total: Array) -> None:
        """Add a normal combination of the directions to a vector of parameters."""
        np.add.at(total, self.rows, rng.standard_normal((len(self.rows), len(self.vectors))) @ self.unit_vectors)

    def entries(self) -> Entries:
        """The directions written out."""
        number = len(self.vectors)
        shape = (len(self.rows), number, self.rows.shape[1])
        columns = np.arange(self.count).reshape(len(self.rows), number, 1)
        values = np.broadcast_to(self.unit_vectors[None], shape)
        at = values != 0
        return np.broadcast_to(self.rows[:, None], shape)[at], np.broadcast_to(columns, shape)[at], values[at]


@dataclass(frozen=True, eq=False)
class Mixed:
    r"""Changes of basis of units: what is written to unit ``a`` takes up that of ``b``, and what is read undoes it.

    The direction ``(a, b)`` adds row ``b`` of what is written to row ``a`` of it, and takes row ``a`` of what is read,
    times ``scale[a] / scale[b]``, off row ``b``.

    Attributes:
        written: Coordinates, one row a unit.
        written_values: The parameters there.
        read: Coordinates, one row a unit.
        read_values: The parameters there.
        scale: Slope of each unit, up to a common factor, shape ``(units,)``.
    """

    written: Indices
    written_values: Array
    read: Indices
    read_values: Array
    scale: Array = field(default_factory=lambda: np.ones(1))

    @property
    def width(self) -> int:
        """Number of units."""
        return len(self.written)

    @property
    def count(self) -> int:
        """Number of directions: one for each pair of units."""
        return self.width**2

    def _ratios(self) -> Array:
        scale = np.broadcast_to(self.scale, (self.width,))
        return np.asarray(scale[:, None] / scale)

    def _lengths(self) -> Array:
        written, read = np.square(self.written_values).sum(1), np.square(self.read_values).sum(1)
        return np.asarray(np.sqrt(np.maximum(written + self._ratios() ** 2 * read[:, None], 1e-300)))

    def add_combination(self, rng: np.random.Generator, total: Array) -> None:
        """Add a normal combination of the directions to a vector of parameters."""
        mixture = rng.standard_normal((self.width, self.width)) / self._lengths()
        np.add.at(total, self.written, mixture @ self.written_values)
        np.add.at(total, self.read, -(mixture * self._ratios()).T @ self.read_values)

    def entries(self) -> Entries:
        """The directions written out."""
        n, lengths = self.width, self._lengths()
        numbers = np.arange(n * n).reshape(n, n, 1)
        write_shape, read_shape = (n, n, self.written.shape[1]), (n, n, self.read.shape[1])
        values = np.concatenate(
            [
                (self.written_values[None] / lengths[:, :, None]).ravel(),
                (-self.read_values[:, None] * (self._ratios() / lengths)[:, :, None]).ravel(),
            ]
        )
        rows = np.concatenate(
            [
                np.broadcast_to(self.written[:, None], write_shape).ravel(),
                np.broadcast_to(self.read[None], read_shape).ravel(),
            ]
        )
        columns = np.concatenate([np.broadcast_to(numbers, s).ravel() for s in (write_shape, read_shape)])
        return rows, columns, values


@dataclass(frozen=True, eq=False)
class Directions:
    """Tangent directions that belong together.

    Attributes:
        kind: What makes them zeros.
        layer: Name of the module whose units they concern.
        units: The units that they concern, in groups that belong together; empty where they concern all of the layer.
        forms: The directions.
        exact: False where it is known beforehand that something small, an epsilon, may break them.
    """

    kind: str
    layer: str
    units: tuple[tuple[int, ...], ...]
    forms: tuple[Form, ...]
    exact: bool = True

    @property
    def count(self) -> int:
        """Number of directions, not all independent perhaps."""
        return sum(form.count for form in self.forms)

    def halves(self) -> list[Directions]:
        """Two halves of the units, or the whole where its directions belong to no unit each."""
        form = self.forms[0]
        if len(self.forms) > 1 or not isinstance(form, Sparse) or not 1 < len(self.units) == form.count:
            return [self]
        middle = form.count // 2
        return [
            Directions(self.kind, self.layer, self.units[start:end], (form.part(start, end),), self.exact)
            for start, end in ((0, middle), (middle, form.count))
        ]


class Columns:
    """Collects directions entry by entry."""

    def __init__(self) -> None:
        self.count = 0
        self._rows: list[Indices] = []
        self._columns: list[Indices] = []
        self._values: list[Array] = []

    def add(self, column: int | Indices, rows: Indices, values: Array | float) -> None:
        """Add values to entries of a direction, or of several whose numbers are broadcast against the rows."""
        columns = np.broadcast_to(np.asarray(column, dtype=np.int64), rows.shape).ravel()
        if not columns.size:
            return
        self._rows.append(rows.ravel())
        self._columns.append(columns)
        self._values.append(np.broadcast_to(np.asarray(values, dtype=float), rows.shape).ravel())
        self.count = max(self.count, int(columns.max()) + 1)

    def form(self) -> Sparse:
        """The directions at unit length."""
        if not self.count:
            return Sparse(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), 0)
        rows, columns, values = (
            np.concatenate(self._rows),
            np.concatenate(self._columns),
            np.concatenate(self._values),
        )
        lengths = np.sqrt(np.bincount(columns, values**2, self.count))
        return Sparse(rows, columns, values / np.maximum(lengths, 1e-300)[columns], self.count)


def verified(
    candidates: Sequence[Directions],
    effect: Callable[[Array], float],
    num_parameters: int,
    tolerance: float,
    rng: np.random.Generator,
    most_products: int,
) -> tuple[list[Directions], list[tuple[Directions, float]], list[Directions]]:
    """Split candidates into those that are zeros and those that are not.

    A normal combination of directions has, with probability one, an effect if any of them has: a set is tested by
    one product, and halved only where it fails. The effect of the combination as a whole, not of its mean direction,
    must be within the tolerance, so that a large set cannot hide what a single direction does.

    Args:
        candidates: What to test.
        effect: Relative size of what a direction changes, for a vector of shape ``(num_parameters,)``.
        num_parameters: Length of a direction.
        tolerance: Effects up to this count as none.
        rng: Draws the combinations.
        most_products: Number of products after which the rest is left as it is.

    Returns:
        The verified ones, the others with their effects, and those of which neither is known.
    """
    zeros: list[Directions] = []
    broken: list[tuple[Directions, float]] = []
    alike: dict[tuple[str, str], list[Directions]] = {}
    for candidate in candidates:
        if not candidate.exact:
            alike.setdefault((candidate.kind, candidate.layer), []).append(candidate)
    waiting = deque(several for several in ([c for c in candidates if c.exact], *alike.values()) if several)
    for _ in range(most_products):
        if not waiting:
            break
        several = waiting.popleft()
        total = np.zeros(num_parameters)
        for directions in several:
            for form in directions.forms:
                form.add_combination(rng, total)
        size = effect(total)
        if size * max(float(np.linalg.norm(total)), 1.0) <= tolerance:
            zeros += several
            continue
        parts = several if len(several) > 1 else several[0].halves()
        if len(parts) == 1:
            broken.append((parts[0], size))
        else:
            middle = len(parts) // 2
            waiting.extend([parts[:middle], parts[middle:]])
    return zeros, broken, [c for several in waiting for c in several]
