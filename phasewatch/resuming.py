"""Going on with the record of a run that was cut off."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phasewatch.record import Journal, RecordError
from phasewatch.record.lines import Kind
from phasewatch.record.position import History, Position, find_history
from phasewatch.record.state import IN_CHECKPOINTS

HISTORY: tuple[Kind, ...] = (*IN_CHECKPOINTS, "observed")
"""The lines of a record that tell what happened in the run, and not how that was written."""


def taken_up(
    journal: Journal, header: Mapping[str, Any], state: Mapping[str, Any], places: Sequence[Path]
) -> tuple[Journal, list[tuple[Kind, dict[str, Any]]], list[str]]:
    """Go on with the record that a state is of, or begin one with what is left of it.

    Args:
        journal: Of this process, with nothing in it yet.
        header: Its first line.
        state: What :meth:`phasewatch.Watch.state_dict` returned.
        places: Directories in which the record may lie, beside that of ``journal``.

    Returns:
        The record to go on in, what is to be written to it first, and what has to be said of what is lost.
    """
    position = Position.from_dict(state["record"]) if state["record"] else None
    own = [] if journal.directory is None else [journal.directory]
    history = History(None, [], 0) if position is None else find_history(position, [*own, *places])
    said = _told_loss(position, history) if position and history.missing else []
    if state["start"] is not None:
        said.append(
            f"The state of step {state['start']} was kept to be measured later, which was not done by the time of "
            "the checkpoint, and a checkpoint does not hold it: that step stays without a measurement."
        )
    reopened = None
    if position and history.path is not None and history.path.parent in own:
        try:
            reopened = Journal.reopen(history.path, position.run_id, position.sequence)
        except (RecordError, OSError) as error:
            said.append(f"{error} This run goes on in a record of its own beside that one.")
    at = {"step": state["last_taken"] + 1, "time": time.time()}
    told: list[tuple[Kind, dict[str, Any]]]
    if reopened is not None and position is not None:
        journal = reopened
        told = [("resume", {**at, "after": position.sequence})]
    else:
        continues = {"run_id": state["run_id"], "sequence": position.sequence if position else None}
        told = [("header", {**header, "continues": continues})]
        told += [(line.kind, line.body) for line in history.lines if line.kind in HISTORY]
    told += [(kind, body) for kind, body in state["lines"]]
    told += [("failure", {**at, "what": "resuming", "error": text, "traceback": ""}) for text in said]
    return journal, told, said


def _told_loss(position: Position, history: History) -> list[str]:
    """What is said where a record is not whole any more."""
    if history.path is None:
        what = (
            f"The record of the run so far, {position.path} (run {position.run_id}), is not there any more, nor beside "
            "the checkpoint or in the directory of this run: what was measured until then is missing from the new "
            "record, and the detector starts anew."
        )
    else:
        what = (
            f"{history.path} lacks {history.missing} of the {position.sequence + 1} lines that the run had written by "
            "the time of the checkpoint: this run goes on with what is left, and so does the detector."
        )
    return [f"{what} To mend it, put the whole record back and resume from the checkpoint once more."]
