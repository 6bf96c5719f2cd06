"""Transitions found, missed and made up, cell by cell, beside other detectors, all measured in one process.

Runs with known truth come from tests/transitions (synthetic, linear networks, the toy model of superposition); the
seeds used here were never looked at when the detector was designed. A detection is scored strictly: it must touch the
truth within 3 measurements and reach at most 6 beyond it. Writes the tables to benchmarks/results/transitions.md and a
gallery to docs/transitions_gallery.png.
Peers are used where they are installed: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np
import ruptures
import scipy
from matplotlib import pyplot as plt
from scipy.stats import beta
from superposition import superposition_runs
from synthetic import SAMPLINGS, Run, Score, Truth, drawn_linear_network, strict_matches, synthetic_run
from two_clocks import NOISES, TwoClocks, found_on_both, touching, two_clock_run

from phasewatch.record.signals import TRAINING_LOSS
from phasewatch.record.trace import Observed
from phasewatch.transitions import (
    CostWeightedLine,
    Detection,
    Flag,
    LiveDetector,
    OptimalPartition,
    Transition,
    candidates,
    detect_transitions,
    noisy,
    regression,
    resolved,
    series,
    standing_transitions,
    stretches,
)
from phasewatch.transitions import detect as choosing

ROOT = Path(__file__).parents[1]

matplotlib.use("Agg")

REPORTING_SEED = 9_000_000
RESULTS = ROOT / "benchmarks" / "results" / "transitions.md"
GALLERY = ROOT / "docs" / "transitions_gallery.png"
SETTINGS = {
    regression: (
        *("CHANGE_PRICE", "CORRELATED_CHANGE_PRICE", "BEND_PRICE", "SLOPES_PRICE", "CORRELATION_PRICE"),
        *("WIDTH_PRICE", "RESOLUTION", "SLOPE_PRIOR", "PLACES", "FITTED", "RAMP"),
    ),
    series: ("NOISE_FLOOR", "LOG_SPAN", "LOG_OFFSET", "SPIKE", "LOUDER"),
    noisy: ("SELECTION",),
    candidates: ("CANDIDATE_RATE", "LEAST_SPACING"),
    choosing: ("RESOLVED",),
    resolved: ("LEAST_CHANGE", "FASTER", "PLAINLY_BETTER"),
    stretches: ("FASTER_IN_STEPS",),
}
SPACING = 100.0  # steps between the measurements of runs on two clocks
Extents = list[tuple[float, float]]
Detector = Callable[[Run], Extents]


def cells(runs: int) -> dict[str, list[Run]]:
    """Runs with one to three transitions, of each sampling in turn."""

    def drawn(cell: int, n: int, stages: str = "drift", noise_kind: str = "gauss") -> list[Run]:
        return [
            synthetic_run(
                REPORTING_SEED + 100_000 * cell + k,
                n,
                transitions=1 + k % 3,
                sampling=SAMPLINGS[k // 3 % 3],
                stages=stages,
                noise_kind=noise_kind,
            )
            for k in range(runs)
        ]

    return {
        "n = 60": drawn(0, 60),
        "n = 120": drawn(1, 120),
        "n = 240": drawn(2, 240),
        "heavy tails": drawn(3, 120, noise_kind="t3"),
        "curved stages": drawn(4, 120, stages="curved"),
        "linear nets, linear time": [drawn_linear_network(REPORTING_SEED + k, "linear") for k in range(runs)],
        "linear nets, log time": [drawn_linear_network(REPORTING_SEED + 500_000 + k, "log") for k in range(runs)],
    }


def null_cells(runs: int) -> dict[str, list[Run]]:
    """Runs without transitions, of 120 measurements where nothing else is said."""
    kinds = {
        "power-law trend": (120, "power", "gauss"),
        "curved": (120, "curved", "gauss"),
        "AR .5": (120, "drift", "ar0.5"),
        "AR .8": (120, "drift", "ar0.8"),
        "heavy tails": (120, "drift", "t3"),
        "AR .5, n = 60": (60, "drift", "ar0.5"),
        "AR .8, n = 60": (60, "drift", "ar0.8"),
    }
    return {
        name: [
            synthetic_run(
                REPORTING_SEED + 100_000 * (10 + cell) + k,
                n,
                sampling=SAMPLINGS[k % 3],
                stages=stages,
                noise_kind=noise_kind,
            )
            for k in range(runs)
        ]
        for cell, (name, (n, stages, noise_kind)) in enumerate(kinds.items())
    }


def detect(run: Run) -> Detection:
    return detect_transitions(run.steps, run.values, standard_errors=run.standard_errors)


def phasewatch_detector(run: Run) -> Extents:
    return extents(detect(run))


def standardized(run: Run) -> np.ndarray:
    y = np.column_stack(list(run.values.values()))
    return np.asarray((y - y.mean(axis=0)) / y.std(axis=0))


def at_bounds(run: Run, bounds: Sequence[int]) -> Extents:
    return [(float(run.steps[b - 1]), float(run.steps[b])) for b in bounds if 0 < b < len(run.steps)]


def ruptures_kernel(kernel: str, penalty: float | None, run: Run) -> Extents:
    y = standardized(run)
    search = ruptures.KernelCPD(kernel=kernel, min_size=2, jump=1).fit(y)
    return at_bounds(run, search.predict(pen=penalty or y.shape[1] * np.log(len(y)))[:-1])


def ruptures_pelt(model: str, run: Run) -> Extents:
    y = standardized(run)
    dimensions = y.shape[1]
    search = ruptures.Pelt(model=model, min_size=5, jump=1).fit(y)
    return at_bounds(run, search.predict(pen=2 * dimensions * np.log(len(y)))[:-1])


def skchange_pelt(run: Run) -> Extents:
    from skchange.detectors import PELT

    return at_bounds(run, np.asarray(PELT().fit_predict(standardized(run))).tolist())


def fastcpd_mean(run: Run) -> Extents:
    from fastcpd import segmentation

    return at_bounds(run, [int(c) for c in segmentation.mean(standardized(run)).cp_set])


def bayesian_online(run: Run) -> Extents:
    """Adams & MacKay 2007 for each signal, hazard 1/200: a change where a run length of 3 has a probability > .9."""
    import bayesian_changepoint_detection.online_changepoint_detection as online

    places: list[int] = []
    for y in standardized(run).T:
        lengths, _ = online.online_changepoint_detection(
            y, partial(online.constant_hazard, 200), online.StudentT(0.1, 0.01, 1, 0)
        )
        probable = np.flatnonzero(lengths[3, 3:-1] > 0.9)
        places += [int(k) for k in probable if k > 0]
    merged: list[int] = []
    for place in sorted(places):
        if not merged or place - merged[-1] > 3:
            merged.append(place)
    return at_bounds(run, merged)


def peers() -> dict[str, Detector]:
    found: dict[str, Detector] = {
        "ruptures l2, d log n": partial(ruptures_kernel, "linear", None),
        "ruptures rbf, pen 3": partial(ruptures_kernel, "rbf", 3.0),
        "ruptures rbf, pen 10": partial(ruptures_kernel, "rbf", 10.0),
        "ruptures normal, 2d log n": partial(ruptures_pelt, "normal"),
        "ruptures clinear, 2d log n": partial(ruptures_pelt, "clinear"),
    }
    for module, name, detector in (
        ("skchange", "skchange PELT", skchange_pelt),
        ("fastcpd", "fastcpd mean", fastcpd_mean),
        ("bayesian_changepoint_detection", "Bayesian online", bayesian_online),
    ):
        if importlib.util.find_spec(module):
            found[name] = detector
    return found


def interval(count: int, total: int) -> str:
    """Share with its 95 % Clopper-Pearson interval."""
    if total == 0:
        return "-"
    low = float(beta.ppf(0.025, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(0.975, count + 1, total - count)) if count < total else 1.0
    return f"{count / total:.3f} ({low:.2f}-{high:.2f})"


def extents(transitions: Sequence[Transition]) -> Extents:
    return [(t.start, t.end) for t in transitions]


def matched(found: Sequence[Extents], runs: Sequence[Run]) -> tuple[Score, list[tuple[int, int, Truth]]]:
    """Score of what was found in some runs, and the hits: number of the run, of what was found there, and its truth."""
    total, hits = Score(), []
    for number, (here, run) in enumerate(zip(found, runs, strict=True)):
        pairs = strict_matches(here, run)
        hits += [(number, one, run.transitions[which]) for one, which in pairs]
        total += Score(len(pairs), len(here) - len(pairs), len(run.transitions) - len(pairs))
    return total, hits


def timed(detector: Callable[[Run], Detection], runs: Sequence[Run]) -> tuple[list[Detection], float]:
    """What a detector finds, and the milliseconds it takes for a run."""
    began = time.perf_counter()
    found = [detector(run) for run in runs]
    return found, 1e3 * (time.perf_counter() - began) / len(runs)


def quality(by_cell: dict[str, list[Run]]) -> list[str]:
    lines = [
        "| cell | F1 | precision | recall | location covered | effect covered | kind right | ms a run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in by_cell.items():
        found, each = timed(detect, runs)
        total, hits = matched([extents(detection) for detection in found], runs)
        located, effects, kinds = [], [], []
        for number, one, truth in hits:
            transition = found[number][one]
            located.append(transition.interval[0] <= truth.step[1] and transition.interval[1] >= truth.step[0])
            if truth.kind:
                kinds.append(transition.kind == truth.kind)
            for signal, height in truth.changes.items():
                change = transition.changes[signal]
                # loss and hessian_max are the exponentials of what has this height
                true = height if signal == "llc" else change.before * np.expm1(height)
                effects.append(change.interval[0] <= true <= change.interval[1])
        lines.append(
            f"| {name} | {total.f1:.3f} | {interval(total.hits, total.hits + total.false)} "
            f"| {interval(total.hits, total.hits + total.missed)} | {interval(sum(located), len(located))} "
            f"| {interval(sum(effects), len(effects))} | {interval(sum(kinds), len(kinds))} | {each:.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def superposition(runs: list[Run]) -> list[str]:
    """Trained runs of the toy model of superposition, whose levels are known: what the loss sees, and the rest."""
    found = [detect(run) for run in runs]
    seen = [[t for t in detection if "loss" in t.seen_by] for detection in found]
    total, hits = matched([extents(transitions) for transitions in seen], runs)
    located = measured = 0
    for number, one, truth in hits:
        transition = seen[number][one]
        located += transition.interval[0] <= truth.step[1] and transition.interval[1] >= truth.step[0]
        change = transition.changes["loss"].interval
        measured += change[0] <= truth.changes["loss"] <= change[1]
    staying = [number for number, run in enumerate(runs) if not run.transitions]
    rest = sum(len(detection) for detection in found) - sum(len(transitions) for transitions in seen)
    return [
        "| runs that move | that stay | F1 | precision | recall | location covered | change of loss covered "
        "| alarms in those that stay: seen by the loss | by the curvature alone | by the curvature alone, in all |",
        "| --- |" + " --- |" * 9,
        f"| {len(runs) - len(staying)} | {len(staying)} | {total.f1:.3f} "
        f"| {interval(total.hits, total.hits + total.false)} | {interval(total.hits, total.hits + total.missed)} "
        f"| {interval(located, len(hits))} | {interval(measured, len(hits))} "
        f"| {sum(len(seen[number]) for number in staying)} "
        f"| {sum(len(found[number]) - len(seen[number]) for number in staying)} | {rest} |",
    ]


def alarms(by_cell: dict[str, list[Run]]) -> list[str]:
    lines = ["| null runs | false alarms a run | runs with one | ms a run |", "| --- | --- | --- | --- |"]
    for name, runs in by_cell.items():
        found, each = timed(detect, runs)
        counts = [len(detection) for detection in found]
        with_one = sum(count > 0 for count in counts)
        lines.append(f"| {name} | {np.mean(counts):.3f} | {interval(with_one, len(runs))} | {each:.0f} |")
        print(lines[-1], flush=True)
    return lines


def live_flags(run: Run) -> tuple[LiveDetector, float, float]:
    """Show a run to the live detector; also return the processor time of all updates and of the slowest, in seconds."""
    detector = LiveDetector()
    taken = slowest = 0.0
    for k, step in enumerate(run.steps):
        values = {name: float(column[k]) for name, column in run.values.items()}
        errors = {name: float(column[k]) for name, column in run.standard_errors.items()}
        began = time.process_time()
        detector.update(float(step), values, errors)
        seconds = time.process_time() - began
        taken, slowest = taken + seconds, max(slowest, seconds)
    return detector, taken, slowest


def all_live(runs: Sequence[Run]) -> list[tuple[LiveDetector, float, float]]:
    """Show each of the runs to a detector of its own, as many at once as there are processors."""
    with ProcessPoolExecutor() as processes:
        return list(processes.map(live_flags, runs))


def last_words(detector: LiveDetector) -> list[tuple[Transition, float, float]]:
    """What stands at the end, in order: each transition, the step of the first word on it, and since when it stands."""
    first: dict[int, float] = {}
    since: dict[int, float] = {}
    last: dict[int, Flag] = {}
    for flag in detector.flags:
        if flag.number not in last or last[flag.number].action == "withdrawn":
            since[flag.number] = flag.detected_at
        first.setdefault(flag.number, flag.detected_at)
        last[flag.number] = flag
    standing = [flag for flag in last.values() if flag.action != "withdrawn"]
    return [(f.transition, first[f.number], since[f.number]) for f in sorted(standing, key=lambda f: f.transition.step)]


def live_quality(by_cell: dict[str, list[Run]]) -> list[str]:
    lines = [
        "| live | F1 as revised | F1 as first flagged | median delay (quartiles) of the first word "
        "| of the word that stands | lines a run | withdrawn | ms a measurement | slowest, ms |",
        "| --- |" + " --- |" * 8,
    ]
    for name, runs in by_cell.items():
        detectors, taken, slowest = zip(*all_live(runs), strict=True)
        each = 1e3 * sum(taken) / sum(len(run.steps) for run in runs)
        flagged = [[f.transition for f in detector.flags if f.action == "flagged"] for detector in detectors]
        first, _ = matched([extents(transitions) for transitions in flagged], runs)
        standing = [last_words(detector) for detector in detectors]
        revised, hits = matched([extents([transition for transition, _, _ in words]) for words in standing], runs)
        delays = [
            [np.searchsorted(runs[number].steps, step) - truth.first - 1 for step in standing[number][one][1:]]
            for number, one, truth in hits
        ]
        quartiles = [
            f"{middle:.0f} ({low:.0f}-{high:.0f})"
            for low, middle, high in np.percentile(delays, [25, 50, 75], axis=0).T
        ]
        withdrawn = np.mean([sum(flag.action == "withdrawn" for flag in detector.flags) for detector in detectors])
        told = np.mean([len(detector.flags) for detector in detectors])
        lines.append(
            f"| {name} | {revised.f1:.3f} | {first.f1:.3f} | {' | '.join(quartiles)} | {told:.1f} | {withdrawn:.2f} "
            f"| {each:.0f} | {1e3 * max(slowest):.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def live_alarms(by_cell: dict[str, list[Run]]) -> list[str]:
    lines = ["| null runs, live | flagged a run | runs with one |", "| --- | --- | --- |"]
    for name, runs in by_cell.items():
        counts = [sum(flag.action == "flagged" for flag in detector.flags) for detector, _, _ in all_live(runs)]
        with_one = sum(count > 0 for count in counts)
        lines.append(f"| {name} | {np.mean(counts):.3f} | {interval(with_one, len(runs))} |")
        print(lines[-1], flush=True)
    return lines


def beside_peers(by_cell: dict[str, list[Run]], nulls: dict[str, list[Run]]) -> list[str]:
    lines = [
        f"| | {' | '.join(by_cell)} | {' | '.join(f'null: {name}' for name in nulls)} | ms, n = 120 |",
        f"| --- |{' --- |' * (len(by_cell) + len(nulls) + 1)}",
    ]
    for name, detector in {"phasewatch": phasewatch_detector, **peers()}.items():
        row = [f"{matched([detector(run) for run in runs], runs)[0].f1:.2f}" for runs in by_cell.values()]
        row += [f"{np.mean([len(detector(run)) for run in runs]):.2f}" for runs in nulls.values()]
        each = median_ms(lambda detector=detector: [detector(run) for run in by_cell["n = 120"]], 1)  # type: ignore[misc]
        lines.append(f"| {name} | {' | '.join(row)} | {each / len(by_cell['n = 120']):.1f} |")
        print(lines[-1], flush=True)
    return lines


def same(one: Detection, other: Detection, run: Run) -> int:
    """How many transitions of two detections touch within 3 measurements, each used once."""
    free = list(other)
    for transition in one:
        a, b = np.searchsorted(run.steps, [transition.start, transition.end])
        for candidate in free:
            c, d = np.searchsorted(run.steps, [candidate.start, candidate.end])
            if a <= d + 3 and b >= c - 3:
                free.remove(candidate)
                break
    return len(other) - len(free)


def without(left_out: int, run: Run) -> Detection:
    names = [name for k, name in enumerate(run.values) if k != left_out]
    errors = {name: run.standard_errors[name] for name in names if name in run.standard_errors}
    return detect_transitions(run.steps, {name: run.values[name] for name in names}, standard_errors=errors)


def with_alpha(alpha: float, run: Run) -> Detection:
    return detect_transitions(run.steps, run.values, standard_errors=run.standard_errors, alpha=alpha)


def agreement(by_cell: dict[str, list[Run]]) -> list[str]:
    """F1, to the default's, of what is found without one signal or with a setting at an end of a threefold range."""
    lines = [f"| changed | {' | '.join(by_cell)} |", f"| --- |{' --- |' * len(by_cell)}"]
    usual = {cell: [detect(run) for run in runs] for cell, runs in by_cell.items()}

    def compare(name: str, detector: Callable[[Run], Detection], seen_without: int | None = None) -> None:
        row = []
        for cell, runs in by_cell.items():
            total = Score()
            for run, default in zip(runs, usual[cell], strict=True):
                other, expected = detector(run), default
                if seen_without is not None:
                    left_out = list(run.values)[seen_without]
                    expected = Detection(t for t in default if set(t.seen_by) - {left_out})
                both = same(expected, other, run)
                total += Score(both, len(other) - same(default, other, run), len(expected) - both)
            row.append(f"{total.f1:.2f}")
        lines.append(f"| {name} | {' | '.join(row)} |")
        print(lines[-1], flush=True)

    for left_out, name in enumerate(("loss", "llc (trace)", "hessian_max")):
        compare(f"without {name}", partial(without, left_out))
        compare("... of those that another signal sees", partial(without, left_out), seen_without=left_out)
    end = 3**0.5
    for alpha in (0.05 / end, 0.05 * end):
        compare(f"alpha {alpha:.3f}", partial(with_alpha, alpha))
    for module, settings in SETTINGS.items():
        for name in settings:
            usual_value = getattr(module, name)
            for factor in (1 / end, end):
                setattr(module, name, usual_value * factor)
                compare(f"{name} x {factor:.2f}", detect)
            setattr(module, name, usual_value)
    return lines


