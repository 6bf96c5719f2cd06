from __future__ import annotations

import math

import pytest

from phasewatch.schedule import At, Clock, Every, LogSpaced, Schedule, Spread, as_schedule


def visits(schedule: Schedule, last: int, clock: Clock | None = None) -> list[int]:
    clock = clock or Clock()
    steps, step = [], schedule.next_visit(-1, clock)
    while step is not None and step <= last:
        steps.append(step)
        step = schedule.next_visit(step, clock)
    return steps


def simulate(schedule: Spread, step_seconds: float, cost: float, total: int) -> tuple[list[int], Clock]:
    """A run in which every step and every measurement takes a known time."""
    clock, measured, due, reached = Clock(total_steps=total), [], schedule.next_visit(-1, Clock()), 0
    while due is not None and due <= total:
        clock.training_seconds += (due - reached) * step_seconds
        clock.steps, reached = due, due
        if schedule.measures(due, clock):
            clock.measuring_seconds += cost
            clock.measurement_seconds = cost
            measured.append(due)
        due = schedule.next_visit(due, clock)
    clock.training_seconds += (total - reached) * step_seconds
    return measured, clock


def test_fixed_schedules() -> None:
    assert visits(Every(30), 100) == [0, 30, 60, 90]
    assert visits(At((7, 3, 3, 50)), 100) == [3, 7, 50]
    logarithmic = visits(LogSpaced(10), 10_000)
    assert logarithmic[:4] == [0, 1, 2, 3]
    assert [s for s in (10, 100, 1000, 10_000) if s not in logarithmic] == []
    ratios = [b / a for a, b in zip(logarithmic[15:], logarithmic[16:], strict=False)]
    assert max(abs(r - 10**0.1) for r in ratios) < 0.05


@pytest.mark.parametrize("total", [300, 5_000, 200_000])
def test_without_a_limit_the_planned_number_is_spread_over_the_run_denser_early(total: int) -> None:
    measured, _ = simulate(Spread(max_overhead=None, measurements=40), 1e-3, 1.0, total)
    assert 35 <= len(measured) <= 50
    assert measured[0] == 0
    gaps = [b - a for a, b in zip(measured, measured[1:], strict=False)]
    assert gaps[-1] > 5 * gaps[0]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("cost", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("total", [20_000, 100_000])
def test_the_share_is_kept_at_the_end_with_the_last_measurement_counted(share: float, cost: float, total: int) -> None:
    schedule = Spread(max_overhead=share)
    measured, clock = simulate(schedule, 0.01, cost, total)
    if clock.training_seconds * share > 2 * cost:
        assert (clock.measuring_seconds + cost) / clock.training_seconds <= share
    affordable = clock.training_seconds * share / cost
    assert len(measured) >= min(0.5 * schedule.measurements, 0.5 * affordable)


def test_a_measurement_that_turns_dear_stretches_the_interval() -> None:
    schedule = Spread(max_overhead=0.1)
    clock = Clock(10_000, steps=1000, training_seconds=100.0, measuring_seconds=4.0, measurement_seconds=0.1)
    cheap = schedule.next_visit(1000, clock)
    clock.measurement_seconds = 20.0
    dear = schedule.next_visit(1000, clock)
    assert cheap is not None and dear is not None
    assert dear >= 1000 + ((4 + 40) / 0.1 - 100) / 0.1 > cheap
    assert not schedule.measures(1000, clock)


def test_what_users_write() -> None:
    assert as_schedule("auto", 0.3) == Spread(0.3)
    assert as_schedule("log") == LogSpaced()
    assert as_schedule(50) == Every(50)
    assert as_schedule([5, 1]) == At((1, 5))
    assert as_schedule(Every(3)) == Every(3)
    assert math.isnan(Clock().overhead)


@pytest.mark.parametrize("wrong", ["often", 2.5, None, True, [1, "two"]])
def test_what_is_no_schedule(wrong: object) -> None:
    with pytest.raises(TypeError, match="expected 'auto', 'log', a number of steps"):
        as_schedule(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, -3])
def test_settings_out_of_range(wrong: int) -> None:
    for make in (Every, LogSpaced, Spread, lambda x: At((x - 1,))):
        with pytest.raises(ValueError, match="expected"):
            make(wrong)
