"""Following units through the calls of a network: what every rule of :mod:`phasewatch.symmetry.rules` works with."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from phasewatch.objective import Objective
from phasewatch.symmetry.labels import decoded, encoded, varying_axes
from phasewatch.symmetry.sites import Site
from phasewatch.symmetry.spaces import Pairing, Passage, Reader, Redundancy, Space, Writer
from phasewatch.symmetry.tape import Call, Indices

Found = tuple[Space, Tensor]
"""The space of the units in a tensor, and their labels (:mod:`phasewatch.symmetry.labels`), of the tensor's shape."""


class Walk:
    """What is known after some of the calls.

    Attributes:
        spaces: All spaces met, also those that have become part of others.
        pairings: All attentions.
        sites: All linear layers, by their parameters.
        redundant: Pairs of writers that are added up.
        passages: All BatchNorms in evaluation mode.
    """

    def __init__(self, objective: Objective) -> None:
        """Before the first call."""
        self.spaces: list[Space] = []
        self.pairings: list[Pairing] = []
        self.sites: dict[bytes, Site] = {}
        self.redundant: list[Redundancy] = []
        self.passages: list[Passage] = []
        self._parameters = list(objective.parameter_shapes)
        sizes = [shape.numel() for shape in objective.parameter_shapes.values()]
        self._parameter_at = np.repeat(np.arange(len(sizes)), sizes)
        self._known = np.zeros(len(sizes), dtype=bool)
        self._tracked: dict[int, Found] = {}
        self._parts: dict[tuple[int, bytes], Space] = {}

    @property
    def unknown_parameters(self) -> list[str]:
        """Names of the parameters that no rule has come by."""
        return [name for name, known in zip(self._parameters, self._known, strict=True) if not known]

    def layer_of(self, indices: Indices) -> str:
        """Name of the module of parameters, which count as known from now on.

        Args:
            indices: Their places in the flat vector.
        """
        which = np.unique(self._parameter_at[indices])
        self._known[which] = True
        name = self._parameters[which[0]]
        return name.rpartition(".")[0] or name

    # Units in tensors

    def is_tracked(self, tensor: Any) -> bool:
        """Whether it is known which units a tensor holds."""
        return id(tensor) in self._tracked

    def track(self, tensor: Tensor, space: Space, labels: Tensor) -> None:
        """From now on it is known."""
        self._tracked[id(tensor)] = (space.root, labels)

    def tracked(self, tensor: Any) -> Found | None:
        """Space and labels of a tensor, None where they are not known."""
        if id(tensor) not in self._tracked:
            return None
        space, labels = self._tracked[id(tensor)]
        return space.root, labels

    def narrowed(self, tensor: Any) -> Found | None:
        """The same; where it holds some of the units only, the space of these."""
        found = self.tracked(tensor)
        if found is None:
            return None
        space, labels = found
        channels = decoded(labels, space.width)
        present = np.unique(channels)
        if len(present) == space.width:
            return found
        key = (id(space), present.tobytes())
        if key not in self._parts:
            part = self.new_space(space.layer, len(present))
            part.writers = [Writer(w.rows[present], w.shifts, w.diagonal) for w in space.writers]
            part.linear, part.shift, part.twisted, part.heads = space.linear, space.shift, space.twisted, space.heads
            part.refine(space.blocks[present])
            self._parts[key] = part
        return self._parts[key].root, encoded(np.searchsorted(present, channels))

    def along(self, tensor: Any, axis: int) -> tuple[Space, Indices] | None:
        """Space and unit of each entry along an axis; None, and nothing can be undone, if units vary along another."""
        found = self.narrowed(tensor)
        if found is None:
            return None
        space, labels = found
        if varying_axes(labels) - {axis % labels.dim()}:
            space.block(f"how the units of {space.layer} are arranged in a later layer")
            return None
        first = labels.movedim(axis, -1).flatten(0, -2)[0] if labels.dim() > 1 else labels
        return space, decoded(first, space.width)

    # What rules do

    def give_up(self, call: Call) -> None:
        """Nothing can be undone of what is in the tensors that a call was given."""
        for tensor in call.tensors():
            if (found := self.narrowed(tensor)) is not None:
                found[0].block(f"the function {call.name} after {found[0].layer}")

    def new_space(self, layer: str, width: int) -> Space:
        """A space that nothing writes or reads yet."""
        space = Space(layer, width)
        self.spaces.append(space)
        return space

    def affine_writer(self, weight: Indices, bias: Indices | None) -> Writer:
        """The rows of a linear layer; the bias is a column of them."""
        matrix = weight.reshape(len(weight), -1)
        shifts = np.full(matrix.shape[1] + (bias is not None), False)
        if bias is None:
            return Writer(matrix, shifts)
        self.layer_of(bias)
        shifts[-1] = True
        return Writer(np.hstack([matrix, bias[:, None]]), shifts)

    def write(self, output: Tensor, layer: str, writer: Writer | None, axis: int, width: int | None = None) -> Space:
        """A new space, whose units lie along one axis of a tensor.

        Args:
            output: The tensor.
            layer: Name of the module that writes.
            writer: Its parameters; None without.
            axis: The axis.
            width: Number of units, where there is no writer to say so.
        """
        space = self.new_space(layer, (width or 0) if writer is None else len(writer.rows))
        if writer is not None:
            space.writers.append(writer)
        shape = [1] * output.dim()
        shape[axis] = space.width
        self.track(output, space, encoded(np.arange(space.width)).view(shape).expand(output.shape))
        return space

    def read(
        self,
        layer: str,
        weight: Indices,
        bias: Indices | None,
        read: tuple[Space, Indices],
        call: Call | None = None,
        writes: Space | None = None,
    ) -> None:
        """A linear layer reads a space.

        Args:
            layer: Name of its module.
            weight: Places of the weights, shape ``(out, features, ...)``.
            bias: Places of the biases; None without.
            read: The space and the unit of each feature, as many of each.
            call: The call, if what the units do on the probe can be seen by it.
            writes: The space that the layer writes.
        """
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
