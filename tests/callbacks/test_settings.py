"""What is measured is said in settings objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phasewatch import Watch
from phasewatch.callbacks import HessianMonitor, LLCMonitor, PhaseWatch
from phasewatch.estimators import BehavioralCoefficient, HessianSpectrum, LearningCoefficient, ProbeLoss


def names(callback: Any) -> list[str]:
    return [estimator.name for estimator in callback.estimators]


def test_what_is_none_is_left_out_and_what_is_extra_comes_last() -> None:
    own = LearningCoefficient(draws=800, data="near")
    assert names(PhaseWatch()) == ["llc_behavioral", "llc", "hessian", "zeros"]
    assert names(PhaseWatch(behavioral=None, zeros=None, extra=[own])) == ["llc", "hessian", "llc_near"]
    assert names(PhaseWatch(behavioral=None, llc=None, hessian=None, zeros=None)) == []
    assert names(LLCMonitor(llc=None)) == ["llc_behavioral"] and names(HessianMonitor(None)) == ["zeros"]


def test_the_settings_given_are_those_that_measure() -> None:
    behavioral, llc, hessian = BehavioralCoefficient((0.2, 0.01)), LearningCoefficient(draws=30), HessianSpectrum(2)
    assert PhaseWatch(behavioral=behavioral, llc=llc, hessian=hessian, zeros=None).estimators == (
        behavioral,
        llc,
        hessian,
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"llc": LearningCoefficient}, TypeError, "expected an object with a name and read"),
        ({"extra": ["llc"]}, TypeError, "'llc' was given as an estimator"),
        ({"extra": [LearningCoefficient()]}, ValueError, r"several estimators are called \['llc'\]"),
        ({"draws": 800}, TypeError, "draws"),
        ({"schedule": 10, "extra": [ProbeLoss(), ProbeLoss()]}, ValueError, "several estimators are called"),
        ({"probe_samples": 2.5}, TypeError, "probe_samples is 2.5; expected a whole number"),
        ({"seed": "x"}, TypeError, "seed is 'x'; expected a whole number"),
        ({"loss_fn": 3}, TypeError, "loss_fn is 3; expected a function"),
        ({"directory": 5}, TypeError, "directory is 5; expected a path"),
        ({"max_overhead": "lots"}, TypeError, "max_overhead is 'lots'; expected a share of the training time"),
    ],
)
def test_wrong_settings_are_refused_before_training(settings: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PhaseWatch(**settings)


def test_a_watch_refuses_the_same() -> None:
    module, batch = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    with pytest.raises(ValueError, match="several estimators are called"):
        Watch(
            module,
            [batch],
            loss_fn=lambda m, b: (m(b[0]) - b[1]).square().mean(),
            estimators=[HessianSpectrum(), HessianSpectrum(2)],
        )
    with pytest.raises(TypeError, match="n is 2.5; expected a whole number"):
        Watch(module, [batch], loss_fn=lambda m, b: m(b[0]).square().mean(), n=2.5)  # type: ignore[arg-type]
