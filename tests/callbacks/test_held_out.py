"""λ of the function is measured on samples of the validation loader, where there are some that serve."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_cases import FEW_DRAWS, LEAN
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from phasewatch.callbacks import HessianMonitor, LLCMonitor, PhaseWatch, monitoring
from phasewatch.estimators import BehavioralCoefficient, HessianSpectrum, LearningCoefficient, SymmetryLedger
from phasewatch.measure import seed_at
from phasewatch.objective import Objective
from phasewatch.record import load_run

TRAINING, VALIDATION, SAMPLES = 96, 80, 64
FEW: dict[str, Any] = {**LEAN, "probe_samples": SAMPLES}


def samples(count: int, seed: int, width: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, width, generator=generator), torch.randint(3, (count,), generator=generator)
    )


def training() -> DataLoader[Any]:
    return DataLoader(samples(TRAINING, 0), batch_size=16)


def validation(seed: int = 1) -> DataLoader[Any]:
    return DataLoader(samples(VALIDATION, seed), batch_size=40, shuffle=True)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(
    path: Path,
    callback: Any,
    train: Any,
    validate: Any = None,
    max_steps: int = 6,
    ckpt_path: Any = None,
    checkpoint: bool = False,
    make_module: Any = Classifier,
    **options: Any,
) -> Any:
    """The callback, after a run of one epoch in a directory of its own."""
    callbacks = [callback, *([ModelCheckpoint(path, filename="{step}", save_top_k=-1)] if checkpoint else [])]
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=checkpoint,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(make_module(), train, validate, ckpt_path=ckpt_path)
    return callback


def watch(path: Path, **settings: Any) -> PhaseWatch:
    return PhaseWatch(**{"schedule": 3, "directory": str(path), **FEW, **settings})


def cross_entropy(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module.network(batch[0]), batch[1])


def drawn_by_hand(dataset: TensorDataset, seed: int = 0) -> list[Any]:
    """The samples that the seed chooses, in one batch."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return [tuple(tensor[order[:SAMPLES]] for tensor in dataset.tensors)]


def test_lambda_of_the_function_is_that_of_validation_samples_and_all_else_that_of_the_probe(tmp_path: Path) -> None:
    """Beside an objective built by hand on the same samples, and the run that leaves them out."""
    estimator = BehavioralCoefficient(chains=2, draws=32, burn_in=20, refined=("network.0",))
    settings = {
        "behavioral": estimator,
        "llc": LearningCoefficient(chains=2, draws=6, burn_in=20, refined=("network.0",)),
        "hessian": HessianSpectrum(2),
        "zeros": SymmetryLedger(),
        "schedule": [0],
    }
    held = fitted(tmp_path / "held", watch(tmp_path / "held", **settings), training(), validation())
    probe = fitted(tmp_path / "probe", watch(tmp_path / "probe", held_out=False, **settings), training(), validation())
    found, on_probe = held.run.measurements[0], probe.run.measurements[0]
    module, batches = Classifier(), drawn_by_hand(samples(VALIDATION, 1))
    objective = Objective(module, batches, loss_fn=cross_entropy)
    expected = estimator.read(objective, TRAINING, seed_at(0, 0)).estimates
    assert {"llc_behavioral", "llc_behavioral_coarse", "llc_behavioral_network.0", "llc_outputs"} <= expected.keys()
    assert {"effective_rank", "misfit_change", "description_length"} <= expected.keys()
    for name, estimate in expected.items():
        assert found.value(name) == pytest.approx(estimate.value, rel=1e-9, nan_ok=True), name
        assert found.estimates[name].doubts == estimate.doubts
    assert found.value("llc_behavioral") != pytest.approx(on_probe.value("llc_behavioral"), rel=1e-3)
    assert found.value("loss_held_out") == pytest.approx(cross_entropy(module, batches[0]).item(), rel=1e-6)
    assert found.value("loss") == pytest.approx(
        cross_entropy(module, drawn_by_hand(samples(TRAINING, 0))[0]).item(), rel=1e-6
    )
    rest = on_probe.estimates.keys() - expected.keys() - {"overhead", "nullity_threshold", "nullity_ggn_threshold"}
    assert {"loss", "llc", "hessian_trace", "zeros_certified"} <= rest
    for name in rest:
        assert found.value(name) == pytest.approx(on_probe.value(name), rel=1e-9, nan_ok=True), name
    assert found.sample_losses == on_probe.sample_losses
    sources = [(m["probe"]["data"], m["probe"]["source"], list(m["estimators"])) for m in held.run.header["monitors"]]
    assert sources == [
        ("", "drawn from the training set", ["llc", "hessian", "zeros"]),
        ("held_out", "drawn from the validation loader", ["llc_behavioral"]),
    ]
    assert held.run.header["monitors"][1]["n"] == TRAINING
    assert "loss_held_out" not in probe.run.names


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from samples(VALIDATION, 1)


