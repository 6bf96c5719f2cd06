"""What it takes to measure the checkpoints of a finished run, and how near a few of them place its transitions.

Overhead: what a sweep takes beyond the seconds that it spends in its estimators, and beyond those in ``measure``, which
has to look at the network's loss anew for each checkpoint. Throughput: checkpoints a second by the clock, with one
worker, two, and two on a local Ray where that is installed. A few of many: two runs of small networks are measured at
all of some 200 checkpoints, and others are made up; what ``--budget`` would choose of them, and as many evenly spaced,
are analysed as runs of their own and compared with all.
Prints the tables and writes benchmarks/results/sweep.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from reference_runs import (
    BATCH,
    GENERALISED,
    PRIME,
    STEPS,
    TRAINED_ON,
    ModularAddition,
    cross_entropy,
    demo_network,
    digits,
    first,
    train,
)
from synthetic import Run as Simulated
from synthetic import linear_network, synthetic_run

from phasewatch import Watch, analyze_run, measure_checkpoints
from phasewatch.estimators import BehavioralCoefficient, Estimator, HessianSpectrum
from phasewatch.record import Estimate, Measurement, Run
from phasewatch.sweep import FromBuild
from phasewatch.sweep.agenda import Agenda
from phasewatch.sweep.checkpoints import Checkpoint
from phasewatch.transitions import Transition

RESULTS = Path(__file__).parent / "results" / "sweep.md"
CHECKPOINTS = 200
FEW = (20, 40)
TIMED = 40
"""Checkpoints that workers are timed on, and the first of them, while which they start."""
STARTING = 10
REPORTING_SEED = 9_000_000
"""No run from here on was looked at when it was decided which checkpoints are chosen."""
SIMULATED = 60
NEAR = 0.05
"""A transition is found where one is within this share of the run."""
QUICK: list[Estimator] = [HessianSpectrum(num_eigenvalues=2), BehavioralCoefficient(sampled="none")]


def digits_watch() -> Watch:
    training, _ = digits()
    return Watch(demo_network(), [first(training)], loss_fn=cross_entropy, n=len(training[0]), estimators=QUICK)


def sums() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))[torch.randperm(PRIME**2)]
    return pairs, pairs.sum(1) % PRIME


def sums_watch() -> Watch:
    """On pairs that it is not trained on."""
    cut = int(TRAINED_ON * PRIME**2)
    held_out = tuple(part[cut:] for part in sums())
    return Watch(ModularAddition(), [first(held_out)], loss_fn=cross_entropy, n=cut, estimators=QUICK)


def save_digits(folder: Path) -> None:
    module = demo_network()
    keep = range(0, STEPS + 1, STEPS // CHECKPOINTS)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step, network in train(module, digits()[0], cross_entropy, optimizer, keep, BATCH, seed=0):
        torch.save(network.state_dict(), folder / f"model-{step}.pt")


def save_sums(folder: Path) -> None:
    cut = int(TRAINED_ON * PRIME**2)
    training = tuple(part[:cut] for part in sums())
    torch.manual_seed(0)
    module = ModularAddition()
    keep = range(0, GENERALISED + 1, GENERALISED // CHECKPOINTS)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.5, betas=(0.9, 0.98))
    for step, network in train(module, training, cross_entropy, optimizer, keep, None, seed=0):
        torch.save(network.state_dict(), folder / f"model-{step}.pt")


RUNS: dict[str, tuple[Callable[[Path], None], Callable[[], Watch]]] = {
    "digits MLP": (save_digits, digits_watch),
    "modular addition": (save_sums, sums_watch),
}


def some(folder: Path, count: int) -> list[Path]:
    """Evenly over the run."""
    paths = sorted(folder.glob("model-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    return [paths[k] for k in np.linspace(0, len(paths) - 1, count).round().astype(int)]


def overhead(name: str, run: Run, seconds: float) -> str:
    """A row: of a sweep that has taken so many seconds, how many were spent in estimators and in ``measure``."""
    alone = sum(sum(measurement.seconds_by_part.values()) for measurement in run.measurements)
    measuring = sum(measurement.seconds for measurement in run.measurements)
    count = len(run.measurements)
    return row(name, count, f"{alone / count:.2f} s", f"{measuring / alone - 1:.1%}", f"{seconds / alone - 1:.1%}")


def throughput(folder: Path) -> Iterator[str]:
    ways: list[tuple[str, dict[str, object]]] = [("1 worker", {"workers": 1}), ("2 workers", {"workers": 2})]
    if importlib.util.find_spec("ray"):
        ways.append(("2 workers on a local Ray", {"workers": 2, "engine": "ray"}))
    paths = some(folder, TIMED)
    for name, settings in ways:
        times: list[float] = []
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as record:
            measure_checkpoints(
                FromBuild("sweep:digits_watch"),
                paths,
                directory=record,
                say=lambda text, times=times: times.append(time.perf_counter()),
                **settings,  # type: ignore[arg-type]
            )
        ended = time.perf_counter()
        print(f"{name}: timed", flush=True)
        rate = (TIMED - STARTING) / (times[-1] - times[-1 - (TIMED - STARTING)])
        yield row(name, f"{TIMED / (ended - began):.2f}", f"{rate:.2f}")


def chosen(run: Run, count: int) -> list[Measurement]:
    """What a budget chooses that pays for so many, each of which takes a second."""
    known = {measurement.step: measurement for measurement in run.measurements}
    found: list[Measurement] = []
    checkpoints = [Checkpoint(Path(), step) for step in known]
    agenda = Agenda(checkpoints, budget=count, clock=lambda: float(len(found)))
    while (checkpoint := agenda.next()) is not None:
        found.append(replace(known[checkpoint.step], seconds=1.0))
        agenda.learn(found[-1])
    return sorted(found, key=lambda measurement: measurement.step)


def evenly(run: Run, count: int) -> list[Measurement]:
    return [run.measurements[k] for k in np.linspace(0, len(run.measurements) - 1, count).round().astype(int)]


WAYS: dict[str, Callable[[Run, int], list[Measurement]]] = {"by --budget": chosen, "evenly": evenly}


def is_same(one: Transition, other: Transition) -> bool:
    return one.start <= other.step <= one.end or other.start <= one.step <= other.end


def of_measured(name: str, run: Run) -> Iterator[str]:
    all_found = analyze_run(run).transitions
    span = run.measurements[-1].step - run.measurements[0].step
    yield row(name, "all", len(run.measurements), ", ".join(f"{one.step:,.0f}" for one in all_found) or "none", "", "")
    for count in FEW:
        for way, choose in WAYS.items():
            measurements = choose(run, count)
            found = list(analyze_run(replace(run, measurements=tuple(measurements))).transitions)
            told, off = [], []
            for one in all_found:
                nearest = min((f for f in found if is_same(one, f)), key=lambda f: abs(f.step - one.step), default=None)
                told.append("missed" if nearest is None else f"{nearest.step:,.0f}")
                if nearest is not None:
                    off.append(abs(nearest.step - one.step) / span)
            others = sum(not any(is_same(one, f) for one in all_found) for f in found)
            most = f"{max(off):.1%}" if off else ""
            yield row(name, way, count, ", ".join(told), most, str(others))


def simulated() -> dict[str, list[Run]]:
    """Runs of as many checkpoints, with one to three transitions."""
    count = CHECKPOINTS + 1
    seeds = range(REPORTING_SEED, REPORTING_SEED + SIMULATED)
    found = {
        f"{SIMULATED} with steps and ramps, stages that {what}": [
            synthetic_run(seed, count, transitions=1 + seed % 3, stages=stages) for seed in seeds
        ]
        for what, stages in (("drift", "drift"), ("bend", "curved"))
    }
    found[f"{SIMULATED} linear networks"] = [drawn_modes(seed, count) for seed in seeds]
    return {name: [recorded(run) for run in runs] for name, runs in found.items()}


def drawn_modes(seed: int, count: int) -> Simulated:
    """A linear network that learns two modes or three."""
    rng = np.random.default_rng(seed)
    strengths = rng.uniform(3.0, 5.0) / np.cumprod([1.0, *rng.uniform(1.7, 2.6, size=1 + seed % 2)])
    start, noise = 10 ** rng.uniform(-6.0, -3.5), rng.uniform(0.001, 0.01)
    return linear_network(strengths.tolist(), count, initial=start, noise_share=noise, seed=seed)


def recorded(run: Simulated) -> Run:
    def estimates(k: int) -> dict[str, Estimate]:
        errors = {name: float(given[k]) for name, given in run.standard_errors.items()}
        return {name: Estimate(float(course[k]), errors.get(name, np.nan)) for name, course in run.values.items()}

    measurements = tuple(Measurement(round(step), estimates(k)) for k, step in enumerate(run.steps))
    return Run(None, {}, measurements, transitions=(), failures=(), damaged=(), finished=True)


def of_simulated(name: str, runs: Sequence[Run]) -> Iterator[str]:
    every = [[one.step for one in analyze_run(run).transitions] for run in runs]
    for count in FEW:
        for way, choose in WAYS.items():
            hits, found, off = 0, 0, []
            for run, places in zip(runs, every, strict=True):
                few = replace(run, measurements=tuple(choose(run, count)))
                free = [one.step for one in analyze_run(few).transitions]
                found += len(free)
                spacing = (run.measurements[-1].step - run.measurements[0].step) / CHECKPOINTS
                for place in places:
                    nearest = min(free, key=lambda step, place=place: abs(step - place), default=np.inf)
                    if abs(nearest - place) <= NEAR * CHECKPOINTS * spacing:
                        free.remove(nearest)
                        hits += 1
                        off.append(abs(nearest - place) / spacing)
            total = sum(map(len, every))
            middle, high = np.percentile(off, [50, 75])
            score = f"{2 * hits / (found + total):.2f}"
            yield row(name, way, count, score, f"{hits} of {total}", found - hits, f"{middle:.1f} ({high:.1f})")
            print(f"{name}: {count} {way}: {score}", flush=True)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join([row(*heads), "|" + "---|" * len(heads), *rows])


def written_sections() -> dict[str, str]:
    """What stands in the results now, by heading."""
    _, *rest = RESULTS.read_text(encoding="utf-8").split("\n## ")
    return {heading: text.strip() for heading, _, text in (section.partition("\n") for section in rest)}


def sections(place: Path) -> dict[str, Callable[[], str]]:
    """What is measured, by the heading that it stands under."""

    def checkpoints_of(name: str) -> Path:
        folder = place / name.replace(" ", "-")
        if not folder.exists():
            folder.mkdir()
            RUNS[name][0](folder)
        return folder

    @cache
    def measured(name: str) -> tuple[Run, float]:
        folder = checkpoints_of(name)
        began = time.perf_counter()
        run = measure_checkpoints(RUNS[name][1], folder)
        print(f"{name}: measured at {len(run.measurements)} checkpoints", flush=True)
        return run, time.perf_counter() - began

    def overheads() -> str:
        heads = ["run", "checkpoints", "estimators, each", "measure, beyond", "sweep, beyond"]
        return (
            "What is taken beyond the estimators: by `measure`, which takes the loss of each checkpoint apart anew, as "
            "a loop of one's own has to, and by the whole sweep, which finds, reads, loads and records as well.\n\n"
            + table(heads, [overhead(name, *measured(name)) for name in RUNS])
        )

    def rates() -> str:
        lines = list(throughput(checkpoints_of("digits MLP")))
        return "By the clock: of the whole command, and without what it takes to start.\n\n" + table(
            ["", "checkpoints a second", "once all are at work"], lines
        )

    def a_few() -> str:
        told = [line for name in RUNS for line in of_measured(name, measured(name)[0])]
        made_up = [line for name, runs in simulated().items() for line in of_simulated(name, runs)]
        return (
            "Transitions by all checkpoints, and those of the same by a few, `--budget` choosing, or evenly; off by at "
            "most so much of the run, and how many others are found.\n\n"
            + table(["run", "measured", "checkpoints", "transitions at", "off by", "others"], told)
            + f"\n\nThe same of runs that are made up, of {CHECKPOINTS + 1} checkpoints, against what the detector "
            f"finds in all of them. Found is what lies within {NEAR:.0%} of the run, one for one, and it is off by "
            "this median (upper quartile).\n\n"
            + table(["runs", "measured", "checkpoints", "F1", "found", "others", "off by, checkpoints"], made_up)
        )

    return {"Overhead": overheads, "Throughput": rates, "A few of many": a_few}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="HEADING", help="measure the section of this heading; the others stay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    written = written_sections() if arguments.only else {}
    with tempfile.TemporaryDirectory() as place:
        for heading, measure in sections(Path(place)).items():
            if arguments.only in (None, heading):
                load, began = os.getloadavg()[0], time.perf_counter()
                text = measure()
                minutes = (time.perf_counter() - began) / 60
                written[heading] = f"{text}\n\n{minutes:.0f} minutes, at a load of {load:.1f} to begin with."
    told = (
        f"Made by `make bench-sweep` on {os.cpu_count()} cores. Python {platform.python_version()}, PyTorch "
        f"{torch.__version__}, {platform.machine()}."
    )
    parts = ["# Measuring the checkpoints of a finished run", told]
    parts += [f"## {heading}\n\n{text}" for heading, text in written.items()]
    RESULTS.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
