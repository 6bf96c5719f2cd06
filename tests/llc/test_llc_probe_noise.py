"""What the choice of the probe takes off lambda, against minima of many probes; and what follows for nbeta."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import batched, cross_entropy, half_squared_error, linear_network, logistic_regression, noisy_regression
from torch import Tensor, nn

from phasewatch.hessian import GaussNewtonOperator
from phasewatch.llc import estimate_llc, pilot_descent
from phasewatch.llc.newton import newton_step
from phasewatch.llc.probe_noise import probe_noise
from phasewatch.objective import Objective

SHORT = {"chains": 4, "draws": 600, "burn_in": 200}


def samples_of(objective: Objective) -> tuple[Tensor, Tensor]:
    """All inputs and targets."""
    inputs, targets = (torch.cat([batch[k] for batch in objective.batches]) for k in (0, 1))
    return inputs, targets


def subset(objective: Objective, size: int, batch_size: int, seed: int, loss_fn: object) -> Objective:
    """A probe: some of the samples, at the same weights."""
    x, y = samples_of(objective)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]
    return batched(objective.module, x[chosen], y[chosen], loss_fn, batch_size)  # type: ignore[arg-type]


@pytest.fixture(params=["all", "two"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that keep all of their bases, and those of networks that are too large for that."""
    if request.param == "two":
        monkeypatch.setattr("phasewatch.llc.probe_noise.ALL_KEPT", 0)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("classes", [False, True])
def test_the_predicted_fall_is_that_of_probes(classes: bool) -> None:
    """At the minimum of 2,000 samples, 16 probes of 500 of them each fall to minima of their own.

    Their mean is known to 7 %, and so is the prediction's: 4 standard errors of the difference, P(fail) < 1e-3.
    """
    whole = (
        logistic_regression(8, 4, seed=3, samples=2_000) if classes else noisy_regression(9, 3, seed=3, samples=2_000)
    )
    loss_fn = cross_entropy if classes else half_squared_error
    nbeta = 2_000 / math.log(2_000)
    probes = [subset(whole, 500, 125, seed, loss_fn) for seed in range(16)]
    falls = np.array([pilot_descent(probe, nbeta, 1.0, seed=seed).fall for seed, probe in enumerate(probes)])
    noises = [probe_noise(probe, 2_000, 1.0, nbeta, seed=seed) for seed, probe in enumerate(probes)]
    predicted = np.array([noise.fall(nbeta) for noise in noises])
    error = math.hypot(falls.std(ddof=1), predicted.std(ddof=1)) / 4
    assert error < 0.15 * falls.mean()
    assert abs(falls.mean() - predicted.mean()) < 4 * error
    # The model realizes the data: (nbeta / m) lambda, and a quarter of the samples are in the probe.
    assert predicted.mean() == pytest.approx(nbeta / 500 * 0.75 * 27 / 2, rel=0.25)


@pytest.mark.usefixtures("kept")
def test_quadratic_part_against_the_eigenvalues() -> None:
    """Of linear regression, whose Gauss-Newton matrix is known."""
    objective = noisy_regression(12, 5, seed=5, samples=1_000)
    x, _ = samples_of(objective)
    eigenvalues = torch.linalg.eigvalsh((x.T @ x / len(x)).double()).repeat(5)
    for nbeta in (3.0, 100.0):
        noise = probe_noise(objective, 1_000, 10.0, nbeta)
        expected = float((eigenvalues / (eigenvalues + 10.0 / nbeta)).sum() / 2)
        assert noise.quadratic(nbeta) == pytest.approx(expected, rel=0.1)


