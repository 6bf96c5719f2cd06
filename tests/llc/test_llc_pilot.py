"""Whether there is anything to sample: descents in closed form, minima that stay, saddles and slopes that do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import (
    Parameters,
    batched,
    cross_entropy,
    half_squared_error,
    linear_network,
    logistic_regression,
    monomial,
    noisy_bottleneck,
    noisy_regression,
    two_linear_layers,
)
from torch import Tensor, nn

from phasewatch import Watch, estimate_llc
from phasewatch.analysis import analyze_run
from phasewatch.estimators import LearningCoefficient
from phasewatch.llc import Thresholds, pilot_descent
from phasewatch.llc import estimate as estimating
from phasewatch.objective import Objective

NBETA = 1_000.0


@pytest.mark.parametrize("localization", [0.3, 10.0, 300.0])
def test_fall_in_closed_form(localization: float) -> None:
    """A quadratic loss, held: the minimum is where nbeta times the slope meets the pull back to w*."""
    objective = noisy_regression(6, 2, seed=1, samples=1_000)
    x, y = (torch.cat([batch[k] for batch in objective.batches]).double() for k in (0, 1))
    module = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(objective.parameters.view(2, 6) + 0.3)
    moved = batched(module, x, y, half_squared_error, 250)
    curvature = torch.kron(torch.eye(2), x.T @ x / len(x))
    slope = moved.gradient().double()
    step = -torch.linalg.solve(NBETA * curvature + localization * torch.eye(12), NBETA * slope)
    expected = -NBETA * float(slope @ step + step @ curvature @ step / 2)
    pilot = pilot_descent(moved, NBETA, localization)
    assert pilot.fall == pytest.approx(expected, rel=0.01)
    assert pilot.distance == pytest.approx(float(step.norm()), rel=0.05)
    assert pilot.converged and pilot.gradients <= 41 * 4


MINIMA: dict[str, Callable[[], Objective]] = {
    "regular": lambda: noisy_regression(12, 5, seed=5),
    "classes": lambda: logistic_regression(10, 5, seed=7),
    "bottleneck": lambda: noisy_bottleneck(5, 2, 6, seed=2),
    "deep": lambda: linear_network([8] * 7, 4, seed=1),
    "unequal inputs": lambda: linear_network([6, 4, 6], 3, seed=3, input_scales=(0.3, 2.0)),
    "nothing learnt": lambda: linear_network([5, 5, 5, 5], 0, seed=0),
    "layers beyond the product": lambda: two_linear_layers(5, 4, 6, 3, 2, 1, seed=4),
    "crossing": lambda: monomial((2, 3)),
}


@pytest.mark.parametrize("case", MINIMA)
def test_minima_stay(case: str) -> None:
    """From everywhere that the first step leads, the descent comes back to the loss of w*."""
    objective = MINIMA[case]()
    for seed, localization in enumerate([0.3, 0.3, 10.0, 10.0]):
        pilot = pilot_descent(objective, NBETA, localization, seed=seed)
        assert pilot.fall < 0.01
        assert pilot.converged and pilot.gradients <= 41 * objective.num_batches


def at_a_saddle(widths: list[int], start: float) -> Objective:
    """Linear layers, all weights ``start`` times a standard normal, for targets of three strengths."""
    torch.manual_seed(0)
    layers = [nn.Linear(before, after, bias=False) for before, after in zip(widths, widths[1:], strict=False)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=start)
    x = torch.randn(1_000, widths[0])
    y = x[:, :3] * torch.tensor([4, 1.5, 0.6])
    return Objective(nn.Sequential(*layers), [(x, y)], loss_fn=half_squared_error)


@pytest.mark.parametrize("widths", [[6, 6, 3], [4, 8, 4, 3]])
@pytest.mark.parametrize("start", [0.0, 0.001])
def test_saddles_are_left(widths: list[int], start: float) -> None:
    """The slope is 0, or next to it: all but a tenth of what there is to learn is found all the same."""
    objective = at_a_saddle(widths, start)
    pilot = pilot_descent(objective, NBETA, 10.0)
    assert pilot.fall > 0.9 * NBETA * float(objective.loss())


@pytest.mark.parametrize("seed", range(4))
def test_a_start_that_is_itself_held_is_left(seed: int) -> None:
    """Three layers near zero: a shallow minimum of the held loss, from which chains fall by nearly all there is."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.1)
    centers = 2 * torch.randn(5, 20)
    labels = torch.arange(500) % 5
    objective = Objective(network, [(centers[labels] + torch.randn(500, 20), labels)], loss_fn=cross_entropy)
    assert pilot_descent(objective, 500 / math.log(500), 10.0, seed=seed).fall > 20


