"""What was done to a run and what befell it, planted in losses and learning rates as training computes them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from phasewatch.analysis import analyze_run
from phasewatch.record import Change, Run, Transition
from phasewatch.record.signals import TRAINING_LOSS
from phasewatch.record.trace import pack
from phasewatch.transitions.events import Event, find_events, named_by_events

STEPS = np.arange(2_000)


def falling(seed: int = 0, tails: float = math.inf) -> np.ndarray:
    """A loss from 2 to .5, with the scatter of minibatches."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(len(STEPS)) if math.isinf(tails) else rng.standard_t(tails, len(STEPS))
    return 0.5 + 1.5 * np.exp(-STEPS / 400) + 0.05 * noise


def kinds(observed: dict[str, np.ndarray]) -> list[tuple[str, float]]:
    return [(e.kind, e.step) for e in find_events({name: (STEPS, values) for name, values in observed.items()})]


def test_a_learning_rate_drop_is_told_with_the_losses_beside_it() -> None:
    loss = np.where(STEPS < 1_000, 0.9, 0.77) + 0.001 * np.cos(17.0 * STEPS)
    [event] = find_events({"loss": (STEPS, loss), "learning_rate": (STEPS, np.where(STEPS < 1_000, 0.1, 0.01))})
    assert (event.kind, event.step) == ("learning-rate drop", 1_000.0)
    assert event.description == "the learning rate goes from 0.1 to 0.01 at step 1,000; loss 0.9 -> 0.77"


@pytest.mark.parametrize("epoch", [1, 50])
def test_a_warm_up_has_an_end_and_what_follows_is_none(epoch: int) -> None:
    at = STEPS // epoch * epoch
    warm = np.minimum((at + 1) / 501, 1.0)
    found = kinds({"learning_rate": warm * 0.1})
    assert found == [("end of a warm-up", 500.0)]
    cosine = warm * 0.5 * (1 + np.cos(np.pi * np.clip((at - 500) / 1_600, 0, 1)))
    assert kinds({"learning_rate": cosine}) == [("end of a warm-up", 500.0)]


@pytest.mark.parametrize("decay", [0.999, 0.9999])
def test_what_changes_gradually_is_no_event(decay: float) -> None:
    assert kinds({"learning_rate": 0.1 * decay**STEPS, "loss": falling()}) == []
    assert kinds({"learning_rate": 0.1 * (STEPS + 1)}) == []  # still rising at the end


def test_two_optimizers_that_change_together_are_one_event() -> None:
    rate = np.where(STEPS < 700, 0.1, 0.01)
    assert kinds({"learning_rate": rate, "learning_rate_1": rate / 2}) == [("learning-rate drop", 700.0)]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("place", [40, 1_000, 1_950])
def test_a_bad_batch(place: int, length: int) -> None:
    loss = falling()
    loss[place : place + length] += [5.0, 3.0][:length]
    assert kinds({"loss": loss}) == [("bad batch", float(place))]


def test_a_bad_batch_without_a_number() -> None:
    loss = falling()
    loss[1_000] = np.nan
    [event] = find_events({"loss": (STEPS, loss)})
    assert (event.kind, event.step) == ("bad batch", 1_000.0)


def test_a_loss_that_stays_is_no_bad_batch() -> None:
    loss = falling()
    loss[1_000:] += 1.0
    assert kinds({"loss": loss}) == []


@pytest.mark.parametrize(("tails", "most"), [(math.inf, 0), (5.0, 3), (3.0, 30)])
def test_noise_alone_is_seldom_a_bad_batch(tails: float, most: int) -> None:
    """Of 200,000 steps: none in normal noise; in heavy tails at most so many, one in 10,000 would be 20."""
    found = [kinds({"loss": falling(seed, tails)}) for seed in range(100)]
    assert sum(map(len, found)) <= most


def test_divergence() -> None:
    loss = falling()
    loss[1_500:] = np.inf
    assert kinds({"loss": loss}) == [("divergence", 1_500.0)]
    loss = falling()
    loss[1_500:] += 0.05 * np.arange(500)
    [(kind, step)] = kinds({"loss": loss})
    assert kind == "divergence"
    assert 1_490 <= step <= 1_530
    assert kinds({"loss": falling()[::-1].copy()}) == [("divergence", pytest.approx(1_000, abs=900))]