def times() -> list[str]:
    """Median over five of the exact search alone, of ruptures' Pelt on the same cost, and of the whole detection."""
    lines = [
        "| points x signals | search, ms | ruptures.Pelt on the same cost, ms | whole detection, ms |",
        "| --- | --- | --- | --- |",
    ]
    for n in (300, 1000):
        run = synthetic_run(REPORTING_SEED, n, transitions=3)
        y, t = standardized(run), np.log(run.steps + run.steps[0])
        weights = np.full_like(y, 25.0)

        def search(y: np.ndarray = y, t: np.ndarray = t, weights: np.ndarray = weights) -> object:
            return OptimalPartition(CostWeightedLine(t, weights)).fit_predict(y, 20.0)

        def pelt(y: np.ndarray = y, t: np.ndarray = t, weights: np.ndarray = weights) -> object:
            return ruptures.Pelt(custom_cost=CostWeightedLine(t, weights), min_size=3, jump=1).fit_predict(y, 20.0)

        found = [median_ms(search, 5), median_ms(pelt, 1), median_ms(partial(detect, run), 5)]
        lines.append(f"| {n} x 3 | {found[0]:.1f} | {found[1]:.0f} | {found[2]:.0f} |")
        print(lines[-1], flush=True)
    return lines


def median_ms(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def gallery(by_cell: dict[str, list[Run]]) -> None:
    """Draw one run of each cell: its signals above each other, truth (grey), found (line), 95 % interval (orange)."""
    columns = 3
    rows = -(-len(by_cell) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 2.5 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, runs) in zip(axes.flat, by_cell.items(), strict=False):
        run = max(runs[:9], key=lambda run: len(run.transitions))
        index = np.arange(len(run.steps))
        axis.set_axis_on()
        for truth in run.transitions:
            axis.axvspan(truth.first, truth.last, color="#B8BEC8", linewidth=0)
        for t in detect(run):
            axis.axvspan(*np.interp(t.interval, run.steps, index), color="#E69F00", alpha=0.45, linewidth=0)
            axis.axvline(np.interp(t.step, run.steps, index), color="#D55E00", linewidth=1.2)
        for height, values in enumerate(reversed(run.values.values())):
            low, high = np.quantile(values, [0.01, 0.99])
            shown = height + 0.8 * np.clip((values - low) / (high - low), -0.1, 1.1)
            axis.plot(index, shown, "o-", color="#0072B2", markersize=1.6, linewidth=0.5)
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=7, left=False)
        axis.set_yticks(0.4 + np.arange(len(run.values)), [name.replace("_", "\n") for name in reversed(run.values)])
    figure.supxlabel("measurement   (grey: truth, line: found, orange: 95 % interval of the location)", fontsize=9)
    figure.savefig(GALLERY, dpi=110)
    plt.close(figure)