def of_dictionaries() -> DataLoader[Any]:
    inputs, targets = samples(VALIDATION, 1).tensors
    rows = [{"inputs": x, "targets": y} for x, y in zip(inputs, targets, strict=True)]
    return DataLoader(rows, batch_size=16)  # type: ignore[arg-type]


class Broken(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        raise OSError("the file is gone")


FALLBACKS: dict[str, tuple[Any, str]] = {
    "too few": (lambda: DataLoader(samples(31, 1), batch_size=16), "31 samples, less than half of the 64 of the probe"),
    "another form": (of_dictionaries, "the loss cannot be taken on them"),
    "another width": (lambda: DataLoader(samples(80, 1, width=7), batch_size=16), "the loss cannot be taken on them"),
    "a stream": (lambda: DataLoader(Stream(), batch_size=16), "cannot be drawn from without moving its stream"),
    "broken": (
        lambda: DataLoader(Broken(torch.zeros(80, 6)), batch_size=16, sampler=torch.utils.data.SequentialSampler([])),
        "OSError: the file is gone",
    ),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_samples_that_do_not_serve_leave_the_probe_and_the_reason_is_told(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make_loader, reason = FALLBACKS[case]
    with caplog.at_level("INFO"):
        callback = fitted(tmp_path / "1", watch(tmp_path / "1"), training(), make_loader(), num_sanity_val_steps=0)
    told = caplog.text + capsys.readouterr().err
    assert reason in told and told.count("not on some of the validation loader") == 1
    plain = fitted(tmp_path / "2", watch(tmp_path / "2", held_out=False), training())
    assert [m["probe"]["data"] for m in callback.run.header["monitors"]] == [""]
    for name in ("effective_rank", "effective_rank_coarse"):
        assert callback.run.series(name).values == pytest.approx(plain.run.series(name).values, rel=1e-9), name


class Tagger(Classifier):
    """Labels each of 40 positions of a sequence."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]).flatten(0, 1), batch[1].flatten())


def test_of_sequences_their_positions_count(tmp_path: Path) -> None:
    """16 sequences, a quarter of those of the probe, have 640 positions, of which 512 are looked at."""
    sequences = [TensorDataset(torch.randn(count, 40, 6), torch.randint(3, (count, 40))) for count in (TRAINING, 16)]
    train, validate = (DataLoader(data, batch_size=8) for data in sequences)
    callback = fitted(tmp_path, watch(tmp_path), train, validate, max_steps=1, make_module=Tagger)
    assert "held_out" in [m["probe"]["data"] for m in callback.run.header["monitors"]]


def test_samples_of_the_training_set_are_not_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    loader = training()
    with caplog.at_level("INFO"):
        callback = fitted(tmp_path, watch(tmp_path), loader, DataLoader(loader.dataset, batch_size=8))
    assert "it draws from the training samples" in caplog.text + capsys.readouterr().err
    assert "loss_held_out" not in callback.run.names


def test_parts_of_one_data_set_may_be_told_apart_by_their_samplers(tmp_path: Path) -> None:
    whole = samples(160, 0)
    parts = [torch.utils.data.SubsetRandomSampler(range(*ends)) for ends in ((0, 96), (96, 160))]
    train, validate = (DataLoader(whole, batch_size=16, sampler=part) for part in parts)
    callback = fitted(tmp_path, watch(tmp_path), train, validate)
    inputs, targets = whole.tensors
    expected = cross_entropy(Classifier(), (inputs[96:], targets[96:])).item()
    assert callback.run.series("loss_held_out").values[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"held_out": False, "validate": validation}])
def test_nothing_is_said_where_there_is_nothing_to_draw_from(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make_loader = settings.pop("validate", lambda: None)
    with caplog.at_level("INFO"):
        callback = fitted(tmp_path, watch(tmp_path, **settings), training(), make_loader())
    assert "training probe" not in caplog.text + capsys.readouterr().err
    assert "loss_held_out" not in callback.run.names


def test_a_loader_that_is_not_loaded_yet_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    late = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 3}
    with caplog.at_level("INFO"):
        callback = fitted(tmp_path, watch(tmp_path), training(), validation(), **late)
    assert "it is not loaded yet" in caplog.text + capsys.readouterr().err
    assert "loss_held_out" not in callback.run.names


@pytest.mark.parametrize("kind", ["batches", "loader"])
def test_batches_of_ones_own(kind: str, tmp_path: Path) -> None:
    dataset = samples(48, 5)
    given = [dataset.tensors] if kind == "batches" else DataLoader(dataset, batch_size=48, shuffle=True)
    callback = fitted(tmp_path, watch(tmp_path, held_out=given), training(), validation())
    expected = cross_entropy(Classifier(), dataset.tensors).item()
    assert callback.run.series("loss_held_out").values[0] == pytest.approx(expected, rel=1e-6)
    assert callback.run.header["monitors"][1]["probe"]["source"] == "given"
    with pytest.raises(ValueError, match="held_out is empty"):
        fitted(tmp_path / "2", watch(tmp_path / "2", held_out=[]), training(), validation())


def test_a_stream_of_training_batches_beside_held_out_samples(tmp_path: Path) -> None:
    """The samples of an epoch are known when the probe is: they set log n of the description length."""
    batches = list(DataLoader(samples(TRAINING, 0), batch_size=16))

    class Batches(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from batches

        def __len__(self) -> int:
            return len(batches)

    callback = fitted(
        tmp_path,
        watch(tmp_path, schedule=[4], behavioral=FEW_DRAWS["behavioral"]),
        DataLoader(Batches(), batch_size=None),
        validation(),
        max_epochs=3,
    )
    probe, held_out = callback.run.header["monitors"]
    assert probe["probe"]["source"] == "captured from the stream" and held_out["probe"]["data"] == "held_out"
    assert probe["n"] == held_out["n"] == TRAINING
    found = callback.run.measurements[0]
    length = TRAINING * found.value("loss_held_out") + found.value("llc_behavioral") * math.log(TRAINING)
    assert found.value("description_length") == pytest.approx(length, rel=1e-6)


def test_batches_are_no_larger_than_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a validation loader are made for evaluations without a gradient."""
    monkeypatch.setattr(monitoring, "LARGEST_IN_ONE_BATCH", 0)
    callback = fitted(tmp_path, watch(tmp_path), training(), validation())
    assert [m["probe"]["batches"] for m in callback.run.header["monitors"]] == [SAMPLES // 16, SAMPLES // 16]


def test_other_data_have_both_coefficients_beside_held_out_samples(tmp_path: Path) -> None:
    other = [samples(32, 7).tensors]
    callback = fitted(
        tmp_path, watch(tmp_path, schedule=[0], **FEW_DRAWS, other_data={"test": other}), training(), validation()
    )
    assert {"llc_behavioral_test", "llc_behavioral_coarse_test", "llc_test", "loss_test"} <= set(callback.run.names)
    with pytest.raises(ValueError, match="'held_out' is what signals on the samples given as held_out are called"):
        fitted(tmp_path / "2", watch(tmp_path / "2", other_data={"held_out": other}), training())


def test_the_other_callbacks(tmp_path: Path) -> None:
    settings = {"schedule": [0], "probe_samples": SAMPLES, "on_error": "raise"}
    llc = LLCMonitor(directory=str(tmp_path / "1"), **settings, **FEW_DRAWS)
    names = set(fitted(tmp_path / "1", llc, training(), validation()).run.names)
    assert {"loss", "loss_held_out", "llc", "llc_behavioral"} <= names
    hessian = HessianMonitor(directory=str(tmp_path / "2"), **settings)
    assert "loss_held_out" not in fitted(tmp_path / "2", hessian, training(), validation()).run.names


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_keeps_its_samples(first: bool, tmp_path: Path) -> None:
    """Also where the validation set is another one by then, not loaded yet, or there was none before."""
    late = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}
    # Equal batches: Lightning itself restarts the loader when it resumes inside an epoch.
    repeated = (tensor.repeat(6, *[1] * (tensor.dim() - 1)) for tensor in samples(16, 0).tensors)
    train = DataLoader(TensorDataset(*repeated), batch_size=16)
    validate = validation if first else (lambda: None)
    whole = fitted(tmp_path / "whole", watch(tmp_path / "whole"), train, validate(), max_steps=12)
    cut = tmp_path / "cut"
    fitted(cut, watch(cut), train, validate(), max_steps=6, checkpoint=True)
    (ckpt,) = cut.glob("step=6*.ckpt")
    torch.load(ckpt, weights_only=True)
    fitted(cut, watch(cut), train, validation(seed=2), max_steps=12, ckpt_path=ckpt, **late)
    resumed = load_run(cut)
    assert [m.step for m in resumed.measurements] == [0, 3, 6, 9, 12]
    names = {"loss", "effective_rank", "effective_rank_coarse"} | ({"loss_held_out"} if first else set())
    for name in names:
        assert resumed.series(name).values == pytest.approx(whole.run.series(name).values, rel=1e-9), name
    assert ("loss_held_out" in resumed.names) == first


def test_a_new_run_of_the_same_callback_draws_anew(tmp_path: Path) -> None:
    callback = watch(tmp_path)
    losses = []
    for seed in (1, 2):
        fitted(tmp_path, callback, training(), validation(seed))
        losses.append(callback.run.series("loss_held_out").values[0])
        batch = drawn_by_hand(samples(VALIDATION, seed))[0]
        assert losses[-1] == pytest.approx(cross_entropy(Classifier(), batch).item(), rel=1e-6)
    assert losses[0] != losses[1]
