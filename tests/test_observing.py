"""What is observed at every step: right values, nothing changed, nothing waited for, and whatever is given, no harm."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phasewatch import observer, updates
from phasewatch.analysis import analyze_run
from phasewatch.observer import Observer
from phasewatch.record import load_run, noise_scale
from phasewatch.watch import Watch

DATA = torch.Generator().manual_seed(1)
INPUTS, TARGETS = torch.randn(64, 3, generator=DATA), torch.randn(64, 1, generator=DATA)
PROBE = [(INPUTS, TARGETS)]


def half_mean_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1))


def watching(module: nn.Module | None = None, **options: Any) -> Watch:
    settings = {"loss_fn": half_mean_squared_error, "schedule": [10**9], "estimators": (), "on_error": "raise"}
    return Watch(module or network(), PROBE, **{**settings, **options})


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses at every step and norms at every tenth, however long they take on this machine."""
    monkeypatch.setattr(observer, "SHARE", 1e9)


@pytest.fixture
def limited(unlimited: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of tests."""
    monkeypatch.setattr(observer, "SHARE", 0.01)


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, watch: Watch | None, steps: int
) -> list[tuple[float, Tensor, Tensor]]:
    """Minibatch training; loss, weights and gradient before each step, taken without phasewatch."""
    seen = []
    drawn = torch.Generator().manual_seed(5)
    for step in range(steps):
        rows = torch.randint(64, (8,), generator=drawn)
        if watch is not None:
            watch.at(step)
        optimizer.zero_grad()
        loss = half_mean_squared_error(module, (INPUTS[rows], TARGETS[rows]))
        loss.backward()
        if watch is not None:
            watch.observe(step, optimizer, loss=loss)
        parameters = [p for p in module.parameters() if p.grad is not None]
        weights = torch.cat([p.detach().double().flatten() for p in parameters])
        gradients = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
        seen.append((loss.item(), weights, gradients))
        optimizer.step()
    return seen


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused adam": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_value_is_that_of_a_twin_that_is_not_watched(kind: str) -> None:
    watched, twin = network(), network()
    random_state = torch.get_rng_state()
    watch = watching(watched)
    seen = train(watched, OPTIMIZERS[kind](watched.parameters()), watch, 45)
    assert torch.equal(torch.get_rng_state(), random_state)
    expected = train(twin, OPTIMIZERS[kind](twin.parameters()), None, 45)
    assert seen[0][0] == expected[0][0] and all(
        torch.equal(mine[1], its[1]) and torch.equal(mine[2], its[2]) for mine, its in zip(seen, expected, strict=True)
    )

    found = watch_closed(watch)
    losses, weights, gradients = zip(*expected, strict=True)
    assert found["loss"].steps.tolist() == list(range(45))
    np.testing.assert_array_equal(found["loss"].values, np.float32(losses))
    assert found["learning_rate"].steps.tolist() == list(range(45))
    assert set(found["learning_rate"].values) == {np.float32(0.1 if kind == "sgd" else 0.01)}
    tens = [10, 20, 30, 40]
    exact = {
        "gradient_norm": [gradients[t].norm() for t in tens],
        "weight_norm": [weights[t].norm() for t in tens],
        "update_norm": [(weights[t + 1] - weights[t]).norm() for t in tens],
        "gradient_variance": [(gradients[t + 1] - gradients[t]).square().sum() / 2 for t in tens],
        "gradient_product": [gradients[t + 1] @ gradients[t] for t in tens],
    }
    assert found.keys() == {"loss", "learning_rate", *exact}
    for name, values in exact.items():
        assert found[name].steps.tolist() == tens
        np.testing.assert_allclose(found[name].values, [v.item() for v in values], rtol=2e-5, atol=1e-7)


def watch_closed(watch: Watch) -> Any:
    watch.close()
    return watch.run.observed


def test_training_is_the_same_to_the_last_bit() -> None:
    watched, twin = network(), network()
    optimizers = [torch.optim.Adam(m.parameters(), amsgrad=True) for m in (watched, twin)]
    watch = watching(watched)
    train(watched, optimizers[0], watch, 31)
    train(twin, optimizers[1], None, 31)
    states = [list(o.state_dict()["state"].values()) for o in optimizers]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*states, strict=True) for key in a)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), twin.parameters(), strict=True))
    versions = [[p.grad._version for p in m.parameters() if p.grad is not None] for m in (watched, twin)]
    assert versions[0] == versions[1]
    assert "gradient_variance" in watch_closed(watch)


def test_of_many_parameters_a_part_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "LARGEST_COPY", 500)
    parameters = [nn.Parameter(torch.zeros(100, 128)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(2500))]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    taken = Observer()
    for step in range(12):
        for p in parameters:
            p.grad = torch.full_like(p, 0.25 if step % 2 else -0.75)
        taken.take(step, {}, optimizer)
        optimizer.step()
    found = observed(taken)
    size = 100 * 128 + 7 + 2500
    assert found["gradient_norm"] == {10: pytest.approx(0.75 * size**0.5)}
    assert found["update_norm"] == {10: pytest.approx(0.5 * 0.75 * size**0.5)}
    assert found["gradient_variance"] == {10: pytest.approx(0.5 * size)}
    assert found["gradient_product"] == {10: pytest.approx(-0.25 * 0.75 * size)}


def observed(taken: Observer) -> dict[str, dict[int, float]]:
    """By name and step, what a record would hold."""
    from phasewatch.record.trace import unpack

    body = taken.block()
    found = unpack([] if body is None else [json.loads(json.dumps(body))])
    return {name: dict(zip(s.tolist(), v.tolist(), strict=True)) for name, (s, v) in found.items()}


def test_the_noise_scale_of_gradients_that_are_drawn() -> None:
    """The loss θ·x has the gradient x whatever θ is: here 2 e + 1.5 ξ in 40 dimensions."""
    weights = nn.Parameter(torch.zeros(40))
    optimizer = torch.optim.SGD([weights], lr=1e-3)
    taken, drawn = Watch.observe, torch.Generator().manual_seed(3)
    watch = watching()
    for step in range(4000):
        optimizer.zero_grad()
        inputs = 1.5 * torch.randn(40, generator=drawn)
        inputs[0] += 2
        (weights @ inputs).backward()
        taken(watch, step, optimizer)
        optimizer.step()
    found = watch_closed(watch)
    pairs = len(found["gradient_product"].steps)
    assert pairs > 390
    # one g·g' scatters by (2 · 2² · 1.5² + 40 · 1.5⁴)^½ = 14.9 about 4
    scale = noise_scale(found, window=pairs).values[-1]
    assert scale == pytest.approx(40 * 1.5**2 / 4, rel=3 * 14.9 / 4 / pairs**0.5)


def test_sparse_gradients() -> None:
    table = nn.Embedding(50, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    taken, expected = Observer(), math.nan
    for step in range(12):
        optimizer.zero_grad()
        table(torch.tensor([1, 1, step])).square().sum().backward()
        if step == 10:
            assert table.weight.grad is not None
            expected = table.weight.grad.to_dense().norm().item()
        taken.take(step, {}, optimizer)
        optimizer.step()
    found = observed(taken)
    assert found["gradient_norm"] == {10: pytest.approx(expected)}
    assert not taken.errors()


def test_several_optimizers_and_groups() -> None:
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(9))
    one = torch.optim.SGD([first], lr=0.1)
    two = torch.optim.SGD([{"params": [second]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.2)
    taken = Observer()
    taken.expect([one, two])
    for step in range(11):
        first.grad, second.grad = torch.ones(4), torch.ones(9)
        if step == 3:
            two.param_groups[1]["lr"] = 0.5
        taken.take(step, {}, two)
        taken.take(step, {}, one)
    found = observed(taken)
    assert set(found["learning_rate"].values()) == {np.float32(0.1)}
    assert set(found["learning_rate_1"].values()) == {np.float32(0.2)}
    assert found["learning_rate_1_group_1"] == {step: 0.5 for step in range(3, 11)}
    assert (found["gradient_norm"], found["gradient_norm_1"]) == ({10: 2.0}, {10: 3.0})


class Elsewhere(torch.Tensor):
    """A tensor as on a GPU, as far as can be told apart without one: its value cannot be had."""

    is_cpu = False  # type: ignore[assignment]

    def item(self) -> Any:
        raise AssertionError("waited for the device")

    __float__ = __bool__ = tolist = item  # type: ignore[assignment]


def test_a_device_is_not_waited_for_until_a_block_is_written() -> None:
    taken = Observer()
    loss = torch.zeros(()).as_subclass(Elsewhere)
    for step in range(2500):
        loss.copy_(torch.tensor(step / 4))  # memory that is used again
        taken.take(step, {"loss": loss, "other": 1.0})
    found = observed(taken)
    assert found["loss"] == {step: step / 4 for step in range(2500)}
    taken.take(2500, {"loss": loss})
    taken.take(2501, {"loss": 7.0})
    assert observed(taken)["loss"] == {2500: 2499 / 4, 2501: 7.0}


def test_a_device_that_fails_costs_only_what_is_on_it(tmp_path: Path) -> None:
    watch = watching(directory=tmp_path, on_error="warn")
    for step in range(20):
        watch.observe(step, lost=torch.zeros((), device="meta"), loss=1.0)
    with pytest.warns(UserWarning, match="observing lost failed"):
        watch.state_dict()
        watch.observe(20, loss=2.0)
    watch.close()
    run = load_run(tmp_path)
    assert run.observed.keys() == {"loss"} and len(run.observed["loss"].steps) == 21


def on_a_clock(monkeypatch: pytest.MonkeyPatch, reading: float, adding: float) -> tuple[list[float], torch.optim.SGD]:
    """A clock that goes on by what reading norms and adding a value take, and an optimizer with gradients."""
    now = [0.0]
    monkeypatch.setattr(observer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    read = updates.UpdateReader.read

    def slowly(self: Any, *arguments: Any) -> Any:
        now[0] += reading
        return read(self, *arguments)

    monkeypatch.setattr(updates.UpdateReader, "read", slowly)
    monkeypatch.setattr(Observer, "_add", lambda self, *_: now.__setitem__(0, now[0] + adding))
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    return now, torch.optim.SGD([parameter], lr=0.0)


def test_everything_together_keeps_to_its_share(limited: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 ms, norms of 250 µs, all else 4 µs a step; then steps of 200 ms."""
    now, optimizer = on_a_clock(monkeypatch, reading=1.2e-4, adding=2e-6)
    taken = Observer()
    for step in range(20_000):
        now[0] += 2e-3
        taken.take(step, {"loss": 1.0}, optimizer)
    assert taken.training_seconds == pytest.approx(40.0, rel=1e-3)
    # 250 µs in 20 steps of 2 ms are .63 %, beside .2 % for the rest, counted for .3 %
    assert taken.interval == 20
    before = observer.FIRST_SECONDS / 0.007  # .7 % of which pay for the first read
    assert taken.seconds / taken.training_seconds == pytest.approx(0.002 + 0.00625 * (1 - before / 40), rel=0.01)
    for step in range(20_000, 24_000):
        now[0] += 0.2
        taken.take(step, {"loss": 1.0}, optimizer)
    assert taken.interval == 10
    assert taken.seconds / taken.training_seconds <= 0.01


def test_where_all_else_takes_the_share_the_norms_have_a_tenth_of_it(
    limited: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 1 ms, of which losses and learning rates take 20 µs, and norms of 200 µs."""
    monkeypatch.setattr(observer, "FIRST_SECONDS", 0.005)
    now, optimizer = on_a_clock(monkeypatch, reading=1e-4, adding=1e-5)
    taken = Observer()
    reads = []
    for step in range(20_000):
        now[0] += 1e-3
        taken.take(step, {"loss": 1.0}, optimizer)
        if taken._is_reading:
            reads.append(step)
    assert reads[0] == 5_000  # a tenth of 1 % pays for the first
    # 200 µs, and 10 µs for each of the five values, are a tenth of 1 % of 250 steps
    assert 15_000 / 500 <= len(reads) <= 15_000 / 200


def test_a_time_that_was_overspent_is_saved_again(limited: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two times the norms are read, the machine is busy: 40 ms each, beside steps of 2 ms."""
    now, calls = [0.0], [0]
    monkeypatch.setattr(observer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    read = updates.UpdateReader.read

    def slowly(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        now[0] += 0.02 if calls[0] <= 4 else 1e-4
        return read(self, *arguments)

    monkeypatch.setattr(updates.UpdateReader, "read", slowly)
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    parameter.grad = torch.ones(3)
    taken, overspent = Observer(), 0
    for step in range(40_000):
        now[0] += 2e-3
        reads = calls[0]
        taken.take(step, {"loss": 1.0}, optimizer)
        if calls[0] > reads and taken.seconds > 0.01 * taken.training_seconds:
            overspent += 1
    assert overspent <= 4  # the first two times, in two calls each: what they take is known afterwards
    assert taken.seconds <= 0.01 * taken.training_seconds
    assert calls[0] > 200 and taken.interval in (10, 20)  # 200 µs are just the share of ten steps


def test_time_spent_measuring_is_no_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(observer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    taken, measuring = Observer(), 0.0
    for step in range(10):
        now[0] += 1.0
        if step == 5:
            now[0] += 100.0
            measuring += 100.0
        taken.take(step, {"loss": 0.0}, None, measuring)
    assert taken.training_seconds == pytest.approx(9.0)


def test_clocks_that_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour ahead, as on a machine that slept, and two back: training takes no less than nothing."""
    now = [0.0]
    monkeypatch.setattr(observer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    taken = Observer()
    for step in range(200):
        now[0] += 1.0 + (3_600.0 if step == 50 else -7_200.0 if step == 120 else 0.0)
        taken.take(step, {"loss": float(step)})
    assert taken.training_seconds == pytest.approx(198.0 + 3_600.0)
    assert observed(taken)["loss"] == {step: float(step) for step in range(200)}


def test_of_steps_that_are_left_out_each_counts_and_those_that_begin_anew_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only what activity looks at is taken; a user counts the steps of each epoch from 0."""
    monkeypatch.setattr(observer, "SHARE", 1e-9)
    monkeypatch.setattr(observer, "ASKING", 0.0)
    monkeypatch.setattr(observer, "THINNED_ANEW", 2)
    taken = Observer(SimpleNamespace(every=lambda _: 4, take=lambda *_: None, take_rates=lambda *_: None))  # type: ignore[arg-type]
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    for epoch in range(3):
        for step in range(200):
            if not taken.leaves_out(step, {"loss"}):
                taken.take(step, {"loss": torch.tensor(1_000.0 * epoch + step)}, optimizer)
    taken.take(200, {"loss": 0.0})
    assert taken._steps == 3 * 200 + 1 - 2 * 3  # of the three after the last one taken, in an epoch, nothing is known
    found = observed(taken)
    assert found["loss"] == {1: 1.0, 200: 0.0} | {step: 2_000.0 + step for step in range(0, 200, 4)}
    assert found["learning_rate"] == dict.fromkeys([0, 1, *range(4, 200, 4)], 0.5)


def test_what_is_held_for_a_while_stands_before_what_comes_after_it() -> None:
    """Of values for one step the last one counts, be it a number of its own or on a device."""
    taken = Observer()
    for value in (1.0, torch.tensor(2.0), torch.tensor(3.0).as_subclass(Elsewhere), torch.tensor(4.0), 5.0):
        for step in range(3):
            taken.take(step, {"loss": value})
    taken.take(1, {"loss": torch.tensor([6])})
    assert observed(taken)["loss"] == {0: 5.0, 1: 6.0, 2: 5.0}


def test_a_block_is_written_every_minute_and_at_every_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(observer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch = watching(directory=tmp_path, schedule=[0, 100, 130])
    lengths = []
    for step in range(151):
        watch.at(step)
        now[0] += 1.0
        watch.observe(step, loss=step)
        lengths.append(len(load_run(tmp_path).observed.get("loss", ([],))[0]))
    # at 60 seconds after the first, before the measurements at 100 and 130 (their own step is trained on after them)
    assert [k for k in range(1, 151) if lengths[k] != lengths[k - 1]] == [60, 100, 130]
    assert [lengths[k] for k in (59, 60, 100, 130)] == [0, 61, 100, 130]
    watch.close()
    assert load_run(tmp_path).observed["loss"].values.tolist() == list(range(151))
    assert [m.step for m in load_run(tmp_path).measurements] == [0, 100, 130]


KILLED = """
import sys, time
sys.path.insert(0, {here!r})
from test_observing import observer, watching
observer.SHARE = 1e9
watch = watching(directory={directory!r})
for step in range(16_384 + 300):
    watch.observe(step, loss=1 / (1 + step))
print("there", flush=True)
time.sleep(600)
"""


def test_kill_minus_nine_loses_the_last_block_at_most(tmp_path: Path) -> None:
    code = KILLED.format(here=str(Path(__file__).parent), directory=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = load_run(tmp_path).observed["loss"]
    assert found.steps.tolist() == list(range(16_384))
    np.testing.assert_array_equal(found.values, np.float32(1 / np.arange(1, 16_385)))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same directory", "another directory"])
def test_a_resumed_run_replaces_what_it_does_again(elsewhere: bool, tmp_path: Path) -> None:
    first = watching(directory=tmp_path / "first")
    for step in range(80):
        if step == 50:
            state = first.state_dict()
        first.observe(step, loss=step)
    first.state_dict()  # a later checkpoint, which wrote what came until then
    first._journal.close()  # as the end of the process does
    again = watching(directory=tmp_path / ("again" if elsewhere else "first"))
    again.load_state_dict(state)
    for step in range(50, 60):
        again.observe(step, loss=-step)
    again.close()
    found = load_run(tmp_path / ("again" if elsewhere else "first")).observed["loss"]
    assert found.steps.tolist() == list(range(60))
    assert found.values.tolist() == [*range(50), *range(-50, -60, -1)]


@pytest.mark.parametrize("in_memory", [False, True])
def test_checkpoints_do_not_grow(in_memory: bool, tmp_path: Path) -> None:
    watch = watching(directory=None if in_memory else tmp_path)
    sizes = []
    for step in range(3000):
        watch.observe(step, loss=step)
        if step in (1500, 2999):
            sizes.append(len(json.dumps(watch.state_dict())))
    assert sizes[1] - sizes[0] < 200 and sizes[1] < 8_000  # losses of as many steps would take more
    assert len(watch.run.observed["loss"].steps) == 3000


def test_a_step_without_a_loss_and_losses_that_are_not_finite() -> None:
    taken = Observer()
    given: list[Any] = [
        0.5,
        None,
        math.nan,
        torch.tensor(math.inf),
        -math.inf,
        np.float64(2.0),
        True,
        torch.tensor([3]),
    ]
    for step, loss in enumerate(given):
        taken.take(step, {"loss": loss})
    taken.take(len(given), {})
    found = observed(taken)["loss"]
    assert math.isnan(found.pop(2))
    assert found == {0: 0.5, 3: math.inf, 4: -math.inf, 5: 2.0, 6: 1.0, 7: 3.0}
    assert not taken.errors()


def test_repeated_and_decreasing_steps() -> None:
    taken = Observer()
    for step, loss in [(5, 1.0), (5, 2.0), (7, 3.0), (6, 4.0), (np.int64(8), 5.0), (0, 6.0)]:
        taken.take(step, {"loss": loss})
    assert observed(taken)["loss"] == {0: 6.0, 5: 2.0, 6: 4.0, 7: 3.0, 8: 5.0}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("0.5", "'0.5' was given; expected a number"),
        (torch.ones(3), r"a tensor of shape \(3,\) was given; expected one number"),
        (torch.ones(0), r"a tensor of shape \(0,\) was given"),
        (1j, "complex"),
        ({"a": 1}, "dict"),
        (torch.tensor(1j), "complex"),
    ],
    ids=str,
)
def test_what_is_no_number_is_told_once_and_costs_nothing_else(bad: Any, told: str, tmp_path: Path) -> None:
    watch = watching(directory=tmp_path, on_error="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(30):
            watch.observe(step, loss=step, odd=bad if step != 7 else 7.0)
        watch.close()
    assert len(caught) == 1 and "observing odd failed at step 0" in str(caught[0].message)
    run = load_run(tmp_path)
    assert run.observed["loss"].steps.tolist() == list(range(30))
    assert run.observed["odd"].steps.tolist() == [7]
    (failure,) = run.failures
    assert failure["what"] == "observing odd"
    with pytest.raises((TypeError, ValueError, RuntimeError), match=told):
        watching(on_error="raise").observe(0, odd=bad)


@pytest.mark.parametrize("step", [1.5, "3", None, -1, 2**63])
def test_what_is_no_step(step: Any) -> None:
    watch = watching(on_error="warn")
    with pytest.warns(UserWarning, match="observing step failed"):
        watch.observe(step, loss=1.0)
    watch.observe(3, loss=2.0)
    assert watch_closed(watch)["loss"].steps.tolist() == [3]


def test_a_flood_of_metrics_is_held_back_and_said() -> None:
    watch = watching(on_error="warn")
    with pytest.warns(UserWarning, match="'metric_199' is left out, and with it every other new name") as caught:
        for step in range(3):
            watch.observe(step, loss=1.0, **{f"metric_{k}": float(k) for k in range(1000)})
    assert len(caught) == 1
    found = watch_closed(watch)
    assert len(found) == 200 and all(len(own.steps) == 3 for own in found.values())


def test_metrics_may_have_any_name() -> None:
    watch = watching()
    watch.observe(1, **{"step": 2.0, "self": 3.0, "optimizer": 4.0, "val/acc top-5": 5.0})
    assert {name: own.values.tolist() for name, own in watch_closed(watch).items()} == {
        "step": [2.0],
        "self": [3.0],
        "optimizer": [4.0],
        "val/acc top-5": [5.0],
    }


def test_norms_that_cannot_be_read_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    watch = watching(module, on_error="warn")
    monkeypatch.setattr(updates, "_norm", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="observing the norms of optimizer failed") as caught:
        train(module, torch.optim.SGD(module.parameters(), lr=0.1), watch, 35)
    assert len(caught) == 1
    found = watch_closed(watch)
    assert found.keys() == {"loss", "learning_rate"} and len(found["loss"].steps) == 35


def test_nothing_is_observed_after_the_end(tmp_path: Path) -> None:
    watch = watching(directory=tmp_path)
    watch.observe(0, loss=1.0)
    watch.close()
    watch.observe(1, loss=1.0)
    watch.state_dict()
    run = load_run(tmp_path)
    assert run.finished and run.observed["loss"].steps.tolist() == [0]


@pytest.mark.parametrize("drops", [False, True])
def test_the_detector_of_a_watch_sees_the_loss_at_every_step_and_what_befell_the_run(
    tmp_path: Path, drops: bool
) -> None:
    """Flagged live, in a run cut in two, as the final analysis finds it."""
    loss = 1.0 - 0.3 * (np.arange(1_200) >= 645) + 0.05 * np.random.default_rng(0).standard_normal(1_200)

    def go_on(watch: Watch, steps: range) -> None:
        for step in steps:
            watch.at(step)
            watch.observe(step, loss=float(loss[step]), learning_rate=0.01 if drops and step >= 645 else 0.1)

    first = watching(directory=tmp_path / "first", schedule=50)
    go_on(first, range(660))
    second = watching(directory=tmp_path / "second", schedule=50)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    go_on(second, range(660, 1_200))
    second.close(1_200)
    [live] = second.transitions
    [found] = analyze_run(load_run(tmp_path / "second")).transitions
    assert abs(live.step - 644.5) <= 2 and abs(found.step - 644.5) <= 2
    assert live.kind == found.kind == ("learning-rate drop" if drops else "loss falls")
    assert live.flagged_at is not None and live.flagged_at <= 800
