"""What was measured, as TensorBoard shows it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from phasewatch.record import Histogram, Measurement, Run
from phasewatch.report import Analysis, analyze_run, density_figure, format_table, run_figure
from phasewatch.transitions import DETECTABLE, Flag, Transition
from phasewatch.transitions.kinds import DEGENERACIES

CHILD_RUN = "phasewatch"
SPECTRUM = "hessian_eigenvalues"
NORMAL_95 = 1.959964
BINS = 60
BANDS = ("llc", "nullity", "nullity_ggn")
CAUSES = "zeros by cause"
# The charts of the custom-scalars page in their order there, with the signals that each shows.
CHARTS = {
    "loss on the probe": ("loss",),
    "learning coefficient λ (95 % band)": ("llc",),
    "zero eigenvalues of the Hessian (bounds)": ("nullity",),
    "largest and smallest Hessian eigenvalue": ("hessian_max", "hessian_min"),
    "trace of the Hessian": ("hessian_trace",),
    "zero eigenvalues of the Gauss-Newton matrix (bounds)": ("nullity_ggn",),
    CAUSES: ("zeros_generic", *DEGENERACIES, "zeros_unexplained"),
    "distance of the nearest units from degeneracy": (
        *("distance_dead", "distance_zero_outgoing", "distance_constant", "distance_parallel"),
        "distance_annihilating",
    ),
}


class TensorBoardWriter:
    """Writes measurements and transitions into the child run ``<log_dir>/phasewatch`` as they come.

    A run of its own keeps a custom-scalars layout that the user has in ``log_dir``. A tag is never written at
    a step earlier than its last one, as that would delete what it holds: a transition is logged at the step
    at which it was detected, and what is found after the run has tags of its own.

    Attributes:
        directory: The child run.
    """

    def __init__(self, log_dir: str | os.PathLike[str], scalars: bool = True) -> None:
        """Open the child run.

        Args:
            log_dir: The run's log directory, beside whose own event files the child run comes to lie.
            scalars: Whether to write every signal as a scalar. With False, the caller has logged them through
                a logger of its own, and only what such a logger cannot do is written here.
        """
        self.directory = Path(log_dir) / CHILD_RUN
        self._scalars = scalars
        self._writer = SummaryWriter(str(self.directory))
        self._measurements: list[Measurement] = []
        self._charted: set[str] = set()

    def on_resume(self, run: Run) -> None:
        """Take note of what was recorded before the run was cut off; nothing is written.

        Args:
            run: The run so far.
        """
        self._measurements = list(run.measurements)

    def on_measurement(self, measurement: Measurement) -> None:
        """Write scalars, the bands and the spectrum of one measurement."""
        self._measurements.append(measurement)
        step = measurement.step
        incomplete = _incomplete_bands(measurement)
        if self._scalars:
            for name, value in measurement.values.items():
                if name not in incomplete:
                    self._scalar(name, value, step)
        self._scalar("unreliable", len(measurement.unreliable), step)
        self._write_bands(measurement)
        self._write_layout(measurement)
        if SPECTRUM in measurement.histograms:
            threshold = measurement.values.get("nullity_threshold", math.nan)
            self._write_spectrum(measurement.histograms[SPECTRUM], threshold, step)
        number = len(self._measurements)
        if number & (number - 1) == 0:  # at 1, 2, 4, 8, ...: drawing costs as long as the run grows, and no more
            self._write_density(step)
        self._writer.flush()

    def on_transitions(self, step: int, flags: Sequence[Flag], standing: Sequence[Transition]) -> None:
        """Write what the measurement at ``step`` flagged or revised: scalars, and table and figure as of now."""
        for flag in flags:
            if flag.action != "withdrawn":
                self._scalar("transition_at", flag.transition.step, step)
        self._scalar("transitions", len(standing), step)
        self._text("transitions_flagged", standing, None, step)
        names = {name for m in self._measurements for name in m.values}
        so_far = Run(None, {}, tuple(self._measurements), (), (), (), finished=False)
        signals = tuple(name for name in DETECTABLE if name in names)
        self._figure("run_so_far", Analysis(so_far, tuple(standing), signals, math.nan, None), step)
        self._writer.flush()

    def on_end(self, run: Run) -> None:
        """Analyse the whole run, at its own alpha, and write its table and figure at the last step."""
        if not run.measurements:
            return
        analysis = analyze_run(run, alpha=run.header.get("alpha") or 0.05)
        step = run.measurements[-1].step
        self._text("transitions_found", analysis.transitions, analysis.note, step)
        self._figure("run", analysis, step)
        self._write_density(step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._writer.add_scalar(f"phasewatch/{name}", value, step)

    def _write_bands(self, measurement: Measurement) -> None:
        step, values = measurement.step, measurement.values
        for name in BANDS:
            value = values.get(name, math.nan)
            error = NORMAL_95 * measurement.standard_errors.get(name, math.nan)
            low = values.get(f"{name}_lower", value - error)
            high = values.get(f"{name}_upper", value + error)
            if not all(math.isfinite(number) for number in (value, low, high)):
                continue
            written = {name, f"{name}_lower", f"{name}_upper"} & set(values) if self._scalars else set()
            for tag, number in ((name, value), (f"{name}_lower", low), (f"{name}_upper", high)):
                if tag not in written:
                    self._scalar(tag, number, step)

    def _write_layout(self, measurement: Measurement) -> None:
        # causes of zeros that never occur would only be lines at zero
        shown = {name for name, value in measurement.values.items() if value or name not in CHARTS[CAUSES]}
        seen = self._charted | shown
        if seen == self._charted:
            return
        self._charted = seen
        charts = {
            title: _chart([name for name in names if name in seen or title != CAUSES])
            for title, names in CHARTS.items()
            if seen.intersection(names)
        }
        if charts:
            self._writer.add_custom_scalars({"phasewatch": charts})

    def _write_spectrum(self, spectrum: Histogram, threshold: float, step: int) -> None:
        positions = np.array(spectrum.positions, dtype=np.float64)
        weights = np.array(spectrum.weights, dtype=np.float64)
        kept = np.isfinite(positions) & np.isfinite(weights)
        positions, weights = positions[kept], weights[kept]
        if not weights.sum() > 0:
            return
        edges = spectrum_edges(positions, threshold)
        counts, _ = np.histogram(positions, bins=edges, weights=weights)
        self._writer.add_histogram_raw(
            f"phasewatch/{SPECTRUM}",
            min=float(edges[0]),
            max=float(edges[-1]),
            num=float(weights.sum()),
            sum=float(weights @ positions),
            sum_squares=float(weights @ positions**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def _write_density(self, step: int) -> None:
        figure = density_figure(self._measurements)
        if figure is not None:
            self._writer.add_image("phasewatch/hessian_density", _rendered(figure), step, dataformats="HWC")

    def _text(self, name: str, transitions: Sequence[Transition], note: str | None, step: int) -> None:
        self._writer.add_text(f"phasewatch/{name}", note or format_table(transitions, markdown=True), step)

    def _figure(self, name: str, analysis: Analysis, step: int) -> None:
        image = _rendered(run_figure(analysis))
        self._writer.add_image(f"phasewatch/{name}", image, step, dataformats="HWC")


def _incomplete_bands(measurement: Measurement) -> set[str]:
    """The value and the limits of bands whose value is not known: TensorBoard draws no band if their steps differ."""
    values = measurement.values
    unknown = [name for name in BANDS if not math.isfinite(values.get(name, math.nan))]
    return {tag for name in unknown for tag in (name, f"{name}_lower", f"{name}_upper")}


def spectrum_edges(positions: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """Edges of bins over a spectrum, of equal width but for one that holds what counts as zero.

    Args:
        positions: The eigenvalues, shape ``(k,)``.
        threshold: Up to this modulus an eigenvalue counts as zero; where it is not known or zero, what lies
            within 1e-9 of the largest modulus does.
    """
    largest = float(np.abs(positions).max()) or 1.0
    zero = threshold if math.isfinite(threshold) and threshold > 0 else 1e-9 * largest
    low, high = min(float(positions.min()), -zero), max(float(positions.max()), zero)
    width = (high - low) / BINS
    negative = np.linspace(low, -zero, 1 + math.ceil((-zero - low) / width))
    positive = np.linspace(high, zero, 1 + math.ceil((high - zero) / width))[::-1]
    return np.concatenate([negative, positive])


def _chart(names: Sequence[str]) -> list[str | list[str]]:
    if names[0] in BANDS:
        return ["Margin", [f"phasewatch/{names[0]}{end}" for end in ("", "_lower", "_upper")]]
    return ["Multiline", [f"^phasewatch/{name}$" for name in names]]  # these are regular expressions


def _rendered(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[..., :3]
