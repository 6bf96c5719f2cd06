"""Watching does not change a run in a single bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_cases import EVERY_ESTIMATOR, QUICK, Augmented, Classifier, ManualClassifier, data, fit, same
from torch.utils.data import DataLoader, IterableDataset

import phasewatch.estimators.learning_coefficient
import phasewatch.watch
from phasewatch.callbacks import PhaseWatch
from phasewatch.objective import Objective


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        for _ in range(40):
            yield torch.randn(6), torch.randint(2, ())


def with_own_generator() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))


def workers(**options: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=8, shuffle=True, **options)


def validation() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8)


# the start, the middle of an epoch, and the first step of the next; with accumulation, the end of both
STEPS = [0, 3, 6]

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": (Classifier, lambda: DataLoader(data(), batch_size=8, shuffle=True), {}),
    "accumulation": (Classifier, workers, {"accumulate_grad_batches": 2}),
    "two workers": (Classifier, lambda: workers(num_workers=2), {}),
    "persistent workers": (Classifier, lambda: workers(num_workers=2, persistent_workers=True), {}),
    "frozen BatchNorm": (lambda: Classifier(freeze_norm=True), workers, {}),
    "dropout": (lambda: Classifier(dropout=0.5), workers, {}),
    "manual optimization": (ManualClassifier, workers, {}),
    "own generator": (Classifier, with_own_generator, {}),
    "validation in between": (Classifier, workers, {"make_validation": validation, "val_check_interval": 2}),
    "shuffled validation": (Classifier, workers, {"make_validation": lambda: workers(num_workers=2)}),
    "gradient clipping": (Classifier, workers, {"gradient_clip_val": 0.1}),
    "stream": (Classifier, lambda: DataLoader(Stream(), batch_size=8), {}),
}

# one with and one without noise in training, and one with validation; the others do with chains of the loss
WITH_ALL_CHAINS = ("plain", "dropout", "shuffled validation")


@pytest.mark.parametrize("case", CASES)
def test_watched_and_unwatched_runs_are_identical(case: str, tmp_path: Any) -> None:
    make_module, make_loader, options = CASES[case]
    watch = PhaseWatch(schedule=STEPS, **(QUICK if case in WITH_ALL_CHAINS else EVERY_ESTIMATOR))
    plain = fit(tmp_path, make_module, make_loader, None, **options)
    watched = fit(tmp_path, make_module, make_loader, watch, **options)
    assert same(plain, watched)
    assert ("loss_held_out" in watch.run.names) == ("make_validation" in options)
    # of a stream the first batches that training takes are the probe, so its start is not measured
    assert [m.step for m in watch.run.measurements] == (STEPS[1:] if case == "stream" else STEPS)
    assert not watch.run.failures
    name = "llc_behavioral" if case in WITH_ALL_CHAINS else "effective_rank"
    assert torch.isfinite(torch.tensor(watch.run.series(name).values)).all()


def test_training_keeps_its_threads(tmp_path: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plain = fit(tmp_path, Classifier, workers, None)
        watched = fit(tmp_path, Classifier, workers, PhaseWatch(schedule=[6], **EVERY_ESTIMATOR))
        assert same(plain, watched) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_comparison_can_fail(tmp_path: Any) -> None:
    loader = CASES["plain"][1]
    once = fit(tmp_path, Classifier, loader, None)
    other = fit(tmp_path, Classifier, loader, None, gradient_clip_val=0.01)
    assert not same(once, other)


def test_dropout_and_batchnorm_in_train_mode(tmp_path: Any) -> None:
    watch = PhaseWatch(schedule=[6], mode="train", **EVERY_ESTIMATOR)
    plain = fit(tmp_path, lambda: Classifier(dropout=0.5), workers, None)
    assert same(plain, fit(tmp_path, lambda: Classifier(dropout=0.5), workers, watch))


@pytest.mark.parametrize("evaluation", [0, 1, 2, 5, 11, 23, 47, 60])
def test_a_measurement_that_raises_half_way(evaluation: int, tmp_path: Any, monkeypatch: Any) -> None:
    """Raise inside the k-th evaluation of the loss in measurements, wherever in one it falls."""
    plain = fit(tmp_path, lambda: Classifier(dropout=0.5), workers, None)
    evaluate, measure, count, measuring = Objective.call, phasewatch.watch.measure, [0], [False]

    def broken(self: Objective, *arguments: Any) -> Any:
        count[0] += measuring[0]
        result = evaluate(self, *arguments)
        if count[0] > evaluation and measuring[0]:
            torch.rand(3), torch.manual_seed(1)
            raise RuntimeError("planted")
        return result

    def measured(*arguments: Any, **settings: Any) -> Any:
        measuring[0] = True
        try:
            return measure(*arguments, **settings)
        finally:
            measuring[0] = False

    monkeypatch.setattr(Objective, "call", broken)
    monkeypatch.setattr(phasewatch.watch, "measure", measured)
    watch = PhaseWatch(schedule=1, **{**QUICK, "on_error": "warn"})
    with pytest.warns(UserWarning, match="planted"):
        watched = fit(tmp_path, lambda: Classifier(dropout=0.5), workers, watch)
    assert same(plain, watched)
    assert watch.run.failures


def test_an_estimator_that_disturbs_everything(tmp_path: Any, monkeypatch: Any) -> None:
    def disturb(*_: Any, **__: Any) -> Any:
        torch.manual_seed(0), torch.set_grad_enabled(False)
        raise FloatingPointError("planted")

    monkeypatch.setattr(phasewatch.estimators.learning_coefficient, "estimate_llc", disturb)
    plain = fit(tmp_path, Classifier, workers, None)
    with pytest.warns(UserWarning, match="llc failed at step 0"):
        watched = fit(
            tmp_path, Classifier, workers, PhaseWatch(schedule=2, **{**EVERY_ESTIMATOR, "on_error": "disable"})
        )
    assert same(plain, watched)


def test_keyboard_interrupt_passes_through(tmp_path: Any, monkeypatch: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(phasewatch.estimators.learning_coefficient, "estimate_llc", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, Classifier, workers, PhaseWatch(schedule=2, **{**EVERY_ESTIMATOR, "on_error": "warn"}))
