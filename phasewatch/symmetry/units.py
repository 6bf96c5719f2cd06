"""Directions that are zero because of what the weights and the data happen to be: the non-generic ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.symmetry.architecture import Architecture
from phasewatch.symmetry.directions import Added, Array, Columns, Directions, Form
from phasewatch.symmetry.generic import (
    MOST_ENTRIES,
    absorb,
    absorbs,
    add_scales,
    can_undo_shift,
    change_of_basis,
    undo_shifts,
)
from phasewatch.symmetry.linear_algebra import CLEARLY_POSITIVE, joined, least_singular, svd, triangle
from phasewatch.symmetry.sites import Site, as_array
from phasewatch.symmetry.spaces import Activation, Reader, Space
from phasewatch.symmetry.tape import Indices

PROBE = "probe"
"""Kind of the zeros that a larger probe would not have."""

EXACT = 1e-9
"""Relative size up to which a difference counts as none when candidates are sought; each is verified after that.
Chosen."""

NEARLY = 0.01
"""Distance from a degeneracy up to which units are reported as being near it. Chosen."""


@dataclass(frozen=True)
class Closeness:
    """How far the units of a layer are from degenerate.

    Attributes:
        layer: Name of the module.
        distances: For each non-generic kind how far the nearest units are from it, 0.0 being the exact case, and which
            units these are. ``dead``: least share of the probe on which a unit's activation function has a slope.
            ``always on``: least share on which a ReLU unit is not at its steeper slope. ``same pattern``: least share
            on which two ReLU units are not on and off together. ``zero outgoing``, ``zero incoming``: least norm of a
            unit's weights, relative to the largest. ``constant``: least standard deviation of an activation, relative
            to the largest. ``parallel``: 1 less the largest absolute cosine between two units' activations.
            ``annihilating``: length of what is left of the effects on the outputs, each taken at unit length, in the
            combination of units that cancels best. ``data rank``: the same of the features that enter the layer,
            without units. A kind that does not apply, or whose measure is not known, is left out.
    """

    layer: str
    distances: Mapping[str, tuple[float, tuple[int, ...]]]

    @property
    def exact(self) -> bool:
        """Whether some unit is degenerate already, to a relative ``EXACT``."""
        return any(distance < EXACT for distance, _ in self.distances.values())

    def nearly(self, tolerance: float = NEARLY) -> dict[str, tuple[float, tuple[int, ...]]]:
        """Those of the distances that are within a tolerance, the exact cases not among them."""
        return {kind: found for kind, found in self.distances.items() if EXACT <= found[0] <= tolerance}


_Nearest = tuple[float, tuple[int, ...]]

_MOST_WORK = 2e10
"""Multiplications that may be spent on one layer's unseen directions. Chosen, for some seconds."""


_MOST_WORK_FOR_A_MEASURE = 3e7
"""Multiplications that may be spent on how nearly a layer's inputs are of less rank. Chosen."""

_SOME_ROWS = 4
"""Rows for each column among which a full rank is looked for first. Chosen."""

_CLEARLY_MORE = 1.25
"""Samples for each weight from which on they are taken to determine it where not all can be looked into. Chosen."""