def measured_alone(run: TwoClocks) -> Detection:
    return detect(run.measured)


def observed_alone(run: TwoClocks) -> Detection:
    return detect_transitions([], {}, dense={TRAINING_LOSS: (run.steps, run.loss)})


def loss_alone(run: TwoClocks) -> Extents:
    """Pelt with the l2 cost and jump 1, d log n, on the loss of every step (KernelCPD finds the same, in C)."""
    loss = (run.loss - run.loss.mean()) / run.loss.std()
    bounds = ruptures.KernelCPD(kernel="linear", min_size=2, jump=1).fit(loss).predict(pen=np.log(len(loss)))[:-1]
    return [(float(run.steps[b - 1]), float(run.steps[b])) for b in bounds]


def watched(run: TwoClocks, observing: bool) -> list[Flag]:
    """What the live detector says of a run, shown the loss at every step or not."""
    detector, seen = LiveDetector(), 0
    for k, step in enumerate(run.measured.steps):
        if observing:
            now = slice(seen, int(step) + 1)
            detector.observe({"loss": Observed(run.steps[now], run.loss[now])})
            seen = int(step) + 1
        values = {name: float(column[k]) for name, column in run.measured.values.items()}
        errors = {name: float(column[k]) for name, column in run.measured.standard_errors.items()}
        detector.update(float(step), values, errors)
    return detector.flags


