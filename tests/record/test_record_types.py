"""The types that stand in a record, and that they need nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phasewatch.record import (
    SCHEMA_VERSION,
    Change,
    Estimate,
    Flag,
    Histogram,
    Journal,
    Measurement,
    RecordError,
    Transition,
    load_run,
    standing_transitions,
)


def transition(step: float, **more: Any) -> Transition:
    change = Change(2.0, 1.0, -1.0, 0.1, (-1.2, -0.8), -10.0)
    return Transition(step - 5, step + 5, step, (step - 2, step + 2), "A", {"loss": change}, 10.0, 1e-6, **more)


def test_a_number_says_only_what_there_is_to_say() -> None:
    for estimate, plain in (
        (Estimate(1.5), {"value": 1.5}),
        (Estimate(1.5, 0.25), {"value": 1.5, "standard_error": 0.25}),
        (Estimate(1.5, doubts=("stuck", "few")), {"value": 1.5, "doubts": ["stuck", "few"]}),
        (Estimate(math.nan, math.nan, ("is not finite",)), {"value": None, "doubts": ["is not finite"]}),
    ):
        assert estimate.to_dict() == plain
        assert Estimate.from_dict(json.loads(json.dumps(plain, allow_nan=False))) == estimate
        assert hash(Estimate.from_dict(plain)) == hash(estimate)
        assert estimate.reliable == ("doubts" not in plain)
    assert Estimate(math.inf).to_dict() == {"value": None}


def test_equal_is_what_says_the_same() -> None:
    assert Estimate(1.0, float("nan")) == Estimate(1, math.nan) == Estimate(np.float32(1.0))
    assert Estimate(1.0) != Estimate(1.0, 0.1) != Estimate(1.0, 0.2)
    assert Estimate(1.0) != Estimate(1.0, doubts=("few",)) and Estimate(math.nan) != Estimate(1.0)
    assert Estimate(1.0) != 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, 0.1, "stuck"), TypeError, r"the string 'stuck'; expected a tuple of sentences: \('stuck',\)"),
        ((None,), TypeError, "value is None; expected a number"),
        (("1.0",), TypeError, "value is '1.0'; expected a number"),
        ((np.ones(2),), TypeError, "value is .*; expected a number"),
        ((1.0, "large"), TypeError, "standard_error is 'large'; expected a number"),
        ((1.0, -0.5), ValueError, "standard_error is -0.5; expected it to be >= 0"),
    ],
)
def test_what_is_no_number_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Estimate(*arguments)


def test_the_interval_is_measured_or_made_from_the_standard_error() -> None:
    measurement = Measurement(
        0,
        {
            "llc": Estimate(5.0, 0.5),
            "nullity": Estimate(7.0, 0.5),
            "nullity_lower": Estimate(6.0),
            "nullity_upper": Estimate(9.0),
            "loss": Estimate(1.0),
        },
    )
    assert measurement.interval("nullity") == (6.0, 9.0)
    assert measurement.interval("llc") == pytest.approx((5 - 1.959964 * 0.5, 5 + 1.959964 * 0.5))
    for name in ("loss", "absent"):
        assert all(math.isnan(bound) for bound in measurement.interval(name))
    assert measurement.value("nullity") == 7.0 and math.isnan(measurement.value("absent"))


def test_a_measurement_comes_back_as_it_was() -> None:
    measurement = Measurement(
        3, {"llc": Estimate(1.0, 0.1, ("few",)), "x": Estimate(math.nan)}, {"h": Histogram([0.0], [2.0])}, 0.5, 1e9
    )
    text = json.dumps(measurement.to_dict(), allow_nan=False)
    assert Measurement.from_dict(json.loads(text)) == measurement
    assert "sample_losses" not in measurement.to_dict()
    of_samples = dataclasses.replace(measurement, sample_losses=(0.25, math.nan, 3.0))
    again = Measurement.from_dict(json.loads(json.dumps(of_samples.to_dict(), allow_nan=False)))
    assert [str(loss) for loss in again.sample_losses] == ["0.25", "nan", "3.0"]
    with pytest.raises(ValueError, match="not a measurement: .*step, values"):
        Measurement.from_dict({"step": 3, "values": {}})


def test_those_that_stand_are_as_the_last_flag_has_them_with_the_step_of_the_first() -> None:
    flags = [
        Flag(0, "flagged", transition(50.0, under_way=True), 60.0),
        Flag(1, "flagged", transition(20.0), 70.0),
        Flag(0, "revised", transition(52.0), 80.0),
        Flag(2, "flagged", transition(90.0), 95.0),
        Flag(2, "withdrawn", transition(90.0), 99.0),
        Flag(3, "withdrawn", transition(5.0), 100.0),
        Flag(3, "revised", transition(4.0), 110.0),
    ]
    assert standing_transitions(flags) == [
        transition(4.0, flagged_at=100.0),
        transition(20.0, flagged_at=70.0),
        transition(52.0, flagged_at=60.0),
    ]


def test_transitions_and_flags_are_read_back_as_what_they_were(tmp_path: Path) -> None:
    flags = (
        Flag(0, "flagged", transition(20.0), 30.0),
        Flag(1, "flagged", transition(50.0, under_way=True), 60.0),
        Flag(0, "revised", transition(21.0, free_energy=-3.0, seen_by=("loss",), resolutions=("fine",)), 70.0),
    )
    journal = Journal(tmp_path)
    journal.append("header", {"schema_version": SCHEMA_VERSION})
    for flag in flags:
        journal.append("transition", flag.to_dict())
    run = load_run(tmp_path)
    assert run.flags == flags
    assert list(run.transitions) == standing_transitions(flags)
    journal.append("resume", {"step": 60, "after": 1})
    assert load_run(tmp_path).transitions == (dataclasses.replace(transition(20.0), flagged_at=30.0),)


def test_a_kind_says_at_which_resolution_it_holds_where_it_is_one_alone() -> None:
    labels = {(): "A", ("coarse",): "A (coarse)", ("fine", "coarse"): "A"}
    assert {resolutions: transition(5.0, resolutions=resolutions).label for resolutions in labels} == labels
    assert transition(5.0, resolutions=("fine",), under_way=True).label == "A (fine), under way"


def test_a_transition_recorded_without_resolutions_is_read() -> None:
    plain = transition(5.0).to_dict()
    del plain["resolutions"]
    assert Transition.from_dict(plain) == transition(5.0)


def test_a_record_of_an_older_version_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("header", {"schema_version": 1, "versions": {"phasewatch": "0.0.9"}})
    journal.append("measurement", {"step": 0, "values": {"loss": 1.0}})
    with pytest.raises(RecordError, match="version 1 and was written by phasewatch 0.0.9; this one reads version"):
        load_run(tmp_path)


def test_the_record_needs_neither_torch_nor_the_detector() -> None:
    script = (
        "import sys\n"
        "import phasewatch.record\n"
        "from phasewatch.record import measurement, run, signals, transition\n"
        "heavy = {'torch', 'scipy', 'ruptures', 'matplotlib', 'phasewatch.transitions', 'phasewatch.estimators'}\n"
        "assert 'numpy' in sys.modules and not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
