"""Several runs side by side: what they share, and whether they were measured alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phasewatch.analysis import Analysis
from phasewatch.figures import comparison_figure
from phasewatch.figures.numbers import format_span, format_step
from phasewatch.report.html import ReportPaths
from phasewatch.report.markup import document, escape, picture, sentences, table
from phasewatch.report.table import LEFT, WIDTH, in_columns
from phasewatch.report.verdict import verdict
from phasewatch.transitions import AlignedTransition, align_transitions

NONE_FOUND = "No transitions were found in any of the runs."
COLUMNS = ("median step (range)", "runs", "kind")

Header = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Several runs, and which of their transitions are the same.

    Attributes:
        names: What the runs are called.
        analyses: What was found in each.
        aligned: Their transitions, those that are the same together.
        factor: By how much later the same transition may come in one run than in another.
    """

    names: tuple[str, ...]
    analyses: tuple[Analysis, ...]
    aligned: tuple[AlignedTransition, ...]
    factor: float

    @property
    def headline(self) -> str:
        """How much the runs share."""
        shared = sum(one.share == 1 for one in self.aligned)
        count, runs = len(self.aligned), len(self.names)
        if not self.aligned:
            return NONE_FOUND
        if not shared:
            return f"{count} transition{'' if count == 1 else 's'}, none of them in all {runs} runs"
        rest = f", {count - shared} in some of them" if count > shared else ""
        return f"{shared} transition{'' if shared == 1 else 's'} in all {runs} runs{rest}"

    @property
    def remarks(self) -> list[str]:
        """How the runs were not measured alike, and of each what could not be looked for and how it ended."""
        told = [
            f"Not measured alike, so that values of λ are not to be compared: {difference}"
            for difference in differences(self.names, [one.run.header for one in self.analyses])
        ]
        for name, analysis in zip(self.names, self.analyses, strict=True):
            told += [f"{name}: {said}" for said in (analysis.note, analysis.run.told_ending) if said]
        return told

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values that JSON can hold."""
        return {
            "headline": self.headline,
            "remarks": self.remarks,
            "factor": self.factor,
            "aligned": [
                {"step": one.step, "share": one.share, "kind": one.kind, "steps": _steps(one)} for one in self.aligned
            ],
            "runs": {
                name: {"verdict": verdict(analysis).to_dict(), **analysis.to_dict()}
                for name, analysis in zip(self.names, self.analyses, strict=True)
            },
        }


def compare_runs(names: Sequence[str], analyses: Sequence[Analysis], factor: float = 1.0) -> Comparison:
    """Match the transitions of several runs.

    Args:
        names: What the runs are called.
        analyses: Per run, what :func:`phasewatch.analyze_run` gave.
        factor: See :func:`phasewatch.align_transitions`.
    """
    aligned = align_transitions([analysis.transitions for analysis in analyses], factor)
    return Comparison(tuple(names), tuple(analyses), tuple(aligned), factor)


def differences(names: Sequence[str], headers: Sequence[Header]) -> list[str]:
    """In what the runs were not measured alike, as far as their records tell, one sentence for each."""
    told = []
    for what, read in _ASPECTS.items():
        known = {name: said for name, header in zip(names, headers, strict=True) if (said := read(header)) is not None}
        values = list(dict.fromkeys(known.values()))
        if len(values) > 1:
            groups = [f"{value} ({', '.join(name for name in known if known[name] == value)})" for value in values]
            told.append(f"{what}: {'; '.join(groups)}.")
    return told


def _probe(header: Header) -> str | None:
    probe = _first(header.get("monitors")).get("probe") or {}
    told = [f"{probe['samples']} samples"] if "samples" in probe else []
    told += [str(probe[name]) for name in ("source", "mode") if name in probe]
    return ", ".join(told) or None


def _network(header: Header) -> str | None:
    count = header.get("num_parameters")
    return None if count is None else f"{header.get('module', 'a network')} of {count:,} parameters"


def _setting(estimator: str, name: str) -> Callable[[Header], str | None]:
    def read(header: Header) -> str | None:
        settings = (_first(header.get("monitors")).get("estimators") or {}).get(estimator) or {}
        return str(settings[name]) if name in settings else None

    return read


def _first(monitors: Any) -> dict[str, Any]:
    return monitors[0] if isinstance(monitors, list) and monitors and isinstance(monitors[0], dict) else {}


_ASPECTS: dict[str, Callable[[Header], str | None]] = {
    "probe": _probe,
    "network, whose size makes the prior": _network,
    "resolutions of λ of the function": _setting("llc_behavioral", "resolutions"),
    "nats per unit of the loss": _setting("llc_behavioral", "nats_per_loss"),
    "prior of λ of the loss (localization)": _setting("llc", "localization"),
    "size of the training set": lambda header: None if header.get("n") is None else f"{header['n']:,}",
}
"""What has to be alike for values of λ to be compared, as the header of a record tells it."""


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The cells of the table: those of ``COLUMNS``, then the step in each run."""
    rows = []
    for one in comparison.aligned:
        low, high = one.spread
        spread = f" ({format_span(low, high)})" if low < high else ""
        steps = ["-" if step is None else format_step(step) for step in _steps(one)]
        found = sum(step is not None for step in _steps(one))
        rows.append((f"{format_step(one.step)}{spread}", f"{found} of {len(comparison.names)}", one.kind, *steps))
    return rows


