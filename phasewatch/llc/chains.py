"""Chains that move together on one minibatch after another, with the step, masses and friction that they are given."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.llc.diagnostics import FloatArray
from phasewatch.llc.leapfrog import THRESHOLD_DRIFT, State, refresh, update
from phasewatch.llc.minibatches import balanced_batches, heating, variance_over_batches
from phasewatch.llc.posterior import LocalizedPosterior
from phasewatch.llc.second_stage import SecondStage

MOVES_PER_BATCH = 16
"""How long chains dwell on a batch: its change, one gradient, is then a seventeenth of what is spent. Chosen."""
MOVES_PER_REFRESHMENT = 4
"""The momentum is refreshed by as much as for so many moves at once, as noise costs as much as arithmetic. Chosen."""


class Advance(NamedTuple):
    """What came of going on by a move or a change of the batch.

    Attributes:
        cost: In gradients a chain.
        acceptance: Metropolis' probability of the move, shape ``(chains,)``; None where the batch was changed.
        accepted: Whether it was taken, likewise.
        tested: Whether the second stage has decided.
    """

    cost: float
    acceptance: Tensor | None = None
    accepted: Tensor | None = None
    tested: bool = False


class Chains:
    """All chains at w*, at rest on the first batch; and what sets how they move.

    Attributes:
        posterior: What they sample.
        random: For the order of batches and what decides on acceptance.
        state: Where they are.
        batch: The batch that they see, None for all of them at a time.
        log_step: Logarithm of the step size, a scalar in float64.
        scale: One over the root of the masses, shape ``(num_parameters,)``.
        persistence: Share of the momentum that lasts a move.
        moves_per_batch: How long they dwell on a batch; None where there is no other.
        second_stage: What decides on segments of moves.
        jumps: Change of the potential, in time, with each change of batch; NaN where the chain had gone back.
    """

    def __init__(self, posterior: LocalizedPosterior, seeds: list[np.random.SeedSequence]) -> None:
        """Stand at w*.

        Args:
            posterior: What to sample.
            seeds: One for each chain.
        """
        center = posterior.center
        self.posterior = posterior
        self._generators = [
            torch.Generator(center.device).manual_seed(int(one.generate_state(1, np.uint64)[0] >> 1)) for one in seeds
        ]
        self.random = np.random.default_rng(seeds[0].spawn(1)[0])
        self._order = balanced_batches(posterior.objective.batch_weights, self.random)
        self.batch: int | None = next(self._order)
        self.scale = torch.ones_like(center)
        self.log_step = torch.zeros((), device=center.device, dtype=torch.float64)
        self.persistence = 0.0
        self.moves_per_batch = MOVES_PER_BATCH if posterior.objective.num_batches > 1 else None
        self.jumps: list[Tensor] = []
        self._moves = 0
        positions = center.repeat(len(seeds), 1)
        energies, potentials, gradients = posterior.evaluate(positions, self.batch)
        thresholds = torch.as_tensor(self.random.uniform(-1, 1, len(seeds)), device=center.device)
        self.state = State(positions, self.noise_like(positions), gradients, energies, potentials, thresholds)
        self.second_stage = SecondStage(posterior, self.state)

    @property
    def cost_of_move(self) -> int:
        """In gradients a chain."""
        return self.posterior.objective.num_batches if self.batch is None else 1

    @property
    def energies(self) -> Tensor:
        """Nbeta (L - L(w*)) as far as it is known, shape ``(chains,)``."""
        return self.state.energies + self.second_stage.nonlinear_misfit

    def advance(self) -> Advance:
        """Go on by a move, or with the next batch where this one has served."""
        if self.moves_per_batch is not None and self._moves >= self.moves_per_batch:
            return self._change_batch()
        moves = self._moves_per_refreshment
        if self._moves % MOVES_PER_REFRESHMENT == 0:
            self.state = refresh(self.state, self.noise_like(self.state.positions), self.persistence**moves)
        self._moves += 1
        stride = (self.log_step.exp() * self.scale).to(self.scale.dtype)
        self.state, acceptance, accepted = update(
            self.state, self.evaluate, stride, self.random.uniform(0, THRESHOLD_DRIFT)
        )
        return Advance(self.cost_of_move, acceptance, accepted)

    def _change_batch(self) -> Advance:
        spent, before, tested = 1.0, self.state.potentials, False
        self.second_stage.dwells += 1
        if self.second_stage.is_due(MOVES_PER_BATCH):
            spent += self.posterior.cost_of_nonlinear_misfit
            tested = True
            self.state, taken, nonlinear_misfit = self.second_stage.test(self.state, self.random)
            before = torch.where(taken, before, torch.nan)
        self.batch = next(self._order)
        self._look()
        if tested:
            self.second_stage.begin(self.state, nonlinear_misfit)
        self._moves = 0
        self.jumps.append(self.state.potentials - before)
        return Advance(spent, tested=tested)

    def set_nbeta(self, nbeta: float) -> None:
        """Sample at another temperature from here."""
        self.posterior.nbeta = nbeta
        self._look()
        positions, whole = self.state.positions, self.batch is None
        nothing = torch.zeros_like(self.state.potentials)
        self.second_stage.begin(self.state, nothing if whole else self.posterior.nonlinear_misfit(positions))

    def restart_on_whole_probe(self, persistence: float) -> None:
        """Stand at w* again, and from now on see all batches at every move."""
        self.moves_per_batch, self.batch = None, None
        self.persistence = persistence
        self.scale = torch.ones_like(self.scale)
        self.state = self.state._replace(positions=self.posterior.center.repeat(len(self.state.positions), 1))

    def rearrange(self, source: NDArray[np.int64]) -> None:
        """Let each chain go on from where the one in ``source`` is; its thresholds remain its own."""
        rows = torch.as_tensor(source, device=self.state.positions.device)
        moved = State(*(of_all[rows] for of_all in self.state))
        self.state = moved._replace(thresholds=self.state.thresholds)
        self.second_stage.rearrange(rows)

    def evaluate(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Energies, potentials and gradients, as the batch shows them."""
        return self.posterior.evaluate(positions, self.batch)

    def noise_like(self, positions: Tensor) -> Tensor:
        """Standard normal numbers, for each chain from a generator of its own."""
        noise = torch.empty_like(positions)
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def drained(self) -> float:
        """Share of the surplus of kinetic energy that refreshment takes away per move."""
        moves = self._moves_per_refreshment
        return (1 - self.persistence ** (2 * moves)) / moves

    def heating(self) -> tuple[FloatArray, FloatArray]:
        """What the jumps so far have added to nbeta L, chain by chain, with its standard error."""
        if not self.jumps or self.moves_per_batch is None:
            return np.zeros(len(self.state.positions)), np.zeros(len(self.state.positions))
        return heating(self.jumps, self.moves_per_batch * self.drained())

    def variance_over_batches(self) -> FloatArray:
        """See :func:`phasewatch.llc.minibatches.variance_over_batches`; 0 where no batch was changed."""
        return variance_over_batches(self.jumps) if self.jumps else np.zeros(len(self.state.positions))

    @property
    def _moves_per_refreshment(self) -> int:
        return min(MOVES_PER_REFRESHMENT, self.moves_per_batch or MOVES_PER_REFRESHMENT)

    def _look(self) -> None:
        """See what the batch says of where the chains are."""
        energies, potentials, gradients = self.evaluate(self.state.positions)
        self.state = self.state._replace(energies=energies, potentials=potentials, gradients=gradients)
