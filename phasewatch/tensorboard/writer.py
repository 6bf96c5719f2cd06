"""What was measured, as TensorBoard shows it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from phasewatch.analysis import NOT_BORNE_OUT, Analysis
from phasewatch.figures import density_figure, run_figure
from phasewatch.record import Flag, Histogram, Measurement, Run, Transition
from phasewatch.record.signals import NULLITY, SPECTRUM, detected
from phasewatch.report import format_hints, format_moved, format_table, verdict
from phasewatch.tags import DETAILS, LOOKED_AT, STAGE, STAGE_OF_WHOLE_RUN, doubted, gaps, stages, tagged
from phasewatch.tensorboard.layout import CATEGORY, Chart, charts, holds_another

CHILD_RUN = "phasewatch"
BINS = 60
"""Of the histogram of a spectrum. Chosen."""
DRAWING = 0.02
"""Share of a run's time that may have gone into pictures of the run so far before there is another one. Chosen."""
VERDICT, FOUND, FLAGGED = (
    f"{LOOKED_AT}1_verdict",
    f"{LOOKED_AT}2_transitions_found",
    f"{LOOKED_AT}3_transitions_flagged",
)
RUN, RUN_SO_FAR, DENSITY = f"{LOOKED_AT}1_run", f"{LOOKED_AT}2_run_so_far", f"{DETAILS}hessian_density"


