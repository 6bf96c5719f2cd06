"""What it takes to measure the checkpoints of a finished run, and how near a few of them place its transitions.

Overhead: seconds of the CPU for a sweep beyond those for its estimators alone, called in a loop over the same
checkpoints, in turns. Throughput: checkpoints a second by the clock, with one worker, two, and two on a local Ray where
that is installed. Bisection: two runs of small networks are measured at all of some 200 checkpoints; what ``--budget``
would choose of them, and as many evenly spaced, are analysed as runs of their own and compared with all.
Prints the tables and writes benchmarks/results/sweep.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
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

from phasewatch import Objective, Watch, analyze_run, measure_checkpoints
from phasewatch.estimators import BehavioralCoefficient, Estimator, HessianSpectrum
from phasewatch.estimators.probe_loss import ProbeLoss
from phasewatch.isolation import isolated
from phasewatch.record import Measurement, Run
from phasewatch.sweep import FromBuild
from phasewatch.sweep.agenda import Agenda
from phasewatch.sweep.checkpoints import Checkpoint
from phasewatch.transitions import Transition

RESULTS = Path(__file__).parent / "results" / "sweep.md"
CHECKPOINTS = 200
FEW = (20, 40)
TURNS, TIMED = 3, 10
"""Times that sweep and estimators are timed, and checkpoints that they are timed on."""
QUICK: list[Estimator] = [HessianSpectrum(num_eigenvalues=2), BehavioralCoefficient(sampled=False)]
BY_CHAINS: list[Estimator] = [BehavioralCoefficient(draws=100, burn_in=50)]
ESTIMATORS = {"spectrum and effective rank": (QUICK, TIMED), "λ of the function, short chains": (BY_CHAINS, 2)}


def digits_watch(estimators: Sequence[Estimator] = QUICK) -> Watch:
    training, _ = digits()
    return Watch(demo_network(), [first(training)], loss_fn=cross_entropy, n=len(training[0]), estimators=estimators)


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


def bare(watch: Watch, paths: Sequence[Path]) -> None:
    """What a loop of one's own would do."""
    monitor = watch.main
    for path in paths:
        watch.module.load_state_dict(torch.load(path))
        with isolated(1):
            objective = Objective(watch.module, monitor.probe.batches, loss_fn=cross_entropy)
            for estimator in (ProbeLoss(), *monitor.estimators):
                estimator.read(objective, monitor.probe.n or objective.num_samples, 0)


def overhead(folder: Path) -> Iterator[str]:
    for name, (estimators, count) in ESTIMATORS.items():
        paths = some(folder, count)
        alone, swept = [], []
        for turn in range(TURNS + 1):
            watch = digits_watch(estimators)
            began = time.process_time()
            bare(watch, paths)
            between = time.process_time()
            with tempfile.TemporaryDirectory() as record:
                measure_checkpoints(lambda watch=watch: watch, paths, directory=record)
            if turn:  # the first is to warm up
                alone.append(between - began)
                swept.append(time.process_time() - between)
        seconds, more = (
            statistics.median(alone),
            statistics.median(b / a - 1 for a, b in zip(alone, swept, strict=True)),
        )
        yield f"| {name} | {len(paths)} | {seconds / len(paths):.2f} s | {more:+.1%} |"


def throughput(folder: Path) -> Iterator[str]:
    ways: list[tuple[str, dict[str, object]]] = [("1 worker", {"workers": 1}), ("2 workers", {"workers": 2})]
    if importlib.util.find_spec("ray"):
        ways.append(("2 workers on a local Ray", {"workers": 2, "engine": "ray"}))
    paths = some(folder, 40)
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
        rate = (len(paths) - 10) / (times[-1] - times[-1 - (len(paths) - 10)])
        yield row(name, f"{len(paths) / (ended - began):.2f}", f"{rate:.2f}")


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
        for name, (save, build) in RUNS.items():
            folder = Path(place) / name.replace(" ", "-")
            folder.mkdir()
            save(folder)
            run = measure_checkpoints(build, folder)
            bisected += bisection(name, run)
            print(f"{name}: measured at {len(run.measurements)} checkpoints", flush=True)
        folder = Path(place) / "digits-MLP"
        overheads = table(["estimators", "checkpoints", "alone, each", "sweep"], list(overhead(folder)))
        rates = table(["", "checkpoints a second", "once all are at work"], list(throughput(folder)))
    places = table(["run", "measured", "checkpoints", "transitions at", "off by", "others"], bisected)
    text = (
        "# Measuring the checkpoints of a finished run\n\n"
        f"Made by `make bench-sweep`, in {(time.perf_counter() - began) / 60:.0f} minutes at a load of {load:.1f} on "
        f"{os.cpu_count()} cores. Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"{platform.machine()}.\n\n"
        "## Overhead\n\nSeconds of the CPU, medians of "
        f"{TURNS} turns, on the digits MLP; the sweep reads, checks, loads and records beside.\n\n{overheads}\n\n"
        f"## Throughput\n\nBy the clock: of the whole command, and without what it takes to start.\n\n{rates}\n\n"
        "## Bisection\n\nTransitions by all checkpoints, and those of the same by a few; off by at most so much of the "
        f"run, and how many others are found.\n\n{places}\n"
    )
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
