"""The local learning coefficient: pilot, sampler, calibration, diagnostics and the estimate."""

from phasewatch.llc.estimate import LLCEstimate, Thresholds, check_settings, estimate_llc
from phasewatch.llc.pilot import Pilot, pilot_descent
from phasewatch.llc.quadratic import quadratic_llc
from phasewatch.llc.temperatures import llc_by_temperature

__all__ = [
    "LLCEstimate",
    "Pilot",
    "Thresholds",
    "check_settings",
    "estimate_llc",
    "llc_by_temperature",
    "pilot_descent",
    "quadratic_llc",
]
