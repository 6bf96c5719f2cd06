"""How well transitions are placed by the measurements of ``schedule="auto"``, beside as many and four times as many.

Losses at every step are known beforehand: of drawn runs whose transitions are known exactly, and of small networks that
are trained here. The schedule looks at them as it does in training, without a limit on time. What is measured is read
off at the steps that it chooses, at as many steps evenly spaced in log(1 + 20 t), as they were where nothing is known
of the run, and at four times as many; ``detect_transitions`` sees these alone. Known of networks that are
trained are the transitions that are found with eight and with sixteen times as many.
Prints the tables and writes benchmarks/results/schedule.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from reference_runs import (
    BATCH,
    GENERALISED,
    MODES,
    PRIME,
    STEPS,
    TRAINED_ON,
    Batch,
    ModularAddition,
    cross_entropy,
    demo_network,
    digits,
    half_squared_error,
)
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from phasewatch.activity import Activity
from phasewatch.schedule import SCALES, Clock, Spread
from phasewatch.transitions import detect_transitions

RESULTS = Path(__file__).parent / "results" / "schedule.md"
Array = NDArray[np.float64]
SEED = 7_000_000
LENGTH = 20_000
BESIDE = 0.25
"""Measurements up to so much earlier, or later, are those before and after a transition."""
ENOUGH = 3
VALIDATED_EVERY = 100
"""Steps, where there is something held out."""
TIMES = (1, 4)
SAME = 0.05
"""What is found at places that differ by less is the same."""


@dataclass(frozen=True)
class Course:
    """A run at every step.

    Attributes:
        losses: As training computes them, shape (steps,).
        measure: What measurements at these steps give.
        transition: Where 10 %, half and 90 % of its transition have happened; None where that is not known exactly.
        validated: What a user logs now and then: name to steps and values.
    """

    losses: Array
    measure: Callable[[Sequence[int]], dict[str, Array]]
    transition: tuple[float, float, float] | None = None
    validated: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)


@dataclass
class Placed:
    """What came of measuring a run at some steps.

    Attributes:
        count: Measurements.
        found: Transitions that were found, by their steps.
        around: Measurements before, within and after the transition.
    """

    count: int
    found: list[float]
    around: tuple[int, int, int] = (0, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="drawn runs of each kind")
    parser.add_argument("--no-results", action="store_true", help="print only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = report(of_drawn_runs(given.runs), of_trained_runs(), given.runs)
    print(text)
    if not given.no_results:
        RESULTS.write_text(text)


def chosen(course: Course) -> list[int]:
    """Where ``schedule="auto"`` measures, and the end."""
    schedule, clock = Spread(None), Clock(total_steps=len(course.losses))
    activity = Activity(clock.scale)
    steps: list[int] = []
    step, seen = schedule.next_visit(-1, clock), 0
    while step is not None and step < len(course.losses):
        activity.take("loss", range(seen, step), course.losses[seen:step].tolist())
        for name, (at, values) in course.validated.items():
            new = [k for k in range(len(at)) if seen <= at[k] < step]
            activity.take(name, [at[k] for k in new], [values[k] for k in new])
        seen, clock.last_active = step, activity.last
        if schedule.measures(step, clock):
            clock.taken, clock.last_taken = clock.taken + 1, step
            steps.append(step)
        step = schedule.next_visit(step, clock)
    return [*steps, len(course.losses)]


def even(length: int, count: int) -> list[int]:
    """As many, evenly spaced in log(1 + 20 t)."""
    time = np.linspace(0, np.log1p(SCALES), count)
    return sorted(set((np.expm1(time) / SCALES * length).round().astype(int).tolist()))


def placed(course: Course, steps: Sequence[int]) -> Placed:
    found = [transition.step for transition in detect_transitions(steps, course.measure(steps))]
    if course.transition is None:
        return Placed(len(steps), found)
    start, _, end = course.transition
    at = np.array(steps)
    limits = [((1 - BESIDE) * start, start), (start, end), (end, (1 + BESIDE) * end)]
    before, within, after = (int(((at >= low) & (at <= high)).sum()) for low, high in limits)
    return Placed(len(steps), found, (before, within, after))


def drawn(seed: int, noise: float, abrupt: bool) -> Course:
    """A power law that falls by a third to two thirds at one place, while lambda moves by four to eight of its errors.

    The place is drawn from 1,600 to 13,000 of 20,000 steps, even in the logarithm; of the fall, 80 % take a fiftieth to
    a fifth of the steps until then.
    """
    rng = np.random.default_rng(seed)
    steps = np.arange(LENGTH + 1)
    half_way = 10 ** rng.uniform(3.2, 4.1)
    width = 1.0 if abrupt else half_way * rng.uniform(0.02, 0.2)
    share = 1 / (1 + np.exp(-np.clip(np.log(81) * (steps - half_way) / width, -50, 50)))
    loss = rng.uniform(0.1, 0.3) + (1 + steps / 10 ** rng.uniform(1.0, 2.5)) ** -rng.uniform(0.3, 0.7)
    loss = loss - rng.uniform(0.33, 0.67) * np.interp(half_way, steps, loss) * share
    change = rng.choice([-1, 1]) * rng.uniform(4.0, 8.0)
    coefficient = 20 + rng.uniform(-3, 3) * np.log1p(steps / 1000) + change * share + rng.standard_normal(LENGTH + 1)
    probe_loss = loss * np.exp(0.03 * rng.standard_normal(LENGTH + 1))

    def measure(at: Sequence[int]) -> dict[str, Array]:
        return {"loss": probe_loss[list(at)], "llc": coefficient[list(at)]}

    losses = loss[:-1] * (1 + noise * rng.standard_normal(LENGTH))
    return Course(losses, measure, (half_way - width / 2, half_way, half_way + width / 2))


def trained(
    module: nn.Module,
    data: Batch,
    loss_fn: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch: int | None,
    held_out: Batch | None = None,
) -> Course:
    """A run that keeps its weights at every step, so that it can be measured at any."""
    generator = torch.Generator().manual_seed(0)
    parameters = list(module.parameters())
    weights = np.empty((steps + 1, sum(p.numel() for p in parameters)), np.float32)
    losses = np.empty(steps)
    for step in range(steps):
        weights[step] = parameters_to_vector(parameters).detach().numpy()
        rows = torch.randint(len(data[0]), (batch,), generator=generator) if batch else slice(None)
        optimizer.zero_grad()
        loss = loss_fn(module, tuple(part[rows] for part in data))
        loss.backward()
        losses[step] = loss.item()
        optimizer.step()
    weights[steps] = parameters_to_vector(parameters).detach().numpy()

    def measure(at: Sequence[int]) -> dict[str, Array]:
        sets = {"loss": data} | ({} if held_out is None else {"loss_held_out": held_out})
        values: dict[str, list[float]] = {name: [] for name in (*sets, "weight_norm")}
        for step in at:
            vector = torch.from_numpy(weights[step])
            vector_to_parameters(vector, parameters)
            with torch.no_grad():
                for name, samples in sets.items():
                    values[name].append(float(loss_fn(module, tuple(part[:1000] for part in samples))))
            values["weight_norm"].append(float(vector.norm()))
        return {name: np.array(own) for name, own in values.items()}

    at = list(range(0, steps, VALIDATED_EVERY))
    validated = {} if held_out is None else {"loss_held_out": (at, measure(at)["loss_held_out"].tolist())}
    return Course(losses, measure, None, validated)


def linear_network() -> Course:
    """Learns three modes one after another from a small start, as the reference run 6-6-6 does."""
    generator = torch.Generator().manual_seed(0)
    frames = [torch.linalg.qr(torch.randn(6, 6, generator=generator))[0][:, :3] for _ in range(2)]
    x = torch.randn(4_000, 6, generator=generator)
    y = x @ ((frames[0] * torch.tensor(MODES)) @ frames[1].T).T + torch.randn(4_000, 6, generator=generator)
    module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.001, generator=generator)
    return trained(module, (x, y), half_squared_error, torch.optim.SGD(module.parameters(), lr=0.02), 4_000, 64)


def digits_network() -> Course:
    """The network of ``phasewatch demo``."""
    training, held_out = digits()
    module = demo_network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return trained(module, training, cross_entropy, optimizer, STEPS, BATCH, held_out)


def grokking_network() -> Course:
    """Modular addition, which it memorises and then generalises."""
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    order = torch.randperm(len(pairs))
    data, cut = (pairs[order], pairs[order].sum(1) % PRIME), int(TRAINED_ON * len(pairs))
    module = ModularAddition()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.5, betas=(0.9, 0.98))
    training, held_out = tuple(part[:cut] for part in data), tuple(part[cut:] for part in data)
    return trained(module, training, cross_entropy, optimizer, GENERALISED, None, held_out)


TRAINED: dict[str, Callable[[], Course]] = {
    "linear network 6-6-6, batches of 64": linear_network,
    "digits (demo)": digits_network,
    "modular addition, grokking": grokking_network,
}


def of_drawn_runs(runs: int) -> Iterator[str]:
    for abrupt in (False, True):
        for noise in (0.03, 0.1, 0.3):
            courses = [drawn(SEED + k, noise, abrupt) for k in range(runs)]
            by_itself = [(course, chosen(course)) for course in courses]
            rows = {"auto": [placed(course, steps) for course, steps in by_itself]}
            for times in TIMES:
                name = f"{times} × as many, even" if times > 1 else "as many, even"
                rows[name] = [placed(course, even(LENGTH, times * len(steps))) for course, steps in by_itself]
            for name, results in rows.items():
                yield _row("abrupt" if abrupt else "gradual", noise, name, courses, results)


def _row(kind: str, noise: float, name: str, courses: Sequence[Course], results: Sequence[Placed]) -> str:
    errors, spurious = [], 0
    for course, result in zip(courses, results, strict=True):
        assert course.transition is not None
        start, half_way, end = course.transition
        near = [step for step in result.found if (1 - BESIDE) * start <= step <= (1 + BESIDE) * end]
        spurious += len(result.found) - bool(near)
        errors += [min(abs(step - half_way) for step in near) / half_way] if near else []
    enough = [sum(result.around[k] >= ENOUGH for result in results) / len(results) for k in range(3)]
    count = statistics.mean(result.count for result in results)
    place = f"{statistics.median(errors):.1%} / {np.quantile(errors, 0.9):.1%}" if errors else ""
    within = "" if kind == "abrupt" else f"{enough[1]:.0%}"
    return (
        f"| {kind}, noise {noise:.0%} | {name} | {count:.0f} | {len(errors) / len(results):.0%} | {place} "
        f"| {spurious / len(results):.2f} | {enough[0]:.0%} | {within} | {enough[2]:.0%} |"
    )


def of_trained_runs() -> Iterator[str]:
    for name, train in TRAINED.items():
        course = train()
        length, steps = len(course.losses), chosen(course)
        surely, known = (placed(course, even(length, times * len(steps))).found for times in (8, 16))
        known = [one for one in known if any(abs(one - other) <= SAME * one for other in surely)]
        for how, at in [("auto", steps)] + [
            (f"{times} × as many, even" if times > 1 else "as many, even", even(length, times * len(steps)))
            for times in TIMES
        ]:
            found = placed(course, at).found
            errors = [min((abs(step - place) for step in found), default=float("inf")) for place in known]
            seen = [error / place for error, place in zip(errors, known, strict=True) if error <= BESIDE * place]
            place = f"{statistics.median(seen):.1%} / {max(seen):.1%}" if seen else ""
            yield f"| {name} | {how} | {len(at)} | {len(seen)} of {len(known)} | {len(found)} | {place} |"


def report(of_drawn: Iterator[str], of_trained: Iterator[str], runs: int) -> str:
    drawn_table = "\n".join(
        [
            "| runs | measured | measurements | found | place off by (median / 90 %) | others found a run "
            f"| ≥ {ENOUGH} before | ≥ {ENOUGH} within | ≥ {ENOUGH} after |",
            "|" + "---|" * 9,
            *of_drawn,
        ]
    )
    trained_table = "\n".join(
        [
            "| run | measured | measurements | found | found in all | place off by (median / most) |",
            "|" + "---|" * 6,
            *of_trained,
        ]
    )
    return (
        '# Where `schedule="auto"` measures\n\n'
        f"Made by `make bench-schedule`: {runs} drawn runs of each kind, {LENGTH:,} steps with one transition, and "
        "networks trained at once. Nothing but what was measured is looked at for transitions; the loss at every step "
        "only says where to measure. The place is in parts of the step; before and after is up to "
        f"{BESIDE:.0%} of the step earlier and later.\n"
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}.\n\n"
        f"{drawn_table}\n\n## Networks that are trained\n\nKnown is what is found with eight and with "
        f"sixteen times as many. What is held out is validated every {VALIDATED_EVERY} steps.\n\n"
        f"{trained_table}\n"
    )


if __name__ == "__main__":
    main()