class Layer:
    """The units of a hidden space on the probe.

    Attributes:
        space: The space.
        activations: What the readers see, one row a unit, shape ``(width, positions)``.
        slopes: Derivative of the activation function, shape ``(width, positions)``; None without just one function.
        site: The layer as a linear map; None if unknown.
    """

    def __init__(self, space: Space, sites: list[Site]) -> None:
        self.space = space
        read = next(r for r in space.readers if r.call is not None and r.call.inputs)
        self.activations = _read_by_unit(read, space.width)
        assert read.call is not None
        dtype, alone = read.call.inputs[0].dtype, len(space.activations) == 1
        self.slopes = _slopes(space.activations[0], space.width, dtype) if alone else None
        self.site = next((s for s in sites if s.space is space), None)

    @property
    def reach(self) -> Array | None:
        """Gradients at what the layer writes, shape ``(positions, width)``; None if unknown."""
        return None if self.site is None else self.site.gradients

    @property
    def means(self) -> Array:
        """Mean activation of each unit."""
        return self.activations.mean(1)

    @property
    def deviations(self) -> Array:
        """Standard deviation of each unit's activation."""
        return self.activations.std(1)

    @cached_property
    def cosines(self) -> Array:
        """Cosine between the activations of each two units, shape ``(width, width)``."""
        norms = np.array([np.linalg.norm(row) for row in self.activations])
        scaled = torch.from_numpy(self.activations / np.where(norms > 0, norms, 1.0)[:, None])
        return np.asarray((scaled @ scaled.T).numpy())

    def constant(self) -> NDArray[np.bool_]:
        """Which units have the same activation everywhere."""
        low, high, first = self.activations.min(1), self.activations.max(1), self.activations[:, 0]
        spread = np.maximum(high - first, first - low)
        return np.asarray(spread <= EXACT * max(float(high.max()), -float(low.min()), 1e-300))

    def effective(self) -> NDArray[np.bool_]:
        """Which units' inputs have an effect on the outputs somewhere."""
        if self.reach is None:
            return np.ones(self.space.width, dtype=bool)
        size = np.maximum(self.reach.max(0), -self.reach.min(0))
        return size > EXACT * max(float(size.max()), 1e-300)

    def closed(self) -> NDArray[np.bool_]:
        """Which units' activation function has no slope on the probe."""
        if self.slopes is None:
            return np.zeros(self.space.width, dtype=bool)
        return np.asarray(~(self.slopes != 0).any(1))

    def closeness(self, parameters: Array) -> Closeness:
        """The graded measures."""
        outgoing = np.sqrt(sum(np.square(parameters[r.weights]).sum(0) for r in self.space.readers))
        cosines = np.abs(self.cosines)
        distances: dict[str, _Nearest | None] = {
            "dead": None if self.slopes is None else _least((self.slopes != 0).mean(1)),
            "zero outgoing": _least(_relative(outgoing)),
            "zero incoming": self._without_input(parameters),
            "constant": _least(_relative(self.deviations)),
            "parallel": _nearest(np.maximum(1 - cosines, 0.0)),
            "annihilating": self._cancelling(),
            "always on": self._always_on(),
            "same pattern": self._same_pattern(),
            "data rank": self._unseen(),
        }
        return Closeness(
            self.space.layer, {kind: nearest for kind, nearest in distances.items() if nearest is not None}
        )

    def _without_input(self, parameters: Array) -> _Nearest | None:
        incoming = [parameters[w.rows[:, ~w.shifts]] for w in self.space.writers if not (w.diagonal or w.shifts.all())]
        return _least(_relative(np.linalg.norm(np.hstack(incoming), axis=1))) if incoming else None

    def _steep(self) -> NDArray[np.bool_] | None:
        """Where units are at their steeper slope; None where the activation function is not piecewise linear."""
        if self.slopes is None or not self.space.linear or not self.slopes.max() > 0:
            return None
        return np.asarray((self.slopes == self.slopes.max(1, keepdims=True)) & (self.slopes != 0))

    def _always_on(self) -> _Nearest | None:
        steep = self._steep()
        return None if steep is None else _least((~steep).mean(1))

    def _same_pattern(self) -> _Nearest | None:
        steep = self._steep()
        if steep is None:
            return None
        on = torch.from_numpy(steep.astype(np.float64))
        both = (on @ on.T).numpy() / on.shape[1]
        share = np.diag(both)
        switching = (share > 0) & (share < 1 - 0.5 / on.shape[1])
        apart = np.maximum(share[:, None] + share - 2 * both, 0.0)
        return _nearest(np.where(switching[:, None] & switching, apart, 1.0))

    def _cancelling(self) -> _Nearest | None:
        units = np.flatnonzero(self.effective())
        if self.reach is None or not len(units) or len(self.reach) < len(units):
            return None
        upper = triangle(self.reach[:, units])
        least, mixture = least_singular(upper / np.linalg.norm(upper, axis=0))
        return least, tuple(units[mixture > 0.1 * mixture.max()].tolist())

    def _unseen(self) -> _Nearest | None:
        if self.site is None:
            return None
        first = self.site.first_inputs
        positions, features = len(first) * len(self.site.entered), first.shape[1]
        dear = positions * features**2 > _MOST_WORK_FOR_A_MEASURE
        if dear and len(first) >= features and first.any(axis=0).all():
            return None
        inputs = self.site.inputs
        norms = np.linalg.norm(inputs, axis=0)
        if len(inputs) < features or not norms.all():
            return 0.0, ()
        return None if dear else (least_singular(triangle(inputs / norms))[0], ())


