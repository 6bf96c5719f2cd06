"""Zeros and their causes as signals: from a network to the record, the detector and TensorBoard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phasewatch import Objective, Watch, load_run
from phasewatch.estimators import Estimator, HessianSpectrum, SymmetryLedger
from phasewatch.figures import density_figure
from phasewatch.hessian import hessian_spectrum
from phasewatch.record import Histogram, Measurement
from phasewatch.record.signals import detected, searched
from phasewatch.symmetry import NON_GENERIC_KINDS, explain_zeros


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def tanh_net(outputs: int = 2) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    return module, (x, torch.randn(300, outputs, generator=generator, dtype=torch.float64))


def values_of(estimator: Estimator, objective: Objective) -> dict[str, float]:
    return {name: found.value for name, found in estimator.read(objective, 300, 0).estimates.items()}


def test_every_kind_of_the_ledger_is_told_across_a_transition() -> None:
    names = [f"zeros_{kind.replace(' ', '_')}" for kind in NON_GENERIC_KINDS]
    assert detected(["zeros_generic", "zeros_certified", "zeros_unexplained", *names]) == ["zeros_certified", *names]


def test_zeros_are_searched_in_sum_where_that_was_measured() -> None:
    names = [f"zeros_{kind.replace(' ', '_')}" for kind in NON_GENERIC_KINDS]
    assert searched(["zeros_certified", *names]) == ["zeros_certified"]
    assert searched(names) == names


def test_causes_are_counted_by_theory() -> None:
    """A tanh unit without outgoing weights: d_in + 1 zeros, none generic, none of the Hessian away from a minimum."""
    module, batch = tanh_net()
    with torch.no_grad():
        module[2].weight[:, 3] = 0
        module[2].weight[:, 1] *= 1e-3
    objective = Objective(module, [batch], loss_fn=squared_error)
    values = values_of(SymmetryLedger(), objective)
    assert values["zeros_zero_outgoing"] == values["zeros_certified"] == values["nullity_ggn"] == 5
    assert values["zeros_generic"] == values["zeros_unexplained"] == values["zeros_dead"] == 0
    assert values["distance_zero_outgoing"] == 0
    assert values["distance_dead"] == 1
    assert 0 < values["distance_parallel"] < 1
    hessian = values_of(HessianSpectrum(), objective)
    assert hessian["rank_half"] == (37 - hessian["nullity"]) / 2
    matrix = torch.func.hessian(lambda w: objective.loss(w))(objective.parameters)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert hessian["hessian_negative"] == int((eigenvalues < -1e-10).sum())


@pytest.mark.parametrize(("ledger_below", "explained"), [(5000, True), (10, False)])
def test_large_networks_are_bracketed(ledger_below: int, explained: bool) -> None:
    module, batch = tanh_net()
    with torch.no_grad():
        module[2].weight[:, 3] = 0
    objective = Objective(module, [batch], loss_fn=squared_error)
    values = values_of(SymmetryLedger(dense_below=0, ledger_below=ledger_below), objective)
    assert values["nullity_ggn_lower"] <= 5 <= values["nullity_ggn_upper"]
    assert ("zeros_certified" in values) == explained
    assert "zeros_unexplained" not in values
    if explained:
        assert values["nullity_ggn_lower"] >= values["zeros_certified"] == 5


def unresolved() -> Objective:
    """A quadratic whose 60 eigenvalues lie evenly over sixteen decades: any number of zeros is arbitrary."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(60, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x

    scales = (10.0 ** torch.linspace(-16, 0, 60, dtype=torch.float64)).sqrt()
    return Objective(Quadratic(), [scales[None]], loss_fn=lambda module, x: 0.5 * module(x).square().sum(1).mean())


def test_an_unknown_number_of_zeros_is_no_number(tmp_path: Path) -> None:
    """In the reading, in the record and read back: NaN, with the bracket beside; the detector takes it as missing."""
    objective = unresolved()
    for estimator, name in ((HessianSpectrum(), "nullity"), (SymmetryLedger(), "nullity_ggn")):
        found = estimator.read(objective, 100, 0).estimates
        assert np.isnan(found[name].value)
        assert 0 <= found[f"{name}_lower"].value < found[f"{name}_upper"].value <= 60
        [reason] = found[name].doubts
        assert reason.startswith("between")
        assert not np.isfinite(found[name].standard_error)
        assert "zeros_unexplained" not in found
    found = HessianSpectrum().read(objective, 100, 0).estimates
    assert np.isnan(found["rank_half"].value) and np.isfinite(found["llc_quadratic"].value)
    batches = [(10.0 ** torch.linspace(-16, 0, 60, dtype=torch.float64)).sqrt().expand(4, 60)]
    with Watch(
        objective.module,
        batches,
        loss_fn=lambda module, x: 0.5 * module(x).square().sum(1).mean(),
        schedule=1,
        estimators=[HessianSpectrum()],
        directory=tmp_path,
    ) as watch:
        watch.at(0)
        watch.at(1)
    series = load_run(tmp_path).series("nullity")
    assert np.isnan(series.values).all() and not series.reliable.any()
    assert (load_run(tmp_path).series("nullity_upper").values > 0).all()


