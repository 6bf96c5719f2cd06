"""The loss as a pure function of the parameters on fixed data, and what is made of the network's outputs in it."""

from phasewatch.objective.function import LossFn, OutputsFn, second_derivatives
from phasewatch.objective.loss import Objective
from phasewatch.objective.misfit import split_off_misfit
from phasewatch.objective.outputs import ConstantOutputsError, NoOutputsError

__all__ = [
    "ConstantOutputsError",
    "LossFn",
    "NoOutputsError",
    "Objective",
    "OutputsFn",
    "second_derivatives",
    "split_off_misfit",
]