def layers_of(architecture: Architecture) -> Iterator[Layer]:
    """All hidden spaces that are read by a linear layer whose input is known; let go of each before the next."""
    for space in architecture.spaces:
        if any(r.call is not None and r.call.inputs for r in space.readers):
            yield Layer(space, architecture.sites)


def unit_directions(layer: Layer, parameters: Array) -> Iterator[Directions]:
    """Candidates of units that are dead, without effect, constant, parallel or share their slope."""
    space, name = layer.space, layer.space.layer
    constant, closed, effective = layer.constant(), layer.closed(), layer.effective()
    dead = constant & closed
    for unit in np.flatnonzero(dead).tolist():
        outgoing = _outgoing(space, (unit,), (1.0,), float(layer.means[unit]), parameters)
        yield Directions("dead", name, ((unit,),), (*_incoming(space, unit), *outgoing))
    for unit in np.flatnonzero(~dead & ~effective).tolist():
        yield Directions("zero outgoing", name, ((unit,),), _incoming(space, unit))
    for unit in np.flatnonzero(constant & ~dead).tolist():
        silent = not any(parameters[w.rows[unit, ~w.shifts]].any() for w in space.writers)
        kind = "zero incoming" if silent else "constant"
        outgoing = _outgoing(space, (unit,), (1.0,), float(layer.means[unit]), parameters)
        if outgoing:
            yield Directions(kind, name, ((unit,),), outgoing)
        writer = next((w for w in space.writers if w.shifts.any()), None)
        units = np.array([unit])
        if writer is None or layer.slopes is None:
            continue
        columns = Columns()
        columns.add(0, writer.rows[unit, writer.shifts], 1.0)
        slope, mean = float(layer.slopes[unit, 0]), float(layer.means[unit])
        if can_undo_shift(space, parameters, units).all():
            undo_shifts(columns, 0, space, parameters, units, slope)
        elif mean != 0.0 and not space.fixed_norms:
            # Without biases behind it, the outgoing weights take the change back.
            for reader in space.readers:
                weights = reader.weights[:, unit]
                columns.add(0, weights, -parameters[weights] * slope / mean)
        yield Directions(kind, name, ((unit,),), (columns.form(),))
    yield from _parallel(layer, ~constant, parameters)
    if layer.slopes is not None and not space.heads and not space.norms:
        yield from _sharing_slopes(layer, ~closed, parameters)
    yield from _with_own_slope(layer, ~closed, parameters)


def _incoming(space: Space, unit: int) -> tuple[Added, ...]:
    return tuple(Added(w.rows[unit][:, None], np.ones((1, 1))) for w in space.writers)


def _outgoing(
    space: Space, units: tuple[int, ...], mixture: tuple[float, ...], constant: float, parameters: Array
) -> tuple[Form, ...]:
    """A combination of units that is constant: every row of every reader may add a multiple of it."""
    forms: list[Form] = []
    for reader in space.readers:
        rows = reader.weights[:, list(units)]
        if constant == 0.0:
            forms.append(Added(rows, np.array([mixture])))
        elif reader.biases is not None:
            forms.append(Added(np.hstack([rows, reader.biases[:, None]]), np.array([[*mixture, -constant]])))
        elif reader.writes is not None and absorbs(reader.writes):
            columns, numbers = Columns(), np.arange(len(rows))
            columns.add(numbers[:, None], rows, np.array([mixture]))
            absorb(columns, numbers, reader.writes, parameters, constant * np.eye(len(rows)))
            forms.append(columns.form())
    return tuple(forms)


