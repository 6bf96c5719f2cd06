"""Figures of runs, which report, TensorBoard and notebooks draw with."""

from phasewatch.figures.comparison import comparison_figure
from phasewatch.figures.density import density_figure
from phasewatch.figures.run import run_figure

__all__ = ["comparison_figure", "density_figure", "run_figure"]
