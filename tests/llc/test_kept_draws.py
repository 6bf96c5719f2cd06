"""Draws that an estimate keeps when asked: the estimate follows from them, and ArviZ takes them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phasewatch import Objective, estimate_behavioral_llc, estimate_llc
from phasewatch.llc.diagnostics import effective_sample_size, split_rhat


def half_squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()


@pytest.fixture(scope="module")
def objective() -> Objective:
    torch.manual_seed(0)
    inputs = torch.randn(200, 3)
    module = nn.Linear(3, 2, bias=False)
    return Objective(module, [(inputs, module(inputs).detach())], loss_fn=half_squared_error)


def behavioral(objective: Objective, **settings: Any) -> Any:
    return estimate_behavioral_llc(objective, [0.003], chains=4, draws=160, burn_in=50, **settings)[0]


def of_loss(objective: Objective, **settings: Any) -> Any:
    return estimate_llc(objective, chains=4, draws=200, burn_in=100, **settings)


@pytest.mark.parametrize("estimate", [behavioral, of_loss])
def test_keeping_them_changes_no_number_and_without_there_are_none(estimate: Any, objective: Objective) -> None:
    bare, kept = estimate(objective), estimate(objective, keep_draws=True)
    assert repr(bare.__dict__ | {"kept_draws": None}) == repr(kept.__dict__ | {"kept_draws": None})
    assert bare.kept_draws is None and kept.kept_draws is not None
    for convert in (bare.to_xarray, bare.to_arviz):
        with pytest.raises(ValueError, match=r"estimate_(behavioral_)?llc\(..., keep_draws=True\)"):
            convert()


def test_the_learning_coefficient_of_the_loss_is_their_mean(objective: Objective) -> None:
    estimate = of_loss(objective, keep_draws=True)
    data = estimate.to_xarray()
    assert dict(data.sizes) == {"chain": 4, "draw": estimate.draws} and data.attrs["nbeta"] == estimate.nbeta
    assert data.chain.values.tolist() == [0, 1, 2, 3] and data.draw.values.tolist() == list(range(estimate.draws))
    energies = estimate.nbeta * data["loss"].values
    assert estimate.nbeta * float(data["loss"].mean()) - estimate.heating == pytest.approx(
        estimate.learning_coefficient, rel=1e-12
    )
    assert float(energies.var(axis=1, ddof=1).mean()) == pytest.approx(estimate.heat_capacity, rel=1e-9)


def test_the_divergence_is_the_mean_of_theirs(objective: Objective) -> None:
    estimate = behavioral(objective, keep_draws=True)
    data = estimate.to_xarray()
    assert dict(data.sizes) == {"chain": 4, "draw": estimate.draws}
    assert float(data["divergence"].mean()) == pytest.approx(estimate.divergence, rel=1e-12)
    assert data.attrs == {"resolution": 0.003, "nbeta": estimate.nbeta}


@pytest.mark.filterwarnings("ignore:.*ArviZ is undergoing:FutureWarning")
def test_arviz_summarizes_them_with_our_diagnostics(objective: Objective) -> None:
    arviz = pytest.importorskip("arviz")
    estimate = behavioral(objective, keep_draws=True)
    data = estimate.to_arviz()
    values = np.asarray(data["posterior"]["divergence"])
    assert values.shape == (4, estimate.draws)
    assert effective_sample_size(values) == pytest.approx(estimate.ess, rel=1e-9)
    assert split_rhat(values) == pytest.approx(estimate.rhat, rel=1e-9)
    assert float(np.asarray(arviz.rhat(data, method="split")["divergence"])) == pytest.approx(estimate.rhat, rel=1e-9)


def test_where_nothing_is_sampled_there_are_none() -> None:
    """Everything the prior holds is nearer than the resolution."""
    module = nn.Linear(3, 1, bias=False)
    objective = Objective(module, [(1e-6 * torch.eye(3), torch.zeros(3, 1))], loss_fn=half_squared_error)
    estimate = behavioral(objective, keep_draws=True)
    assert estimate.draws == 0
    with pytest.raises(ValueError, match="There are no draws"):
        estimate.to_xarray()


def test_without_arviz_it_is_named(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = behavioral(objective, keep_draws=True)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'phasewatch\[arviz\]'"):
        estimate.to_arviz()