def test_a_network_that_dies_has_diverged_though_it_began_at_the_same_loss() -> None:
    """As where a learning rate grows too large and the outputs become constant: the loss of chance, at both ends."""
    noise = 0.02 * np.random.default_rng(3).standard_normal(2_000)
    loss = np.where(STEPS < 1_200, 0.1 + 2.2 * np.exp(-STEPS / 150), 2.3) + noise
    assert kinds({"loss": loss}) == [("divergence", pytest.approx(1_200, abs=3))]
    # What comes back by half has not, nor has what never learnt, nor what falls by little and is back.
    assert kinds({"loss": np.where(STEPS < 1_200, loss, 1.2 + noise)}) == []
    assert kinds({"loss": 2.3 + noise}) == []
    assert kinds({"loss": 2.3 - 0.5 * ((STEPS > 600) & (STEPS < 1_200)) + noise}) == []


def test_nothing_observed() -> None:
    assert find_events({}) == []
    assert find_events({"loss": (STEPS[:0], STEPS[:0])}) == []
    assert kinds({"loss": np.full(2_000, np.nan)}) == [("divergence", 0.0)]
    assert [e.step for e in find_events({}, resumed=[300.0])] == [300.0]


def test_a_transition_is_named_after_the_event_within_it_that_came_first() -> None:
    change = Change(2.0, 1.0, -1.0, 0.1, (-1.2, -0.8), -10.0)
    one = Transition(100, 200, 150, (140, 160), "A", {"loss": change}, 10.0, 1e-9, resolutions=("fine",))
    drop = Event("learning-rate drop", 120.0, "")
    [named] = named_by_events([one], [drop])
    assert (named.kind, named.resolutions) == ("learning-rate drop", ())
    for elsewhere in (90.0, 180.0, 250.0):
        assert named_by_events([one], [Event("learning-rate drop", elsewhere, "")]) == [one]


@pytest.mark.parametrize(("behind", "is_it"), [(13, True), (200, False)])
def test_what_the_loss_at_every_step_shows_soon_after_an_event_is_that(behind: float, is_it: bool) -> None:
    """With momentum the loss settles some steps after the learning rate was changed."""
    change = Change(2.34, 2.30, -0.04, 0.004, (-0.05, -0.03), -10.0)
    one = Transition(812, 814, 813, (810, 817), "loss falls", {TRAINING_LOSS: change}, 9.7, 1e-9)
    one = replace(one, seen_by=(TRAINING_LOSS,))
    [named] = named_by_events([one], [Event("learning-rate drop", 813.0 - behind, "")])
    assert named.kind == ("learning-rate drop" if is_it else "loss falls")
    assert named_by_events([one], [Event("bad batch", 813.0 - behind, "")]) == [one]


def test_after_a_divergence_nothing_is_a_transition_of_its_own() -> None:
    change = Change(25.0, 17.0, -8.0, 0.5, (-9.0, -7.0), -16.0)
    later = Transition(1_300, 1_400, 1_360, (1_320, 1_400), "loss falls", {"loss": change}, 10.0, 1e-9)
    diverged = Event("divergence", 1_002.0, "")
    assert [one.kind for one in named_by_events([later], [diverged])] == ["divergence"]
    before = replace(later, start=300, end=400, step=360, interval=(320.0, 400.0))
    assert named_by_events([before], [diverged]) == [before]


def test_a_batch_that_the_network_needs_some_steps_to_recover_from_is_where_it_came() -> None:
    loss = falling()
    loss[1_000:1_005] += [60.0, 200.0, 460.0, 220.0, 15.0]
    assert kinds({"loss": loss}) == [("bad batch", 1_000.0)]


def decaying(place: int, top: float = 1.0, recovery: float = 100.0, seen: np.ndarray = STEPS) -> np.ndarray:
    return np.where(place <= seen, top * np.exp(-np.maximum(seen - place, 0) / recovery), 0.0)


