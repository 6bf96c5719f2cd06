"""The learning coefficient of the function while networks train, beside devinterp, on networks that the script trains.

Measures checkpoints of reference runs, modular addition over many seeds before and after it generalises, how the values
depend on the resolution and on the prior's spread, and exact cases over the localization. Writes
benchmarks/results/live.md and docs/behavioral_llc.png. Everything runs on one thread from fixed seeds. Fashion-MNIST is
used where Debian's package dataset-fashion-mnist is installed, devinterp where it is: pip install -r
benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import logging
import math
import os
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from cases import deep_linear_network, linear_network
from reference_runs import (
    GENERALISED,
    MEMORISED,
    PEER_BATCH,
    PROBE,
    Checkpoint,
    Training,
    count_samples,
    linear_run,
    modular_addition,
    reference_runs,
)
from torch.utils.data import DataLoader

from phasewatch import BehavioralLLC, estimate_behavioral_llc
from phasewatch.estimators.behavioral import PRECISION, BehavioralCoefficient
from phasewatch.estimators.enough import LARGE
from phasewatch.hessian import effective_rank
from phasewatch.llc import prior_spread
from phasewatch.llc.behavioral import COARSE, FINE
from phasewatch.llc.diagnostics import split_rhat
from phasewatch.record import Change
from phasewatch.record.signals import LLC_BEHAVIORAL, LLC_COARSE, LLC_OUTPUTS, LLC_OUTPUTS_COARSE, LOSS, NORMAL_95
from phasewatch.transitions import kinds
from phasewatch.transitions.resolved import LEAST_CHANGE
from phasewatch.transitions.series import LOG_OFFSET, NOISE_FLOOR

ROOT = Path(__file__).parents[1]

Row = dict[str, Any]

LIVE: dict[str, Any] = {"chains": 4, "burn_in": 200, "draws": 1_200, "precision": PRECISION[0]}
LIVE_LARGE: dict[str, Any] = {"chains": 2, "burn_in": 120, "draws": 800, "precision": PRECISION[1]}
"""As the product has them, the second from 20,000 parameters on."""
RESOLUTIONS = (COARSE, FINE)
RANK_PRODUCTS = (256, 64)
"""For a rank to hold the chains against, the second from 20,000 parameters on."""
ACCEPTED_RHAT = 1.1
PEER = {"num_chains": 4, "num_burnin_steps": 200, "num_draws": 300}
PEER_LARGE = {"num_chains": 2, "num_burnin_steps": 25, "num_draws": 50}
PEER_BATCHES = 40
"""Of large networks it sees so many at most: the loss at the start is taken on all of them."""

SEEDS: dict[Training, int] = {"grokking": 12, "no decay": 5, "full data": 5}

CURVE = (2 * COARSE, COARSE, COARSE / 2, 2 * FINE, FINE, FINE / 2)
SPREADS = (0.5, 1.0, 2.0)
LOCALIZED = ([6, 6, 6], 0), ([8, 4, 8], 2), ([5, 3, 5], 2), ([6, 6, 6, 6], 2)


# ---- measurements


def runs() -> Iterator[Row]:
    for checkpoint in reference_runs():
        found = estimate_behavioral_llc(checkpoint.objective, RESOLUTIONS, **moves(checkpoint))
        ranks = half_ranks(checkpoint, found)
        yield {
            "run": checkpoint.run,
            "step": checkpoint.step,
            "stage": checkpoint.stage,
            "loss": checkpoint.training_loss(),
            "held out": checkpoint.held_out_loss(),
            "exact": checkpoint.exact,
            "measured": [{**as_row(one), "half rank": rank} for one, rank in zip(found, ranks, strict=True)],
            "thorough": thorough(checkpoint) if checkpoint.exact is not None else [],
            "peer": with_devinterp(checkpoint) if importlib.util.find_spec("devinterp") else [],
        }


def thorough(checkpoint: Checkpoint) -> list[Row]:
    """With the default settings of the function, which are those for a single checkpoint."""
    return [as_row(one) for one in estimate_behavioral_llc(checkpoint.objective, RESOLUTIONS)]


def moves(checkpoint: Checkpoint) -> dict[str, Any]:
    return LIVE_LARGE if checkpoint.large else LIVE


def as_row(found: BehavioralLLC) -> Row:
    return {
        "resolution": found.resolution,
        "value": found.learning_coefficient,
        "error": found.standard_error,
        "interval": found.interval,
        "reasons": found.reasons,
        "nbeta": found.nbeta,
        "virial": found.virial,
        "rhat": found.rhat,
        "heat capacity": found.heat_capacity,
        "spread slope": [found.spread_slope, found.spread_slope_error],
        "gradients": found.gradients,
        "samples": found.gradients * PROBE,
    }


def half_ranks(checkpoint: Checkpoint, found: Sequence[BehavioralLLC]) -> list[Row | None]:
    """Half of the effective rank where the chains were, all from the same products."""
    sampled = [one.nbeta for one in found if one.nbeta]
    if not sampled:
        return [None for _ in found]
    spread, products = prior_spread(checkpoint.objective), RANK_PRODUCTS[checkpoint.large]
    whole = effective_rank(checkpoint.objective, spread, max(sampled), check_probe=False, max_products=products)
    ranks = [whole.at(one.nbeta) if one.nbeta else None for one in found]
    return [
        rank and {"value": rank.value / 2, "error": rank.standard_error / 2, "converged": rank.converged}
        for rank in ranks
    ]


def with_devinterp(checkpoint: Checkpoint) -> list[Row]:
    """Its step size and localization, at the temperature of the definition and at the one that it fills in."""
    from devinterp.optim import SGLD
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary
    from devinterp.utils import default_nbeta

    size, limit = (PEER_LARGE, PEER_BATCHES) if checkpoint.large else (PEER, len(checkpoint.training[0]))
    whole = min(len(checkpoint.training[0]) // checkpoint.peer_batch, limit) * checkpoint.peer_batch
    batches = list(zip(*(part[:whole].split(checkpoint.peer_batch) for part in checkpoint.training), strict=True))
    loader: DataLoader[Any] = DataLoader(batches, batch_size=1, shuffle=True, collate_fn=lambda one: one[0])  # type: ignore[arg-type]
    with torch.no_grad():
        start = statistics.fmean(float(checkpoint.loss_fn(checkpoint.module, batch)) for batch in batches)
    n = count_samples(checkpoint.training)
    rows = []
    for name, nbeta in (("n / log n", n / math.log(n)), ("its default", float(default_nbeta(checkpoint.peer_batch)))):
        mean, rhat = math.nan, math.nan
        with contextlib.suppress(RuntimeError), contextlib.redirect_stderr(io.StringIO()):  # stops at the first NaN
            result = estimate_learning_coeff_with_summary(
                copy.deepcopy(checkpoint.module),
                loader,
                evaluate=checkpoint.loss_fn,
                sampling_method=SGLD,
                optimizer_kwargs={"lr": 1e-3, "localization": 100.0, "nbeta": nbeta},
                init_loss=start,
                seed=0,
                verbose=False,
                **size,
            )
            mean, rhat = float(result["llc/mean"]), float(split_rhat(result["loss/trace"].astype(float)))
        gradients = size["num_chains"] * (size["num_burnin_steps"] + size["num_draws"])
        samples = gradients * count_samples(batches[0])
        rows.append({"nbeta": name, "value": mean, "rhat": rhat, "gradients": gradients, "samples": samples})
    return rows


def seeds() -> Iterator[Row]:
    """Modular addition at the two steps, as the product's signals have it, over seeds that grok and that do not."""
    # In turn, so that there are some of each wherever it is cut off.
    each = sorted((seed / count, kind, seed) for kind, count in SEEDS.items() for seed in range(count))
    for _, kind, seed in each:
        start, *stages = modular_addition(kind, seed)
        row: Row = {"kind": kind, "seed": seed, "start": start.training_loss(), "stages": []}
        for checkpoint in stages:
            reading = BehavioralCoefficient().read(checkpoint.objective, len(checkpoint.training[0]), seed)
            names = (*kinds.COEFFICIENTS, *kinds.read_beside(reading.estimates))
            row["stages"].append(
                {
                    "loss": checkpoint.training_loss(),
                    "held out": checkpoint.held_out_loss(),
                    "signals": {
                        name: [one.value, one.standard_error, one.doubts]
                        for name, one in reading.estimates.items()
                        if name in names
                    },
                }
            )
        modular_addition.cache_clear()
        yield row


