"""What phasewatch reads, fuzzed under the guidance of coverage: inputs that reach new code are kept and changed further.

By atheris (libFuzzer), which counts the branches of phasewatch's readers. The first byte of an input says which reader it
is for and whether its checksums are made right again. Any error other than phasewatch's own ends the run, and the input
is kept.
`python benchmarks/guided.py CORPUS -runs=100000 -seed=22`; CORPUS is a directory, first filled
with whole files.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["phasewatch.record", "phasewatch.tensorboard", "phasewatch.logs"]):
    from phasewatch.logs import read_table
    from phasewatch.record import RecordError, load_run
    from phasewatch.record.state import usable
    from phasewatch.tensorboard import read_scalars

from reliability import framed, record_of_every_kind, with_checksum

PLACE = Path(tempfile.mkdtemp())


def line_with_checksum(line: bytes) -> bytes:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        return line + b"\n"
    given = {k: v for k, v in given.items() if k != "crc32"} if isinstance(given, dict) else given
    return with_checksum(given) if isinstance(given, dict) else line + b"\n"


def read(data: bytes) -> None:
    which, content = data[:1], data[1:]
    file = PLACE / {b"c": "log.csv", b"j": "log.jsonl", b"e": "events.out.tfevents.1"}.get(which, "run.jsonl")
    if which == b"s":
        try:
            state = json.loads(content)
        except (ValueError, RecursionError):
            return
        usable(state) if isinstance(state, dict) else None
        return
    if which == b"r":
        content = b"".join(map(line_with_checksum, content.splitlines()))
    if which == b"e":
        content = b"".join(map(framed, content.split(b"\xff\xfe\xfd")))
    file.write_bytes(content)
    try:
        if which in (b"c", b"j"):
            read_table(file)
        elif which == b"e":
            read_scalars(file)
        else:
            run = load_run(file)
            run.rows(), run.observed, repr(run), run.told_ending
    except RecordError:
        pass


def fill(corpus: Path) -> None:
    corpus.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        whole = record_of_every_kind(Path(place)).read_bytes()
    (corpus / "record").write_bytes(b"r" + whole)
    (corpus / "raw").write_bytes(b"w" + whole)
    (corpus / "csv").write_bytes(b"cstep,loss,note\n0,1.0,x\n1,0.5,x\n")
    (corpus / "json").write_bytes(b'j{"step":0,"loss":1.0}\n{"step":1,"loss":0.5}\n')
    scalar = b"\x09\x00\x00\x00\x00\x00\x00\xf0?\x10\x01*\x0d\x0a\x0b\x0a\x04loss\x15\x00\x00\x80?"
    (corpus / "events").write_bytes(b"e" + scalar + b"\xff\xfe\xfd" + scalar)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    fill(Path(sys.argv[1]))
    atheris.Setup([*sys.argv, "-max_len=20000"], read)
    atheris.Fuzz()