def spiked(
    level: float, top: float, recovery: float, place: int = 1_200, seed: int = 0, seen: np.ndarray = STEPS
) -> np.ndarray:
    """A loss that falls to a level and scatters there by its order of magnitude, with a spike of so many steps."""
    rng = np.random.default_rng(seed)
    usual = level + 2.3 * np.exp(-seen / 40)
    return (usual + decaying(place, top, recovery, seen)) * np.exp(0.6 * rng.standard_normal(len(seen)))


@pytest.mark.parametrize("level", [1e-5, 1e-3, 0.02])
@pytest.mark.parametrize(("top", "recovery"), [(0.5, 20.0), (1.0, 60.0)])
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_spike_is_told_with_where_it_begins_and_ends(
    level: float, top: float, recovery: float, seed: int
) -> None:
    [event] = find_events({"loss": (STEPS, spiked(level, top, recovery, seed=seed))})
    assert event.kind == "loss spike" and 1_195 <= event.step <= 1_206
    # Between where a fiftieth of it and where no more than the level itself is left.
    assert event.until is not None
    assert 0.7 * math.log(5) * recovery < event.until - event.step < 1.5 * math.log(top / level) * recovery
    assert f"and is back at step {event.until:,.0f}" in event.description
    assert event.to_dict()["until"] == event.until


def test_what_does_not_come_back_or_what_the_learning_rate_makes_is_no_spike() -> None:
    loss = spiked(0.02, 0.5, 30.0)
    rate = np.where((STEPS >= 1_195) & (STEPS < 1_400), 0.5, 0.05)
    told = kinds({"loss": loss, "learning_rate": rate})
    assert told == [("learning-rate rise", 1_195.0), ("learning-rate drop", 1_400.0)]
    assert kinds({"loss": np.where(STEPS >= 1_200, 0.6, loss)}) == []
    slow = 0.5 + 0.4 * np.sin(STEPS / 150) + 0.05 * np.random.default_rng(0).standard_normal(len(STEPS))
    assert kinds({"loss": slow}) == []


