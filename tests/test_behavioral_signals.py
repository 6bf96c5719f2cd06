"""The learning coefficient of the function as signals of a run: names, parts, other data, what cannot be measured."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import bisect, brentq
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gaussian_nll_loss, multi_margin_loss, softplus

from phasewatch import Objective, Watch, estimate_behavioral_llc
from phasewatch.estimators import BehavioralCoefficient, LearningCoefficient, SymmetryLedger
from phasewatch.estimators.behavioral import DENSE_BELOW, OUTPUTS_DENSE_BELOW
from phasewatch.estimators.enough import enough
from phasewatch.hessian import HessianOperator, NoCurvatureError, NoSecondDerivativeError, effective_rank
from phasewatch.llc import prior_spread
from phasewatch.measure import Probe, measure, seed_at
from phasewatch.objective import NoOutputsError
from phasewatch.record.signals import LLC_COARSE

MOVES: dict[str, Any] = {"chains": 2, "draws": 32, "burn_in": 20}
COEFFICIENTS = ("llc_behavioral_coarse", "llc_behavioral")


def half_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()


def drawn(rows: int, batches: int = 1, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 3, generator=generator), torch.randn(rows, 2, generator=generator)) for _ in range(batches)
    ]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def read(estimator: BehavioralCoefficient, objective: Objective) -> dict[str, Any]:
    return dict(estimator.read(objective, 500, 0).estimates)


def test_parts_and_other_data_are_series_of_their_own() -> None:
    """Each is what the estimator says of it by itself."""
    module, probe, validation = network(), drawn(15, 2), drawn(15, 2, seed=1)
    watch = Watch(
        module,
        probe,
        loss_fn=half_squared_error,
        n=500,
        estimators=[BehavioralCoefficient(**MOVES, refined=("0", "*.bias"))],
        other_data={"validation": validation},
        schedule=1,
        on_error="raise",
    )
    found = watch.at(0)
    assert found is not None
    for suffix, batches, part in (
        ("", probe, None),
        ("_0", probe, "0"),
        ("_*.bias", probe, "*.bias"),
        ("_validation", validation, None),
        ("_validation_0", validation, "0"),
    ):
        objective = Objective(module, batches, loss_fn=half_squared_error)
        objective = objective.restricted_to(part) if part else objective
        alone = estimate_behavioral_llc(objective, seed=seed_at(0, 0), **MOVES)
        for name, estimate in zip(COEFFICIENTS, alone, strict=True):
            assert found.value(name + suffix) == estimate.learning_coefficient, name + suffix
            assert found.estimates[name + suffix].standard_error == estimate.standard_error
            assert found.estimates[name + suffix].doubts == estimate.reasons
    assert {"misfit_change_validation", "description_length_validation"} <= found.estimates.keys()
    # What the outputs and the rank say belongs to the main probe alone.
    assert "effective_rank" in found.estimates and "effective_rank_validation" not in found.estimates
    assert "llc_outputs" in found.estimates and "llc_outputs_validation" not in found.estimates


@pytest.mark.parametrize(("rows", "too_small"), [(8, True), (512, False)])
def test_a_probe_of_a_few_samples_is_noted(rows: int, too_small: bool) -> None:
    """Eight samples hold 16 of the 30 directions that many samples hold, four of them 8."""
    torch.manual_seed(0)
    module = nn.Linear(15, 2, bias=False)
    batch = (torch.randn(rows, 15), torch.zeros(rows, 2))
    objective = Objective(module, [batch], loss_fn=half_squared_error)
    found = read(BehavioralCoefficient(**MOVES), objective)
    for name in COEFFICIENTS:
        notes = " ".join(found[name].notes)
        assert ("limited by the probe: half of it shows 5" in notes) == too_small, notes
        assert not any("probe" in doubt for doubt in found[name].doubts)


def test_without_chains_the_ranks_are_left_at_the_resolution_itself() -> None:
    """Each is what the products say by themselves; in the outputs they are those of the twin with chains."""
    objective = Objective(network(), drawn(30), loss_fn=half_squared_error)
    whole = BehavioralCoefficient(**MOVES, resolutions=(0.4, 0.02), nats_per_loss=4.0, refined=("0",))
    found, plain = read(replace(whole, sampled="none"), objective), read(whole, objective)
    assert "llc_behavioral" in plain and found.keys() < plain.keys()
    assert all(name.startswith("effective_rank") for name in found) and "probe_share" in plain
    assert all(found[name] == plain[name] for name in found if name.startswith("effective_rank_coarse"))
    # b where half the rank over b is the resolution, which is in units of the loss there
    values = np.linalg.eigvalsh(whitened(objective))
    for name, resolution in (("effective_rank_coarse", 0.4), ("effective_rank", 0.02)):
        b = brentq(lambda b, r=resolution: (values / (values * b + 1)).sum() / 2 - r / 4.0, 1e-6, 1e12)
        rank = (b * values / (1 + b * values)).sum()
        assert found[name].value == pytest.approx(rank, rel=1e-3) and found[name].reliable
        assert found[f"{name}_0"].value + found[f"{name}_2"].value == pytest.approx(rank, rel=1e-3)
    assert not read(replace(whole, sampled="none", data="validation"), objective)


def test_a_rank_is_doubted_where_all_is_fitted_and_no_quadratic_says_so() -> None:
    """A classifier so sure that a quadratic stays within the resolution over the whole prior, and it itself does not.

    What both say of the prior is found here from the outputs alone: twice the divergence is the sum of the squared
    motions of the logits under their covariance p (1 - p), and the divergence the relative entropy.
    """
    inputs = torch.cat([torch.eye(3) * 4, -torch.eye(3) * 4])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    module = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0] * 3, [-1.0] * 3]))
    objective = Objective(module, [(inputs, labels)], loss_fn=lambda m, b: cross_entropy(m(b[0]), b[1]))
    spread = float(prior_spread(objective).unique())
    moved = module.weight.detach() + spread * torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(1))
    sure, others = (torch.log_softmax(inputs @ w.mT, -1) for w in (module.weight.detach(), moved))
    divergences = (sure.exp() * (sure - others)).sum(-1).mean(-1)
    far, error = float(divergences.mean()), float(divergences.std()) / 8  # of the 64 draws that are made there
    p = sure.exp()[:, 0]
    near = float((p * (1 - p) * 2 * (4 * spread) ** 2).mean()) / 2
    resolution = math.sqrt(near * far)
    assert 2 * near < resolution < far / 2
    for sampled in ("none", "coarse"):
        estimator = BehavioralCoefficient(**MOVES, resolutions=(resolution, near / 10), sampled=sampled)
        found = read(estimator, objective)
        assert found["effective_rank_coarse"].value == 0.0
        (doubt,) = found["effective_rank_coarse"].doubts
        said, quadratic = (float(x) for x in re.findall(r"\d[\d.e-]*\d", doubt))
        assert abs(said - far) < 3 * error and quadratic == pytest.approx(near, rel=0.06)
        assert found["effective_rank"].reliable and found["effective_rank"].value > 1


@pytest.mark.parametrize("share", [0.3, 0.7, 1.5])
def test_a_rank_that_the_prior_bounds_is_believed_where_a_quadratic_holds(share: float) -> None:
    """Of a linear network, whose divergence is one: 0 where the whole prior is within the resolution."""
    module = nn.Linear(3, 2, bias=False)
    objective = Objective(module, drawn(60), loss_fn=half_squared_error)
    spread = prior_spread(objective).double()
    values = np.linalg.eigvalsh(spread[:, None] * HessianOperator(objective.to(torch.float64)).dense() * spread)
    resolution = float(values.sum()) / 2 / share
    estimator = BehavioralCoefficient(**MOVES, resolutions=(resolution, resolution / 100), sampled="none")
    found = read(estimator, objective)["effective_rank_coarse"]
    b = brentq(lambda b: (values / (values * b + 1)).sum() / 2 - resolution, 0, 1e6) if share > 1 else 0.0
    assert found.reliable and found.value == pytest.approx((b * values / (1 + b * values)).sum(), rel=1e-3)


@pytest.mark.parametrize("far", ["raises", "calls the network twice", "is not a number"])
def test_a_rank_is_doubted_where_the_prior_cannot_be_evaluated(far: str) -> None:
    """Near the weights all is well, and the other resolution is not touched by it."""
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.05)

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = module(batch[0])
        loss = 0.5 * outputs.square().sum(1).mean()
        if float(outputs.detach().abs().max()) < 1:
            return loss
        if far == "raises":
            raise RuntimeError("the factorization failed")
        if far == "calls the network twice":
            module(batch[0])
        return loss * math.nan

    objective = Objective(module, drawn(60), loss_fn=loss_fn)
    found = read(BehavioralCoefficient(resolutions=(30.0, 0.01), sampled="none"), objective)
    coarse, fine = found["effective_rank_coarse"], found["effective_rank"]
    assert coarse.value == 0.0 and "the prior is inf away" in coarse.doubts[0]
    assert fine.reliable and fine.value == pytest.approx(8, rel=0.02)


def test_a_prior_that_does_not_fit_into_the_memory_is_not_taken_for_far_away() -> None:
    """Then it is asked for again with less memory, or left out and said."""
    module = nn.Linear(3, 2)

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = module(batch[0])
        if float(outputs.detach().abs().max()) >= limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.5 * outputs.square().sum(1).mean()

    limit = math.inf
    objective = Objective(module, drawn(60), loss_fn=loss_fn)
    limit = 1.5 * float(module(drawn(60)[0][0]).detach().abs().max())
    with pytest.raises(torch.OutOfMemoryError):
        read(BehavioralCoefficient(resolutions=(30.0, 0.01), sampled="none"), objective)


@pytest.mark.parametrize("sampled", ["coarse", "none"])
def test_a_rank_is_doubted_where_lambda_is_as_the_loss_is_not_convex(sampled: Any) -> None:
    """A Gaussian whose variance is an output too: what the divergence is below zero for has no rank."""

    def gaussian(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        mean, variance = module(batch[0]).unbind(1)
        return gaussian_nll_loss(mean, batch[1][:, 0], softplus(variance))

    objective = Objective(network(), drawn(60), loss_fn=gaussian)
    found = read(BehavioralCoefficient(**MOVES, sampled=sampled), objective)
    for name in ("effective_rank_coarse", "effective_rank"):
        assert found[name].doubts[0] == objective.behavioral().doubts[0]
        assert "not convex" in found[name].doubts[0] and f"{name}_0" not in found
    assert sampled == "none" or "not convex" in found[LLC_COARSE].doubts[0]


@pytest.mark.parametrize("kind", ["has no second derivative", "jumps"])
def test_where_there_are_no_ranks_there_is_lambda(kind: str) -> None:
    """Chains need first derivatives only, the ranks in the outputs none of the loss."""

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = module(batch[0])
        if kind == "jumps":
            return half_squared_error(module, batch) + 0.01 * (outputs > 0).to(outputs).mean()
        return multi_margin_loss(outputs, batch[1].argmax(1))

    objective = Objective(network(), drawn(60), loss_fn=loss_fn)
    found = read(BehavioralCoefficient(**MOVES), objective)
    alone = estimate_behavioral_llc(objective, seed=0, **MOVES, precision=0.09)
    for name, estimate in zip(COEFFICIENTS, alone, strict=True):
        assert found[name].value == estimate.learning_coefficient > 0
    for name in ("effective_rank", "effective_rank_coarse"):
        assert math.isnan(found[name].value) and kind in found[name].doubts[0]
    assert found["llc_outputs"].value > 0
    with pytest.raises((NoSecondDerivativeError, NoCurvatureError), match=kind):
        read(BehavioralCoefficient(sampled="none"), objective)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_what_has_no_second_derivative_is_tried_once(on_error: Any) -> None:
    """It lies in how the loss is written; all else is measured at every step."""
    with pytest.warns(UserWarning, match="cannot be measured in this run.*no second derivative") as caught:
        watch = Watch(
            network(),
            drawn(30),
            loss_fn=lambda m, b: multi_margin_loss(m(b[0]), b[1].argmax(1)),
            estimators=[BehavioralCoefficient(sampled="none"), SymmetryLedger(dense_below=0)],
            schedule=1,
            on_error=on_error,
        )
        for step in range(3):
            assert watch.at(step) is not None
    assert len(caught) == 1  # for one reason
    assert [failure["what"] for failure in watch.run.failures] == ["llc_behavioral", "zeros"]
    assert watch.run.series("loss").steps.tolist() == [0, 1, 2]


def test_losses_without_curvature_have_no_rank() -> None:
    """Their Gauss-Newton matrix is zero. Where residuals change their sign an absolute error has a divergence."""
    estimator = BehavioralCoefficient(resolutions=(0.01, 0.001), sampled="none")
    kinked = Objective(network(), drawn(30), loss_fn=lambda m, b: (m(b[0]) - b[1]).abs().mean())
    for found in read(estimator, kinked).values():
        assert found.value == 0.0 and "no quadratic" in found.doubts[0]
    straight = Objective(network(), drawn(30), loss_fn=lambda m, b: m(b[0]).mean())
    with pytest.raises(NoOutputsError, match="linear in the network's outputs"):
        read(estimator, straight)


def test_coarse_chains_alone_are_those_of_both() -> None:
    """The same numbers to the bit; of the fine resolution there is the rank, and nothing that takes chains."""
    objective = Objective(network(), drawn(30), loss_fn=half_squared_error)
    both = BehavioralCoefficient(**MOVES, refined=("0",))
    found, plain = read(replace(both, sampled="coarse"), objective), read(both, objective)
    none = read(replace(both, sampled="none"), objective)
    ranks = [name for name in plain if name == "effective_rank" or name.startswith("effective_rank_")]
    at_fine = [name for name in ranks if "coarse" not in name]
    chained = [name for name in plain if name.startswith("llc_behavioral") and not name.startswith(LLC_COARSE)]
    assert found.keys() == plain.keys() - {*chained, "misfit_change", "description_length"}
    assert [found[name].value for name in at_fine] == [none[name].value for name in at_fine]
    others = found.keys() - at_fine
    assert {name: found[name] for name in others} == {name: plain[name] for name in others}
    other = read(replace(both, sampled="coarse", data="validation"), objective)
    assert other["llc_behavioral_coarse_validation"] == replace(plain[LLC_COARSE], notes=())
    assert not any(name.startswith("llc_behavioral_validation") for name in other)


def test_misspelt_chains_are_refused() -> None:
    with pytest.raises(ValueError, match="sampled is 'fine'; expected one of 'both', 'coarse', 'none'"):
        BehavioralCoefficient(sampled="fine")  # type: ignore[arg-type]


def whitened(objective: Objective) -> Any:
    """The Gauss-Newton matrix of half a squared error in units of the prior, from the outputs' Jacobian."""
    (inputs,) = objective.data[0][:1]
    jacobian = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(network(), objective.unflatten(w), (inputs,)), objective.parameters
    ).flatten(0, 1)
    jacobian = (jacobian * prior_spread(objective)).double().numpy()
    return jacobian.T @ jacobian / len(inputs)


