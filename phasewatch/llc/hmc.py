"""Generalized Hamiltonian Monte Carlo on minibatches; step, masses and friction set themselves in burn-in.

A move is one leapfrog step with a momentum that mostly persists (Horowitz 1991, "A generalized guided Monte Carlo
algorithm"), accepted or refused by Metropolis' rule with the loss of one batch at both ends, so that the step size
biases nothing. Refusals, which reverse the momentum, are made to cluster (Neal 2020, "Non-reversibly updating a uniform
[0,1] value for Metropolis accept/reject decisions"): between them the chains run straight. A batch serves several
moves. The energy that comes in when the next takes over would warm the chains; the friction is set to drain it, and
what it leaves is known, since what comes in is measured. Chains start at w* and first spread at a lower nbeta.
One that is stuck when burn-in ends goes on from where another is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.llc.fluctuations import SampleLosses
from phasewatch.llc.posterior import LOSS_PER_GRADIENT, LocalizedPosterior

TARGET_ACCEPTANCE = 0.95
ADAPTATION_RATE, ADAPTATION_DECAY = 1.5, 0.6
"""Move k of burn-in changes log(step) by ``rate * k ** -decay`` times the error: Robbins-Monro."""
PRECONDITIONED_FROM = 1 / 3
"""Share of burn-in after which the masses are frozen."""
SPREADING = 4.0
"""Until then nbeta is less by this factor: chains that start at one point spread over its flat directions sooner."""
MOVES_OF_SPREADING = 60
"""Moves of burn-in needed per unit of that factor, or it is less: a short one could not cool the chains again."""
CURVATURE_FLOOR = 0.1
"""Added to the curvatures of the masses, in units of their mean: few draws underestimate small ones."""
POWER_ITERATIONS = 5
MOVES_PER_BATCH = 16
MOVES_PER_REFRESHMENT = 4
FREE_PATH, FREE_PATHS = 100, 20
"""Momentum lasts this many moves, or less where the draws are fewer than so many times that."""
MAX_WARMING = 0.1
"""Share of nbeta L that may come from the change of batches."""
WARMING_CHECKS = 8
MOVES_PER_COST_OF_BEND = 2
"""The bend of the misfit is looked at after so many moves for each gradient that the look costs."""
TESTS_OF_BEND = 5
LEAST_MOVES = 50
"""Every move sees the whole probe where minibatches do badly, if so many moves can be paid for."""
LEAST_BURN_IN, LEAST_DRAWS = 10, 4
LEAST_KEPT = 0.85
"""That is where a smaller share of the ways is kept when the bend is looked at."""
NEGLIGIBLE_BEND = 1e-3
"""If it has never been larger after so many looks, it is not looked at again (chains are near w* and hot then)."""
LEAST_ACCEPTANCE = 0.5
"""A chain that accepts fewer moves than this at the end of burn-in is stuck."""
DRAWS_PER_POSITION = 16
THRESHOLD_DRIFT = 0.04
"""Largest change per move of the variable that decides on acceptance."""
CHAINS_AT_ONCE_BELOW = {"cpu": 20_000, "cuda": 2_000_000}
"""Parameters up to which all chains are evaluated in one call; larger nets hold one chain at a time."""


@dataclass(frozen=True)
class Sample:
    """What the chains saw after burn-in.

    Attributes:
        energies: nbeta (L_b(w_t) - L_b(w*)) on the batch b of each draw, its slope at w* replaced by that of all
            batches; shape ``(chains, draws)``.
        squared_distances: Of every 16th draw from w*, shape ``(chains, ...)``.
        squared_distances_by_tensor: Their parts, one a parameter tensor; shape ``(chains, ..., tensors)``.
        virials: (w - w*) . grad U of the same draws, shape ``(chains, ...)``. U is what their batch says of it and the
            bend, which is taken to be quadratic.
        acceptance: Share of accepted moves, shape ``(chains,)``.
        kept: Share of the ways kept when the bend of the misfit was looked at, shape ``(chains,)``; 1 where there is no
            need to look, NaN where there was need and no occasion.
        warming: What the change of batches adds to nbeta L, shape ``(chains,)``.
        warming_error: Its standard error, same shape.
        batch_variance: Variance of nbeta L at one position over the batches, shape ``(chains,)``; rather too large, as
            the chains settle on each.
        step_size: The frozen step, in units of the preconditioner, mean over the chains.
        sample_losses: Losses of single samples at every 16th draw.
    """

    energies: NDArray[np.float64]
    squared_distances: NDArray[np.float64]
    squared_distances_by_tensor: NDArray[np.float64]
    virials: NDArray[np.float64]
    acceptance: NDArray[np.float64]
    kept: NDArray[np.float64]
    warming: NDArray[np.float64]
    warming_error: NDArray[np.float64]
    batch_variance: NDArray[np.float64]
    step_size: float
    sample_losses: SampleLosses


def sample_hmc(posterior: LocalizedPosterior, *, chains: int, draws: int, burn_in: int, seed: int) -> Sample:
    """Run all chains from w*: ``burn_in`` gradients each that set the sampler up, then ``draws`` with it frozen.

    Args:
        posterior: What to sample.
        chains: Number of chains.
        draws: Draws a chain, one minibatch gradient each.
        burn_in: Minibatch gradients a chain before them.
        seed: Seeds one generator a chain and the order of the batches.
    """
    seeds = np.random.SeedSequence(seed).spawn(chains)
    at_once = posterior.center.numel() <= CHAINS_AT_ONCE_BELOW.get(posterior.center.device.type, 0)
    blocks = [seeds] if at_once else [[one] for one in seeds]
    sample_losses = SampleLosses(posterior.objective)
    samples = [_Block(posterior, block, sample_losses).run(burn_in, draws) for block in blocks]
    shortest = min(s.energies.shape[1] for s in samples)
    fewest = min(s.squared_distances.shape[1] for s in samples)
    return Sample(
        energies=np.concatenate([s.energies[:, :shortest] for s in samples]),
        squared_distances=np.concatenate([s.squared_distances[:, :fewest] for s in samples]),
        squared_distances_by_tensor=np.concatenate([s.squared_distances_by_tensor[:, :fewest] for s in samples]),
        virials=np.concatenate([s.virials[:, :fewest] for s in samples]),
        acceptance=np.concatenate([s.acceptance for s in samples]),
        kept=np.concatenate([s.kept for s in samples]),
        warming=np.concatenate([s.warming for s in samples]),
        warming_error=np.concatenate([s.warming_error for s in samples]),
        batch_variance=np.concatenate([s.batch_variance for s in samples]),
        step_size=float(np.mean([s.step_size for s in samples])),
        sample_losses=sample_losses,
    )


class _Block:
    """Chains that move together: positions, momenta of unit mass in scaled coordinates, one batch for all."""

    positions: Tensor
    momenta: Tensor
    gradients: Tensor
    energies: Tensor
    potentials: Tensor
    bends: Tensor
    _start: tuple[Tensor, Tensor]

    def __init__(
        self, posterior: LocalizedPosterior, seeds: list[np.random.SeedSequence], sample_losses: SampleLosses
    ) -> None:
        self.sample_losses = sample_losses
        center = posterior.center
        self.posterior = posterior
        self.generators = [
            torch.Generator(center.device).manual_seed(int(one.generate_state(1, np.uint64)[0] >> 1)) for one in seeds
        ]
        self.host = np.random.default_rng(seeds[0].spawn(1)[0])
        self.batches = balanced_batches(posterior.objective.batch_weights, self.host)
        self.batch: int | None = next(self.batches)
        self.scale = torch.ones_like(center)
        self.positions = center.repeat(len(seeds), 1)
        self.momenta = self._normal()
        self._evaluate()
        # Uniform on (-1, 1); its absolute value decides, its sign is the direction in which that moves.
        self.thresholds = torch.as_tensor(self.host.uniform(-1, 1, len(seeds)), device=center.device)
        self.log_step = torch.zeros((), device=center.device, dtype=torch.float64)
        self.moves_per_batch = MOVES_PER_BATCH if posterior.objective.num_batches > 1 else None
        self.whole_probe_allowed = False
        self.approaches = True
        self.persistence = 0.0
        self._moves = 0
        self._tests, self._kept = 0, torch.zeros_like(self.potentials)
        self._largest_bend = self._kept.new_zeros(())

    def run(self, burn_in: int, draws: int) -> Sample:
        self.whole_probe_allowed = burn_in + draws >= LEAST_MOVES * self.posterior.objective.num_batches
        self.free_path = min(FREE_PATH, max(2.0, draws / FREE_PATHS))
        self.persistence = 1 - 1 / self.free_path
        spent = max(0.0, self._calibrate(burn_in) - burn_in)
        energies: list[Tensor] = []
        squared_distances = []
        by_tensor, virials = [], []
        jumps: list[Tensor] = []
        accepted = torch.zeros_like(self.potentials)
        moves = 0
        self._tests, self._kept = 0, torch.zeros_like(self.potentials)
        while spent < draws or len(energies) < LEAST_DRAWS:
            if self._batch_is_used_up():
                spent += self._change_batch(jumps)
            else:
                accepted += self._move()[1]
                moves += 1
                spent += self._cost_of_move()
            if len(energies) % DRAWS_PER_POSITION == 0:
                spent += self._note_sample_losses()
                displacements = self.positions - self.posterior.center
                squared_distances.append(displacements.square().sum(dim=1))
                by_tensor.append(self._by_tensor(displacements.square()))
                virials.append(torch.linalg.vecdot(displacements, self.gradients).double() + 2 * self.bends)
            energies.append(self.energies + self.bends)
        warming, warming_error = self._warming(jumps)
        return Sample(
            energies=torch.stack(energies, dim=1).cpu().numpy(),
            squared_distances=torch.stack(squared_distances, dim=1).cpu().numpy(),
            squared_distances_by_tensor=torch.stack(by_tensor, dim=1).cpu().numpy(),
            virials=torch.stack(virials, dim=1).cpu().numpy(),
            acceptance=accepted.cpu().numpy() / moves,
            kept=self._kept_shares(),
            warming=warming,
            warming_error=warming_error,
            batch_variance=self._batch_variance(jumps),
            step_size=float(self.log_step.exp()),
            sample_losses=self.sample_losses,
        )

    def _by_tensor(self, values: Tensor) -> Tensor:
        """Sums over each parameter tensor, from shape ``(chains, num_parameters)`` to ``(chains, tensors)``."""
        sizes = [shape.numel() for shape in self.posterior.objective.parameter_shapes.values()]
        return torch.stack([piece.double().sum(dim=1) for piece in values.split(sizes, dim=1)], dim=1)

    def _kept_shares(self) -> NDArray[np.float64]:
        if self._tests:
            return (self._kept / self._tests).cpu().numpy()
        missed = self.batch is not None and self.posterior.cost_of_bend > 0
        return np.full(len(self.positions), math.nan if missed else 1.0)

    def _note_sample_losses(self) -> float:
        batches = range(self.posterior.objective.num_batches) if self.batch is None else [self.batch]
        evaluated = sum(self.sample_losses.add(self.positions, batch) for batch in batches)
        self.posterior.gradients += evaluated * LOSS_PER_GRADIENT
        return evaluated / len(self.positions) * LOSS_PER_GRADIENT

    def _calibrate(self, burn_in: int) -> float:
        """Set the step size by acceptance, the masses by the mean squared force, the friction by the warming.

        Returns:
            Gradients a chain that were spent, some more than ``burn_in`` where it starts anew on the way.
        """
        nbeta = self.posterior.nbeta
        spreading = min(SPREADING, max(1.0, burn_in / self._cost_of_move() / MOVES_OF_SPREADING))
        self._set_nbeta(nbeta / spreading)
        self.log_step.fill_(math.log(self._first_step()))
        squared_forces = torch.zeros_like(self.scale)
        masses_at = int(PRECONDITIONED_FROM * burn_in)
        checks = [masses_at + (burn_in - masses_at) * (k + 1) // WARMING_CHECKS for k in range(WARMING_CHECKS)]
        late = masses_at + (burn_in - masses_at) // 2
        late_log_step, late_moves, moves, forces = torch.zeros_like(self.log_step), 0, 0, 0
        late_acceptances: list[Tensor] = []
        jumps: list[Tensor] = []
        energies: list[Tensor] = []
        spent = 0.0
        spread_out = False
        while spent < burn_in:
            if not spread_out and spent >= masses_at:
                spread_out = True
                self._set_nbeta(nbeta)
                # At equilibrium the mean squared force is the diagonal of the Hessian of the potential.
                curvatures = spreading * squared_forces / forces + self.posterior.localization
                self.scale = (curvatures + CURVATURE_FLOOR * curvatures.mean()).rsqrt()
                self.log_step.fill_(math.log(self._first_step()))
                jumps, energies, moves = [], [], 0
            if self._batch_is_used_up():
                spent += self._change_batch(jumps)
            else:
                acceptance, _ = self._move()
                moves += 1
                spent += self._cost_of_move()
                change = ADAPTATION_RATE * moves**-ADAPTATION_DECAY
                self.log_step += change * (acceptance.mean() - TARGET_ACCEPTANCE)
                if spent >= late:
                    late_acceptances.append(acceptance)
            if not spread_out:
                squared_forces += self.gradients.square().mean(dim=0)
                forces += 1
            just_tested = self._moves == 0 and self._stays == 0 and self._tests >= TESTS_OF_BEND
            if just_tested and self._may_take_whole_probe() and self._kept_share() < LEAST_KEPT:
                return spent + self._restart_with_whole_probe(nbeta, burn_in - int(spent))
            if spent >= late:
                # Until here a chain that is still far out must not be held there by what the moves do not see.
                self.approaches = False
                late_log_step += self.log_step
                late_moves += 1
            energies.append(self.energies)
            if spread_out and spent >= checks[0]:
                checks = [check for check in checks if check > spent]
                if jumps and not self._limits_warming(jumps, float(torch.stack(energies).mean())):
                    return spent + self._restart_with_whole_probe(nbeta, burn_in - int(spent))
                jumps, energies = [], []
        self.log_step = late_log_step / late_moves
        if late_acceptances:
            self._free_stuck_chains(torch.stack(late_acceptances).mean(dim=0))
        return spent

    def _free_stuck_chains(self, acceptance: Tensor) -> None:
        """Chains that the hot start left where the loss is too steep for the step go on from where others are."""
        stuck = (acceptance < LEAST_ACCEPTANCE).cpu().numpy()
        if stuck.any() and not stuck.all():
            source = np.arange(len(stuck))
            source[stuck] = self.host.choice(source[~stuck], size=int(stuck.sum()))
            rows = torch.as_tensor(source, device=self.positions.device)
            self.positions, self.momenta = self.positions[rows], self.momenta[rows]
            self.gradients = self.gradients[rows]
            self.energies, self.potentials, self.bends = self.energies[rows], self.potentials[rows], self.bends[rows]
            self._start = (self._start[0][rows], self._start[1][rows])

    def _set_nbeta(self, nbeta: float) -> None:
        self.posterior.nbeta = nbeta
        self._evaluate()
        whole = self.batch is None
        self._begin_segment(torch.zeros_like(self.potentials) if whole else self.posterior.bend(self.positions))

    def _limits_warming(self, jumps: list[Tensor], energy: float) -> bool:
        """More friction where the change of batches warms the chains, then shorter stays; False if it gives up."""
        share = float(np.mean(self._warming(jumps)[0])) / max(energy, 1.0)
        if not share > MAX_WARMING:
            return True
        drained = self._drained()
        if drained * MOVES_PER_REFRESHMENT < 1:
            wanted = min(1.0, drained * MOVES_PER_REFRESHMENT * share / MAX_WARMING)
            self.persistence = (1 - wanted) ** (0.5 / MOVES_PER_REFRESHMENT)
        elif self._may_take_whole_probe():
            return False
        elif self.moves_per_batch is not None:
            self.moves_per_batch = max(1, self.moves_per_batch // 2)
        return True

    def _restart_with_whole_probe(self, nbeta: float, burn_in: int) -> float:
        """From now on every move sees all batches: nothing warms, nothing is missed, and it costs as much."""
        count = self.posterior.objective.num_batches
        self.moves_per_batch, self.batch = None, None
        self.persistence = 1 - 1 / max(2.0, self.free_path / count)
        self.positions = self.posterior.center.repeat(len(self.positions), 1)
        self.scale = torch.ones_like(self.scale)
        self.posterior.nbeta = nbeta
        return self._calibrate(max(burn_in, LEAST_BURN_IN * count))

    def _may_take_whole_probe(self) -> bool:
        return self.whole_probe_allowed and self.batch is not None

    def _kept_share(self) -> float:
        return float(self._kept.mean()) / self._tests if self._tests else 1.0

    def _cost_of_move(self) -> int:
        return self.posterior.objective.num_batches if self.batch is None else 1

    def _drained(self) -> float:
        """Share of the surplus of kinetic energy that refreshment takes away per move."""
        moves = min(MOVES_PER_REFRESHMENT, self.moves_per_batch or MOVES_PER_REFRESHMENT)
        return (1 - self.persistence ** (2 * moves)) / moves

    def _warming(self, jumps: list[Tensor]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What jumps of the potential leave in kinetic energy, and so in potential energy, with its standard error."""
        if not jumps or self.moves_per_batch is None:
            return np.zeros(len(self.positions)), np.zeros(len(self.positions))
        values = torch.stack(jumps).cpu().numpy() / (self.moves_per_batch * self._drained())
        count = np.maximum(np.isfinite(values).sum(axis=0), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a chain that kept no way at all
            means = np.nan_to_num(np.nanmean(values, axis=0))
            spread = np.nan_to_num(np.nanstd(values, axis=0)) if len(values) > 1 else np.abs(means)
        return means, spread / np.sqrt(count)

    def _batch_variance(self, jumps: list[Tensor]) -> NDArray[np.float64]:
        """Half the variance of the jumps of the potential, each the difference of two batches."""
        if not jumps:
            return np.zeros(len(self.positions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a chain that kept no way at all
            variance: NDArray[np.float64] = np.nan_to_num(np.nanvar(torch.stack(jumps).cpu().numpy(), axis=0)) / 2
        return variance

    def _batch_is_used_up(self) -> bool:
        return self.moves_per_batch is not None and self._moves >= self.moves_per_batch

    def _change_batch(self, jumps: list[Tensor]) -> float:
        """Go on with the next batch; notes by how much the potential changes, returns what that cost.

        Where the misfit bends, what the moves could not see of it first decides whether the way since the last such
        test is kept (delayed acceptance, Christen & Fox 2005).
        """
        spent = 1.0
        before = self.potentials
        self._stays += 1
        cost = self.posterior.cost_of_bend
        if cost and self._stays * MOVES_PER_BATCH >= cost * MOVES_PER_COST_OF_BEND:
            spent += cost
            kept, bends = self._test_segment()
            before = torch.where(kept, before, torch.nan)
            self.batch = next(self.batches)
            self._evaluate()
            self._begin_segment(bends)
        else:
            self.batch = next(self.batches)
            self._evaluate()
        self._moves = 0
        jumps.append(self.potentials - before)
        return spent

    def _test_segment(self) -> tuple[Tensor, Tensor]:
        bends = self.posterior.bend(self.positions)
        draw = torch.as_tensor(self.host.exponential(size=len(bends)), device=bends.device)
        kept = bends - self.bends <= draw
        self._kept += kept
        kept |= torch.as_tensor(self.approaches, device=kept.device)
        row = kept[:, None]
        self.positions = torch.where(row, self.positions, self._start[0])
        self.momenta = torch.where(row, self.momenta, -self._start[1])
        self._tests += 1
        self._largest_bend = torch.maximum(self._largest_bend, bends.abs().nan_to_num(torch.inf).max())
        if self._tests == TESTS_OF_BEND and self._largest_bend < NEGLIGIBLE_BEND:
            self.posterior.ignore_bend()
            bends = torch.zeros_like(bends)
        return kept, torch.where(kept, bends, self.bends)

    def _begin_segment(self, bends: Tensor) -> None:
        self.bends = bends
        self._stays = 0
        self._start = (self.positions, self.momenta)

    def _evaluate(self) -> None:
        self.energies, self.potentials, self.gradients = self.posterior.evaluate(self.positions, self.batch)

    def _move(self) -> tuple[Tensor, Tensor]:
        """One step of all chains; returns Metropolis' probabilities, and which were accepted."""
        if self._moves % MOVES_PER_REFRESHMENT == 0:
            persistence = self.persistence ** min(MOVES_PER_REFRESHMENT, self.moves_per_batch or MOVES_PER_REFRESHMENT)
            self.momenta = self._normal().mul_(math.sqrt(1 - persistence**2)).add_(self.momenta, alpha=persistence)
        self._moves += 1
        stride = (self.log_step.exp() * self.scale).to(self.scale.dtype)
        momenta = self.momenta.addcmul(stride, self.gradients, value=-0.5)
        positions = self.positions.addcmul(stride, momenta)
        energies, potentials, gradients = self.posterior.evaluate(positions, self.batch)
        momenta.addcmul_(stride, gradients, value=-0.5)
        work = potentials - self.potentials + (_kinetic(momenta) - _kinetic(self.momenta))
        work = torch.where(work.isnan(), torch.inf, work)
        acceptance = torch.exp(-work.clamp(min=0))
        self.thresholds += self.host.uniform(0, THRESHOLD_DRIFT)
        self.thresholds = torch.where(self.thresholds > 1, self.thresholds - 2, self.thresholds)
        accepted = self.thresholds.abs() < acceptance
        self.thresholds = torch.where(accepted, self.thresholds * work.exp(), self.thresholds)
        # On a CPU only the few rows that are refused are written; elsewhere to ask for them would be to wait.
        refused = (~accepted).nonzero().flatten().tolist() if accepted.device.type == "cpu" else None
        self.positions = _chosen(accepted, refused, positions, self.positions)
        self.momenta = _chosen(accepted, refused, momenta, self.momenta, sign=-1)
        self.gradients = _chosen(accepted, refused, gradients, self.gradients)
        self.energies = torch.where(accepted, energies, self.energies)
        self.potentials = torch.where(accepted, potentials, self.potentials)
        return acceptance, accepted

    def _normal(self) -> Tensor:
        noise = torch.empty_like(self.positions)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def _first_step(self) -> float:
        """One over the root of the largest scaled curvature by power iteration on gradients, median over chains."""
        directions = self._normal()
        curvatures = directions.new_ones(len(directions), 1)
        for _ in range(POWER_ITERATIONS):
            reach = 1 / (curvatures.sqrt() * directions.norm(dim=1, keepdim=True))
            _, _, moved = self.posterior.evaluate(self.positions + reach * self.scale * directions, self.batch)
            changes = (moved - self.gradients) * self.scale * curvatures.sqrt()
            sizes = changes.norm(dim=1, keepdim=True)
            found = sizes.isfinite() & (sizes > 0)
            directions = torch.where(found, changes, directions)
            curvatures = torch.where(found, sizes, curvatures)
        return 1 / math.sqrt(float(curvatures.median()))


def _chosen(accepted: Tensor, refused: list[int] | None, proposed: Tensor, current: Tensor, sign: int = 1) -> Tensor:
    """The rows proposed where accepted, else ``sign`` times the current ones; may overwrite ``proposed``."""
    if refused is None:
        return torch.where(accepted[:, None], proposed, sign * current)
    for row in refused:
        torch.mul(current[row], sign, out=proposed[row])
    return proposed


def _kinetic(momenta: Tensor) -> Tensor:
    return torch.linalg.vecdot(momenta, momenta).double() / 2


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
