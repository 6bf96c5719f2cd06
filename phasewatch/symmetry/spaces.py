"""Hidden spaces of a network: who writes to them, who reads them, and which linear maps commute with what is between.

A space is what the units of a layer live in. Linear layers, embeddings and the affine parameters of norms write to
it, linear layers and norms read it; activations, pooling, reshaping and residual additions lie between. Where each
unit went is found by sending labels through the same calls: a tensor that holds, at every element, the code of the
unit that it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from phasewatch.objective import Objective
from phasewatch.symmetry.tape import HOMOGENEOUS, LINEAR_MAPS, NONLINEAR, Call, Indices, Recording

_SAME = {"contiguous", "clone", "to", "float", "double", "type_as", "dropout", "neg", "__neg__", "detach_", "identity"}
_LABELLED = {
    *("flatten", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "unflatten"),
    *("__getitem__", "chunk", "split", "tensor_split", "T", "mT", "movedim", "moveaxis", "repeat", "repeat_interleave"),
    *("unbind", "swapaxes", "swapdims", "narrow", "select", "cat", "concat", "stack", "view_as", "reshape_as", "mean"),
    *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "index_select", "roll", "flip"),
}
_MAX_POOLS = {"max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax"}
_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_MULTIPLY = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__"}
_MATMUL = {"matmul", "__matmul__", "mm", "bmm"}
_NORMS = {"layer_norm", "rms_norm", "batch_norm"}
_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}


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
    """An elementwise function between the writers and the readers of a space; ``channels`` lie along ``axis``."""

    call: Call
    axis: int
    channels: Indices


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


@dataclass(eq=False)
class Site:
    """A linear layer as such: what enters it and how the outputs depend on what leaves it.

    Attributes:
        layer: Name of its module.
        rows: Flat indices of weights and bias, one row a unit, shape ``(units, features [+ 1])``.
        entered: What the layer was given in each batch, with the call and whether it has a bias.
        left: Random combinations of outputs differentiated in what left the layer, in each batch; None if unknown.
        unit_axis: Axis of these along which the units lie.
        space: The space that it writes.
    """

    layer: str
    rows: Indices
    entered: list[tuple[Call, Tensor, bool]]
    left: list[Tensor] | None
    unit_axis: int
    space: Space

    def let_go(self) -> None:
        """Make what follows from the recording anew where it is asked for again: together it takes a lot of memory."""
        for name in ("gradients", "inputs", "first_inputs", "samples"):
            self.__dict__.pop(name, None)

    @cached_property
    def gradients(self) -> NDArray[np.float64] | None:
        """Random combinations of outputs differentiated in the units, ``(positions, units)``; None if unknown."""
        if self.left is None:
            return None
        units = len(self.rows)
        return np.vstack([_numpy(g.movedim(self.unit_axis, -1).reshape(-1, units)) for g in self.left])

    @cached_property
    def inputs(self) -> NDArray[np.float64]:
        """What is multiplied with each row, shape ``(positions, features [+ 1])``; of a convolution large."""
        blocks = [_positions(*entry) for entry in self.entered]
        self._lengths = [len(block) for block in blocks]
        return np.vstack(blocks) if len(blocks) > 1 else blocks[0]

    @cached_property
    def first_inputs(self) -> NDArray[np.float64]:
        """The same of the first batch."""
        return _positions(*self.entered[0])

    @cached_property
    def samples(self) -> Indices:
        """Number of the sample that each position belongs to, shape ``(positions,)``.

        Inputs are there again for each random combination.
        """
        assert len(self.inputs)  # which counts the positions of each
        first: dict[int, int] = {}
        numbers, count = [], 0
        for (_, x, _), length in zip(self.entered, self._lengths, strict=True):
            if id(x) not in first:
                first[id(x)] = count
                count += len(x)
            numbers.append(first[id(x)] + np.arange(length) * len(x) // max(length, 1))
        return np.concatenate(numbers)


@dataclass(eq=False)
class Architecture:
    """What is known of a network.

    Attributes:
        spaces: All spaces.
        pairings: All attentions.
        sites: All linear layers.
        redundant: Pairs of writers that are added up.
        passages: All BatchNorms in evaluation mode.
        not_followed: What is not known of the network as a whole, in words.
    """

    spaces: list[Space]
    pairings: list[Pairing]
    sites: list[Site]
    redundant: list[Redundancy]
    passages: list[Passage]
    not_followed: list[str]

    @property
    def unknown(self) -> list[str]:
        """What is not known by now, in words: that of the spaces grows as directions are looked for in them."""
        reasons = [reason for space in self.spaces for reason in space.broken]
        return list(dict.fromkeys([*self.not_followed, *reasons]))


def find_architecture(objective: Objective, recording: Recording) -> Architecture:
    """Follow the units of every layer through the calls that were recorded."""
    walk = _Walk(objective)
    for call in recording.calls:
        walk.visit(call)
    for output in recording.outputs:
        if (found := walk.narrowed(output)) is not None:
            found[0].block()
            found[0].final = True
    return walk.architecture()


class _Walk:
    def __init__(self, objective: Objective) -> None:
        self._names = np.concatenate(
            [np.full(shape.numel(), i) for i, shape in enumerate(objective.parameter_shapes.values())]
        )
        self._parameters = list(objective.parameter_shapes)
        self._known = np.zeros(len(self._parameters), dtype=bool)
        self._tracked: dict[int, tuple[Space, Tensor]] = {}
        self._parts: dict[tuple[int, bytes], Space] = {}
        self._spaces: list[Space] = []
        self._pairings: list[Pairing] = []
        self._sites: dict[bytes, Site] = {}
        self._redundant: list[Redundancy] = []
        self._passages: list[Passage] = []
        self._unknown: list[str] = []

    def architecture(self) -> Architecture:
        spaces = [space for space in self._spaces if space.merged_into is None]
        for reader in (reader for space in spaces for reader in space.readers):
            reader.writes = None if reader.writes is None else _root(reader.writes)
        not_followed = list(self._unknown)
        missing = [name for name, known in zip(self._parameters, self._known, strict=True) if not known]
        if missing:
            not_followed.append(f"what is computed with {', '.join(missing[:6])}{' and others' * (len(missing) > 6)}")
        return Architecture(
            spaces, self._pairings, list(self._sites.values()), self._redundant, self._passages, not_followed
        )

    def visit(self, call: Call) -> None:
        if call.name in LINEAR_MAPS:
            self._linear_map(call)
        elif call.name in _NORMS:
            self._norm(call)
        elif call.name == "multi_head_attention_forward":
            self._multi_head_attention(call)
        elif call.name in _ADD and any(self._is_tracked(t) for t in call.tensors()):
            self._add(call)
        elif not any(self._is_tracked(tensor) for tensor in call.tensors()):
            return
        elif call.name in _SAME:
            self._track(call.output, *self._tracked[id(call.args[0])])
        elif call.name in _LABELLED or call.name in _MAX_POOLS:
            self._relabel(call)
        elif call.name in HOMOGENEOUS or call.name in NONLINEAR:
            self._activation(call)
        elif call.name in _MULTIPLY:
            self._multiply(call)
        elif call.name in _MATMUL:
            self._matmul(call)
        elif call.name == "scaled_dot_product_attention":
            query, key, value = (call.argument(i, name) for i, name in enumerate(("query", "key", "value")))
            self._pair(self._tracked.get(id(query)), self._tracked.get(id(key)), key_axis=-1)
            self._attend(call.output, value)
        else:
            self._give_up(call)

    # tracking

    def _is_tracked(self, tensor: Any) -> bool:
        return id(tensor) in self._tracked

    def _track(self, tensor: Tensor, space: Space, labels: Tensor) -> None:
        self._tracked[id(tensor)] = (_root(space), labels)

    def _new_space(self, layer: str, width: int | None) -> Space:
        space = Space(layer, width or 0)
        self._spaces.append(space)
        return space

    def narrowed(self, tensor: Any) -> tuple[Space, Tensor] | None:
        """Space and labels of a tensor; where it holds some of the units only, the space of these."""
        if id(tensor) not in self._tracked:
            return None
        space, labels = self._tracked[id(tensor)]
        space = _root(space)
        channels = _decoded(labels, space.width)
        present = np.unique(channels)
        if len(present) == space.width:
            return space, labels
        key = (id(space), present.tobytes())
        if key not in self._parts:
            part = self._new_space(space.layer, len(present))
            part.writers = [Writer(w.rows[present], w.shifts, w.diagonal) for w in space.writers]
            part.linear, part.shift, part.twisted, part.heads = space.linear, space.shift, space.twisted, space.heads
            part.refine(space.blocks[present])
            self._parts[key] = part
        return _root(self._parts[key]), _encoded(np.searchsorted(present, channels))

    def _along(self, tensor: Any, axis: int) -> tuple[Space, Indices] | None:
        """Space and unit of each entry along an axis, if units vary along no other."""
        found = self.narrowed(tensor)
        if found is None:
            return None
        space, labels = found
        varying = _varying_axes(labels)
        if varying - {axis % labels.dim()}:
            space.block(f"how the units of {space.layer} are arranged in a later layer")
            return None
        first = labels.movedim(axis, -1).flatten(0, -2)[0] if labels.dim() > 1 else labels
        return space, _decoded(first, space.width)

    def _layer(self, indices: Indices) -> str:
        names = [self._parameters[i] for i in np.unique(self._names[indices])]
        self._known[np.unique(self._names[indices])] = True
        return names[0].rpartition(".")[0] or names[0]

    def _give_up(self, call: Call) -> None:
        for tensor in call.tensors():
            if (found := self.narrowed(tensor)) is not None:
                found[0].block(f"the function {call.name} after {found[0].layer}")

    # calls

    def _linear_map(self, call: Call) -> None:
        first = 1 if call.name == "embedding" else 0
        axis = -1 if call.name in ("linear", "embedding") else 1
        weight, bias = call.indices(1, "weight"), call.indices(2, "bias")
        groups = call.argument(6, "groups", 1) if call.name.startswith("conv") else 1
        read = None if first else self._along(call.args[0], axis)
        if weight is None or groups != 1 or weight.ndim < 2:
            if read is not None:
                read[0].block(None if weight is None else f"a grouped convolution after {read[0].layer}")
            return
        layer = self._layer(weight)
        if call.name == "embedding":
            self._write(call.output, layer, Writer(weight.T, np.full(len(weight), True)), axis)
            return
        writer = self._affine_writer(weight, bias)
        space = self._write(call.output, layer, writer, axis)
        if read is not None:
            self._read(layer, weight, bias, read, call, space)
        self._add_site(layer, writer.rows, call, space, bias is not None)

    def _write(self, output: Tensor, layer: str, writer: Writer | None, axis: int, width: int | None = None) -> Space:
        space = self._new_space(layer, width if writer is None else len(writer.rows))
        if writer is not None:
            space.writers.append(writer)
        shape = [1] * output.dim()
        shape[axis] = space.width
        self._track(output, space, _encoded(np.arange(space.width)).view(shape).expand(output.shape))
        return space

    def _read(
        self,
        layer: str,
        weight: Indices,
        bias: Indices | None,
        read: tuple[Space, Indices],
        call: Call | None,
        writes: Space | None = None,
    ) -> None:
        space, channels = read
        copies = len(channels) // space.width
        if np.any(np.bincount(channels, minlength=space.width) != copies):
            space.block(f"how {layer} reads the units of {space.layer}")
            return
        order = np.argsort(channels, kind="stable").reshape(space.width, copies)
        columns = np.moveaxis(weight[:, order], 1, -1)  # (out, copies, ..., width)
        biases = None
        if bias is not None:
            biases = np.broadcast_to(bias.reshape(-1, *[1] * (columns.ndim - 2)), columns.shape[:-1]).ravel()
        weights = columns.reshape(-1, space.width)
        one_to_one = writes if writes is not None and len(weights) == writes.width else None
        space.readers.append(Reader(layer, weights, biases, call, channels, one_to_one))

    def _add_site(self, layer: str, rows: Indices, call: Call, space: Space, has_bias: bool) -> None:
        entered = [(call, x, has_bias) for x in call.inputs]
        left = list(call.gradients) if len(call.gradients) == len(call.inputs) else None
        known = self._sites.get(rows.tobytes())
        if known is None:
            self._sites[rows.tobytes()] = Site(layer, rows, entered, left, -1 if call.name == "linear" else 1, space)
            return
        known.entered += entered
        known.left = None if known.left is None or left is None else known.left + left

    def _norm(self, call: Call) -> None:
        is_batch = call.name == "batch_norm"
        found = self._along(call.args[0], 1 if is_batch else -1)
        start = 3 if is_batch else 2
        scale, shift = call.indices(start, "weight"), call.indices(start + 1, "bias")
        if call.name == "rms_norm":
            shift = None
        given = [indices for indices in (scale, shift) if indices is not None]
        layer = self._layer(given[0]) if given else (found[0].layer if found else call.name)
        for indices in given:
            self._layer(indices)
        axis = 1 if is_batch else -1
        writer = (
            Writer(np.stack(given, axis=1), np.array([i is shift for i in given]), diagonal=True) if given else None
        )
        width = len(given[0]) if given else found[0].width if found else 0
        if not width:
            return
        written = self._write(call.output, layer, writer, axis, width)
        written.separate()
        written.standardized = call.name == "layer_norm"
        written.shift = shift is not None
        if found is None:
            return
        space, channels = found
        if is_batch and not call.argument(5, "training", False):
            self._fixed_norm(call, space, channels, scale, shift, written)
        else:
            space.norms.append(call.name)
            position = {"layer_norm": 4, "rms_norm": 3, "batch_norm": 7}[call.name]
            default = None if call.name == "rms_norm" else 1e-5
            space.epsilon = max(space.epsilon, call.argument(position, "eps", default) or 0.0)
            space.normalized.append(written)

    def _fixed_norm(
        self,
        call: Call,
        space: Space,
        channels: Indices,
        scale: Indices | None,
        shift: Indices | None,
        written: Space,
    ) -> None:
        whole = len(np.unique(space.blocks)) == 1
        space.separate()
        if len(channels) != space.width:
            space.block()
            return
        order = np.argsort(channels)
        mean, variance = (
            _numpy(call.argument(i, name))[order] for i, name in ((1, "running_mean"), (2, "running_var"))
        )
        deviation = np.sqrt(variance + call.argument(7, "eps", 1e-5))
        scales, shifts = (None if indices is None else indices[order] for indices in (scale, shift))
        if np.array_equal(order, np.arange(space.width)):
            self._passages.append(Passage(space, written, scales, shifts, mean, deviation, whole))
        if scales is None:
            space.block()
        else:
            space.fixed_norms.append(FixedNorm(scales, shifts, mean, deviation))

    def _activation(self, call: Call) -> None:
        found = self.narrowed(call.args[0])
        if found is None:
            return
        space, labels = found
        axes = _varying_axes(labels)
        if len(axes) == 1:
            axis = axes.pop()
            first = labels.movedim(axis, -1).flatten(0, -2)[0] if labels.dim() > 1 else labels
            space.activations.append(Activation(call, axis, _decoded(first, space.width)))
        space.separate()
        space.shift = False
        if call.name in NONLINEAR:
            space.linear = False
        self._track(call.output, space, labels)

    def _relabel(self, call: Call) -> None:
        spaces = {id(_root(self._tracked[id(t)][0])) for t in call.tensors() if self._is_tracked(t)}
        leaves = [t for t in tree_leaves([call.args, call.kwargs]) if isinstance(t, Tensor)]
        several = call.name in ("cat", "concat", "stack")
        if len(spaces) > 1 or (several and not all(self._is_tracked(t) for t in leaves)):
            self._give_up(call)
            return
        space = next(_root(self._tracked[id(t)][0]) for t in leaves if self._is_tracked(t))
        args, kwargs = tree_map(
            lambda x: self._tracked[id(x)][1] if self._is_tracked(x) else x, (call.args, dict(call.kwargs))
        )
        try:
            with torch.no_grad():
                labels = getattr(args[0], call.name) if call.name in ("T", "mT") else call.function(*args, **kwargs)
            for tensor, label in zip(
                call.outputs(), [x for x in tree_leaves(labels) if isinstance(x, Tensor)], strict=False
            ):
                _decoded(label, space.width)
                self._track(tensor, space, label)
        except (RuntimeError, TypeError, ValueError):
            self._give_up(call)
            return
        if call.name in _MAX_POOLS:
            space.separate()

    def _add(self, call: Call) -> None:
        left, right = call.args[0], call.argument(1, "other")
        if call.kwargs.get("alpha", 1) != 1:
            self._give_up(call)
            return
        if self._is_tracked(left) and self._is_tracked(right):
            self._merge(call, left, right)
            return
        tracked, other = (left, right) if self._is_tracked(left) else (right, left)
        space, labels = self._tracked[id(tracked)]
        space = _root(space)
        indices = call.parameters.get(id(other)) if isinstance(other, Tensor) else None
        if tuple(call.output.shape) != tuple(labels.shape):
            labels = torch.broadcast_to(labels, call.output.shape)
        if indices is None:
            space.linear = False
        else:
            found = self._along(tracked, -1)
            if found is None or indices.shape[-1] != len(found[1]) or len(found[1]) != found[0].width:
                self._give_up(call)
                return
            space, channels = found
            self._layer(indices)
            rows = indices.reshape(-1, space.width)[:, np.argsort(channels)].T
            writer = Writer(rows, np.ones(rows.shape[1], dtype=bool))
            self._note_redundant(space, writer)
            space.writers.append(writer)
        self._track(call.output, space, labels)

    def _merge(self, call: Call, left: Tensor, right: Tensor) -> None:
        (space, labels), (other, other_labels) = (self._tracked[id(t)] for t in (left, right))
        space, other = _root(space), _root(other)
        shape = call.output.shape
        labels, other_labels = labels.broadcast_to(shape), other_labels.broadcast_to(shape)
        if space is other:
            space.twisted |= not torch.equal(labels, other_labels)
            self._track(call.output, space, labels)
            return
        if space.width != other.width or not torch.equal(labels, other_labels):
            self._give_up(call)
            return
        if space.writers and other.writers:
            self._note_redundant(space, other.writers[0], other)
        if space.activations or other.activations:  # units of a sum are no units of either
            space.activations, other.activations = [], []
        for name in ("writers", "readers", "fixed_norms", "norms", "normalized", "broken"):
            getattr(space, name).extend(getattr(other, name))
        space.epsilon = max(space.epsilon, other.epsilon)
        space.refine(other.blocks)
        space.linear &= other.linear and bool(other.writers) == bool(space.writers)
        space.shift &= other.shift
        space.heads |= other.heads
        space.twisted |= other.twisted
        space.standardized = False
        other.merged_into = space
        self._track(call.output, space, labels)

    def _note_redundant(self, space: Space, writer: Writer, other: Space | None = None) -> None:
        if space.norms or (other is not None and other.norms):
            return  # a norm that reads one of the two before they are added sees the constant move
        first = next((w for w in space.writers if w.shifts.any()), None)
        if first is not None and writer.shifts.any():
            readers = [] if other is None else list(other.readers)
            self._redundant.append(Redundancy(space.layer, first, writer, list(space.readers), readers))

    def _multiply(self, call: Call) -> None:
        left, right = call.args[0], call.argument(1, "other")
        if self._is_tracked(left) and self._is_tracked(right):
            self._gate(call, left, right)
            return
        tracked, other = (left, right) if self._is_tracked(left) else (right, left)
        if not self._is_tracked(left) and "div" in call.name:
            self._give_up(call)
            return
        space, labels = self._tracked[id(tracked)]
        space = _root(space)
        if isinstance(other, Tensor) and other.numel() > 1:
            if id(other) in call.parameters:
                self._give_up(call)
                return
            space.twisted = True
            space.separate()
            space.shift = False
        self._track(call.output, space, labels.broadcast_to(call.output.shape))

    def _gate(self, call: Call, left: Tensor, right: Tensor) -> None:
        """A product of two spaces is linear in the one that no activation has passed."""
        found = [self.narrowed(left), self.narrowed(right)]
        gates = [f for f in found if f is not None and f[0].activations]
        linear = [f for f in found if f is not None and not f[0].activations]
        if len(gates) != 1 or len(linear) != 1 or call.name.startswith(("div", "__truediv")):
            self._give_up(call)
            return
        gates[0][0].block()
        space, labels = linear[0]
        space.separate()
        space.shift = False
        self._track(call.output, space, labels)

    def _matmul(self, call: Call) -> None:
        left, right = call.args[0], call.argument(1, "other")
        if self._is_tracked(left) and self._is_tracked(right):
            self._pair(self._tracked[id(left)], self._tracked[id(right)], key_axis=-2)
        elif self._is_tracked(right) and not call.parameters:
            self._attend(call.output, right)
        else:
            self._give_up(call)

    # attention

    def _pair(self, queries: tuple[Space, Tensor] | None, keys: tuple[Space, Tensor] | None, key_axis: int) -> None:
        if queries is None or keys is None:
            for found in (queries, keys):
                if found is not None:
                    _root(found[0]).block()
            return
        sides = []
        for (space, labels), axis in ((queries, -1), (keys, key_axis)):
            space = _root(space)
            if _varying_axes(labels) - {axis % labels.dim(), labels.dim() - 3}:
                space.block(f"how the heads of {space.layer} are arranged")
                return
            sides.append((space, _heads(labels, axis, space.width)))
        (query_space, query_heads), (key_space, key_heads) = sides
        repeats, rest = divmod(len(query_heads), len(key_heads))
        if rest:
            query_space.block(f"how the heads of {query_space.layer} are arranged")
            return
        heads = [(query, key_heads[i // repeats]) for i, query in enumerate(query_heads)]
        self._pairings.append(Pairing(query_space.layer, query_space, key_space, heads))
        # what is fused stays usable for values: only the parts that are paired are read
        for space, units in ((query_space, query_heads), (key_space, key_heads)):
            if len(np.unique(np.concatenate(units))) == space.width:
                space.block()

    def _attend(self, output: Tensor, value: Tensor) -> None:
        found = self.narrowed(value)
        if found is None:
            return
        space, labels = found
        if _varying_axes(labels) - {labels.dim() - 1, labels.dim() - 3}:
            space.block(f"how the heads of {space.layer} are arranged")
            return
        blocks = np.zeros(space.width, dtype=np.int64)
        for number, units in enumerate(_heads(labels, -1, space.width)):
            blocks[units] = number
        space.refine(blocks)
        space.heads = True
        labels = labels[..., :1, :]
        if output.dim() > 2 and output.shape[-3] != labels.shape[-3]:
            labels = labels.repeat_interleave(output.shape[-3] // labels.shape[-3], dim=-3)
        self._track(output, space, labels.expand(output.shape))

    def _multi_head_attention(self, call: Call) -> None:
        heads, out_weight = call.args[4], call.indices(11, "out_proj_weight")
        in_weight, in_bias = call.indices(5, "in_proj_weight"), call.indices(6, "in_proj_bias")
        if in_weight is not None:
            weights = list(np.split(in_weight, 3))
        else:
            given = [call.parameters.get(id(call.kwargs.get(f"{name}_proj_weight"))) for name in "qkv"]
            weights = [weight for weight in given if weight is not None]
        if len(weights) != 3 or out_weight is None:
            self._give_up(call)
            return
        biases = [None] * 3 if in_bias is None else list(np.split(in_bias, 3))
        layer = self._layer(weights[0])
        spaces = []
        for position, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self._layer(weight)
            if (read := self._along(call.args[position], -1)) is not None:
                self._read(layer, weight, bias, read, None)
            space = self._new_space(layer, len(weight))
            space.writers.append(self._affine_writer(weight, bias))
            spaces.append(space)
        queries, keys, values = spaces
        units = np.split(np.arange(queries.width), heads)
        self._pairings.append(Pairing(layer, queries, keys, [(u, u) for u in units]))
        queries.block()
        keys.block()
        values.refine(np.repeat(np.arange(heads), values.width // heads))
        values.heads = True
        out_bias = call.indices(12, "out_proj_bias")
        out_layer = self._layer(out_weight)
        self._read(out_layer, out_weight, out_bias, (values, np.arange(values.width)), None)
        self._write(call.outputs()[0], out_layer, self._affine_writer(out_weight, out_bias), -1)

    def _affine_writer(self, weight: Indices, bias: Indices | None) -> Writer:
        """The rows of a linear layer; the bias is a column of them."""
        matrix = weight.reshape(len(weight), -1)
        shifts = np.full(matrix.shape[1] + (bias is not None), False)
        if bias is None:
            return Writer(matrix, shifts)
        self._layer(bias)
        shifts[-1] = True
        return Writer(np.hstack([matrix, bias[:, None]]), shifts)


def _root(space: Space) -> Space:
    while space.merged_into is not None:
        space = space.merged_into
    return space


def _codes(width: int) -> NDArray[np.float64]:
    """Numbers in (1, 2), different for each unit, whose averages are codes of no other."""
    return 1 + np.modf(0.5 + np.arange(width) * 0.6180339887498949)[0]


def _encoded(channels: Indices) -> Tensor:
    return torch.as_tensor(_codes(int(channels.max(initial=0)) + 1)[channels], dtype=torch.float64)


def _decoded(labels: Tensor, width: int) -> Indices:
    codes = _codes(width)
    order = np.argsort(codes)
    repeated = [axis for axis in range(labels.dim()) if labels.stride(axis) == 0]
    shape = labels.shape
    for axis in repeated:
        labels = labels.narrow(axis, 0, 1)
    values = labels.detach().numpy()
    nearest = np.searchsorted(codes[order], values - 1e-9).clip(max=width - 1)
    if np.any(np.abs(codes[order][nearest] - values) > 1e-9):
        raise ValueError("an operation mixes units")
    return np.broadcast_to(order[nearest], shape)


def _varying_axes(labels: Tensor) -> set[int]:
    long = [axis for axis in range(labels.dim()) if labels.shape[axis] > 1 and labels.stride(axis)]
    return {axis for axis in long if not torch.equal(labels, labels.narrow(axis, 0, 1).expand_as(labels))}


def _heads(labels: Tensor, axis: int, width: int) -> list[Indices]:
    """Units of each head; heads lie along the third axis from the end, if there is one along which they vary."""
    rows = labels.movedim(axis, -1)
    rows = rows[..., 0, :]
    head_axis = labels.dim() - 3
    if head_axis not in _varying_axes(labels):
        return [_decoded(rows.reshape(-1, rows.shape[-1])[0], width)]
    rows = rows.reshape(-1, *rows.shape[-2:])[0]
    return list(_decoded(rows, width))


def _positions(call: Call, inputs: Tensor, has_bias: bool) -> NDArray[np.float64]:
    """What each row of the weight is multiplied with, and 1 for the bias, one position a row."""
    if call.name == "linear":
        return _with_ones(inputs.reshape(-1, inputs.shape[-1]), has_bias)
    weight = call.argument(1, "weight")
    stride, padding, dilation = (
        call.argument(i, name, default)
        for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    kernel: Sequence[int] = weight.shape[2:]
    if call.name == "conv1d":
        inputs = inputs.unsqueeze(2)
        stride, padding, dilation = ((first, *_tuple(x, 1)) for first, x in ((1, stride), (0, padding), (1, dilation)))
        kernel = (1, *kernel)
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(_tuple(dilation, 2), kernel, strict=True)]
        if padding == "same":
            (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
            inputs = torch.nn.functional.pad(inputs, (left, right, top, bottom))
        padding = 0
    patches = torch.nn.functional.unfold(inputs, tuple(kernel), dilation, padding, stride)
    return _with_ones(patches.transpose(1, 2).reshape(-1, patches.shape[1]), has_bias)


def _with_ones(rows: Tensor, has_bias: bool) -> NDArray[np.float64]:
    if has_bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return _numpy(rows)


def _tuple(x: Any, length: int) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,) * length


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().cpu().numpy()