def _parallel(layer: Layer, among: NDArray[np.bool_], parameters: Array) -> Iterator[Directions]:
    values = layer.activations
    near = np.abs(layer.cosines) > 1 - 1e-9
    taken = ~among
    for first in range(len(values)):
        if taken[first]:
            continue
        norm = values[first] @ values[first]
        for second in np.flatnonzero(near[first] & ~taken):
            if second == first:
                continue
            factor = float(values[first] @ values[second] / norm)
            if np.linalg.norm(values[second] - factor * values[first]) > EXACT * np.linalg.norm(values[second]):
                continue
            taken[second] = True
            pair = first, int(second)
            yield Directions(
                "parallel", layer.space.layer, (pair,), _outgoing(layer.space, pair, (-factor, 1.0), 0.0, parameters)
            )


def _sharing_slopes(layer: Layer, among: NDArray[np.bool_], parameters: Array) -> Iterator[Directions]:
    """Units whose slopes are proportional everywhere are a linear layer of their own, with its change of basis."""
    assert layer.slopes is not None
    space, slopes = layer.space, layer.slopes
    if not (space.linear and len(np.unique(space.blocks)) == space.width):
        return
    scaled = slopes / np.abs(slopes).max(1, keepdims=True).clip(min=1e-300)
    # equal rows have equal projections, and others with probability one do not
    projections = (scaled * np.random.default_rng(0).standard_normal(scaled.shape[1])).sum(1)
    _, group = np.unique(np.round(projections, 9), return_inverse=True)
    always = np.ptp(slopes, axis=1) == 0
    several = np.bincount(group[among], minlength=len(group)) > 1
    for number in np.unique(group[among & (several[group] | always)]):
        units = np.flatnonzero((group == number) & among)
        steady = bool(always[units].all())
        peaks = np.abs(slopes[units]).max(1)
        kind = "always on" if steady else "same pattern"
        where = (tuple(units.tolist()),)
        if space.fixed_norms:
            columns = Columns()
            add_scales(columns, np.arange(len(units)), space, parameters, units)
            yield Directions(kind, space.layer, where, (columns.form(),))
        else:
            # what is written changes by h_a += h_b, what is read by slope_a / slope_b times the activation of b
            yield Directions(kind, space.layer, where, (change_of_basis(space, parameters, units, peaks),))
        shifting = next((w for w in space.writers if w.shifts.any()), None)
        if steady and shifting is not None and can_undo_shift(space, parameters, units).all():
            columns = Columns()
            columns.add(np.arange(len(units))[:, None], shifting.rows[units][:, shifting.shifts], 1.0)
            undo_shifts(columns, np.arange(len(units)), space, parameters, units, slopes[units, 0])
            yield Directions(kind, space.layer, where, (columns.form(),))


def _with_own_slope(layer: Layer, among: NDArray[np.bool_], parameters: Array) -> Iterator[Directions]:
    """A unit whose slope is one parameter everywhere: what is written shrinks as the slope grows."""
    space = layer.space
    if layer.slopes is None or space.activations[0].slopes is None:
        return
    own = space.activations[0].slopes[np.argsort(space.activations[0].channels)]
    everywhere = (layer.slopes == parameters[own][:, None]).all(1)
    for unit in np.flatnonzero(everywhere & among).tolist():
        columns = Columns()
        columns.add(0, own[[unit]], parameters[own[unit]])
        for writer in space.writers:
            columns.add(0, writer.rows[unit], -parameters[writer.rows[unit]])
        yield Directions("always on", space.layer, ((unit,),), (columns.form(),))


def annihilating_directions(site: Site) -> Iterator[Directions]:
    """Combinations of units whose effects cancel: any input may be added to all of them at once.

    At the last layer a combination of all outputs in equal parts is the shift that a softmax does not see.
    """
    if site.gradients is None:
        return
    for mixture in null_vectors(site.gradients, skip_zero=True):
        units = np.flatnonzero(np.abs(mixture) > 1e-7)
        form = Added(site.rows[units].T, mixture[None, units])
        softmax = site.space.final and len(units) == len(mixture) and np.ptp(mixture) < 1e-6 * np.abs(mixture).max()
        kind = "softmax" if softmax else "annihilating"
        yield Directions(kind, site.layer, () if softmax else (tuple(units.tolist()),), (form,))


