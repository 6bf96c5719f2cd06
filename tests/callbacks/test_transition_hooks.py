"""What a user can hang on the detector: a hook, a metric, and checkpoints around each transition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import QUICK, Classifier, data
from pytorch_lightning.callbacks import EarlyStopping
from torch.utils.data import DataLoader

import phasewatch.watch
from phasewatch.analysis import Analysis
from phasewatch.callbacks import PhaseWatch, TransitionDetector
from phasewatch.record import Run, load_run
from phasewatch.transitions import Flag, LiveDetector, Transition


def transition(start: float, end: float) -> Transition:
    return Transition(start, end, 0.5 * (start + end), (start, end), "A", {}, 9.0, 1e-6)


# What a detector says at which step. A jump is flagged, revised and withdrawn; a ramp is flagged while it is under way
# and has ended later, and another one is withdrawn and stands again.
JUMP = {
    10: (0, "flagged", transition(4, 6)),
    14: (0, "revised", transition(4, 8)),
    18: (0, "withdrawn", transition(4, 8)),
}
RAMPS = {
    6: (0, "flagged", replace(transition(4, 6), under_way=True)),
    8: (0, "revised", replace(transition(4, 8), under_way=True)),
    14: (0, "revised", transition(4, 10)),
    16: (0, "revised", transition(4, 12)),
    18: (1, "flagged", replace(transition(16, 18), under_way=True)),
    20: (1, "withdrawn", replace(transition(16, 18), under_way=True)),
    22: (1, "revised", transition(16, 20)),
}


class Scripted(LiveDetector):
    def __init__(self, alpha: float, script: dict[int, Any]) -> None:
        super().__init__(alpha)
        self.script = script

    def update(self, step: float, *arguments: Any, **options: Any) -> list[Flag]:
        said = [Flag(*self.script[int(step)], step)] if int(step) in self.script else []
        self.flags.extend(said)
        return said


class ScriptedWatch(PhaseWatch):
    script = JUMP

    def detector(self) -> LiveDetector:
        return Scripted(self.alpha, self.script)


class UnderWayWatch(ScriptedWatch):
    script = RAMPS


@pytest.fixture(autouse=True)
def _borne_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run shows what the script says, of which the measurements know nothing."""

    def as_flagged(run: Run, alpha: float = 0.05, **_: Any) -> Analysis:
        return Analysis(run, run.transitions, (), alpha, None)

    monkeypatch.setattr(phasewatch.watch, "analyze_run", as_flagged)


class Metric(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["transitions"]))


def train(root: Any, watch: PhaseWatch, max_steps: int, *more: Any) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    watch.estimators = ()  # what the detector says is scripted
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        default_root_dir=str(root),
        callbacks=[watch, *more],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), DataLoader(data(), batch_size=8))
    return trainer


def test_hook_metric_and_record_see_every_flag(tmp_path: Any) -> None:
    told: list[Flag] = []
    metric = Metric()
    trainer = train(tmp_path, ScriptedWatch(schedule=2, on_transition=told.append, **QUICK), 20, metric)
    assert [(flag.action, flag.detected_at) for flag in told] == [("flagged", 10), ("revised", 14), ("withdrawn", 18)]
    assert metric.seen == [0.0] * 10 + [1.0] * 8 + [0.0] * 2
    run = load_run(trainer.log_dir)
    assert [(flag.action, flag.detected_at) for flag in run.flags] == [
        ("flagged", 10),
        ("revised", 14),
        ("withdrawn", 18),
    ]
    assert run.transitions == ()
    assert run.flags[1].transition.end == 8.0


def test_the_record_keeps_the_step_of_the_first_flag_and_the_words_of_the_last(tmp_path: Any) -> None:
    trainer = train(tmp_path, ScriptedWatch(schedule=2, **QUICK), 16)
    [standing] = load_run(trainer.log_dir).transitions
    assert (standing.flagged_at, standing.end) == (10, 8.0)


def test_checkpoints_before_at_and_after_a_transition_hold_those_weights(tmp_path: Any) -> None:
    trainer = train(tmp_path, ScriptedWatch(schedule=2, save_checkpoints=6, **QUICK), 20)
    directory = next(tmp_path.rglob("transitions"))
    saved = {path.name for path in directory.glob("transition-*")}
    assert saved == {
        "transition-0-before-step=4.ckpt",
        "transition-0-at-step=4.ckpt",
        "transition-0-after-step=10.ckpt",
    }
    assert len(list(directory.glob("recent-*"))) == 6
    before = torch.load(directory / "transition-0-before-step=4.ckpt", weights_only=True)
    after = torch.load(directory / "transition-0-after-step=10.ckpt", weights_only=True)
    assert before["global_step"] == 4 and after["global_step"] == 10
    # They are the weights of an equal run at these steps.
    assert trainer.global_step == 20
    again = train(tmp_path / "again", PhaseWatch(schedule=2, **QUICK), 4)
    for name, weight in again.lightning_module.state_dict().items():
        assert torch.equal(before["state_dict"][name], weight), name


