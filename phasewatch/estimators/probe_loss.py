"""The loss on the probe as a signal."""

from __future__ import annotations

from dataclasses import dataclass

from phasewatch.estimators.reading import Reading
from phasewatch.objective import Objective
from phasewatch.record import Estimate
from phasewatch.record.signals import LOSS


@dataclass(frozen=True)
class ProbeLoss:
    """The loss on the probe and the length of its gradient: what every other signal is read beside.

    Attributes:
        data: Name of the data, where they are others than those of the main probe.
    """

    data: str = ""

    @property
    def name(self) -> str:
        """``loss``, or ``loss_<data>``."""
        return f"{LOSS}_{self.data}" if self.data else LOSS

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``loss`` and ``gradient_norm``, or ``loss_<data>`` and ``gradient_norm_<data>``."""
        loss, gradient = objective.loss_and_gradient()
        norm = f"gradient_norm_{self.data}" if self.data else "gradient_norm"
        return Reading({self.name: Estimate(loss.item()), norm: Estimate(gradient.norm().item())})
