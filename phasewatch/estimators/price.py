"""What an estimator is going to spend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Size:
    """How large a network and its probe are.

    Attributes:
        num_parameters: Trainable scalars of the network.
        num_batches: Batches of the probe.
        rows: Samples, or positions of sequences, in a batch of it.
    """

    num_parameters: int
    num_batches: int
    rows: int

    def batches_of(self, rows: int) -> int:
        """Batches that hold so many rows, or all."""
        return min(self.num_batches, math.ceil(rows / self.rows))


@dataclass(frozen=True)
class Price:
    """What is typically spent, each on one batch of the probe.

    Attributes:
        gradients: Gradients of the loss.
        products: Products with the Hessian or the Gauss-Newton matrix.
    """

    gradients: float = 0.0
    products: float = 0.0

    def __add__(self, other: Price) -> Price:
        """Both."""
        return Price(self.gradients + other.gradients, self.products + other.products)

    def __mul__(self, times: float) -> Price:
        """So many times."""
        return Price(self.gradients * times, self.products * times)


@runtime_checkable
class Priced(Protocol):
    """An estimator that says what it is going to spend; what one that does not takes is not known beforehand."""

    name: str

    def price(self, size: Size) -> Price:
        """What one reading typically spends."""
        ...
