"""Transitions found, missed and made up, cell by cell, beside other detectors, all measured in one process.

Runs with known truth come from tests/transitions/synthetic.py; the seeds used here were never looked at when the
detector was designed. A detection is scored strictly: it must touch the truth within 3 measurements and reach at most
6 beyond it. Writes the tables to benchmarks/results/transitions.md and a gallery to docs/transitions_gallery.png.
Peers are used where they are installed: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import ruptures
import scipy
from scipy.stats import beta

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "transitions"))
from synthetic import SAMPLINGS, Run, Score, drawn_linear_network, strict_matches, synthetic_run  # noqa: E402

from phasewatch.transitions import (  # noqa: E402  # noqa: E402
    CostWeightedLine,
    Detection,
    LiveDetector,
    OptimalPartition,
    detect_transitions,
    regression,
    resolved,
)
from phasewatch.transitions import detect as choosing  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

REPORTING_SEED = 9_000_000
RESULTS = ROOT / "benchmarks" / "results" / "transitions.md"
GALLERY = ROOT / "docs" / "transitions_gallery.png"
SETTINGS = {
    regression: (
        *("CHANGE_PRICE", "CORRELATED_CHANGE_PRICE", "BEND_PRICE", "SLOPES_PRICE", "CORRELATION_PRICE"),
        *("WIDTH_PRICE", "RESOLUTION", "SLOPE_PRIOR"),
    ),
    choosing: ("RESOLVED",),
    resolved: ("LEAST_CHANGE", "RATE_RATIO"),
}
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
    """Runs of 120 measurements without transitions."""
    kinds = {
        "power-law trend": ("power", "gauss"),
        "curved": ("curved", "gauss"),
        "AR .5": ("drift", "ar0.5"),
        "AR .8": ("drift", "ar0.8"),
        "heavy tails": ("drift", "t3"),
    }
    return {
        name: [
            synthetic_run(
                REPORTING_SEED + 100_000 * (10 + cell) + k,
                120,
                sampling=SAMPLINGS[k % 3],
                stages=stages,
                noise_kind=noise_kind,
            )
            for k in range(runs)
        ]
        for cell, (name, (stages, noise_kind)) in enumerate(kinds.items())
    }


def detect(run: Run) -> Detection:
    return detect_transitions(run.steps, run.values, standard_errors=run.standard_errors)


def phasewatch_detector(run: Run) -> Extents:
    return [(t.start, t.end) for t in detect(run)]


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


def score(detector: Detector, runs: Sequence[Run]) -> tuple[Score, float]:
    total = Score()
    began = time.perf_counter()
    found = [detector(run) for run in runs]
    seconds = time.perf_counter() - began
    for extents, run in zip(found, runs, strict=True):
        hits = len(strict_matches(extents, run))
        total += Score(hits, len(extents) - hits, len(run.transitions) - hits)
    return total, seconds / len(runs)


def quality(by_cell: dict[str, list[Run]]) -> list[str]:
    lines = [
        "| cell | F1 | precision | recall | location covered | effect covered | kind right | ms a run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in by_cell.items():
        total, located, effects, kinds = Score(), [], [], []
        began = time.perf_counter()
        found = [detect(run) for run in runs]
        each = 1e3 * (time.perf_counter() - began) / len(runs)
        for detection, run in zip(found, runs, strict=True):
            pairs = strict_matches([(t.start, t.end) for t in detection], run)
            total += Score(len(pairs), len(detection) - len(pairs), len(run.transitions) - len(pairs))
            for one, which in pairs:
                transition, truth = detection[one], run.transitions[which]
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


def alarms(by_cell: dict[str, list[Run]]) -> list[str]:
    lines = ["| null runs | false alarms a run | runs with one | ms a run |", "| --- | --- | --- | --- |"]
    for name, runs in by_cell.items():
        began = time.perf_counter()
        counts = [len(detect(run)) for run in runs]
        each = 1e3 * (time.perf_counter() - began) / len(runs)
        with_one = sum(count > 0 for count in counts)
        lines.append(f"| {name} | {np.mean(counts):.3f} | {interval(with_one, len(runs))} | {each:.0f} |")
        print(lines[-1], flush=True)
    return lines


def live_flags(run: Run) -> tuple[LiveDetector, float]:
    detector = LiveDetector()
    slowest = 0.0
    for k, step in enumerate(run.steps):
        values = {name: float(column[k]) for name, column in run.values.items()}
        errors = {name: float(column[k]) for name, column in run.standard_errors.items()}
        began = time.perf_counter()
        detector.update(float(step), values, errors)
        slowest = max(slowest, time.perf_counter() - began)
    return detector, slowest


def live_quality(by_cell: dict[str, list[Run]]) -> list[str]:
    lines = [
        "| live | F1 as revised | F1 as first flagged | median delay (quartiles) | slowest update, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, runs in by_cell.items():
        first, last, delays, slowest = Score(), Score(), [], []
        for run in runs:
            detector, worst = live_flags(run)
            slowest.append(worst)
            flags = [flag for flag in detector.flags if flag.action == "flagged"]
            pairs = strict_matches([(f.transition.start, f.transition.end) for f in flags], run)
            first += Score(len(pairs), len(flags) - len(pairs), len(run.transitions) - len(pairs))
            for one, which in pairs:
                seen = int(np.searchsorted(run.steps, flags[one].detected_at))
                delays.append(seen - run.transitions[which].first - 1)
            standing = [(t.start, t.end) for t in detector.transitions]
            hits = len(strict_matches(standing, run))
            last += Score(hits, len(standing) - hits, len(run.transitions) - hits)
        quartiles = np.percentile(delays, [25, 50, 75]) if delays else [np.nan] * 3
        lines.append(
            f"| {name} | {last.f1:.3f} | {first.f1:.3f} | {quartiles[1]:.0f} ({quartiles[0]:.0f}-{quartiles[2]:.0f}) "
            f"| {1e3 * max(slowest):.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def live_alarms(by_cell: dict[str, list[Run]]) -> list[str]:
    lines = ["| null runs, live | flagged a run | runs with one |", "| --- | --- | --- |"]
    for name, runs in by_cell.items():
        counts = [sum(flag.action == "flagged" for flag in live_flags(run)[0].flags) for run in runs]
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
        scores = {cell: score(detector, runs) for cell, runs in by_cell.items()}
        counts = [np.mean([len(detector(run)) for run in runs]) for runs in nulls.values()]
        row = [f"{s.f1:.2f}" for s, _ in scores.values()] + [f"{count:.2f}" for count in counts]
        lines.append(f"| {name} | {' | '.join(row)} | {1e3 * scores['n = 120'][1]:.1f} |")
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

    def compare(name: str, detector: Callable[[Run], Detection]) -> None:
        row = []
        for cell, runs in by_cell.items():
            others = [detector(run) for run in runs]
            both = sum(same(one, other, run) for one, other, run in zip(usual[cell], others, runs, strict=True))
            total = sum(len(one) + len(other) for one, other in zip(usual[cell], others, strict=True))
            row.append(f"{2 * both / max(total, 1):.2f}")
        lines.append(f"| {name} | {' | '.join(row)} |")
        print(lines[-1], flush=True)

    for left_out, name in enumerate(("loss", "llc (trace)", "hessian_max")):
        compare(f"without {name}", partial(without, left_out))
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
    """Draw one run of each cell: series, truth (grey), what was found (line), the location's interval (orange)."""
    figure, axes = plt.subplots(len(by_cell), 3, figsize=(13, 1.7 * len(by_cell)), layout="constrained", squeeze=False)
    for row, (name, runs) in zip(axes, by_cell.items(), strict=True):
        run = max(runs[:9], key=lambda run: len(run.transitions))
        found = detect(run)
        index = np.arange(len(run.steps))
        for axis, (signal, values) in zip(row, run.values.items(), strict=True):
            for truth in run.transitions:
                axis.axvspan(truth.first, truth.last, color="#B8BEC8", linewidth=0)
            for t in found:
                axis.axvspan(*np.interp(t.interval, run.steps, index), color="#E69F00", alpha=0.45, linewidth=0)
                axis.axvline(np.interp(t.step, run.steps, index), color="#D55E00", linewidth=1.2)
            axis.plot(index, values, "o-", color="#0072B2", markersize=1.8, linewidth=0.6)
            axis.set_title(f"{name}: {signal}", fontsize=8, loc="left")
            axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("measurement   (grey: truth, orange: 95 % interval of the location)", fontsize=8, loc="left")
    figure.savefig(GALLERY, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="runs a cell, offline (default: %(default)s)")
    parser.add_argument("--live-runs", type=int, default=12, help="runs a cell, live (default: %(default)s)")
    parser.add_argument("--peer-runs", type=int, default=24, help="runs a cell beside peers (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    runs, nulls = cells(arguments.runs), null_cells(arguments.runs)
    live, peer = arguments.live_runs, arguments.peer_runs
    parts = [
        "# Transitions: found, missed, made up",
        f"`make bench-transitions` on Python {platform.python_version()}, numpy {np.__version__}, scipy "
        f"{scipy.__version__}, ruptures {ruptures.__version__}. Strict score; in brackets 95 % binomial intervals.",
        f"## Offline, default settings, {arguments.runs} runs a cell",
        "\n".join(quality(runs)),
        "\n".join(alarms(nulls)),
        f"## Beside others, the first {peer} runs of each cell: F1, and false alarms a null run",
        "\n".join(
            beside_peers({k: v[:peer] for k, v in runs.items()}, {k: v[:peer] for k, v in nulls.items()}),
        ),
        "## Agreement with the default, the first 12 runs of three cells (F1)",
        "\n".join(agreement({k: v[:12] for k, v in runs.items() if k in ("n = 120",) or k.startswith("linear")})),
        "## Time",
        "\n".join(times()),
        f"## Live, the first {live} runs of each cell",
        "The delay is counted in measurements from the first one after the true change began.",
        "\n".join(live_quality({k: v[:live] for k, v in runs.items()})),
        "\n".join(live_alarms({k: v[:live] for k, v in nulls.items()})),
    ]
    gallery({**runs, **{f"null: {name}": some for name, some in nulls.items()}})
    RESULTS.write_text("\n\n".join(parts) + "\n")
    print(f"\nwritten: {RESULTS.relative_to(ROOT)}, {GALLERY.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
