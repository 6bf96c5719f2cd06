"""Chains that stay with a function: Hamiltonian Monte Carlo at a stated mean divergence from it.

The density is exp(-nbeta D(w)) times a Gaussian around w*, D the divergence of the network's function from the one at
w*. The mean of D is given, and nbeta is found: while the chains set up it follows what they see. They begin at w* for
each resolution: D then comes up from below, where cooling chains from a coarser one would have to drain the energy of
all directions. In units of the prior's spread every direction that D does not hold has the curvature 1, so that one
length of path serves all. Every move sees all batches, so that nothing has to be corrected afterwards. What is further
away than a bound, in the divergence, is refused: a chain cannot leave for the plateau where the network does nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from phasewatch.llc.hmc import CHAINS_AT_ONCE_BELOW, THRESHOLD_DRIFT
from phasewatch.objective import Objective

TARGET_ACCEPTANCE = 0.95
FURTHEST, FURTHEST_NATS = 5.0, 10.0
"""The bound is so many resolutions, and so many units of 1 / nbeta: for the gamma law that nbeta D has in a quadratic
well it cuts off less than 1e-6 at any number of dimensions."""
FOLLOWING, SETTLING = 0.1, 0.02
"""Largest change of log(nbeta) in a move: upwards at first, and later. Over the last third of the moves it is averaged.
Downwards it is the smaller one from the start: that D is small says little while the chains spread."""
PATH, PATHS = 15, 8
"""Momentum lasts so many moves, and while the chains spread an eighth of the set-up, where that is more."""
MASSES_AT = 1 / 3
CURVATURE_FLOOR = 0.1
SMALL = 1e-3
"""Distance in units of the spread within which D is taken to be quadratic."""
LANCZOS_STEPS = 12
POWER_ITERATIONS = 5
DRAWS_PER_POSITION = 8


@dataclass(frozen=True)
class Draws:
    """What the chains saw at one resolution.

    Attributes:
        nbeta: The inverse temperature.
        divergences: D of each draw, shape ``(chains, draws)``.
        squared_distances: From w* in units of the spread, of the first and each 8th draw after it, and by tensor,
            shape ``(chains, ..., tensors)``.
        forces: w - w* times the gradient of nbeta D at the same draws, shape ``(chains, ...)``.
        positions: Where each chain stood whenever it was asked for draws, shape ``(..., num_parameters)``.
        acceptance: Share of the moves accepted.
        hits: Share of the moves that were refused for their divergence.
        step_size: In units of the spread.
    """

    nbeta: float
    divergences: NDArray[np.float64]
    squared_distances: NDArray[np.float64]
    forces: NDArray[np.float64]
    positions: Tensor
    acceptance: float
    hits: float
    step_size: float


@dataclass(frozen=True)
class _Kept:
    """What was seen since the chains were set up, draw by draw or every 8th of them."""

    divergences: list[Tensor] = field(default_factory=list)
    squared_distances: list[Tensor] = field(default_factory=list)
    forces: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    acceptances: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)


class ResolvedChains:
    """Chains around w*, for one resolution after another.

    Attributes:
        gradients: Gradients of the whole probe so far, all chains together.
    """

    def __init__(self, divergence: Objective, spread: Tensor, chains: int, seed: int) -> None:
        """Look at the divergence near w* and at the prior's distance.

        Args:
            divergence: :meth:`phasewatch.Objective.behavioral`.
            spread: Standard deviation of the prior, shape ``(num_parameters,)``.
            chains: Number of chains.
            seed: Seeds one generator a chain.
        """
        seeds = np.random.SeedSequence(seed).spawn(chains)
        device = spread.device
        self.gradients = 0
        self._divergence, self._spread = divergence, spread
        self._generators = [
            torch.Generator(device).manual_seed(int(one.generate_state(1, np.uint64)[0] >> 1)) for one in seeds
        ]
        self._host = np.random.default_rng(seeds[0].spawn(1)[0])
        at_once = spread.numel() <= CHAINS_AT_ONCE_BELOW.get(device.type, 0)
        self._rows = [slice(None)] if at_once else [slice(k, k + 1) for k in range(chains)]
        self.at_the_prior = float(self._evaluate(self._normal())[0].median())
        self._momenta = self._normal()
        self._positions = torch.zeros_like(self._momenta)
        self._at_start = self._values, self._gradients = self._evaluate(self._positions)
        self._spectrum = self._curvature()
        self._largest = float(self._spectrum[0].max())
        # Uniform on (-1, 1); its absolute value decides, its sign is the direction in which that moves.
        self._thresholds = torch.as_tensor(self._host.uniform(-1, 1, chains), device=device)
        self._nbeta = 0.0
        self._log_step = 0.0
        self._bound = math.inf
        self._path = float(PATH)
        self._kept = _Kept()

    def set_up(self, resolution: float, moves: int) -> None:
        """Let the chains go from w* until the mean divergence is as given, and find nbeta and the step size there.

        Args:
            resolution: The mean divergence wanted.
            moves: Moves of each chain to spend.
        """
        self._positions = torch.zeros_like(self._momenta)
        self._values, self._gradients = self._at_start
        self._nbeta = self._quadratic_nbeta(resolution)
        self._log_step = -math.log1p(self._nbeta * self._largest) / 2
        self._path = max(PATH, moves / PATHS)
        self._scale = torch.ones_like(self._spread)
        squared_forces = torch.zeros_like(self._spread)
        masses_at = int(MASSES_AT * moves)
        settled: list[float] = []
        for move in range(moves):
            if move < masses_at:
                squared_forces += (self._nbeta * self._gradients).square().mean(dim=0)
            elif move == masses_at:
                # At equilibrium the mean squared force is the diagonal of the Hessian.
                curvatures = 1 + squared_forces / masses_at
                self._scale = (curvatures + CURVATURE_FLOOR * curvatures.mean()).rsqrt()
                self._momenta = self._normal()
                self._log_step = -math.log(self._largest_scaled()) / 2
            self._bound = FURTHEST * resolution + FURTHEST_NATS / self._nbeta
            acceptance, _ = self._move()
            settling = move >= moves - moves // 3
            fastest = SETTLING if settling else FOLLOWING
            # One chain that is stuck far out must not drive the others.
            excess = float((self._values / resolution - 1).clamp(max=1).mean())
            self._nbeta *= math.exp(max(-SETTLING, fastest * excess))
            if settling:
                settled.append(math.log(self._nbeta))
            self._log_step += max(1.5 * (1 + (move - masses_at if move >= masses_at else move)) ** -0.6, 0.05) * (
                acceptance - TARGET_ACCEPTANCE
            )
        self._kept = _Kept()
        self._path = PATH
        self._nbeta = math.exp(float(np.mean(settled)))
        self._bound = FURTHEST * resolution + FURTHEST_NATS / self._nbeta

    def draw(self, moves: int) -> Draws:
        """Go on with everything as it is.

        Args:
            moves: Further draws of each chain.

        Returns:
            All draws since the chains were set up.
        """
        tensors = list(self._divergence.parameter_shapes.values())
        sizes = [shape.numel() for shape in tensors]
        kept = self._kept
        for _ in range(moves):
            acceptance, outside = self._move()
            kept.acceptances.append(acceptance)
            kept.hits.append(outside)
            if len(kept.divergences) % DRAWS_PER_POSITION == 0:
                squares = self._positions.square().split(sizes, dim=1)
                kept.squared_distances.append(torch.stack([square.double().sum(dim=1) for square in squares], dim=1))
                kept.forces.append(self._nbeta * torch.linalg.vecdot(self._positions, self._gradients).double())
            kept.divergences.append(self._values)
        kept.positions.append(self._divergence.parameters + self._spread * self._positions)
        return Draws(
            nbeta=self._nbeta,
            divergences=torch.stack(kept.divergences, dim=1).cpu().numpy(),
            squared_distances=torch.stack(kept.squared_distances, dim=1).cpu().numpy(),
            forces=torch.stack(kept.forces, dim=1).cpu().numpy(),
            positions=torch.cat(kept.positions),
            acceptance=float(np.mean(kept.acceptances)),
            hits=float(np.mean(kept.hits)),
            step_size=math.exp(self._log_step),
        )

    def _curvature(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Eigenvalues of the quadratic part of D and how many of each, by Lanczos' method from random directions."""
        directions = self._normal()
        directions /= directions.norm(dim=1, keepdim=True)
        before, off = torch.zeros_like(directions), torch.zeros_like(directions[:, :1])
        diagonal, off_diagonal = [], []
        for _ in range(LANCZOS_STEPS):
            products = self._product(directions) - off * before
            diagonal.append(torch.linalg.vecdot(products, directions))
            products -= diagonal[-1][:, None] * directions
            off = products.norm(dim=1, keepdim=True)
            off_diagonal.append(off[:, 0])
            before, directions = directions, products / off.clamp(min=torch.finfo(off.dtype).tiny)
        main, beside = (torch.stack(entries, dim=1).double().cpu() for entries in (diagonal, off_diagonal))
        matrices = torch.diag_embed(main) + sum(torch.diag_embed(beside[:, :-1], k) for k in (1, -1))
        if not bool(matrices.isfinite().all()):
            return np.zeros(1), np.zeros(1)
        values, vectors = torch.linalg.eigh(matrices)
        counts = vectors[:, 0].square() * self._spread.numel() / len(values)
        return values.clamp(min=0).flatten().numpy(), counts.flatten().numpy()

    def _quadratic_nbeta(self, resolution: float) -> float:
        """Where the quadratic part of D alone has that mean; where it is less at any temperature, lambda is one."""
        values, counts = self._spectrum

        def excess(log_nbeta: float) -> float:
            return float(np.sum(counts * values / (1 + math.exp(log_nbeta) * values))) / 2 - resolution

        lowest, highest = -math.log(resolution), math.log(self._spread.numel() / resolution)
        return math.exp(brentq(excess, lowest, highest)) if excess(lowest) > 0 else 1 / resolution

    def _largest_scaled(self) -> float:
        """The largest curvature of the potential in scaled coordinates, by power iteration where the chains are."""
        directions = self._normal()
        largest = 1.0
        for _ in range(POWER_ITERATIONS):
            directions = directions / directions.norm(dim=1, keepdim=True)
            reach = SMALL / math.sqrt(max(self._nbeta * self._largest, 1.0)) * math.sqrt(directions.shape[1]) * 10
            moved = self._evaluate(self._positions + reach * self._scale * directions)[1]
            directions = self._scale * (self._nbeta * (moved - self._gradients) / reach + self._scale * directions)
            largest = float(directions.norm(dim=1).median())
        return largest

    def _product(self, directions: Tensor) -> Tensor:
        lengths = directions.norm(dim=1, keepdim=True).clamp(min=torch.finfo(directions.dtype).tiny)
        reach = SMALL * math.sqrt(directions.shape[1])
        return self._evaluate(directions / lengths * reach)[1] * lengths / reach

    def _evaluate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """D, in float64, and its gradient, at places in units of the spread, from w*."""
        self.gradients += len(positions)
        values, gradients = [], []
        for rows in self._rows:
            places = torch.addcmul(self._divergence.parameters, self._spread, positions[rows])
            value, gradient = self._divergence.losses_and_gradients(places)
            values.append(value.double())
            gradients.append(gradient.mul_(self._spread))
        return torch.cat(values), torch.cat(gradients)

    def _move(self) -> tuple[float, float]:
        """One leapfrog step of all chains; shares of moves accepted on average, and of those that are out of bounds."""
        step = math.exp(self._log_step)
        kept = math.exp(-1 / self._path)
        momenta = self._normal().mul_(math.sqrt(1 - kept**2)).add_(self._momenta, alpha=kept)
        before = momenta
        stride = step * self._scale
        momenta = momenta.addcmul(stride, torch.add(self._positions, self._gradients, alpha=self._nbeta), value=-0.5)
        positions = self._positions.addcmul(stride, momenta)
        values, gradients = self._evaluate(positions)
        momenta.addcmul_(stride, torch.add(positions, gradients, alpha=self._nbeta), value=-0.5)
        work = self._nbeta * (values - self._values)
        for new, old in ((positions, self._positions), (momenta, before)):
            work = work + (_half_square(new) - _half_square(old))
        outside = values > self._bound
        work = torch.where(work.isnan() | outside, torch.inf, work)
        acceptance = torch.exp(-work.clamp(min=0))
        self._thresholds += self._host.uniform(0, THRESHOLD_DRIFT)
        self._thresholds = torch.where(self._thresholds > 1, self._thresholds - 2, self._thresholds)
        accepted = self._thresholds.abs() < acceptance
        self._thresholds = torch.where(accepted, self._thresholds * work.exp(), self._thresholds)
        row = accepted[:, None]
        self._positions = torch.where(row, positions, self._positions)
        self._momenta = torch.where(row, momenta, -before)
        self._gradients = torch.where(row, gradients, self._gradients)
        self._values = torch.where(accepted, values, self._values)
        return float(acceptance.mean()), float(outside.double().mean())

    def _normal(self) -> Tensor:
        noise = torch.empty(len(self._generators), self._spread.numel()).to(self._spread)
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise


def _half_square(vectors: Tensor) -> Tensor:
    return torch.linalg.vecdot(vectors, vectors).double() / 2
