"""The network's outputs at the start w*: held where they fit into memory, made anew batch by batch where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.objective.outputs import OutputsAndSlopes

if TYPE_CHECKING:
    from phasewatch.objective.loss import Objective

LARGEST_OUTPUTS = 2**28
"""Bytes that the outputs and as many slopes may take over all batches; beyond, no more than one batch's are held.
Chosen."""


class Recomputed(Sequence[list[Tensor]]):
    """Tensors of each batch that are made whenever another batch than the last one is asked for."""

    def __init__(self, make: Callable[[int], list[Tensor]], num_batches: int) -> None:
        """Nothing is made yet."""
        self._make = make
        self._num_batches = num_batches
        self._last: tuple[int, list[Tensor]] | None = None

    def __len__(self) -> int:
        """Number of batches."""
        return self._num_batches

    @overload
    def __getitem__(self, batch: int) -> list[Tensor]: ...
    @overload
    def __getitem__(self, batch: slice) -> Sequence[list[Tensor]]: ...
    def __getitem__(self, batch: Any) -> Any:
        """The tensors of a batch."""
        if self._last is None or self._last[0] != batch:
            self._last = None  # let go before the next are made
            self._last = batch, self._make(batch)
        return self._last[1]


class OutputsAtStart:
    """The outputs of every batch at the parameters of an objective, and the slopes of the loss in them.

    Attributes:
        objective: What they are of.
        past_outputs: Whether the loss depends on the parameters by another way than the outputs.
        earlier_outputs: Whether that way is through the outputs of earlier calls of the network.
    """

    def __init__(self, objective: Objective) -> None:
        """Evaluate every batch once.

        Raises:
            NoOutputsError: If the outputs cannot be seen.
        """
        self.objective = objective
        self._kept: list[OutputsAndSlopes] | None = []
        self.past_outputs = self.earlier_outputs = False
        size = 0
        for batch in range(objective.num_batches):
            found = self._make(batch)
            self.past_outputs |= found.past_outputs
            self.earlier_outputs |= found.earlier_outputs
            size += 2 * sum(output.numel() * output.element_size() for output in found.outputs)
            if size > LARGEST_OUTPUTS:
                self._kept = None
            if self._kept is not None:
                self._kept.append(found)

    @property
    def inside_of_a_call(self) -> bool:
        """Whether they are those of a part of the network, which makes the loss itself."""
        return any(cut.depth > 0 for cut in self.objective.cuts.values())

    @property
    def recomputed(self) -> bool:
        """Whether they are made anew for each batch that is asked for."""
        return self._kept is None

    def __getitem__(self, batch: int) -> OutputsAndSlopes:
        """Those of one batch."""
        return self._make(batch) if self._kept is None else self._kept[batch]

    def of_each_batch(self, take: Callable[[int, OutputsAndSlopes], list[Tensor]]) -> Sequence[list[Tensor]]:
        """Tensors made of the outputs of each batch: held, or :class:`Recomputed` where the outputs are."""
        numbers = range(self.objective.num_batches)
        if self._kept is None:
            return Recomputed(lambda batch: take(batch, self._make(batch)), len(numbers))
        return [take(batch, self._kept[batch]) for batch in numbers]

    def _make(self, batch: int) -> OutputsAndSlopes:
        with isolated():
            return self.objective.outputs_and_slopes(batch)
