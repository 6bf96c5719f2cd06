"""From the checkpoints of a run that nobody watched to a figure, cell by cell.

A two-layer linear network learns the modes of its data one after another; each adds to what the network's function is
made of, and the theory says when (see deep_linear_network.py). Here only its checkpoints are left.

Run it:  python examples/after_the_run.py, or cell by cell in an editor that knows "# %%"
"""

# %% A run of some time ago: all that it has left are files.
import math
from pathlib import Path

import torch
from torch import nn

import phasewatch
from phasewatch.estimators import BehavioralCoefficient, HessianSpectrum
from phasewatch.figures import run_figure
from phasewatch.report import verdict

CHECKPOINTS = Path("runs/after_the_run/checkpoints")
MODES, START, WIDTH, SAMPLES = (4.0, 1.5, 0.6), 1e-4, 6, 2000
LEARNING_RATE, STEPS, EVERY = 0.005, 2400, 60


def half_squared_error(module, batch):
    inputs, targets = batch
    return 0.5 * (module(inputs) - targets).square().sum(dim=1).mean()


def data():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in range(2))
    inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
    inputs = inputs @ torch.linalg.inv(torch.linalg.cholesky(inputs.T @ inputs / SAMPLES)).T  # exactly white
    strengths = torch.diag(torch.tensor([*MODES, *[0.0] * (WIDTH - len(MODES))]))
    targets = inputs @ (left @ strengths @ right.T).T + 0.05 * torch.randn(SAMPLES, WIDTH, generator=generator)
    return inputs, targets, left, right


def network():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))


CHECKPOINTS.mkdir(parents=True, exist_ok=True)
inputs, targets, left, right = data()
module = network()
with torch.no_grad():  # small, and aligned with the data
    module[0].weight.copy_(math.sqrt(START) * right.T)
    module[1].weight.copy_(math.sqrt(START) * left)
optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
for step in range(STEPS + 1):
    if step % EVERY == 0:
        torch.save(module.state_dict(), CHECKPOINTS / f"model-{step}.pt")
    optimizer.zero_grad()
    half_squared_error(module, (inputs, targets)).backward()
    optimizer.step()


# %% What is measured of each, and on which samples. The weights that the network has here do not matter.
def build():
    inputs, targets, *_ = data()
    probe = list(zip(inputs[:512].split(256), targets[:512].split(256), strict=True))
    quick = [HessianSpectrum(num_eigenvalues=3), BehavioralCoefficient(sampled="none")]
    return phasewatch.Watch(network(), probe, loss_fn=half_squared_error, n=SAMPLES, estimators=quick)


run = phasewatch.measure_checkpoints(build, CHECKPOINTS)  # the second time it finds all of it done

# %% A tidy table: step, name, value, standard_error, reliable.
table = run.to_pandas()
print(table.pivot(index="step", columns="name", values="value")[["loss", "effective_rank", "hessian_max"]].iloc[::8])

# %% The transitions, beside the steps at which the theory has half of each mode learnt.
analysis = phasewatch.analyze_run(run)
print(verdict(analysis))
for mode in MODES:
    print(f"mode {mode}: half learnt at step {math.log((mode - START) / START) / (2 * mode) / LEARNING_RATE:.0f}")

# %% The learning coefficient of the first and of the last, by chains whose draws are kept.
for checkpoint in (CHECKPOINTS / "model-0.pt", CHECKPOINTS / f"model-{STEPS}.pt"):
    watch = build()
    watch.module.load_state_dict(torch.load(checkpoint))
    objective = phasewatch.Objective(watch.module, [(inputs[:512], targets[:512])], loss_fn=half_squared_error)
    [fine] = phasewatch.estimate_behavioral_llc(objective, [0.003], chains=4, draws=1200, burn_in=200, keep_draws=True)
    print(checkpoint.name, fine)
if fine.kept_draws is not None:
    print(fine.kept_draws)  # fine.to_xarray(), or fine.to_arviz() for arviz.plot_trace and arviz.summary

# %% Why the flat directions at the end are flat.
print(phasewatch.explain_zeros(watch.module, objective))

# %% The figure.
figure = run_figure(analysis)
figure.savefig(CHECKPOINTS.parent / "after_the_run.png")
print(f"figure: {CHECKPOINTS.parent / 'after_the_run.png'}")