def format_comparison(comparison: Comparison, width: int = WIDTH) -> str:
    """The aligned transitions as a table in plain text, one a row, with the step in each run where there is room.

    Args:
        comparison: The runs.
        width: Columns that it may take.
    """
    if not comparison.aligned:
        return NONE_FOUND
    columns, rows = [*COLUMNS, *comparison.names], comparison_rows(comparison)
    wide = in_columns(columns, rows, LEFT)
    if len(wide.splitlines()[1]) <= width:
        return wide
    return in_columns(COLUMNS, [row[: len(COLUMNS)] for row in rows], LEFT)


def write_comparison(comparison: Comparison, directory: str | os.PathLike[str]) -> ReportPaths:
    """Write ``phasewatch.png``, ``phasewatch.json`` and the self-contained ``phasewatch.html``.

    Args:
        comparison: The runs.
        directory: Where to; made if need be. Older reports there are replaced.

    Raises:
        OSError: If the directory cannot be written.
    """
    paths = ReportPaths.within(directory)
    figure = comparison_figure(comparison.names, comparison.analyses, comparison.aligned)
    paths.write(figure, comparison.to_dict(), lambda image: _page(comparison, image))
    return paths


def _page(comparison: Comparison, image: bytes) -> str:
    parts = [
        f'<p class="where">{escape(", ".join(comparison.names))}</p>',
        "".join(f'<p class="warning">{escape(remark)}</p>' for remark in comparison.remarks),
        picture(image, "The runs one above the other, their transitions joined"),
        "<h2>Transitions</h2>",
        table((*COLUMNS, *comparison.names), comparison_rows(comparison))
        if comparison.aligned
        else f"<p>{NONE_FOUND}</p>",
        f"<p>{escape(_joined(comparison.factor))}</p>",
    ]
    for name, analysis in zip(comparison.names, comparison.analyses, strict=True):
        parts += [f"<h2>{escape(name)}</h2>", sentences(verdict(analysis).sentences)]
    return document(comparison.headline, parts)


def _joined(factor: float) -> str:
    told = "Two transitions are joined where the 95 % intervals of their places overlap"
    return f"{told}." if factor == 1 else f"{told}, once the steps of one are multiplied by up to {factor:g}."


def _steps(one: AlignedTransition) -> list[float | None]:
    return [None if transition is None else transition.step for transition in one.transitions]
