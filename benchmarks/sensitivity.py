"""What other values of the constants of the samplers would do: to λ, to what is called reliable, and to the price.

Each constant is halved and doubled by itself, and all of a sampler are changed at random together, on a few cases whose
answers are known. ``make bench-llc`` has it as a section.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from cases import (
    batched,
    coefficient_of_regression,
    coefficient_of_zero_network,
    cross_entropy,
    deep_linear_network,
    half_squared_error,
    linear_network,
    logistic_regression,
    monomial,
    monomial_expectation,
    noisy_bottleneck,
    noisy_regression,
    regression,
    zero_network,
)
from reference_runs import Checkpoint, demo_network, demo_run, digits, first, linear_run
from torch import nn

from phasewatch import Objective, estimate_behavioral_llc, estimate_llc
from phasewatch.estimators.behavioral import PRECISION
from phasewatch.llc import (
    adaptation,
    behavioral,
    chains,
    factored_curvature,
    hmc,
    leapfrog,
    pilot,
    resolved_chains,
    second_stage,
)
from phasewatch.llc.behavioral import FINE

Kind = Callable[[Any, float], Any]


def number(value: float, factor: float) -> float:
    """A count stays one, of 1 at least."""
    return max(1, round(value * factor)) if isinstance(value, int) else value * factor


def share(value: float, factor: float) -> float:
    """Between 0 and 1: the odds for it are multiplied."""
    odds = factor * value / (1 - value)
    return odds / (1 + odds)


def ratio(value: float | tuple[float, ...], factor: float) -> float | tuple[float, ...]:
    """To either side of 1: its logarithm is multiplied."""
    return tuple(one**factor for one in value) if isinstance(value, tuple) else value**factor


@dataclass(frozen=True)
class Constant:
    """A constant of a sampler.

    Attributes:
        name: What it is called.
        modules: Those that use it, the first of which defines it.
        kind: How it is multiplied.
        default_of: The function that has it as the default of an argument of the same name, if one does.
    """

    name: str
    modules: tuple[ModuleType, ...]
    kind: Kind = number
    default_of: Callable[..., Any] | None = None

    @property
    def value(self) -> Any:
        return getattr(self.modules[0], self.name)

    @property
    def places(self) -> list[tuple[dict[str, Any], str]]:
        """The dictionaries from which it is read, and its name there."""
        found = [(vars(module), self.name) for module in self.modules]
        if self.default_of is not None:
            found.append((self.default_of.__kwdefaults__, self.name.lower()))
        return found


def of(module: ModuleType, *names: str, kind: Kind = number) -> list[Constant]:
    return [Constant(name, (module,), kind) for name in names]


OF_THE_FUNCTION = [
    *of(resolved_chains, "LEAST_LOOKS", "MOST_LOOKS", "CLEARLY"),
    *of(resolved_chains, "FURTHEST", "FURTHEST_NATS", "NEAR", "ROUNDS_NEAR", "MOST_ROUNDS"),
    *of(resolved_chains, "COOLING", kind=ratio),
    *of(resolved_chains, "PATH", "FIRST_STEP", "LARGEST_STEP"),
    *of(resolved_chains, "FREE", kind=share),
    *of(resolved_chains, "LONGEST"),
    *of(resolved_chains, "SPREAD_OUT", "FREE_ACCEPTANCE", "TARGET_ACCEPTANCE", kind=share),
    *of(resolved_chains, "FREE_RATE", "RATE", "ADAPTS", "FOLLOWING", "FASTEST", "SETTLING", "FIRST_MASSES"),
    *of(resolved_chains, "MASSES_AGAIN", kind=ratio),
    Constant("THRESHOLD_DRIFT", (leapfrog, resolved_chains)),
    *of(factored_curvature, "FORGETTING", kind=share),
    *of(factored_curvature, "WIDEST"),
    *of(behavioral, "ROUNDS"),
    *of(behavioral, "CARRIED", "STEEPNESS", kind=ratio),
]
CHECKS_OF_THE_FUNCTION = [
    *of(behavioral, "LARGEST_RHAT", kind=ratio),
    *of(behavioral, "SAME_MEAN", "LARGEST_HALF_WIDTH", "LARGEST_DRIFT"),
    *of(behavioral, "LEAST_ACCEPTANCE", kind=share),
    *of(behavioral, "MOST_HITS"),
    *of(behavioral, "LEAST_VIRIAL", "LARGEST_VIRIAL", kind=ratio),
    *of(behavioral, "VIRIAL_SIGNIFICANCE"),
    *of(behavioral, "HEAT_CAPACITY", kind=ratio),
    *of(behavioral, "SIGNIFICANCE"),
]
OF_THE_LOSS = [
    *of(adaptation, "TARGET_ACCEPTANCE", kind=share),
    *of(adaptation, "RATE"),
    *of(adaptation, "DECAY", "MASSES_AT", kind=share),
    *of(adaptation, "SPREADING", "MOVES_OF_SPREADING", "CURVATURE_FLOOR", "POWER_ITERATIONS", "MOST_HEATING"),
    *of(adaptation, "HEATING_CHECKS"),
    *of(adaptation, "LEAST_ACCEPTANCE_OF_SEGMENTS", kind=share),
    *of(adaptation, "LEAST_BURN_IN"),
    *of(adaptation, "LEAST_ACCEPTANCE", kind=share),
    *of(hmc, "FREE_PATH", "FREE_PATHS", "LEAST_MOVES"),
    *of(chains, "MOVES_PER_BATCH"),
    Constant("MOVES_PER_REFRESHMENT", (chains, adaptation)),
    Constant("THRESHOLD_DRIFT", (leapfrog, chains)),
    *of(second_stage, "MOVES_PER_COST"),
    Constant("ENOUGH_TESTS", (second_stage, adaptation)),
    *of(second_stage, "NEGLIGIBLE"),
]
OF_THE_PILOT = [
    Constant("MOST_EVALUATIONS", (pilot,), default_of=pilot.pilot_descent),
    *of(pilot, "PAIRS"),
    *of(pilot, "ARMIJO"),
    *of(pilot, "WOLFE", kind=share),
    *of(pilot, "EXPANSION", kind=ratio),
    *of(pilot, "CONVERGED", "COST_OF_DISPLACEMENT"),
    *of(pilot, "SHRINKING", kind=ratio),
    *of(pilot, "DISPLACEMENTS"),
]
LEFT_OUT = {
    "time or memory alone": ("CHAINS_AT_ONCE_BELOW", "DRAWN_AHEAD", "MOST_AHEAD", "SMALL"),
    "how often positions are noted": ("DRAWS_PER_POSITION",),
    "what is asked for": ("COARSE", "FINE"),
    "what a standard error takes at least": ("LEAST_DRAWS",),
}
"""Constants of the same modules that are not varied, by what they are about."""

SEEDS, BLOCKS, DRAWS = 2, 4, 5
"""Seeds a row, rows of the default with seeds of their own, and rows in which all constants are changed."""
DEFAULT, ALL, AGAIN = "the default", "all at once", ", again"
LIVE: dict[str, Any] = {"chains": 4, "burn_in": 200, "draws": 1_200, "precision": PRECISION[0]}
LIVE_LOSS: dict[str, Any] = {"chains": 4, "burn_in": 200, "draws": 400}
"""As the product has them during training, where a poor set-up would show. The localization of the latter is that of a
single checkpoint: a crossing that is held more closely is none."""
PROBE = 128
"""Digits that the network of ``phasewatch demo`` is looked at on."""
LONG: dict[str, Any] = {"chains": 8, "burn_in": 1_000, "draws": 8_000, "precision": 0.01}
"""Where no answer is known, that of so many gradients stands for it."""
SIGNIFICANT, NOTABLE = 3.0, 0.2
"""Standard errors by which a mean error or a share of reliable ones must differ to be named, and by how much the price.
Chosen."""
FUNCTION, LOSS, PILOT = (
    "λ of the function, at the fine resolution",
    "λ of the loss",
    "Whether there is anything to sample",
)
CASES = {
    FUNCTION: "Cases: linear regression of 24 parameters and the crossing a² b², with the answer at this resolution; "
    "linear networks 6-6-6 at rank 1 and 5-6-6-5 at rank 1 on plateaus of their training; the network of `phasewatch "
    "demo` at its end, held against many more gradients.",
    LOSS: "Cases: logistic regression of 24 parameters; two linear layers at the minimum for noisy targets, whose "
    "misfit minibatches do not show; a linear network 6-6-6-6 of rank 2; the crossing a² b².",
    PILOT: "Three minima (two regressions, a linear network), and four places that are none: a slope, the start of "
    "`phasewatch demo`, a linear network before its first mode and after it.",
}


@dataclass(frozen=True)
class Row:
    """What one set of constants does.

    Attributes:
        changed: Which constant, or in what way all.
        value: What it is then.
        errors: Of λ, for each case those of its seeds, as a share of λ, or of 1 where it is less; NaN where there was
            no estimate. Of the pilot, 1 where its verdict is wrong and 0 else.
        reliable: Share of the estimates that are said to be.
        gradients: Those spent, as a share of what the default spends, in the mean over the cases.
    """

    changed: str
    value: str
    errors: list[list[float]]
    reliable: float
    gradients: float


@dataclass(frozen=True)
class Measured:
    """One estimate: its error, whether it is said to be reliable, what it took."""

    error: float
    reliable: bool
    gradients: int


Measure = Callable[[int], Measured]
"""From a seed."""


@contextlib.contextmanager
def varied(factors: Mapping[Constant, float]) -> Iterator[None]:
    """Constants multiplied by factors, wherever they are read; afterwards they are what they were."""
    places = [(place, name, place[name]) for constant in factors for place, name in constant.places]
    try:
        for constant, factor in factors.items():
            for place, name in constant.places:
                place[name] = constant.kind(place[name], factor)
        yield
    finally:
        for place, name, value in places:
            place[name] = value


def measured(estimate: Any, exact: float) -> Measured:
    error = (estimate.learning_coefficient - exact) / max(exact, 1.0)
    return Measured(error, estimate.reliable, estimate.gradients)


@functools.cache
def plateaus(widths: tuple[int, ...]) -> list[Checkpoint]:
    """Networks of a training, one for each rank at which it rests."""
    return linear_run(widths)


def functions() -> list[Measure]:
    """At the fine resolution: a regular model, the crossing a² b², plateaus of linear networks, digits."""
    regular = regression(12, 2, seed=0)
    known = [
        (regular, coefficient_of_regression(regular, FINE)),
        (zero_network(1, 1, 1, seed=0), coefficient_of_zero_network(1, 1, 1, FINE)),
    ]
    for widths, rank in (((6, 6, 6), 1), ((5, 6, 6, 5), 1)):
        value, multiplicity = deep_linear_network(widths, rank)
        known.append((plateaus(widths)[rank].objective, value - (multiplicity - 1) / math.log(value / FINE)))
    *_, trained = demo_run()
    classes = Objective(trained.module, [first(trained.training, PROBE)], loss_fn=trained.loss_fn)
    thorough = estimate_behavioral_llc(classes, (FINE,), seed=1_000, **LONG)[0]
    known.append((classes, thorough.learning_coefficient))

    def measure(objective: Objective, exact: float) -> Measure:
        return lambda seed: measured(estimate_behavioral_llc(objective, (FINE,), seed, **LIVE)[0], exact)

    return [measure(*case) for case in known]


def losses(samples: int = 4_000) -> list[Measure]:
    """A regular model, one whose misfit minibatches do not show, a deep linear network, the crossing a² b²."""
    nbeta = samples / math.log(samples)
    value, multiplicity = deep_linear_network((6, 6, 6, 6), 2)
    known = [
        (logistic_regression(5, 4, seed=0, samples=samples), 6 * 3 / 2),
        (noisy_bottleneck(6, 3, 5, seed=0, samples=samples), 3 * (6 + 5 - 3) / 2),
        (linear_network((6, 6, 6, 6), 2, seed=0, samples=samples), value - (multiplicity - 1) / math.log(nbeta)),
        (monomial((1, 1)), monomial_expectation((1, 1), nbeta, 0.3)),
    ]

    def measure(objective: Objective, exact: float) -> Measure:
        return lambda seed: measured(estimate_llc(objective, samples, seed, **LIVE_LOSS), exact)

    return [measure(*case) for case in known]


def verdicts(samples: int = 2_000) -> list[Measure]:
    """Whether there is said to be something to sample: at minima, and at saddles and on slopes where there is not."""
    minima = [
        noisy_regression(8, 3, seed=0, samples=samples),
        logistic_regression(5, 4, seed=0, samples=samples),
        linear_network((6, 6, 6, 6), 2, seed=0, samples=samples),
    ]
    x, y = (torch.cat([batch[k] for batch in minima[0].batches]) for k in (0, 1))
    slope = nn.Linear(8, 3, bias=False)
    nn.utils.vector_to_parameters(0.9 * minima[0].parameters, slope.parameters())
    training = digits()[0]
    elsewhere = [
        batched(slope, x, y, half_squared_error, 500),
        Objective(demo_network(), [first(training, PROBE)], loss_fn=cross_entropy),
        *(plateau.objective for plateau in plateaus((6, 6, 6))[:2]),
    ]

    def measure(objective: Objective, is_minimum: bool) -> Measure:
        def look(seed: int) -> Measured:
            found = estimate_llc(objective, seed=seed, chains=1, burn_in=20, draws=4, localization=10.0)
            return Measured(float((found.draws > 0) != is_minimum), found.reliable, found.gradients)

        return look

    return [measure(one, True) for one in minima] + [measure(one, False) for one in elsewhere]


def vary(constants: Sequence[Constant], cases: Sequence[Measure]) -> list[Row]:
    """The default with seeds of its own in each row, each constant halved and doubled, all at once at random.

    What stands out is measured again with other seeds, as among so many rows some do by chance.
    """
    blocks = [look(cases, range(SEEDS * k, SEEDS * (k + 1))) for k in range(BLOCKS)]
    usual = [statistics.fmean(mean_gradients(block[case]) for block in blocks) for case in range(len(cases))]
    defaults = [row_of(DEFAULT, "", block, usual) for block in blocks]
    singles, doubtful = [], []
    for constant in constants:
        for factor in (0.5, 2.0):
            value = shown(constant.kind(constant.value, factor))
            row = row_of(constant.name, value, look(cases, range(SEEDS), {constant: factor}), usual)
            singles.append(row)
            if stands_out(row, defaults):
                doubtful.append((row, {constant: factor}))
    again, others = [], range(SEEDS * BLOCKS, 2 * SEEDS * BLOCKS)
    if doubtful:
        again.append(row_of(DEFAULT + AGAIN, "", look(cases, others), usual))
        again += [
            row_of(row.changed + AGAIN, row.value, look(cases, others, changed), usual) for row, changed in doubtful
        ]
    together = []
    for k in range(DRAWS):
        factors = 2 ** np.random.default_rng(k).uniform(-1, 1, len(constants))
        changed = dict(zip(constants, factors.tolist(), strict=True))
        together.append(row_of(ALL, "", look(cases, range(SEEDS), changed), usual))
    return defaults + singles + again + together


def look(
    cases: Sequence[Measure], seeds: Sequence[int], factors: Mapping[Constant, float] | None = None
) -> list[list[Measured]]:
    with varied(factors or {}):
        return [[case(seed) for seed in seeds] for case in cases]


def row_of(changed: str, value: str, found: Sequence[Sequence[Measured]], usual: Sequence[float]) -> Row:
    shares = [mean_gradients(of_case) / price for of_case, price in zip(found, usual, strict=True)]
    row = Row(
        changed,
        value,
        errors=[[round(one.error, 4) for one in of_case] for of_case in found],
        reliable=statistics.fmean(one.reliable for of_case in found for one in of_case),
        gradients=statistics.fmean(shares),
    )
    print(f"  {changed:35s} {value:16s} {' '.join(cells(row))}", flush=True)
    return row


def stands_out(row: Row, usual: Sequence[Row]) -> bool:
    by, error = excess(row, usual)
    return math.isnan(by) or by > SIGNIFICANT * error


def mean_gradients(found: Sequence[Measured]) -> float:
    return statistics.fmean(one.gradients for one in found)


def shown(value: float | tuple[float, ...]) -> str:
    return " and ".join(f"{one:.3g}" for one in value) if isinstance(value, tuple) else f"{value:.3g}"


def measure() -> str:
    """The tables, each with what it says."""
    found = {}
    for heading, constants, cases in (
        (FUNCTION, OF_THE_FUNCTION + CHECKS_OF_THE_FUNCTION, functions),
        (LOSS, OF_THE_LOSS, losses),
        (PILOT, OF_THE_PILOT, verdicts),
    ):
        print(heading, flush=True)
        found[heading] = vary(constants, cases())
    return told(found)


def told(found: Mapping[str, Sequence[Row]]) -> str:
    left_out = "; ".join(f"{', '.join(names)} ({why})" for why, names in LEFT_OUT.items())
    parts = [
        "Each constant halved and doubled by itself: of a share the odds, of what lies to either side of 1 the "
        f"logarithm. Then, {DRAWS} times, all of a table at once, each by a factor of its own between a half and 2. "
        f"{SEEDS} seeds a case, with the settings of measurements during training; the default has {BLOCKS} rows with "
        "seeds of their own, which show what chance does. Errors are shares of λ, or of 1 where it is less. "
        f"Not varied: {left_out}."
    ]
    for heading, rows in found.items():
        table = of_pilot(rows) if heading == PILOT else of_chains(rows)
        parts.append(f"### {heading}\n\n{CASES[heading]}\n\n{table}")
    return "\n\n".join(parts)


def of_chains(rows: Sequence[Row]) -> str:
    lines = ["| constant | value | median error | worst error | reliable | gradients |", "|---|---|---|---|---|---|"]
    lines += [f"| {row.changed} | {row.value} | {' | '.join(cells(row))} |" for row in rows]
    return says(rows) + "\n\n" + "\n".join(lines)


def of_pilot(rows: Sequence[Row]) -> str:
    lines = ["| constant | value | wrong verdicts | gradients |", "|---|---|---|---|"]
    lines += [f"| {row.changed} | {row.value} | {' | '.join(cells_of_pilot(row))} |" for row in rows]
    wrong = [f"{row.changed} {row.value}".strip() for row in rows if sum(map(sum, row.errors))]
    return f"Verdicts are wrong with {', '.join(wrong) or 'none of these values'}.\n\n" + "\n".join(lines)


def says(rows: Sequence[Row]) -> str:
    """Which constants matter, and how much all of them do together."""
    usual = [row for row in rows if row.changed == DEFAULT]
    together = [row for row in rows if row.changed == ALL]
    again = [row for row in rows if row.changed.endswith(AGAIN)]  # the first of them is the default
    single = [row for row in rows if row not in (*usual, *together, *again)]
    first = {name_of(row): excess(row, usual)[0] for row in single if stands_out(row, usual)}
    second = {name_of(row): "{:+.1%} ± {:.1%}".format(*paired_excess(row, again[0])) for row in again[1:]}
    reliable, count = counted([*usual, *again[:1]])
    doubted = {
        name_of(row): f"{row.reliable:.0%}" for row in single if differs(row.reliable, counted([row])[1], reliable)
    }
    dearer = {name_of(row): f"{row.gradients:.2f}" for row in single if abs(row.gradients - 1) > NOTABLE}

    def listed(values: Mapping[str, str]) -> str:
        return ", ".join(f"{name} ({value})" for name, value in values.items()) or "none"

    return "\n".join(
        [
            f"- Of {len(single)} changes of one constant these raise the mean error by more than {SIGNIFICANT:.0f} "
            f"standard errors: {listed({name: f'{by:+.1%}' for name, by in first.items()})}."
            + (f" With {SEEDS * BLOCKS} other seeds they change it by: {listed(second)}." if second else ""),
            f"- The share called reliable, {reliable:.0%} of {count} by default, changes by as much with: "
            f"{listed(doubted)}.",
            f"- The gradients spent change by more than {NOTABLE:.0%} with: {listed(dearer)}.",
            f"- Median errors are {span(usual)} by default, {span(single)} with one constant changed, "
            f"{span(together)} with all.",
        ]
    )


def counted(rows: Sequence[Row]) -> tuple[float, int]:
    """The share of estimates that are called reliable, and the number of estimates."""
    counts = [sum(map(len, row.errors)) for row in rows]
    return sum(row.reliable * count for row, count in zip(rows, counts, strict=True)) / sum(counts), sum(counts)


def differs(found: float, count: int, usual: float) -> bool:
    """Whether a share of so many is none of the usual one, with a binomial standard error that is never zero."""
    held = (count * usual + 1) / (count + 2)
    return abs(found - usual) > SIGNIFICANT * math.sqrt(held * (1 - held) / count)


def name_of(row: Row) -> str:
    return f"{row.changed.removesuffix(AGAIN)} {row.value}"


def excess(row: Row, usual: Sequence[Row]) -> tuple[float, float]:
    """By how much the mean error exceeds that of the default, and its standard error from how the default's varies."""
    differences, variances = [], []
    for case, errors in enumerate(row.errors):
        before = [abs(error) for one in usual for error in one.errors[case]]
        differences.append(statistics.fmean(map(abs, errors)) - statistics.fmean(before))
        variances.append(statistics.variance(before) * (1 / len(errors) + 1 / len(before)))
    return statistics.fmean(differences), math.sqrt(sum(variances)) / len(differences)


