"""The report of a run: a figure, the data behind it, and a page that holds both and needs nothing else."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from phasewatch.analysis import Analysis
from phasewatch.figures import run_figure
from phasewatch.figures.numbers import format_span, format_step
from phasewatch.record import Transition
from phasewatch.record.signals import look_up
from phasewatch.report.hints import describe_hints
from phasewatch.report.markup import document, escape, picture, sentences, table
from phasewatch.report.moved import describe_moved
from phasewatch.report.table import COLUMNS, EVENT_COLUMNS, NONE_FOUND, event_rows, table_rows
from phasewatch.report.verdict import Verdict, count_doubts, count_notes, counted_changes, verdict

_HOW_TO_READ = """
<dl>
<dt>Stages and transitions</dt>
<dd>The tinted stretches are stages: there every signal drifts slowly. A red line is a transition, a stretch
faster than the stages on both sides of it; the amber shade is the 95 % interval of its place, the bar on
top its whole extent.</dd>
<dt>Kinds</dt>
<dd><b>A</b>: the loss falls and the learning coefficient λ of the function rises; accuracy is bought with
complexity. <b>B</b>: the loss stays about constant and λ falls, and so it does where outputs are compared in a
metric of fixed variance; the model becomes simpler. Where it does not fall there, the model has only become
<i>more confident</i>. Anything else is named as what it was. λ has a resolution; <i>(fine)</i> and <i>(coarse)</i>
say that a kind holds at one of the two alone. No kind is named at a resolution where the change of λ would have the
other sign with a prior of twice or half the spread, or at twice or half the resolution.</dd>
<dt>What changed</dt>
<dd>The level of each signal as the stage before ends and as the stage after begins: λ of the function, then the most
significant first. The score is the strength over all signals, in standard errors: about 4 is barely seen, 10 is plain.
All of it holds given that the transition was detected.</dd>
<dt>λ and the zero eigenvalues</dt>
<dd>λ measures the effective dimension of the model around its weights: half the number of parameters where
nothing is degenerate, less where there are directions that do not change the function. Those show as zero
eigenvalues of the Hessian, counted between bounds. λ of the function counts what changes the outputs by more than its
resolution, at every step; λ of the loss, which counts in the free energy, is measured where the weights are near a
minimum.</dd>
<dt>Samples that changed most</dt>
<dd>By their place in the probe, from 0, with their losses at the last measurement before the transition and the first
after it; the classes with the mean change of theirs and its standard error.</dd>
<dt>Hollow points</dt>
<dd>Estimates whose own diagnostics say that they are not to be trusted. The detector gives them little
weight; hollow triangles lie beyond the axis.</dd>
</dl>
"""


MOST_REASONS = 4
"""Doubts that are told of a signal. Chosen."""


class ReportPaths(NamedTuple):
    """Where a report is written.

    Attributes:
        png: The figure.
        json: The analysis.
        html: The page that shows both.
    """

    png: Path
    json: Path
    html: Path

    @classmethod
    def within(cls, directory: str | os.PathLike[str]) -> ReportPaths:
        """Those of a report in a directory."""
        return cls(*(Path(directory) / f"phasewatch.{suffix}" for suffix in ("png", "json", "html")))

    def write(self, figure: Figure, told: Mapping[str, Any], page: Callable[[bytes], str]) -> None:
        """Write all three.

        Args:
            figure: What is drawn.
            told: The data behind it, in plain Python values.
            page: Makes the page, given the figure as PNG.

        Raises:
            OSError: If the directory cannot be made or written.
        """
        self.html.parent.mkdir(parents=True, exist_ok=True)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        self.png.write_bytes(image.getvalue())
        self.json.write_text(json.dumps(told, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        self.html.write_text(page(image.getvalue()), encoding="utf-8")


def write_report(analysis: Analysis, directory: str | os.PathLike[str]) -> ReportPaths:
    """Write ``phasewatch.png``, ``phasewatch.json`` and the self-contained ``phasewatch.html``.

    Args:
        analysis: As given by :func:`phasewatch.analyze_run`.
        directory: Where to; made if need be. Older reports there are replaced.

    Raises:
        OSError: If the directory cannot be written.
    """
    paths, said = ReportPaths.within(directory), verdict(analysis)
    told = {"verdict": said.to_dict(), **analysis.to_dict()}
    paths.write(run_figure(analysis), told, lambda image: _page(analysis, said, image))
    return paths


def _page(analysis: Analysis, said: Verdict, image: bytes) -> str:
    run = analysis.run
    count = len(analysis.transitions)
    parts = [
        f'<p class="where">{escape(_what(analysis))}</p>',
        sentences(said.sentences),
        "".join(f'<p class="warning">{escape(text)}</p>' for text in _warnings(analysis)),
        picture(image, "The run, its stages and transitions"),
        "<h2>Transitions</h2>",
        table(COLUMNS, table_rows(analysis.transitions, "→"), "transitions")
        if count
        else f"<p>{escape(analysis.note or NONE_FOUND)}</p>",
    ]
    if analysis.events:
        rows = event_rows(analysis.events)
        parts += ["<h2>What the schedule did, and what befell the run</h2>", table(EVENT_COLUMNS, rows)]
    moved = [(one, describe_moved(run.moved(one))) for one in analysis.transitions]
    if any(words for _, words in moved):
        told = [(format_step(one.step), one.label, "\n".join(words)) for one, words in moved if words]
        parts += ["<h2>Samples that changed most</h2>", table(("step", "kind", "samples and classes"), told)]
    hints = [(one, describe_hints(run, one)) for one in analysis.transitions]
    if any(words for _, words in hints):
        told = [(format_step(one.step), one.label, "\n".join(words)) for one, words in hints if words]
        parts += ["<h2>What was measured beside them</h2>", table(("step", "kind", "what is known"), told)]
    if run.transitions:
        flagged = [_flagged(one) for one in sorted(run.transitions, key=lambda one: one.flagged_at or 0.0)]
        columns = ("flagged at step", "from-to", "kind")
        parts += ["<h2>Flagged while the run went on</h2>", table(columns, flagged)]
    parts += ["<h2>How to read this</h2>", _HOW_TO_READ]
    if analysis.signals:
        named = [_described(name) for name in analysis.signals]
        parts += ["<h2>Signals looked at</h2>", table(("signal", "what it is", "unit"), named)]
    unreliable = analysis.unreliable()
    if unreliable:
        doubts = [
            (name, f"{bad} of {len(run.series(name))}", _reasons(analysis, name)) for name, bad in unreliable.items()
        ]
        parts += ["<h2>Points not to be trusted</h2>", table(("signal", "points", "because"), doubts)]
    noted = [
        (name, f"{count} of {len(run.series(name))}", note)
        for name in run.names
        for note, count in count_notes(run, name)
    ]
    if noted:
        parts += ["<h2>Points with a note</h2>", table(("signal", "points", "note"), noted)]
    if run.failures:
        failed = [(_text(f.get("step")), _text(f.get("what")), _text(f.get("error"))) for f in run.failures]
        parts += ["<h2>What failed</h2>", table(("step", "what", "error"), failed)]
    if run.damaged:
        lines = [(str(line.number), line.reason) for line in run.damaged]
        parts += ["<h2>Damaged lines of the record</h2>", table(("line", "what is wrong"), lines)]
    if run.header:
        entries = {name: entry for name, entry in run.header.items() if name != "labels"}
        parts += ["<h2>What produced the run</h2>", table(("entry", "value"), _flat(entries))]
    return document(counted_changes(analysis.transitions), parts)


def _what(analysis: Analysis) -> str:
    run = analysis.run
    if not run.measurements:
        extent = "no measurements"
    else:
        steps = format_span(run.measurements[0].step, run.measurements[-1].step)
        extent = f"{len(run.measurements)} measurements at steps {steps}"
    signals = ", ".join(analysis.signals) or "no signal"
    where = "" if run.path is None else f" · {run.path}"
    return f"{extent} · looked at: {signals} · false-alarm rate {analysis.alpha:g}{where}"


def _warnings(analysis: Analysis) -> Iterable[str]:
    if analysis.run.gaps:
        missing = sum(map(len, analysis.run.gaps))
        yield f"{missing} lines of the record are missing: not all that the run measured is here."
    if analysis.run.damaged:
        yield f"{len(analysis.run.damaged)} damaged lines of the record were skipped."


def _flagged(one: Transition) -> tuple[str, str, str]:
    extent = f"since {format_step(one.start)}" if one.under_way else format_span(one.start, one.end)
    return format_step(one.flagged_at or 0.0), extent, one.full_kind


def _described(name: str) -> tuple[str, str, str]:
    row = look_up(name)
    return name, row.title, row.unit


def _reasons(analysis: Analysis, name: str) -> str:
    counted = count_doubts(analysis.run, name)
    more = [f"and {len(counted) - MOST_REASONS} more"] if len(counted) > MOST_REASONS else []
    return "\n".join([f"{reason}: {count}" for reason, count in counted[:MOST_REASONS]] + more)


def _flat(entry: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """The leaves of nested settings, each under its dotted name."""
    if isinstance(entry, Mapping):
        inner = [(str(key), value) for key, value in entry.items()]
    elif isinstance(entry, list) and any(isinstance(value, Mapping) for value in entry):
        inner = [(str(k), value) for k, value in enumerate(entry)]
    else:
        yield name, _text(entry)
        return
    for key, value in inner:
        yield from _flat(value, f"{name}.{key}" if name else key)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
