"""The second stage of acceptance: what minibatches cannot show of the loss decides, now and then, on the moves since.

Delayed acceptance (Christen & Fox 2005, "Markov chain Monte Carlo using an approximation"): moves are made, and
accepted, on a cheap potential. What it lacks, here the nonlinear misfit, is looked at after a segment of such moves,
and Metropolis' rule takes the segment as a whole or goes back to where it began.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from phasewatch.llc.leapfrog import State
from phasewatch.llc.posterior import LocalizedPosterior

MOVES_PER_COST = 2
"""A segment has at least so many moves for each gradient that the look costs, which is then a third of what is spent at
most. Chosen."""
ENOUGH_TESTS = 5
"""Tests after which it is said whether the nonlinear misfit is negligible, and whether minibatches will do. Chosen."""
NEGLIGIBLE = 1e-3
"""In nats: a nonlinear misfit that was never larger so far is not looked at again (chains are near w* and hot then).
Chosen: nothing that lambda is asked for depends on a thousandth of a nat."""


class SecondStage:
    """The segment of moves that is under way, and what became of those before.

    Attributes:
        nonlinear_misfit: Times nbeta, where the segment began, shape ``(chains,)``.
        dwells: Batches that it has lasted for.
        tests: Number of segments decided on.
        accepted: How many of them Metropolis' rule accepted, shape ``(chains,)``.
        binding: Whether it is obeyed. Early in burn-in a chain that is still far out must not be held there by what the
            moves do not see.
    """

    def __init__(self, posterior: LocalizedPosterior, state: State) -> None:
        """Nothing has been tested yet."""
        self.binding = False
        self._posterior = posterior
        self._largest = state.potentials.new_zeros(())
        self.count_anew(state)
        self.begin(state, torch.zeros_like(state.potentials))

    @property
    def acceptance(self) -> float:
        """Share of the segments accepted, over all chains; 1 where none was tested."""
        return float(self.accepted.mean()) / self.tests if self.tests else 1.0

    def count_anew(self, state: State) -> None:
        """Forget how many segments were tested and accepted."""
        self.tests, self.accepted = 0, torch.zeros_like(state.potentials)

    def begin(self, state: State, nonlinear_misfit: Tensor) -> None:
        """A segment begins here."""
        self.nonlinear_misfit = nonlinear_misfit
        self.dwells = 0
        self._start = (state.positions, state.momenta)

    def is_due(self, moves_per_batch: int) -> bool:
        """Whether the segment has lasted long enough for what a look costs."""
        cost = self._posterior.cost_of_nonlinear_misfit
        return cost > 0 and self.dwells * moves_per_batch >= cost * MOVES_PER_COST

    def test(self, state: State, random: np.random.Generator) -> tuple[State, Tensor, Tensor]:
        r"""Decide on the segment: with probability :math:`\min(1, e^{-(B' - B)})`, B the nonlinear misfit times nbeta.

        Returns:
            Where the chains go on from, with the momentum of the beginning reversed where the segment is refused;
            which did not go back; and B there. Gradients and potentials of the state are those from before.
        """
        there = self._posterior.nonlinear_misfit(state.positions)
        nats = torch.as_tensor(random.exponential(size=len(there)), device=there.device)
        taken = there - self.nonlinear_misfit <= nats
        self.accepted += taken
        taken |= torch.as_tensor(not self.binding, device=taken.device)
        row = taken[:, None]
        state = state._replace(
            positions=torch.where(row, state.positions, self._start[0]),
            momenta=torch.where(row, state.momenta, -self._start[1]),
        )
        self.tests += 1
        self._largest = torch.maximum(self._largest, there.abs().nan_to_num(torch.inf).max())
        if self.tests == ENOUGH_TESTS and self._largest < NEGLIGIBLE:
            self._posterior.ignore_nonlinear_misfit()
            there = torch.zeros_like(there)
        return state, taken, torch.where(taken, there, self.nonlinear_misfit)

    def rearrange(self, rows: Tensor) -> None:
        """The chains go on from where those in ``rows`` are."""
        self.nonlinear_misfit = self.nonlinear_misfit[rows]
        self._start = (self._start[0][rows], self._start[1][rows])