def test_what_lies_within_and_after_a_transition_is_saved_when_it_has_ended(tmp_path: Any) -> None:
    stale = tmp_path / "run" / "transitions" / "transition-0-at-step=2.ckpt"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier run")
    train(tmp_path, UnderWayWatch(schedule=2, save_checkpoints=6, directory=str(tmp_path / "run"), **QUICK), 17)
    assert {path.name for path in stale.parent.glob("transition-*")} == {
        "transition-0-before-step=4.ckpt",
        "transition-0-at-step=6.ckpt",
        "transition-0-after-step=14.ckpt",
    }


def test_the_terminal_tells_beginnings_ends_and_errors(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(tmp_path, UnderWayWatch(schedule=2, **QUICK), 22)
    told = [line for line in caplog.messages if line.startswith("phasewatch: ") and "seen at" in line]
    assert told == [
        "phasewatch: transition (A) under way since step 4, seen at 6",
        "phasewatch: transition (A) at step 7 has ended by 10, seen at 14",
        "phasewatch: transition (A) under way since step 16, seen at 18",
        "phasewatch: no transition (A) since step 16 after all, seen at 20",
        "phasewatch: transition (A) at step 18, seen at 22",
    ]


def test_a_checkpoint_that_is_not_kept_back_any_more_is_left_out(tmp_path: Any) -> None:
    train(tmp_path, ScriptedWatch(schedule=2, save_checkpoints=2, **QUICK), 12)
    saved = {path.name for path in next(tmp_path.rglob("transitions")).glob("transition-*")}
    # Kept back at step 10 are 6 and 8: nothing before step 4.
    assert saved == {"transition-0-at-step=6.ckpt", "transition-0-after-step=10.ckpt"}


def test_checkpoints_of_another_run_in_the_same_directory_are_not_taken(tmp_path: Any) -> None:
    directory = str(tmp_path / "run")
    train(tmp_path, PhaseWatch(schedule=2, save_checkpoints=3, directory=directory, **QUICK), 24)
    watch = ScriptedWatch(schedule=2, save_checkpoints=6, directory=directory, **QUICK)
    train(tmp_path, watch, 12)
    first, second = tmp_path / "run" / "transitions", tmp_path / "run" / f"transitions-{watch.run.header['run_id']}"
    assert {path.name for path in second.glob("transition-*")} == {
        "transition-0-before-step=4.ckpt",
        "transition-0-at-step=4.ckpt",
        "transition-0-after-step=10.ckpt",
    }
    assert {int(path.stem.partition("=")[2]) for path in second.glob("recent-*")} == {0, 2, 4, 6, 8, 10}
    assert {int(path.stem.partition("=")[2]) for path in first.iterdir()} == {18, 20, 22}


def test_what_all_callbacks_ask_for_is_done(tmp_path: Any) -> None:
    told: list[Flag] = []
    own = TransitionDetector(on_transition=told.append, save_checkpoints=6)
    train(tmp_path, ScriptedWatch(schedule=2, **QUICK), 12, own)
    assert [flag.action for flag in told] == ["flagged"]
    assert len(list(tmp_path.rglob("transition-0-*.ckpt"))) == 3


def test_a_callback_in_a_new_trainer_watches_a_new_run(tmp_path: Any) -> None:
    watch = PhaseWatch(schedule=4, **QUICK)
    train(tmp_path / "one", watch, 8)
    train(tmp_path / "two", watch, 12)
    assert [m.step for m in watch.run.measurements] == [0, 4, 8, 12]


def test_a_hook_that_fails_does_not_end_the_run(tmp_path: Any) -> None:
    def failing(flag: Flag) -> None:
        raise RuntimeError("no disk")

    with pytest.warns(UserWarning, match="on_transition failed at step 10"):
        trainer = train(tmp_path, ScriptedWatch(schedule=2, on_transition=failing, **{**QUICK, "on_error": "warn"}), 12)
    assert trainer.global_step == 12


@pytest.mark.parametrize("count", [-1, 2.5, True])
def test_bad_counts_are_named(count: Any) -> None:
    for callback in (PhaseWatch, TransitionDetector):
        with pytest.raises(ValueError, match="save_checkpoints"):
            callback(save_checkpoints=count)


def test_a_hook_that_cannot_be_called_is_refused() -> None:
    for callback in (PhaseWatch, TransitionDetector):
        with pytest.raises(ValueError, match="on_transition is 3"):
            callback(on_transition=3)  # type: ignore[arg-type]


def test_a_hook_may_ask_for_a_measurement_at_the_next_step(tmp_path: Any) -> None:
    def ask(flag: Flag) -> None:
        watch.request()

    watch = ScriptedWatch(schedule=2, on_transition=ask, **QUICK)
    with pytest.raises(RuntimeError, match="training has not started"):
        watch.request()
    train(tmp_path, watch, 20)
    assert [m.step for m in watch.run.measurements] == sorted([*range(0, 21, 2), 11, 15, 19])


def test_training_stops_when_no_transition_was_seen_for_long(tmp_path: Any) -> None:
    """The jump stands from step 10 on and ends at 8, so 8 steps have gone by at 16; before it was seen, at 8."""

    class Patient(EarlyStopping):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > 10:
                self._run_early_stopping_check(trainer)

    patient = Patient("steps_since_transition", mode="max", stopping_threshold=7.5, check_on_train_epoch_end=False)
    watch = ScriptedWatch(schedule=2, **QUICK)
    watch.script = {10: JUMP[10], 14: JUMP[14]}
    train(tmp_path, watch, 40, patient)
    assert watch.run.measurements[-1].step in (16, 17)
