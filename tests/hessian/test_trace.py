"""The trace against planted spectra and exact ones: unbiased, with a standard error that is true."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import cross_entropy, mlp, normal, planted
from torch import nn

from phasewatch.hessian import HessianOperator, hessian_trace
from phasewatch.objective import Objective


def test_standard_errors_are_those_of_reruns() -> None:
    """40 errors in units of their standard errors have mean square 1; false failure below 1e-3."""
    rng = np.random.default_rng(4)
    eigenvalues = np.concatenate([7 * 0.7 ** np.arange(40), rng.normal(0, 0.03, 560)])
    runs = [hessian_trace(planted(eigenvalues, seed), seed=seed, max_products=200) for seed in range(40)]
    scores = [(run.value - eigenvalues.sum()) / run.standard_error for run in runs]
    assert all(run.converged for run in runs)
    assert 0.4 < np.mean(np.square(scores)) < 2.2
    assert abs(np.mean(scores)) < 0.55


@pytest.mark.parametrize("seed", [0, 1])
def test_of_networks_as_precise_as_asked_for(seed: int) -> None:
    """Rms error of 24 runs at most 1.4 times the tolerance; for normal errors the chance of more is below 1e-3.

    Away from a minimum, where most of the curvature of a ReLU net lies between its layers and has no trace.
    """
    torch.manual_seed(seed)
    net = mlp(12, 30, 20, 5, activation=nn.ReLU)
    objective = Objective(net, [(normal(60, 12), torch.arange(60) % 5)], loss_fn=cross_entropy)
    exact = HessianOperator(objective).dense().trace().item()
    runs = [hessian_trace(objective, seed=s, tolerance=0.03) for s in range(24)]
    errors = [run.value / exact - 1 for run in runs]
    assert all(run.converged and run.products < objective.num_parameters / 2 for run in runs)
    assert np.sqrt(np.mean(np.square(errors))) < 1.4 * 0.03


def test_exact_where_the_basis_spans_the_range_or_the_matrix_is_small() -> None:
    low_rank = hessian_trace(planted([3.0, -2.0, 1.5] + [0.0] * 597))
    assert low_rank.value == pytest.approx(2.5, abs=1e-9) and low_rank.standard_error == 0.0
    assert low_rank.products < 20
    torch.manual_seed(2)
    objective = Objective(mlp(4, 5, 3), [(normal(20, 4), torch.arange(20) % 3)], loss_fn=cross_entropy)
    small = hessian_trace(objective)
    assert small.value == pytest.approx(HessianOperator(objective).dense().trace().item(), rel=1e-12)
    assert (small.standard_error, small.converged) == (0.0, True)


def test_giving_up_is_said() -> None:
    flat = planted(np.linspace(-1, 1.01, 300))
    assert not hessian_trace(flat, tolerance=0.01, max_products=40).converged
    with pytest.raises(ValueError, match="at least 32"):
        hessian_trace(flat, max_products=4)
    with pytest.raises(ValueError, match="between 0 and 1"):
        hessian_trace(flat, tolerance=-1.0)
    with pytest.raises(ValueError, match="gauss-newton"):
        hessian_trace(flat, matrix="fisher")  # type: ignore[arg-type]