def test_the_ledger_of_an_unknown_number_of_zeros_says_so() -> None:
    objective = unresolved()
    ledger = explain_zeros(objective.module, objective)
    assert ledger.nullity is None and ledger.unexplained is None
    assert "nullity unresolved in [" in repr(ledger)
    assert "unknown" in ledger.table()


def test_a_loss_without_outputs_costs_only_the_causes(tmp_path: Path) -> None:
    """No warning and no error, though the rest raises; the record says why there is no ledger."""

    class OwnLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).square().mean()

    watch = Watch(
        OwnLoss(),
        [torch.ones(4, 3)],
        loss_fn=lambda module, x: module(x),
        schedule=1,
        estimators=[SymmetryLedger(), HessianSpectrum()],
        directory=tmp_path,
        on_error="raise",
    )
    with watch:
        watch.at(0)
        watch.at(1)
    run = load_run(tmp_path)
    assert run.series("nullity").values.tolist() == [2, 2]
    assert "nullity_ggn" not in run.names
    assert [failure["what"] for failure in run.failures] == ["zeros"]


def test_death_of_a_unit_is_flagged_where_it_happens() -> None:
    """A unit is pushed out of reach at step 23 of a run in which nothing else happens; measured at 20 and 24."""
    generator = torch.Generator().manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    batch = (x, torch.randn(300, 2, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        module[0].bias.zero_()
        module[2].weight[:, 2] = 1e-3  # so that the loss does not see it
    with Watch(module, [batch], loss_fn=squared_error, schedule=4, estimators=[SymmetryLedger()]) as watch:
        for step in range(61):
            watch.at(step)
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(1e-4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
                if step == 22:
                    module[0].bias[2] = -100.0
    dead = watch.run.series("zeros_dead")
    assert dead.values.tolist() == [0.0] * 6 + [3.0 + 2.0] * 10
    assert any("zeros_dead" in t.changes and 20 <= t.step <= 24 for t in watch.transitions)


def _spectrum(step: int, positions: list[float]) -> Measurement:
    return Measurement(step, {}, histograms={"hessian_eigenvalues": Histogram(positions, [1.0] * len(positions))})


def test_heat_map_counts_each_eigenvalue_once_and_zeros_in_the_middle() -> None:
    figure = density_figure([_spectrum(0, [-1.0, 0.0, 0.0, 2.0]), _spectrum(7, [-1e-12, 1e-3, 1.0, 10.0])])
    assert figure is not None
    (mesh,) = figure.axes[0].collections
    counts = np.ma.filled(mesh.get_array(), 0.0)
    assert counts.sum(axis=0).tolist() == [4.0, 4.0]
    assert counts[counts.shape[0] // 2].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("measurements", [[], [_spectrum(0, [1.0])], [_spectrum(0, [0.0]), _spectrum(1, [0.0])]])
def test_no_heat_map_without_two_spectra(measurements: list[Measurement]) -> None:
    assert density_figure(measurements) is None


def test_of_large_networks_certified_zeros_and_an_upper_end_stand_beside_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the first batch alone leaves bounds what all of them do, and the dense count lies between the two."""
    module, (x, y) = tanh_net()
    with torch.no_grad():
        module[2].weight[:, 3] = 0
    batches = [(x[start : start + 100], y[start : start + 100]) for start in (0, 100, 200)]
    objective = Objective(module, batches, loss_fn=squared_error)
    dense = hessian_spectrum(objective, "gauss-newton").zeros.count
    monkeypatch.setattr("phasewatch.estimators.zeros.LARGE", 0)
    found = values_of(SymmetryLedger(dense_below=0), objective)
    assert found["zeros_certified"] == found["nullity_ggn_lower"] == 5
    assert dense is not None and found["nullity_ggn_lower"] <= dense <= found["nullity_ggn_upper"] <= 37


def test_the_ends_of_a_large_network_s_spectrum_are_known_to_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch in three; four standard errors, of which there is but one difference to tell."""
    module, (x, y) = tanh_net()
    batches = [(x[start : start + 100], y[start : start + 100]) for start in (0, 100, 200)]
    objective = Objective(module, batches, loss_fn=squared_error)
    exact = hessian_spectrum(objective)
    monkeypatch.setattr("phasewatch.estimators.spectrum.LARGE", 0)
    found = HessianSpectrum(dense_below=0).read(objective, 300, 0).estimates
    for name, expected in (("hessian_max", exact.largest), ("hessian_min", exact.smallest)):
        assert found[name].reliable and found[name].standard_error > 0
        assert abs(found[name].value - expected) < 4 * found[name].standard_error + 0.05 * exact.largest
