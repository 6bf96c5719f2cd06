"""The spectral density over the course of a run, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from phasewatch.record import Measurement
from phasewatch.record.signals import SPECTRUM

ROWS = 91
"""Of the picture, from one side of zero to the other. Chosen."""
DECADES = 8
"""Magnitudes of eigenvalues that the axis shows on each side of zero, below the largest. Chosen."""

_PALE_TO_DARK = ListedColormap(colormaps["YlGnBu"](np.linspace(0.25, 1, 256)))
"""Single eigenvalues stay pale, so that what there is much of stands out; nothing is white."""


def density_figure(measurements: Sequence[Measurement]) -> Figure | None:
    """How many eigenvalues lie where, step by step; None where fewer than two spectra were measured.

    The axis is logarithmic on both sides of a band in the middle, which holds all that is smaller than ``DECADES``
    decades below the largest modulus of the run. Each column is one measurement.

    Args:
        measurements: In the order of their steps.
    """
    if not _spectra(measurements):
        return None
    figure = Figure(figsize=(8.0, 4.8), dpi=150, facecolor="white", layout="constrained")
    draw_density(figure.add_subplot(), measurements)
    return figure


def draw_density(axes: Axes, measurements: Sequence[Measurement]) -> None:
    """Draw it, with a bar that tells the colours.

    Args:
        axes: Where to.
        measurements: In the order of their steps.

    Raises:
        ValueError: If fewer than two spectra were measured.
    """
    spectra = _spectra(measurements)
    if not spectra:
        raise ValueError("fewer than two spectra other than zero were measured; the density needs two at least")
    steps = np.array([m.step for m in spectra], dtype=float)
    largest = _largest(spectra)
    edges = np.linspace(-1 - DECADES, 1 + DECADES, ROWS + 1)
    counts = np.stack([_column(m, largest, edges) for m in spectra], axis=1)
    image = axes.pcolormesh(
        np.arange(len(steps) + 1) - 0.5,
        edges,
        np.ma.masked_less(counts, 1e-3),
        norm=LogNorm(vmin=max(float(counts[counts > 1e-3].min()), 0.1), vmax=float(counts.max())),
        cmap=_PALE_TO_DARK,
    )
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 6)).round().astype(int))
    axes.set_xticks(shown, [f"{steps[i]:,.0f}" for i in shown])
    top = int(np.floor(np.log10(largest)))
    ticks = [(DECADES + power - np.log10(largest), power) for power in range(top, top - DECADES + 1, -2)]
    axes.set_yticks(
        [*(-place for place, _ in ticks), 0, *(place for place, _ in ticks)],
        [*(f"$-10^{{{power}}}$" for _, power in ticks), "0", *(f"$10^{{{power}}}$" for _, power in ticks)],
    )
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.tick_params(labelsize=12)
    axes.set_xlabel("training step (one column a measurement)", fontsize=13)
    axes.set_ylabel("eigenvalue of the Hessian", fontsize=13)
    axes.set_title(f"0 holds all below {largest * 10.0**-DECADES:.0e} in modulus", fontsize=11, color="0.35")
    bar = axes.figure.colorbar(image, ax=axes, format=FuncFormatter(lambda value, _: f"{value:,.10g}"))
    bar.set_label("number of eigenvalues", fontsize=13)
    bar.ax.tick_params(labelsize=12)


def _spectra(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those with a spectrum; none where there are fewer than two, or all eigenvalues are zero."""
    found = [m for m in measurements if SPECTRUM in m.histograms and m.histograms[SPECTRUM].positions]
    return found if len(found) > 1 and _largest(found) > 0 else []


def _largest(spectra: Sequence[Measurement]) -> float:
    return max(float(np.abs(m.histograms[SPECTRUM].positions).max()) for m in spectra)


def _column(measurement: Measurement, largest: float, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    spectrum = measurement.histograms[SPECTRUM]
    positions, weights = np.array(spectrum.positions), np.array(spectrum.weights)
    with np.errstate(divide="ignore"):
        places = np.sign(positions) * np.maximum(DECADES + np.log10(np.abs(positions) / largest), 0.0)
    counts, _ = np.histogram(places, bins=edges, weights=weights)
    return counts