def data_rank_directions(site: Site, thorough: bool, rank_limit: int) -> Iterator[Directions]:
    """Changes of a unit's incoming weights that no sample sees on which the unit has an effect, by cause.

    The kind is ``probe`` where further samples would see them, see :func:`by_cause`, and ``data rank`` else.

    Args:
        site: The linear layer.
        thorough: Whether to look for changes of several units that cancel, too, and into the samples of a unit that
            are clearly more than its weights, or fewer, which is dear. Inputs that are zero on all of a unit's samples
            are found in any case.
        rank_limit: Number of outputs that the loss tells apart on the probe. Where a layer's samples are fewer than its
            inputs, and nevertheless as many in all of its units as that, it makes the zeros already.
    """
    if thorough:
        yield from _jointly_unseen(site)
    if not thorough and _clearly_seen(site):
        return
    positions, features = site.inputs.shape
    if not thorough and positions < features and positions * len(site.rows) >= rank_limit:
        yield from _single_inputs_unseen(site)
        return
    common = null_vectors(site.inputs)
    alone: list[int] = []
    seen = _seen(site)
    if seen is not None:
        _, first, group = np.unique(np.packbits(seen, axis=0), axis=1, return_index=True, return_inverse=True)
        work = 0
        for number, pattern in enumerate(seen.T[first]):
            if pattern.all() or not pattern.any() or (pattern.sum() > _CLEARLY_MORE * features and not thorough):
                continue
            units = np.flatnonzero(group.ravel() == number)
            work += int(pattern.sum()) * features**2
            if work > _MOST_WORK:
                site.space.broken.append(f"what single units of {site.layer} do not see, which is too much to look at")
                break
            vectors = null_vectors(site.inputs[pattern])
            if len(vectors) > len(common):
                alone += units.tolist()
                causes = by_cause(site.inputs[pattern], vectors, site.samples[pattern])
                for index in units.tolist():
                    for kind, some in causes.items():
                        yield Directions(kind, site.layer, ((index,),), (Added(site.rows[index][None], some),))
    others = np.setdiff1d(np.arange(len(site.rows)), alone)
    if len(common) and others.size:  # what no sample sees is among what the unit's own samples do not see
        for kind, some in by_cause(site.inputs, common, site.samples).items():
            yield Directions(kind, site.layer, (), (Added(site.rows[others], some),))


def _clearly_seen(site: Site) -> bool:
    """Whether the inputs have full rank in the first batch already, and each unit sees clearly more of them or none."""
    features = site.rows.shape[1]
    if site.gradients is None or len(site.first_inputs) < features or not _independent(site.first_inputs):
        return False
    size = np.abs(site.gradients)
    number = (size > EXACT * max(float(size.max()), 1e-300)).sum(0)
    return bool(((number == 0) | (number > _CLEARLY_MORE * features)).all())


def _single_inputs_unseen(site: Site) -> Iterator[Directions]:
    """Weights of inputs that are zero on all samples on which the unit has an effect: none sees them."""
    size = np.abs(site.inputs)
    active = size > EXACT * max(float(size.max()), 1e-300)
    never: NDArray[np.bool_] = np.logical_not(active.any(axis=0))
    unseen = np.broadcast_to(never, site.rows.shape)
    seen = _seen(site)
    if seen is not None:
        together = torch.from_numpy(seen).float().T @ torch.from_numpy(active).float()
        # A unit without any effect is another kind of zero.
        unseen = np.where(seen.any(axis=0, keepdims=True).T, together.numpy() == 0, never)
    alone = np.flatnonzero((unseen & ~never).any(1))
    others = np.setdiff1d(np.arange(len(site.rows)), alone)
    for index in alone.tolist():
        yield Directions("data rank", site.layer, ((index,),), _parameters(site.rows[index, unseen[index]]))
    if never.any() and others.size:
        yield Directions("data rank", site.layer, (), _parameters(site.rows[np.ix_(others, never)]))


