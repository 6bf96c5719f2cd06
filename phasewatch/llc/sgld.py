"""Stochastic gradient Langevin dynamics whose step size sets itself and is then frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phasewatch.llc.posterior import LocalizedPosterior

POWER_ITERATIONS = 5
ADAPTATION_DECAY = 0.6
FLOOR = 0.01


@dataclass(frozen=True)
class Chains:
    """What the chains saw, after burn-in.

    Attributes:
        excess_losses: L_b(w_t) - L_b(w*) of the batch of each draw, shape ``(chains, draws)``, float64.
        descents: First-order part of nbeta times it on the full gradient, same shape.
        distances: Distance from w* at the last draw, shape ``(chains,)``.
        acceptance: Mean probability with which Metropolis' rule would have taken the steps of late burn-in.
        step_size: The frozen step in units of the preconditioned curvature.
    """

    excess_losses: np.ndarray
    descents: np.ndarray
    distances: np.ndarray
    acceptance: float
    step_size: float


def sample(
    posterior: LocalizedPosterior,
    *,
    chains: int,
    draws: int,
    burn_in: int,
    target_acceptance: float,
    momentum: float,
    precondition: bool,
    seed: int,
) -> Chains:
    sampler = _Sampler(posterior, chains, momentum, seed)
    acceptance = sampler.burn_in(burn_in, target_acceptance, precondition)
    return sampler.draw(draws, acceptance)


class _Sampler:
    def __init__(self, posterior: LocalizedPosterior, chains: int, momentum: float, seed: int) -> None:
        self.posterior = posterior
        center = posterior.center
        self.generators = [torch.Generator(center.device) for _ in range(chains)]
        seeds = np.random.SeedSequence(seed).generate_state(chains + 1)
        for generator, chain_seed in zip(self.generators, seeds[1:], strict=True):
            generator.manual_seed(int(chain_seed))
        random = np.random.default_rng(seeds[0])
        self.batches = [balanced_batches(posterior.objective.batch_weights, random) for _ in range(chains)]
        self.momentum = momentum
        self.positions = center.expand(chains, -1).clone()
        self.momenta = torch.zeros_like(self.positions)
        self.noise = torch.empty_like(center)
        self.scale = torch.ones_like(center)  # square root of the preconditioner
        self.step = 0.0  # square root of the SGLD step size
        for chain in range(chains):
            self._refresh(chain, 0.0)

    def _refresh(self, chain, keep):
        self.noise.normal_(generator=self.generators[chain])
        self.momenta[chain].mul_(keep).add_(self.noise, alpha=math.sqrt(1 - keep**2))

    def move(self, chain: int) -> None:
        """Half a drift, fresh momentum, half a drift: A O A."""
        x, r = self.positions[chain], self.momenta[chain]
        x.addcmul_(self.scale, r, value=self.step / 2)
        self._refresh(chain, self.momentum)
        x.addcmul_(self.scale, r, value=self.step / 2)

    def burn_in(self, steps, target, precondition):
        posterior = self.posterior
        n = len(self.generators)
        self.step = self._initial_step()
        second = torch.zeros_like(posterior.center)
        count = 0
        pairs = steps // 2
        switch = pairs // 2 if precondition else -1
        accepted = []
        logs = []
        k = 0
        for pair in range(pairs):
            if pair == switch:
                curvature = second / max(count, 1) + posterior.localization
                curvature += FLOOR * curvature.mean()
                self.scale = curvature.rsqrt()
                self.step = self._initial_step()
                k = 0
                logs = []
            works, seconds, starts = [], [], self.positions.clone()
            for c in range(n):
                b = next(self.batches[c])
                x, r = self.positions[c], self.momenta[c]
                loss0, f0 = posterior.excess_loss_and_force(x, b)
                r.addcmul_(self.scale, f0, value=self.step / 2)
                work = -posterior.potential(x, b, loss0) - kinetic(r)
                r.addcmul_(self.scale, f0, value=self.step / 2)
                work += kinetic(r)
                x.addcmul_(self.scale, r, value=self.step / 2)
                self._refresh(c, self.momentum)
                work -= kinetic(r)
                x.addcmul_(self.scale, r, value=self.step / 2)
                loss1, f1 = posterior.excess_loss_and_force(x, b)
                r.addcmul_(self.scale, f1, value=self.step / 2)
                work += posterior.potential(x, b, loss1) + kinetic(r)
                r.addcmul_(self.scale, f1, value=self.step / 2)
                works.append(work)
                self.move(c)
                seconds.append(f1)
            ps = torch.nan_to_num((-torch.stack(works)).clamp(max=0).exp(), nan=0.0).tolist()
            for c in range(n):
                if ps[c] < 1e-3:
                    self.positions[c] = starts[c]
                    self._refresh(c, 0.0)
                else:
                    second += seconds[c].square()
                    count += 1
            mean = sum(ps) / n
            k += 1
            self.step *= math.exp((3.0 if mean < 0.1 else 1.5) * k ** -ADAPTATION_DECAY * (mean - target))
            accepted.append(mean)
            logs.append(math.log(self.step))
        late = len(logs) // 2
        self.step = math.exp(np.mean(logs[late:]))
        return float(np.mean(accepted[-(len(logs) - late):]))

    def draw(self, draws, acceptance):
        posterior = self.posterior
        n = len(self.generators)
        ex = torch.empty(n, draws, dtype=torch.float64, device=posterior.center.device)
        de = torch.empty_like(ex)
        for t in range(draws):
            for c in range(n):
                b = next(self.batches[c])
                loss, f = posterior.excess_loss_and_force(self.positions[c], b)
                ex[c, t] = loss
                de[c, t] = posterior.descent(self.positions[c])
                self.momenta[c].addcmul_(self.scale, f, value=self.step)
                self.move(c)
        dist = (self.positions - posterior.center).norm(dim=1)
        return Chains(ex.cpu().numpy(), de.cpu().numpy(), dist.cpu().numpy(), acceptance, self.step**2)

    def _initial_step(self):
        posterior = self.posterior
        x = self.positions[0]
        b = next(self.batches[0])
        _, f0 = posterior.excess_loss_and_force(x, b)
        v = torch.empty_like(x).normal_(generator=self.generators[0])
        radius = 0.5
        k = 1.0
        for _ in range(POWER_ITERATIONS):
            v /= v.norm()
            _, f = posterior.excess_loss_and_force(x + radius * self.scale * v, b)
            v = (f0 - f) * self.scale / radius
            k = float(v.norm())
            radius = 1 / math.sqrt(k)
        return 1 / math.sqrt(k)


def balanced_batches(weights: list[float], random: np.random.Generator) -> Iterator[int]:
    """Batch numbers without end: each as often as its weight says, in random order, pass by pass."""
    count = len(weights)
    while True:
        order = random.permutation(count)
        edges = np.cumsum(np.asarray(weights)[order])
        points = (np.arange(count) + random.random()) / count
        chosen = order[np.minimum(np.searchsorted(edges, points, side="right"), count - 1)]
        yield from random.permutation(chosen).tolist()


def kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum().double()
