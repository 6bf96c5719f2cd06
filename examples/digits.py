"""The drop-in: a plain Lightning script on scikit-learn's digits, and one line for phasewatch.

Run it:  python examples/digits.py
Then:    phasewatch analyze <the directory it prints>
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from phasewatch.callbacks import PhaseWatch


class ConvNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8, 10),
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.tensor(labels)), batch_size=64, shuffle=True)

    trainer = pl.Trainer(max_epochs=100, accelerator="cpu", callbacks=[PhaseWatch(max_overhead=1.0)])
    trainer.fit(ConvNet(), loader)


if __name__ == "__main__":
    main()
