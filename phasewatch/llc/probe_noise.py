"""The quadratic part of a learning coefficient, and what the choice of the samples of the probe alone takes off it.

At a perfect minimum of the loss of all n samples the loss of a probe of m has a slope: its samples' gradients, which
vanish in the mean over n, do not over m. So it falls, on its way to a minimum of its own, by about nbeta / m times the
learning coefficient where the model realizes the data with noise, by nothing where it fits them. A draw of that slope
is the mean of the gradients of the probe's samples with random signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phasewatch.isolation import isolated
from phasewatch.llc.diagnostics import FloatArray
from phasewatch.llc.hmc import CHAINS_AT_ONCE_BELOW
from phasewatch.objective import Objective, split_off_misfit

PRODUCTS = 16
"""Size of the Krylov spaces. Where they are too small the quadratic part reads high, and the fall low. Chosen."""
DRAWS, DRAWS_TIMES_PARAMETERS = 2, 64
"""Random vectors of either kind: 2, more where there are so few parameters that a vector says little. Chosen."""
STEP = 1e-4
"""Length of the differences of gradients that are products, relative to that of the parameters. With 1e-3 the kinks of
ReLUs look like curvature, with 1e-5 rounding does where weights are small."""


@dataclass(frozen=True)
class Quadrature:
    """Gauss quadrature of the spectral measure of a matrix at several vectors; shapes ``(vectors, nodes)``."""

    nodes: FloatArray
    weights: FloatArray


@dataclass(frozen=True)
class ProbeNoise:
    """What is known of the Gauss-Newton matrix at w*, and of the slope that the choice of the probe gives to the loss.

    Attributes:
        curvature: The spectrum, seen by random vectors whose squared length is the number of parameters.
        slope: The same seen by draws of that slope; None where the probe is the whole data set.
        localization: Precision gamma of the Gaussian around w*.
        gradients: Minibatch gradients spent.
    """

    curvature: Quadrature
    slope: Quadrature | None
    localization: float
    gradients: int

    def quadratic(self, nbeta: float) -> float:
        """The learning coefficient of a quadratic loss with this curvature (:func:`phasewatch.quadratic_llc`)."""
        nodes = self.curvature.nodes * nbeta
        shares = nodes / np.maximum(nodes + self.localization, np.finfo(float).tiny)
        return float((self.curvature.weights * shares).sum(axis=1).mean()) / 2

    def fall(self, nbeta: float) -> float:
        """By how much nbeta L falls from w* to the held minimum of that loss with the slope, on average."""
        if self.slope is None:
            return 0.0
        curvature = self.slope.nodes * nbeta
        held = np.maximum(curvature + self.localization, np.finfo(float).tiny)
        shares = 1 / held - curvature / (2 * held**2)
        return float((self.slope.weights * shares).sum(axis=1).mean()) * nbeta**2

    def bearable(self, nbeta: float, share: float) -> float:
        """The largest inverse temperature up to ``nbeta`` at which the fall is at most ``share`` of the quadratic."""
        low, high = 0.0, nbeta
        if self.fall(high) <= share * self.quadratic(high):
            return nbeta
        for _ in range(50):
            middle = (low + high) / 2
            if self.fall(middle) <= share * self.quadratic(middle):
                low = middle
            else:
                high = middle
        return low


def probe_noise(objective: Objective, n: int, localization: float, seed: int = 0) -> ProbeNoise:
    """Some dozens of gradients of the divergence near w*.

    Args:
        objective: The loss, on the probe.
        n: Size of the data set that the probe stands for; the noise is none where the probe is all of it.
        localization: Precision gamma of the Gaussian around w*.
        seed: Seeds the random vectors.

    Raises:
        NoOutputsError: If the outputs cannot be seen, see :func:`phasewatch.objective.split_off_misfit`.
    """
    random = np.random.default_rng(seed)
    size = objective.num_parameters
    draws = max(DRAWS, -(-DRAWS_TIMES_PARAMETERS // size))
    center = objective.parameters
    missing = max(0.0, 1 - objective.num_samples / n)
    with isolated():
        divergence, _ = split_off_misfit(objective)
        signs = torch.from_numpy(random.choice([-1.0, 1.0], (draws, size))).to(center)
        slopes = [_slope_by_chance(objective, random) for _ in range(draws if missing else 0)]
        level = divergence.losses_and_gradients(center[None])[1]
        step = STEP * (1 + float(center.norm()))

        def product(vectors: Tensor) -> Tensor:
            lengths = vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
            moved = center + vectors * (step / lengths)
            return (divergence.losses_and_gradients(moved)[1] - level) * (lengths / step)

        starts = torch.cat([signs, *(slope[None] for slope in slopes)])
        # A basis has the memory of as many vectors as there are products, for each that is gone from at a time.
        at_once = len(starts) if size <= CHAINS_AT_ONCE_BELOW.get(center.device.type, 0) else 1
        found = [_quadrature(product, some, min(PRODUCTS, size)) for some in starts.split(at_once)]
        nodes, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
    weights = weights * starts.double().square().sum(dim=1, keepdim=True).cpu().numpy()
    products = nodes.shape[1] * len(starts) + 1
    return ProbeNoise(
        curvature=Quadrature(nodes[:draws], weights[:draws]),
        slope=Quadrature(nodes[draws:], missing * weights[draws:]) if missing else None,
        localization=localization,
        gradients=objective.num_batches * (products + len(slopes)),
    )


def _slope_by_chance(objective: Objective, random: np.random.Generator) -> Tensor:
    """The mean over samples of their gradients with random signs, shape ``(num_parameters,)``."""
    signed = []
    for batch, size in enumerate(objective.batch_sizes):
        found = objective.outputs_and_slopes(batch)
        signs = torch.from_numpy(random.choice([-1.0, 1.0], size))
        own = []
        for slope in found.slopes:
            axis = slope.shape.index(size) if size in slope.shape else 0
            shape = [1] * slope.dim()
            shape[axis] = slope.shape[axis]
            # Outputs of which each sample has several are flattened sample by sample.
            one_each = signs.repeat_interleave(-(-slope.shape[axis] // size))[: slope.shape[axis]]
            own.append(slope * one_each.to(slope).view(shape))
        signed.append(own)
    reading = objective.read_from_outputs(_pairing, signed, again=lambda other: other)
    return reading.gradient()


def _pairing(outputs: list[Tensor], _loss: Tensor, slopes: list[Tensor]) -> Tensor:
    return torch.stack([(slope * output).sum() for output, slope in zip(outputs, slopes, strict=True)]).sum()


def _quadrature(product: Callable[[Tensor], Tensor], starts: Tensor, steps: int) -> tuple[FloatArray, FloatArray]:
    """Lanczos from each row, orthogonalised against all of its own basis; weights sum to 1."""
    basis: list[Tensor] = []
    diagonal, couplings = [], []
    vector = starts / starts.norm(dim=1, keepdim=True).clamp(min=torch.finfo(starts.dtype).tiny)
    for _ in range(steps):
        basis.append(vector)
        vector = product(vector)
        diagonal.append((basis[-1] * vector).sum(dim=1).double())
        for _ in range(2):
            for before in basis:
                vector = vector - (before * vector).sum(dim=1, keepdim=True) * before
        norm = vector.norm(dim=1, keepdim=True)
        scale = torch.stack(diagonal).abs().max(dim=0).values[:, None]
        ended = norm <= 1e-4 * scale
        couplings.append(torch.where(ended, 0, norm)[:, 0].double())
        vector = torch.where(ended, 0, vector / norm.clamp(min=torch.finfo(norm.dtype).tiny))
    matrices = torch.diag_embed(torch.stack(diagonal, dim=1))
    if steps > 1:
        beside = torch.stack(couplings[:-1], dim=1)
        matrices = matrices + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values, vectors = torch.linalg.eigh(matrices)
    return values.clamp(min=0).cpu().numpy(), vectors[:, 0].square().cpu().numpy()
