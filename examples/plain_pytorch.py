"""phasewatch in a plain PyTorch loop: two lines beside the loop, one inside.

Run it:  python examples/plain_pytorch.py
"""

import torch
from torch import nn

import phasewatch
from phasewatch.tensorboard import TensorBoardWriter

STEPS = 2000


def loss_fn(model, batch):
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.rand(512, 1) * 6 - 3
    targets = torch.sin(2 * inputs)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    probe = list(zip(inputs.split(128), targets.split(128), strict=True))
    writer = TensorBoardWriter("runs/plain_pytorch")
    with phasewatch.Watch(
        model, probe, loss_fn=loss_fn, directory="runs/plain_pytorch", schedule=50, listeners=[writer]
    ) as watch:
        for step in range(STEPS + 1):
            watch.at(step)
            chosen = torch.randint(512, (64,))
            optimizer.zero_grad()
            loss_fn(model, (inputs[chosen], targets[chosen])).backward()
            optimizer.step()

    print(watch.run)
    llc = watch.run.series("llc_behavioral")
    print(f"λ of the function: {llc.values[0]:.1f} at the start, {llc.values[-1]:.1f} at the end")
    for transition in watch.transitions:
        print(transition)
    print("curves: tensorboard --logdir runs/plain_pytorch")


if __name__ == "__main__":
    main()
