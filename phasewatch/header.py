"""What a record says of its run in the first line: the network, the data, the settings."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from phasewatch._version import __version__
from phasewatch.estimators import HessianSpectrum
from phasewatch.monitor import COEFFICIENTS, Monitor
from phasewatch.objective import Objective
from phasewatch.objective.labels import integer_targets
from phasewatch.record import SCHEMA_VERSION
from phasewatch.record.signals import described


def header_of(
    module: nn.Module,
    monitors: Sequence[Monitor],
    objectives: Sequence[Objective],
    *,
    seed: int,
    total_steps: int | None,
    alpha: float | None,
) -> dict[str, Any]:
    """Describe a run in plain Python values, and check what is to be measured of which part of the network.

    Args:
        module: The network.
        monitors: What is measured.
        objectives: The loss of the network on the first batches of each.
        seed: Seeds the measurements.
        total_steps: Steps that the run will make, if known.
        alpha: Rate of false alarms that is wanted; None where no transition is looked for.

    Raises:
        ValueError: If a training set is too small, or there is no part of a name that is given.
    """
    own = [_described(monitor, objective) for monitor, objective in zip(monitors, objectives, strict=True)]
    main = main_of(monitors)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": time.time(),
        "versions": {
            "phasewatch": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "module": type(module).__name__,
        "num_parameters": objectives[-1].num_parameters if objectives else 0,
        "num_frozen": sum(p.numel() for p in module.parameters() if not p.requires_grad),
        "n": own[0]["n"] if own else None,
        "seed": seed,
        "total_steps": total_steps,
        "alpha": alpha,
        "monitors": own,
        "signals": described(),
        "labels": None if main is None else integer_targets(main.probe.batches, main.probe.sizes),
        "left_out": [],
        "chains_in_each": 1,
    }


def main_of(monitors: Sequence[Monitor]) -> Monitor | None:
    """The monitor whose samples are those of the run: the first that measures on the main probe."""
    return next((monitor for monitor in monitors if not monitor.probe.name), None)


def _described(monitor: Monitor, objective: Objective) -> dict[str, Any]:
    probe, sizes = monitor.probe, monitor.probe.sizes
    n = probe.n or sum(sizes)
    if n < 2 and any(isinstance(e, (*COEFFICIENTS, HessianSpectrum)) for e in monitor.estimators):
        raise ValueError(
            f"n is {n}, the size of the training set; expected at least 2, as λ is measured at the inverse "
            "temperature n / log n. Give more samples in the probe, or n= where the probe is a part of it."
        )
    for estimator in monitor.estimators:
        if isinstance(estimator, COEFFICIENTS):
            estimator.parts(objective)
    return {
        "estimators": {e.name: _settings(e) for e in monitor.estimators},
        "schedule": {"kind": type(monitor.schedule).__name__, **_settings(monitor.schedule)},
        "n": n,
        "probe": {
            "source": probe.source,
            "samples": sum(sizes),
            "batches": len(sizes),
            "mode": probe.mode,
            "data": probe.name,
            "threads": probe.threads,
        },
    }


def _settings(configured: object) -> dict[str, Any]:
    settings = asdict(configured) if hasattr(configured, "__dataclass_fields__") else {}  # type: ignore[call-overload]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
