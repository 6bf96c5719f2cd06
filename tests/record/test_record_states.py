"""A state to resume from of which a part is missing or changed costs that part and no more."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import mutated
from torch import Tensor, nn

from phasewatch.record import Estimate, Measurement, load_run
from phasewatch.watch import Watch

INPUTS = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
STOP, END = 24, 28
TARGETS = INPUTS.sum(dim=1, keepdim=True)
NOISE = 0.01 * torch.randn(60, 3, generator=torch.Generator().manual_seed(1))


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


def make(directory: Path | None = None, on_error: Any = "raise") -> Watch:
    return Watch(
        nn.Linear(3, 1, bias=False),
        [(INPUTS, TARGETS)],
        loss_fn=loss_fn,
        estimators=(),
        schedule=1,
        directory=directory,
        on_error=on_error,
    )


def train(watch: Watch, first: int, stop: int) -> Watch:
    """The loss on the probe jumps at step 12."""
    for step in range(first, stop):
        with torch.no_grad():
            watch.module.weight.copy_(NOISE[step] + 0.9 * (step >= 12))  # type: ignore[union-attr, operator]
        watch.at(step)
    return watch


def saved(watch: Watch) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(watch.state_dict()))
    return state


def values(measurements: tuple[Measurement, ...]) -> list[tuple[int, dict[str, Estimate]]]:
    """What was measured, without how long it took."""
    return [(m.step, {name: e for name, e in m.estimates.items() if name != "overhead"}) for m in measurements]


@pytest.fixture(scope="module")
def whole() -> Watch:
    """The run that was never stopped."""
    return train(make(), 0, END)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The state of the run at its checkpoint, and where its record is."""
    directory = tmp_path_factory.mktemp("first")
    return saved(train(make(directory), 0, STOP)), directory


ENTRIES = (
    *("run_id", "record", "lines", "detector", "next_visits", "schedules", "taken", "activity", "last_taken", "start"),
    *("planned_for", "planned_seconds", "left_out", "chains_in_each", "until_chains", "measured", "prices", "clock"),
)
LACKS = object()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("value", [LACKS, 3.5, [["x"]], {"x": "x"}], ids=["lacking", "a number", "a list", "names"])
def test_an_entry_that_a_state_lacks_or_has_in_another_form_costs_no_more_than_that_entry(
    value: Any, entry: str, whole: Watch, first: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    if (entry, value) == ("planned_seconds", 3.5):
        value = "3.5"  # where a number is nothing wrong
    state, earlier = first
    assert state.keys() == set(ENTRIES)
    state = {name: found for name, found in state.items() if name != entry}
    if value is not LACKS:
        state[entry] = value
    watch = make(tmp_path)
    with pytest.warns(UserWarning, match=entry if entry != "detector" else "detector|LiveDetector") as told:
        watch.load_state_dict(state, [earlier])
    assert all("phasewatch: " in str(one.message) for one in told)
    train(watch, STOP, END).close()
    run = load_run(tmp_path)
    known = STOP if entry == "record" else 0  # without its place nothing says which lines are before the checkpoint
    assert run.finished and values(run.measurements) == values(whole.run.measurements[known:])
    if entry not in ("record", "detector"):
        assert run.flags == whole.run.flags


@pytest.mark.parametrize(
    ("entry", "value"),
    [("searched", float("inf")), ("contradicted", [[0, float("inf")]]), ("alpha", 10**400)],
    ids=["searched", "contradicted", "alpha"],
)
def test_a_detector_whose_numbers_are_too_large_looks_anew(
    entry: str, value: Any, whole: Watch, first: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    state, earlier = first
    watch = make(tmp_path)
    with pytest.warns(UserWarning, match="not the state of a LiveDetector .OverflowError.* It looks anew"):
        watch.load_state_dict({**state, "detector": {**state["detector"], entry: value}}, [earlier])
    train(watch, STOP, END).close()
    run = load_run(tmp_path)
    assert run.finished and not run.failures and values(run.measurements) == values(whole.run.measurements)


@pytest.mark.parametrize("state", [{}, [], None, {"x": 1}])
def test_what_is_no_state_is_told_of_and_the_watch_begins_anew(state: Any, tmp_path: Path) -> None:
    watch = make(tmp_path)
    with pytest.warns(UserWarning, match="in the state to resume from, it "):
        watch.load_state_dict(state)
    train(watch, 3, 5).close()
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == [3, 4] and run.finished and not run.failures


def test_states_changed_anywhere_inside_do_not_end_a_run(whole: Watch, tmp_path: Path) -> None:
    """In memory, so that what was measured before stands in the state itself."""
    first = train(make(), 0, STOP)
    for step in range(STOP):
        first.observe(step, loss=1.0 / (step + 1))
    state, rng = saved(first), random.Random(0)
    told = 0
    for _ in range(80):
        watch = make(on_error="warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch.load_state_dict(mutated(state, rng))
            train(watch, STOP, STOP + 1).close()
        told += bool(caught)
        after = {m.step: m for m in watch.run.measurements if m.step >= STOP}
        expected = {m.step: m for m in whole.run.measurements if m.step in after}
        assert values(tuple(after.values())) == values(tuple(expected.values()))
        assert all("phasewatch: " in str(one.message) for one in caught)
    assert told > 30