def dependence() -> Iterator[Row]:
    """Two stages of two runs over the resolution and the spread."""
    addition, linear = modular_addition("grokking", 0), linear_run((6, 6, 6))
    for checkpoint in (*addition[1:], linear[0], linear[-1]):
        for spread in SPREADS:
            found = estimate_behavioral_llc(checkpoint.objective, CURVE, spread=spread, **LIVE)
            yield {
                "case": checkpoint.run,
                "stage": checkpoint.stage,
                "spread": spread,
                "exact": checkpoint.exact,
                "measured": [as_row(one) for one in found],
            }


def localization() -> Iterator[Row]:
    """Exact cases, with the thorough settings, over a factor 10 in the localization to both sides."""
    for widths, rank in LOCALIZED:
        objective = linear_network(widths, rank, seed=1, samples=PROBE, batch_size=PROBE)
        for spread in (10**-0.5, 1.0, 10**0.5):
            yield {
                "case": "-".join(map(str, widths)) + f" rank {rank}",
                "exact": deep_linear_network(widths, rank)[0],
                "spread": spread,
                "measured": [as_row(one) for one in estimate_behavioral_llc(objective, RESOLUTIONS, spread=spread)],
            }


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "runs": runs,
    "dependence": dependence,
    "localization": localization,
    "seeds": seeds,
}
CALLED = ("run", "case", "kind", "seed", "step", "stage", "spread")
"""What tells a row from the others of its section, for the progress that is printed."""


