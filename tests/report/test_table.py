from __future__ import annotations

import dataclasses

import pytest

from phasewatch.figures.numbers import format_change, format_value
from phasewatch.report import format_table
from phasewatch.transitions import Change, Transition


def change(before: float, after: float, z: float) -> Change:
    return Change(before, after, after - before, 0.1, (after - before - 0.2, after - before + 0.2), z)


TRANSITION = Transition(
    start=11800.0,
    end=12400.0,
    step=12040.4,
    interval=(11900.0, 12200.0),
    kind="A",
    changes={
        "loss": change(2.3, 1.05, -9.0),
        "llc": change(12.31, 30.0, 21.0),
        "nullity": change(14.0, 13.0, -1.0),
    },
    score=23.04,
    p_value=1e-9,
)


def test_row_tells_place_kind_changes_and_score() -> None:
    header, rule, row = format_table([TRANSITION]).splitlines()
    assert header.split() == "step (95 % interval) from-to kind what changed score".split()
    assert set(rule) == {"-", " "}
    assert row.split() == "12,040 (11,900-12,200) 11,800-12,400 A llc 12.3 -> 30.0, loss 2.30 -> 1.05 23.0".split()


def test_lambda_of_the_function_is_told_first() -> None:
    changes = {
        "loss": change(2.3, 1.05, -90.0),
        "llc_behavioral": change(12.31, 30.0, 21.0),
        "llc_behavioral_coarse": change(5.0, 5.1, 1.0),
    }
    one = dataclasses.replace(TRANSITION, changes=changes, resolutions=("fine",))
    text = format_table([one], markdown=True)
    assert "| A (fine) | llc_behavioral 12.3 → 30.0<br>loss 2.30 → 1.05 |" in text and "coarse" not in text
    unsure = dataclasses.replace(one, changes={"llc_behavioral": change(1, 2, 1.0), "loss": change(2, 1, -2.0)})
    assert "loss 2.00 → 1.00" in format_table([unsure], markdown=True)


def test_a_change_within_its_noise_is_told_only_where_there_is_no_other() -> None:
    quiet = dataclasses.replace(TRANSITION, changes={"nullity": change(14, 13, -1), "loss": change(2, 1.9, -0.5)})
    text = format_table([quiet])
    assert "nullity 14.0 -> 13.0" in text and "loss" not in text


def test_a_change_between_unreliable_points_says_so() -> None:
    doubtful = dataclasses.replace(change(12.31, 30.0, 21.0), reliable=False)
    [row] = format_table([dataclasses.replace(TRANSITION, changes={"llc": doubtful})]).splitlines()[2:]
    assert "llc 12.3 -> 30.0 (unreliable)" in row


def test_a_transition_that_goes_on_says_so() -> None:
    assert "loss falls, under way" in format_table(
        [dataclasses.replace(TRANSITION, kind="loss falls", under_way=True)], True
    )


def test_none_found_is_a_sentence() -> None:
    assert format_table([]).startswith("No transitions were found")
    assert "|" not in format_table([], markdown=True)


def test_long_rows_are_wrapped_to_100_columns() -> None:
    names = ("loss", "llc", "hessian_max", "hessian_min", "hessian_trace", "nullity")
    changes = {name: change(-0.0123, 123456.0, 10.0 - k) for k, name in enumerate(names)}
    kind = "hessian_max rises, hessian_min falls, nullity falls"
    far = dataclasses.replace(
        TRANSITION, kind=kind, changes=changes, step=1.23456e6, interval=(1.1e6, 1.3e6), start=1e6, end=1.4e6
    )
    lines = format_table([TRANSITION, far, far]).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.strip().startswith("1.2346M (1.1M-1.3M)") for line in lines)
    told = " ".join(line[59:94].rstrip(" ,") for line in lines[4:])
    for name in names:
        assert told.count(f"{name} -0.0123 -> 123,456") == 2


def test_markdown_has_one_line_a_transition_and_no_stray_bars() -> None:
    barred = dataclasses.replace(TRANSITION, kind="a|b")
    lines = format_table([TRANSITION, barred], markdown=True).splitlines()
    assert len(lines) == 4
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
    assert "llc 12.3 → 30.0<br>loss 2.30 → 1.05" in lines[2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (9.9983, "10.0"),
        (12.345, "12.3"),
        (0.012345, "0.0123"),
        (99999.7, "100,000"),
        (-1234.5, "-1,234"),
        (1e-5, "1.00e-05"),
        (2.5e7, "2.50e+07"),
        (float("nan"), "unknown"),
    ],
)
def test_values_have_three_significant_digits(value: float, text: str) -> None:
    assert format_value(value) == text


def test_a_small_change_is_written_with_the_digits_it_takes() -> None:
    assert format_change(13.112, 13.134, "->") == "13.11 -> 13.13"
    assert format_change(1.0, 1.0 + 1e-9, "->") == "1.00000 -> 1.00000"
    assert format_change(1.0, 1.0, "->") == "1.00 -> 1.00"
