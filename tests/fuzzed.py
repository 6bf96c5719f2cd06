"""What a fuzzer makes, given to the reader that it is for: of an input the first byte says which, the rest is its file.

Used by ``benchmarks/guided.py`` and ``benchmarks/reliability.py``.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch import nn
from torch.utils.tensorboard import summary

from phasewatch import Watch
from phasewatch.logs import Scalars, own_names, read_table, run_of_scalars
from phasewatch.record import Change, Estimate, Flag, Histogram, Measurement, RecordError, Run, Transition, load_run
from phasewatch.record.lines import Kind, Line
from phasewatch.record.state import IN_CHECKPOINTS, usable
from phasewatch.record.trace import pack
from phasewatch.tensorboard import read_scalars
from phasewatch.tensorboard.layout import CATEGORY, holds_another
from phasewatch.transitions import LiveDetector

BETWEEN_EVENTS = b"\xff\xfe\xfd"
"""What parts the events of an input whose lengths and checksums are made here: three bytes that are in no text."""


# --- files


def made_anew(file: Path, content: bytes) -> Path:
    """A file with this content; not written over, which on ext4 waits for the disk (1.6 ms instead of 0.03)."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    return file


def with_checksum(line: bytes) -> bytes:
    """A line of a record, made of a JSON object without a checksum or of anything else."""
    line = line if line.startswith(b"{") else b"{" + line
    return b'{"crc32":"%08x",%b\n' % (zlib.crc32(line), line[1:])


def framed(event: bytes) -> bytes:
    """An event as it stands in a file of TensorBoard: its length and a checksum of that, itself and a checksum."""
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", masked_crc32c(length)) + event + struct.pack("<I", masked_crc32c(event))


# --- readers


def look_at(run: Run) -> None:
    """Ask a run for what it reads when it is asked."""
    assert run.rows() is not None and run.observed is not None and repr(run) and run.told_ending is not None
    for transition in run.transitions:
        run.moved(transition)


def _record(content: bytes, place: Path) -> None:
    look_at(load_run(made_anew(place / "phasewatch.jsonl", content)))


def _checked_record(content: bytes, place: Path) -> None:
    _record(b"".join(map(with_checksum, content.split(b"\n"))), place)


def _state(content: bytes, place: Path) -> None:
    try:
        state = json.loads(content)
    except (ValueError, RecursionError):  # reading the checkpoint is not our doing
        return
    kept, _ = usable(state)
    bodies: dict[str, list[Any]] = {kind: [] for kind in IN_CHECKPOINTS}
    for kind, body in kept.get("lines", ()):
        bodies[kind].append(body)
    for body in bodies["measurement"]:
        Measurement.from_dict(body)
    flags = [Flag.from_dict(body) for body in bodies["transition"]]
    if kept.get("detector") is not None:
        with suppress(ValueError):  # as it is to be told
            LiveDetector().load_state_dict(kept["detector"], (), flags)


def _events(content: bytes, place: Path) -> None:
    file = made_anew(place / "events.out.tfevents.1", content)
    holds_another(place)
    _look_at_scalars(read_scalars(file))


def _framed_events(content: bytes, place: Path) -> None:
    _events(b"".join(map(framed, content.split(BETWEEN_EVENTS))), place)


def _table(name: str) -> Callable[[bytes, Path], None]:
    return lambda content, place: _look_at_scalars(read_table(made_anew(place / name, content)))


def _look_at_scalars(scalars: Scalars) -> None:
    assert all((steps[1:] > steps[:-1]).all() for steps, _ in scalars.values())
    named = own_names(scalars)
    look_at(run_of_scalars(named, list(named), "an input"))


READERS: dict[str, Callable[[bytes, Path], None]] = {
    "record": _record,
    "record with right checksums": _checked_record,
    "state": _state,
    "event file": _events,
    "event file with right checksums": _framed_events,
    "CSV": _table("log.csv"),
    "compressed CSV": _table("log.csv.gz"),
    "JSONL": _table("log.jsonl"),
}
"""By the kind of the file, in the order of the first byte of an input, modulo their number."""


