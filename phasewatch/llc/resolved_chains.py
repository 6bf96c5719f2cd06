"""Chains that stay with a function: Hamiltonian Monte Carlo at a stated mean divergence from it.

The density is exp(-nbeta D(w)) times a Gaussian around w*, with D the divergence of the network's function from the one
at w*. The mean of D is given, and nbeta is found. For each resolution this takes four steps.

1. The start. Chains are put where a narrow Gaussian around w* says. The forces on them show the curvature, the Gaussian
   takes its shape, and its temperature changes until the divergence is the one wanted.
2. Free moves. Every step is taken, as a refusal would reverse the momentum and a chain that often turns round does not
   get far. The masses follow the forces, and nbeta follows the divergence.
3. Metropolis' rule decides from here on; nbeta and step size settle, and nbeta is then fixed.
4. Draws.

In units of the prior's spread and of the masses every direction has a curvature of about 1, so that one length of path
serves all. Every move sees all batches, so that nothing has to be corrected afterwards. A step to where the divergence
is beyond a bound is refused: a chain cannot leave for the plateau where the network does nothing.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from phasewatch.llc.diagnostics import FloatArray
from phasewatch.llc.factored_curvature import FactoredCurvature
from phasewatch.llc.hmc import CHAINS_AT_ONCE_BELOW
from phasewatch.llc.leapfrog import THRESHOLD_DRIFT
from phasewatch.llc.preconditioned_leapfrog import Masses, State, chosen, leap, state_at
from phasewatch.objective import Objective

FURTHEST, FURTHEST_NATS = 5.0, 10.0
"""The bound is so many resolutions, and so many units of 1 / nbeta: for the gamma law that nbeta D has in a quadratic
well it cuts off less than 1e-6 at any number of dimensions."""
LEAST_LOOKS, MOST_LOOKS, CLEARLY = 16, 256, 4.0
"""Draws from the prior, at least and at most, on whose mean divergence it rests that there is nothing to sample; it is
clear where it is so many standard errors from the resolution. Chosen. Where the divergence has no scale (a² b²) most
draws are near and few carry the mean."""
NEAR, ROUNDS_NEAR, MOST_ROUNDS = 1.5, 4, 50
"""The Gaussian is narrow enough after so many rounds in which its divergence was below so many resolutions; no more
rounds than the third. Chosen."""
COOLING = (0.5, 4.0)
"""Factors on nbeta from one round to the next, at least and at most. Chosen."""
PATH = 2.0
"""Momentum lasts so long, in units of the prior and the masses, in which a direction of curvature 1 has period 2 pi.
Chosen, as about a third of that."""
FIRST_STEP, LARGEST_STEP = 0.25, 0.6
"""In those units a step of 2 would be unstable (the leapfrog's bound for curvature 1). Chosen far below."""
FREE, LONGEST, SPREAD_OUT = 2 / 3, 4, 0.9
"""Share of the set-up in which every move is taken; up to so many times as many while the virial, 1 at equilibrium, is
below the third. Chosen."""
FREE_ACCEPTANCE, TARGET_ACCEPTANCE = 0.7, 0.95
"""Acceptance that the step size aims at while the chains move freely, when no step is refused, and after that.
Chosen."""
FREE_RATE, RATE = 0.3, 0.15
"""Change of log(step) per move and unit of acceptance, while the chains move freely and after that. Chosen."""
ADAPTS = 20
"""The latter is halved after so many draws, a third of it is left after twice as many, and so on: by less and less, so
that the draws tend to the density (Roberts & Rosenthal 2007, "Coupling and ergodicity of adaptive MCMC"). Chosen."""
FOLLOWING, FASTEST, SETTLING = 0.3, 0.1, 0.02
"""Change of log(nbeta) in a move, per relative excess of the divergence; its largest at first, and in the end.
Chosen."""
FIRST_MASSES, MASSES_AGAIN = 10, 1.5
"""The masses are taken from the forces after so many moves, and whenever there are so many times as many. Chosen."""
DRAWS_PER_POSITION = 8
"""Distances and virials are noted at every 8th draw: they change as slowly as positions do. Chosen."""
DRAWN_AHEAD, MOST_AHEAD = 2**17, 16
"""Numbers of noise that are drawn together, and moves that they are for at most: in a small network each call costs as
much as the arithmetic of a move. Chosen."""


@dataclass(frozen=True)
class Draws:
    """What the chains saw at one resolution.

    Attributes:
        nbeta: The inverse temperature.
        divergences: D of each draw, shape ``(chains, draws)``.
        squared_distances: From w* in units of the spread, of the first and each 8th draw after it, and by tensor,
            shape ``(chains, ..., tensors)``.
        virials: Of the same draws, w - w* times the gradient of the potential per parameter, shape ``(chains, ...)``.
        positions: Where each chain stood whenever it was asked for draws, shape ``(..., num_parameters)``.
        acceptance: Share of the moves accepted.
        hits: Share of the moves that were refused for their divergence.
        step_size: In units of the spread.
    """

    nbeta: float
    divergences: FloatArray
    squared_distances: FloatArray
    virials: FloatArray
    positions: Tensor
    acceptance: float
    hits: float
    step_size: float


@dataclass(frozen=True)
class _Seen:
    """What was seen since the chains were set up, draw by draw or every 8th of them."""

    divergences: list[FloatArray] = field(default_factory=list)
    squared_distances: list[Tensor] = field(default_factory=list)
    virials: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    acceptances: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)


