"""Transitions of a run: change points of its recorded series, found at the end or as it goes on."""

from phasewatch.record.transition import Change, Flag, Transition, standing_transitions
from phasewatch.transitions.align import AlignedTransition, align_transitions
from phasewatch.transitions.cost import CostWeightedLine
from phasewatch.transitions.detect import detect_transitions
from phasewatch.transitions.detection import Detection, Stage
from phasewatch.transitions.live import LiveDetector
from phasewatch.transitions.search import OptimalPartition

__all__ = [
    "AlignedTransition",
    "Change",
    "CostWeightedLine",
    "Detection",
    "Flag",
    "LiveDetector",
    "OptimalPartition",
    "Stage",
    "Transition",
    "align_transitions",
    "detect_transitions",
    "standing_transitions",
]
