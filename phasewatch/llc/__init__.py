"""The local learning coefficient: sampler, calibration, diagnostics and the estimate."""

from phasewatch.llc.estimate import LLCEstimate, Thresholds, check_settings, estimate_llc

__all__ = ["LLCEstimate", "Thresholds", "check_settings", "estimate_llc"]
