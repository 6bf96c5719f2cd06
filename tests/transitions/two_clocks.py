"""Runs on two clocks, with known transitions: the training loss at every step, all else measured now and then.

Used by the tests and by ``benchmarks/transitions.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from synthetic import Run, Truth

from phasewatch.record.signals import TRAINING_LOSS
from phasewatch.transitions import Detection, detect_transitions

NOISES = ("white", "correlated", "heavy tails", "epochs")
EPOCH = 47
SIGMA = 0.1
"""Standard deviation of the loss of a minibatch, as a share of the loss."""


@dataclass(frozen=True)
class TwoClocks:
    """A run on two clocks.

    Attributes:
        measured: what was measured now and then, with the truth in its measurements.
        steps: of the training loss, shape (total,).
        loss: the training loss, shape (total,).
        places: per transition its half-way step and its 10-90 % width in steps, 0 where it is abrupt.
    """

    measured: Run
    steps: np.ndarray
    loss: np.ndarray
    places: tuple[tuple[float, float], ...]


def found_on_both(run: TwoClocks) -> Detection:
    """What is found in the measurements and in the loss at every step."""
    measured = run.measured
    return detect_transitions(
        measured.steps,
        measured.values,
        standard_errors=measured.standard_errors,
        dense={TRAINING_LOSS: (run.steps, run.loss)},
    )


def minibatch_noise(rng: np.random.Generator, total: int, kind: str) -> np.ndarray:
    """Noise of unit variance.

    ``"correlated"``: a fifth of the variance has a correlation time of 20 steps. ``"heavy tails"``: Student t with
    three degrees of freedom. ``"epochs"``: every epoch goes through the same batches, some harder than others, in an
    order of its own.
    """
    white = rng.standard_normal(total)
    if kind == "correlated":
        slow = rng.standard_normal(total)
        for k in range(1, total):
            slow[k] = 0.95 * slow[k - 1] + np.sqrt(1 - 0.95**2) * slow[k]
        return np.sqrt(0.8) * white + np.sqrt(0.2) * slow
    if kind == "heavy tails":
        return rng.standard_t(3, total) / np.sqrt(3.0)
    if kind == "epochs":
        hard = rng.standard_normal(EPOCH)
        orders = [rng.permutation(EPOCH) for _ in range(-(-total // EPOCH))]
        return 0.8 * hard[np.concatenate(orders)[:total]] + 0.6 * white
    return white


def two_clock_run(
    seed: int,
    transitions: int = 0,
    noise: str = "white",
    total: int = 4000,
    measurements: int = 40,
    sigma: float = SIGMA,
) -> TwoClocks:
    """A loss that decays by a power law or an exponential, with transitions of kind A.

    There it falls, λ and the trace rise. Half of the falls are abrupt, half logistic and up to a twentieth of the run
    wide; each takes 10 to 40 % of the loss. λ and the trace rise by 3 to 8 of their standard errors; the loss on a
    probe is measured to 3 %.

    Args:
        seed: of all that is random.
        transitions: how many.
        noise: of the training loss, see :func:`minibatch_noise`.
        total: steps.
        measurements: how many, evenly spaced.
        sigma: standard deviation of the training loss, as a share of it.
    """
    rng = np.random.default_rng(seed)
    steps = np.arange(total)
    margin = total / 10
    while True:
        centres = np.sort(rng.uniform(margin, total - margin, transitions)).round() - 0.5
        if np.all(np.diff(centres) > 1.5 * margin):
            break
    widths = [0.0 if rng.random() < 0.5 else float(rng.uniform(10.0, total / 20)) for _ in centres]
    scale = total * 10 ** rng.uniform(-2.5, -0.5)
    if rng.random() < 0.5:
        course = 0.3 + 2.0 * (1.0 + steps / scale) ** -rng.uniform(0.2, 0.8)
    else:
        course = 0.5 + rng.uniform(0.5, 2.0) * np.exp(-steps / scale)
    at = np.linspace(0, total - 1, measurements).round().astype(int)
    raised = np.zeros(measurements)
    for centre, width in zip(centres, widths, strict=True):
        share = _share(steps, centre, width)
        course = course * (1.0 - rng.uniform(0.1, 0.4) * share)
        raised += rng.uniform(3.0, 8.0) * share[at]
    loss = course * (1.0 + sigma * minibatch_noise(rng, total, noise))
    local = np.exp(0.15 * rng.standard_normal(measurements))
    drift = rng.uniform(-2.0, 2.0) * steps[at] / total
    values = {
        "loss": course[at] * (1.0 + 0.03 * rng.standard_normal(measurements)),
        "llc": 20.0 + raised + drift + local * rng.standard_normal(measurements),
        "hessian_trace": 50.0 + 2.0 * raised + 2.0 * rng.standard_normal(measurements),
    }
    truth = []
    for centre, width in zip(centres, widths, strict=True):
        first = int(np.searchsorted(at, centre - width / 2)) - 1
        last = int(np.searchsorted(at, centre + width / 2))
        truth.append(Truth(max(first, 0), min(last, measurements - 1), (float(centre), float(centre)), "A"))
    measured = Run(at.astype(float), values, {"llc": local}, truth)
    return TwoClocks(measured, steps, loss, tuple(zip(centres.tolist(), widths, strict=True)))


def touching(found: Sequence[tuple[float, float]], run: TwoClocks, within: float) -> list[tuple[int, int]]:
    """Pairs (found, true), each used once: what was found, from step to step, comes as near as that to a true one.

    It reaches at most twice as far beyond it.
    """
    pairs: list[tuple[int, int]] = []
    free = list(range(len(run.places)))
    for number, (start, end) in enumerate(found):
        for which in free:
            centre, width = run.places[which]
            low, high = centre - width / 2, centre + width / 2
            if (
                start <= high + within
                and end >= low - within
                and start >= low - 2 * within
                and end <= high + 2 * within
            ):
                free.remove(which)
                pairs.append((number, which))
                break
    return pairs


def _share(steps: np.ndarray, centre: float, width: float) -> np.ndarray:
    if width == 0:
        return (steps >= centre).astype(float)
    return np.asarray(expit(np.log(81.0) * (steps - centre) / width))