# ---- the kind of what happens between two measurements


def changes(row: Row) -> dict[str, Change]:
    """What the signals did between the two stages of a row of :func:`seeds`."""
    before, after = (stage["signals"] for stage in row["stages"])
    return {name: change(*before[name][:2], *after[name][:2]) for name in before}


def change(before: float, error_before: float, after: float, error_after: float) -> Change:
    rise, error = after - before, math.hypot(error_before, error_after)
    z = rise / error if error > 0 else math.copysign(math.inf, rise) if rise else 0.0
    return Change(before, after, rise, error, (rise - NORMAL_95 * error, rise + NORMAL_95 * error), z)


def kind_of(row: Row) -> kinds.Kind:
    """The kind by the product's rule: the loss on the scale on which the detector sees it, λ where it is reliable."""
    found = changes(row)
    before, after = (stage["signals"] for stage in row["stages"])
    trusted = {name: not before[name][2] and not after[name][2] for name in found}
    owner = {name: r.coefficient for r in kinds.RESOLUTIONS for name in (r.spread_slope, r.heat_capacity)}
    beside = {
        name: one
        for name, one in found.items()
        if name not in kinds.COEFFICIENTS and trusted[name] and trusted[owner.get(name, name)]
    }
    coefficients = {name: found[name] for name in kinds.COEFFICIENTS}
    beside[LOSS] = moved = loss_moved(row)
    return kinds.name_kind(
        {LOSS: moved, **{name: one for name, one in coefficients.items() if trusted[name]}},
        {
            LOSS: abs(moved.z) * NOISE_FLOOR >= LEAST_CHANGE,
            **{name: abs(one.z) >= kinds.SIGNIFICANT for name, one in coefficients.items()},
        },
        beside,
    )


