"""Which samples and classes a transition moved, where it is known by construction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phasewatch.record import (
    SCHEMA_VERSION,
    Estimate,
    Journal,
    Measurement,
    MovedSample,
    Transition,
    load_run,
)
from phasewatch.record.moved import moved

CLASSES = {"kind": "class", "values": [0, 0, 1, 1, 1, 2]}


def transition(start: float, end: float) -> Transition:
    return Transition(start, end, (start + end) / 2, (start, end), "A", {}, 9.0, 1e-9)


def measured(step: int, *losses: float) -> Measurement:
    return Measurement(step, {"loss": Estimate(1.0)}, sample_losses=losses)


RUN = [
    measured(0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0),
    measured(10, 2.0, 2.0, 1.0, 1.0, 1.0, 3.0),
    Measurement(15, {"llc": Estimate(1.0)}),
    measured(20, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0),
    measured(30, 0.5, 0.7, 1.5, 1.0, 0.5, 0.0),
    measured(40, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0),
]


def test_the_measurements_next_to_it_are_compared() -> None:
    found = moved(RUN, transition(17.0, 30.0))
    assert found is not None and (found.before, found.after) == (10, 30)
    assert found.samples == (
        MovedSample(5, 3.0, 0.0),
        MovedSample(0, 2.0, 0.5),
        MovedSample(1, 2.0, 0.7),
        MovedSample(2, 1.0, 1.5),
        MovedSample(4, 1.0, 0.5),
    )
    assert found.classes == ()


def test_classes_change_by_the_mean_of_their_samples() -> None:
    """Class 0 by -1.5 and -1.3; class 1 by .5, 0, -.5, which is nothing; class 2 is one sample."""
    found = moved(RUN, transition(10.0, 30.0), CLASSES)
    assert found is not None and [one.label for one in found.samples] == [2, 0, 0, 1, 1]
    [of_class] = found.classes
    assert (of_class.label, of_class.samples) == (0, 2)
    assert (of_class.change, of_class.standard_error) == pytest.approx((-1.4, math.sqrt(0.02) / math.sqrt(2)))


@pytest.mark.parametrize("extent", [(-5.0, 20.0), (35.0, 50.0)])
def test_beyond_the_measurements_nothing_is_known(extent: tuple[float, float]) -> None:
    assert moved(RUN, transition(*extent)) is None
    assert moved([RUN[2]], transition(0.0, 10.0)) is None


def test_what_is_not_finite_moved_nowhere_and_another_number_of_samples_is_another_probe() -> None:
    found = moved([measured(0, 1.0, math.nan), measured(1, 2.0, 1.0)], transition(0.0, 1.0))
    assert found is not None and [one.index for one in found.samples] == [0]
    assert moved([measured(0, 1.0), measured(1, 2.0, 1.0)], transition(0.0, 1.0)) is None


@pytest.mark.parametrize("labels", [None, CLASSES, {"kind": "tokens", "values": [[k, k] for k in range(6)]}])
def test_a_record_read_back_tells_the_same(labels: dict[str, Any] | None, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("header", {"schema_version": SCHEMA_VERSION, "labels": labels})
    for measurement in RUN:
        journal.append("measurement", json.loads(json.dumps(measurement.to_dict())))
    journal.close()
    found = load_run(tmp_path).moved(transition(10.0, 30.0))
    assert found == moved(RUN, transition(10.0, 30.0), labels) and found is not None
    assert np.isfinite([one.change for one in found.samples]).all()
    if labels and labels["kind"] == "tokens":
        assert found.samples[0].label == (5, 5)