@pytest.mark.parametrize("noise", ["normal", "orders of magnitude", "heavy tails"])
def test_noise_alone_is_no_spike(noise: str) -> None:
    """Of 100 runs of 2,000 steps none, though each has steps far beyond what a spike of the loss is told by."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        if noise == "normal":
            loss = falling(seed)
        elif noise == "heavy tails":
            loss = falling(seed, 2.0)
        else:
            loss = 1e-3 * np.exp(2.0 * rng.standard_normal(len(STEPS))) + 2.3 * np.exp(-STEPS / 40)
        assert "loss spike" not in [kind for kind, _ in kinds({"loss": loss})]


def test_spikes_that_follow_one_another_are_told_one_by_one() -> None:
    places = np.arange(300, 1_900, 120)
    away = sum(decaying(int(place), 1.0, 10.0) for place in places)
    loss = 0.3 + 2 * np.exp(-STEPS / 40) + away + 0.03 * np.random.default_rng(0).standard_normal(len(STEPS))
    found = find_events({"loss": (STEPS, loss)})
    assert {event.kind for event in found} == {"loss spike"} and len(found) == len(places)
    assert all(abs(event.step - place) <= 5 for event, place in zip(found, places, strict=True))
    ends = [event.until or 0.0 for event in found]
    assert all(end <= following.step for end, following in zip(ends, found[1:], strict=False))


def test_a_bad_batch_from_which_the_network_recovers_slowly_is_one_event() -> None:
    loss = spiked(0.02, 0.5, 30.0)
    loss[1_200] += 40.0
    [event] = find_events({"loss": (STEPS, loss)})
    assert (event.kind, event.step) == ("bad batch", 1_200.0)
    assert event.until is not None and 1_225 < event.until < 1_400


@pytest.mark.parametrize("seed", range(3))
def test_in_a_loss_spike_there_is_no_transition_and_beside_it_one_is_still_found(seed: int) -> None:
    """As Adam makes them where nearly all is fitted; then the same with a fall by .3 at step 3,000."""
    seen = np.arange(6_000)
    loss = spiked(3e-4, 0.7, 60.0, 1_500, seed, seen) + spiked(0.0, 0.7, 60.0, 4_500, seed + 10, seen)
    run = Run(None, {}, (), (), (), (), True, blocks=(pack({"loss": (seen.tolist(), loss.tolist())}),))
    found = analyze_run(run)
    assert [(event.kind, round(event.step, -2)) for event in found.events] == [
        ("loss spike", 1_500),
        ("loss spike", 4_500),
    ]
    assert found.transitions == ()
    stepped = np.where(seen < 3_000, 0.3, 0.0) + loss + 0.01 * np.random.default_rng(seed).standard_normal(len(seen))
    run = replace(run, blocks=(pack({"loss": (seen.tolist(), stepped.tolist())}),))
    [one] = analyze_run(run).transitions
    assert one.kind == "loss falls" and abs(one.step - 3_000) < 10


def test_what_lies_within_a_spike_is_named_after_it_and_what_was_measured_across_it_is_not() -> None:
    """A network may generalise between two measurements, between which the loss has spiked as well."""
    change = Change(2.0, 1.0, -1.0, 0.1, (-1.2, -0.8), -10.0)
    one = Transition(120, 180, 150, (140, 160), "B", {"loss": change}, 10.0, 1e-9)
    [named] = named_by_events([one], [Event("loss spike", 100.0, "", until=200.0)])
    assert named.kind == "loss spike"
    assert named_by_events([one], [Event("loss spike", 130.0, "", until=150.0)]) == [one]


def quiet(*away: np.ndarray) -> np.ndarray:
    """A loss that has fallen, with little noise, and what is added to it."""
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(STEPS))
    return 1.5 + 2 * np.exp(-STEPS / 40) + noise + sum(away, np.zeros(len(STEPS)))


@pytest.mark.parametrize("length", [100, 300, 700])
@pytest.mark.parametrize("below", [0.3, 1.0])
def test_a_fall_from_a_higher_level_to_a_lower_one_is_none_back_from_a_spike(length: int, below: float) -> None:
    """Left out as a spike, 500 steps misplaced the fall by 250, and 1,000 hid it."""
    rises, falls = 600, 600 + length
    loss = quiet(np.where(STEPS >= rises, 1.0, 0.0), np.where(STEPS >= falls, -1.0 - below, 0.0))
    assert kinds({"loss": loss}) == []
    run = Run(None, {}, (), (), (), (), True, blocks=(pack({"loss": (STEPS.tolist(), loss.tolist())}),))
    found = [one for one in analyze_run(run).transitions if one.kind == "loss falls"]
    assert any(abs(one.step - falls) < 10 for one in found)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4])
def test_losses_most_of_which_are_zero_have_no_spikes(share: float) -> None:
    """Counts of errors, and hinge losses: by their median deviation, which is zero, runs had a dozen and more."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        wrong = rng.random(len(STEPS)) < share + (1 - share) * np.exp(-STEPS / 100)
        for loss in (wrong * rng.exponential(1.0, len(STEPS)), wrong.astype(float)):
            assert "loss spike" not in [kind for kind, _ in kinds({"loss": loss})]


def test_what_befalls_a_run_amid_a_spike_has_not_made_it() -> None:
    loss = quiet(decaying(1_000))
    loss[1_040] = math.nan
    rate = np.where(STEPS >= 1_080, 0.5, 0.05)
    found = find_events({"loss": (STEPS, loss), "learning_rate": (STEPS, rate)})
    assert [(event.kind, event.step) for event in found] == [
        ("loss spike", 1_000.0),
        ("bad batch", 1_040.0),
        ("learning-rate rise", 1_080.0),
    ]
    assert [event.until is None for event in found] == [False, True, True]


def test_a_loss_that_is_no_number_has_made_the_spike_that_begins_after_it() -> None:
    loss = quiet(decaying(1_000))
    loss[1_000] = math.nan
    [event] = find_events({"loss": (STEPS, loss)})
    assert (event.kind, event.step) == ("bad batch", 1_000.0) and event.until is not None
