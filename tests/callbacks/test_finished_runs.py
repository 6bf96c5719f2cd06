"""Runs of Lightning that are measured after their end: the numbers of the callback that watched, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from finished_cases import ByDictionary, Data, Module, OfTwoOptimizers, lean, stream
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningCLI

from phasewatch import load_run, measure_checkpoints
from phasewatch.callbacks import FinishedRun
from phasewatch.cli import main
from phasewatch.record import Measurement, Run
from phasewatch.sweep import sweep

CPU = {"accelerator": "cpu"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, so that all that is written is seen."""
    monkeypatch.chdir(tmp_path)


def trained(module: pl.LightningModule, data: Any, max_steps: int = 14, **settings: Any) -> Run:
    """Watched, with checkpoints in the first epoch, at its end, and in the second."""
    pl.seed_everything(1, verbose=False)
    watch = lean(**settings)
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        callbacks=[watch, ModelCheckpoint("checkpoints", save_top_k=-1, every_n_train_steps=4)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return load_run(Path(trainer.log_dir))


def found(run: Run) -> list[Measurement]:
    """What does not depend on the clock."""
    return [
        Measurement(
            m.step,
            {name: estimate for name, estimate in m.estimates.items() if name != "overhead"},
            m.histograms,
            sample_losses=m.sample_losses,
        )
        for m in run.measurements
    ]


def written() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file()}


def test_module_and_data_by_name_give_the_numbers_of_the_live_run() -> None:
    live = trained(Module(2), Data(seed=3), on_held_out=True)
    before = written()
    pl.seed_everything(77, verbose=False)
    source = FinishedRun(module="finished_cases:Module", data=Data, watch=lambda: lean(on_held_out=True), trainer=CPU)
    run = measure_checkpoints(source, "checkpoints")
    steps = [m.step for m in run.measurements]
    assert steps == [4, 8, 12] and found(run) == found(live)
    assert len(set(run.series("loss").values)) == len(set(run.series("effective_rank").values)) == 3
    for name in ("n", "seed", "module", "num_parameters"):
        assert run.header[name] == live.header[name]
    sources = [monitor["probe"]["source"] for monitor in run.header["monitors"]]
    assert sources == ["drawn from the training set", "drawn from the validation loader"]
    assert written() - before == {"checkpoints/measured/phasewatch.jsonl", "checkpoints/measured/measuring.lock"}


@pytest.mark.parametrize(
    ("module", "data", "max_steps", "settings"),
    [
        # Lightning counts the steps of both; the probe is not complete before step 4
        (lambda: OfTwoOptimizers(2), stream, 28, {"schedule": [6, 8, 10]}),
        (lambda: ByDictionary({"outputs": 2}), lambda: Data(seed=3), 14, {"save_checkpoints": 2, "mode": "train"}),
    ],
)
def test_odd_modules_and_streams_too(module: Any, data: Any, max_steps: int, settings: Any) -> None:
    live = trained(module(), data(), max_steps, **settings)
    steps = [m.step for m in live.measurements]
    assert len(steps) == 3
    trainer = {**CPU, "max_steps": max_steps}
    source = FinishedRun(module=type(module()), data=data, watch=lean(**settings), trainer=trainer)
    run = measure_checkpoints(source, "checkpoints")
    assert [m for m in found(run) if m.step in steps] == found(live)


