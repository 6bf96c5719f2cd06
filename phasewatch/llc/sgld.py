"""Underdamped stochastic gradient Langevin dynamics; the step size sets itself in burn-in and is then frozen.

A step is a kick, half a drift, a partial refreshment of the momentum and half a drift (BAOAB: Leimkuhler & Matthews
2013, "Rational construction of stochastic numerical methods for molecular sampling"), in coordinates scaled by a
frozen diagonal preconditioner. With persistence 0 of the momentum this is SGLD (Welling & Teh 2011) with averaged
noise; persistence lets flat directions mix sooner. Plain SGLD is too wide by 1 / (1 - step * curvature / 4) in a
quadratic direction, which inflates the loss; BAOAB is exact there at every stable step size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.llc.posterior import LocalizedPosterior

PRECONDITIONED_FROM = 1 / 3
"""Share of burn-in after which the preconditioner is frozen."""
CURVATURE_FLOOR = 0.1
"""Added to the preconditioner's curvatures, in units of their mean: few draws underestimate small ones."""
POWER_ITERATIONS = 5
ADAPTATION_RATE, ADAPTATION_DECAY = 1.5, 0.6
"""Move k of burn-in changes log(step) by ``rate * k ** -decay`` times the error: Robbins-Monro."""
REFUSED_BELOW = 1e-3
"""A burn-in move with a smaller acceptance probability than this is taken back."""
WALL = 10.0
"""Draws this many standard deviations above the mean nbeta L of late burn-in (and above twice it) are refused."""


@dataclass(frozen=True)
class Chains:
    """What the chains saw after burn-in.

    Attributes:
        excess_losses: L_b(w_t) - L_b(w*) on the batch b of each draw, shape ``(chains, draws)``.
        slopes: First-order change of nbeta L on all batches from w* to w_t, same shape.
        refused: Share of draws that were taken back since the loss shot up, shape ``(chains,)``.
        distances: Distance from w* at the last draw, shape ``(chains,)``.
        acceptance: Mean probability with which Metropolis' rule would take a move of late burn-in.
        heating: What the noise of the minibatch gradients adds to nbeta L, to first order, from late burn-in.
        step_size: The frozen step of SGLD, in units of the preconditioner.
    """

    excess_losses: NDArray[np.float64]
    slopes: NDArray[np.float64]
    refused: NDArray[np.float64]
    distances: NDArray[np.float64]
    acceptance: float
    heating: float
    step_size: float