def _seen(site: Site) -> NDArray[np.bool_] | None:
    """At which positions each unit has an effect, shape ``(positions, units)``; None if unknown."""
    if site.gradients is None or len(site.gradients) != len(site.inputs):
        return None
    size = np.abs(site.gradients)
    return np.asarray(size > EXACT * max(float(size.max()), 1e-300))


def _parameters(places: Indices) -> tuple[Form, ...]:
    return (Added(places.reshape(-1, 1), np.ones((1, 1))),)


def _jointly_unseen(site: Site) -> Iterator[Directions]:
    """Changes of several units' incoming weights whose effects cancel on each sample: for small layers."""
    if site.gradients is None or len(site.gradients) != len(site.inputs):
        return
    rows, size = len(site.inputs), site.rows.size
    if rows * size**2 > _MOST_WORK or rows * size > MOST_ENTRIES:
        site.space.broken.append(f"what units of {site.layer} together do not see, which is too much to look at")
        return
    effects = (site.gradients[:, :, None] * site.inputs[:, None, :]).reshape(rows, size)
    for kind, vectors in by_cause(effects, null_vectors(effects), site.samples).items():
        yield Directions(kind, site.layer, (), (Added(site.rows.reshape(1, -1), vectors),))


def by_cause(matrix: Array, vectors: Array, samples: Indices) -> dict[str, Array]:
    """Split null vectors into those that the data leave unseen and those that only the probe's size does.

    Of a vector only the columns in it and the samples that see one of them matter. Samples without which the rank of
    these would be less are as many as the last sample has made a difference in all orders in which they could have
    come, and their share is the chance that a further one would add to the rank (Good 1953, "The population frequencies
    of species"). Where that is above a half, it is the probe that is too small. A dead pixel is seen by no sample, and
    twice the same pixel by many that all say the same: those are the data's.

    Args:
        matrix: What sees the vectors, shape ``(rows, columns)``.
        vectors: What it maps to zero, with as few entries as may be, shape ``(vectors, columns)``.
        samples: Number of the sample of each row, shape ``(rows,)``.

    Returns:
        The vectors by kind, ``data rank`` and ``probe``; a kind without vectors is left out.
    """
    of_probe = np.zeros(len(vectors), dtype=bool)
    if len(vectors):
        inside = vectors != 0
        seen = np.abs(matrix) > EXACT * max(float(np.abs(matrix).max()), 1e-300)
        rows = (torch.from_numpy(seen).float() @ torch.from_numpy(inside).float().T).numpy() > 0
        _, first, group = np.unique(np.packbits(rows, axis=0), axis=1, return_index=True, return_inverse=True)
        for number, pattern in enumerate(rows.T[first]):
            among = samples[pattern]
            # Each sample that makes a difference adds to the rank, which is one less than the columns in a vector.
            enough = inside.sum(1) - 1 > len(np.unique(among)) / 2
            chosen = np.flatnonzero((group.ravel() == number) & enough)
            if len(among) and len(chosen):
                columns = inside[chosen].any(0)
                of_probe[chosen] = _share_that_matters(matrix[pattern][:, columns], among) > 0.5
    split = {"data rank": vectors[~of_probe], PROBE: vectors[of_probe]}
    return {kind: some for kind, some in split.items() if len(some)}


def _share_that_matters(matrix: Array, samples: Indices) -> float:
    """Share of the samples without whose rows the rank of a matrix would be less."""
    left, values, _ = svd(matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1e-300))
    left = left[:, values > EXACT * values[0]]
    order = np.argsort(samples, kind="stable")
    starts = np.flatnonzero(np.diff(samples[order], prepend=-1))
    parts = np.split(left[order], starts[1:])
    # The rows of a sample hold a direction of their own where they hold all of its length.
    matter = [np.linalg.norm(part, 2) > 1 - CLEARLY_POSITIVE for part in parts]
    return float(np.mean(matter))


