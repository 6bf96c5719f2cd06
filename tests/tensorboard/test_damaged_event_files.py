"""Event files that are torn, flipped, hostile or none: said, and never anything but our own error."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch.utils.tensorboard import SummaryWriter

from phasewatch.cli import main
from phasewatch.logs import run_of_scalars
from phasewatch.record import RecordError
from phasewatch.tensorboard import find_event_files, read_scalars
from phasewatch.tensorboard.layout import holds_another


def event_file(directory: Path, tag: str = "loss", points: int = 20) -> Path:
    with SummaryWriter(str(directory)) as writer:
        for step in range(points):
            writer.add_scalar(tag, 0.5 * step, step)
    return next(directory.iterdir())


def record(data: bytes) -> bytes:
    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def test_a_flip_anywhere_and_a_cut_anywhere_is_said_and_what_is_before_it_is_kept(tmp_path: Path) -> None:
    file = event_file(tmp_path)
    content = file.read_bytes()
    _, whole = read_scalars(file)["loss"]
    rng = random.Random(0)
    for _ in range(150):
        at = rng.randrange(len(content))
        cut = rng.random() < 0.5
        flipped = bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        file.write_bytes(content[:at] if cut else content[:at] + flipped)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = read_scalars(file).get("loss", (None, np.array([])))[1]
        assert found.tolist() == whole[: len(found)].tolist()
        if told:
            assert "not to its end" in str(told[0].message)
        else:  # a cut between two events cannot be seen
            assert cut


def test_events_that_are_whole_and_none(tmp_path: Path) -> None:
    file = event_file(tmp_path)
    file.write_bytes(file.read_bytes() + record(b"\xff\xff\xff"))
    with pytest.warns(UserWarning, match="up to its event 21 and not to its end: .*cannot be decoded"):
        assert len(read_scalars(file)["loss"][0]) == 20


def test_a_length_beyond_the_file_is_not_read(tmp_path: Path) -> None:
    file = event_file(tmp_path)
    header = struct.pack("<Q", 2**62)
    file.write_bytes(file.read_bytes() + header + struct.pack("<I", masked_crc32c(header)) + bytes(8))
    with pytest.warns(UserWarning, match="ends within an event"):
        assert len(read_scalars(file)["loss"][0]) == 20


@pytest.mark.parametrize("sizes", [[2**28], [2**14, 2**14], [-1], [0]])
def test_tensors_that_say_they_are_large_are_no_scalars(sizes: list[int], tmp_path: Path) -> None:
    file = event_file(tmp_path)
    event = Event(step=3, wall_time=1.0)
    value = event.summary.value.add(tag="hostile")
    value.metadata.plugin_data.plugin_name = "scalars"
    value.tensor.dtype = 1
    value.tensor.float_val.append(1.0)
    for size in sizes:
        value.tensor.tensor_shape.dim.add(size=size)
    file.write_bytes(file.read_bytes() + record(event.SerializeToString()))
    tracemalloc.start()
    assert [*read_scalars(file)] == ["loss"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("pages", [[], [b"\xff\xff"]], ids=["none", "one that cannot be decoded"])
def test_a_page_that_cannot_be_read_is_left_as_it_is(pages: list[bytes], tmp_path: Path) -> None:
    file = event_file(tmp_path)
    assert not holds_another(tmp_path)
    event = Event(step=0, wall_time=1.0)
    value = event.summary.value.add(tag=CONFIG_SUMMARY_TAG)
    value.tensor.string_val.extend(pages)
    file.write_bytes(file.read_bytes() + record(event.SerializeToString()))
    assert holds_another(tmp_path)


def test_a_pipe_is_no_event_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events.out.tfevents.1")
    with pytest.raises(FileNotFoundError, match="no TensorBoard event file"):
        find_event_files(tmp_path)
    event_file(tmp_path / "run")
    os.mkfifo(tmp_path / "run" / "events.out.tfevents.0")
    assert len(read_scalars(tmp_path / "run")["loss"][0]) == 20


def test_what_steers_a_terminal_in_a_tag_reaches_neither_terminal_nor_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event_file(tmp_path / "run", "\x1b]0;owned\x07\x1b[2J\x9bval/\u202eloss $\\frac{<b>", points=40)
    assert main(["analyze", str(tmp_path / "run"), "--output", str(tmp_path / "report")]) == 0
    out, err = capsys.readouterr()
    page = (tmp_path / "report" / "phasewatch.html").read_text()
    assert "val/loss" in out and "val/loss $\\frac{&lt;b&gt;" in page
    for text in (out, err, page):
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)


def test_a_directory_without_any_scalar_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "events.out.tfevents.1"
    file.write_bytes(b"no event at all, but long enough")
    assert main(["analyze", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "not to its end" in err and "nothing that looks like a loss" in err
    with pytest.warns(UserWarning, match="event 0"), pytest.raises(RecordError):
        run_of_scalars(read_scalars(file), ["loss"], "here")
