"""What phasewatch reads, fuzzed under the guidance of coverage: what reaches new code is kept and changed again.

By atheris (libFuzzer), which counts the branches of phasewatch's readers; `make reliability` runs it. It begins with a
whole file of each kind (`tests/fuzzed.py`). An error other than phasewatch's own ends the run, and so does an input
that takes longer than a minute or more than 2 GB; that input is kept, and `guided.py FILE` reads it again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
from mutants import HOSTILE

SLOWEST = 60
"""Seconds that an input may take. Chosen: some of them take a few milliseconds."""
LONGEST = 64
"""Bytes that libFuzzer lets a word of its dictionary have (`Word` in FuzzerDictionary.h)."""
READERS = ("phasewatch.record", "phasewatch.tensorboard", "phasewatch.logs", "phasewatch.transitions.live")
"""Whose branches are counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="read these, which a run has kept, and no others")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=22)
    parser.add_argument("--place", type=Path, help="an empty directory for the files; default a temporary one")
    parser.add_argument("--keep", default="", help="what the path of an input that is kept begins with")
    arguments = parser.parse_args()
    with atheris.instrument_imports(include=list(READERS)):
        import fuzzed
    place = arguments.place or Path(tempfile.mkdtemp())
    for name in ("inputs", "files"):
        (place / name).mkdir()
    for number, whole in enumerate(fuzzed.whole_inputs()):
        (place / "inputs" / str(number)).write_bytes(whole)
    words = [word for word in (json.dumps(value).encode() for value in HOSTILE) if len(word) <= LONGEST]
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in words)
    (place / "words").write_text("".join(f'"{word}"\n' for word in escaped))
    options = {
        "runs": arguments.runs,
        "seed": arguments.seed,
        "keep_seed": 1,  # the whole files too whose readers share their branches with those of others
        "dict": place / "words",
        "timeout": SLOWEST,
        "artifact_prefix": arguments.keep,
    }
    warnings.simplefilter("ignore")
    given = arguments.inputs or [str(place / "inputs")]
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *given, *flags], lambda data: fuzzed.read(data, place / "files"))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