def null_vectors(matrix: Array, skip_zero: bool = False) -> Array:
    """A basis of the vectors that a matrix maps to zero, one a row, each with as few entries as elimination gives.

    Args:
        matrix: Shape ``(rows, columns)``.
        skip_zero: Leave columns of zeros out of it.
    """
    some = matrix[:: max(len(matrix) // (_SOME_ROWS * matrix.shape[1] + 1), 1)]
    if len(some) < len(matrix) and _independent(some):
        return np.zeros((0, matrix.shape[1]))
    norms = np.linalg.norm(matrix, axis=0)
    used = np.flatnonzero(norms > EXACT * max(float(norms.max(initial=0.0)), 1e-300))
    zero = np.setdiff1d(np.arange(matrix.shape[1]), used)
    basis = [] if skip_zero else list(np.eye(matrix.shape[1])[zero])
    if not used.size:
        return np.reshape(basis, (-1, matrix.shape[1]))
    scaled = matrix[:, used] / norms[used]
    if len(scaled) >= len(used):
        scaled = triangle(scaled)
        if not len(basis) and least_singular(scaled)[0] > CLEARLY_POSITIVE:
            return np.zeros((0, matrix.shape[1]))
    upper, pivots = scipy.linalg.qr(scaled, mode="r", pivoting=True)
    diagonal = np.abs(np.diag(upper))
    rank = int((diagonal > EXACT * diagonal[0]).sum())
    if rank < len(used):
        expansion = scipy.linalg.solve_triangular(upper[:rank, :rank], upper[:rank, rank:])
        for i in range(len(used) - rank):
            vector = np.zeros(matrix.shape[1])
            vector[used[pivots[rank + i]]] = 1.0
            vector[used[pivots[:rank]]] = -np.where(np.abs(expansion[:, i]) > 1e-10, expansion[:, i], 0.0)
            vector[used] /= norms[used]
            basis.append(vector / np.abs(vector).max())
    return np.reshape(basis, (-1, matrix.shape[1]))


def _independent(rows: Array) -> bool:
    """Whether the columns are independent without a closer look: they are in all rows, if they are in some."""
    norms = np.linalg.norm(rows, axis=0)
    return bool(norms.all()) and least_singular(triangle(rows / norms))[0] > CLEARLY_POSITIVE


def _read_by_unit(reader: Reader, width: int) -> Array:
    assert reader.call is not None and reader.channels is not None
    axis = -1 if reader.call.name == "linear" else 1
    order = np.argsort(reader.channels, kind="stable")
    sizes = [x.numel() // width for x in reader.call.inputs]
    return joined(sizes, (_by_unit(x, axis, order, width) for x in reader.call.inputs), axis=1)


def _slopes(activation: Activation, width: int, dtype: torch.dtype) -> Array:
    call = activation.call
    order = np.argsort(activation.channels, kind="stable")
    kwargs = {**call.kwargs, **({"inplace": False} if "inplace" in call.kwargs else {})}
    if call.name.endswith("_") and not call.name.endswith("__"):
        function = getattr(torch, call.name.rstrip("_"))
    else:
        function = call.function

    def slopes() -> Iterator[Array]:
        while call.inputs:  # which are asked for here alone, and take as much memory as the slopes
            with torch.enable_grad():
                x = call.inputs.pop(0).to(dtype).requires_grad_()
                (slope,) = torch.autograd.grad(function(x, *call.args[1:], **kwargs).sum(), x)
            yield _by_unit(slope, activation.axis, order, width)

    return joined([x.numel() // width for x in call.inputs], slopes(), axis=1)


def _by_unit(values: Tensor, axis: int, order: Indices, width: int) -> Array:
    """One row a unit."""
    found = as_array(values.movedim(axis, 0))
    return found.reshape(len(found), -1)[order].reshape(width, -1)


def _least(values: Array) -> _Nearest:
    return float(values.min()), (int(values.argmin()),)


def _nearest(distances: Array) -> _Nearest | None:
    """The least distance of two units, and which; None where there are no two."""
    if len(distances) < 2:
        return None
    distances = distances + np.diag(np.full(len(distances), np.inf))
    first, second = sorted(divmod(int(np.argmin(distances)), len(distances)))
    return float(distances[first, second]), (first, second)


def _relative(values: Array) -> Array:
    return np.asarray(values / max(float(values.max()), 1e-300))
