"""What is lost when things go wrong: runs killed at random moments, records cut and flipped at every byte, odd input.

Kills: a small network is watched in a process that is killed (SIGKILL) at moments drawn over the whole run, and goes on
from its last checkpoint. Cuts and flips: a record of every kind of line, cut off before each of its bytes, and with one
bit of each byte turned. Readers: records, states of checkpoints, event files and tables, changed at random, many with
checksums that are right again; and changed under the guidance of coverage where atheris is installed.
The right answer is everywhere that of the same run without the trouble. Prints the table, writes
benchmarks/results/reliability.md, and ends with an error where a promise is broken.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuzzed import framed, look_at, made_anew, whole_inputs, with_checksum
from mutants import mutated
from records import measurement
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from phasewatch import Watch
from phasewatch.estimators import LearningCoefficient
from phasewatch.logs import read_table
from phasewatch.record import Change, Flag, Journal, RecordError, Run, Transition, load_run
from phasewatch.record.state import usable
from phasewatch.record.trace import pack
from phasewatch.tensorboard import read_scalars

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "reliability.md"
SEED = 22
STEPS = 20
JUMP = 10
NAMED = "loss falls"
"""The kind of the transition of the small run."""
PARTS = ("kills", "cuts", "readers", "guided")
Row = tuple[str, str, str, str]
Places = list[tuple[int, int]]


# --- runs that are killed


def small_run(directory: Path, tell: Callable[[int], object] = lambda step: None) -> Watch:
    """Watch a small network, from the last checkpoint if there is one; the loss jumps at one step."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 3)
    targets = inputs.sum(dim=1, keepdim=True)
    weights = 1 + 0.01 * torch.randn(STEPS, 3) + 0.9 * (torch.arange(STEPS) < JUMP).float().unsqueeze(1)
    module = nn.Linear(3, 1, bias=False)

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (module(batch[0]) - batch[1]).square().mean()

    watch = Watch(
        module,
        [(inputs, targets)],
        loss_fn=loss_fn,
        estimators=(LearningCoefficient(chains=2, draws=6, burn_in=20),),
        schedule=1,
        directory=directory,
        on_error="raise",
    )
    checkpoint = directory / "checkpoint.json"
    first = 0
    if checkpoint.exists():
        first, state = json.loads(checkpoint.read_text())
        watch.load_state_dict(state)
    for step in range(first, STEPS):
        module.weight.data.copy_(weights[step])
        watch.at(step)
        tell(step)
        unfinished = checkpoint.with_suffix(".unfinished")
        unfinished.write_text(json.dumps([step + 1, watch.state_dict()]))
        unfinished.replace(checkpoint)
    watch.close()
    return watch


def in_a_process(directory: Path, kill_after: float | None = None) -> tuple[list[int], float]:
    """The steps whose measurement was told before the process ended or was killed, and the seconds that it took."""
    reading, writing = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            small_run(directory, lambda step: os.write(writing, bytes([step])))
        finally:
            os._exit(0)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    told = b""
    while more := os.read(reading, 64):
        told += more
    os.close(reading)
    os.waitpid(child, 0)
    return list(told), time.perf_counter() - began


def what_was_found(run: Run) -> tuple[Any, ...]:
    """All that must be the same to the last bit: what was measured, without how long it took, and what was flagged."""
    measured = [(m.step, {k: v for k, v in m.estimates.items() if k != "overhead"}) for m in run.measurements]
    flags = [flag.to_dict() for flag in run.flags]
    for flag in flags:  # a transition in which the run was resumed is named after that
        flag["transition"]["kind"] = NAMED if flag["transition"]["kind"] == "resumed" else flag["transition"]["kind"]
    return measured, flags, run.finished, run.gaps, run.damaged