def loss_moved(row: Row) -> Change:
    """Of the training loss, in units of what the detector takes for its noise, on its logarithmic scale."""
    losses = [row["start"], *(stage["loss"] for stage in row["stages"])]
    offset = LOG_OFFSET * (max(losses) - min(losses))
    scaled = [math.log(loss + offset) for loss in losses]
    share = (scaled[2] - scaled[1]) / (max(scaled) - min(scaled))
    rise = losses[2] - losses[1]
    return Change(losses[1], losses[2], rise, 0.0, (rise, rise), share / NOISE_FLOOR)


# ---- the page


def number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    return "NaN" if math.isnan(value) else f"{value:,.{digits}g}" if abs(value) < 1_000 else f"{value:,.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def half_width(one: Row) -> float:
    """Of the interval, as a share of λ, or of 1 where λ is less."""
    low, high = one["interval"]
    return float((high - low) / 2 / max(one["value"], 1.0))


def summary(rows: Sequence[Row]) -> str:
    groups = {
        f"phasewatch at {epsilon:g} nats": [row["measured"][k] for row in rows] for k, epsilon in enumerate(RESOLUTIONS)
    }
    if rows[0]["peer"]:
        for k, nbeta in enumerate(("n / log n", "its default")):
            groups[f"devinterp 1.3.2, nβ = {nbeta}"] = [row["peer"][k] for row in rows]
    lines = []
    for name, values in groups.items():
        finite = [one for one in values if math.isfinite(one["value"])]
        positive = [one for one in finite if one["value"] >= 0]
        # Where the whole prior is nearer than the resolution nothing is sampled: zero is exact.
        mixed = [one for one in positive if one["rhat"] <= ACCEPTED_RHAT or one["nbeta"] == 0]
        own = ["–", "–", "–"]
        if "reasons" in values[0]:
            widths = [half_width(one) for one in values]
            narrow = sum(width <= 0.1 for width in widths)
            own = [f"{sum(not one['reasons'] for one in values)}", f"{narrow}", f"{statistics.median(widths):.1%}"]
        spent = (f"{statistics.median(one[unit] for one in values):,.0f}" for unit in ("gradients", "samples"))
        lines.append([name, len(values), len(finite), len(positive), len(mixed), *own, *spent])
    head = (
        *("", "values", "finite", "not negative too", f"R-hat ≤ {ACCEPTED_RHAT:g} too", "reliable by its own checks"),
        *("half-width ≤ 10 %", "median half-width", "gradients, median", "samples seen by them, median"),
    )
    return table(head, lines)


def exactness(rows: Sequence[Row]) -> str:
    lines = []
    known = [row for row in rows if row["exact"] is not None]
    for name, settings in (("live", "measured"), ("thorough", "thorough")):
        for k, resolution in enumerate(RESOLUTIONS):
            pairs = [(row[settings][k], row["exact"]) for row in known]
            errors = [abs(one["value"] / exact - 1) for one, exact in pairs]
            held = sum(one["interval"][0] <= exact <= one["interval"][1] for one, exact in pairs)
            shares = (f"{share:.1%}" for share in (statistics.median(errors), max(errors)))
            lines.append([name, f"{resolution:g}", len(known), *shares, f"{held} of {len(known)}"])
    head = ("settings", "at nats", "plateaus", "median error", "worst", "interval holds the exact value")
    return table(head, lines)


