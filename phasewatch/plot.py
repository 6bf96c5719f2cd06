"""Figures for a notebook: each function takes axes of matplotlib and returns them; without, it draws on current ones.

Example:
    >>> import numpy as np, phasewatch
    >>> from phasewatch.record import Estimate, Measurement, Run
    >>> found = [Measurement(step, {"loss": Estimate(2.0 if step < 500 else 1.0)}) for step in range(0, 1000, 50)]
    >>> axes = signal(Run(None, {}, tuple(found), (), (), (), finished=True), "loss")
    >>> axes.get_title(loc="left")
    'loss on the probe'
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phasewatch.analysis import Analysis, analyze_run
from phasewatch.figures import run_figure
from phasewatch.figures.comparison import draw_comparison
from phasewatch.figures.density import draw_density
from phasewatch.figures.panel import draw_panel, recorded
from phasewatch.figures.stages import draw_events, draw_stages
from phasewatch.figures.style import BLUE, VERMILION, scale_steps
from phasewatch.record import Histogram, Run
from phasewatch.record.signals import SPECTRUM, look_up
from phasewatch.transitions import align_transitions


def run(of: Run | Analysis) -> Figure:
    """All that a person looks at in a run, one panel below the other, with its transitions.

    Args:
        of: The run, which is analysed, or its analysis.
    """
    _pyplot()  # with which a notebook learns to show figures
    return run_figure(_analysed(of))


def signal(of: Run | Analysis, name: str, axes: Axes | None = None) -> Axes:
    """One signal over the steps, with stages, transitions and events behind it where an analysis is given.

    Args:
        of: The run, or its analysis.
        name: The signal; ``"training_loss"``, or what was observed under another name, is averaged over stretches.
        axes: Where to.

    Raises:
        KeyError: If the run has no such signal.
    """
    found = of.run if isinstance(of, Analysis) else of
    steps = recorded(name, found).steps
    axes = _axes(axes)
    scale_steps(axes, np.unique([*steps, *(one.step for one in found.measurements)]))
    if isinstance(of, Analysis):
        draw_stages(axes, of.transitions)
        draw_events(axes, of.events, named=True)
    draw_panel(axes, [look_up(name)], found)
    axes.set_xlabel("training step")
    return axes


def density(of: Run, axes: Axes | None = None) -> Axes:
    """How many eigenvalues of the Hessian lie where, step by step.

    Args:
        of: The run.
        axes: Where to.

    Raises:
        ValueError: If fewer than two spectra were measured.
    """
    axes = _axes(axes)
    draw_density(axes, of.measurements)
    return axes


def spectrum(of: Run, step: int | None = None, axes: Axes | None = None) -> Axes:
    """The eigenvalues of the Hessian at one step: how many, as bars over their values.

    Args:
        of: The run.
        step: A step at which they were measured; default the last.
        axes: Where to.

    Raises:
        ValueError: If they were not measured at that step.
    """
    known = {one.step: one.histograms[SPECTRUM] for one in of.measurements if SPECTRUM in one.histograms}
    if not known or (step is not None and step not in known):
        raise ValueError(f"no spectrum was measured at step {step}; there is one at {sorted(known) or 'none'}")
    step = max(known) if step is None else step
    found: Histogram = known[step]
    axes = _axes(axes)
    axes.vlines(found.positions, 0, found.weights, color=BLUE, linewidth=1.2)
    axes.axvline(0, color=VERMILION, linewidth=0.8, linestyle=":")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("number")
    axes.set_title(f"step {step:,}", loc="left")
    return axes


def comparison(
    analyses: Sequence[Analysis], names: Sequence[str] | None = None, factor: float = 1.0, axes: Axes | None = None
) -> Axes:
    """Several runs one above the other, what is the same transition joined.

    Args:
        analyses: Of each run.
        names: What the runs are called; default their numbers.
        factor: See :func:`phasewatch.align_transitions`.
        axes: Where to.
    """
    axes = _axes(axes)
    names = [str(number) for number in range(len(analyses))] if names is None else names
    draw_comparison(axes, names, analyses, align_transitions([one.transitions for one in analyses], factor))
    return axes


def _analysed(of: Run | Analysis) -> Analysis:
    return of if isinstance(of, Analysis) else analyze_run(of)


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    current: Axes = _pyplot().gca()
    return current


def _pyplot() -> Any:
    return import_module("matplotlib.pyplot")
