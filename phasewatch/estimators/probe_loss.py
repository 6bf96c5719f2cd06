"""The loss on the probe as a signal."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from phasewatch.estimators.reading import Reading
from phasewatch.objective import Objective
from phasewatch.record import Estimate
from phasewatch.record.signals import LOSS

SAMPLES_KEPT = 2048
"""Of a larger probe the losses of the first samples are kept: a record is to hold thousands of measurements. Chosen."""

DIGITS = 4
"""Significant digits of the loss of a sample. Chosen."""


@dataclass(frozen=True)
class ProbeLoss:
    """The loss on the probe and the length of its gradient: what every other signal is read beside.

    Of the main probe, the losses of the single samples are kept too, so that a transition can name those it moved.

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
        return Reading(
            {self.name: Estimate(loss.item()), norm: Estimate(gradient.norm().item())},
            sample_losses=() if self.data else _sample_losses(objective),
        )


def _sample_losses(objective: Objective) -> tuple[float, ...]:
    """The loss of each sample, to a few digits; none where the loss is not made of those of samples."""
    found: list[float] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a loss that is tried on single samples, where it may make no sense
            for batch in range(objective.num_batches):
                if len(found) < SAMPLES_KEPT:
                    found += objective.sample_losses(objective.parameters.detach()[None], batch)[0].tolist()
    except ValueError:
        return ()
    return tuple(float(f"{loss:.{DIGITS - 1}e}") for loss in found[:SAMPLES_KEPT])
