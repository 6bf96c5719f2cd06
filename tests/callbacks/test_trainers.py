"""Trainers, loggers and other callbacks that people put beside phasewatch."""

from __future__ import annotations

import csv
import importlib
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import LEAN, OF_THE_LOSS, Classifier, data
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor
from torch.utils.data import DataLoader

from phasewatch.callbacks import HessianMonitor, LLCMonitor, PhaseWatch, TransitionDetector
from phasewatch.estimators import BehavioralCoefficient, HessianSpectrum, LearningCoefficient
from phasewatch.record import load_run

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
LLC = "phasewatch_details/llc"
ROOT = Path(__file__).parents[2]


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, shuffle=True)


def train(tmp_path: Path, *callbacks: Any, module: Any = None, validate: bool = False, **options: Any) -> pl.Trainer:
    options = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, **options}
    trainer = pl.Trainer(callbacks=list(callbacks), default_root_dir=str(tmp_path), **QUIET, **options)
    trainer.fit(module or Classifier(), loader(), loader() if validate else None)
    return trainer


def run_script(tmp_path: Path, script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(file), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run_two_processes(tmp_path: Path, script: str, *arguments: str) -> None:
    """To its end, or to none of them: one that waits for the other would outlive the test."""
    process = run_script(tmp_path, script, *arguments, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_each_namespace_takes_the_same_callbacks(namespace: str, tmp_path: Path) -> None:
    lightning = importlib.import_module(namespace)

    class Regression(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self.layer(batch[0]).squeeze(1) - batch[1]).square().mean()
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    few = {"probe_samples": 16, "on_error": "raise", "schedule": 6}
    of_the_loss = {name: OF_THE_LOSS[name] for name in ("behavioral", "llc")}
    for callbacks in (
        [PhaseWatch(**{**LEAN, "hessian": HessianSpectrum(2)}, schedule=6)],
        [LLCMonitor(**of_the_loss, **few), HessianMonitor(HessianSpectrum(2), **few)],
        [HessianMonitor(HessianSpectrum(2), **few), TransitionDetector()],
    ):
        trainer = lightning.Trainer(
            max_epochs=2, callbacks=callbacks, default_root_dir=str(tmp_path), enable_checkpointing=False, **QUIET
        )
        trainer.fit(Regression(), loader())
        run = load_run(trainer.log_dir)
        assert [m.step for m in run.measurements] == [0, 6, 12]
        assert run.finished and not run.failures
        assert ("llc" in run.names) == ("llc" in trainer.callback_metrics) == isinstance(callbacks[0], LLCMonitor)
        assert trainer.callback_metrics["nullity"] == run.series("nullity").values[-1]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_lightning_cli_builds_it_from_yaml(namespace: str, tmp_path: Path) -> None:
    cli = importlib.import_module(f"{namespace}.cli")
    demos = importlib.import_module(f"{namespace}.demos.boring_classes")
    config = tmp_path / "config.yaml"
    config.write_text(
        textwrap.dedent(f"""\
        trainer:
          accelerator: cpu
          max_steps: 6
          limit_val_batches: 0
          default_root_dir: {tmp_path}
          enable_progress_bar: false
          enable_model_summary: false
          callbacks:
            - class_path: phasewatch.callbacks.PhaseWatch
              init_args:
                schedule: [0, 3, 6]
                behavioral: {{sampled: none}}
                llc: {{chains: 2, draws: 6, burn_in: 20}}
                hessian: {{num_eigenvalues: 2}}
                zeros: null
                extra:
                  - class_path: phasewatch.estimators.LearningCoefficient
                    init_args: {{chains: 2, draws: 6, burn_in: 20, localization: 1.0, data: near}}
                probe_samples: 16
                max_overhead: null
                on_error: raise
            - class_path: phasewatch.callbacks.TransitionDetector
              init_args:
                alpha: 0.01
        """)
    )
    built = cli.LightningCLI(
        demos.BoringModel, demos.BoringDataModule, args=["fit", "--config", str(config)], save_config_callback=None
    )
    (watch,) = [c for c in built.trainer.callbacks if isinstance(c, PhaseWatch)]
    assert [m.step for m in watch.run.measurements] == [0, 3, 6]
    estimators = watch.run.header["monitors"][0]["estimators"]
    assert (estimators["llc"]["draws"], estimators["hessian"]["num_eigenvalues"]) == (6, 2)
    assert "zeros" not in estimators and estimators["llc_near"]["localization"] == 1.0
    assert {"llc", "llc_near", "hessian_max"} <= set(watch.run.names) and "nullity_ggn" not in watch.run.names


def test_command_line_arguments_override_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    from pytorch_lightning.cli import LightningCLI
    from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel

    def build(*arguments: str) -> Any:
        arguments = ("--trainer.callbacks=phasewatch.callbacks.PhaseWatch", *arguments)
        return LightningCLI(BoringModel, BoringDataModule, run=False, args=list(arguments))

    search = ("--trainer.callbacks.search=ruptures.Binseg", "--trainer.callbacks.search.model=rbf")
    built = build("--trainer.callbacks.schedule=log", "--trainer.callbacks.llc.draws=50", *search)
    (watch,) = [c for c in built.trainer.callbacks if isinstance(c, PhaseWatch)]
    assert watch.detector().search.cost.model == "rbf"  # type: ignore[union-attr]
    assert {e.name: e for e in watch.estimators}["llc"].draws == 50  # type: ignore[attr-defined]
    for wrong in (
        "llc.draws=many",
        "llc.drawss=50",
        "hessian=many",
        "extra=[torch.nn.ReLU]",
        "on_error=ignore",
        "schedule=often",
        "search=torch.nn.ReLU",
    ):
        with pytest.raises(SystemExit):
            build(f"--trainer.callbacks.{wrong}")


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_several_loggers_all_get_every_measurement(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1)]
    watch = PhaseWatch(schedule=4, **OF_THE_LOSS)
    train(tmp_path, watch, logger=loggers, log_every_n_steps=1)
    expected = [(m.step, m.value("llc")) for m in watch.run.measurements]
    assert [step for step, _ in expected] == [0, 4, 8, 12]

    def joined(values: dict[str, list[tuple[int, float]]]) -> list[tuple[int, float]]:
        """Reliable and unreliable points in order, without the gaps."""
        both = [*values.get(LLC, []), *values.get(f"{LLC}_unreliable", [])]
        return sorted(point for point in both if not math.isnan(point[1]))

    in_tensorboard = scalars(Path(loggers[0].log_dir))
    assert joined(in_tensorboard) == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]  # float32
    assert len(in_tensorboard["train_loss"]) == 12
    with open(Path(loggers[1].log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [(int(r["step"]), float(r[name])) for r in rows if r.get(name)] for name in rows[0]}
    assert joined(columns) == expected
    doubted = {m.step for m in watch.run.measurements if not m.estimates["llc"].reliable}
    for points in (in_tensorboard, columns):
        assert {step for step, _ in points.get(f"{LLC}_unreliable", [])} == doubted
        assert [value for _, value in points["phasewatch/5_stage"]] == [0.0] * 4
    assert float(rows[-1]["phasewatch_summary/transitions"]) == 0
    assert load_run(loggers[0].log_dir).finished  # the record lies with the first logger


def test_early_stopping_and_checkpointing_on_the_learning_coefficient(tmp_path: Path) -> None:
    """EarlyStopping sees λ after each validation and stops where it does not improve on an impossible demand."""
    checkpoint = ModelCheckpoint(tmp_path, monitor="llc", mode="max", every_n_train_steps=2, filename="{step}")
    patience = EarlyStopping("llc", mode="max", min_delta=1e9, patience=2, check_on_train_epoch_end=True)
    watch = PhaseWatch(schedule=2, **OF_THE_LOSS)
    trainer = train(tmp_path, watch, patience, checkpoint, max_epochs=20, enable_checkpointing=True)
    assert trainer.current_epoch == 3  # the first epoch sets the best, the next two do not improve on it
    assert patience.stopped_epoch == 2
    # a checkpoint saved after step s holds the latest λ measured, that of the weights before that step
    known = {m.step: m.value("llc") for m in watch.run.measurements}
    candidates = [known[s - 2] for s in range(2, 20, 2) if s - 2 in known]
    assert float(checkpoint.best_model_score) == pytest.approx(max(candidates), rel=1e-6)  # type: ignore[arg-type]
    assert Path(checkpoint.best_model_path).exists()


def test_the_users_custom_scalars_survive_beside_ours(tmp_path: Path) -> None:
    class WithLayout(Classifier):
        def on_train_start(self) -> None:
            self.logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["train_loss"]]}})

    logger = TensorBoardLogger(tmp_path)
    train(tmp_path, PhaseWatch(schedule=4, **LEAN), logger=logger, module=WithLayout())

    def categories(directory: Path) -> list[str]:
        events = EventAccumulator(str(directory), size_guidance={"tensors": 0}).Reload()
        written = {e.tensor_proto.string_val[0] for e in events.Tensors("custom_scalars__config__")}
        return [category.title for text in written for category in layout_pb2.Layout.FromString(text).category]

    assert categories(Path(logger.log_dir)) == ["mine"]
    assert categories(Path(logger.log_dir) / "phasewatch") == ["phasewatch"]


