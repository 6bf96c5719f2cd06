"""Runs of the toy model of superposition, whose stages have levels in closed form (Chen et al. 2023, arXiv 2310.06301).

``f(x) = ReLU(W^T W x + b)`` with two hidden units and six features, of which one is active, uniform on [0, 1]. Losses,
and with them gradients and Hessians, are piecewise polynomials: nothing is sampled but the training data.
"""

from __future__ import annotations

import numpy as np
import torch
from synthetic import Run, Truth
from torch.func import hessian, vmap

FEATURES = 6
# Rows: the two hidden units; the bias.
SHAPE = (3, FEATURES)
DATA, BATCH, RATE = 1000, 20, 0.02
PROBES = 10
# Losses of the stages that are met: one active polygon of 4, 5 or 6 features, and how many others are merely dead (+).
LEVELS = {"4": 0.1111111, "4+": 0.1041667, "4++": 0.0972222, "5": 0.0687436, "5+": 0.0617991, "6": 0.0481924}


def population_loss(parameters: torch.Tensor) -> torch.Tensor:
    """Mean squared error of ``parameters`` (3, 6): the columns of W above the bias."""
    weights, bias = parameters[:2], parameters[2]
    slope = weights.T @ weights
    offset = bias.expand(FEATURES, FEATURES)
    # ReLU(slope x + offset) is positive on [low, high].
    root = -offset / torch.where(slope == 0, 1.0, slope)
    edge = root.clamp(0.0, 1.0)
    low = torch.where(slope > 0, edge, 0.0)
    high = torch.where(slope < 0, edge, 1.0)
    positive = (slope != 0) | (offset > 0)
    zeroth, first, second = ((high ** (k + 1) - low ** (k + 1)) / (k + 1) * positive for k in range(3))
    outputs = slope**2 * second + 2.0 * slope * offset * first + offset**2 * zeroth
    own = slope * second + offset * first
    return (outputs.sum() - 2.0 * own.diagonal().sum()) / FEATURES + 1.0 / 3.0


def polygon(vertices: int, length: float, bias: float, dead: int = 0) -> torch.Tensor:
    """A regular polygon of features; the others are zero, ``dead`` of them with the bias 1/(2 c) of a dead feature."""
    angle = 2.0 * torch.pi * torch.arange(vertices, dtype=torch.float64) / vertices
    parameters = torch.zeros(SHAPE, dtype=torch.float64)
    parameters[0, :vertices], parameters[1, :vertices] = length * torch.cos(angle), length * torch.sin(angle)
    parameters[2, :vertices] = bias
    # What is neither in the polygon nor dead stays silent, wherever the others point.
    parameters[2, vertices:] = -1.0
    parameters[2, vertices : vertices + dead] = 1.0 / (2 * FEATURES)
    return parameters


