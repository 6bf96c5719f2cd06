"""Transitions of a run: change points of its recorded series, found at the end or as it goes on."""

from phasewatch.transitions.align import AlignedTransition, align_transitions
from phasewatch.transitions.cost import CostWeightedLine
from phasewatch.transitions.detect import detect_transitions
from phasewatch.transitions.kinds import DETECTABLE
from phasewatch.transitions.live import Flag, LiveDetector, standing_transitions
from phasewatch.transitions.search import OptimalPartition
from phasewatch.transitions.transition import Change, Detection, Stage, Transition

__all__ = [
    "DETECTABLE",
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