def test_losses_without_a_floor_or_with_holes() -> None:
    """It ends; what is not finite is not taken."""

    def bare(function: Callable[[Tensor], Tensor]) -> Objective:
        return Objective(
            Parameters([0.1, 0.1]), [torch.zeros(1)], loss_fn=lambda m, b: function(m.values) + 0 * b.sum()
        )

    falling = pilot_descent(bare(lambda w: -w.pow(4).sum()), NBETA, 1.0)
    assert falling.fall > 1e3
    walled = pilot_descent(bare(lambda w: torch.where(w[0] < 0, torch.nan, w.square().sum())), NBETA, 1.0)
    assert 0 < walled.fall <= NBETA * 0.02 * 1.001
    flat = pilot_descent(bare(lambda w: 0 * w.sum()), NBETA, 0.0)
    assert flat.fall == 0


def test_nothing_is_sampled_away_from_a_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler is not called, and hardly anything spent; lambda is unknown and says why. Its twin is sampled."""
    there = linear_network([5, 3, 5], 2, seed=1, samples=1_000)
    x, y = (torch.cat([batch[k] for batch in there.batches]) for k in (0, 1))
    module = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 5, bias=False))
    nn.utils.vector_to_parameters(0.7 * there.parameters, module.parameters())
    short = {"chains": 2, "draws": 100, "burn_in": 50}
    calls = []
    sample = estimating.sample_hmc
    monkeypatch.setattr(estimating, "sample_hmc", lambda *args, **kwargs: calls.append(0) or sample(*args, **kwargs))
    estimate = estimate_llc(batched(module, x, y, half_squared_error, 500), **short)
    assert not calls and estimate.draws == 0 and estimate.gradients <= 2 * (4 * 16 + 1 + 41)
    assert math.isnan(estimate.learning_coefficient) and math.isnan(estimate.free_energy)
    assert not estimate.reliable and "nbeta L falls by" in estimate.reasons[0]
    assert "not near a minimum" in repr(estimate)
    assert estimate_llc(there, **short).draws > 0 and len(calls) == 1
    anyway = estimate_llc(batched(module, x, y, half_squared_error, 500), thresholds=Thresholds(descent=9e9), **short)
    assert anyway.draws > 0 and not anyway.reliable


def test_a_run_that_never_reaches_a_minimum() -> None:
    """Lambda is recorded as unknown with the reason, nothing is detected in it, and the run can be looked at."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(400, 3)
    batch = (x, 3 * torch.sin(3 * x[:, :2]))
    watch = Watch(
        network,
        [batch],
        loss_fn=half_squared_error,
        estimators=[LearningCoefficient(chains=2, draws=20, burn_in=20, refined=("2",))],
        schedule=1,
        on_error="raise",
    )
    for step in range(12):
        assert watch.at(step) is not None
    series = watch.run.series("llc")
    assert not any(series.reliable) and all(math.isnan(value) for value in series.values)
    assert "falls by" in watch.run.measurements[0].estimates["llc"].doubts[0]
    assert watch.run.measurements[0].estimates["llc_rhat"].doubts == ("nothing was sampled",)
    assert not analyze_run(watch.run).transitions
