"""What a long measurement is at shows in the trainer's own bar, and the bar is as before when it is over."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
from lightning_cases import EVERY_ESTIMATOR, LEAN, Classifier, data
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from phasewatch import watch as engine
from phasewatch.callbacks import PhaseWatch


def fit(root: Any, bar: ProgressBar | None, settings: dict[str, Any] = LEAN) -> None:
    pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        default_root_dir=str(root),
        callbacks=[PhaseWatch(schedule=[0, 2], **settings), *([] if bar is None else [bar])],
        enable_progress_bar=bar is not None,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    ).fit(Classifier(), DataLoader(data(), batch_size=8))


def test_the_bar_tells_each_part_and_then_the_epoch_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SHOWN_FROM", -1.0)
    shown: list[str] = []

    class Bar(TQDMProgressBar):
        def init_train_tqdm(self) -> Any:
            bar = super().init_train_tqdm()
            plain = bar.set_description_str

            def tell(text: str, refresh: bool = True) -> None:
                shown.append(text)
                plain(text, refresh)

            bar.set_description_str = tell
            return bar

    fit(tmp_path, Bar(), EVERY_ESTIMATOR)
    parts = ["loss", "llc_behavioral", "llc", "hessian", "zeros"]
    one = [*(f"measuring {part}: " for part in parts), "Epoch 0: "]
    assert shown == one * 2


def test_a_short_measurement_leaves_the_bar_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SHOWN_FROM", 1e9)
    monkeypatch.setattr("phasewatch.callbacks.watching.ShownProgress", lambda trainer: pytest.fail)
    fit(tmp_path, TQDMProgressBar())


def test_without_a_bar_nothing_is_shown(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SHOWN_FROM", -1.0)
    fit(tmp_path, None)


def test_a_bar_of_rich(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(engine, "SHOWN_FROM", -1.0)
    shown: list[str] = []

    class Bar(RichProgressBar):
        def refresh(self, hard: bool = False) -> None:
            super().refresh(hard)
            if self.progress is not None and self.train_progress_bar_id is not None:
                shown.append(self.train_progress_bar.description)

    fit(tmp_path, Bar())
    assert [text for text in shown if "measuring" in text][:2] == ["measuring loss", "measuring llc_behavioral"]
    assert "Epoch" in shown[-1]