def paired_excess(row: Row, usual: Row) -> tuple[float, float]:
    """The same, from the same seeds."""
    differences, variances = [], []
    for errors, before in zip(row.errors, usual.errors, strict=True):
        pairs = [abs(one) - abs(other) for one, other in zip(errors, before, strict=True)]
        differences.append(statistics.fmean(pairs))
        variances.append(statistics.variance(pairs) / len(pairs))
    return statistics.fmean(differences), math.sqrt(sum(variances)) / len(differences)


def span(rows: Sequence[Row]) -> str:
    medians = [statistics.median(abs(error) for of_case in row.errors for error in of_case) for row in rows]
    return f"{min(medians):.1%} to {max(medians):.1%}"


def cells(row: Row) -> list[str]:
    sizes = [abs(error) for of_case in row.errors for error in of_case]
    worst = max(sizes) if all(map(math.isfinite, sizes)) else math.nan
    return [f"{statistics.median(sizes):.1%}", f"{worst:.0%}", f"{row.reliable:.0%}", f"{row.gradients:.2f}"]


def cells_of_pilot(row: Row) -> list[str]:
    wrong = [error for of_case in row.errors for error in of_case]
    return [f"{sum(wrong):.0f} of {len(wrong)}", f"{row.gradients:.2f}"]
