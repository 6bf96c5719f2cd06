"""Whether something is under way: seen where it is, rarely elsewhere, and told by steps and values alone."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from phasewatch.activity import Activity, looked_at

TOTAL = 10_000
SCALE = TOTAL / 20
STEPS = np.arange(TOTAL)


def noise(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Of unit variance."""
    if kind == "t3":
        return rng.standard_t(3, TOTAL) / 3**0.5
    white = rng.standard_normal(TOTAL)
    if kind.startswith("ar"):
        rho = float(kind[2:])
        for k in range(1, TOTAL):
            white[k] = rho * white[k - 1] + (1 - rho**2) ** 0.5 * white[k]
    return white


def power_law(rng: np.random.Generator) -> np.ndarray:
    floor, begins, exponent = rng.choice([0.0, 0.1, 0.5]), 10 ** rng.uniform(0, 3.5), rng.uniform(0.2, 0.8)
    return floor + (1 + STEPS / begins) ** -exponent


def with_a_fall(rng: np.random.Generator, place: float, width: float, share: float) -> np.ndarray:
    """A power law that falls by a share of what it is; the width is from 10 to 90 %."""
    loss = power_law(rng)
    happened = 1 / (1 + np.exp(-np.clip(math.log(81) * (STEPS - place) / width, -50, 50)))
    return loss - share * np.interp(place, STEPS, loss) * happened


def follow(losses: Any, portion: int = 50) -> list[int | None]:
    """The last step at which something was under way, as it is seen after each portion."""
    activity, seen = Activity(SCALE), []
    for first in range(0, TOTAL, portion):
        activity.take("loss", range(first, first + portion), losses[first : first + portion].tolist())
        seen.append(activity.last)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [("gauss", 0.015), ("ar0.5", 0.015), ("t3", 0.071)])
def test_power_laws_with_sgd_noise_rarely_seem_to_have_something_under_way(kind: str, share: float) -> None:
    """The shares of such runs with a false alarm at all: of 200 others, 0 and 0 (so less than 1.5 %), of 1,500 107.

    Of 200 runs with as large a share, more than three standard deviations above it are seen in one of 500 tests.
    """
    alarms = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        losses = power_law(rng) * (1 + 10 ** rng.uniform(-2, -0.5) * noise(rng, kind))
        alarms += follow(losses, 1000)[-1] is not None
    assert alarms <= 200 * share + 3 * math.sqrt(200 * share)


@pytest.mark.parametrize("width", [1.0, 100.0, 800.0])
@pytest.mark.parametrize("scatter", [0.0, 0.03, 0.1])
def test_a_fall_by_half_is_seen_while_it_goes_on_and_for_no_longer(width: float, scatter: float) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        place = rng.uniform(2500, 7500)
        losses = with_a_fall(rng, place, width, 0.5) * (1 + scatter * rng.standard_normal(TOTAL))
        block = 0.02 * (place + SCALE)
        seen = [last for last in follow(losses) if last is not None]
        assert place - width < seen[0] < place + width / 2 + 4 * block, seed
        # a tail goes on for about a width
        assert place - width / 2 < seen[-1] < place + 1.5 * width + 6 * block, seed


def test_a_rise_is_seen_and_a_fall_that_slows_down_is_not() -> None:
    rng = np.random.default_rng(0)
    losses = 1 / (1 + STEPS / 100) + 0.2 + np.where(STEPS > 6000, 0.1, 0.0) + 0.01 * rng.standard_normal(TOTAL)
    assert 6000 < (follow(losses)[-1] or 0) < 6800
    relaxing = 1 + np.exp(-STEPS / 700) + 0.003 * rng.standard_normal(TOTAL)
    assert all(last is None or last < 1000 for last in follow(relaxing))


def test_portions_and_what_is_left_out_make_no_difference() -> None:
    rng = np.random.default_rng(1)
    losses = with_a_fall(rng, 5000, 200, 0.4) * (1 + 0.05 * rng.standard_normal(TOTAL))
    whole = follow(losses, 1)
    assert whole[49::50] == follow(losses, 50)
    kept = [step for step in range(TOTAL) if step % looked_at(step, SCALE) == 0]
    assert TOTAL / 5 < len(kept) < TOTAL / 2
    thinned = Activity(SCALE)
    thinned.take("loss", kept, losses[kept].tolist())
    assert thinned.last == whole[-1] is not None


def test_it_goes_on_from_its_state() -> None:
    rng = np.random.default_rng(2)
    losses = with_a_fall(rng, 5000, 300, 0.5) * (1 + 0.05 * rng.standard_normal(TOTAL))
    expected = follow(losses)
    for cut in (3000, 5000, 5050, 5150):
        activity = Activity(SCALE)
        activity.take("loss", range(cut), losses[:cut].tolist())
        activity.take_rates([cut - 1], [0.1])
        again = Activity(1.0)
        again.load_state_dict(json.loads(json.dumps(activity.state_dict())))
        assert again.last == expected[cut // 50 - 1]
        again.take("loss", range(cut - 20, TOTAL), losses[cut - 20 :].tolist())  # some come again
        assert again.last == expected[-1]


def test_what_is_not_finite_is_passed_over() -> None:
    rng = np.random.default_rng(3)
    losses = with_a_fall(rng, 5000, 300, 0.5)
    broken = losses.copy()
    broken[rng.integers(0, TOTAL, 300)] = rng.choice([math.nan, math.inf, -math.inf], 300)
    seen = [last for last in follow(broken) if last is not None]
    assert 4700 < seen[0] < 5200 and seen[-1] < 6000


def test_what_is_validated_now_and_then_is_followed_too() -> None:
    """The training loss knows nothing of it, as where a network groks."""
    rng = np.random.default_rng(4)
    activity = Activity(SCALE)
    accuracy = 0.1 + 0.8 / (1 + np.exp(-(STEPS - 5000) / 150)) + 0.005 * rng.standard_normal(TOTAL)
    activity.take("loss", range(TOTAL), (1e-3 * (1 + 0.1 * rng.standard_normal(TOTAL))).tolist())
    assert activity.last is None
    for step in range(0, TOTAL, 100):
        activity.take("val_accuracy", [step], [accuracy[step]])
        if step == 4000:
            assert activity.last is None
    assert activity.last is not None and 5000 < activity.last < 6500


def test_an_abrupt_change_of_the_learning_rate_counts_and_a_cosine_does_not() -> None:
    activity = Activity(SCALE)
    rates = 0.5 * (1 + np.cos(np.pi * STEPS / TOTAL))
    activity.take_rates(range(TOTAL - 100), rates[:-100].tolist())
    assert activity.last is None
    activity.take_rates([TOTAL, TOTAL + 1, TOTAL + 2], [0.0, math.nan, 1e-9])
    assert activity.last == TOTAL + 2
