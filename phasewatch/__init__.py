"""phasewatch: watches the geometry of the loss while a network trains, and says when it changes phase.

Importing this package imports neither PyTorch Lightning nor TensorBoard, and torch only once it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from phasewatch._version import __version__

if TYPE_CHECKING:
    from phasewatch.analysis import Analysis, analyze_run
    from phasewatch.hessian import Eigenpairs, Spectrum, hessian_spectrum, hessian_trace, leading_eigenpairs
    from phasewatch.llc import (
        BehavioralLLC,
        LLCEstimate,
        estimate_behavioral_llc,
        estimate_llc,
        llc_by_temperature,
        quadratic_llc,
    )
    from phasewatch.objective import Objective, split_off_misfit
    from phasewatch.record import Run, load_run
    from phasewatch.sweep import measure_checkpoints
    from phasewatch.symmetry import ZeroLedger, explain_zeros
    from phasewatch.transitions import Detection, Transition, align_transitions, detect_transitions
    from phasewatch.watch import Watch

_HOMES = {
    "Analysis": "phasewatch.analysis",
    "BehavioralLLC": "phasewatch.llc",
    "Eigenpairs": "phasewatch.hessian",
    "LLCEstimate": "phasewatch.llc",
    "Objective": "phasewatch.objective",
    "Run": "phasewatch.record",
    "Spectrum": "phasewatch.hessian",
    "Transition": "phasewatch.transitions",
    "Detection": "phasewatch.transitions",
    "align_transitions": "phasewatch.transitions",
    "analyze_run": "phasewatch.analysis",
    "Watch": "phasewatch.watch",
    "ZeroLedger": "phasewatch.symmetry",
    "detect_transitions": "phasewatch.transitions",
    "estimate_behavioral_llc": "phasewatch.llc",
    "estimate_llc": "phasewatch.llc",
    "explain_zeros": "phasewatch.symmetry",
    "hessian_spectrum": "phasewatch.hessian",
    "hessian_trace": "phasewatch.hessian",
    "leading_eigenpairs": "phasewatch.hessian",
    "llc_by_temperature": "phasewatch.llc",
    "load_run": "phasewatch.record",
    "measure_checkpoints": "phasewatch.sweep",
    "quadratic_llc": "phasewatch.llc",
    "split_off_misfit": "phasewatch.objective",
}

__all__ = [
    "Analysis",
    "BehavioralLLC",
    "Detection",
    "Eigenpairs",
    "LLCEstimate",
    "Objective",
    "Run",
    "Spectrum",
    "Transition",
    "Watch",
    "ZeroLedger",
    "__version__",
    "align_transitions",
    "analyze_run",
    "detect_transitions",
    "estimate_behavioral_llc",
    "estimate_llc",
    "explain_zeros",
    "hessian_spectrum",
    "hessian_trace",
    "leading_eigenpairs",
    "llc_by_temperature",
    "load_run",
    "measure_checkpoints",
    "quadratic_llc",
    "split_off_misfit",
]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the command line starts at once."""
    if name == "plot":
        return importlib.import_module("phasewatch.plot")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
