"""Double precision where it can be had."""

from __future__ import annotations

import torch

from phasewatch.objective import Objective


def in_double_precision(objective: Objective) -> Objective:
    """The objective in float64, or as it is if the model's code or the device does not run in it."""
    try:
        return objective.to(torch.float64)
    except Exception:  # user code fails in its own ways; it is known to run in its own precision
        return objective
