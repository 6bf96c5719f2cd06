"""What a watch measures: the estimators with their settings, and how their results become signals."""

from phasewatch.estimators.behavioral import BehavioralCoefficient
from phasewatch.estimators.learning_coefficient import LearningCoefficient
from phasewatch.estimators.price import Price, Priced, Size
from phasewatch.estimators.probe_loss import ProbeLoss
from phasewatch.estimators.reading import Estimator, Reading, checked_estimators
from phasewatch.estimators.spectrum import HessianSpectrum
from phasewatch.estimators.zeros import SymmetryLedger

__all__ = [
    "BehavioralCoefficient",
    "Estimator",
    "HessianSpectrum",
    "LearningCoefficient",
    "Price",
    "Priced",
    "ProbeLoss",
    "Reading",
    "Size",
    "SymmetryLedger",
    "checked_estimators",
]