def test_on_held_out_samples_the_signals_keep_their_names_and_other_data_have_theirs() -> None:
    """Each is what the estimator says of it by itself; all else is of the probe."""
    module, probe, held_out, other = network(), drawn(15, 2), drawn(16, 2, seed=1), drawn(17, 2, seed=2)
    estimators = [BehavioralCoefficient(**MOVES, refined=("0",)), LearningCoefficient(chains=2, draws=20, burn_in=20)]
    settings: dict[str, Any] = {"loss_fn": half_squared_error, "n": 500, "estimators": estimators}
    settings |= {"schedule": 1, "on_error": "raise", "other_data": {"validation": other}}
    watch = Watch(module, probe, held_out=held_out, **settings)
    found, plain = watch.at(0), Watch(module, probe, **settings).at(0)
    assert found is not None and plain is not None
    expected = dict(estimators[0].read(objective := on(held_out), 500, seed_at(0, 0)).estimates)
    assert {*COEFFICIENTS, "llc_behavioral_0", "effective_rank", "llc_outputs", "misfit_change"} <= expected.keys()
    assert {name: found.estimates[name] for name in expected} == expected
    assert found.value("loss_held_out") == pytest.approx(objective.loss(objective.parameters).item())
    rest = plain.estimates.keys() - expected.keys()
    assert {"loss", "llc", "llc_validation", "llc_behavioral_validation", "loss_validation"} <= rest
    assert {name: found.estimates[name] for name in rest} == {name: plain.estimates[name] for name in rest}
    assert found.estimates.keys() - plain.estimates.keys() == {"loss_held_out", "gradient_norm_held_out"}
    assert found.sample_losses == plain.sample_losses
    monitors = watch.run.header["monitors"]
    assert [m["probe"]["data"] for m in monitors] == ["", "held_out", "validation"]
    assert [m["n"] for m in monitors] == [500, 500, 500]


