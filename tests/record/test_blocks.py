"""Blocks: what is packed comes back, in little room, and what is damaged costs no more than itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import HEADER, measurement

from phasewatch.record import Journal, Observed, load_run, noise_scale
from phasewatch.record.lines import Line
from phasewatch.record.trace import pack, unpack

RNG = np.random.default_rng(0)


def block(steps: Any, **values: Any) -> dict[str, Any]:
    """As it comes out of the file."""
    body: dict[str, Any] = json.loads(json.dumps(pack({name: (steps, own) for name, own in values.items()})))
    return body


@pytest.mark.parametrize(
    "values",
    [
        RNG.standard_normal(1000) * 10.0 ** RNG.integers(-30, 30, 1000),
        np.array([0.0, -0.0, math.inf, -math.inf, 1e-45, 3.4e38, -1.0]),
        np.array([5.0]),
        np.array([math.nan, 1.0, math.nan, math.nan, 1.0]),
    ],
    ids=["all sizes", "special", "one", "nan"],
)
def test_values_come_back_exactly_as_float32(values: Any) -> None:
    steps = np.sort(RNG.choice(10**15, len(values), replace=False))
    found = unpack([block(steps, x=values, y=values[::-1])])
    assert found["x"].steps.tolist() == found["y"].steps.tolist() == steps.tolist()
    np.testing.assert_array_equal(found["x"].values, np.float32(values))
    np.testing.assert_array_equal(found["y"].values, np.float32(values[::-1]))


def test_signals_of_different_steps_stand_in_one_block() -> None:
    body = block([3, 4, 5], loss=[0.5, 0.25, 0.125]) | {"step": 3}
    mixed = json.loads(json.dumps(pack({"loss": ([3, 4, 5], [0.5, 0.25, 0.125]), "norm": ([4], [2.0])})))
    assert mixed["step"] == body["step"] == 3
    found = unpack([mixed])
    assert found["loss"].values.tolist() == [0.5, 0.25, 0.125]
    assert (found["norm"].steps.tolist(), found["norm"].values.tolist()) == ([4], [2.0])


def test_of_repeated_and_disordered_steps_the_last_value_of_each_stands() -> None:
    found = unpack([block([1, 2, 5, 2, 3], x=[1, 2, 5, 22, 3]), block([9, 5, 3], x=[9, 55, 33])])["x"]
    assert dict(zip(found.steps.tolist(), found.values.tolist(), strict=True)) == {1: 1, 2: 22, 3: 33, 5: 55, 9: 9}
    assert found.steps.tolist() == [1, 2, 3, 5, 9]


def test_what_float32_cannot_hold_is_infinite() -> None:
    assert unpack([block([0, 1], x=[1e39, -1e300])])["x"].values.tolist() == [math.inf, -math.inf]


def million(steps_a_block: int, share: int = 1) -> float:
    """Bytes that a million steps take: a loss with noise, a cosine schedule, norms at every tenth step.

    With ``share``, only one of so many blocks is made.
    """
    size = 0
    for number, begin in enumerate(range(0, 10**6, steps_a_block * share)):
        steps = np.arange(begin, begin + steps_a_block)
        tenth = steps[steps % 10 == 0]
        noise = np.exp(0.3 * RNG.standard_normal((4, len(tenth))))
        signals: dict[str, Any] = {
            "loss": (steps, 0.3 * np.exp(0.2 * RNG.standard_normal(len(steps)))),
            "learning_rate": (steps, 5e-4 * (1 + np.cos(np.pi * steps / 1e6))),
            "weight_norm": (tenth, 30 + 1e-5 * tenth),
        }
        names = ("gradient_norm", "update_norm", "gradient_variance", "gradient_product")
        signals |= {name: (tenth, own) for name, own in zip(names, noise, strict=True)}
        signals = {name: (steps.tolist(), own.tolist()) for name, (steps, own) in signals.items() if len(steps)}
        size += len(Line.written("0" * 16, number, "observed", pack(signals)).encoded())
    return float(size * share)


def test_a_million_steps_take_little_room() -> None:
    assert million(16_384) < 8e6  # steps of milliseconds
    assert million(60, share=50) < 20e6  # of a second, a block a minute
    assert million(20, share=200) < 30e6  # of three seconds: five weeks


def test_a_run_holds_what_was_observed_beside_what_was_measured(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("header", HEADER)
    for begin in (0, 10, 20):
        steps = range(begin, begin + 10)
        journal.append("observed", pack({"loss": (steps, [1 / (k + 1) for k in steps])}))
        journal.append("measurement", measurement(begin + 10).to_dict())
    run = load_run(tmp_path)
    assert [m.step for m in run.measurements] == [10, 20, 30]
    assert "loss" in run.names and len(run.series("loss")) == 3
    assert run.observed["loss"].steps.tolist() == list(range(30))
    np.testing.assert_array_equal(run.observed["loss"].values, np.float32(1 / np.arange(1, 31)))
    frame = pytest.importorskip("pandas") and run.observed_to_pandas()
    assert list(frame.columns) == ["step", "name", "value"] and len(frame) == 30
    assert frame["step"].tolist() == list(range(30)) and set(frame["name"]) == {"loss"}


def test_a_run_without_any(tmp_path: Path) -> None:
    Journal(tmp_path).append("header", HEADER)
    run = load_run(tmp_path)
    assert run.observed == {}
    pytest.importorskip("pandas")
    assert list(run.observed_to_pandas().columns) == ["step", "name", "value"]


def test_a_damaged_block_costs_its_own_steps(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("header", HEADER)
    for begin in (0, 10, 20):
        journal.append("observed", pack({"loss": (range(begin, begin + 10), [1.0] * 10)}))
    assert journal.path is not None
    lines = journal.path.read_bytes().split(b"\n")
    at = lines[2].index(b'"packed":"') + 20
    lines[2] = lines[2][:at] + (b"A" if lines[2][at : at + 1] != b"A" else b"B") + lines[2][at + 1 :]
    journal.path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match="1 damaged lines were skipped"):
        run = load_run(tmp_path)
    assert run.observed["loss"].steps.tolist() == [*range(10), *range(20, 30)]
    assert [len(gap) for gap in run.gaps] == [1]


def test_resuming_takes_back_the_blocks_since_then(tmp_path: Path) -> None:
    """Also where the line that says so is lost: then by the step of the measurement behind it."""
    journal = Journal(tmp_path)
    journal.append("header", HEADER)
    journal.append("observed", pack({"loss": (range(10), [0.0] * 10)}))
    journal.append("measurement", measurement(10).to_dict())
    journal.append("observed", pack({"loss": (range(10, 25), [1.0] * 15)}))
    journal.append("measurement", measurement(25).to_dict())
    journal.append("resume", {"after": 2, "step": 11})
    journal.append("observed", pack({"loss": (range(10, 15), [2.0] * 5)}))
    journal.append("measurement", measurement(15).to_dict())
    wanted = [0.0] * 10 + [2.0] * 5
    run = load_run(tmp_path)
    assert run.observed["loss"].values.tolist() == wanted
    assert [m.step for m in run.measurements] == [10, 15]
    assert journal.path is not None
    lines = journal.path.read_bytes().split(b"\n")
    journal.path.write_bytes(b"\n".join(lines[:5] + lines[6:]))
    with pytest.warns(UserWarning, match="1 lines of the run are missing"):
        run = load_run(tmp_path)
    assert run.observed["loss"].values.tolist()[:15] == wanted


def pairs(count: int, true: Any, noise: float) -> dict[str, Observed]:
    gradients = true + noise * RNG.standard_normal((2, count, len(true)))
    steps = 10 * np.arange(count)
    return {
        "gradient_variance": Observed(steps, 0.5 * ((gradients[0] - gradients[1]) ** 2).sum(1)),
        "gradient_product": Observed(steps, (gradients[0] * gradients[1]).sum(1)),
    }


def test_the_noise_scale_is_that_of_the_gradients_drawn() -> None:
    true = np.array([3.0, -4.0] + [0.0] * 18)
    found = noise_scale(pairs(4000, true, 2.0), window=4000)
    assert found.steps.tolist() == [39_990]
    # tr Σ = 20 · 2², |G|² = 25; the error of g·g' is (2 · 25 · 4 + 20 · 16)^½ / 4000^½ = .36 of 25
    assert found.values == pytest.approx([20 * 4 / 25], rel=3 * 0.36 / 25)


def test_the_noise_scale_where_it_is_not_known() -> None:
    observed = pairs(10, np.ones(3), 0.1)
    assert len(noise_scale(observed, window=11).steps) == 0
    observed["gradient_variance"].values[4] = math.nan  # an overflow of mixed precision
    found = noise_scale(observed, window=9)
    assert found.steps.tolist() == [90] and 0 < found.values[0] < 0.1
    turning = {**observed, "gradient_product": Observed(observed["gradient_product"].steps, np.full(10, -1.0))}
    assert np.isnan(noise_scale(turning, window=9).values).all()
    with pytest.raises(KeyError, match="no 'gradient_variance_1' was observed"):
        noise_scale(observed, which="_1")
    with pytest.raises(ValueError, match="window is 0"):
        noise_scale(observed, window=0)
