"""Runs of a trainer that are cut short: what the trainer does about it, and what is left of them."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from lightning_cases import Classifier, data, same
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

import phasewatch.watch
from phasewatch.callbacks import HessianMonitor
from phasewatch.estimators import HessianSpectrum
from phasewatch.record import Run, load_run

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class At(pl.Callback):
    """Does something before the batch at a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act()


def watching(tmp_path: Path) -> HessianMonitor:
    return HessianMonitor(
        schedule=2, hessian=HessianSpectrum(2), probe_samples=16, directory=str(tmp_path / "run"), on_error="raise"
    )


def cut_short(tmp_path: Path, callbacks: list[pl.Callback], expected: type[BaseException]) -> dict[str, Any]:
    """The weights at the end."""
    pl.seed_everything(7, verbose=False)
    module = Classifier(dropout=0.5)
    trainer = pl.Trainer(
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=str(tmp_path),
        callbacks=callbacks,
        **QUIET,
    )
    with pytest.raises(expected):
        trainer.fit(module, DataLoader(data(), batch_size=8, shuffle=True))
    return dict(module.state_dict())


def send_while_measured(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    measure = phasewatch.watch.measure

    def sent(module: Any, what: Any, probe: Any, at: int, **options: Any) -> Any:
        if at == step:
            signal.raise_signal(signum)
        return measure(module, what, probe, at, **options)

    monkeypatch.setattr(phasewatch.watch, "measure", sent)


@pytest.mark.parametrize(
    ("signum", "expected", "told"),
    [
        (signal.SIGTERM, SIGTERMException, "The run was ended by SIGTERM."),
        (signal.SIGINT, SystemExit, "The run was interrupted (Ctrl-C)."),
    ],
)
def test_a_signal_in_a_measurement(
    signum: int,
    expected: type[BaseException],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    plain = cut_short(tmp_path, [At(4, lambda: signal.raise_signal(signum))], expected)
    send_while_measured(monkeypatch, 4, signum)
    watch = watching(tmp_path)
    with caplog.at_level(logging.INFO):
        watched = cut_short(tmp_path, [watch], expected)
    for number, handler in before.items():
        signal.signal(number, handler)  # Lightning leaves Ctrl-C ignored
    assert same(plain, watched)  # the batch that SIGTERM is followed by is trained on
    run: Run = load_run(tmp_path / "run")
    assert [m.step for m in run.measurements] == [0, 2] and not run.gaps and not run.damaged
    assert [f["error"].split(" after")[0] for f in run.failures] == [f"was stopped by {signal.Signals(signum).name}"]
    assert sum("2 measurements" in message and told in message for message in caplog.messages) == 1


def test_an_exception_of_the_training_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("planted")

    watch = watching(tmp_path)
    with caplog.at_level(logging.INFO):
        cut_short(tmp_path, [watch, At(3, broken)], ZeroDivisionError)
    run = load_run(tmp_path / "run")
    assert [m.step for m in run.measurements] == [0, 2] and not run.finished
    assert run.told_ending == "The run was ended by an exception: ZeroDivisionError: planted."
    assert sum(run.told_ending in message for message in caplog.messages) == 1
