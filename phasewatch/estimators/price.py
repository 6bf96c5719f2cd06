"""What an estimator is going to spend."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Protocol, runtime_checkable

from phasewatch.estimators.enough import LEAST_SAMPLES


@dataclass(frozen=True)
class Size:
    """How large a network and its probe are.

    Attributes:
        num_parameters: Trainable scalars of the network.
        num_batches: Batches of the probe.
        samples: Samples in a batch of it.
        rows: The same, or positions of sequences.
    """

    num_parameters: int
    num_batches: int
    samples: int
    rows: int

    def batches_of(self, rows: int) -> float:
        """Batches that :func:`phasewatch.estimators.enough.enough` takes for so many rows; of a large one a share."""
        if self.rows >= 2 * rows:
            return min(max(math.ceil(rows * self.samples / self.rows), LEAST_SAMPLES) / self.samples, 1.0)
        return min(self.num_batches, math.ceil(rows / self.rows))


@dataclass(frozen=True)
class Price:
    """What is typically spent, on one batch of the probe where nothing else is said.

    Attributes:
        gradients: Gradients of the loss.
        products: Products with the Hessian or the Gauss-Newton matrix.
        moves: Moves of a chain of λ of the function, on all batches that it looks at.
        masses: Times that the masses of these chains are found anew.
    """

    gradients: float = 0.0
    products: float = 0.0
    moves: float = 0.0
    masses: float = 0.0

    def __add__(self, other: Price) -> Price:
        """Both."""
        return Price(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Price:
        """So many times."""
        return Price(*(count * times for count in astuple(self)))


@runtime_checkable
class Priced(Protocol):
    """An estimator that says what it is going to spend; what one that does not takes is not known beforehand."""

    name: str

    def price(self, size: Size) -> Price:
        """What one reading typically spends."""
        ...
