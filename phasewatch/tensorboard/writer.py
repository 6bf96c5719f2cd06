"""What was measured, as TensorBoard shows it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from phasewatch.analysis import Analysis
from phasewatch.record import Flag, Histogram, Measurement, Run, Signal, Transition
from phasewatch.record.signals import NULLITY, SPECTRUM, detected, groups, is_one_of_several_counts
from phasewatch.report import density_figure, format_moved, format_table, run_figure, verdict

CHILD_RUN = "phasewatch"
BINS = 60


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
        self._standing: tuple[Transition, ...] = ()

    def on_resume(self, run: Run) -> None:
        """Take note of what was recorded before the run was cut off; nothing is written.

        Args:
            run: The run so far.
        """
        self._measurements = list(run.measurements)
        self._standing = run.transitions

    def on_measurement(self, measurement: Measurement) -> None:
        """Write scalars, the bands and the spectrum of one measurement."""
        self._measurements.append(measurement)
        step = measurement.step
        if self._scalars:
            for name, estimate in measurement.estimates.items():
                self._scalar(name, estimate.value, step)
        self._scalar("unreliable", sum(not estimate.reliable for estimate in measurement.estimates.values()), step)
        self._write_bands(measurement)
        for name in _doubtful(measurement):
            self._scalar(_unreliable(name), measurement.value(name), step)
        self._write_layout(measurement)
        if SPECTRUM in measurement.histograms:
            self._write_spectrum(measurement.histograms[SPECTRUM], measurement.value(f"{NULLITY}_threshold"), step)
        number = len(self._measurements)
        if number & (number - 1) == 0:  # at 1, 2, 4, 8, ...: drawing costs as long as the run grows, and no more
            self._write_density(step)
        self._verdict(self._so_far, step)
        self._writer.flush()

    def on_transitions(self, step: int, flags: Sequence[Flag], standing: Sequence[Transition]) -> None:
        """Write what the measurement at ``step`` flagged or revised: scalars, and table and figure as of now."""
        for flag in flags:
            if flag.action != "withdrawn":
                self._scalar("transition_at", flag.transition.step, step)
        self._scalar("transitions", len(standing), step)
        self._standing = tuple(standing)
        so_far = self._so_far
        self._text("transitions_flagged", so_far.run, standing, None, step)
        self._figure("run_so_far", so_far, step)
        self._verdict(so_far, step)
        self._writer.flush()

    def on_end(self, analysis: Analysis) -> None:
        """Write table and figure of the whole run at its last step."""
        run = analysis.run
        if not run.measurements:
            return
        step = run.measurements[-1].step
        self._verdict(analysis, step)
        self._text("transitions_found", run, analysis.transitions, analysis.note, step)
        self._figure("run", analysis, step)
        self._write_density(step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    @property
    def _so_far(self) -> Analysis:
        run = Run(None, {}, tuple(self._measurements), (), (), (), finished=False)
        note = None if self._standing else "No transition was flagged so far."
        return Analysis(run, self._standing, tuple(detected(run.names)), math.nan, note)

    def _verdict(self, analysis: Analysis, step: int) -> None:
        sentences = verdict(analysis).sentences
        self._writer.add_text("phasewatch/verdict", "\n".join(f"- {sentence}" for sentence in sentences), step)

    def _scalar(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._writer.add_scalar(f"phasewatch/{name}", value, step)

    def _write_bands(self, measurement: Measurement) -> None:
        for row in (row for rows in groups().values() for row in rows):
            if row.bounds is None or row.bounds[0] in measurement.estimates:  # measured bounds are scalars already
                continue
            numbers = (measurement.value(row.name), *measurement.interval(row.name))
            if not all(math.isfinite(number) for number in numbers):
                continue
            for tag, number in zip((row.name, *row.bounds), numbers, strict=True):
                if not (self._scalars and tag in measurement.estimates):
                    self._scalar(tag, number, measurement.step)

    def _write_layout(self, measurement: Measurement) -> None:
        # counts that never occur would only be lines at zero
        found = measurement.estimates.items()
        seen = self._charted | {name for name, one in found if one.value or not is_one_of_several_counts(name)}
        seen |= set(map(_unreliable, _doubtful(measurement)))
        if seen == self._charted:
            return
        self._charted = seen
        charts = [chart for group, rows in groups().items() for chart in _charts(group, rows, seen)]
        if charts:
            self._writer.add_custom_scalars({"phasewatch": dict(charts)})

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

    def _text(self, name: str, run: Run, transitions: Sequence[Transition], note: str | None, step: int) -> None:
        table = note or format_table(transitions, markdown=True)
        moved = format_moved(run, transitions, markdown=True)
        self._writer.add_text(f"phasewatch/{name}", f"{table}\n\n{moved}" if moved else table, step)

    def _figure(self, name: str, analysis: Analysis, step: int) -> None:
        image = _rendered(run_figure(analysis))
        self._writer.add_image(f"phasewatch/{name}", image, step, dataformats="HWC")


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


def _charts(group: str, rows: Sequence[Signal], seen: Collection[str]) -> Iterator[tuple[str, list[str | list[str]]]]:
    """Title and content of the charts of a group: one for each signal with bounds, one for all others together.

    Where several have bounds, their values stand in that one as well, and beside them those that are unreliable: a
    chart of bands holds only one, and comes after all charts of lines.
    """
    together = []
    several = _has_several_bands(rows)
    for row in (row for row in rows if row.name in seen):
        if row.bounds is None or several:
            together += [_pattern(name) for name in (row.name, _unreliable(row.name)) if name in seen]
        if row.bounds is None:
            continue
        if row.bounds[0] in seen:
            # A value may be unknown where its bounds are not, and a margin chart fails where their steps differ.
            yield f"{row.title} (bounds)", ["Multiline", [_pattern(name) for name in (row.name, *row.bounds)]]
        else:
            tags = [f"phasewatch/{name}" for name in (row.name, *row.bounds)]
            yield f"{row.title} (95 % band)", ["Margin", tags]
    if together:
        yield group, ["Multiline", together]


def _unreliable(name: str) -> str:
    """The tag that repeats a signal where it is not to be trusted."""
    return f"{name}_unreliable"


def _doubtful(measurement: Measurement) -> list[str]:
    """The signals of groups of several bands that are not to be trusted in a measurement."""
    several = [row.name for rows in groups().values() if _has_several_bands(rows) for row in rows]
    return [name for name in several if name in measurement.estimates and not measurement.estimates[name].reliable]


def _has_several_bands(rows: Sequence[Signal]) -> bool:
    return sum(row.bounds is not None for row in rows) > 1


def _pattern(name: str) -> str:
    """A regular expression for the tag of a signal, as charts of several lines want it."""
    return f"^phasewatch/{re.escape(name)}$"


def _rendered(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[..., :3]
