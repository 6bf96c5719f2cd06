"""A deep linear network learns its modes one after another, at times known in closed form; phasewatch finds them.

A two-layer linear network that starts small and aligned with the data learns the singular modes of the input-output map
one by one, the strength of a mode with singular value s following u(t) = s e^{2st} / (e^{2st} - 1 + s/u0), with t in
learning rate x steps (Saxe, McClelland & Ganguli 2014, https://arxiv.org/abs/1312.6120). Half of it is learnt at
t = ln((s - u0)/u0) / 2s.

Run it:  python examples/deep_linear_network.py
"""

import argparse
import math

import torch
from torch import nn

import phasewatch
from phasewatch.analysis import analyze_run
from phasewatch.report import write_report
from phasewatch.tensorboard import TensorBoardWriter

SINGULAR_VALUES = (4.0, 1.5, 0.6)
START = 1e-4  # strength of every mode at the beginning
WIDTH, SAMPLES, BATCH, NOISE = 6, 4000, 64, 0.05
LEARNING_RATE, STEPS = 0.005, 2400


def half_learnt(s: float) -> float:
    """The step at which half of the mode with singular value s is learnt."""
    return math.log((s - START) / START) / (2 * s) / LEARNING_RATE


def half_mean_squared_error(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return 0.5 * (module(inputs) - targets).square().sum(dim=1).mean()


def make_problem(seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network at its small, balanced, aligned start, and white inputs with noisy linear targets."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in range(2))
    strengths = torch.zeros(WIDTH)
    strengths[: len(SINGULAR_VALUES)] = torch.tensor(SINGULAR_VALUES)
    inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
    inputs = inputs @ torch.linalg.inv(torch.linalg.cholesky(inputs.T @ inputs / SAMPLES)).T  # exactly white
    noise = NOISE * torch.randn(SAMPLES, WIDTH, generator=generator)
    targets = inputs @ (left * strengths @ right.T).T + noise

    network = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(math.sqrt(START) * right.T)
        network[1].weight.copy_(math.sqrt(START) * left)
    return network, inputs, targets


def train(directory: str, seed: int) -> phasewatch.Run:
    """Train with plain SGD; two lines of it are phasewatch."""
    network, inputs, targets = make_problem(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed + 1)
    probe = list(zip(inputs[:1024].split(256), targets[:1024].split(256), strict=True))

    with phasewatch.Watch(
        network,
        probe,
        loss_fn=half_mean_squared_error,
        n=SAMPLES,
        directory=directory,
        total_steps=STEPS,
        schedule=30,
        listeners=[TensorBoardWriter(directory)],
        seed=seed,
    ) as watch:
        for step in range(STEPS + 1):
            watch.at(step)
            chosen = torch.randint(SAMPLES, (BATCH,), generator=generator)
            optimizer.zero_grad()
            half_mean_squared_error(network, (inputs[chosen], targets[chosen])).backward()
            optimizer.step()
            if step % 100 == 0:
                print(
                    f"\rtraining: step {step}/{STEPS}, {len(watch.transitions)} transitions flagged", end="", flush=True
                )
    print()
    return watch.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="runs/deep_linear_network", help="where the run is recorded")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    analysis = analyze_run(train(arguments.directory, arguments.seed))
    print(f"{'mode':>5} {'predicted step':>15} {'detected step':>14}   {'95 % interval':<16} {'from - to'}")
    for s in SINGULAR_VALUES:
        predicted = half_learnt(s)
        found = [t for t in analysis.transitions if t.start <= predicted <= t.end]
        detected = (
            f"{found[0].step:14.0f}   {'{:.0f} - {:.0f}'.format(*found[0].interval):<16} "
            f"{found[0].start:.0f} - {found[0].end:.0f}"
            if found
            else f"{'missed':>14}"
        )
        print(f"{s:5.1f} {predicted:15.0f} {detected}")
    hits = sum(any(t.start <= half_learnt(s) <= t.end for s in SINGULAR_VALUES) for t in analysis.transitions)
    print(f"{len(analysis.transitions) - hits} detected transitions belong to no mode")
    print(f"\nreport: {write_report(analysis, arguments.directory).html}")
    print(f"curves: tensorboard --logdir {arguments.directory}")


if __name__ == "__main__":
    main()
