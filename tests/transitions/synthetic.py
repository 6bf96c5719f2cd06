"""Runs whose transitions are known exactly, for the tests of the detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Run:
    """A run and its truth.

    Attributes:
        steps: steps of the measurements.
        values: the signals.
        standard_errors: reported standard errors, for some of the signals.
        transitions: (first, last) index of the measurements of each true transition, with its kind.
    """

    steps: np.ndarray
    values: dict[str, np.ndarray]
    standard_errors: dict[str, np.ndarray]
    transitions: list[tuple[int, int, str]]


def sampled_steps(n: int, sampling: str, total: float = 20000.0) -> np.ndarray:
    """Steps of n measurements, spaced linearly, logarithmically, or half and half."""
    linear = np.linspace(total / n, total, n)
    logarithmic = np.geomspace(1.0, total, n)
    if sampling == "linear":
        return linear
    if sampling == "log":
        return logarithmic
    return 0.5 * (linear + logarithmic)


def noise(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    """Noise of unit variance: "gauss", "t3", or "ar0.5", "ar0.8" (first-order autoregressive)."""
    if kind == "t3":
        return rng.standard_t(3, n) / np.sqrt(3.0)
    white = rng.standard_normal(n)
    if kind.startswith("ar"):
        rho = float(kind[2:])
        for k in range(1, n):
            white[k] = rho * white[k - 1] + np.sqrt(1 - rho**2) * white[k]
    return white


def synthetic_run(
    seed: int,
    n: int,
    *,
    transitions: int = 0,
    sampling: str = "linear",
    stages: str = "drift",
    noise_kind: str = "gauss",
) -> Run:
    """Three signals (loss, llc with standard errors, hessian_max) with steps and ramps of kind A and B.

    Changes are 2.5 to 8 noise standard deviations high, half of them abrupt and half logistic ramps 4 to n/10 points
    wide. Within the stages the signals drift linearly in log time, or ("curved") the loss follows an offset power law
    and the others saturate.
    """
    rng = np.random.default_rng(seed)
    steps = sampled_steps(n, sampling)
    index = np.arange(n)
    margin = max(6, n // 12)
    while True:
        centres = np.sort(rng.integers(margin, n - margin, size=transitions))
        if np.all(np.diff(centres) >= 1.5 * margin):
            break
    places, shapes = [], []
    for centre in centres:
        if rng.random() < 0.5:
            places.append((int(centre) - 1, int(centre)))
            shapes.append((index >= centre).astype(float))
        else:
            width = rng.uniform(4.0, max(5.0, n / 10))
            shapes.append(1.0 / (1.0 + np.exp(-np.log(81.0) * (index - centre) / width)))
            places.append((int(np.floor(centre - width / 2)), int(np.ceil(centre + width / 2))))
    kinds = [str(rng.choice(["A", "B"])) for _ in centres]
    u = np.log(steps + steps[0])
    u = (u - u[0]) / (u[-1] - u[0])
    sigma = {"loss": 0.03, "llc": 1.0, "hessian_max": 0.05}
    values, errors = {}, {}
    for name, scale in sigma.items():
        local = scale * np.exp(0.25 * np.sin(2 * np.pi * (u + rng.random())))
        if stages == "curved" and name == "loss":
            decay = (1.0 + steps / (0.02 * steps[-1])) ** -rng.uniform(0.3, 0.8)
            course = 6.0 * scale * decay
        elif stages == "curved":
            course = rng.uniform(-4.0, 4.0) * scale * (1.0 - np.exp(-u / rng.uniform(0.1, 0.4)))
        else:
            course = rng.uniform(-3.0, 3.0) * scale * u
            if name == "loss":
                course = -np.abs(course)
        for kind, shape in zip(kinds, shapes, strict=True):
            height = rng.uniform(2.5, 8.0) * scale
            sign = {
                ("A", "loss"): -1.0,
                ("A", "llc"): 1.0,
                ("A", "hessian_max"): 1.0,
                ("B", "loss"): 0.0,
                ("B", "llc"): -1.0,
                ("B", "hessian_max"): rng.choice([-1.0, 0.0]),
            }[kind, name]
            course = course + sign * height * shape
        noisy = course + local * noise(rng, n, noise_kind)
        if name == "llc":
            values[name] = 20.0 + noisy
            errors[name] = local * np.exp(0.15 * rng.standard_normal(n))
        else:
            values[name] = np.exp(noisy)
    truth = [(a, b, kind) for (a, b), kind in zip(places, kinds, strict=True)]
    return Run(steps, values, errors, truth)


def linear_network(
    strengths: Sequence[float],
    n: int,
    *,
    initial: float = 1e-4,
    sampling: str = "linear",
    noise_share: float = 0.002,
    seed: int = 0,
) -> tuple[Run, np.ndarray]:
    """A deep (two-layer) linear network learning its singular modes one after another.

    ``u(t) = s e^{2st} / (e^{2st} - 1 + s/u0)`` (Saxe, McClelland & Ganguli 2014, eq. 12). Returns the run and the steps
    at which the modes are half-way, ``t = ln((s - u0)/u0) / (2s)``.
    """
    rng = np.random.default_rng(seed)
    s = np.array(sorted(strengths, reverse=True))
    half_way = np.log((s - initial) / initial) / (2 * s)
    total = 1.6 * half_way.max()
    rate = total / 20000.0
    steps = sampled_steps(n, sampling)
    t = steps[:, None] * rate
    u = s * np.exp(2 * s * t) / (np.exp(2 * s * t) - 1 + s / initial)
    loss = 0.5 * ((s - u) ** 2).sum(axis=1)
    trace = 20.0 * u.sum(axis=1)
    loss = (loss + noise_share * loss[0]) * np.exp(noise_share * rng.standard_normal(n))
    trace = trace + noise_share * trace[-1] * rng.standard_normal(n)
    return Run(steps, {"loss": loss, "hessian_trace": trace}, {}, []), half_way / rate