@pytest.mark.usefixtures("kept")
def test_quadratic_part_where_nearly_all_is_fitted() -> None:
    """A confident network in single precision, whose curvature lies below the rounding of its gradient's differences.

    Against all eigenvalues in double precision; two vectors know it to 15 %, thrice: P(fail) < 1e-2, and the seed is
    fixed.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 5))
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    objective = Objective(module, [(x, y)], loss_fn=cross_entropy)
    assert objective.mean_loss < 1e-3
    eigenvalues = torch.linalg.eigvalsh(GaussNewtonOperator(objective.to(torch.float64)).dense()).clamp(min=0)
    for nbeta in (1e3, 1e5):
        expected = float((eigenvalues / (eigenvalues + 10.0 / nbeta)).sum() / 2)
        found = probe_noise(objective, 64, 10.0, nbeta).quadratic(nbeta)
        assert found == pytest.approx(expected, rel=0.45)


@pytest.mark.usefixtures("kept")
def test_a_long_probe_is_judged_from_a_few_of_its_batches() -> None:
    """What 5 of 16 batches say of a probe, against the whole of it as one batch.

    Where one of four batches of 24 samples each has 1.4 times too much room: left to themselves four batches miss by
    up to a fifth. Six seeds, each known to 15 % either way.
    """
    ratios = []
    for seed in range(6):
        whole = logistic_regression(12, 5, seed=seed, samples=6_000)
        x, y = (part[:384] for part in samples_of(whole))
        alone, split = (batched(whole.module, x, y, cross_entropy, size) for size in (384, 24))
        found, expected = (
            probe_noise(probe, 6_000, 1.0, 870.0, share=0.05, seed=seed).bearable(870.0, 0.05)
            for probe in (split, alone)
        )
        ratios.append(found / expected)
        assert split.num_batches == 16
    assert np.mean(ratios) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_what_rounding_makes_is_no_curvature(seed: int) -> None:
    """Where nothing holds, what the loss does not see counts for nothing: half of it, with each input twice.

    The quadratic part is 6, and the fall of a regular model nbeta / m times that; four vectors say the first to .9,
    four draws the second to 20 %.
    """
    objective = noisy_regression(4, 3, seed=2, samples=500)
    x, y = samples_of(objective)
    module = nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(objective.parameters.view(3, 4).repeat(1, 2) / 2)
    twice = batched(module, torch.cat([x, x], 1), y, half_squared_error, 500)
    noise = probe_noise(twice, 10**6, 0.0, 100.0, seed=seed)
    assert noise.quadratic(100.0) == pytest.approx(6, abs=2.7)
    assert noise.fall(100.0) == pytest.approx(100 / 500 * 6, rel=0.8)


def test_what_the_loss_sees_past_the_outputs_counts() -> None:
    """Weight decay written into the loss adds to every eigenvalue."""
    objective = noisy_regression(12, 5, seed=5, samples=1_000)
    x, y = samples_of(objective)

    def decayed(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return half_squared_error(module, batch) + 0.05 * sum(p.square().sum() for p in module.parameters())

    eigenvalues = torch.linalg.eigvalsh((x.T @ x / len(x)).double()).repeat(5) + 0.1
    found = probe_noise(Objective(objective.module, [(x, y)], loss_fn=decayed), 1_000, 10.0, 30.0).quadratic(30.0)
    assert found == pytest.approx(float((eigenvalues / (eigenvalues + 10.0 / 30.0)).sum() / 2), rel=0.1)


def test_the_noise_of_a_loss_that_sees_more_than_the_outputs() -> None:
    """A weight decay of next to nothing changes next to nothing of it."""
    objective = noisy_regression(6, 2, seed=5, samples=200)

    def decayed(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return half_squared_error(module, batch) + 1e-9 * sum(p.square().sum() for p in module.parameters())

    falls = [
        probe_noise(Objective(objective.module, objective.batches, loss_fn=loss_fn), 10_000, 10.0, 30.0).fall(30.0)
        for loss_fn in (half_squared_error, decayed)
    ]
    assert falls[0] > 0.1
    assert falls[1] == pytest.approx(falls[0], rel=1e-3)


@pytest.mark.parametrize("unit", [1e-24, 1e24])
def test_units_of_the_loss(unit: float) -> None:
    """They change nothing, however small or large the squares of its slopes are in single precision."""
    objective = noisy_regression(6, 2, seed=5, samples=200)

    def in_units(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return unit * half_squared_error(module, batch)

    scaled = Objective(objective.module, objective.batches, loss_fn=in_units)
    expected, found = (
        probe_noise(probe, 10_000, 10.0, nbeta) for probe, nbeta in ((objective, 30.0), (scaled, 30.0 / unit))
    )
    assert found.quadratic(30.0 / unit) == pytest.approx(expected.quadratic(30.0), rel=1e-3)
    assert found.fall(30.0 / unit) == pytest.approx(expected.fall(30.0), rel=1e-3)


def test_no_noise() -> None:
    """Where the model fits every sample, and where the probe is all there is, nbeta is not limited."""
    fitted = linear_network([5, 3, 5], 2, seed=1, samples=300, batch_size=100)
    noise = probe_noise(fitted, 1_000_000, 10.0, 1e5, share=0.05)
    assert noise.fall(1e5) < 1e-6
    assert noise.bearable(1e5, 0.05) == 1e5
    whole = noisy_regression(6, 2, seed=1, samples=1_000)
    assert probe_noise(whole, 1_000, 10.0, 1e5, share=0.05).bearable(1e5, 0.05) == 1e5
    assert probe_noise(whole, 2_000, 10.0, 1e5, share=0.05).bearable(1e5, 0.05) < 100


def test_nbeta_is_what_the_probe_bears() -> None:
    """512 samples for 60,000, at the minimum of many more: lambda is d / 2 there and said to be limited.

    4 standard errors, and the twentieth that the probe's own minimum may be lower, thrice: P(fail) < 1e-2.
    """
    whole = noisy_regression(8, 3, seed=2, samples=60_000, batch_size=6_000)
    probe = subset(whole, 512, 512, 0, half_squared_error)
    estimate = estimate_llc(probe, n=60_000, localization=0.3, seed=0, **SHORT)
    full = 60_000 / math.log(60_000)
    assert estimate.nbeta == pytest.approx(0.05 * 512, rel=0.5)  # the model realizes the data: the fall is nbeta / m
    assert estimate.noise_descent == pytest.approx(0.05 * estimate.quadratic, rel=1e-3)
    (note,) = estimate.notes
    assert note.startswith("limited by the probe") and f"{full:.3g}" in note and note in repr(estimate)
    lost = 4 * estimate.standard_error + 0.15 * 12
    assert abs(estimate.learning_coefficient - estimate.quadratic) < lost
    assert estimate.reliable, estimate


def test_a_given_nbeta_is_kept() -> None:
    """And what the probe makes of it is said: nothing to sample at 10 lambda, too little where noise takes a fifth."""
    whole = noisy_regression(8, 3, seed=2, samples=60_000, batch_size=6_000)
    probe = subset(whole, 512, 512, 0, half_squared_error)
    far = estimate_llc(probe, n=60_000, nbeta=5_450.0, seed=0, **SHORT)
    assert far.nbeta == 5_450 and far.draws == 0 and not far.notes
    assert far.noise_descent == pytest.approx(5_450 / 512 * 12, rel=0.4)
    near = estimate_llc(whole, n=10**9, nbeta=0.2 * 60_000, seed=0, **SHORT)
    assert near.nbeta == 12_000 and near.draws > 0
    assert any("limited by the probe" in reason for reason in near.reasons)


def test_outputs_that_cannot_be_seen() -> None:
    """Nothing is known of the noise; half the number of parameters stands for the quadratic part."""

    class LossInside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight + self.bias).square().mean()

    torch.manual_seed(0)
    estimate = estimate_llc(Objective(LossInside(), [torch.randn(50, 3)], loss_fn=lambda m, b: m(b)), n=5_000, **SHORT)
    assert math.isnan(estimate.noise_descent) and estimate.quadratic == 2 and not estimate.notes
    assert estimate.nbeta == pytest.approx(5_000 / math.log(5_000))
    assert abs(estimate.learning_coefficient - 2) < 4 * estimate.standard_error + 0.05


def test_no_second_derivative() -> None:
    """Likewise; the chains need first derivatives alone."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return slope

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(super().forward(x))

    torch.manual_seed(0)
    module, x = Model(3, 2, bias=False), torch.randn(400, 3)
    batch = x, module(x).detach()
    estimate = estimate_llc(Objective(module, [batch], loss_fn=half_squared_error), seed=0, **SHORT)
    assert math.isnan(estimate.noise_descent) and estimate.quadratic == 3
    assert abs(estimate.learning_coefficient - 3) < 4 * estimate.standard_error + 0.1