def runs_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        for one in row["measured"]:
            rank = one["half rank"]
            doubt = "" if not rank or rank["converged"] else " ?"
            low, high = one["interval"]
            lines.append(
                [
                    row["run"],
                    f"{row['step']:,} {row['stage']}".strip(),
                    number(row["loss"], 3),
                    number(row["held out"], 3),
                    f"{one['resolution']:g}",
                    f"{number(one['value'])} ± {number(one['error'], 2)}",
                    f"{number(low)} to {number(high)}",
                    number(row["exact"]),
                    "; ".join(one["reasons"]) or "reliable",
                    number(rank and rank["value"]) + doubt,
                    number(one["rhat"], 3),
                    number(one["virial"], 2),
                    f"{one['gradients']:,}",
                ]
            )
    head = (
        *("run", "step", "loss", "held-out loss", "at nats", "λ", "95 % interval", "exact", "verdict"),
        *("½ effective rank", "R-hat", "virial", "gradients"),
    )
    return table(head, lines)


def peer_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        cells = [cell for one in row["peer"] for cell in (number(one["value"]), number(one["rhat"], 3))]
        step = f"{row['step']:,} {row['stage']}".strip()
        lines.append([row["run"], step, *cells, number(row["exact"]), f"2 × {row['peer'][0]['gradients']:,}"])
    head = ("run", "step", "λ of the loss at nβ = n / log n", "R-hat", "at its default nβ", "R-hat")
    return table((*head, "exact (of the function)", "minibatch gradients"), lines)


SHOWN = {
    f"λ at {COARSE:g} nats": LLC_COARSE,
    f"λ at {FINE:g} nats": LLC_BEHAVIORAL,
    f"outputs at {COARSE:g}": LLC_OUTPUTS_COARSE,
    f"outputs at {FINE:g}": LLC_OUTPUTS,
}


def seeds_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (list(SEEDS).index(row["kind"]), row["seed"])):
        before, after = (stage["signals"] for stage in row["stages"])
        cells = []
        for name in SHOWN.values():
            one, marks = changes(row)[name], ["?" * bool(signals[name][2]) for signals in (before, after)]
            cells.append(f"{number(one.before)}{marks[0]} → {number(one.after)}{marks[1]} ({one.z:+.1f})")
        losses = [" → ".join(number(stage[what], 2) for stage in row["stages"]) for what in ("loss", "held out")]
        kind = kind_of(row)
        at = f" ({' and '.join(kind.resolutions)})" if kind.resolutions else ""
        lines.append([row["kind"], row["seed"], *losses, *cells, kind.name + at])
    return table(("runs", "seed", "loss", "held-out loss", *SHOWN, "kind"), lines)


def seeds_summary(rows: Sequence[Row]) -> str:
    lines = []
    for kind in SEEDS:
        mine = [row for row in rows if row["kind"] == kind]
        falls = [sum(changes(row)[name].z <= -kinds.SIGNIFICANT for row in mine) for name in SHOWN.values()]
        named = Counter(kind_of(row).name for row in mine)
        others = "; ".join(f"{count} {name}" for name, count in named.most_common() if name != "B")
        lines.append([kind, len(mine), *falls, named["B"], others or "–"])
    head = ("runs", "seeds", *(f"{name} falls" for name in SHOWN), "named B", "named otherwise")
    return table(head, lines)


def dependence_table(rows: Sequence[Row]) -> str:
    moved = {
        "as it is": (1.0, 1.0),
        "spread × ½": (0.5, 1.0),
        "spread × 2": (2.0, 1.0),
        "ε × ½": (1.0, 0.5),
        "ε × 2": (1.0, 2.0),
    }
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        stages = list(dict.fromkeys(row["stage"] for row in mine))
        at = {(row["stage"], row["spread"], one["resolution"]): one for row in mine for one in row["measured"]}
        for resolution in RESOLUTIONS:
            pairs = [[at[stage, spread, resolution * factor] for stage in stages] for spread, factor in moved.values()]
            found = [change(one["value"], one["error"], other["value"], other["error"]) for one, other in pairs]
            cells = [
                f"{one.change:+.1f} ± {one.standard_error:.1f}{' ?' * any(end['reasons'] for end in pair)}"
                for one, pair in zip(found, pairs, strict=True)
            ]
            kept = all(one.change * found[0].change > 0 for one in found)
            slope = change(*pairs[0][0]["spread slope"], *pairs[0][1]["spread slope"])
            capacity = change(pairs[0][0]["heat capacity"], 0.0, pairs[0][1]["heat capacity"], 0.0)
            foretold = kinds.keeps_its_sign(found[0], slope, capacity)
            ends = " → ".join(f"{one['value']:.1f}" for one in pairs[0])
            lines.append(
                [
                    f"{case}, {' → '.join(stages)}",
                    f"{resolution:g}",
                    ends,
                    *cells,
                    *("yes" if x else "no" for x in (kept, foretold)),
                ]
            )
    return table(("case", "at nats", "λ", *moved, "keeps its sign", "the rule of kinds says so"), lines)