@pytest.mark.parametrize("steps", [True, 3])
def test_fast_dev_run_measures_and_leaves_no_file(steps: Any, tmp_path: Path) -> None:
    watch = PhaseWatch(schedule=1, **LEAN)
    train(tmp_path, watch, fast_dev_run=steps, logger=None, validate=True)
    assert [m.step for m in watch.run.measurements] == list(range(int(steps) + 1))
    assert watch.run.path is None
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_without_training_nothing_is_measured_and_nothing_written(stage: str, tmp_path: Path) -> None:
    class Predicts(Classifier):
        test_step = Classifier.validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    watch = PhaseWatch(schedule=1, **LEAN)
    trainer = pl.Trainer(callbacks=[watch], default_root_dir=str(tmp_path), logger=False, **QUIET)
    getattr(trainer, stage)(Predicts(), loader())
    assert watch.watch is None
    assert not list(tmp_path.rglob("phasewatch*"))
    with pytest.raises(RuntimeError, match="fit has not started"):
        _ = watch.run


def test_validation_between_training_steps_is_not_measured(tmp_path: Path) -> None:
    watch = PhaseWatch(schedule=[0, 5], **LEAN)
    train(tmp_path, watch, validate=True, val_check_interval=2)
    assert [m.step for m in watch.run.measurements] == [0, 5]