def by_command_line(module: Any, data: Any, *arguments: str, on_held_out: bool = False, **modes: bool) -> None:
    """Train as the script of a user does."""
    chains = {"sampled": "none"} if on_held_out else None
    lean = {"behavioral": chains, "hessian": {"num_eigenvalues": 2}, "llc": None, "zeros": None, "probe_samples": 16}
    watch = {"class_path": "phasewatch.callbacks.PhaseWatch", "init_args": {**lean, "schedule": [4, 8, 12]}}
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1, "every_n_train_steps": 4}}
    shown = {"class_path": "LearningRateMonitor"}
    settings = {"max_steps": 14, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    config = {"seed_everything": 9, "trainer": {**settings, "callbacks": [shown, watch, checkpoint]}}
    Path("trainer.yaml").write_text(yaml.dump(config))
    LightningCLI(module, data, args=["fit", "--config=trainer.yaml", *arguments], **modes)


def test_a_config_as_lightning_cli_saved_it_says_all(capsys: pytest.CaptureFixture[str]) -> None:
    by_command_line(
        None, None, "--model=finished_cases.Module", "--model.outputs=2", "--data=finished_cases.Data", on_held_out=True
    )
    directory = Path("lightning_logs/version_0")
    torch.manual_seed(0)
    capsys.readouterr()
    assert main(["measure", str(directory), "--config", str(directory / "config.yaml")]) == 0
    printed = capsys.readouterr()
    live, run = load_run(directory / "phasewatch.jsonl"), load_run(directory / "measured")
    steps = [m.step for m in run.measurements]
    assert steps == [4, 8, 12] and found(run) == found(live)
    assert "record: lightning_logs/version_0/measured" in printed.out
    assert "3 of 3, step 12" in printed.err and "GPU" not in printed.err
    assert list((directory / "measured" / "phasewatch").glob("*tfevents*"))
    assert {path.name for path in Path("lightning_logs").iterdir()} == {"version_0"}
    capsys.readouterr()
    assert main(["measure", str(directory), "--config", str(directory / "config.yaml"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_config_of_subclasses_says_all() -> None:
    """As of a program that takes any module derived from one of its own."""
    by_command_line(
        *(Module, Data),
        *("--model=finished_cases.Wider", "--model.init_args.outputs=2", "--data=finished_cases.Data"),
        subclass_mode_model=True,
        subclass_mode_data=True,
    )
    directory = Path("lightning_logs/version_0")
    assert main(["measure", str(directory), "--config", str(directory / "config.yaml"), "--quiet"]) == 0
    live, run = load_run(directory / "phasewatch.jsonl"), load_run(directory / "measured")
    assert found(run) == found(live) and run.header["module"] == "Wider"


def test_a_config_that_names_no_classes_is_told_them(capsys: pytest.CaptureFixture[str]) -> None:
    by_command_line(Module, Data, "--model.outputs=2")
    directory = Path("lightning_logs/version_0")
    command = ["measure", str(directory), "--config", str(directory / "config.yaml")]
    assert main(command) == 2
    assert "names no class for model" in capsys.readouterr().err
    assert main([*command, "--module", "finished_cases:Module", "--data", "finished_cases:Data"]) == 0
    live, run = load_run(directory / "phasewatch.jsonl"), load_run(directory / "measured")
    assert found(run) == found(live)


@pytest.fixture
def checkpoints() -> Path:
    module = Module(2)
    folder = Path("plain")
    folder.mkdir()
    trainer = pl.Trainer(max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False, **CPU)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "it is not known of what network"),
        (["--module", "finished_cases:Data"], "expected a LightningModule class. For any other network give --build"),
        (["--module", "finished_cases:no_class"], "finished_cases:no_class is 3; expected a LightningModule class"),
        (["--module", "finished_cases:Modul"], "finished_cases has no Modul; expected a LightningModule class. It has"),
        (["--module", "finishd:Module"], "There is no module finishd; 'finishd:Module' was looked for in"),
        (["--module", "finished_cases.py:Module"], "expected package.module:name of a LightningModule class"),
        (
            ["--module", "finished_cases:Module"],
            "has no train_dataloader of its own, and no data was given; give --data",
        ),
        (
            ["--module", "finished_cases:Module", "--data", "finished_cases:PhaseWatch"],
            "expected a LightningDataModule",
        ),
        (["--module", "finished_cases:WithoutSavedArguments"], "has no train_dataloader of its own"),
        (["--module", "finished_cases:Module", "--watch", "finished_cases:Data"], "expected a PhaseWatch"),
        (["--module", "finished_cases:Module", "--build", "x:y"], "--build says all, and --module is for"),
        (
            ["--module", "finished_cases:Module", "--data", "finished_cases:Lost"],
            "No such file or directory: 'no/such/samples.csv'). If that is for want of the data, run the command where",
        ),
        (["--config", "none.yaml"], "none.yaml cannot be read"),
        (["--data", "finished_cases:Data"], "it is not known of what network"),
    ],
)
def test_bad_input_is_told_with_its_mend(
    arguments: list[str], told: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", str(checkpoints), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (checkpoints / "measured").exists()


def test_hyper_parameters_that_were_not_saved_are_asked_for(checkpoints: Path) -> None:
    content = torch.load(checkpoints / "last.ckpt")
    del content["hyper_parameters"]
    torch.save(content, checkpoints / "last.ckpt")
    with pytest.raises(ValueError, match="Module takes outputs, of which the first checkpoint says nothing"):
        measure_checkpoints(FinishedRun(module=Module, data=Data), checkpoints)


def test_what_a_checkpoint_names_is_not_run(checkpoints: Path) -> None:
    """LightningCLI has it name a function to make the module with, and classes of arguments."""
    content = torch.load(checkpoints / "last.ckpt")
    content["hyper_parameters"] |= {"_instantiator": "os.abort", "_class_path": "os.abort"}
    torch.save(content, checkpoints / "last.ckpt")
    source = FinishedRun(module=Module, data=lambda: Data(seed=0), watch=lean(), trainer=CPU)
    assert len(measure_checkpoints(source, checkpoints).measurements) == 1


def test_ctrl_c_ends_it_and_what_was_measured_stays(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(checkpoints / "last.ckpt")
    torch.save(content | {"global_step": 7}, checkpoints / "later.ckpt")
    source = FinishedRun(module=Module, data=lambda: Data(seed=0), watch=lean(), trainer=CPU)
    whole = sweep.measured_at

    def interrupted(watch: Any, restore: Any, checkpoint: Any, trust: bool) -> Any:
        if checkpoint.step == 7:
            raise KeyboardInterrupt
        return whole(watch, restore, checkpoint, trust)

    with monkeypatch.context() as patched:
        patched.setattr(sweep, "measured_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_checkpoints(source, checkpoints)
    run = load_run(checkpoints / "measured")
    assert [m.step for m in run.measurements] == [0] and run.ending is not None and run.ending.how == "interrupted"
    again = measure_checkpoints(source, checkpoints)
    assert [m.step for m in again.measurements] == [0, 7] and again.measurements[:1] == run.measurements
