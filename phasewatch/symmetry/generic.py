"""Directions that the architecture makes zero whatever the weights are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from phasewatch.symmetry.directions import Array, Columns, Directions
from phasewatch.symmetry.spaces import Architecture, Pairing, Redundancy, Space, Writer
from phasewatch.symmetry.tape import Indices

MOST_ENTRIES = 50_000_000
"""Sets of directions with more entries than this are left out, and named."""


def generic_directions(architecture: Architecture, parameters: Array) -> Iterator[Directions]:
    r"""Candidates for the continuous symmetries of a network.

    A linear map ``A`` of a space that commutes with what is in it is written by its writers, ``rows -> (1 + A)
    rows``, and undone by its readers, ``W -> W (1 - A)``; a constant ``c`` likewise. With ``A`` unit by unit this is
    the rescaling of ReLU units (Neyshabur et al. 2015), with any ``A`` the change of basis of linear layers and,
    head by head, of values. A norm undoes ``A = 1`` and, if it centres, a constant by itself (Kunin et al. 2021).
    Queries and keys are used by their inner products, so that keys transform by ``A`` and queries by
    ``-A^T``.
    """
    for space in architecture.spaces:
        if space.norms:
            yield from _before_norm(space, parameters)
        elif space.linear and space.writers and (space.readers or space.fixed_norms):
            yield from _changes_of_basis(space, parameters)
        if space.shift and not space.norms and (space.readers or space.fixed_norms):
            yield from _shifts(space, parameters)
        if space.standardized and not space.activations:
            yield from _centred(space, parameters)
    for pairing in architecture.pairings:
        yield from _query_key(pairing, parameters)
    for redundancy in architecture.redundant:
        yield from _moved_constants(redundancy, parameters)


def _moved_constants(redundancy: Redundancy, parameters: Array) -> Iterator[Directions]:
    sides = (
        (1.0, redundancy.first, redundancy.first_readers),
        (-1.0, redundancy.second, redundancy.second_readers),
    )
    for unit in range(len(redundancy.first.rows)):
        columns = Columns(parameters.size)
        for sign, writer, readers in sides:
            columns.add(0, writer.rows[unit, writer.shifts], sign)
            for reader in readers:
                if reader.biases is not None:
                    columns.add(0, reader.biases, -sign * parameters[reader.weights[:, unit]])
        yield Directions("redundant bias", redundancy.layer, (unit,), columns.matrix())


def add_map(
    columns: Columns, column: int, space: Space, parameters: Array, matrix: dict[tuple[int, int], float]
) -> None:
    """Add a linear map, as its entries, to a column: written by all writers, undone by all readers."""
    for (a, b), value in matrix.items():
        for writer in space.writers:
            columns.add(column, writer.rows[a], value * parameters[writer.rows[b]])
        for reader in space.readers:
            columns.add(column, reader.weights[:, b], -value * parameters[reader.weights[:, a]])
        for norm in space.fixed_norms:
            scale = parameters[norm.scales[a]]
            columns.add(column, norm.scales[a : a + 1], -value * scale)
            if norm.shifts is not None:
                columns.add(column, norm.shifts[a : a + 1], -value * scale * norm.mean[a] / norm.deviation[a])


def undo_shift(columns: Columns, column: int, space: Space, parameters: Array, unit: int, value: float = 1.0) -> bool:
    """Let all readers take a constant back that was added to a unit; False if one has no bias."""
    for reader in space.readers:
        if reader.biases is None:
            return not parameters[reader.weights[:, unit]].any()
        columns.add(column, reader.biases, -value * parameters[reader.weights[:, unit]])
    for norm in space.fixed_norms:
        if norm.shifts is None:
            return False
        columns.add(column, norm.shifts[unit : unit + 1], -value * parameters[norm.scales[unit]] / norm.deviation[unit])
    return True


def _kind(space: Space) -> str:
    if space.heads:
        return "attention"
    if space.fixed_norms or space.norms or any(w.diagonal for w in space.writers):
        return "norm"
    return "rescaling" if len(np.unique(space.blocks)) == space.width > 1 or space.activations else "change of basis"


def _changes_of_basis(space: Space, parameters: Array) -> Iterator[Directions]:
    kind = _kind(space)
    entries = sum(w.rows.shape[1] for w in space.writers) + sum(len(r.weights) for r in space.readers)
    blocks = [np.flatnonzero(space.blocks == number) for number in np.unique(space.blocks)]
    if any(w.diagonal for w in space.writers):
        blocks = [np.array([unit]) for unit in range(space.width)]
    if sum(len(units) ** 2 for units in blocks) * entries > MOST_ENTRIES:
        space.broken.append(f"the change of basis of {space.layer}, which is too large")
        return
    for units in blocks:
        columns = Columns(parameters.size)
        for a in units:
            for b in units:
                add_map(columns, columns.count, space, parameters, {(int(a), int(b)): 1.0})
        yield Directions(kind, space.layer, tuple(units.tolist()), columns.matrix())


def _shifts(space: Space, parameters: Array) -> Iterator[Directions]:
    writer = _shifting(space)
    if writer is None:
        return
    for unit in range(space.width):
        columns = Columns(parameters.size)
        columns.add(0, writer.rows[unit, writer.shifts], 1.0)
        if undo_shift(columns, 0, space, parameters, unit):
            yield Directions(_kind(space), space.layer, (unit,), columns.matrix())


def _shifting(space: Space) -> Writer | None:
    return next((w for w in space.writers if w.shifts.any()), None)


def _before_norm(space: Space, parameters: Array) -> Iterator[Directions]:
    """What the norms that read a space, and its linear readers with them, undo."""
    each = [np.array([unit]) for unit in range(space.width)]
    groups: list[NDArray[np.intp]] = each if set(space.norms) == {"batch_norm"} else [np.arange(space.width)]
    for units in groups:
        if space.linear:
            columns = Columns(parameters.size)
            for unit in units:
                add_map(columns, 0, space, parameters, {(int(unit), int(unit)): 1.0})
            yield Directions("norm", space.layer, tuple(units.tolist()), columns.matrix())
        writer = _shifting(space)
        if space.shift and writer is not None and "rms_norm" not in space.norms:
            columns = Columns(parameters.size)
            undone = True
            for unit in units:
                columns.add(0, writer.rows[unit, writer.shifts], 1.0)
                undone &= undo_shift(columns, 0, space, parameters, int(unit))
            if undone:
                yield Directions("norm", space.layer, tuple(units.tolist()), columns.matrix())
    if set(space.norms) == {"layer_norm"} and not space.activations and not space.readers:
        for writer in space.writers:  # what all units get alike is centred away, whatever the input
            columns = Columns(parameters.size)
            for column, indices in enumerate(writer.rows.T if not writer.diagonal else []):
                columns.add(column, indices, 1.0)
            yield Directions("norm", space.layer, (), columns.matrix())
    if "batch_norm" not in space.norms:
        yield from _rotations(space, parameters)


def _rotations(space: Space, parameters: Array) -> Iterator[Directions]:
    """Turning a space keeps the norms of what is in it; the readers behind the norms turn back."""
    spaces = [space, *space.normalized]
    known = all(s.linear or not s.writers for s in space.normalized) and space.linear
    if not known or any(s.activations or s.heads or s.norms or s.fixed_norms or s.final for s in space.normalized):
        return
    if space.activations or any(w.diagonal for w in space.writers) or len(np.unique(space.blocks)) > 1:
        return
    entries = sum(w.rows.shape[1] for w in space.writers) + sum(len(r.weights) for s in spaces for r in s.readers)
    if space.width**3 * entries > MOST_ENTRIES and space.width**2 * entries > MOST_ENTRIES:
        space.broken.append(f"the rotations of {space.layer}, which are too many")
        return
    centring = np.eye(space.width)
    if "layer_norm" in space.norms:
        centring -= 1 / space.width
    columns = Columns(parameters.size)
    for a in range(space.width):
        for b in range(a):
            turn = centring[:, a : a + 1] @ centring[b : b + 1] - centring[:, b : b + 1] @ centring[a : a + 1]
            column = columns.count
            for writer in space.writers:
                columns.add(column, writer.rows, turn @ parameters[writer.rows])
            for reader in space.readers:
                columns.add(column, reader.weights, -parameters[reader.weights] @ turn)
            for normalized in space.normalized:
                if not _turn_back(columns, column, normalized, turn, parameters):
                    return
    yield Directions("norm", space.layer, (), columns.matrix())


def _turn_back(columns: Columns, column: int, normalized: Space, turn: Array, parameters: Array) -> bool:
    scale, shift = np.ones(normalized.width), np.zeros(normalized.width)
    for writer in normalized.writers:
        for indices, is_shift in zip(writer.rows.T, writer.shifts, strict=True):
            if is_shift:
                shift = parameters[indices]
            else:
                scale = parameters[indices]
    if not scale.all():
        return False
    inner = scale[:, None] * turn / scale
    for reader in normalized.readers:
        change = parameters[reader.weights] @ inner
        columns.add(column, reader.weights, -change)
        if reader.biases is not None:
            columns.add(column, reader.biases, change @ shift)
        elif shift.any():
            return False
    return True


def _centred(space: Space, parameters: Array) -> Iterator[Directions]:
    """What LayerNorm writes adds up to zero before its affine part: the readers may add any multiple of it."""
    writer = space.writers[0] if space.writers else Writer(np.zeros((space.width, 0), int), np.zeros(0, bool))
    scales, shifts = writer.rows[:, ~writer.shifts], writer.rows[:, writer.shifts]
    if scales.size and not parameters[scales].all():
        return
    weights = 1 / parameters[scales[:, 0]] if scales.size else np.ones(space.width)
    constant = float(weights @ parameters[shifts[:, 0]]) if shifts.size else 0.0
    for reader in space.readers:
        if reader.biases is None and constant != 0.0:
            continue
        columns = Columns(parameters.size)
        for row, indices in enumerate(reader.weights):
            columns.add(row, indices, weights)
            if reader.biases is not None:
                columns.add(row, reader.biases[row : row + 1], -constant)
        yield Directions("norm", reader.layer, (), columns.matrix())


def _query_key(pairing: Pairing, parameters: Array) -> Iterator[Directions]:
    by_key: dict[bytes, tuple[Indices, list[Indices]]] = {}
    for queries, keys in pairing.heads:
        by_key.setdefault(keys.tobytes(), (keys, []))[1].append(queries)
    for keys, several in by_key.values():
        size = len(keys)
        units = tuple(keys.tolist())

        def directions(
            maps: list[list[tuple[int, int, float]]],
            keys: Indices = keys,
            units: tuple[int, ...] = units,
            several: list[Indices] = several,
        ) -> Directions:
            columns = Columns(parameters.size)
            for column, entries in enumerate(maps):
                for a, b, value in entries:
                    for writer in pairing.keys.writers:
                        columns.add(column, writer.rows[keys[a]], value * parameters[writer.rows[keys[b]]])
                    for queries in several:
                        for writer in pairing.queries.writers:
                            rows = writer.rows
                            columns.add(column, rows[queries[b]], -value * parameters[rows[queries[a]]])
            return Directions("attention", pairing.layer, units, columns.matrix())

        if not pairing.keys.twisted:
            yield directions([[(a, b, 1.0)] for a in range(size) for b in range(size)])
        elif size % 2 == 0:  # rotary embeddings commute with what is complex linear, in pairs of units
            half = size // 2
            for pairs in ([(i, i + half) for i in range(half)], [(2 * i, 2 * i + 1) for i in range(half)]):
                scales = [[(a, a, 1.0), (b, b, 1.0)] for a, b in pairs]
                turns = [[(a, b, 1.0), (b, a, -1.0)] for a, b in pairs]
                yield directions(scales + turns)
        for writer in pairing.keys.writers:
            if writer.shifts.any():
                columns = Columns(parameters.size)
                for column, unit in enumerate(keys):
                    columns.add(column, writer.rows[unit, writer.shifts], 1.0)
                yield Directions("attention", pairing.layer, units, columns.matrix())
