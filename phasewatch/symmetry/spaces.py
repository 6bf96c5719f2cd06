"""Hidden spaces of a network: who writes to them, who reads them, and which linear maps commute with what is between.

A space is what the units of a layer live in. Linear layers, embeddings and the affine parameters of norms write to
it, linear layers and norms read it; activations, pooling, reshaping and residual additions lie between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phasewatch.symmetry.tape import Call, Indices


@dataclass(eq=False)
class Writer:
    """Parameters that what is in a space is linear in.

    Attributes:
        rows: Flat indices, one row a unit, shape ``(width, count)``.
        shifts: Which columns of ``rows`` add a constant to the unit, shape ``(count,)``.
        diagonal: Whether each row only scales and shifts what has been there, as a norm's affine parameters do.
    """

    rows: Indices
    shifts: NDArray[np.bool_]
    diagonal: bool = False


@dataclass(eq=False)
class Reader:
    """A linear layer that reads a space.

    Attributes:
        layer: Name of its module.
        weights: Flat indices, one column a unit, shape ``(rows, width)``.
        biases: Flat index of the bias of each row, shape ``(rows,)``; None without bias.
        call: The call that read.
        channels: Unit of each input feature of the call.
        writes: The space that it writes, where each row is a unit of that.
    """

    layer: str
    weights: Indices
    biases: Indices | None
    call: Call | None = None
    channels: Indices | None = None
    writes: Space | None = None


@dataclass(eq=False)
class FixedNorm:
    """A BatchNorm in evaluation mode, which reads a space unit by unit.

    Attributes:
        scales: Flat indices of its weights.
        shifts: Flat indices of its biases.
        mean: The running means.
        deviation: The running standard deviations.
    """

    scales: Indices
    shifts: Indices | None
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


@dataclass(eq=False)
class Passage:
    """A BatchNorm in evaluation mode as one more linear layer, with a matrix that is diagonal.

    Attributes:
        before: The space that it reads.
        after: The space that it writes.
        scales: Flat index of the weight of each unit; None without.
        shifts: Flat index of the bias of each unit; None without.
        mean: The running means.
        deviation: The running standard deviations.
        whole: Whether all linear maps commute with what lies before it.
    """

    before: Space
    after: Space
    scales: Indices | None
    shifts: Indices | None
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    whole: bool


@dataclass(eq=False)
class Activation:
    """An elementwise function between the writers and the readers of a space; ``channels`` lie along ``axis``.

    ``slopes`` are the places of the parameters that are the slopes of negative inputs, if each channel has its own.
    """

    call: Call
    axis: int
    channels: Indices
    slopes: Indices | None = None


@dataclass(eq=False)
class Space:
    """The space of the units of a layer.

    Attributes:
        layer: Name of the module that writes first.
        width: Number of units.
        writers: What writes.
        readers: Linear layers that read.
        fixed_norms: BatchNorms in evaluation mode that read.
        norms: Names of the functions of other norms that read.
        epsilon: The largest epsilon of these.
        normalized: The spaces that these write.
        activations: Elementwise functions in between.
        blocks: Number of the block of each unit: what is between commutes with linear maps inside of blocks.
        linear: Whether linear maps can be undone by the readers at all.
        shift: Whether constants can be undone by the readers.
        heads: Whether attention lies between.
        twisted: Whether it was multiplied by fixed numbers, as rotary embeddings do.
        standardized: Whether a LayerNorm wrote it, so that the units add up to zero before its affine part.
        final: Whether the loss reads it.
        broken: What was met that is not known, and what was left out for being too much, in words.
        merged_into: The space that this one was added to; None while it stands for itself.
    """

    layer: str
    width: int
    writers: list[Writer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    fixed_norms: list[FixedNorm] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    epsilon: float = 0.0
    normalized: list[Space] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    blocks: Indices = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    linear: bool = True
    shift: bool = True
    heads: bool = False
    twisted: bool = False
    standardized: bool = False
    final: bool = False
    broken: list[str] = field(default_factory=list)
    merged_into: Space | None = None

    def __post_init__(self) -> None:
        """One block."""
        self.blocks = np.zeros(self.width, dtype=np.int64)

    @property
    def root(self) -> Space:
        """The space that this one has become part of, itself if of none."""
        space = self
        while space.merged_into is not None:
            space = space.merged_into
        return space

    def refine(self, blocks: Indices) -> None:
        """Only maps inside these blocks commute, too."""
        self.blocks = np.unique(np.stack([self.blocks, blocks]), axis=1, return_inverse=True)[1].ravel()

    def separate(self) -> None:
        """Only scaling unit by unit commutes."""
        self.blocks = np.arange(self.width)

    def block(self, reason: str | None = None) -> None:
        """Nothing can be undone."""
        self.linear = self.shift = False
        if reason is not None:
            self.broken.append(reason)


@dataclass(eq=False)
class Pairing:
    """Queries and keys of one attention, whose inner products are all that is used of them.

    Attributes:
        layer: Name of the module of the queries.
        queries: Space of the queries.
        keys: Space of the keys.
        heads: Units of each query head, and of its key head.
    """

    layer: str
    queries: Space
    keys: Space
    heads: list[tuple[Indices, Indices]]


@dataclass(eq=False)
class Redundancy:
    """Two writers that are added up, so that a constant can move from one to the other.

    Attributes:
        layer: Name of the module of the first.
        first: One writer.
        second: The other.
        first_readers: What reads the first before the two are added.
        second_readers: What reads the second before that.
    """

    layer: str
    first: Writer
    second: Writer
    first_readers: list[Reader]
    second_readers: list[Reader]
