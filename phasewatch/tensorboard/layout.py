"""Our page of custom scalars: which charts, and in which run it may stand beside a page of the user's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG

from phasewatch.record import Signal
from phasewatch.record.signals import groups
from phasewatch.tags import STAGE, STAGE_OF_WHOLE_RUN, UNRELIABLE, tag
from phasewatch.tensorboard.events import DamagedError, event_files, events

CATEGORY = "phasewatch"
Chart = list[str | list[str]]


def charts(names: Collection[str]) -> dict[str, Chart]:
    """Title and content of the charts that show what was measured, in the order of the catalogue.

    What a chart holds depends on nothing but its title: of several runs TensorBoard then shows each once.

    Args:
        names: The signals that were measured.
    """
    found: dict[str, Chart] = {}
    for group, rows in groups().items():
        if any(row.name in names for row in rows):
            found.update(_of_group(group, rows, names))
            found.setdefault("stage", ["Multiline", [f"^{re.escape(name)}$" for name in (STAGE, STAGE_OF_WHOLE_RUN)]])
    return found


def _of_group(group: str, rows: Sequence[Signal], names: Collection[str]) -> Iterator[tuple[str, Chart]]:
    """One chart of lines for a group, and one for each of its signals that has bounds.

    A chart of bands holds one signal, and comes after all charts of lines wherever it stands.
    """
    measured = [row.bounds is not None and row.bounds[0] in names for row in rows]
    if not all(measured):
        yield group, ["Multiline", [_pattern(row.name) for row in rows]]
    for row in (row for row in rows if row.bounds is not None and row.name in names):
        lower, upper = row.bounds or ("", "")
        if lower in names:
            # the value may be unknown where its bounds are not, and a chart of bands wants all three
            yield f"{row.title} (bounds)", ["Multiline", [_pattern(name) for name in (row.name, lower, upper)]]
        else:
            yield f"{row.title} (95 % band)", ["Margin", [tag(name) for name in (row.name, lower, upper)]]


def _pattern(name: str) -> str:
    """A regular expression for the tags of a signal, as charts of lines want it."""
    return f"^{re.escape(tag(name))}({UNRELIABLE})?$"


def holds_another(directory: Path) -> bool:
    """Whether a run has a page of custom scalars that is not ours, which one of ours would replace."""
    for file in event_files(directory):
        if CONFIG_SUMMARY_TAG.encode() not in file.read_bytes():
            continue
        try:
            pages = [
                Layout.FromString(value.tensor.string_val[0])
                for event in events(file)
                for value in event.summary.value
                if value.tag == CONFIG_SUMMARY_TAG
            ]
        except (DamagedError, DecodeError, IndexError):  # a page that is none or lacking: so it may be the user's
            return True
        if any(category.title != CATEGORY for page in pages for category in page.category):
            return True
    return False