def test_sharded_parameters_are_refused_in_setup(monkeypatch: Any) -> None:
    """FSDP itself needs a GPU before it comes to setup; the strategy alone can be made without."""
    trainer = pl.Trainer(logger=False, **QUIET)  # type: ignore[arg-type]
    monkeypatch.setattr(pl.Trainer, "strategy", property(lambda _: FSDPStrategy()))
    with pytest.raises(ValueError, match="FSDPStrategy shards them.*strategy='ddp'"):
        PhaseWatch().setup(trainer, Classifier(), "fit")


KILLED = """
    import os, signal, sys
    import pytorch_lightning as pl
    from lightning_cases import LEAN, Classifier, data
    from phasewatch.callbacks import PhaseWatch
    from pytorch_lightning.loggers import TensorBoardLogger
    from torch.utils.data import DataLoader

    class Killer(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 9:
                os.kill(os.getpid(), signal.SIGKILL)

    pl.seed_everything(7)
    pl.Trainer(
        max_steps=50, accelerator="cpu", logger=TensorBoardLogger(sys.argv[1], name="", version=""),
        callbacks=[PhaseWatch(schedule=2, **LEAN), Killer()], enable_progress_bar=False, enable_checkpointing=False,
    ).fit(Classifier(), DataLoader(data(), batch_size=8))
"""


def test_killed_in_mid_run_everything_measured_until_then_is_there(tmp_path: Path) -> None:
    process = run_script(tmp_path, KILLED, str(tmp_path / "run"))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, output
    run = load_run(tmp_path / "run")
    assert [m.step for m in run.measurements] == [0, 2, 4, 6, 8]
    assert not run.finished and not run.damaged and not run.failures
    logged = scalars(tmp_path / "run")["phasewatch/1_loss"]
    assert [step for step, _ in logged] == [0, 2, 4, 6, 8]


DDP = """
    import json, sys
    import pytorch_lightning as pl
    import torch
    from lightning_cases import OF_THE_LOSS, Classifier, data
    from phasewatch.callbacks import PhaseWatch
    from pytorch_lightning.callbacks import EarlyStopping
    from torch.utils.data import DataLoader

    watched = sys.argv[1] == "watched"
    pl.seed_everything(7)
    callbacks = [PhaseWatch(schedule=2, **OF_THE_LOSS)] if watched else []
    if watched:
        callbacks.append(EarlyStopping("llc", mode="max", min_delta=1e9, patience=3, check_on_train_epoch_end=True))
    trainer = pl.Trainer(
        max_epochs=4, accelerator="cpu", devices=2, strategy="ddp", callbacks=callbacks, logger=False,
        default_root_dir=sys.argv[2], enable_progress_bar=False, enable_checkpointing=False,
    )
    module = Classifier()
    trainer.fit(module, DataLoader(data(), batch_size=8, shuffle=True))
    torch.save(
        {
            "weights": module.state_dict(),
            "epochs": trainer.current_epoch,
            "llc": float(trainer.callback_metrics["llc"]) if watched else None,
            "stream": torch.get_rng_state(),
        },
        f"{sys.argv[2]}/{sys.argv[1]}-{trainer.global_rank}.pt",
    )
"""


