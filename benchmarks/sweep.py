"""What it takes to measure the checkpoints of a finished run, and how near a few of them place its transitions.

Overhead: what a sweep takes beyond the seconds that it spends in its estimators, and beyond those in ``measure``, which
has to look at the network's loss anew for each checkpoint. Throughput: checkpoints a second by the clock, with one
worker, two, and two on a local Ray where that is installed. Bisection: two runs of small networks are measured at all
of some 200 checkpoints; what ``--budget`` would choose of them, and as many evenly spaced, are analysed as runs of
their own and compared with all.
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

from phasewatch import Watch, analyze_run, measure_checkpoints
from phasewatch.estimators import BehavioralCoefficient, Estimator, HessianSpectrum
from phasewatch.record import Measurement, Run
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
QUICK: list[Estimator] = [HessianSpectrum(num_eigenvalues=2), BehavioralCoefficient(sampled=False)]


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


def is_same(one: Transition, other: Transition) -> bool:
    return one.start <= other.step <= one.end or other.start <= one.step <= other.end


def bisection(name: str, run: Run) -> Iterator[str]:
    all_found = analyze_run(run).transitions
    span = run.measurements[-1].step - run.measurements[0].step
    yield row(name, "all", len(run.measurements), ", ".join(f"{one.step:,.0f}" for one in all_found) or "none", "", "")
    for count in FEW:
        for way, choose in (("by bisection", chosen), ("evenly", evenly)):
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


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join([row(*heads), "|" + "---|" * len(heads), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        bisected: list[str] = []
        overheads: list[str] = []
        for name, (save, build) in RUNS.items():
            folder = Path(place) / name.replace(" ", "-")
            folder.mkdir()
            save(folder)
            before = time.perf_counter()
            run = measure_checkpoints(build, folder)
            overheads.append(overhead(name, run, time.perf_counter() - before))
            bisected += bisection(name, run)
            print(f"{name}: measured at {len(run.measurements)} checkpoints", flush=True)
        folder = Path(place) / "digits-MLP"
        rates = table(["", "checkpoints a second", "once all are at work"], list(throughput(folder)))
    shares = table(["run", "checkpoints", "estimators, each", "measure, beyond", "sweep, beyond"], overheads)
    places = table(["run", "measured", "checkpoints", "transitions at", "off by", "others"], bisected)
    text = (
        "# Measuring the checkpoints of a finished run\n\n"
        f"Made by `make bench-sweep`, in {(time.perf_counter() - began) / 60:.0f} minutes at a load of {load:.1f} on "
        f"{os.cpu_count()} cores. Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"{platform.machine()}.\n\n"
        "## Overhead\n\nWhat is taken beyond the estimators: by `measure`, which takes the loss of each checkpoint "
        "apart anew, as a loop of one's own has to, and by the whole sweep, which finds, reads, loads and records as "
        "well.\n\n"
        f"{shares}\n\n"
        f"## Throughput\n\nBy the clock: of the whole command, and without what it takes to start.\n\n{rates}\n\n"
        "## Bisection\n\nTransitions by all checkpoints, and those of the same by a few; off by at most so much of the "
        f"run, and how many others are found.\n\n{places}\n"
    )
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