def clock_runs(cell: int, noise: str, moving: int, staying: int) -> tuple[list[TwoClocks], list[TwoClocks]]:
    """Runs with one to three transitions, and runs without."""
    first = REPORTING_SEED + 2_000_000 + 100_000 * cell
    return (
        [two_clock_run(first + k, 1 + k % 3, noise) for k in range(moving)],
        [two_clock_run(first + 50_000 + k, 0, noise) for k in range(staying)],
    )


def two_clocks(runs: int, nulls: int) -> list[str]:
    """The loss at every step and 40 even measurements: found, made up and how far off, by what is looked at."""
    lines = [
        "| noise of the loss | looked at | F1 | precision | recall | place off by, steps: median (quartiles) "
        "| place covered | false alarms a null run | null runs with one | s a run |",
        "| --- |" + " --- |" * 9,
    ]
    detectors: dict[str, Callable[[TwoClocks], Detection]] = {
        "both": found_on_both,
        "measurements, evenly spaced": measured_alone,
        "loss at every step": observed_alone,
    }
    for cell, noise in enumerate(NOISES):
        moving, staying = clock_runs(cell, noise, runs, nulls)
        for name, detector in detectors.items():
            began = time.process_time()
            found = [detector(run) for run in moving]
            seconds = (time.process_time() - began) / runs
            told = [[(t.start, t.end, t.step, t.interval) for t in detection] for detection in found]
            alarms = [len(detector(run)) for run in staying]
            lines.append(two_clock_row(noise, name, told, moving, alarms, seconds))
        began = time.process_time()
        places = [loss_alone(run) for run in moving]
        seconds = (time.process_time() - began) / runs
        told = [[(a, b, 0.5 * (a + b), (a, b)) for a, b in extents] for extents in places]
        alarms = [len(loss_alone(run)) for run in staying]
        lines.append(two_clock_row(noise, "loss at every step, by ruptures l2, log n", told, moving, alarms, seconds))
    return lines


