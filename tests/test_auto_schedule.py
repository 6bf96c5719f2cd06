"""``schedule="auto"`` in a loop: where something happens it is measured, by steps and losses alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phasewatch import measuring_time, observer
from phasewatch import watch as watch_module
from phasewatch.watch import Watch

PROBE = [(torch.randn(8, 3), torch.randn(8, 1))]
TOTAL, FALLS = 4_000, 2_000
LOSSES = (1 + np.arange(TOTAL) / 50) ** -0.5 * (1 + 0.03 * np.random.default_rng(0).standard_normal(TOTAL))
LOSSES *= 1 - 0.5 / (1 + np.exp(-(np.arange(TOTAL) - FALLS) / 25))


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


def make(**options: Any) -> Watch:
    settings = {"loss_fn": loss_fn, "estimators": (), "total_steps": TOTAL, "max_overhead": None, "on_error": "raise"}
    return Watch(nn.Linear(3, 1), PROBE, **{**settings, **options})


def train(watch: Watch, first: int = 0, stop: int = TOTAL, loss: str = "loss") -> Watch:
    for step in range(first, stop):
        watch.at(step)
        watch.observe(step, **{loss: float(LOSSES[step])})
    return watch


def steps_of(watch: Watch) -> list[int]:
    return [measurement.step for measurement in watch.run.measurements]


@pytest.fixture(scope="module")
def steps_of_the_whole() -> list[int]:
    return steps_of(train(make()))


def test_around_a_fall_of_the_loss_it_is_measured_more_often(steps_of_the_whole: list[int]) -> None:
    unobserved = make()
    for step in range(TOTAL):
        unobserved.at(step)
    observed, even = steps_of_the_whole, steps_of(unobserved)
    assert [s for s in observed if s < 1900] == [s for s in even if s < 1900]
    assert len([s for s in even if 1900 <= s < 2400]) <= 4
    assert len([s for s in observed if 1900 <= s < 2100]) >= 3
    assert len([s for s in observed if 2100 <= s < 2400]) >= 3
    assert 45 <= len(even) < len(observed) <= 66
    assert steps_of(train(make(), loss="my_own_loss")) == observed


@pytest.mark.parametrize("share", [1e-9, 1e9])
def test_it_does_not_depend_on_how_long_anything_takes(
    share: float, steps_of_the_whole: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are left out at nearly all steps, or at none."""
    monkeypatch.setattr(observer, "SHARE", share)
    monkeypatch.setattr(observer, "ASKING", 0.0)
    watch = train(make())
    assert steps_of(watch) == steps_of_the_whole
    watch.close()
    assert (len(watch.run.observed["loss"].steps) == TOTAL) is (share > 1)


def test_a_run_that_is_cut_off_goes_on_to_the_same_steps(steps_of_the_whole: list[int], tmp_path: Path) -> None:
    for cut in (1_000, 2_030):
        first = train(make(directory=tmp_path / str(cut)), 0, cut)
        state = first.state_dict()
        first.close()
        again = make()
        again.load_state_dict(state, [tmp_path / str(cut)])
        assert steps_of(train(again, cut)) == steps_of_the_whole


def test_a_run_of_unknown_length_is_measured_more_often_where_its_loss_falls() -> None:
    unobserved = make(total_steps=None)
    for step in range(TOTAL):
        unobserved.at(step)
    observed, even = steps_of(train(make(total_steps=None))), steps_of(unobserved)
    assert [s for s in observed if s < 1900] == [s for s in even if s < 1900]
    assert len([s for s in observed if 1900 <= s < 2400]) >= 3 + len([s for s in even if 1900 <= s < 2400])
    assert even[-1] > TOTAL / 2


def test_clocks_that_jump_cost_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours ahead, as on a machine that slept, and back again; the share alone pays."""
    now = [0.0]
    fake = SimpleNamespace(perf_counter=lambda: now[0], time=lambda: 0.0)
    monkeypatch.setattr(watch_module, "time", fake)
    monkeypatch.setattr(measuring_time, "time", fake)
    watch = make(max_overhead=0.1, free_seconds=0)
    for step in range(TOTAL):
        now[0] += 1.0 + (7_200.0 if step == 1_000 else -7_200.0 if step == 3_000 else 0.0)
        watch.at(step)
        watch.observe(step, loss=float(LOSSES[step]))
    assert watch.clock.training_seconds == pytest.approx(TOTAL + 7_200.0, rel=0.05)
    steps = steps_of(watch)
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] > 0.9 * TOTAL
    assert not watch.run.failures


def test_a_longer_run_is_measured_on_after_what_was_planned_is_spent() -> None:
    state = train(make()).state_dict()
    longer = make(total_steps=2 * TOTAL)
    longer.load_state_dict(state)
    for step in range(TOTAL, 2 * TOTAL):
        longer.at(step)
    assert 5 <= len([s for s in steps_of(longer) if s >= TOTAL]) <= 40


@pytest.mark.parametrize("schedule", [5, [0, 5, 10, 15, 20], "log", "auto"])
def test_what_is_measured_by_hand_at_a_step_of_the_schedule_takes_its_place(schedule: Any) -> None:
    expected = steps_of(train(make(schedule=schedule), 0, 21))
    watch = make(schedule=schedule)
    for step in range(21):
        if step in expected[1::2]:
            watch.measure(step)
        watch.at(step)
    assert steps_of(watch) == expected


def test_measured_by_hand_elsewhere_the_schedule_goes_on() -> None:
    watch = make(schedule=5)
    for step in range(12):
        if step == 7:
            watch.measure(step)
        watch.at(step)
    assert steps_of(watch) == [0, 5, 7, 10]


def test_what_comes_rarely_is_never_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the metrics of a validation, in a run whose steps take no time."""
    monkeypatch.setattr(observer, "SHARE", 1e-9)
    monkeypatch.setattr(observer, "ASKING", 0.0)
    watch = make(schedule=[TOTAL])
    for step in range(1_000):
        watch.observe(step, loss=1.0, accuracy=0.5)
        if step % 37 == 0:
            watch.observe(step, val_loss=float(step))
    watch.close()
    observed = watch.run.observed
    assert observed["val_loss"].steps.tolist() == list(range(0, 1_000, 37))
    assert len(observed["loss"].steps) == len(observed["accuracy"].steps) < 900
