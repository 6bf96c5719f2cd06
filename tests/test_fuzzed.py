"""What is fuzzed reaches every reader, and no error but phasewatch's own passes unseen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzed
import pytest

from phasewatch.record import RecordError

WHOLE = dict(zip(fuzzed.READERS, fuzzed.whole_inputs(), strict=True))
READS = {
    "record": "load_run",
    "record with right checksums": "load_run",
    "state": "usable",
    "event file": "read_scalars",
    "event file with right checksums": "read_scalars",
    "CSV": "read_table",
    "compressed CSV": "read_table",
    "JSONL": "read_table",
}


def raising(error: Exception) -> Callable[..., Any]:
    def reader(*given: Any) -> Any:
        raise error

    return reader


@pytest.mark.parametrize("kind", fuzzed.READERS)
def test_an_input_reaches_its_reader_whose_errors_are_faults_unless_they_are_phasewatchs_own(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzed, READS[kind], raising(IndexError("a fault")))
    with pytest.raises(IndexError, match="a fault"):
        fuzzed.read(WHOLE[kind], tmp_path)
    monkeypatch.setattr(fuzzed, READS[kind], raising(RecordError("as it is to be told")))
    fuzzed.read(WHOLE[kind], tmp_path)


@pytest.mark.parametrize("kind", fuzzed.READERS)
def test_what_a_fuzzer_begins_with_is_whole(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuzzed.READERS[kind](WHOLE[kind][1:], tmp_path)


def test_the_state_that_a_fuzzer_begins_with_is_of_use_to_the_last_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[dict[str, Any], list[str]]] = []
    usable = fuzzed.usable
    monkeypatch.setattr(fuzzed, "usable", lambda state: found.append(usable(state)) or found[-1])
    fuzzed.read(WHOLE["state"], tmp_path)
    [(kept, wrong)] = found
    assert [kind for kind, _ in kept["lines"]] == ["measurement", "measurement", "transition", "failure"]
    assert kept["detector"]["known"] and not wrong


@pytest.mark.parametrize(
    ("kind", "before", "after", "told"),
    [("record", b'"value":1.5', b'"value":2.5', "2 damaged"), ("event file", b"accuracy", b"Accuracy", "checksum")],
)
def test_a_change_is_told_by_the_checksum_unless_that_is_made_right(
    kind: str, before: bytes, after: bytes, told: str, tmp_path: Path
) -> None:
    changed = {name: WHOLE[name][1:].replace(before, after) for name in (kind, f"{kind} with right checksums")}
    with pytest.warns(UserWarning, match=told):
        fuzzed.READERS[kind](changed[kind], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuzzed.READERS[f"{kind} with right checksums"](changed[f"{kind} with right checksums"], tmp_path)


def test_what_a_fuzzer_begins_with_is_always_the_same() -> None:
    assert fuzzed.whole_inputs() == [*WHOLE.values()]
