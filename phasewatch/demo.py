"""The run behind ``phasewatch demo``: a small network learns handwritten digits, watched from start to end."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

STEPS = 4000
BATCH = 64
MEASURE_EVERY = 100
SMALL_START = 0.1
"""Factor on the usual start, so that the network rests before it learns. All four are chosen."""


def run(output: Path, seed: int = 0) -> None:
    """Train, watch, analyse, and print the transitions and where to look.

    Args:
        output: Where the run goes; a new ``version_<k>`` folder in it.
        seed: Seeds data split, initial weights, batch order and measurements.

    Raises:
        ImportError: If scikit-learn, which ships the data, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The demo's data come with scikit-learn: pip install 'phasewatch[demo]'") from error
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.loggers import TensorBoardLogger
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, TensorDataset
    from tqdm import tqdm

    from phasewatch.analysis import analyze_run
    from phasewatch.callbacks import PhaseWatch
    from phasewatch.record import load_run
    from phasewatch.report import format_table, verdict, write_report

    class Digits(pl.LightningModule):
        """Two hidden layers that start near zero, where every network is at a saddle of the loss."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.mul_(SMALL_START)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            accuracy = (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean()
            self.log("val_accuracy", accuracy)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Progress(pl.Callback):
        """One bar over all steps, where Lightning's begins anew with every epoch."""

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.bar = tqdm(total=STEPS, unit="step", dynamic_ncols=True)

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.bar.update()
            if trainer.global_step % MEASURE_EVERY == 0:
                metrics = trainer.callback_metrics
                shown = {
                    name: metrics[name].item()
                    for name in ("train_loss", "llc_behavioral", "nullity")
                    if name in metrics
                }
                self.bar.set_postfix(shown)

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.bar.close()

    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    torch.set_num_threads(1)  # matrices as small as these only get slower when they are shared out
    pl.seed_everything(seed, verbose=False)
    images, labels = load_digits(return_X_y=True)
    shuffled = torch.randperm(len(labels))
    images, labels = torch.tensor(images / 16, dtype=torch.float32)[shuffled], torch.tensor(labels)[shuffled]
    train, validation = (TensorDataset(images[part], labels[part]) for part in (slice(1437), slice(1437, None)))

    logger = TensorBoardLogger(output, name=None)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=logger,
        callbacks=[PhaseWatch(schedule=MEASURE_EVERY, seed=seed), Progress()],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        check_val_every_n_epoch=10,
    )
    print(f"Training on {len(train)} handwritten digits for {STEPS} steps, measuring every {MEASURE_EVERY}.")
    trainer.fit(Digits(), DataLoader(train, BATCH, shuffle=True), DataLoader(validation, 360))

    analysis = analyze_run(load_run(logger.log_dir))
    report = write_report(analysis, Path(logger.log_dir) / "report")
    print(f"\n{verdict(analysis)}\n\n{format_table(analysis.transitions)}\n")
    print(f"Look at the report      {report.html}")
    print(f"and at the curves with  tensorboard --logdir {output}")