def read(data: bytes, place: Path) -> None:
    """Give an input to its reader.

    Args:
        data: The input.
        place: A directory for the file that is read.

    Raises:
        Exception: Any but phasewatch's own, if the reader raises it.
    """
    if data:
        with suppress(RecordError):
            [*READERS.values()][data[0] % len(READERS)](data[1:], place)


# --- whole files, for the fuzzer to begin with


def whole_inputs() -> list[bytes]:
    """One input for each kind of file, nothing of which is damaged; always the same."""
    lines = [line.encoded() for line in _lines()]
    unchecked = [b"{" + line[len('{"crc32":"00000000",') : -1] for line in lines]
    csv = b"step,loss,note\n0,1.0,x\n1,0.5,x\n"
    files = {
        "record": b"".join(lines),
        "record with right checksums": b"\n".join(unchecked),
        "state": json.dumps(_whole_state(), separators=(",", ":")).encode(),
        "event file": b"".join(map(framed, _whole_events())),
        "event file with right checksums": BETWEEN_EVENTS.join(_whole_events()),
        "CSV": csv,
        "compressed CSV": gzip.compress(csv, mtime=0),
        "JSONL": b'{"step":0,"loss":1.0}\n{"step":1,"loss":0.5}',
    }
    return [bytes([number]) + files[kind] for number, kind in enumerate(READERS)]


def _lines() -> list[Line]:
    """Of every kind."""
    change = Change(1.0, 2.0, 1.0, 0.1, (0.8, 1.2), 10.0)
    transition = Transition(10.0, 20.0, 15.0, (12.0, 18.0), "A", {"loss": change}, 9.0, 0.01)
    estimates = {"loss": Estimate(1.0), "llc": Estimate(1.5, 0.1, ("too few draws",), ("a note",))}
    measured = [
        Measurement(step, estimates, {"hessian_eigenvalues": Histogram([0.0, 1.0], [3.0, 4.0])}, 0.5, 1e9, (0.1, 0.2))
        for step in (10, 20)
    ]
    labels = {"kind": "class", "values": [0, 1]}
    told: list[tuple[Kind, dict[str, Any]]] = [
        ("header", {"schema_version": 2, "n": 100, "created": 1.75e9, "signals": [], "labels": labels}),
        ("plan", {"left_out": ["zeros"], "chains_in_each": 2}),
        *(("measurement", one.to_dict()) for one in measured),
        ("observed", pack({"loss": (list(range(30)), [1.0] * 30)})),
        ("transition", Flag(0, "flagged", transition, 20).to_dict()),
        ("failure", {"step": 3, "what": "llc", "error": "E: x", "traceback": "", "time": 1e9}),
        ("resume", {"step": 21, "time": 1e9, "after": 6}),
        ("end", {"time": 1e9, "how": "finished", "error": ""}),
    ]
    return [Line.written("a", sequence, kind, body) for sequence, (kind, body) in enumerate(told)]


def _whole_state() -> dict[str, Any]:
    """Of a watch that has measured in memory, and is told to have found a transition."""
    batch = torch.ones(2, 1), torch.ones(2, 1)
    watch = Watch(nn.Linear(1, 1), [batch], loss_fn=lambda module, batch: module(batch[0]).mean(), estimators=())
    held = [(line.kind, line.body) for line in _lines() if line.kind in IN_CHECKPOINTS]
    transition = next(body["transition"] for kind, body in held if kind == "transition")
    state = watch.state_dict()
    state["detector"] |= {"known": [transition], "suspected": [[transition]], "missed": [[0, 1]], "looked_until": 20.0}
    return {**state, "run_id": "a", "lines": held, "prices": {"llc": 0.5}}


def _whole_events() -> list[bytes]:
    """Scalars of both forms, and what is none."""
    summaries = [
        summary.scalar("loss", 0.5),
        summary.scalar("accuracy", 0.5, new_style=True),
        summary.text("note", "a text"),
        summary.histogram("weights", torch.arange(3.0).numpy(), "auto"),
        summary.custom_scalars({CATEGORY: {"loss": ["Multiline", ["loss"]]}}),
    ]
    return [Event(step=3, wall_time=1.0, summary=one).SerializeToString() for one in summaries]
