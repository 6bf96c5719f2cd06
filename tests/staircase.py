"""Recorded runs whose transitions are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from phasewatch.record import SCHEMA_VERSION, Estimate, Histogram, Journal, Measurement, Run, load_run

HEADER = {
    "schema_version": SCHEMA_VERSION,
    "created": 1.75e9,
    "versions": {"phasewatch": "0.1.0", "torch": "2.13.0"},
    "module": "Net",
    "num_parameters": 650,
    "n": 1437,
    "seed": 7,
    "total_steps": 6000,
    "alpha": 0.05,
    "monitors": [{"estimators": {"llc": {"chains": 4}}, "probe": {"samples": 512}}],
}


def measurements(steps: np.ndarray, jumps: list[float], seed: int = 0) -> list[Measurement]:
    """A staircase: at each of the steps ``jumps``, the loss falls and the learning coefficient rises.

    The steps of the staircase are 20 or more noise standard deviations high, in every signal.
    """
    rng = np.random.default_rng(seed)
    found = []
    for k, step in enumerate(steps.tolist()):
        stage = sum(step >= jump for jump in jumps)
        loss = 2.3 * 0.35**stage * np.exp(0.01 * rng.standard_normal())
        llc = 10.0 + 12.0 * stage + 0.4 * rng.standard_normal()
        doubts = ("R-hat 1.4 is above 1.1",) if k % 9 == 4 else ()
        nullity = 60 - 10 * stage
        top = 4.0 * (1 + stage)
        values = {
            "loss": loss,
            "llc_rhat": 1.4 if doubts else 1.01,
            "hessian_max": top + 0.05 * rng.standard_normal(),
            "hessian_min": -0.3 * 0.5**stage + 0.004 * rng.standard_normal(),
            "hessian_trace": 3 * top + 0.2 * rng.standard_normal(),
            "nullity": float(nullity),
            "nullity_lower": float(nullity - 3),
            "nullity_upper": float(nullity + 4),
            "nullity_threshold": 1e-4,
            "overhead": 0.08,
        }
        spectrum = Histogram([-0.3, 0.0, 0.5, top], [2.0, float(nullity), 580.0 - nullity, 1.0])
        estimates = {name: Estimate(value) for name, value in values.items()}
        estimates["llc"] = Estimate(llc + (3.0 if doubts else 0.0), 0.8, doubts)
        found.append(Measurement(int(step), estimates, {"hessian_eigenvalues": spectrum}, 0.1, 0.0))
    return found


def with_lambda_of_function(
    found: Sequence[Measurement], jumps: Sequence[float], *, seed: int = 1, spread_slope: float = 0.5
) -> list[Measurement]:
    """The same with λ of the function, which rises by 12 at each jump at the fine resolution and by 4 at the coarse.

    Its heat capacity is λ itself, so that it does not depend on the resolution; by its slope in the prior's spread,
    ``spread_slope`` times λ, a rise at double the spread is ``1 + spread_slope * log(2)`` of what it is.
    λ of the loss is measured at the last six points alone: before, w* is no minimum.
    """
    rng = np.random.default_rng(seed)
    complete = []
    for k, m in enumerate(found):
        stage = sum(m.step >= jump for jump in jumps)
        estimates = dict(m.estimates)
        for name, rise, resolution in (("llc_behavioral", 12.0, 0.01), ("llc_behavioral_coarse", 4.0, 0.1)):
            doubts = ("R-hat 1.4 is above 1.1",) if k % 11 == 5 else ()
            value = 10.0 + rise * stage + 0.3 * rng.standard_normal()
            estimates[name] = Estimate(value + (2.0 if doubts else 0.0), 0.6, doubts)
            estimates[f"{name}_heat_capacity"] = Estimate(value)
            estimates[f"{name}_spread_slope"] = Estimate(spread_slope * value, 0.1)
            estimates[f"{name}_resolution"] = Estimate(resolution)
        if k < len(found) - 6:
            estimates["llc"] = Estimate(np.nan, doubts=("w* is no minimum of the loss",))
        complete.append(replace(m, estimates=estimates))
    return complete


def recorded_run(
    directory: Path,
    *,
    points: int = 60,
    jumps: tuple[float, ...] = (2000.0, 4000.0),
    log_spaced: bool = False,
    finished: bool = True,
) -> Run:
    """Such a run, written to a record and read back; with default arguments, linear in 6,000 steps."""
    steps = (
        np.unique(np.geomspace(1, 6001, points).astype(int) - 1) if log_spaced else np.arange(points) * 6000 // points
    )
    journal = Journal(directory)
    journal.append("header", HEADER)
    for measurement in measurements(steps, list(jumps)):
        journal.append("measurement", measurement.to_dict())
    if finished:
        journal.append("end", {"time": 1.75e9})
    return load_run(directory)