class ResolvedChains:
    """Chains around w*, for one resolution after another.

    While they move, positions, momenta and gradients are coordinates in the bases of the curvature, in which the masses
    are diagonal.

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
        self._state: State
        self.gradients = 0
        self._divergence, self._spread = divergence, spread
        self._generators = [
            torch.Generator(device).manual_seed(int(one.generate_state(1, np.uint64)[0] >> 1)) for one in seeds
        ]
        self._host = np.random.default_rng(seeds[0].spawn(1)[0])
        at_once = spread.numel() <= CHAINS_AT_ONCE_BELOW.get(device.type, 0)
        self._rows = [slice(None)] if at_once else [slice(k, k + 1) for k in range(chains)]
        positions = self._normal(1)[0]
        values, _ = self._evaluate(positions)
        self._at_the_prior = values.nan_to_num(torch.inf, torch.inf).cpu().numpy()
        self._far = far = float(np.sort(self._at_the_prior)[(chains - 1) // 2])
        self._nbeta_near = self._nbeta = 1 / far if 0 < far < math.inf else 1.0
        self._reach = 1.0
        self._near = FactoredCurvature(list(divergence.parameter_shapes.values()), spread)
        # Uniform on (-1, 1); its absolute value decides, its sign is the direction in which that moves.
        self._thresholds = self._host.uniform(-1, 1, chains)
        self._log_step = 0.0
        self._bound = math.inf
        self._seen = _Seen()
        self._ahead: list[Tensor] = []
        self._ahead_inside: list[Tensor] = []

    def prior_is_within(self, resolution: float) -> bool:
        """Whether the prior by itself is on average no further away, so that λ at this resolution is zero."""
        if self._far > resolution:
            return False
        while np.isfinite(self._at_the_prior).all():  # else nor is the mean
            values = self._at_the_prior
            mean, enough = values.mean(), len(values) >= LEAST_LOOKS
            error = values.std(ddof=1) / math.sqrt(len(values)) if enough else math.inf
            if len(values) >= MOST_LOOKS or CLEARLY * error < abs(mean - resolution):
                return bool(mean <= resolution)
            found, _ = self._evaluate(self._normal(1)[0])
            self._at_the_prior = np.concatenate([values, found.nan_to_num(torch.inf, torch.inf).cpu().numpy()])
        return False

    def begin_at_the_prior(self) -> None:
        """Stand where the prior puts them, with no masses: for seeing what a move takes before any is set up."""
        self._curvature, positions = self._near, self._normal(1)[0]
        values, gradients = self._evaluate(positions)
        self._stand(positions, torch.zeros_like(positions), gradients, values.cpu().numpy())

    def set_up(self, resolution: float, moves: int) -> None:
        """Let the chains go from near w* until the mean divergence is as given; find nbeta, masses and step size there.

        Args:
            resolution: The mean divergence wanted.
            moves: Moves of each chain to spend; some more where the chains are still spreading.
        """
        positions, values, gradients = self._approach(resolution)
        self._curvature = self._near.copy()
        self._stand(positions, self._normal(1)[0], gradients, values)
        self._log_step = math.log(FIRST_STEP)
        free = int(FREE * moves)
        masses_at: float = FIRST_MASSES
        lately = max(free // 2, 1)
        virials: deque[float] = deque(maxlen=lately)
        for move in range(LONGEST * free):
            if move >= free and (move - free) % lately == 0 and np.mean(virials) > SPREAD_OUT:
                break
            acceptance = self._step_at(resolution, free=True)
            state = self._state
            self._curvature.learn(self._curvature.out(state.gradients), self._nbeta)
            if move + 1 >= masses_at:
                vectors = state.positions, state.momenta, state.gradients
                positions, momenta, gradients = (self._curvature.out(vector) for vector in vectors)
                self._curvature.refresh(self._nbeta)
                self._stand(positions, momenta, gradients, state.values)
                masses_at *= MASSES_AGAIN
            self._follow(resolution, FASTEST if move < free // 2 else SETTLING)
            self._log_step = min(self._log_step + FREE_RATE * (acceptance - FREE_ACCEPTANCE), math.log(LARGEST_STEP))
            virials.append(float(self._virials().mean()))
        log_nbetas, log_steps = [], []
        for _ in range(moves - free):
            acceptance = self._step_at(resolution)
            self._follow(resolution, SETTLING)
            self._log_step += RATE * (acceptance - TARGET_ACCEPTANCE)
            log_nbetas.append(math.log(self._nbeta))
            log_steps.append(self._log_step)
        self._seen = _Seen()
        self._set_nbeta(math.exp(float(np.mean(log_nbetas))))
        self._log_step = float(np.mean(log_steps[len(log_steps) // 2 :]))
        self._set_bound(resolution)

    def _step_at(self, resolution: float, free: bool = False) -> float:
        """A move while nbeta is sought; its acceptance."""
        self._set_bound(resolution)
        return self._move(free)[0]

    def _set_bound(self, resolution: float) -> float:
        self._bound = FURTHEST * resolution + FURTHEST_NATS / self._nbeta
        return self._bound

    def _follow(self, resolution: float, fastest: float) -> None:
        """Change nbeta as the divergence says."""
        # One chain that is stuck far out must not drive the others.
        excess = float(np.minimum(self._state.values / resolution - 1, 1).mean())
        self._set_nbeta(self._nbeta * math.exp(min(max(FOLLOWING * excess, -fastest), fastest)))

    def _set_nbeta(self, nbeta: float) -> None:
        """With what depends on it."""
        self._nbeta, self._masses = nbeta, Masses(nbeta, self._curvature.roots(nbeta))
        self._state = self._state._replace(slopes=self._masses.slopes(self._state.positions, self._state.gradients))

    def _stand(self, positions: Tensor, momenta: Tensor, gradients: Tensor, values: FloatArray) -> None:
        """Go on from there, vectors outside of the bases, in those of the curvature as it is now."""
        positions, momenta, gradients = (self._curvature.into(v) for v in (positions, momenta, gradients))
        self._masses = Masses(self._nbeta, self._curvature.roots(self._nbeta))
        self._state = state_at(positions, momenta, gradients, values, self._masses)
        self._ahead_inside = []

    def draw(self, moves: int) -> Draws:
        """Go on at this nbeta and with these masses; the step size is changed by less and less.

        Args:
            moves: Further draws of each chain.

        Returns:
            All draws since the chains were set up.
        """
        tensors = list(self._divergence.parameter_shapes.values())
        sizes = [shape.numel() for shape in tensors]
        seen = self._seen
        for _ in range(moves):
            acceptance, outside = self._move()
            rate = RATE / (1 + len(seen.divergences) / ADAPTS)
            self._log_step += rate * (acceptance - TARGET_ACCEPTANCE)
            seen.acceptances.append(acceptance)
            seen.hits.append(outside)
            if len(seen.divergences) % DRAWS_PER_POSITION == 0:
                squares = self._state.positions.square().split(sizes, dim=1)
                summed = [square.sum(dim=1, dtype=torch.float64) for square in squares]
                seen.squared_distances.append(torch.stack(summed, dim=1))
                seen.virials.append(self._virials())
            seen.divergences.append(self._state.values)
        away = self._spread * self._curvature.out(self._state.positions)
        seen.positions.append(self._divergence.parameters + away)
        return Draws(
            nbeta=self._nbeta,
            divergences=np.stack(seen.divergences, axis=1),
            squared_distances=torch.stack(seen.squared_distances, dim=1).cpu().numpy(),
            virials=torch.stack(seen.virials, dim=1).cpu().numpy(),
            positions=torch.cat(seen.positions),
            acceptance=float(np.mean(seen.acceptances)),
            hits=float(np.mean(seen.hits)),
            step_size=math.exp(self._log_step),
        )

    def move_on(self, nbeta: float, resolution: float, moves: int) -> None:
        """Let the chains go to another nbeta; what was drawn before counts no more.

        Args:
            nbeta: The inverse temperature.
            resolution: The mean divergence wanted, for the bound.
            moves: Moves of each chain before the next draw.
        """
        self._set_nbeta(min(nbeta, self._largest_nbeta(resolution)))
        self._set_bound(resolution)
        for _ in range(moves):
            self._move()
        self._seen = _Seen()

    def _approach(self, resolution: float) -> tuple[Tensor, FloatArray, Tensor]:
        """Narrow the Gaussian around w* until the divergence of its draws is about as given.

        Returns:
            Positions to begin at, with the divergence there and its gradients.
        """
        near = 0
        for _ in range(MOST_ROUNDS):
            positions = self._reach * self._near.narrow(self._normal(1)[0], self._nbeta_near)
            values, gradients = self._evaluate(positions)
            excess = float(values.nan_to_num(torch.inf, torch.inf).median()) / resolution
            if excess == math.inf or not bool(gradients.isfinite().all()):
                self._reach /= 2
                continue
            self._near.learn(gradients, self._nbeta_near)
            self._near.refresh(self._nbeta_near)
            near += excess < NEAR
            if near == ROUNDS_NEAR:
                break
            self._nbeta_near *= min(max(excess, COOLING[0]), COOLING[1])
            self._nbeta_near = min(self._nbeta_near, self._largest_nbeta(resolution))
        self._nbeta = self._nbeta_near
        # D and its gradient are zero at w*, where a chain begins that would begin beyond the bound.
        there = values <= self._set_bound(resolution)
        positions, gradients = (torch.where(there[:, None], v, 0) for v in (positions, gradients))
        return positions, torch.where(there, values, 0).cpu().numpy(), gradients

    def _largest_nbeta(self, resolution: float) -> float:
        """Twice that of the largest coefficient where D is quadratic: half the number of parameters."""
        return self._spread.numel() / resolution

    def _evaluate(self, positions: Tensor, bases: FactoredCurvature | None = None) -> tuple[Tensor, Tensor]:
        """D, in float64, and its gradient, at places in units of the spread, from w*; both in the bases, if given."""
        self.gradients += len(positions)
        values, gradients = [], []
        for rows in self._rows:
            away = positions[rows] if bases is None else bases.out(positions[rows])
            places = torch.addcmul(self._divergence.parameters, self._spread, away)
            value, gradient = self._divergence.losses_and_gradients(places)
            values.append(value.double())
            gradient.mul_(self._spread)
            gradients.append(gradient if bases is None else bases.into(gradient))
        return (torch.cat(values), torch.cat(gradients)) if len(values) > 1 else (values[0], gradients[0])

    def _move(self, free: bool = False) -> tuple[float, float]:
        """One leapfrog step of all chains; shares of moves accepted on average, and of those that are out of bounds.

        A free move is taken wherever it does not leave the bounds, whatever its acceptance.
        """
        step = math.exp(self._log_step)
        persistence = math.exp(-step / PATH)
        momenta = self._noise().mul_(math.sqrt(1 - persistence**2)).add_(self._state.momenta, alpha=persistence)
        before = self._state._replace(momenta=momenta)
        after, work = leap(before, lambda x: self._evaluate(x, self._curvature), self._masses, step)
        outside = after.values > self._bound
        work[np.isnan(work) | outside] = np.inf
        with np.errstate(under="ignore"):
            acceptance = np.exp(-np.maximum(work, 0))
        self._thresholds = self._thresholds + self._host.uniform(0, THRESHOLD_DRIFT)
        self._thresholds[self._thresholds > 1] -= 2
        accepted = ~(outside | np.isinf(work)) if free else np.abs(self._thresholds) < acceptance
        if not free:
            self._thresholds[accepted] *= np.exp(work[accepted])
        self._state = chosen(accepted, after, before)
        return float(acceptance.mean()), float(outside.mean())

    def _virials(self) -> Tensor:
        """W - w* times the gradient of the potential, per parameter, chain by chain; its mean is 1 at equilibrium."""
        forces = torch.add(self._state.positions, self._state.gradients, alpha=self._nbeta)
        return torch.linalg.vecdot(self._state.positions, forces).double() / self._spread.numel()

    def _noise(self) -> Tensor:
        """For one move, in the bases; drawn outside of them, so that it does not depend on which they are."""
        chains, size = self._state.positions.shape
        if not self._ahead:
            self._ahead = list(self._normal(max(min(DRAWN_AHEAD // (chains * size), MOST_AHEAD), 1)))
        if not self._ahead_inside:
            self._ahead_inside = list(self._curvature.into(torch.cat(self._ahead)).split(chains))
        self._ahead.pop(0)
        return self._ahead_inside.pop(0)

    def _normal(self, moves: int) -> Tensor:
        """Shape ``(moves, chains, num_parameters)``."""
        noise = [self._spread.new_empty(moves, self._spread.numel()).normal_(generator=g) for g in self._generators]
        return torch.stack(noise, dim=1)
