"""The local learning coefficient: pilot, sampler, calibration, diagnostics and the estimate."""

from phasewatch.llc.behavioral import BehavioralLLC, check_behavioral_settings, estimate_behavioral_llc
from phasewatch.llc.estimate import LLCEstimate, Thresholds, check_settings, estimate_llc
from phasewatch.llc.pilot import Pilot, pilot_descent
from phasewatch.llc.quadratic import quadratic_llc
from phasewatch.llc.spread import prior_spread
from phasewatch.llc.temperatures import llc_by_temperature

__all__ = [
    "BehavioralLLC",
    "LLCEstimate",
    "Pilot",
    "Thresholds",
    "check_behavioral_settings",
    "check_settings",
    "estimate_behavioral_llc",
    "estimate_llc",
    "llc_by_temperature",
    "pilot_descent",
    "prior_spread",
    "quadratic_llc",
]
