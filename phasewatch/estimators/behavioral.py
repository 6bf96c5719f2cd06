"""The learning coefficient of the function as signals, at a coarse and at a fine resolution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from phasewatch.estimators.enough import LARGE, ROWS, enough
from phasewatch.estimators.parts import check_names, check_refined, named, restricted
from phasewatch.estimators.price import Price, Size
from phasewatch.estimators.reading import Reading
from phasewatch.hessian import EffectiveRank, NoCurvatureError, NoSecondDerivativeError, effective_rank
from phasewatch.hessian.lanczos import own_generator
from phasewatch.llc import BehavioralLLC, check_behavioral_settings, estimate_behavioral_llc, prior_spread
from phasewatch.llc.behavioral import COARSE, FINE
from phasewatch.objective import ConstantOutputsError, Objective
from phasewatch.objective.memory import is_out_of_memory
from phasewatch.record import Estimate
from phasewatch.record.signals import LLC_BEHAVIORAL, LLC_COARSE, LLC_OUTPUTS, LLC_OUTPUTS_COARSE

PRECISION = (0.09, 0.1)
"""Half-width of the interval at which chains end, as a share of lambda, below that and from there on. Chosen."""
MOST_PRODUCTS, PRODUCTS = (256, 128), 72
"""Products with the Gauss-Newton matrix for an effective rank at most, below 20,000 parameters and from there on, and
so many as its price: they end where the tolerance is reached. That takes 72 to 76 on a convnet of 106 thousand
parameters and 40 on a transformer of 616 thousand; at both resolutions 20 to 96 on the network of the demo, and up to
240 on modular addition."""
RANK_TOLERANCE = 0.06
"""Monte-Carlo error wanted of a rank, relative to it; with 7 % two of them would all but exceed what counts as
reliable. A tolerance of .04 takes half as many products again."""
DENSE_BELOW = 128
"""Parameters up to which all eigenvalues cost no more than the products of a run."""
OUTPUTS_TOLERANCE, PRODUCTS_IN_THE_OUTPUTS = 0.01, 1_024
"""Of ranks in the outputs of small networks: they fall by some 5 % when modular addition generalises (see
benchmarks/results/live.md), and whether they fall decides between simpler and more confident."""
IN_REVERSE_MODE, IN_FORWARD_MODE = 2.5, 2.0
"""What a product with the Gauss-Newton matrix takes: in a network so small that no forward mode is used, so many
products with the Hessian; in a larger one so many gradients."""
OUTPUTS_DENSE_BELOW = 2_000
"""Parameters up to which all eigenvalues take less time than the several hundred products of such a run, and are exact:
half as much at 1,500 on a CPU."""
LEAST_PROBE_SHARE = 0.9
"""Share of the effective rank that half of the probe must show, or λ is noted to be that of this probe. It may still be
compared along a run, all of whose measurements have the probe in common: where modular addition has generalised, λ on
1,024 pairs is 1.3 to 1.7 times that on 512, and a seventh of what it was when they were memorised. Chosen."""
PRIOR_DRAWS, HELD, AWAY = 64, 2.0, 2.0
"""Draws from the prior that say whether a quadratic holds, where the resolution is within the first factor of what that
says of the prior itself: there the prior holds the weights, mostly. It does not where the function is further away by
more than the second, which is five standard errors where one direction alone counts. The factors are chosen."""
DRAWN = 3 / 4
"""Share of their draws after which chains end, rather too much than too little: from an eighth to all of them on the
networks of benchmarks/results/live.md, where a run begins or is under way two thirds."""
APPROACH, MASSES_FOUND = 20, 20
"""Moves in which chains look for their start, at each resolution, and times that their masses are found anew.
Chosen: some 12 and 18 on small networks."""
RANKS = "effective_rank_coarse", "effective_rank"
SAMPLED = {"both": 2, "coarse": 1, "none": 0}
"""At how many of the resolutions chains are drawn, by what the setting calls it."""


@dataclass(frozen=True)
class BehavioralCoefficient:
    """The learning coefficient of the function, see :func:`phasewatch.estimate_behavioral_llc` for the settings.

    Attributes:
        resolutions: The coarse and the fine one, in nats.
        nats_per_loss: What one unit of the loss is in nats.
        chains: Number of chains; default 4, or 2 from 20,000 parameters on.
        draws: Draws a chain at most; default 1,200, or 800.
        burn_in: Moves before them; default 200, or 120.
        refined: Names or globs of modules and parameters; the coefficient of each alone is measured too.
        data: Name of the data, where they are others than those of the main probe; becomes part of the signals' names.
        sampled: At which resolutions chains are drawn: "both", "coarse" or "none". Without them there is no
            coefficient, but what some products with the Gauss-Newton matrix say at a small part of the price: the
            effective rank, half of which is the coefficient were the divergence quadratic.
    """

    resolutions: tuple[float, float] = (COARSE, FINE)
    nats_per_loss: float = 1.0
    chains: int | None = None
    draws: int | None = None
    burn_in: int | None = None
    refined: tuple[str, ...] = ()
    data: str = ""
    sampled: Literal["both", "coarse", "none"] = "both"

    def __post_init__(self) -> None:
        """Check the settings, long before the first measurement."""
        if len(self.resolutions) != 2 or not self.resolutions[0] > self.resolutions[1]:
            raise ValueError(
                f"resolutions is {self.resolutions}; expected the coarse and the fine one, as (0.1, 0.003)."
            )
        if self.sampled not in SAMPLED:
            raise ValueError(f"sampled is {self.sampled!r}; expected one of {', '.join(map(repr, SAMPLED))}.")
        check_refined(self.refined)
        if not (self.nats_per_loss > 0 and math.isfinite(self.nats_per_loss)):
            raise ValueError(f"nats_per_loss is {self.nats_per_loss}; expected a positive number.")
        check_behavioral_settings(self.resolutions, *self._moves(0))
        check_names(named(LLC_BEHAVIORAL, part) for part in (self.data, *self.refined) if part)

    @property
    def name(self) -> str:
        """``llc_behavioral``, or ``llc_behavioral_<data>``."""
        return named(LLC_BEHAVIORAL, self.data)

    @property
    def resolutions_sampled(self) -> tuple[float, ...]:
        """Those at which chains are drawn, the coarse one first."""
        return self.resolutions[: SAMPLED[self.sampled]]

    def parts(self, objective: Objective) -> dict[str, Objective]:
        """The loss as a function of each of the parts in ``refined``.

        Raises:
            ValueError: If a name matches no module or parameter.
        """
        return restricted(objective, self.refined)

    def price(self, size: Size) -> Price:
        """Of the chains and of the ranks."""
        chains = (self.price_of_chains(size, resolution) for resolution in self.resolutions_sampled)
        return sum(chains, self.price_of_ranks(size))

    def price_of_chains(self, size: Size, resolution: float) -> Price:
        """Chains that end after three quarters of their draws, of the whole and of each part.

        With those of the coarse resolution, what is measured beside chains alone: the ranks on half of the probe, and
        those in the outputs.
        """
        chains, draws, burn_in = self._moves(size.num_parameters)
        each = Price(moves=chains * (APPROACH + burn_in + DRAWN * draws), masses=MASSES_FOUND)
        moved = each * (1 + len(self.refined))
        if self.data or resolution != self.resolutions[0]:
            return moved
        large = size.num_parameters >= LARGE
        in_the_outputs = _price_of_products(size, PRODUCTS if large else PRODUCTS_IN_THE_OUTPUTS / 2)
        return moved + self.price_of_ranks(size) * 0.5 + in_the_outputs

    def price_of_ranks(self, size: Size) -> Price:
        """Products in the metric of the loss."""
        return Price() if self.data else _price_of_products(size, PRODUCTS)

    def read(self, objective: Objective, n: int, seed: int) -> Reading:
        """Signals ``llc_behavioral`` and ``llc_behavioral_coarse`` with what is needed to judge them.

        Besides ``effective_rank`` in all and by layer, ``misfit_change`` and ``description_length``, all three at the
        fine resolution, ``effective_rank_coarse``, ``probe_share`` (how much of the rank half of the probe shows), and
        ``llc_outputs`` and ``llc_outputs_coarse``, half the effective rank in the metric of the outputs' own variance,
        whose resolutions are of each output. Of parts, and on other data, the two coefficients alone. Where no chains
        are drawn at a resolution, the rank where a quadratic divergence is that resolution; ``misfit_change`` and
        ``description_length`` take those of the fine one.

        Raises:
            NoOutputsError: If the network's outputs cannot be seen.
            ValueError: If a name in ``refined`` matches no module or parameter.
        """
        seen = enough(objective)
        if not self.resolutions_sampled:
            return Reading({} if self.data else self._ranks_alone(seen, seed))
        parts = self.parts(objective)
        spread = prior_spread(seen)
        found = self._estimates(seen, spread, seed)
        fine = found.get(LLC_BEHAVIORAL)
        beside: dict[str, Estimate] = {}
        noted: dict[str, tuple[str, ...]] = {}
        if not self.data:
            try:
                rank = self._rank(seen, spread, seed, check_probe=True)
            except (NoSecondDerivativeError, NoCurvatureError) as error:  # chains need first derivatives only
                beside = _unknown(RANKS, error)
            else:
                noted = {name: self._limits(one, rank) for name, one in found.items()}
                nbeta = fine.nbeta * self.nats_per_loss if fine else None
                beside = self._at_both(seen, spread, seed, rank, nbeta)
                if math.isfinite(rank.on_half) and rank.value:
                    beside["probe_share"] = Estimate(rank.on_half / rank.value)
            beside |= self._in_the_outputs(seen, seed)
        estimates: dict[str, Estimate] = {}
        for name, one in found.items():
            estimates |= self._signals(name, one, noted.get(name, ()))
        estimates |= (self._beside(seen, fine, n) if fine else {}) | beside
        for part, alone in parts.items():
            for name, one in self._estimates(enough(alone), None, seed).items():
                estimates[named(name, "_".join(filter(None, (self.data, part))))] = _estimate(one)
        return Reading(estimates)

    def _estimates(self, objective: Objective, spread: Tensor | None, seed: int) -> dict[str, BehavioralLLC]:
        chains, draws, burn_in = self._moves(objective.num_parameters)
        found = estimate_behavioral_llc(
            objective,
            self.resolutions_sampled,
            seed,
            nats_per_loss=self.nats_per_loss,
            chains=chains,
            draws=draws,
            burn_in=burn_in,
            spread=spread,
            precision=PRECISION[objective.num_parameters >= LARGE],
        )
        return dict(zip((LLC_COARSE, LLC_BEHAVIORAL), found, strict=False))

    def _moves(self, num_parameters: int) -> tuple[int, int, int]:
        """Chains, draws and burn-in."""
        defaults = (2, 800, 120) if num_parameters >= LARGE else (4, 1200, 200)
        given = (self.chains, self.draws, self.burn_in)
        chains, draws, burn_in = (d if g is None else g for d, g in zip(defaults, given, strict=True))
        return chains, draws, burn_in

    def _signals(self, name: str, found: BehavioralLLC, notes: tuple[str, ...]) -> dict[str, Estimate]:
        name = named(name, self.data)
        return {
            name: replace(_estimate(found), notes=notes),
            f"{name}_rhat": Estimate(found.rhat),
            f"{name}_ess": Estimate(found.ess),
            f"{name}_acceptance": Estimate(found.acceptance),
            f"{name}_nbeta": Estimate(found.nbeta),
            f"{name}_heat_capacity": Estimate(found.heat_capacity, found.heat_capacity_error),
            f"{name}_virial": Estimate(found.virial),
            f"{name}_hits": Estimate(found.hits),
            f"{name}_spread_slope": Estimate(found.spread_slope, found.spread_slope_error),
            f"{name}_resolution": Estimate(found.resolution),
        }

    def _beside(self, objective: Objective, fine: BehavioralLLC, n: int) -> dict[str, Estimate]:
        loss = self.nats_per_loss * objective.mean_loss
        length = Estimate(fine.description_length(loss, n), fine.standard_error * math.log(n), fine.reasons)
        return {
            named("misfit_change", self.data): Estimate(fine.misfit_change),
            named("description_length", self.data): length,
        }

    def _rank(self, objective: Objective, spread: Tensor, seed: int, check_probe: bool) -> EffectiveRank:
        """From products that tell it at both resolutions, or at the coarse one in large networks and without chains."""
        tells_both = self.resolutions_sampled and objective.num_parameters < LARGE
        aims = self.resolutions if tells_both else self.resolutions[:1]
        finest_first = [resolution / self.nats_per_loss for resolution in reversed(aims)]
        seen, settings = _in_double(objective), _settings(objective)
        return effective_rank(seen, spread, resolution=finest_first, seed=seed, check_probe=check_probe, **settings)

    def _ranks_alone(self, objective: Objective, seed: int) -> dict[str, Estimate]:
        spread = prior_spread(objective)
        return self._at_both(objective, spread, seed, self._rank(objective, spread, seed, check_probe=False))

    def _at_both(
        self, objective: Objective, spread: Tensor, seed: int, rank: EffectiveRank, nbeta: float | None = None
    ) -> dict[str, Estimate]:
        """The ranks where a quadratic divergence is each resolution, the fine one at another temperature if given."""
        divergence = objective.behavioral()  # in units of the loss, as the ranks'
        at_resolution = self.resolutions if nbeta is None else self.resolutions[:1]
        in_these_units = [resolution / self.nats_per_loss for resolution in at_resolution]
        found = _at_resolutions(rank, in_these_units, divergence, spread, seed)
        found += [] if nbeta is None else [rank.at(nbeta)]
        return {
            name: estimate
            for signal, one in zip(RANKS, found, strict=True)
            for name, estimate in _ranks(signal, one, divergence.doubts).items()
        }

    def _limits(self, found: BehavioralLLC, rank: EffectiveRank) -> tuple[str, ...]:
        """That more samples would show more, where half of the probe shows less."""
        there = rank.at(found.nbeta * self.nats_per_loss)
        if not (there.converged and there.value and there.on_half / there.value < LEAST_PROBE_SHARE):
            return ()
        return (f"limited by the probe: half of it shows {there.on_half / there.value:.0%} of the effective rank",)

    def _in_the_outputs(self, objective: Objective, seed: int) -> dict[str, Estimate]:
        """Half the effective rank where each output moves by the resolutions in units of half its variance."""
        names = (LLC_OUTPUTS_COARSE, LLC_OUTPUTS)
        try:
            moved = _in_double(objective).behavioral("outputs")
        except ConstantOutputsError as error:
            return _unknown(names, error)
        outputs = sum(
            output.shape[-1] if output.dim() > 1 else 1 for output in objective.outputs(objective.parameters, 0)
        )
        resolutions = [resolution * outputs for resolution in self.resolutions]
        spread = prior_spread(objective, "outputs")
        settings = _settings(objective)
        if objective.num_parameters < LARGE:
            settings |= {"tolerance": OUTPUTS_TOLERANCE, "max_products": PRODUCTS_IN_THE_OUTPUTS}
            settings |= {"dense_below": OUTPUTS_DENSE_BELOW}
        aim = min(resolutions) if objective.num_parameters < LARGE else max(resolutions)
        settings |= {"check_probe": False, "by_layer": False}
        try:
            ranks = effective_rank(moved, spread, resolution=aim, seed=seed, **settings)
        except (NoSecondDerivativeError, NoCurvatureError) as error:
            return _unknown(names, error)
        found = _at_resolutions(ranks, resolutions, moved, spread, seed)
        return {
            name: Estimate(rank.value / 2, rank.standard_error / 2, rank.reasons)
            for name, rank in zip(names, found, strict=True)
        }


def _price_of_products(size: Size, products: float) -> Price:
    """With the Gauss-Newton matrix of the samples that are looked at."""
    batches = size.batches_of(ROWS)
    if size.num_parameters >= LARGE:
        return Price(gradients=IN_FORWARD_MODE * products) * batches
    return Price(products=IN_REVERSE_MODE * products) * batches


def _in_double(objective: Objective) -> Objective:
    """A small network in double precision: single adds to each of many directions, up to a third of some ranks."""
    if DENSE_BELOW < objective.num_parameters < LARGE:
        with suppress(Exception):  # the module's code fixes its type
            return objective.to(torch.float64)
    return objective


def _settings(objective: Objective) -> dict[str, Any]:
    """Of an effective rank, so that it costs what a run can afford."""
    products = MOST_PRODUCTS[objective.num_parameters >= LARGE]
    return {"tolerance": RANK_TOLERANCE, "max_products": products, "dense_below": DENSE_BELOW}


def _at_resolutions(
    rank: EffectiveRank, resolutions: Sequence[float], divergence: Objective, spread: Tensor, seed: int
) -> list[EffectiveRank]:
    """The rank at each, doubted where the prior holds most weights and is further away than a quadratic says.

    Where the divergence is not quadratic that near, the temperature at which it is the resolution on average is not
    the one at which a quadratic is; where a quadratic is nearer over the whole prior, there is no such temperature.
    """
    found, by_quadratic = [rank.at_resolution(one) for one in resolutions], rank.spectrum.mean_divergence(0.0)
    if by_quadratic > HELD * max(resolutions):
        return found
    mean = _mean_over_the_prior(divergence, spread, seed)
    reason = f"no quadratic: the prior is {mean:.2g} away on average, which a quadratic puts at {by_quadratic:.2g}"
    return [
        replace(one, converged=False, reasons=(*one.reasons, reason))
        if by_quadratic <= HELD * resolution and mean > max(resolution, AWAY * by_quadratic)
        else one
        for one, resolution in zip(found, resolutions, strict=True)
    ]


def _mean_over_the_prior(divergence: Objective, spread: Tensor, seed: int) -> float:
    """By some draws; infinite where it is not finite at one of them or cannot be evaluated there."""
    generator, start, total = own_generator(seed), divergence.parameters, 0.0
    for _ in range(PRIOR_DRAWS):
        away = spread.to(start) * torch.randn(len(start), generator=generator).to(start)
        try:
            total += float(divergence.losses((start + away)[None]))
        except Exception as error:  # a factorization that fails so far away, for example
            if is_out_of_memory(error):
                raise
            return math.inf
    return total / PRIOR_DRAWS if math.isfinite(total) else math.inf


def _ranks(name: str, found: EffectiveRank, doubts: tuple[str, ...]) -> dict[str, Estimate]:
    """A rank, and by layer where it is known: what is off for too short runs is not told apart by layer."""
    layers = found.by_layer.items() if found.converged and not doubts else ()
    return {
        name: Estimate(found.value, found.standard_error, doubts + found.reasons),
        **{f"{name}_{layer}": Estimate(at.value, at.standard_error) for layer, at in layers},
    }


def _unknown(names: Iterable[str], error: Exception) -> dict[str, Estimate]:
    return {name: Estimate(math.nan, doubts=(str(error),)) for name in names}


def _estimate(found: BehavioralLLC) -> Estimate:
    return Estimate(found.learning_coefficient, found.standard_error, found.reasons)