def on(batches: list[Any]) -> Objective:
    return Objective(network(), batches, loss_fn=half_squared_error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out": []}, "held_out is empty"),
        ({"held_out": drawn(3), "estimators": [LearningCoefficient()]}, "no BehavioralCoefficient"),
        ({"other_data": {"held_out": drawn(3)}}, "'held_out' is what signals on the samples given as held_out"),
    ],
)
def test_bad_held_out_samples(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Watch(network(), drawn(15), loss_fn=half_squared_error, **arguments)


def test_the_description_length_is_in_nats() -> None:
    """n L + λ log n, with the loss in nats: by its definition."""
    objective = Objective(network(), drawn(30), loss_fn=half_squared_error)
    found = read(BehavioralCoefficient(**MOVES, nats_per_loss=4.0), objective)
    loss = 4.0 * objective.loss(objective.parameters).item()
    expected = 500 * loss + found["llc_behavioral"].value * math.log(500)
    assert found["description_length"].value == pytest.approx(expected, rel=1e-6)
    error = found["llc_behavioral"].standard_error * math.log(500)
    assert found["description_length"].standard_error == pytest.approx(error)


def test_nats_per_loss_is_the_loss_in_other_units() -> None:
    """A quarter of the loss at four nats a unit is the same function; powers of two lose no bit."""
    module, batches = network(), drawn(30)
    plain = read(BehavioralCoefficient(**MOVES), Objective(module, batches, loss_fn=half_squared_error))
    scaled = read(
        BehavioralCoefficient(**MOVES, nats_per_loss=4.0),
        Objective(module, batches, loss_fn=lambda m, b: half_squared_error(m, b) / 4),
    )
    for name in (*COEFFICIENTS, "effective_rank", "llc_outputs", "description_length"):
        assert scaled[name].value == pytest.approx(plain[name].value, rel=1e-4), name
    # Four nats a unit of the same loss: the function is then the same at four times the resolutions.
    coarser = BehavioralCoefficient(resolutions=(0.4, 0.012), **MOVES, nats_per_loss=4.0)
    same = read(coarser, Objective(module, batches, loss_fn=half_squared_error))
    ignored = read(replace(coarser, nats_per_loss=1.0), Objective(module, batches, loss_fn=half_squared_error))
    for name in COEFFICIENTS:
        assert same[name].value == pytest.approx(plain[name].value, rel=1e-4), name
        assert ignored[name].value != pytest.approx(plain[name].value, rel=1e-3), name


def test_half_the_rank_in_the_outputs_has_converged_at_both_resolutions() -> None:
    """Of more parameters than a whole matrix is built for, beside all eigenvalues of that matrix.

    In single precision the rank would come out at 171 in the place of 129.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 44), nn.Tanh(), nn.Linear(44, 44), nn.Tanh(), nn.Linear(44, 2))
    objective = Objective(module, drawn(300), loss_fn=half_squared_error)
    assert objective.num_parameters > OUTPUTS_DENSE_BELOW
    estimator = BehavioralCoefficient(**MOVES)
    found = read(estimator, objective)
    moved, spread = objective.to(torch.float64).behavioral("outputs"), prior_spread(objective, "outputs")
    exact = effective_rank(moved, spread, 1.0, dense_below=3000, check_probe=False, by_layer=False)
    for name, resolution in zip(("llc_outputs_coarse", "llc_outputs"), estimator.resolutions, strict=True):
        assert found[name].reliable, found[name].doubts
        expected = exact.at_resolution(2 * resolution).value / 2
        assert abs(found[name].value - expected) < 3 * found[name].standard_error + 0.03 * expected
        assert found[name].standard_error < 0.05 * expected


def test_half_the_rank_in_the_outputs_of_a_small_network_is_exact() -> None:
    """By the definition, from the Hessian of the divergence; the resolutions are of each of the two outputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 2))
    objective = Objective(module, drawn(60), loss_fn=half_squared_error).to(torch.float64)
    assert DENSE_BELOW < objective.num_parameters <= OUTPUTS_DENSE_BELOW
    estimator = BehavioralCoefficient(**MOVES)
    found = read(estimator, objective)
    spread = prior_spread(objective, "outputs")
    matrix = spread[:, None] * HessianOperator(objective.behavioral("outputs")).dense() * spread
    values = torch.linalg.eigvalsh(matrix).clamp(min=0)
    for name, resolution in zip(("llc_outputs_coarse", "llc_outputs"), estimator.resolutions, strict=True):
        inverse = bisect(lambda x, r=resolution: float((values / (1 + x * values)).sum()) / 2 - 2 * r, 0.0, 1e9)
        assert found[name].value == pytest.approx(
            float((inverse * values / (1 + inverse * values)).sum()) / 2, rel=1e-4
        )
        assert found[name].standard_error == 0.0 and found[name].reliable