def kills(count: int, rng: random.Random) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as place:
        _, seconds = in_a_process(Path(place))
        whole = what_was_found(load_run(place))
    assert whole[1] and whole[2], "the run without trouble flags its transition and comes to its end"
    lost = in_progress = damaged = equal = named = 0
    for number in range(count):
        if number % 10 == 0:
            print(f"{number} of {count} kills", file=sys.stderr)
        with tempfile.TemporaryDirectory() as place:
            told, _ = in_a_process(Path(place), rng.uniform(0, seconds))
            found = _loaded(Path(place))
            recorded = [] if found is None else [m.step for m in found.measurements]
            lost += len(set(told) - set(recorded))
            in_progress += len(recorded) < STEPS
            damaged += 0 if found is None else len(found.damaged)
            if not (Path(place) / "checkpoint.json").exists():  # it begins anew, as one would, in a place of its own
                place = str(Path(place) / "anew")
                os.mkdir(place)
            in_a_process(Path(place))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a line torn by the kill is told of
                resumed = load_run(place)
            named += any(flag.transition.kind == "resumed" for flag in resumed.flags)
            equal += what_was_found(resumed)[:3] == whole[:3]
    yield (
        "`kill -9` at a random moment of a run loses at most the measurement in progress",
        "`tests/record/test_journal.py::test_sixty_kills_lose_no_measurement`",
        f"{count} kills, {in_progress} of them before the last measurement",
        f"{lost} finished measurements lost, {damaged} lines torn",
    )
    yield (
        "resumed from its last checkpoint, it measures and flags what the run that was never stopped does, to the bit",
        "`tests/test_resuming.py`, `tests/callbacks/test_resume.py`",
        f"{count} resumed runs",
        f"{count - equal} differ; {named} call the transition in which they were resumed by that",
    )
    _broken.extend(["a kill lost a measurement"] * bool(lost) + ["a resumed run differs"] * (equal < count))


def _loaded(place: Path) -> Run | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_run(place)
    except (FileNotFoundError, RecordError):  # killed before the first line
        return None


# --- records that are cut off and flipped


def record_of_every_kind(directory: Path) -> Path:
    journal = Journal(directory)
    labels = {"kind": "class", "values": [0, 1]}
    journal.append("header", {"schema_version": 2, "n": 100, "created": 1.75e9, "signals": [], "labels": labels})
    journal.append("plan", {"left_out": ["zeros"], "chains_in_each": 2})
    for step in range(6):
        journal.append("measurement", measurement(10 * step).to_dict() | {"sample_losses": [0.1 * step, 0.2]})
    journal.append("observed", pack({"loss": (list(range(30)), [1.0] * 30)}))
    change = Change(1.0, 2.0, 1.0, 0.1, (0.8, 1.2), 10.0)
    transition = Transition(10.0, 20.0, 15.0, (12.0, 18.0), "A", {"loss": change}, 9.0, 0.01)
    journal.append("transition", Flag(0, "flagged", transition, 50).to_dict())
    journal.append("failure", {"step": 3, "what": "llc", "error": "E: x", "traceback": "", "time": 1e9})
    journal.append("end", {"time": 1e9, "how": "finished", "error": ""})
    journal.close()
    assert journal.path is not None
    return journal.path


def lines_at(content: bytes) -> Places:
    """Where each line begins and ends, its newline left out."""
    places, begin = [], 0
    for line in content.splitlines(keepends=True):
        places.append((begin, begin + len(line) - 1))
        begin += len(line)
    return places


