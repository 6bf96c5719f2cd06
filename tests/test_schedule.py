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


def simulate(
    schedule: Spread, step_seconds: float, cost: float, total: int, active: range = range(0), is_known: bool = True
) -> tuple[list[int], Clock]:
    """A run in which every step and every measurement takes a known time, and something is under way at some steps.

    How long it will be may not be known.
    """
    clock = Clock(total_steps=total if is_known else None)
    measured, due, reached = [], schedule.next_visit(-1, Clock()), 0
    while due is not None and due <= total:
        clock.training_seconds += (due - reached) * step_seconds
        clock.steps, reached = due, due
        clock.measurement_seconds = clock.measurement_seconds or cost
        clock.last_active = min(due, active[-1]) if active and due >= active[0] else None
        if schedule.measures(due, clock):
            clock.measuring_seconds += cost
            clock.measurement_seconds = cost
            clock.taken, clock.last_taken = clock.taken + 1, due
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
def test_without_a_limit_most_of_the_planned_number_are_spread_over_the_run_denser_early(total: int) -> None:
    """The rest is for where something is under way."""
    measured, _ = simulate(Spread(max_overhead=None, measurements=40), 1e-3, 1.0, total)
    assert 32 <= len(measured) <= 36
    assert measured[0] == 0
    gaps = [b - a for a, b in zip(measured, measured[1:], strict=False)]
    assert gaps[-1] > 5 * gaps[0]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("cost", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("total", [20_000, 100_000])
def test_the_share_is_kept_at_the_end_with_the_last_measurement_counted(share: float, cost: float, total: int) -> None:
    schedule = Spread(max_overhead=share, free_seconds=0)
    measured, clock = simulate(schedule, 0.01, cost, total)
    affordable = clock.training_seconds * share / cost
    of_the_end = affordable >= 1
    assert (len(measured) + of_the_end) * cost <= share * clock.training_seconds
    assert len(measured) + of_the_end >= min(0.5 * schedule.measurements, 0.5 * affordable)


@pytest.mark.parametrize("stopped", [0, 40, 300, 2_000, 20_000])
@pytest.mark.parametrize(("cost", "free"), [(0.4, 60), (4, 60), (12, 60), (45, 60), (200, 60), (3, 7)])
def test_wherever_a_run_stops_the_larger_of_share_and_free_seconds_is_kept(
    cost: float, free: float, stopped: int
) -> None:
    """The last measurement is counted wherever it is paid, as a watch makes it."""
    schedule = Spread(0.1, free_seconds=free)
    clock = Clock(total_steps=20_000, measurement_seconds=cost)
    due, reached = schedule.next_visit(-1, clock), 0
    while due is not None and due <= stopped:
        clock.training_seconds += (due - reached) * 0.1
        clock.steps, reached = due, due
        if schedule.measures(due, clock):
            clock.measuring_seconds += cost
            clock.taken, clock.last_taken = clock.taken + 1, due
            assert clock.measuring_seconds + cost <= max(0.1 * clock.training_seconds, free)
        due = schedule.next_visit(due, clock)
    clock.training_seconds += (stopped - reached) * 0.1
    assert clock.measuring_seconds == 0 or schedule.left(clock) >= cost


def test_two_minutes_of_training_of_a_small_network_get_their_fifty_points() -> None:
    measured, _ = simulate(Spread(), 0.01, 0.4, 12_000)
    assert len(measured) >= 50 and measured[-1] > 11_000
    gaps = [b - a for a, b in zip(measured, measured[1:], strict=False)]
    assert gaps[-1] < 1_000


def test_few_free_measurements_are_spread_over_the_run() -> None:
    """60 s pay for twelve of five seconds, eleven beside that of the end, in two minutes that are worth 12 s alone."""
    measured, _ = simulate(Spread(), 0.01, 5.0, 12_000)
    assert 9 <= len(measured) <= 11
    assert measured[0] == 0 and measured[-1] > 8_000


def test_a_long_run_does_not_spend_its_free_seconds_at_once() -> None:
    """An hour, ten seconds each: 60 s are free until ten minutes are worth as much; then one every 100 s is paid.

    Of these 36 a sixth is left where nothing was under way.
    """
    measured, clock = simulate(Spread(), 0.1, 10.0, 36_000)
    assert 25 <= len(measured) <= 30 and clock.measuring_seconds + 10 <= 360
    gaps = [b - a for a, b in zip(measured, measured[1:], strict=False)]
    assert max(gaps) <= 3_000


@pytest.mark.parametrize("total", [3_000, 200_000])
@pytest.mark.parametrize(("begins", "ends"), [(0.1, 0.12), (0.3, 0.36), (0.7, 0.75)])
def test_where_something_is_under_way_it_is_measured_more_often(begins: float, ends: float, total: int) -> None:
    """At least three within and after; the even ones before were there already, and after it they go on."""
    active = range(int(begins * total), int(ends * total))
    quiet, _ = simulate(Spread(None), 1e-3, 1.0, total)
    measured, _ = simulate(Spread(None), 1e-3, 1.0, total, active)
    assert [s for s in measured if s < active[0]] == [s for s in quiet if s < active[0]]
    within = [s for s in measured if s in active]
    after = [s for s in measured if active[-1] < s <= 1.2 * active[-1]]
    assert len(within) >= 3 and len(after) >= 3
    assert len([s for s in measured if s > 1.2 * active[-1]]) >= 0.6 * len([s for s in quiet if s > 1.2 * active[-1]])
    assert len(quiet) < len(measured) <= 75


def test_what_is_always_under_way_does_not_spend_all_at_once() -> None:
    measured, _ = simulate(Spread(None), 1e-3, 1.0, 20_000, range(20_000))
    assert len(measured) <= 95  # half as many again as are planned
    times = [math.log1p(s / 1000) / math.log(21) for s in measured]
    assert max(b - a for a, b in zip(times, times[1:], strict=False)) < 4 / 60


@pytest.mark.parametrize("free", [0, 60])
@pytest.mark.parametrize("cost", [0.05, 1.0, 6.0, 20.0])
@pytest.mark.parametrize("total", [2_000, 20_000])
def test_the_budget_is_kept_where_something_is_always_under_way(total: int, cost: float, free: float) -> None:
    for stopped in (total // 20, total // 2, total):
        schedule = Spread(0.1, free_seconds=free)
        measured, clock = simulate(schedule, 0.1, cost, stopped, range(total))
        assert not measured or clock.measuring_seconds + cost <= max(0.1 * clock.training_seconds, free)


@pytest.mark.parametrize("cost", [0.05, 0.5, 5.0])
def test_a_run_of_unknown_length_is_measured_as_long_as_it_goes_on_and_within_its_budget(cost: float) -> None:
    """A quarter of an hour; wherever it ends there is enough left to measure the end."""
    measured, clock = simulate(Spread(0.1, free_seconds=20), 0.01, cost, 100_000, is_known=False)
    assert clock.total_steps is None
    for count, step in enumerate(measured, start=1):
        assert (count + 1) * cost <= max(0.1 * step * 0.01, 20) + 1e-9
    while_free = [s for s in measured if s <= 20_000]  # 20 s are a tenth of 200
    assert len(while_free) >= min(30, 0.5 * (20 / cost - 1))
    assert len([s for s in measured if s >= 50_000]) >= 4


def test_without_free_seconds_nothing_is_measured_that_is_not_paid() -> None:
    assert not Spread(0.1, free_seconds=0).measures(0, Clock(1000, measurement_seconds=0.5))
    assert Spread(0.1, free_seconds=1).measures(0, Clock(1000, measurement_seconds=0.5))
    assert not Spread(0.1, free_seconds=60).measures(0, Clock(1000, measurement_seconds=6.0))  # training is to start
    assert Spread(None).measures(0, Clock(1000, measurement_seconds=6.0))


def test_a_measurement_that_turns_dear_stretches_the_interval() -> None:
    schedule = Spread(max_overhead=0.1, free_seconds=0)
    clock = Clock(10_000, steps=1000, training_seconds=100.0, measuring_seconds=4.0, measurement_seconds=0.1)
    cheap = schedule.next_visit(1000, clock)
    clock.measurement_seconds = 20.0
    dear = schedule.next_visit(1000, clock)
    assert cheap is not None and dear is not None
    assert dear >= 1000 + ((4 + 40) / 0.1 - 100) / 0.1 > cheap
    assert not schedule.measures(1000, clock)


def test_what_users_write() -> None:
    assert as_schedule("auto", 0.3) == Spread(0.3)
    assert as_schedule("auto", 0.3, 5) == Spread(0.3, free_seconds=5)
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
    for make in (Every, LogSpaced, Spread, lambda x: Spread(free_seconds=x - 0.5), lambda x: At((x - 1,))):
        with pytest.raises(ValueError, match="expected"):
            make(wrong)
