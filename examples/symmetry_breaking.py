"""Units of a small ReLU network die while it trains with plain SGD; the ledger of zeros says which, and when.

A ReLU network has one zero eigenvalue of the Gauss-Newton matrix for each hidden unit, whatever its weights are:
multiply what enters the unit and divide what leaves it by the same number. That is the generic part of the ledger. A
step that is too long can push a unit to where no sample reaches it. Its weights then do nothing at all, which gives
d_in + d_out zeros more, and it stays so. The zeros come from one step to the next; how rarely the unit is active
beforehand is seen coming.

Run it:  python examples/symmetry_breaking.py
"""

import argparse
import os

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn

from phasewatch import Objective, Watch, ZeroLedger, explain_zeros
from phasewatch.estimators import HessianSpectrum, SymmetryLedger
from phasewatch.tensorboard import TensorBoardWriter

INPUTS, WIDTH, SAMPLES, BATCH = 3, 10, 128, 8
LEARNING_RATE, STEPS = 0.06, 300


def mean_squared_error(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return (module(inputs) - targets).square().mean()


def train(seed: int, directory: str) -> tuple[list[ZeroLedger], list[float]]:
    """Train with SGD, with a ledger at every step, and every third in TensorBoard."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, INPUTS, generator=generator)
    targets = 2 * torch.sin(2 * inputs[:, :1]) * inputs[:, 1:2] + 0.3 * torch.randn(SAMPLES, 1, generator=generator)
    network = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)

    ledgers, losses = [], []
    watch = Watch(
        network,
        [(inputs, targets)],
        loss_fn=mean_squared_error,
        directory=directory,
        schedule=3,
        estimators=(HessianSpectrum(), SymmetryLedger()),
        listeners=[TensorBoardWriter(directory)],
    )
    for step in range(STEPS + 1):
        objective = Objective(network, [(inputs, targets)], loss_fn=mean_squared_error)
        ledgers.append(explain_zeros(network, objective))
        losses.append(objective.loss().item())
        watch.at(step)
        chosen = torch.randint(SAMPLES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        mean_squared_error(network, (inputs[chosen], targets[chosen])).backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"\rtraining: step {step}/{STEPS}, {ledgers[-1].certified} zeros", end="", flush=True)
    watch.close(STEPS)
    print()
    return ledgers, losses


def dead_units(ledger: ZeroLedger) -> set[int]:
    return {unit for finding in ledger.of_kind("dead") for group in finding.units for unit in group}


def events(ledgers: list[ZeroLedger]) -> list[tuple[int, int, str]]:
    """Step, unit and what happened to it."""
    found = []
    for step in range(1, len(ledgers)):
        before, after = dead_units(ledgers[step - 1]), dead_units(ledgers[step])
        found += [(step, unit, "dies") for unit in sorted(after - before)]
        found += [(step, unit, "comes back") for unit in sorted(before - after)]
    return found


def draw(ledgers: list[ZeroLedger], losses: list[float], path: str) -> None:
    steps = range(len(ledgers))
    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(7.5, 6.5), layout="constrained")
    top.semilogy(steps, losses, color="black", linewidth=1)
    top.set_ylabel("loss")
    other = [sum(n for kind, n in ledger.non_generic.items() if kind != "dead") for ledger in ledgers]
    middle.stackplot(
        steps,
        [ledger.generic for ledger in ledgers],
        [ledger.non_generic["dead"] for ledger in ledgers],
        other,
        [ledger.unexplained or 0 for ledger in ledgers],
        labels=["generic: rescaling", "dead units", "other non-generic", "unexplained"],
        colors=["#9aa5b1", "#c0392b", "#e0a458", "#5b2a86"],
        step="post",
        linewidth=0,
    )
    middle.set_ylabel("zero eigenvalues")
    middle.legend(loc="lower right", fontsize="small")
    active = [ledger.closeness[0].distances["dead"][0] for ledger in ledgers]
    bottom.plot(steps, active, color="#c0392b", linewidth=1, drawstyle="steps-post")
    bottom.set_ylabel("least share of samples\nthat reach a unit")
    bottom.set_xlabel("step")
    for step, unit, what in events(ledgers):
        for axes in (top, middle, bottom):
            axes.axvline(step, color="black", linewidth=0.6, linestyle=":")
        top.annotate(
            f"unit {unit} {what}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=7,
            ha="right",
            va="top",
        )
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="runs/symmetry_breaking.png", help="where the figure is saved")
    parser.add_argument(
        "--directory", default="runs/symmetry_breaking", help="where the record and TensorBoard's files go"
    )
    arguments = parser.parse_args()

    ledgers, losses = train(arguments.seed, arguments.directory)
    columns = f"{'step':>5} {'loss':>8} {'generic':>8} {'dead':>5} {'other':>6} {'unexplained':>12} {'nullity':>8}"
    print(f"{columns}  what happens")
    happened = events(ledgers)
    for step in sorted({0, STEPS, *(step for step, _, _ in happened)}):
        ledger = ledgers[step]
        dead = ledger.non_generic["dead"]
        print(
            f"{step:5d} {losses[step]:8.4f} {ledger.generic:8d} {dead:5d} "
            f"{sum(ledger.non_generic.values()) - dead:6d} "
            f"{_known(ledger.unexplained):>12} {_known(ledger.nullity):>8}  "
            + ", ".join(f"unit {unit} of layer 0 {what}" for at, unit, what in happened if at == step)
        )
    print(f"\nThe ledger at the end:\n{ledgers[-1].table()}")
    draw(ledgers, losses, arguments.figure)
    print(f"\nfigure: {arguments.figure}; curves: tensorboard --logdir {arguments.directory}")


def _known(count: int | None) -> str:
    return "unknown" if count is None else str(count)


if __name__ == "__main__":
    main()