def cuts_and_flips(rng: random.Random) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as place:
        file = record_of_every_kind(Path(place))
        whole, content = load_run(file), file.read_bytes()
        places = lines_at(content)
        ends = [last for _, last in places[2 : 2 + len(whole.measurements)]]

        lost = changed = silent = 0
        for end in range(len(content)):
            made_anew(file, content[:end])
            found = _loaded(file)
            kept = () if found is None else found.measurements
            lost += len([m for m, last in zip(whole.measurements, ends, strict=True) if last <= end and m not in kept])
            changed += len([m for m in kept if m not in whole.measurements])
            silent += found is not None and found.finished and end < places[-1][1]
        yield (
            "a record that is cut off holds every line before the cut, and none is changed",
            "`tests/record/test_reading.py::test_a_torn_last_line_is_skipped_and_later_lines_are_whole`",
            f"cut before each of {len(content):,} bytes",
            f"{lost} whole lines lost, {changed} values changed, {silent} taken for finished",
        )
        _broken.extend(["a cut"] * bool(lost or changed or silent))

        changed = silent = 0
        most: list[int] = []
        for at in range(len(content)):
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.randrange(8)
            made_anew(file, bytes(flipped))
            found = _loaded(file)
            kept = () if found is None else found.measurements
            most.append(len(whole.measurements) - len(kept))
            changed += len([m for m in kept if m not in whole.measurements])
            silent += found is not None and found.finished
        two = most.count(2)
        yield (
            "a flipped bit costs the line that it is in (where it was the end of a line, two), and changes no value",
            "`tests/record/test_reading.py::test_no_flipped_bit_changes_a_value_or_mixes_two_runs`",
            f"a bit of each of {len(content):,} bytes",
            f"at most {max(most)} measurements lost ({two} times 2), {changed} values changed, {silent} unnoticed",
        )
        newlines = len([1 for _, last in places if content[last : last + 1] == b"\n"])
        _broken.extend(["a flip"] * bool(changed or silent or max(most) > 2 or two > newlines))


# --- readers of odd input


def odd_records(count: int, rng: random.Random, place: Path) -> tuple[int, int]:
    """How many were read, and how many of these were told to be damaged."""
    file = record_of_every_kind(place)
    content = file.read_bytes()
    given = []
    for text in content.decode().splitlines():
        line = json.loads(text)
        given.append({name: value for name, value in line.items() if name != "crc32"})
    read = damaged = 0
    for number in range(count):
        if number % 2:
            made_anew(file, scrambled(content, rng))
        else:
            lines = list(given)
            which = rng.randrange(len(lines))
            lines[which] = mutated(lines[which], rng)
            texts = [json.dumps(line, separators=(",", ":")).encode() for line in lines]
            made_anew(file, b"".join(map(with_checksum, texts)))
        try:
            run = load_run(file)
        except RecordError:
            continue
        look_at(run)
        read += 1
        damaged += bool(run.damaged or run.gaps)
    return read, damaged