@pytest.mark.slow
def test_two_processes_train_as_without_and_share_the_metrics(tmp_path: Path) -> None:
    for name in ("plain", "watched"):
        run_two_processes(tmp_path, DDP, name, str(tmp_path))
    plain, watched = (
        [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in ("plain", "watched")
    )
    for ours, theirs in zip(watched, plain, strict=True):
        assert ours["epochs"] == theirs["epochs"] == 4
        assert all(torch.equal(ours["weights"][k], theirs["weights"][k]) for k in theirs["weights"])
        assert torch.equal(ours["stream"], theirs["stream"])
    run = load_run(tmp_path / "phasewatch_logs")
    assert [m.step for m in run.measurements] == [0, 2, 4, 6, 8, 10, 12]  # 48 samples, 2 x 8 a step
    assert run.header["n"] == 48 and not run.failures
    assert watched[0]["llc"] == pytest.approx(watched[1]["llc"], rel=1e-6)
    assert watched[0]["llc"] == pytest.approx(run.series("llc").values[-1], rel=1e-6)


LONG = """
    import sys, time
    from datetime import timedelta
    import pytorch_lightning as pl
    from lightning_cases import LEAN, Classifier, data
    from phasewatch.callbacks import PhaseWatch
    from phasewatch.estimators import Reading
    from pytorch_lightning.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    class Slow:  # its measurement takes longer than processes wait for one another
        name = "slow"
        def read(self, objective, n, seed):
            time.sleep(50)
            return Reading({})

    pl.seed_everything(7)
    pl.Trainer(
        max_steps=3, accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=timedelta(seconds=40)), logger=False,
        callbacks=[PhaseWatch(schedule=[1], **LEAN, extra=[Slow()])], default_root_dir=sys.argv[1],
        enable_progress_bar=False, enable_checkpointing=False,
    ).fit(Classifier(), DataLoader(data(), batch_size=8))
"""


@pytest.mark.slow
def test_a_measurement_may_take_longer_than_processes_wait_for_one_another(tmp_path: Path) -> None:
    run_two_processes(tmp_path, LONG, str(tmp_path))
    assert [m.step for m in load_run(tmp_path / "phasewatch_logs").measurements] == [1]


FAILS = """
    import sys
    from types import SimpleNamespace
    import torch.distributed
    from phasewatch.callbacks import PhaseWatch
    from phasewatch.callbacks.meeting import Meeting

    rank = int(sys.argv[1])
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    watch = PhaseWatch()
    watch._meeting = Meeting(SimpleNamespace(strategy=None, world_size=2))
    assert watch._meeting.broadcast(rank) == 0
    if rank == 0:
        watch.on_exception(None, None, ZeroDivisionError())
        sys.stdin.read()  # goes on, as a script may that catches what the trainer raises
    else:
        watch._meeting.broadcast(rank)
"""


@pytest.mark.slow
def test_where_the_first_process_fails_the_others_do_not_wait_for_it(tmp_path: Path) -> None:
    first = run_script(tmp_path, FAILS, "0", str(tmp_path / "store"), stdin=subprocess.PIPE)
    other = run_script(tmp_path, FAILS, "1", str(tmp_path / "store"))
    try:
        output, _ = other.communicate(timeout=120)
        assert other.returncode == 1 and "RuntimeError" in output, output
        assert first.poll() is None
    finally:
        other.kill()
        told, _ = first.communicate()
    assert first.returncode == 0, told


def test_lambda_of_layers_and_on_other_data(tmp_path: Path) -> None:
    """Arguments of the callback become series of the record and metrics of the trainer."""
    validation = list(DataLoader(data(16, seed=5), batch_size=16))
    callback = LLCMonitor(
        schedule=[0, 9],
        behavioral=BehavioralCoefficient(chains=2, draws=16, burn_in=20, refined=("*.bias",)),
        llc=LearningCoefficient(chains=2, draws=6, burn_in=20, refined=("*.bias",)),
        probe_samples=16,
        other_data={"validation": validation},
        on_error="raise",
    )
    trainer = train(tmp_path, callback)
    for name in ("llc", "llc_*.bias", "llc_behavioral_*.bias", "llc_validation", "loss_validation"):
        assert len(callback.run.series(name).steps) == len(callback.run.measurements)
        assert name in trainer.callback_metrics