def localization_table(rows: Sequence[Row]) -> str:
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        for k, resolution in enumerate(RESOLUTIONS):
            values = [row["measured"][k] for row in mine]
            middle = values[1]["value"]
            largest = max((one["value"] / middle - 1 for one in (values[0], values[2])), key=abs)
            cells = [f"{number(one['value'])} ± {one['error']:.2f}{' ?' * bool(one['reasons'])}" for one in values]
            lines.append([case, number(mine[0]["exact"]), f"{resolution:g}", *cells, f"{largest:+.1%}"])
    head = ("case", "exact", "at nats", "spread × 0.32", "× 1", "× 3.16", "largest change from × 1")
    return table(head, lines)


def figure(rows: Sequence[Row], path: Path) -> None:
    """The coefficient over the resolution, at two stages of two runs, for three spreads of the prior."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4.8 * len(cases), 4.0), layout="constrained")
    styles = dict(zip(SPREADS, (":", "-", "--"), strict=True))
    for axis, case in zip(axes, cases, strict=True):
        mine = [row for row in rows if row["case"] == case]
        colours = dict(zip(dict.fromkeys(row["stage"] for row in mine), ("tab:blue", "tab:orange"), strict=True))
        for row in mine:
            found, colour = row["measured"], colours[row["stage"]]
            axis.errorbar(
                [one["resolution"] for one in found],
                [one["value"] for one in found],
                [NORMAL_95 * one["error"] for one in found],
                color=colour,
                linestyle=styles[row["spread"]],
                capsize=2,
                label=f"{row['stage']}, spread × {row['spread']:g}",
            )
            if row["exact"] is not None and row["spread"] == 1:
                axis.axhline(
                    row["exact"], color=colour, alpha=0.3, linewidth=4, zorder=0, label=f"{row['stage']}, exact"
                )
        for resolution in RESOLUTIONS:
            axis.axvline(resolution, color="grey", linewidth=0.5, zorder=0)
        axis.set_xscale("log")
        axis.set_xlabel("resolution ε = E[D] in nats")
        axis.set_ylabel("learning coefficient of the function")
        axis.set_title(case)
        # Room for the legend above the curves.
        axis.set_ylim(0, 1.4 * axis.get_ylim()[1])
        axis.legend(fontsize=7, loc="upper center", ncols=2)
    figure.savefig(path, dpi=120)


def page(found: Row) -> str:
    finished, rows = found["seconds"], {name: found.get(name, []) for name in SECTIONS}
    times = ", ".join(f"{name} {seconds[0] / 60:.1f} ({seconds[1] / 60:.1f})" for name, seconds in finished.items())
    smaller, larger = (
        f"{one['chains']} chains, {one['burn_in']} + at most {one['draws']:,} draws" for one in (LIVE, LIVE_LARGE)
    )
    parts = [
        "# The learning coefficient of the function during training\n",
        f"`make bench-live`; torch {torch.__version__}, one thread, Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} processors.\nMinutes of processor time (wall time): {times}.\n"
        f"Sampler, as the product has it: {smaller}; from {LARGE:,} parameters on {larger}. Probe: {PROBE} samples or "
        "positions of sequences.",
    ]
    cut = [name for name in SECTIONS if name not in finished]
    if cut:
        parts.append(f"\n**Not measured to the end: {', '.join(cut)}.**")
    if rows["runs"]:
        parts += [
            f"\n## Summary\n\n{summary(rows['runs'])}\n",
            "R-hat is the same split R-hat for both, of what each draws: the divergence on the whole probe, and losses "
            "of minibatches, whose noise hides how far chains are apart. Half-widths are shares of λ (of 1 where λ is "
            "less).\n\n"
            f"Linear networks against Aoyagi's exact value at the present rank:\n\n{exactness(rows['runs'])}",
        ]
    if rows["seeds"]:
        parts += [
            f"\n## Modular addition over seeds, at steps {MEMORISED:,} and {GENERALISED:,}\n",
            "Measured on pairs that the networks were not trained on; without weight decay it goes on memorising; with "
            "all pairs there are no others, and nothing to generalise to. In brackets the change in standard errors, "
            "which is a fall from −3 on. Outputs: half the effective rank in the metric of fixed variance. The kind is "
            "named by the product's rule (`phasewatch/transitions/kinds.py`) "
            "from the two measurements and the training loss; a question mark: not reliable, and such a value names no "
            f"kind.\n\n{seeds_summary(rows['seeds'])}\n\n{seeds_table(rows['seeds'])}",
        ]
    if {"dependence"} <= finished.keys():
        parts += [
            "\n## Dependence on resolution and spread\n\n![](../../docs/behavioral_llc.png)\n",
            "What λ does from one stage to a later one, at half and double the spread of the prior and the resolution "
            f"ε (a question mark: not reliable at one of the two).\n\n{dependence_table(rows['dependence'])}",
        ]
    if {"localization"} <= finished.keys():
        parts += [
            "\n## Exact cases over the localization\n\nA factor 10 in the localization is 10^½ in the spread; thorough "
            f"settings.\n\n{localization_table(rows['localization'])}",
        ]
    if rows["runs"]:
        parts += [
            "\n## Reference runs\n",
            "± is one standard error. Half the effective rank is the coefficient were the divergence quadratic, at the "
            "same nβ (a question mark: not converged). Modular addition is measured on pairs held out, all else on "
            f"what was trained on.\n\n{runs_table(rows['runs'])}",
        ]
    if rows["runs"] and rows["runs"][0]["peer"]:
        small, large = (", ".join(map(str, one.values())) for one in (PEER, PEER_LARGE))
        parts += [
            "\n## λ of the loss by devinterp 1.3.2 on the same checkpoints\n",
            f"lr 1e-3, localization 100. Chains, burn-in and draws: {small} (from {LARGE:,} parameters on {large}), "
            f"minibatches of {PEER_BATCH} (transformer 8 sequences). n is the size of the training set (of the "
            f"transformer in characters). NaN: it stopped at one.\n\n{peer_table(rows['runs'])}",
        ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="measure these parts anew, keep the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = ROOT / "benchmarks" / "results"
    file = results / "live.json"
    found: Row = json.loads(file.read_text()) if file.exists() and arguments.only is not None else {"seconds": {}}
    for section in SECTIONS if arguments.only is None else arguments.only:
        processor, wall = time.process_time(), time.perf_counter()
        found[section] = []
        found["seconds"].pop(section, None)
        for row in SECTIONS[section]():
            found[section].append(row)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(
                f"{time.process_time() - processor:7.0f} s",
                section,
                *(row[key] for key in CALLED if key in row),
                flush=True,
            )
        found["seconds"][section] = [round(time.process_time() - processor), round(time.perf_counter() - wall)]
        file.write_text(json.dumps(found, indent=1) + "\n")
    # As read back, whether measured now or kept.
    found = json.loads(file.read_text())
    text = page(found)
    (results / "live.md").write_text(text)
    if "dependence" in found["seconds"]:
        figure(found["dependence"], ROOT / "docs" / "behavioral_llc.png")
    print(text)


if __name__ == "__main__":
    main()