def scrambled(content: bytes, rng: random.Random) -> bytes:
    """Bytes turned, left out, repeated, put elsewhere or made up."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 16, 200))
        piece = bytes(changed[at : at + length])
        match rng.randrange(5):
            case 0:
                changed[at : at + length] = bytes(byte ^ 1 << rng.randrange(8) for byte in piece)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = piece
            case 3:
                del changed[at : at + length]
                other = rng.randrange(len(changed) + 1)
                changed[other:other] = piece
            case _:
                changed[at:at] = rng.randbytes(length)
    return bytes(changed)


def odd_states(count: int, rng: random.Random, place: Path) -> tuple[int, int]:
    whole = json.loads((place / "checkpoint.json").read_text())[1]
    told = 0
    for _ in range(count):
        kept, wrong = usable(mutated(whole, rng))
        told += bool(wrong)
        assert all(isinstance(text, str) for text in wrong) and kept.keys() <= whole.keys()
    return count, told


def odd_event_files(count: int, rng: random.Random, place: Path) -> tuple[int, int]:
    with SummaryWriter(str(place)) as writer:
        for step in range(10):
            writer.add_scalar("loss", 0.5 * step, step)
        writer.add_text("note", "a text")
        writer.add_histogram("weights", torch.arange(9.0))
    file = next(place.glob("*tfevents*"))
    content = file.read_bytes()
    events, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        events.append(content[at + 12 : at + 12 + length])
        at += length + 16
    told = 0
    for number in range(count):
        if number % 2:
            made_anew(file, scrambled(content, rng))
        else:
            odd = list(events)
            which = rng.randrange(len(odd))
            odd[which] = scrambled(odd[which], rng)
            made_anew(file, b"".join(map(framed, odd)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_scalars(file)
        told += bool(caught)
    return count, told


def odd_tables(count: int, rng: random.Random, place: Path) -> tuple[int, int]:
    rows = [{"step": step, "loss": 1.0 / (step + 1), "note": "x"} for step in range(12)]
    as_csv = "step,loss,note\n" + "".join(f"{row['step']},{row['loss']},x\n" for row in rows)
    as_json = "".join(json.dumps(row) + "\n" for row in rows)
    read = refused = 0
    for number in range(count):
        name, text = (("log.csv", as_csv), ("log.jsonl", as_json))[number % 2]
        made_anew(place / name, scrambled(text.encode(), rng))
        try:
            read_table(place / name)
            read += 1
        except RecordError:
            refused += 1
    return read, refused


def readers(scale: float, rng: random.Random) -> Iterator[Row]:
    kinds: list[tuple[str, Callable[[int, random.Random, Path], tuple[int, int]], int, str, str]] = [
        ("records", odd_records, 30_000, "tests/record/test_bodies.py", "read, {} of them told to be damaged"),
        ("states in checkpoints", odd_states, 50_000, "tests/record/test_record_states.py", "looked at, {} told of"),
        (
            "event files",
            odd_event_files,
            10_000,
            "tests/tensorboard/test_damaged_event_files.py",
            "read, {} not to the end",
        ),
        ("tables", odd_tables, 4_000, "tests/test_logs.py", "read, {} refused"),
    ]
    for what, read, wanted, test, told in kinds:
        count = max(10, round(scale * wanted))
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if read is odd_states:
                small_run(Path(place))
            began = time.perf_counter()
            found, other = read(count, rng, Path(place))
        print(f"{what}: {count} in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        yield (
            f"{what} changed at random raise phasewatch's own error or none",
            f"`{test}`",
            f"{count:,} inputs",
            f"0 other errors; {found:,} {told.format(f'{other:,}')}",
        )


# --- readers of input that coverage has led to


def guided(count: int) -> Iterator[Row]:
    promise = "whatever is read, changed under the guidance of coverage, raises phasewatch's own error or none"
    test = "`tests/test_fuzzed.py`"
    if importlib.util.find_spec("atheris") is None:
        yield promise, test, "nothing", "atheris is not installed: it is for Linux on x86-64, and Python from 3.11"
        return
    kept = Path(tempfile.gettempdir()) / "phasewatch-"
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, str(HERE / "guided.py"), f"--runs={count}", f"--seed={SEED}"]
        command += ["--place", place, "--keep", str(kept)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    print(f"guided: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    tried = [int(number) for number in re.findall(r"^#(\d+)\s", done.stderr, re.MULTILINE)]
    branches = [int(number) for number in re.findall(r"^#\d+\s.* cov: (\d+) ", done.stderr, re.MULTILINE)]
    errors = int(done.returncode != 0)
    if errors:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        _broken.append(f"an error of a reader that is not phasewatch's own; the input is {kept}*")
    yield (
        promise,
        test,
        f"{max(tried, default=0):,} inputs, made of {len(whole_inputs())} whole files",
        f"{errors} other errors; {min(branches, default=0)} branches of the readers reached by the whole files, "
        f"{max(branches, default=0)} in the end",
    )


_broken: list[str] = []


def written() -> dict[str, Row]:
    """The rows of the results by their promises."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    return {promise: (promise, *rest) for promise, *rest in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the odd inputs that are read")
    parser.add_argument("--guided", type=int, default=100_000, help="inputs under the guidance of coverage")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="try these parts anew, keep the others' rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = written() if arguments.only else {}
    parts = (
        kills(arguments.kills, random.Random(SEED)),
        cuts_and_flips(random.Random(SEED)),
        readers(arguments.scale, random.Random(SEED)),
        guided(arguments.guided),
    )
    for name, part in zip(PARTS, parts, strict=True):
        for row in part if name in (arguments.only or PARTS) else ():
            print(" | ".join(row), flush=True)
            rows[row[0]] = row
    heading = ("promise", "test", "tried", "found"), ("---",) * 4
    table = "\n".join(f"| {' | '.join(row)} |" for row in [*heading, *rows.values()])
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}"
    text = f"# What is lost when things go wrong\n\nMade by `make reliability`, seed {SEED}. {versions}.\n\n{table}\n"
    arguments.output.write_text(text, encoding="utf-8")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    for what in _broken:
        print(f"broken: {what}", file=sys.stderr)
    return bool(_broken)


if __name__ == "__main__":
    sys.exit(main())