class TensorBoardWriter:
    """Writes measurements and transitions as they come, into a run of the user's or one of its own.

    A tag is never written at a step earlier than its last one, as that would delete what it holds: a transition is
    logged at the step at which it was detected, and what is found after the run has tags of its own. What is not to be
    trusted is a series of its own, and each of the two has a gap where the other goes on.

    Attributes:
        directory: The run that is written to.
    """

    def __init__(self, where: str | os.PathLike[str] | SummaryWriter, scalars: bool = True) -> None:
        """Open the run.

        Args:
            where: The run's log directory, of which the child run ``phasewatch`` is written; or the writer that the
                user logs with, into whose run all goes but for our page of custom scalars where the user has one there.
                TensorBoard's slower reader follows one file of a run as it grows, so two writers share no directory.
            scalars: Whether to write the numbers. With False, the caller has logged them through a logger that writes
                into the same run.
        """
        self._own: list[SummaryWriter] = []
        self._child: SummaryWriter | None = None
        if isinstance(where, str | os.PathLike):
            where = self._child = self._opened(Path(where) / CHILD_RUN)
        self._writer: SummaryWriter = where
        self.directory = Path(self._writer.log_dir)
        self._scalars = scalars
        self._measurements: list[Measurement] = []
        self._begun: set[str] = set()
        self._charts: dict[str, Chart] = {}
        self._standing: tuple[Transition, ...] = ()
        self._unsaid: int | None = None
        self._said_at = -1
        self._has_undrawn = False
        self._drawing_seconds, self._opened_at = 0.0, time.perf_counter()

    def on_resume(self, run: Run) -> None:
        """Take note of what was recorded before the run was cut off; nothing is written.

        Args:
            run: The run so far.
        """
        self._measurements = list(run.measurements)
        self._begun = {name for measurement in run.measurements for name in tagged(measurement)}
        self._standing = run.transitions
        self._has_undrawn = bool(run.flags or run.transitions)  # what was to be drawn later is lost with a run

    def on_measurement(self, measurement: Measurement) -> None:
        """Write numbers, gaps and spectrum of one measurement.

        The verdict follows once the detector has had its say of it.
        """
        if self._unsaid is not None:
            self._say_verdict(self._so_far, self._unsaid)
        before = doubted(self._measurements[-1]) if self._measurements else set()
        self._measurements.append(measurement)
        step = measurement.step
        numbers = tagged(measurement)
        self._begun |= numbers.keys()
        if self._scalars:
            for name, value in {**numbers, STAGE: len(self._standing)}.items():
                self._writer.add_scalar(name, value, step)
        for name, signal in gaps(measurement).items():
            if signal in self._begun:
                self._writer.add_scalar(name, math.nan, step)
        for name in sorted(before - doubted(measurement)):
            self._writer.add_scalar(name, math.nan, step)
        self._write_layout(measurement)
        if SPECTRUM in measurement.histograms:
            self._write_spectrum(measurement.histograms[SPECTRUM], measurement.value(f"{NULLITY}_threshold"), step)
        number = len(self._measurements)
        if number & (number - 1) == 0:  # at 1, 2, 4, 8, ...: drawing costs as long as the run grows, and no more
            self._write_density(step)
        self._unsaid = step
        self._writer.flush()

    def on_transitions(self, step: int, flags: Sequence[Flag], standing: Sequence[Transition]) -> None:
        """Write the verdict, and what the measurement at ``step`` flagged or revised: scalars, table and figure.

        The figure follows later where figures have taken much of the run's time already.
        """
        if not flags:
            self._say_verdict(self._so_far, step)
            self._writer.flush()
            self._draw_so_far(step, at_once=False)
            return
        for flag in flags:
            if flag.action != "withdrawn":
                self._writer.add_scalar(f"{DETAILS}transition_at", flag.transition.step, step)
        if self._scalars:
            self._writer.add_scalar(STAGE, len(standing), step)
        self._standing = tuple(standing)
        so_far = self._so_far
        self._text(FLAGGED, so_far.run, standing, None, step)
        if not all(flag.why == NOT_BORNE_OUT for flag in flags):  # then the run is over, and its own verdict comes next
            self._say_verdict(so_far, step)
        self._writer.flush()
        self._has_undrawn = True
        self._draw_so_far(step, at_once=False)

    def on_end(self, analysis: Analysis) -> None:
        """Write verdict, stages, table and figure of the whole run."""
        run = analysis.run
        if not run.measurements:
            return
        step = run.measurements[-1].step
        self._say_verdict(analysis, max(step, self._said_at + 1))
        steps = [measurement.step for measurement in run.measurements]
        for at, stage in zip(steps, stages(steps, analysis.transitions), strict=True):
            self._writer.add_scalar(STAGE_OF_WHOLE_RUN, stage, at)
        self._text(FOUND, run, analysis.transitions, analysis.note, step)
        self._figure(RUN, analysis, step)
        self._write_density(step)
        self._writer.flush()
        self._draw_so_far(step, at_once=True)

    def close(self) -> None:
        """Close what was opened here."""
        try:
            if self._unsaid is not None:
                self._say_verdict(self._so_far, self._unsaid)
                self._writer.flush()
            if self._measurements:
                self._draw_so_far(self._measurements[-1].step, at_once=True)
        finally:
            for writer in self._own:
                writer.close()

    @property
    def _so_far(self) -> Analysis:
        run = Run(None, {}, tuple(self._measurements), (), (), (), finished=False)
        note = None if self._standing else "No transition was flagged so far."
        return Analysis(run, self._standing, tuple(detected(run.names_known_often)), math.nan, note)

    def _say_verdict(self, analysis: Analysis, step: int) -> None:
        """Write it, once a step."""
        self._unsaid, self._said_at = None, step
        sentences = verdict(analysis).sentences
        self._writer.add_text(VERDICT, "\n".join(f"- {sentence}" for sentence in sentences), step)

    def _draw_so_far(self, step: int, at_once: bool) -> None:
        """Draw the run so far if it has been flagged or revised since, at once or as soon as the time allows.

        What cannot be drawn is tried again when there is something new.
        """
        began = time.perf_counter()
        pays = self._drawing_seconds <= DRAWING * (began - self._opened_at)
        if not (self._has_undrawn and (pays or at_once)):
            return
        self._has_undrawn = False
        try:
            self._figure(RUN_SO_FAR, self._so_far, step)
            self._writer.flush()
        finally:
            self._drawing_seconds += time.perf_counter() - began

    def _write_layout(self, measurement: Measurement) -> None:
        if charts(measurement.estimates.keys()).keys() <= self._charts.keys():
            return
        self._charts = charts([name for one in self._measurements for name in one.estimates])
        if self._child is None:
            self._writer.flush()
            if holds_another(self.directory):
                self._child = self._opened(self.directory / CHILD_RUN)
        page = self._child or self._writer
        page.add_custom_scalars({CATEGORY: self._charts})
        page.flush()

    def _opened(self, directory: Path) -> SummaryWriter:
        self._own.append(SummaryWriter(str(directory)))
        return self._own[-1]

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
            f"{DETAILS}{SPECTRUM}",
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
            self._writer.add_image(DENSITY, _rendered(figure), step, dataformats="HWC")

    def _text(self, name: str, run: Run, transitions: Sequence[Transition], note: str | None, step: int) -> None:
        table = note or format_table(transitions, markdown=True)
        beside = (describe(run, transitions, markdown=True) for describe in (format_moved, format_hints))
        self._writer.add_text(name, "\n\n".join(filter(None, [table, *beside])), step)

    def _figure(self, name: str, analysis: Analysis, step: int) -> None:
        image = _rendered(run_figure(analysis))
        self._writer.add_image(name, image, step, dataformats="HWC")


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


def _rendered(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[..., :3]