def trained(seeds: range, epochs: int, measurements: int) -> tuple[np.ndarray, torch.Tensor]:
    """Train by SGD on 1000 samples from near the square with two dead features (4++).

    All runs advance together, each with its own data, start and batches.

    Returns:
        The steps of the measurements and the parameters there, shape (runs, measurements, 3, 6).
    """
    rngs = [np.random.default_rng(seed) for seed in seeds]
    square = polygon(4, 1.0, 0.0, dead=2).numpy()
    parameters = np.stack([square + 10 ** rng.uniform(-2, -1) * rng.standard_normal(SHAPE) for rng in rngs])
    active = np.stack([rng.integers(FEATURES, size=DATA) for rng in rngs])
    size = np.stack([rng.random(DATA) for rng in rngs])
    every = epochs * (DATA // BATCH) // measurements
    run, sample = np.arange(len(seeds))[:, None], np.arange(BATCH)
    kept = []
    for step in range(every * measurements):
        if step % (DATA // BATCH) == 0:
            order = np.stack([rng.permutation(DATA) for rng in rngs])
        batch = order[:, step % (DATA // BATCH) * BATCH :][:, :BATCH]
        i, x = active[run, batch], size[run, batch]
        weights, bias = parameters[:, :2], parameters[:, 2]
        hidden = weights[run, :, i] * x[..., None]
        error = np.maximum(hidden @ weights + bias[:, None], 0.0)
        active_output = error > 0
        error[run, sample, i] -= x
        error = np.where(active_output, error, 0.0) * (2.0 / BATCH)
        # The input's row of W learns through the hidden units, the outputs' rows through the outputs.
        back = np.zeros((len(seeds), BATCH, FEATURES))
        back[run, sample, i] = x
        gradient = np.swapaxes(hidden, 1, 2) @ error + np.swapaxes(error @ np.swapaxes(weights, 1, 2), 1, 2) @ back
        parameters[:, :2] -= RATE * gradient
        parameters[:, 2] -= RATE * error.sum(axis=1)
        if (step + 1) % every == 0:
            kept.append(parameters.copy())
    return every * np.arange(1.0, measurements + 1), torch.from_numpy(np.stack(kept, axis=1))


def superposition_runs(seeds: range, epochs: int = 2000, measurements: int = 120) -> list[Run]:
    """Train and measure: the loss on fresh data, the trace by random probes, the largest curvature.

    The truth is read off the exact loss: a transition is where it passes from within 10 % of one level (as a share of
    the way) to within 10 % of another, half-way where it is at their mean.
    """
    steps, parameters = trained(seeds, epochs, measurements)
    flat = parameters.reshape(-1, *SHAPE)
    losses = vmap(population_loss)(flat).reshape(len(seeds), measurements).numpy()
    size = SHAPE[0] * SHAPE[1]
    curvature = vmap(hessian(population_loss), chunk_size=512)(flat).reshape(len(seeds), measurements, size, size)
    runs = []
    for seed, theta, loss, matrices in zip(seeds, parameters.numpy(), losses, curvature.numpy(), strict=True):
        rng = np.random.default_rng([seed, 1])
        probes = rng.choice([-1.0, 1.0], size=(measurements, PROBES, size))
        traces = np.einsum("tpi,tij,tpj->tp", probes, matrices, probes)
        largest = np.linalg.eigvalsh(matrices)[:, -1]
        values = {
            "loss": np.array([_sampled_loss(rng, point) for point in theta]),
            "hessian_trace": traces.mean(axis=1),
            # As an iterative eigensolver leaves it.
            "hessian_max": largest * (1.0 + 0.01 * rng.standard_normal(measurements)),
        }
        errors = {"hessian_trace": traces.std(axis=1, ddof=1) / PROBES**0.5}
        runs.append(Run(steps, values, errors, _passages(steps, loss)))
    return runs


def _sampled_loss(rng: np.random.Generator, parameters: np.ndarray) -> float:
    """Loss on fresh data, as many as there are training samples."""
    active, size = rng.integers(FEATURES, size=DATA), rng.random(DATA)
    weights, bias = parameters[:2], parameters[2]
    error = np.maximum((weights[:, active] * size).T @ weights + bias, 0.0)
    error[np.arange(DATA), active] -= size
    return float((error**2).sum(axis=1).mean())


def _passages(steps: np.ndarray, loss: np.ndarray) -> list[Truth]:
    """The passages of the exact loss from the level of one stage to that of another."""
    levels = np.array(list(LEVELS.values()))
    nearest = np.abs(loss[:, None] - levels).argmin(axis=1)
    passages: list[Truth] = []
    for k in np.flatnonzero(np.diff(nearest)):
        # A passage may pass by a level: only where it stays is a stage.
        old, new = levels[nearest[max(k - 3, 0)]], levels[nearest[min(k + 4, len(loss) - 1)]]
        if old == new or nearest[k] != nearest[max(k - 3, 0)]:
            continue
        share = (loss - old) / (new - old)
        first = int(np.flatnonzero(share[: k + 2] < 0.1)[-1])
        if passages and first < passages[-1].last:
            continue
        last = int(k) + 1 + int(np.flatnonzero(share[k + 1 :] > 0.9)[0])
        half = first + int(np.flatnonzero(share[first : last + 1] < 0.5)[-1])
        changes = {"loss": float(new - old)}
        passages.append(Truth(first, last, (float(steps[half]), float(steps[half + 1])), changes=changes))
    return passages