@pytest.mark.parametrize("away", [0.0, 0.3])
def test_a_step_of_newton_goes_to_the_bottom_of_a_quadratic_loss(away: float) -> None:
    """As far as the closed form says, in four distinct curvatures; not at all from the bottom itself."""
    objective = noisy_regression(4, 3, seed=2, samples=1_000)
    x, y = samples_of(objective)
    module = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(objective.parameters.view(3, 4) + away)
    moved = batched(module, x, y, half_squared_error, 250)
    curvature, slope = torch.kron(torch.eye(3), x.T @ x / len(x)).double(), moved.gradient().double()
    step = -torch.linalg.solve(1_000.0 * curvature + 10.0 * torch.eye(12), 1_000.0 * slope)
    expected = -1_000.0 * float(slope @ step + step @ curvature @ step / 2)
    found = newton_step(moved, GaussNewtonOperator(moved), 1_000.0, 10.0, enough=1e9)
    assert found.fall == pytest.approx(expected, rel=0.01, abs=0.01)
    assert found.distance == pytest.approx(float(step.norm()), rel=0.02, abs=0.01)


def test_a_step_of_newton_where_the_slope_has_no_square() -> None:
    """In single precision; as beside the saddle at which a deep network of small weights starts."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    objective = Objective(module, [(torch.ones(2, 1), torch.full((2, 1), 1e-18))], loss_fn=half_squared_error)
    found = newton_step(objective, GaussNewtonOperator(objective), 1e-6, 1e6, enough=1.0)
    assert found.fall == 0.0
    found = newton_step(objective, GaussNewtonOperator(objective), 1e-6, 0.0, enough=1.0)
    assert found.fall == pytest.approx(1e-6 * objective.mean_loss, rel=1e-3, abs=0.0)


def test_a_step_of_newton_to_where_the_model_refuses_to_go() -> None:
    """A normal distribution of too large a scale: all of the step would go below zero, a part goes down."""

    class WithScale(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1)
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.scale.expand(len(x), 1)

    def likelihood(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        mean, scale = module(batch[0])
        return -torch.distributions.Normal(mean, scale, validate_args=True).log_prob(batch[1]).mean()

    torch.manual_seed(0)
    x = torch.randn(60, 2)
    module = WithScale()
    with torch.no_grad():
        module.weight.copy_(torch.ones(1, 2))
    objective = Objective(module, [(x, x.sum(1, keepdim=True) + 0.01 * torch.randn(60, 1))], loss_fn=likelihood)
    slope = objective.unflatten(objective.gradient())["scale"]
    matrix = torch.eye(objective.num_parameters)
    found = newton_step(objective, matrix, 1_000.0, 0.0, enough=1e9)
    assert float(slope) > 0.5
    assert 0 < found.fall and found.distance < 0.5


def test_outputs_of_several_tokens_flattened_into_one_axis_are_those_of_their_samples() -> None:
    """The same numbers whether the module gives 16 x 8 x 5 outputs or 128 x 5."""

    class PerToken(nn.Module):
        def __init__(self, flat: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.flat = flat
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            outputs = self.head(x)
            return outputs.flatten(0, 1) if self.flat else outputs

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]).reshape(-1, 5), batch[1].reshape(-1))

    batch = torch.randn(16, 8, 3), torch.randint(5, (16, 8))
    falls = [
        probe_noise(Objective(PerToken(flat), [batch], loss_fn=loss_fn), 1_000, 10.0, 100.0).fall(100.0)
        for flat in (False, True)
    ]
    assert falls[0] > 0
    assert falls[1] == pytest.approx(falls[0], rel=1e-5)
