"""How burn-in sets the sampler up: step size by acceptance, masses by forces, friction by heating.

Chains start at w* and first spread at a lower nbeta; where that is done the masses are set. One that is stuck when
burn-in ends goes on from where another is. Where minibatches turn out not to do, all begins anew on the whole probe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phasewatch.llc.chains import MOVES_PER_REFRESHMENT, Chains
from phasewatch.llc.second_stage import ENOUGH_TESTS

TARGET_ACCEPTANCE = 0.95
"""Share of the steps that is to be accepted: a refusal reverses a momentum that is meant to last. Chosen, far above the
two thirds that suit momenta drawn anew (Beskos et al. 2013, "Optimal tuning of the hybrid Monte Carlo algorithm")."""
RATE, DECAY = 1.5, 0.6
"""Move k of burn-in changes log(step) by ``RATE * k ** -DECAY`` times the error (Robbins & Monro 1951, "A stochastic
approximation method"); a decay between a half and 1 converges. Both chosen."""
MASSES_AT = 1 / 3
"""Share of burn-in after which the masses are set. Chosen."""
SPREADING = 4.0
"""Until then nbeta is less by this factor: chains that start at one point spread over its flat directions sooner. With
16 weak modes took long to come back."""
MOVES_OF_SPREADING = 60
"""Moves of burn-in needed per unit of that factor, or it is less: a short one could not cool the chains again. Chosen:
it takes 240 of them to have all of it."""
CURVATURE_FLOOR = 0.1
"""Added to the curvatures of the masses, in units of their mean: few draws underestimate small ones. Chosen."""
POWER_ITERATIONS = 5
"""Gradients that the first step size is given; burn-in corrects what they leave. Chosen."""
MOST_HEATING = 0.1
"""Share of nbeta L that may come from the change of batches before the friction grows. Chosen: it is taken off and a
tenth of it counts as error (``HEATING_ERROR``), a hundredth of nbeta L at most."""
HEATING_CHECKS = 8
"""Times that it is looked at once the masses are set. Chosen."""
LEAST_ACCEPTANCE_OF_SEGMENTS = 0.85
"""Where the second stage accepts less, every move sees the whole probe, if that can be paid for. Chosen."""
LEAST_BURN_IN = 10
"""Moves of burn-in on the whole probe at least. Chosen."""
LEAST_ACCEPTANCE = 0.5
"""A chain that accepts fewer steps than this at the end of burn-in, where the target is .95, is stuck. Chosen."""


@dataclass(frozen=True)
class Plan:
    """What burn-in is to do.

    Attributes:
        gradients: How many to spend, each chain.
        free_path: Moves that a momentum is to last.
        whole_probe_allowed: Whether every move may see the whole probe, where minibatches do not do.
    """

    gradients: int
    free_path: float
    whole_probe_allowed: bool


def set_up(chains: Chains, plan: Plan) -> float:
    """Burn in; returns the gradients spent, some more than planned where it had to begin anew."""
    nbeta = chains.posterior.nbeta
    chains.persistence = 1 - 1 / plan.free_path
    first = _SetUp(chains, plan.gradients, plan.whole_probe_allowed)
    if first.run(nbeta):
        return first.spent
    count = chains.posterior.objective.num_batches
    chains.restart_on_whole_probe(1 - 1 / max(2.0, plan.free_path / count))
    again = _SetUp(chains, max(plan.gradients - int(first.spent), LEAST_BURN_IN * count), whole_probe_allowed=False)
    again.run(nbeta)
    return first.spent + again.spent


class _SetUp:
    """One burn-in, from w* to chains that are ready."""

    def __init__(self, chains: Chains, gradients: int, whole_probe_allowed: bool) -> None:
        self.chains = chains
        self.spent = 0.0
        self._gradients = gradients
        self._whole_probe_allowed = whole_probe_allowed

    def run(self, nbeta: float) -> bool:
        """Whether the chains are ready; else minibatches do not do."""
        chains = self.chains
        spreading = min(SPREADING, max(1.0, self._gradients / chains.cost_of_move / MOVES_OF_SPREADING))
        chains.set_nbeta(nbeta / spreading)
        squared_forces = self._spread_out(spreading)
        if squared_forces is None:
            return False
        chains.set_nbeta(nbeta)
        chains.scale = scale_from_forces(squared_forces + chains.posterior.localization)
        return self._settle()

    def _spread_out(self, spreading: float) -> Tensor | None:
        """Move while it is hot; None if minibatches do not do, else the mean squared forces for when it is not."""
        step = StepSize(self.chains)
        squared_forces, forces = torch.zeros_like(self.chains.scale), 0
        while self.spent < self._masses_at:
            if not self._go_on(step)[1]:
                return None
            squared_forces += self.chains.state.gradients.square().mean(dim=0)
            forces += 1
        return spreading * squared_forces / forces

    def _settle(self) -> bool:
        """Move at the temperature wanted, with masses; whether minibatches do."""
        chains, rest = self.chains, self._gradients - self._masses_at
        step = StepSize(chains)
        checks = [self._masses_at + rest * (k + 1) // HEATING_CHECKS for k in range(HEATING_CHECKS)]
        late = self._masses_at + rest // 2
        late_steps, late_moves = torch.zeros_like(chains.log_step), 0
        late_acceptances: list[Tensor] = []
        chains.jumps = []
        energies: list[Tensor] = []
        while self.spent < self._gradients:
            acceptance, will_do = self._go_on(step)
            if acceptance is not None and self.spent >= late:
                late_acceptances.append(acceptance)
            if not will_do:
                return False
            if self.spent >= late:
                chains.second_stage.binding = True
                late_steps += chains.log_step
                late_moves += 1
            energies.append(chains.state.energies)
            if self.spent >= checks[0]:
                checks = [check for check in checks if check > self.spent]
                mean = float(torch.stack(energies).mean())
                if chains.jumps and not limit_heating(chains, mean, self._may_take_whole_probe):
                    return False
                chains.jumps, energies = [], []
        chains.log_step = late_steps / late_moves
        if late_acceptances:
            free_stuck_chains(chains, torch.stack(late_acceptances).mean(dim=0))
        return True

    def _go_on(self, step: StepSize) -> tuple[Tensor | None, bool]:
        """The acceptance of a move, if one was made, and whether minibatches still will do."""
        advance = self.chains.advance()
        self.spent += advance.cost
        if advance.acceptance is not None:
            step.adapt(advance.acceptance)
        stage = self.chains.second_stage
        misses_much = advance.tested and stage.tests >= ENOUGH_TESTS and stage.acceptance < LEAST_ACCEPTANCE_OF_SEGMENTS
        return advance.acceptance, not (misses_much and self._may_take_whole_probe)

    @property
    def _masses_at(self) -> int:
        return int(MASSES_AT * self._gradients)

    @property
    def _may_take_whole_probe(self) -> bool:
        return self._whole_probe_allowed and self.chains.batch is not None


class StepSize:
    """The step size of the chains, one for all, as the moves of a stretch set it."""

    def __init__(self, chains: Chains) -> None:
        """Begin with what the largest curvature allows."""
        self._chains = chains
        self._moves = 0
        chains.log_step.fill_(math.log(first_step(chains)))

    def adapt(self, acceptance: Tensor) -> None:
        r"""At move k, :math:`\log\epsilon \leftarrow \log\epsilon + c k^{-\kappa} (\bar a - a^*)` (Robbins-Monro).

        Args:
            acceptance: Metropolis' probabilities, shape ``(chains,)``.
        """
        self._moves += 1
        change = RATE * self._moves**-DECAY
        self._chains.log_step += change * (acceptance.mean() - TARGET_ACCEPTANCE)


def first_step(chains: Chains) -> float:
    """One over the root of the largest scaled curvature by power iteration on gradients, median over chains."""
    directions = chains.noise_like(chains.state.positions)
    curvatures = directions.new_ones(len(directions), 1)
    for _ in range(POWER_ITERATIONS):
        reach = 1 / (curvatures.sqrt() * directions.norm(dim=1, keepdim=True))
        _, _, moved = chains.evaluate(chains.state.positions + reach * chains.scale * directions)
        changes = (moved - chains.state.gradients) * chains.scale * curvatures.sqrt()
        sizes = changes.norm(dim=1, keepdim=True)
        found = sizes.isfinite() & (sizes > 0)
        directions = torch.where(found, changes, directions)
        curvatures = torch.where(found, sizes, curvatures)
    return 1 / math.sqrt(float(curvatures.median()))


def scale_from_forces(curvatures: Tensor) -> Tensor:
    """One over the roots of the masses: of the curvatures along parameters, and a floor.

    At equilibrium the mean squared force is the diagonal of the mean Hessian of the potential (by parts: the mean of
    (dU)^2 under exp(-U) is that of d^2 U).

    Args:
        curvatures: Mean squared forces at the temperature wanted, shape ``(num_parameters,)``.
    """
    return (curvatures + CURVATURE_FLOOR * curvatures.mean()).rsqrt()


def limit_heating(chains: Chains, energy: float, whole_probe_allowed: bool) -> bool:
    """More friction where the change of batches heats the chains, then shorter dwells; False if it gives up.

    Args:
        chains: With the jumps since the last look.
        energy: Mean of nbeta L since then.
        whole_probe_allowed: Whether to give up where friction alone does not help.
    """
    share = float(np.mean(chains.heating()[0])) / max(energy, 1.0)
    if not share > MOST_HEATING:
        return True
    drained = chains.drained()
    if drained * MOVES_PER_REFRESHMENT < 1:
        wanted = min(1.0, drained * MOVES_PER_REFRESHMENT * share / MOST_HEATING)
        chains.persistence = (1 - wanted) ** (0.5 / MOVES_PER_REFRESHMENT)
    elif whole_probe_allowed:
        return False
    elif chains.moves_per_batch is not None:
        chains.moves_per_batch = max(1, chains.moves_per_batch // 2)
    return True


def free_stuck_chains(chains: Chains, acceptance: Tensor) -> None:
    """Chains that the hot start left where the loss is too steep for the step go on from where others are.

    Args:
        chains: The chains.
        acceptance: The mean of each over the end of burn-in, shape ``(chains,)``.
    """
    stuck = (acceptance < LEAST_ACCEPTANCE).cpu().numpy()
    if stuck.any() and not stuck.all():
        source = np.arange(len(stuck))
        source[stuck] = chains.random.choice(source[~stuck], size=int(stuck.sum()))
        chains.rearrange(source)