def sample_sgld(
    posterior: LocalizedPosterior,
    *,
    chains: int,
    draws: int,
    burn_in: int,
    target_acceptance: float,
    max_heating: float,
    persistence: float,
    seed: int,
) -> Chains:
    """Run all chains from w*: ``burn_in`` gradients each that set the step size, then ``draws`` with it frozen.

    Args:
        posterior: What to sample.
        chains: Number of chains.
        draws: Draws a chain, one minibatch gradient each.
        burn_in: Minibatch gradients a chain before them.
        target_acceptance: Mean probability with which Metropolis' rule would take a move; sets the step size.
        max_heating: Largest share of nbeta L that gradient noise may make up; shortens the step further.
        persistence: Part of the momentum that survives a step, in [0, 1).
        seed: Seeds one generator a chain and the order of the batches.
    """
    walkers = _Walkers(posterior, chains, persistence, seed)
    calibration = _Calibration(posterior, walkers)
    calibration.run(burn_in // 2, target_acceptance, max_heating)
    device = posterior.center.device
    excess_losses = torch.empty(chains, draws, dtype=torch.float64, device=device)
    slopes = torch.empty_like(excess_losses)
    accepted = torch.empty(chains, draws, dtype=torch.bool, device=device)
    last_positions = walkers.positions.clone()
    last_excess = torch.zeros(chains, dtype=torch.float64, device=device)
    for draw in range(draws):
        for chain in range(chains):
            position = walkers.positions[chain]
            excess_loss, force = posterior.excess_loss_and_force(position, next(walkers.batches[chain]))
            energy = posterior.nbeta * excess_loss
            inside = energy.isfinite() & (energy < calibration.wall)
            # Back to the last draw, and on in the opposite direction: no host sync, and one bad step ends no chain.
            torch.where(inside, position, last_positions[chain], out=position)
            walkers.momenta[chain].mul_(torch.where(inside, 1.0, -1.0))
            walkers.kick(chain, torch.where(inside, force, 0.0))
            last_positions[chain] = position
            torch.where(inside, excess_loss.double(), last_excess[chain], out=last_excess[chain])
            excess_losses[chain, draw] = last_excess[chain]
            slopes[chain, draw] = posterior.slope(position)
            accepted[chain, draw] = inside
            walkers.drift(chain)
            walkers.refresh(chain, persistence)
            walkers.drift(chain)
    return Chains(
        excess_losses=excess_losses.cpu().numpy(),
        slopes=slopes.cpu().numpy(),
        refused=(~accepted).double().mean(dim=1).cpu().numpy(),
        distances=(last_positions - posterior.center).norm(dim=1).double().cpu().numpy(),
        acceptance=calibration.acceptance,
        heating=calibration.heating,
        step_size=walkers.step**2,
    )


class _Walkers:
    """All chains: positions, momenta of unit mass in scaled coordinates, and the moves that BAOAB is made of."""

    def __init__(self, posterior: LocalizedPosterior, chains: int, persistence: float, seed: int) -> None:
        center = posterior.center
        *seeds, order_seed = np.random.SeedSequence(seed).generate_state(chains + 1).tolist()
        self.generators = [torch.Generator(center.device).manual_seed(chain_seed) for chain_seed in seeds]
        order = np.random.default_rng(order_seed)
        self.batches = [balanced_batches(posterior.objective.batch_weights, order) for _ in range(chains)]
        self.persistence = persistence
        self.step = 0.0
        self.scale = torch.ones_like(center)
        self.positions = center.repeat(chains, 1)
        self.momenta = torch.zeros_like(self.positions)
        self._noise = torch.empty_like(center)
        for chain in range(chains):
            self.refresh(chain, persistence=0.0)

    def kick(self, chain: int, force: Tensor, share: float = 1.0) -> None:
        self.momenta[chain].addcmul_(self.scale, force, value=share * self.step)

    def drift(self, chain: int) -> None:
        """Half a step."""
        self.positions[chain].addcmul_(self.scale, self.momenta[chain], value=self.step / 2)

    def refresh(self, chain: int, persistence: float) -> None:
        self._noise.normal_(generator=self.generators[chain])
        self.momenta[chain].mul_(persistence).add_(self._noise, alpha=math.sqrt(1 - persistence**2))

    def kinetic_energy(self, chain: int) -> Tensor:
        return self.momenta[chain].square().sum().double() / 2


@dataclass(frozen=True)
class _Move:
    """One move of all chains in burn-in: chain means, and the step size that was tried."""

    acceptance: float
    energy: float
    squared_energy: float
    noise: float
    log_step: float


class _Calibration:
    """Burn-in: one batch at both ends of a move shows its discretisation error, the next batch its noise.

    The acceptance probability of a move is min(1, exp(-W)), W the energy that it makes up beside the heat that
    the refreshment brings (shadow work: Sivak, Chodera & Crooks 2014, "Time step rescaling recovers continuous-time
    dynamical properties for discrete-time Langevin integration of nonequilibrium systems").

    Attributes:
        acceptance: Mean acceptance probability over late burn-in.
        heating: What gradient noise adds to nbeta L at the frozen step size.
        wall: The value of nbeta (L - L(w*)) above which a draw is no draw from near w*.
    """

    def __init__(self, posterior: LocalizedPosterior, walkers: _Walkers) -> None:
        self.posterior = posterior
        self.walkers = walkers
        self.acceptance = math.nan
        self.heating = math.nan
        self.wall = math.nan
        self._squared_forces = torch.zeros_like(walkers.scale)
        self._starts = walkers.positions.clone()
        self._forces: list[Tensor | None] = [None] * len(walkers.positions)

    def run(self, moves: int, target_acceptance: float, max_heating: float) -> None:
        """Move all chains, freeze the preconditioner on the way and the step size at the end."""
        walkers = self.walkers
        walkers.step = self._first_step()
        trace: list[_Move] = []
        for move in range(moves):
            if move == int(PRECONDITIONED_FROM * moves) > 0:
                self._precondition(move)
                trace.clear()
            trace.append(self._move_all())
            late = trace[len(trace) // 2 :]
            share = self._heating(late) / max(float(np.mean([m.energy for m in late])), 1.0)
            error = min(trace[-1].acceptance - target_acceptance, 2 * (max_heating - share))
            walkers.step *= math.exp(ADAPTATION_RATE * max(error, -1.0) * len(trace) ** -ADAPTATION_DECAY)
        late = trace[len(trace) // 2 :]
        walkers.step = math.exp(float(np.mean([m.log_step for m in late])))
        self.acceptance = float(np.mean([m.acceptance for m in late]))
        self.heating = self._heating(late)
        energy = float(np.mean([m.energy for m in late]))
        variance = max(float(np.mean([m.squared_energy for m in late])) - energy**2, 0.0)
        self.wall = max(energy + WALL * (1 + math.sqrt(variance)), 2 * energy)

    def _heating(self, moves: list[_Move]) -> float:
        r"""Energy that gradient noise adds: step^2 / 8 * (1 + c) / (1 - c) * |noise|^2, c the persistence.

        A random kick of variance v in a direction raises its temperature by v (1 + c)^2 / (4 (1 - c^2)), the
        ratio of the diffusion that it causes to that of the refreshment; each degree of freedom carries half of it.
        """
        persistence = self.walkers.persistence
        noise = float(np.mean([move.noise for move in moves]))
        return self.walkers.step**2 / 8 * (1 + persistence) / (1 - persistence) * noise

    def _precondition(self, moves: int) -> None:
        """At equilibrium the mean squared force is the diagonal of the Hessian of the potential."""
        curvatures = self._squared_forces / (moves * len(self._forces)) + self.posterior.localization
        self.walkers.scale = (curvatures + CURVATURE_FLOOR * curvatures.mean()).rsqrt()
        self.walkers.step = self._first_step()

    def _move_all(self) -> _Move:
        chains = range(len(self._forces))
        self._starts.copy_(self.walkers.positions)
        readings = torch.stack([self._move(chain) for chain in chains]).tolist()
        acceptances, energies, noises = [], [], []
        for chain, (work, energy, noise) in zip(chains, readings, strict=True):
            acceptances.append(math.exp(-max(work, 0.0)) if math.isfinite(work) else 0.0)
            if acceptances[-1] < REFUSED_BELOW:
                self._take_back(chain)
                continue
            energies.append(energy)
            noises.append(noise)
            self._squared_forces.addcmul_(self._force(chain), self._force(chain))
        return _Move(
            acceptance=float(np.mean(acceptances)),
            energy=float(np.mean(energies)) if energies else 0.0,
            squared_energy=float(np.mean(np.square(energies))) if energies else 0.0,
            noise=float(np.mean(noises)) if noises else 0.0,
            log_step=math.log(self.walkers.step),
        )

    def _move(self, chain: int) -> Tensor:
        """One move on a new batch; returns its work, nbeta times the excess loss, and |scaled force noise|^2."""
        posterior, walkers = self.posterior, self.walkers
        position, batch = walkers.positions[chain], next(walkers.batches[chain])
        excess_loss, force = posterior.excess_loss_and_force(position, batch)
        before = force if self._forces[chain] is None else self._force(chain)
        noise = (walkers.scale * (force - before)).square().sum().double() / 2
        work = -posterior.potential(position, batch, excess_loss) - walkers.kinetic_energy(chain)
        walkers.kick(chain, force, share=0.5)
        work += walkers.kinetic_energy(chain)
        walkers.drift(chain)
        walkers.refresh(chain, walkers.persistence)
        walkers.drift(chain)
        work -= walkers.kinetic_energy(chain)
        excess_loss, force = posterior.excess_loss_and_force(position, batch)
        walkers.kick(chain, force, share=0.5)
        work += posterior.potential(position, batch, excess_loss) + walkers.kinetic_energy(chain)
        self._forces[chain] = force
        return torch.stack([work, posterior.nbeta * excess_loss.double(), noise])

    def _force(self, chain: int) -> Tensor:
        force = self._forces[chain]
        assert force is not None
        return force

    def _take_back(self, chain: int) -> None:
        self.walkers.positions[chain] = self._starts[chain]
        self.walkers.refresh(chain, persistence=0.0)
        self._forces[chain] = None

    def _first_step(self) -> float:
        """One over the root of the largest scaled curvature, by power iteration on differences of the force."""
        posterior, walkers = self.posterior, self.walkers
        position, batch = walkers.positions[0], next(walkers.batches[0])
        _, force = posterior.excess_loss_and_force(position, batch)
        direction = torch.empty_like(position).normal_(generator=walkers.generators[0])
        curvature = 1.0
        for _ in range(POWER_ITERATIONS):
            reach = 1 / (curvature**0.5 * float(direction.norm()))
            _, moved = posterior.excess_loss_and_force(position + reach * walkers.scale * direction, batch)
            change = (force - moved).mul_(walkers.scale).mul_(curvature**0.5)
            size = float(change.norm())
            if not (math.isfinite(size) and size > 0):
                break
            direction, curvature = change, size
        return 1 / math.sqrt(curvature)


def balanced_batches(weights: list[float], random: np.random.Generator) -> Iterator[int]:
    """Batch numbers without end, each as often as its weight says, in random order, pass by pass.

    Args:
        weights: Share of each batch; they sum to 1.
        random: Draws the order.
    """
    count = len(weights)
    while True:
        order = random.permutation(count)
        edges = np.cumsum(np.asarray(weights)[order])
        points = (np.arange(count) + random.random()) / count
        chosen = order[np.minimum(np.searchsorted(edges, points, side="right"), count - 1)]
        yield from random.permutation(chosen).tolist()
