"""Runs whose transitions are known exactly, and the strict score of what a detector says of them.

Used by the tests and by ``benchmarks/transitions.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SAMPLINGS = ("linear", "log", "mixed")
# Noise standard deviations of the three signals.
SIGMA = {"loss": 0.03, "llc": 1.0, "hessian_max": 0.05}


@dataclass(frozen=True)
class Truth:
    """A true transition.

    Attributes:
        first: index of the last measurement before it.
        last: index of the first measurement after it.
        step: where half of it has happened: anywhere in [low, high].
        kind: "A" or "B"; empty where it has none.
        changes: per signal its height on the scale of the signal's noise (log for loss and hessian_max).
    """

    first: int
    last: int
    step: tuple[float, float]
    kind: str = ""
    changes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run and its truth.

    Attributes:
        steps: steps of the measurements.
        values: the signals.
        standard_errors: reported standard errors, for some of the signals.
        transitions: the true transitions in order.
    """

    steps: np.ndarray
    values: dict[str, np.ndarray]
    standard_errors: dict[str, np.ndarray]
    transitions: list[Truth]


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


def _places(rng: np.random.Generator, n: int, transitions: int) -> list[tuple[float, float]]:
    """Centre and 10-90 % width (0 for an abrupt one), in measurements, of each transition."""
    margin = max(6, n // 12)
    while True:
        centres = np.sort(rng.integers(margin, n - margin, size=transitions))
        if np.all(np.diff(centres) >= 1.5 * margin):
            break
    return [(float(c), 0.0 if rng.random() < 0.5 else rng.uniform(4.0, max(5.0, n / 10))) for c in centres]


def _share(index: np.ndarray, centre: float, width: float) -> np.ndarray:
    if width == 0:
        return (index >= centre).astype(float)
    return 1.0 / (1.0 + np.exp(-np.log(81.0) * (index - centre) / width))


def _course(
    rng: np.random.Generator, name: str, stages: str, steps: np.ndarray, u: np.ndarray, starts: Sequence[int]
) -> np.ndarray:
    """What a signal does within its stages, in noise standard deviations.

    ``"drift"``: linear in log time. ``"power"``: the same, the loss a power law. ``"curved"``: an offset power law in
    the loss, saturating exponentials in the others. In half of the runs each stage goes its own way.
    """
    course = np.zeros(len(steps))
    begins = [0, *starts] if rng.random() < 0.5 else [0]
    for begin in begins:
        t = np.maximum(steps - steps[begin], 0.0) if begin else steps
        since = np.maximum(u - u[begin], 0.0)
        # A new stage relaxes over a time of the order of those before it.
        scale = max(steps[begin] if begin else 0.0, 0.02 * steps[-1])
        if stages == "curved" and name == "loss":
            part = 6.0 * ((1.0 + t / scale) ** -rng.uniform(0.3, 0.8) - 1.0)
        elif stages == "curved":
            part = rng.uniform(-4.0, 4.0) * (1.0 - np.exp(-since / rng.uniform(0.1, 0.4)))
        elif stages == "power" and name == "loss":
            part = 20.0 * ((1.0 + t / 10 ** rng.uniform(1.0, 3.5)) ** -rng.uniform(0.2, 0.8) - 1.0)
        else:
            part = rng.uniform(-3.0, 3.0) * since
            if name == "loss":
                part = -np.abs(part)
        course = course + part / (1.0 if begin == 0 else 2.0)
    return course


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

    Changes are 2.5 to 8 noise standard deviations high, half of them abrupt and half logistic ramps 4 to n/10
    measurements wide. The noise's scale varies along the run, and reported standard errors are off by a factor.
    """
    rng = np.random.default_rng(seed)
    steps = sampled_steps(n, sampling)
    index = np.arange(n)
    places = _places(rng, n, transitions)
    kinds = [str(rng.choice(["A", "B"])) for _ in places]
    u = np.log(steps + steps[0])
    u = (u - u[0]) / (u[-1] - u[0])
    heights: list[dict[str, float]] = [{} for _ in places]
    values, errors = {}, {}
    for name, scale in SIGMA.items():
        local = scale * np.exp(0.25 * np.sin(2 * np.pi * (u + rng.random())))
        course = scale * _course(rng, name, stages, steps, u, [int(np.ceil(c)) for c, _ in places])
        for height, kind, (centre, width) in zip(heights, kinds, places, strict=True):
            sign = {
                ("A", "loss"): -1.0,
                ("A", "llc"): 1.0,
                ("A", "hessian_max"): 1.0,
                ("B", "loss"): 0.0,
                ("B", "llc"): -1.0,
                ("B", "hessian_max"): rng.choice([-1.0, 0.0]),
            }[kind, name]
            height[name] = sign * rng.uniform(2.5, 8.0) * scale
            course = course + height[name] * _share(index, centre, width)
        noisy = course + local * noise(rng, n, noise_kind)
        if name == "llc":
            values[name] = 20.0 + noisy
            errors[name] = local * np.exp(0.15 * rng.standard_normal(n))
        else:
            values[name] = np.exp(noisy)
    truth = []
    for (centre, width), kind, height in zip(places, kinds, heights, strict=True):
        if width == 0:
            first, last = int(centre) - 1, int(centre)
            where = (float(steps[first]), float(steps[last]))
        else:
            first, last = int(np.floor(centre - width / 2)), int(np.ceil(centre + width / 2))
            where = (float(np.interp(centre, index, steps)),) * 2
        truth.append(Truth(max(first, 0), min(last, n - 1), where, kind, height))
    return Run(steps, values, errors, truth)


def linear_network(
    strengths: Sequence[float],
    n: int,
    *,
    initial: float = 1e-4,
    sampling: str = "linear",
    noise_share: float = 0.002,
    seed: int = 0,
) -> Run:
    """A deep (two-layer) linear network learning its singular modes one after another.

    ``u(t) = s e^{2st} / (e^{2st} - 1 + s/u0)``, half-way at ``t = ln((s - u0)/u0) / (2s)``, 10-90 % within
    ``ln 81 / (2s)`` (Saxe, McClelland & Ganguli 2014, eq. 12).
    """
    rng = np.random.default_rng(seed)
    s = np.array(sorted(strengths, reverse=True))
    half_way = np.log((s - initial) / initial) / (2 * s)
    total = 2.0 * half_way.max()
    rate = total / 20000.0
    steps = sampled_steps(n, sampling)
    t = steps[:, None] * rate
    u = s / (1.0 + (s / initial - 1.0) * np.exp(-2 * s * t))
    loss = 0.5 * ((s - u) ** 2).sum(axis=1)
    trace = 20.0 * u.sum(axis=1)
    largest = s[0] + u[:, 0]
    values = {
        "loss": (loss + noise_share * loss[0]) * np.exp(noise_share * rng.standard_normal(n)),
        "hessian_trace": trace + noise_share * trace[-1] * rng.standard_normal(n),
        "hessian_max": largest * np.exp(noise_share * rng.standard_normal(n)),
    }
    truth = []
    for middle, strength in zip(half_way / rate, s, strict=True):
        half_width = np.log(81.0) / (4 * strength) / rate
        first = int(np.searchsorted(steps, middle - half_width)) - 1
        last = int(np.searchsorted(steps, middle + half_width))
        truth.append(Truth(max(first, 0), min(last, n - 1), (float(middle),) * 2))
    return Run(steps, values, {}, truth)


def drawn_linear_network(seed: int, sampling: str) -> Run:
    """A linear network with two or three drawn modes, all of whose stages hold at least four measurements."""
    rng = np.random.default_rng(seed)
    while True:
        ratios = rng.uniform(1.7, 2.6, size=int(rng.integers(1, 3)))
        strengths = rng.uniform(3.0, 5.0) / np.cumprod([1.0, *ratios])
        run = linear_network(
            strengths.tolist(),
            int(rng.choice([60, 120, 240])),
            initial=10 ** rng.uniform(-6.0, -3.5),
            sampling=sampling,
            noise_share=rng.uniform(0.001, 0.01),
            seed=seed,
        )
        stages = [0, *(t.last for t in run.transitions)], [*(t.first for t in run.transitions), len(run.steps) - 1]
        if min(b - a for a, b in zip(*stages, strict=True)) >= 3:
            return run


@dataclass
class Score:
    """Counts of a strict score: add those of many runs, then ask for rates."""

    hits: int = 0
    false: int = 0
    missed: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.hits + other.hits, self.false + other.false, self.missed + other.missed)

    @property
    def precision(self) -> float:
        return self.hits / max(self.hits + self.false, 1)

    @property
    def recall(self) -> float:
        return self.hits / max(self.hits + self.missed, 1)

    @property
    def f1(self) -> float:
        return 2 * self.hits / max(2 * self.hits + self.false + self.missed, 1)


def strict_matches(found: Sequence[tuple[float, float]], run: Run) -> list[tuple[int, int]]:
    """Pairs (found, true) by the strict rule, each used once.

    A detection from ``start`` to ``end`` (steps) counts if it touches the truth within 3 measurements and reaches at
    most 6 beyond it.
    """
    pairs: list[tuple[int, int]] = []
    free = list(range(len(run.transitions)))
    for number, (start, end) in enumerate(found):
        a, b = np.searchsorted(run.steps, [start, end])
        for which in free:
            p, q = run.transitions[which].first, run.transitions[which].last
            if a <= q + 3 and b >= p - 3 and a >= p - 6 and b <= q + 6:
                free.remove(which)
                pairs.append((number, which))
                break
    return pairs


def strict_score(found: Sequence[tuple[float, float]], run: Run) -> Score:
    """Hits, false ones and misses by the strict rule."""
    hits = len(strict_matches(found, run))
    return Score(hits, len(found) - hits, len(run.transitions) - hits)