def two_clock_row(
    noise: str,
    name: str,
    told: Sequence[Sequence[tuple[float, float, float, tuple[float, float]]]],
    runs: Sequence[TwoClocks],
    alarms: Sequence[int],
    seconds: float,
) -> str:
    hits = true = found = covered = 0
    off = []
    for here, run in zip(told, runs, strict=True):
        pairs = touching([(start, end) for start, end, _, _ in here], run, SPACING)
        hits, true, found = hits + len(pairs), true + len(run.places), found + len(here)
        for one, which in pairs:
            _, _, step, (low, high) = here[one]
            off.append(abs(step - run.places[which][0]))
            covered += low <= run.places[which][0] <= high
    low, middle, high = np.percentile(off, [25, 50, 75]) if off else (np.nan,) * 3
    row = (
        f"| {noise} | {name} | {2 * hits / max(found + true, 1):.2f} | {interval(hits, found)} "
        f"| {interval(hits, true)} | {middle:.0f} ({low:.0f}-{high:.0f}) | {interval(covered, hits)} "
        f"| {np.mean(alarms):.2f} | {interval(sum(count > 0 for count in alarms), len(alarms))} | {seconds:.2f} |"
    )
    print(row, flush=True)
    return row


def two_clocks_live(runs: int, nulls: int) -> list[str]:
    lines = [
        "| noise of the loss, live | looked at | F1 as revised | delay of the first word, steps: median (quartiles) "
        "| flagged a null run | null runs with one |",
        "| --- |" + " --- |" * 5,
    ]
    for cell, noise in enumerate(NOISES):
        moving, staying = clock_runs(cell, noise, runs, nulls)
        for name, observing in (("both", True), ("measurements, evenly spaced", False)):
            hits = true = found = 0
            delays = []
            for run in moving:
                flags = watched(run, observing)
                standing = standing_transitions(flags)
                pairs = touching(extents(standing), run, SPACING)
                hits, true, found = hits + len(pairs), true + len(run.places), found + len(standing)
                for one, which in pairs:
                    centre, width = run.places[which]
                    delays.append((standing[one].flagged_at or np.nan) - (centre - width / 2))
            alarms = [sum(flag.action == "flagged" for flag in watched(run, observing)) for run in staying]
            low, middle, high = np.percentile(delays, [25, 50, 75]) if delays else (np.nan,) * 3
            lines.append(
                f"| {noise} | {name} | {2 * hits / max(found + true, 1):.2f} | {middle:.0f} ({low:.0f}-{high:.0f}) "
                f"| {np.mean(alarms):.2f} | {interval(sum(count > 0 for count in alarms), nulls)} |"
            )
            print(lines[-1], flush=True)
    return lines


