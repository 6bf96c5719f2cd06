"""PyTorch Lightning callbacks: drop one into ``Trainer(callbacks=[...])``. No mathematics here.

Works with ``pytorch_lightning`` and with ``lightning.pytorch``.
"""

from phasewatch.callbacks.finished import FinishedRun
from phasewatch.callbacks.monitors import HessianMonitor, LLCMonitor, PhaseWatch, TransitionDetector

__all__ = ["FinishedRun", "HessianMonitor", "LLCMonitor", "PhaseWatch", "TransitionDetector"]