def test_outputs_that_are_constant_leave_only_their_own_metric_unknown() -> None:
    module = network()
    with torch.no_grad():
        for p in module[2].parameters():
            p.zero_()
    found = read(BehavioralCoefficient(**MOVES), Objective(module, drawn(30), loss_fn=half_squared_error))
    unknown = {name for name, estimate in found.items() if name.startswith("llc_outputs")}
    assert unknown == {"llc_outputs", "llc_outputs_coarse"}
    for name in unknown:
        assert math.isnan(found[name].value) and len(found[name].doubts) == 1
    for name in (*COEFFICIENTS, "effective_rank", "description_length", "misfit_change"):
        assert math.isfinite(found[name].value), name


class LossInside(nn.Linear):
    """Keeps its outputs to itself."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        return 0.5 * (super().forward(inputs) - targets).square().sum(dim=1).mean()


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_outputs_that_cannot_be_seen_are_recorded_once(on_error: Any) -> None:
    """All else is measured at every step."""
    estimators = [BehavioralCoefficient(**MOVES), LearningCoefficient(chains=2, draws=20, burn_in=20)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = Watch(
            LossInside(3, 2),
            drawn(30),
            loss_fn=lambda module, batch: module(*batch),
            estimators=estimators,
            schedule=1,
            on_error=on_error,
        )
        for step in range(3):
            assert watch.at(step) is not None
    assert len([w for w in caught if "outputs_fn" in str(w.message)]) == 1
    assert [failure["what"] for failure in watch.run.failures] == ["llc_behavioral"]
    assert "llc_behavioral" not in watch.run.names
    assert watch.run.series("loss").steps.tolist() == watch.run.series("llc").steps.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("rows", "batches", "taken"), [(200, 4, 3), (256, 4, 2), (600, 2, 1), (100, 3, 3)])
def test_the_first_batches_with_512_rows_are_enough(rows: int, batches: int, taken: int) -> None:
    probe = drawn(rows, batches)
    objective = Objective(network(), probe, loss_fn=half_squared_error)
    first = Objective(network(), probe[:taken], loss_fn=half_squared_error)
    some = enough(objective)
    assert some.num_batches == taken
    assert some.loss(some.parameters).item() == pytest.approx(first.loss(first.parameters).item(), rel=1e-6)


def test_positions_of_sequences_count_as_rows() -> None:
    """Two batches of 10 sequences with 30 positions are 600."""
    generator = torch.Generator().manual_seed(0)
    probe = [(torch.randn(10, 30, 3, generator=generator), torch.zeros(10, 30, 2)) for _ in range(5)]

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=-1).mean()

    assert enough(Objective(network(), probe, loss_fn=loss_fn)).num_batches == 2


def test_a_checkpoint_measured_by_hand_gives_the_numbers_of_the_run() -> None:
    """To the bit, whatever the random streams and whatever was measured before."""
    module, batches = network(), drawn(15, 2)
    estimator = BehavioralCoefficient(**MOVES, refined=("0",))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    watch = Watch(
        module, batches, loss_fn=half_squared_error, n=500, schedule=2, estimators=[estimator], seed=3, on_error="raise"
    )
    checkpoints = {}
    for step in range(3):
        checkpoints[step] = {name: value.clone() for name, value in module.state_dict().items()}
        watch.at(step)
        optimizer.zero_grad()
        half_squared_error(module, batches[step % 2]).backward()
        optimizer.step()
    for live in reversed(watch.run.measurements):
        again = network()
        again.load_state_dict(checkpoints[live.step])
        torch.manual_seed(99)
        found, failures = measure(again, [estimator], Probe(batches, half_squared_error, n=500), live.step, seed=3)
        assert not failures and found.estimates.keys() == live.estimates.keys() - {"overhead"}
        for name, by_hand in found.estimates.items():
            estimate = live.estimates[name]
            assert by_hand.value == estimate.value or math.isnan(by_hand.value) and math.isnan(estimate.value), name


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"resolutions": (0.003, 0.1)}, ValueError, "expected the coarse and the fine one"),
        ({"resolutions": (0.1,)}, ValueError, "expected the coarse and the fine one"),
        ({"nats_per_loss": 0.0}, ValueError, "nats_per_loss is 0.0; expected a positive number"),
        ({"refined": "encoder"}, TypeError, r"expected a list of names, as \['encoder'\]"),
        ({"refined": ("rhat",)}, ValueError, "would be called 'llc_behavioral_rhat', as another signal is"),
        ({"data": "nbeta"}, ValueError, "would be called 'llc_behavioral_nbeta', as another signal is"),
        ({"draws": 4}, ValueError, "draws is 4; expected at least 16"),
    ],
)
def test_bad_settings_are_refused_before_training(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BehavioralCoefficient(**settings)
