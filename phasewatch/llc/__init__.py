"""The local learning coefficient: sampler, calibration, diagnostics and the estimate."""

from phasewatch.llc.estimate import LLCEstimate, estimate_llc

__all__ = ["LLCEstimate", "estimate_llc"]