def sections(arguments: argparse.Namespace) -> dict[str, Callable[[], list[str]]]:
    """What is measured, by the heading that it stands under; each makes the runs that it needs."""
    live, peer, trained = arguments.live_runs, arguments.peer_runs, arguments.trained_runs
    every = cache(lambda: (cells(arguments.runs), null_cells(arguments.runs)))
    moving = cache(lambda: superposition_runs(range(REPORTING_SEED, REPORTING_SEED + trained)))

    def some(count: int, which: int) -> dict[str, list[Run]]:
        return {name: runs[:count] for name, runs in every()[which].items()}

    def three_cells() -> dict[str, list[Run]]:
        return {name: runs for name, runs in some(16, 0).items() if name == "n = 120" or name.startswith("linear")}

    def drawn() -> list[str]:
        staying = {f"null: {name}": runs for name, runs in every()[1].items()}
        gallery({**every()[0], "superposition": sorted(moving(), key=lambda run: -len(run.transitions)), **staying})
        return [f"`{GALLERY.relative_to(ROOT)}`: a run of each cell, its truth and what was found."]

    return {
        f"Offline, default settings, {arguments.runs} runs a cell": lambda: [
            *quality(every()[0]),
            "",
            *alarms(every()[1]),
        ],
        f"Two clocks: the loss at each of 4,000 steps, 40 measurements, {arguments.clock_runs} runs a cell and "
        f"{arguments.clock_nulls} null runs": lambda: [
            "A loss of minibatches that scatters by a tenth, and falls by 10 to 40 % once to three times, in one step "
            "or over up to 200; beside it λ, the trace and the loss on a probe. A detection counts that comes within "
            "a spacing of the measurements of the truth, and reaches at most twice as far beyond it.",
            "",
            *two_clocks(arguments.clock_runs, arguments.clock_nulls),
        ],
        f"Two clocks, live, the first {arguments.live_clock_runs} runs of each cell and {arguments.live_clock_nulls} "
        "null runs": lambda: [
            "The delay is counted from the step at which the true change began, for what stands at the end and is "
            "right.",
            "",
            *two_clocks_live(arguments.live_clock_runs, arguments.live_clock_nulls),
        ],
        f"Toy model of superposition, {trained} trained runs": lambda: [
            "Counted is what the loss sees. Within a level the curvature may change too: neither a hit nor false.",
            "",
            *superposition(moving()),
        ],
        f"Beside others, the first {peer} runs of each cell: F1, and false alarms a null run": lambda: beside_peers(
            some(peer, 0), some(peer, 1)
        ),
        "Agreement with the default, the first 16 runs of three cells (F1)": lambda: agreement(three_cells()),
        "Time": times,
        f"Live, the first {live} runs of each cell": lambda: [
            "The delay is counted in measurements from the first one after the true change began, for the transitions "
            "that stand at the end and are right; what was withdrawn and said again stands since it was said again.",
            "",
            *live_quality(some(live, 0)),
            "",
            *live_alarms(some(live, 1)),
        ],
        "Gallery": drawn,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="runs a cell, offline (default: %(default)s)")
    parser.add_argument("--live-runs", type=int, default=60, help="runs a cell, live (default: %(default)s)")
    parser.add_argument("--trained-runs", type=int, default=80, help="runs of superposition (default: %(default)s)")
    parser.add_argument("--peer-runs", type=int, default=24, help="runs a cell beside peers (default: %(default)s)")
    parser.add_argument("--clock-runs", type=int, default=40, help="runs a cell on two clocks (default: %(default)s)")
    parser.add_argument("--clock-nulls", type=int, default=80, help="null runs of these (default: %(default)s)")
    parser.add_argument("--live-clock-runs", type=int, default=6, help="of these live (default: %(default)s)")
    parser.add_argument("--live-clock-nulls", type=int, default=12, help="null runs live (default: %(default)s)")
    parser.add_argument(
        "--only", metavar="WORDS", help="measure the sections whose headings hold these words; the others stay"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    before = written_sections()
    written = {}
    for heading, measure in sections(arguments).items():
        if arguments.only is None or arguments.only.lower() in heading.lower():
            print(f"\n{heading}", flush=True)
            written[heading] = "\n".join(measure())
        else:
            # What was measured with other numbers of runs stands under its own heading.
            same = [old for old in before if old.split(",")[0] == heading.split(",")[0]]
            written.update({old: before[old] for old in same})
    told = (
        f"`make bench-transitions` on Python {platform.python_version()}, numpy {np.__version__}, scipy "
        f"{scipy.__version__}, ruptures {ruptures.__version__}. Strict score; in brackets 95 % binomial intervals."
    )
    parts = ["# Transitions: found, missed, made up", told]
    parts += [f"## {heading}\n\n{text}" for heading, text in written.items()]
    RESULTS.write_text("\n\n".join(parts) + "\n")
    print(f"\nwritten: {RESULTS.relative_to(ROOT)}")


def written_sections() -> dict[str, str]:
    """What stands in the results now, by heading."""
    if not RESULTS.exists():
        return {}
    _, *rest = RESULTS.read_text().split("\n## ")
    return {heading: text.strip() for heading, _, text in (section.partition("\n") for section in rest)}


if __name__ == "__main__":
    main()
