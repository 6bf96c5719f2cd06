"""Generalized Hamiltonian Monte Carlo on minibatches; step, masses and friction set themselves in burn-in.

A move (:mod:`phasewatch.llc.leapfrog`) is accepted or refused with the loss of one batch at both ends, so that the step
size biases nothing. A batch serves several moves. The energy that comes in when the next takes over would heat the
chains; the friction is set to drain it, and what it leaves is known, since what comes in is measured
(:mod:`phasewatch.llc.minibatches`). What no batch can show decides once in a while on the moves since
(:mod:`phasewatch.llc.second_stage`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phasewatch.llc.adaptation import Plan, set_up
from phasewatch.llc.chains import Chains
from phasewatch.llc.fluctuations import SampleLosses
from phasewatch.llc.posterior import LOSS_PER_GRADIENT, LocalizedPosterior

FREE_PATH, FREE_PATHS = 100, 20
"""Momentum lasts this many moves, or less where the draws are fewer than so many times that. Chosen."""
LEAST_MOVES = 50
"""Every move may see the whole probe if so many can be paid for. Chosen."""
LEAST_DRAWS = 4
"""What split R-hat takes: two in each half of a chain."""
DRAWS_PER_POSITION = 16
"""Distances and losses of single samples are noted at every 16th draw, as long as chains dwell on a batch."""
CHAINS_AT_ONCE_BELOW = {"cpu": 20_000, "cuda": 2_000_000}
"""Parameters up to which all chains are evaluated in one call; larger nets hold one chain at a time. Chosen, for
the memory of the gradients of some chains."""


@dataclass(frozen=True)
class Draws:
    """What the chains saw after burn-in.

    Attributes:
        energies: nbeta (L_b(w_t) - L_b(w*)) on the batch b of each draw, its slope at w* replaced by that of all
            batches; shape ``(chains, draws)``.
        squared_distances: Of every 16th draw from w*, shape ``(chains, ...)``.
        squared_distances_by_tensor: Their parts, one a parameter tensor; shape ``(chains, ..., tensors)``.
        virials: (w - w*) . grad U of the same draws, shape ``(chains, ...)``. U is what their batch says of it and the
            nonlinear misfit, which is taken to be quadratic.
        acceptance: Share of accepted moves, shape ``(chains,)``.
        second_stage_acceptance: Share of the segments of moves that were accepted when the nonlinear misfit was looked
            at, shape ``(chains,)``; 1 where there is no need to look, NaN where there was need and no occasion.
        heating: What the change of batches adds to nbeta L, shape ``(chains,)``.
        heating_error: Its standard error, same shape.
        batch_variance: Variance of nbeta L at one position over the batches, shape ``(chains,)``; rather too large, as
            the chains settle on each.
        step_size: The frozen step, in units of the preconditioner, mean over the chains.
    """

    energies: NDArray[np.float64]
    squared_distances: NDArray[np.float64]
    squared_distances_by_tensor: NDArray[np.float64]
    virials: NDArray[np.float64]
    acceptance: NDArray[np.float64]
    second_stage_acceptance: NDArray[np.float64]
    heating: NDArray[np.float64]
    heating_error: NDArray[np.float64]
    batch_variance: NDArray[np.float64]
    step_size: float


def sample_hmc(
    posterior: LocalizedPosterior, *, chains: int, draws: int, burn_in: int, seed: int
) -> tuple[Draws, SampleLosses]:
    """Run all chains from w*: ``burn_in`` gradients each that set the sampler up, then ``draws`` with it frozen.

    Args:
        posterior: What to sample.
        chains: Number of chains.
        draws: Draws a chain, one minibatch gradient each.
        burn_in: Minibatch gradients a chain before them.
        seed: Seeds one generator a chain and the order of the batches.

    Returns:
        The draws, and the losses of single samples at every 16th of them.
    """
    seeds = np.random.SeedSequence(seed).spawn(chains)
    at_once = posterior.center.numel() <= CHAINS_AT_ONCE_BELOW.get(posterior.center.device.type, 0)
    sample_losses = SampleLosses(posterior.objective)
    plan = Plan(
        gradients=burn_in,
        free_path=min(FREE_PATH, max(2.0, draws / FREE_PATHS)),
        whole_probe_allowed=burn_in + draws >= LEAST_MOVES * posterior.objective.num_batches,
    )
    blocks = [
        _run(Chains(posterior, block), plan, draws, sample_losses)
        for block in ([seeds] if at_once else [[one] for one in seeds])
    ]
    return _together(blocks), sample_losses


def _run(chains: Chains, plan: Plan, draws: int, sample_losses: SampleLosses) -> Draws:
    """Burn in, then draw until as many gradients are spent as there are to be draws, and what burn-in overspent."""
    spent = max(0.0, set_up(chains, plan) - plan.gradients)
    energies: list[Tensor] = []
    squared_distances: list[Tensor] = []
    by_tensor: list[Tensor] = []
    virials: list[Tensor] = []
    accepted, moves = torch.zeros_like(chains.state.potentials), 0
    chains.jumps = []
    chains.second_stage.count_anew(chains.state)
    while spent < draws or len(energies) < LEAST_DRAWS:
        advance = chains.advance()
        spent += advance.cost
        if advance.accepted is not None:
            accepted += advance.accepted
            moves += 1
        if len(energies) % DRAWS_PER_POSITION == 0:
            spent += _note_sample_losses(chains, sample_losses)
            displacements = chains.state.positions - chains.posterior.center
            squares = displacements.square()
            squared_distances.append(squares.sum(dim=1))
            by_tensor.append(_by_tensor(squares, chains.posterior))
            along = torch.linalg.vecdot(displacements, chains.state.gradients).double()
            virials.append(along + 2 * chains.second_stage.nonlinear_misfit)
        energies.append(chains.energies)
    heating, heating_error = chains.heating()
    return Draws(
        energies=_columns(energies),
        squared_distances=_columns(squared_distances),
        squared_distances_by_tensor=_columns(by_tensor),
        virials=_columns(virials),
        acceptance=accepted.cpu().numpy() / moves,
        second_stage_acceptance=_second_stage_acceptance(chains),
        heating=heating,
        heating_error=heating_error,
        batch_variance=chains.variance_over_batches(),
        step_size=float(chains.log_step.exp()),
    )


def _together(blocks: list[Draws]) -> Draws:
    """Of chains that ran one after another: as many draws of each as the shortest has."""
    shortest = min(block.energies.shape[1] for block in blocks)
    fewest = min(block.squared_distances.shape[1] for block in blocks)
    return Draws(
        energies=np.concatenate([block.energies[:, :shortest] for block in blocks]),
        squared_distances=np.concatenate([block.squared_distances[:, :fewest] for block in blocks]),
        squared_distances_by_tensor=np.concatenate([b.squared_distances_by_tensor[:, :fewest] for b in blocks]),
        virials=np.concatenate([block.virials[:, :fewest] for block in blocks]),
        acceptance=np.concatenate([block.acceptance for block in blocks]),
        second_stage_acceptance=np.concatenate([block.second_stage_acceptance for block in blocks]),
        heating=np.concatenate([block.heating for block in blocks]),
        heating_error=np.concatenate([block.heating_error for block in blocks]),
        batch_variance=np.concatenate([block.batch_variance for block in blocks]),
        step_size=float(np.mean([block.step_size for block in blocks])),
    )


def _note_sample_losses(chains: Chains, sample_losses: SampleLosses) -> float:
    """What that costs, in gradients a chain."""
    posterior, positions = chains.posterior, chains.state.positions
    batches = range(posterior.objective.num_batches) if chains.batch is None else [chains.batch]
    evaluated = sum(sample_losses.add(positions, batch) for batch in batches)
    posterior.gradients += evaluated * LOSS_PER_GRADIENT
    return evaluated / len(positions) * LOSS_PER_GRADIENT


def _second_stage_acceptance(chains: Chains) -> NDArray[np.float64]:
    stage = chains.second_stage
    if stage.tests:
        return (stage.accepted / stage.tests).cpu().numpy()
    missed = chains.batch is not None and chains.posterior.cost_of_nonlinear_misfit > 0
    return np.full(len(chains.state.positions), math.nan if missed else 1.0)


def _by_tensor(values: Tensor, posterior: LocalizedPosterior) -> Tensor:
    """Sums over each parameter tensor, from shape ``(chains, num_parameters)`` to ``(chains, tensors)``."""
    sizes = [shape.numel() for shape in posterior.objective.parameter_shapes.values()]
    return torch.stack([piece.double().sum(dim=1) for piece in values.split(sizes, dim=1)], dim=1)


def _columns(of_draws: list[Tensor]) -> NDArray[np.float64]:
    """One row a chain."""
    found: NDArray[np.float64] = torch.stack(of_draws, dim=1).cpu().numpy()
    return found
