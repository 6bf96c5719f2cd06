"""Leading eigenpairs against planted ones and against dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import QuadraticForm, cross_entropy, half_squared_error, mlp, normal, planted

from phasewatch.hessian import HessianOperator, leading_eigenpairs
from phasewatch.objective import Objective

SPECTRUM = [*np.linspace(-3, -0.1, 60), *np.linspace(0.1, 2, 120), 5.0, 7.0, 11.0]


@pytest.mark.parametrize("end", ["magnitude", "top", "bottom"])
@pytest.mark.parametrize("basis_size", [8, 20, 64])
def test_planted_eigenvalues_at_each_end_with_any_basis(end: Any, basis_size: int) -> None:
    objective = planted(SPECTRUM, seed=basis_size)
    found = leading_eigenpairs(objective, 5, end=end, tolerance=1e-7, basis_size=basis_size)
    key = {"magnitude": lambda x: -abs(x), "top": lambda x: -x, "bottom": lambda x: x}[end]
    assert found.converged
    np.testing.assert_allclose(found.values, sorted(SPECTRUM, key=key)[:5], atol=1e-6)
    matrix = HessianOperator(objective).dense()
    errors = (found.vectors @ matrix - torch.from_numpy(found.values)[:, None] * found.vectors).norm(dim=1)
    np.testing.assert_allclose(errors, found.residuals, atol=1e-8)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(5, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_looser_tolerance_takes_less_products_and_is_kept() -> None:
    objective = planted(SPECTRUM)
    loose, tight = (leading_eigenpairs(objective, 4, tolerance=t) for t in (1e-2, 1e-8))
    assert loose.converged and tight.converged and loose.products < tight.products
    assert (loose.residuals <= 0.11).all() and (tight.residuals <= 1.1e-7).all()


def test_of_a_network_in_single_precision() -> None:
    torch.manual_seed(1)
    module = mlp(5, 7, 6, 3).float()
    batch = (normal(40, 5).float(), torch.arange(40) % 3)
    objective = Objective(module, [batch], loss_fn=cross_entropy)
    exact = np.linalg.eigvalsh(HessianOperator(objective.to(torch.float64)).dense().numpy())
    found = leading_eigenpairs(objective, 3, end="top", tolerance=1e-4)
    np.testing.assert_allclose(found.values, exact[::-1][:3], rtol=1e-4)
    part = leading_eigenpairs(objective.restricted_to("0"), 42, basis_size=64, tolerance=1e-5)
    block = HessianOperator(objective.to(torch.float64)).dense()[:42, :42].numpy()
    np.testing.assert_allclose(np.sort(part.values), np.linalg.eigvalsh(block), atol=1e-5 * exact.max())


def test_copies_come_from_new_starts_where_the_basis_is_exhausted() -> None:
    found = leading_eigenpairs(planted([4.0] * 3 + [1.0] * 9), 5)
    np.testing.assert_allclose(found.values, [4, 4, 4, 1, 1], atol=1e-9)
    assert found.converged
    zero = leading_eigenpairs(planted([0.0] * 12), 3)
    assert zero.converged and not zero.values.any()


def test_eigenvectors_that_the_gradient_does_not_see_are_found() -> None:
    """The gradient of two equal units with equal weights is the same in both; half of the eigenvectors are not."""
    torch.manual_seed(0)
    module = mlp(3, 2, 1)
    with torch.no_grad():
        module[0].weight[1] = module[0].weight[0]
        module[0].bias[1] = module[0].bias[0]
        module[2].weight[0, 1] = module[2].weight[0, 0]
    objective = Objective(module, [(normal(30, 3), normal(30, 1, seed=1))], loss_fn=half_squared_error)
    exact = np.linalg.eigvalsh(HessianOperator(objective).dense().numpy())
    found = leading_eigenpairs(objective, 6, tolerance=1e-9)
    swapped = torch.cat([found.vectors[:, [3, 4, 5, 0, 1, 2, 7, 6, 9, 8]], found.vectors[:, 10:]], dim=1)
    assert sum(torch.allclose(a, -b, atol=1e-6) for a, b in zip(found.vectors, swapped, strict=True)) >= 2
    np.testing.assert_allclose(found.values, exact[np.argsort(-np.abs(exact))][:6], atol=1e-8)


def test_a_gradient_that_is_an_eigenvector_hides_no_other() -> None:
    module = QuadraticForm(torch.diag(torch.tensor(SPECTRUM, dtype=torch.float64)))
    with torch.no_grad():
        module.w.copy_(torch.eye(len(SPECTRUM))[0])
    objective = Objective(module, [torch.zeros(1)], loss_fn=lambda m, _: 0.5 * m.w @ (m.matrix @ m.w))
    found = leading_eigenpairs(objective, 4, end="top", tolerance=1e-8)
    np.testing.assert_allclose(found.values, [11, 7, 5, 2], atol=1e-7)


def test_giving_up_is_said() -> None:
    found = leading_eigenpairs(planted(SPECTRUM), 4, tolerance=1e-10, max_products=10)
    assert not found.converged and found.products == 10 and "not converged" in repr(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_eigenvalues": 13}, "at most the number of parameters, 12"),
        ({"num_eigenvalues": 8, "basis_size": 9}, "num_eigenvalues \\+ 2 = 10"),
        ({"matrix": "fisher"}, "'hessian', 'gauss-newton'"),
        ({"end": "left"}, "'magnitude', 'top' or 'bottom'"),
        ({"tolerance": 0.0}, "between 0 and 1"),
        ({"max_products": 0}, "at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leading_eigenpairs(planted([1.0] * 12), **arguments)
