"""Directions that the architecture makes zero whatever the weights are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.linalg

from phasewatch.symmetry.architecture import Architecture
from phasewatch.symmetry.directions import Added, Array, Columns, Directions, Form, Mixed
from phasewatch.symmetry.linear_algebra import svd
from phasewatch.symmetry.spaces import Pairing, Passage, Redundancy, Space, Writer
from phasewatch.symmetry.tape import Indices

MOST_ENTRIES = 50_000_000
"""Sets of directions with more entries than this are left out, and named. Chosen: 400 MB in double precision."""


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
    for passage in architecture.passages:
        yield from _through_fixed_norm(passage, parameters)
    for pairing in architecture.pairings:
        yield from _query_key(pairing, parameters)
    for redundancy in architecture.redundant:
        yield from _moved_constants(redundancy, parameters)


def _moved_constants(redundancy: Redundancy, parameters: Array) -> Iterator[Directions]:
    sides = (
        (1.0, redundancy.first, redundancy.first_readers),
        (-1.0, redundancy.second, redundancy.second_readers),
    )
    units = np.arange(len(redundancy.first.rows))
    columns = Columns()
    for sign, writer, readers in sides:
        columns.add(units[:, None], writer.rows[:, writer.shifts], sign)
        for reader in readers:
            if reader.biases is not None:
                biases = np.broadcast_to(reader.biases, (len(units), len(reader.biases)))
                columns.add(units[:, None], biases, -sign * parameters[reader.weights.T])
    yield Directions("redundant bias", redundancy.layer, _each(units), (columns.form(),))


def _each(units: Indices) -> tuple[tuple[int, ...], ...]:
    return tuple((unit,) for unit in units.tolist())


def add_scales(columns: Columns, numbers: Indices | int, space: Space, parameters: Array, units: Indices) -> None:
    """Scale units: what is written to them grows, and all readers undo it.

    Args:
        columns: Where to add.
        numbers: Number of the direction of each unit, or of all of them.
        space: The space.
        parameters: Where the network is, shape ``(num_parameters,)``.
        units: The units.
    """
    numbers = np.broadcast_to(numbers, units.shape)
    for writer in space.writers:
        columns.add(numbers[:, None], writer.rows[units], parameters[writer.rows[units]])
    for reader in space.readers:
        read = reader.weights[:, units].T
        columns.add(numbers[:, None], read, -parameters[read])
    for norm in space.fixed_norms:
        scale = parameters[norm.scales[units]]
        columns.add(numbers, norm.scales[units], -scale)
        if norm.shifts is not None:
            columns.add(numbers, norm.shifts[units], -scale * norm.mean[units] / norm.deviation[units])


def can_undo_shift(space: Space, parameters: Array, units: Indices) -> Array:
    """For which units all readers can take back a constant."""
    possible = np.ones(len(units), dtype=bool)
    for reader in space.readers:
        if reader.biases is None and not absorbs(reader.writes):
            possible &= ~(parameters[reader.weights[:, units]] != 0).any(0)
    if any(norm.shifts is None for norm in space.fixed_norms):
        possible[:] = False
    return possible


def undo_shifts(
    columns: Columns,
    numbers: Indices | int,
    space: Space,
    parameters: Array,
    units: Indices,
    values: Array | float = 1.0,
) -> None:
    """Let all readers take the constants back that were added to units; arguments as of :func:`add_scales`."""
    numbers = np.broadcast_to(numbers, units.shape)
    values = np.broadcast_to(np.asarray(values, dtype=float), units.shape)
    for reader in space.readers:
        if reader.biases is not None:
            biases = np.broadcast_to(reader.biases, (len(units), len(reader.biases)))
            columns.add(numbers[:, None], biases, -values[:, None] * parameters[reader.weights[:, units].T])
        elif reader.writes is not None and absorbs(reader.writes):
            absorb(
                columns, numbers, reader.writes, parameters, values[:, None] * parameters[reader.weights[:, units].T]
            )
    for norm in space.fixed_norms:
        if norm.shifts is not None:
            columns.add(numbers, norm.shifts[units], -values * parameters[norm.scales[units]] / norm.deviation[units])


def absorbs(space: Space | None) -> bool:
    """Whether constants that a linear layer without bias writes to a space can be taken back behind it."""
    if space is None or not space.shift or space.norms or not (space.readers or space.fixed_norms):
        return False
    readers = all(reader.biases is not None or absorbs(reader.writes) for reader in space.readers)
    return readers and all(norm.shifts is not None for norm in space.fixed_norms)


def absorb(columns: Columns, numbers: Indices, space: Space, parameters: Array, constants: Array) -> None:
    """Take constants back, one for each unit of the space, shape ``(directions, width)``."""
    for reader in space.readers:
        change = constants @ parameters[reader.weights].T
        if reader.biases is not None:
            columns.add(numbers[:, None], np.broadcast_to(reader.biases, change.shape), -change)
        elif reader.writes is not None:
            absorb(columns, numbers, reader.writes, parameters, change)
    for norm in space.fixed_norms:
        if norm.shifts is not None:
            change = constants * (parameters[norm.scales] / norm.deviation)
            columns.add(numbers[:, None], np.broadcast_to(norm.shifts, change.shape), -change)


def change_of_basis(space: Space, parameters: Array, units: Indices, scale: Array | None = None) -> Mixed:
    """All linear maps of some units, written by all writers and undone by all readers."""
    empty = np.zeros((len(units), 0), dtype=np.int64)
    written = np.hstack([empty, *(writer.rows[units] for writer in space.writers)])
    read = np.hstack([empty, *(reader.weights[:, units].T for reader in space.readers)])
    scale = np.ones(len(units)) if scale is None else scale
    return Mixed(written, parameters[written], read, parameters[read], scale)


def _kind(space: Space) -> str:
    if space.heads:
        return "attention"
    if space.fixed_norms or space.norms or any(w.diagonal for w in space.writers):
        return "norm"
    return "rescaling" if len(np.unique(space.blocks)) == space.width > 1 or space.activations else "change of basis"


def _changes_of_basis(space: Space, parameters: Array) -> Iterator[Directions]:
    kind = _kind(space)
    units = np.arange(space.width)
    numbers, sizes = np.unique(space.blocks, return_counts=True)
    if space.fixed_norms or any(w.diagonal for w in space.writers) or sizes.max() == 1:
        columns = Columns()
        add_scales(columns, units, space, parameters, units)
        yield Directions(kind, space.layer, _each(units), (columns.form(),))
        return
    for number in numbers:
        together = units[space.blocks == number]
        basis = change_of_basis(space, parameters, together)
        yield Directions(kind, space.layer, (tuple(together.tolist()),), (basis,))


def _shifts(space: Space, parameters: Array) -> Iterator[Directions]:
    writer = _shifting(space)
    if writer is None:
        return
    everything = np.arange(space.width)
    units = everything[can_undo_shift(space, parameters, everything)]
    if units.size:
        columns = Columns()
        columns.add(np.arange(len(units))[:, None], writer.rows[units][:, writer.shifts], 1.0)
        undo_shifts(columns, np.arange(len(units)), space, parameters, units)
        yield Directions(_kind(space), space.layer, _each(units), (columns.form(),))
    blind = [r.weights for r in space.readers if r.biases is None and not absorbs(r.writes)]
    if blind and sum(map(len, blind)) < space.width and not space.fixed_norms:
        columns = Columns()
        for number, unseen in enumerate(scipy.linalg.null_space(parameters[np.vstack(blind)]).T):
            numbers = np.full(space.width, number)
            columns.add(numbers[:, None], writer.rows[:, writer.shifts], unseen[:, None])
            undo_shifts(columns, numbers, space, parameters, everything, unseen)
        yield Directions(_kind(space), space.layer, (), (columns.form(),))


def _shifting(space: Space) -> Writer | None:
    return next((w for w in space.writers if w.shifts.any()), None)


def _before_norm(space: Space, parameters: Array) -> Iterator[Directions]:
    """What the norms that read a space, and its linear readers with them, undo."""
    units = np.arange(space.width)
    by_unit = set(space.norms) == {"batch_norm"}
    numbers = units if by_unit else np.zeros_like(units)
    named = _each(units) if by_unit else (tuple(units.tolist()),)
    if space.linear and space.writers:
        columns = Columns()
        add_scales(columns, numbers, space, parameters, units)
        yield Directions("norm", space.layer, named, (columns.form(),), exact=not space.epsilon)
    writer = _shifting(space)
    if space.shift and writer is not None and "rms_norm" not in space.norms:
        possible = can_undo_shift(space, parameters, units)
        chosen = units[possible] if by_unit else units if possible.all() else units[:0]
        if chosen.size:
            numbers = np.arange(len(chosen)) if by_unit else np.zeros_like(chosen)
            columns = Columns()
            columns.add(numbers[:, None], writer.rows[chosen][:, writer.shifts], 1.0)
            undo_shifts(columns, numbers, space, parameters, chosen)
            yield Directions("norm", space.layer, _each(chosen) if by_unit else named, (columns.form(),))
    if set(space.norms) == {"layer_norm"} and not space.activations and not space.readers:
        for writer in space.writers:  # what all units get alike is centred away, whatever the input
            if not writer.diagonal:
                yield Directions("norm", space.layer, (), (Added(writer.rows.T, np.ones((1, space.width))),))
    if "batch_norm" not in space.norms:
        yield from _hidden_scales(space, parameters)
        yield from _rotations(space, parameters)


def _hidden_scales(space: Space, parameters: Array) -> Iterator[Directions]:
    r"""Scales of single units that a norm does not see, and that what is behind it takes back.

    The norm of ``V x`` is a quadratic form of ``x``, with ``k (k + 1) / 2`` coefficients :math:`\sum_i v_i v_i^\top`
    for ``k`` inputs: where there are more units, changes of their scales can keep all of these. Where another norm
    comes behind, with nothing but a homogeneous function and linear layers without bias between, any change will do.
    """
    if len(space.writers) != 1 or len(space.normalized) != 1 or space.writers[0].diagonal:
        return
    if space.readers or space.activations:
        return
    rows, normalized = parameters[space.writers[0].rows], space.normalized[0]
    inputs = rows.shape[1]
    centred = "layer_norm" in space.norms
    coefficients = inputs * (inputs + 1) // 2 + centred * inputs
    scales = [w.rows[:, ~w.shifts] for w in normalized.writers if not w.shifts.all()]
    norms_behind = [
        set() if r.biases is not None or r.writes is None else set(r.writes.norms) for r in normalized.readers
    ]
    again = (
        normalized.linear and bool(norms_behind) and all(n and n <= {"layer_norm", "rms_norm"} for n in norms_behind)
    )
    if set(space.norms) == {"rms_norm"} and scales and again:
        changes = np.eye(space.width)
        exact = not any(r.writes is not None and r.writes.epsilon for r in normalized.readers)
    elif coefficients < space.width and (scales or normalized.linear):
        if centred:
            rows = rows - rows.mean(0)
        first, second = np.triu_indices(inputs)
        conditions = np.hstack([rows[:, first] * rows[:, second], rows if centred else rows[:, :0]])
        changes, exact = scipy.linalg.null_space(conditions.T).T, True
    else:
        return
    columns = Columns()
    for number, scale in enumerate(changes):
        columns.add(number, space.writers[0].rows, -scale[:, None] * rows)
        for indices in scales or [reader.weights.T for reader in normalized.readers]:
            columns.add(number, indices, scale[:, None] * parameters[indices])
    yield Directions("norm", space.layer, (), (columns.form(),), exact=exact)


def _through_fixed_norm(passage: Passage, parameters: Array) -> Iterator[Directions]:
    """Linear maps, and constants, that are written before a BatchNorm in evaluation mode and undone behind it."""
    before, after = passage.before, passage.after
    if len(before.writers) != 1 or before.writers[0].diagonal or before.readers or before.activations:
        return
    if not after.linear or not after.readers or after.norms or after.fixed_norms or len(after.writers) > 1:
        return
    units = np.arange(before.width)
    scales = np.ones(before.width) if passage.scales is None else parameters[passage.scales]
    shifts = np.zeros(before.width) if passage.shifts is None else parameters[passage.shifts]
    if not scales.all():
        return
    writer, slopes = before.writers[0], scales / passage.deviation
    # The output is slope * (what is written + constant).
    constants = shifts / slopes - passage.mean
    written = parameters[writer.rows]
    own = writer.shifts.any()
    if own:
        written[:, np.flatnonzero(writer.shifts)[0]] += constants
    elif passage.shifts is None and constants.any() and any(reader.biases is None for reader in after.readers):
        return

    def maps(a: Indices, b: Indices) -> Directions:
        """Unit ``b`` is added to unit ``a``."""
        columns = Columns()
        numbers = np.arange(len(a))
        columns.add(numbers[:, None], writer.rows[a], written[b])
        if not own and passage.shifts is not None:
            columns.add(numbers, passage.shifts[a], slopes[a] * constants[b])
        for reader in after.readers:
            change = parameters[reader.weights[:, a].T] * (slopes[a] / slopes[b])[:, None]
            columns.add(numbers[:, None], reader.weights[:, b].T, -change)
            if not own and passage.shifts is None and reader.biases is not None:
                constant = change * (slopes * constants)[b][:, None]
                columns.add(numbers[:, None], np.broadcast_to(reader.biases, change.shape), constant)
        return Directions("norm", before.layer, _each(a) if np.array_equal(a, b) else (), (columns.form(),))

    if passage.scales is None:
        yield maps(units, units)
    if after.activations or after.heads or after.twisted or not passage.whole:
        return
    entries = written.shape[1] + sum(len(reader.weights) for reader in after.readers)
    if before.width**2 * entries > MOST_ENTRIES:
        before.broken.append(f"the changes of basis of {before.layer} through its BatchNorm, which are too many")
        return
    a, b = np.nonzero(~np.eye(before.width, dtype=bool))
    if a.size:
        yield maps(a, b)
    if passage.shifts is None and own and all(reader.biases is not None for reader in after.readers):
        columns = Columns()
        columns.add(units[:, None], writer.rows[:, writer.shifts], 1.0)
        undo_shifts(columns, units, after, parameters, units, slopes)
        yield Directions("norm", before.layer, _each(units), (columns.form(),))


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
    columns = Columns()
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
                    space.broken.append(f"the rotations of {space.layer} before a norm with a weight of zero")
                    return
    yield Directions("norm", space.layer, (), (columns.form(),))


def _turn_back(columns: Columns, column: int, normalized: Space, turn: Array, parameters: Array) -> bool:
    scale, shift, shifts = np.ones(normalized.width), np.zeros(normalized.width), None
    for writer in normalized.writers:
        for indices, is_shift in zip(writer.rows.T, writer.shifts, strict=True):
            if is_shift:
                shift, shifts = parameters[indices], indices
            else:
                scale = parameters[indices]
    if not scale.all():
        return False
    inner = scale[:, None] * turn / scale
    without_bias = shift.any() and any(reader.biases is None for reader in normalized.readers)
    if without_bias and shifts is not None:
        columns.add(column, shifts, inner @ shift)
    for reader in normalized.readers:
        change = parameters[reader.weights] @ inner
        columns.add(column, reader.weights, -change)
        if not without_bias and reader.biases is not None:
            columns.add(column, reader.biases, change @ shift)
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
        if reader.biases is not None:
            rows = np.hstack([reader.weights, reader.biases[:, None]])
            yield Directions("norm", reader.layer, (), (Added(rows, np.append(weights, -constant)[None]),))
        elif constant == 0.0:
            yield Directions("norm", reader.layer, (), (Added(reader.weights, weights[None]),))
        elif len(space.readers) == 1:  # without a bias the norm's own takes the constant back, as far as it is read
            if len(reader.weights) ** 2 * space.width > MOST_ENTRIES:
                space.broken.append(f"what {reader.layer} may add of the sum of its inputs, which is too much")
                return
            left, sizes, right = svd(parameters[reader.weights])
            columns = Columns()
            for number in np.flatnonzero(sizes > 1e-9 * sizes.max()):
                columns.add(int(number), reader.weights, left[:, number, None] * weights)
                columns.add(int(number), shifts[:, 0], -constant / sizes[number] * right[number])
            yield Directions("norm", reader.layer, (), (columns.form(),))


def _query_key(pairing: Pairing, parameters: Array) -> Iterator[Directions]:
    by_key: dict[bytes, tuple[Indices, list[Indices]]] = {}
    for queries, keys in pairing.heads:
        by_key.setdefault(keys.tobytes(), (keys, []))[1].append(queries)
    for keys, several in by_key.values():
        units = (tuple(keys.tolist()),)
        written = np.hstack([writer.rows[keys] for writer in pairing.keys.writers])
        read = np.hstack([writer.rows[queries] for queries in several for writer in pairing.queries.writers])
        forms: list[Form] = []
        if not pairing.keys.twisted:
            forms.append(Mixed(written, parameters[written], read, parameters[read]))
        elif len(keys) % 2 == 0:  # rotary embeddings commute with what is complex linear, in pairs of units
            half = len(keys) // 2
            first = np.arange(half)
            forms.append(_complex_scales(written, read, parameters, first, first + half))
            forms.append(_complex_scales(written, read, parameters, 2 * first, 2 * first + 1))
        for form in forms:
            yield Directions("attention", pairing.layer, units, (form,))
        for writer in pairing.keys.writers:
            if writer.shifts.any():
                shifts = writer.rows[keys][:, writer.shifts].reshape(-1, 1)
                yield Directions("attention", pairing.layer, units, (Added(shifts, np.ones((1, 1))),))


def _complex_scales(written: Indices, read: Indices, parameters: Array, first: Indices, second: Indices) -> Form:
    """Scaling and turning each pair of units."""
    columns = Columns()
    for start, entries in (
        (0, ((first, first, 1.0), (second, second, 1.0))),
        (len(first), ((first, second, 1.0), (second, first, -1.0))),
    ):
        numbers = (start + np.arange(len(first)))[:, None]
        for a, b, value in entries:
            columns.add(numbers, written[a], value * parameters[written[b]])
            columns.add(numbers, read[b], -value * parameters[read[a]])
    return columns.form()
