"""Blocks of parameters, Frobenius norm, negative eigenvalues, and input that cannot be measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import half_squared_error, mlp, normal, planted
from torch import Tensor, nn

from phasewatch.hessian import HessianOperator, NoCurvatureError, hessian_spectrum, hessian_trace, leading_eigenpairs
from phasewatch.objective import Objective

MIXED = [*np.linspace(-3, -0.5, 60), *np.zeros(150), *np.linspace(0.1, 2, 190)]


def test_dense_norm_and_negative_count() -> None:
    spectrum = hessian_spectrum(planted(MIXED))
    assert spectrum.frobenius_norm == pytest.approx(np.linalg.norm(MIXED), rel=1e-10)
    assert spectrum.num_negative == 60
    assert spectrum.frobenius_norm_standard_error == spectrum.num_negative_standard_error == 0.0


def test_lanczos_norm_and_negative_count_lie_within_their_errors() -> None:
    """Ten seeds, two quantities: within four standard errors each, false failure about 20 x 6e-5."""
    objective = planted(MIXED)
    for seed in range(10):
        found = hessian_spectrum(objective, dense_below=0, seed=seed, num_eigenvalues=2)
        assert abs(found.frobenius_norm - np.linalg.norm(MIXED)) <= 4 * found.frobenius_norm_standard_error
        assert 0 < found.frobenius_norm_standard_error < 0.1 * found.frobenius_norm
        assert abs(found.num_negative - 60) <= 4 * found.num_negative_standard_error
        assert found.num_negative_standard_error > 0
    resolved = hessian_spectrum(objective, dense_below=0, num_steps=360)
    assert abs(resolved.num_negative - 60) <= 4 * resolved.num_negative_standard_error < 80


def _net() -> tuple[nn.Sequential, Objective]:
    module = mlp(4, 5, 3)
    return module, Objective(module, [(normal(80, 4), normal(80, 3, seed=1))], loss_fn=half_squared_error)


@pytest.mark.parametrize(("patterns", "rows"), [("0", range(25)), ("*.bias", [*range(20, 25), *range(40, 43)])])
def test_block_of_named_parameters(patterns: str, rows: Any) -> None:
    _, objective = _net()
    rows = list(rows)
    block = HessianOperator(objective).dense()[rows][:, rows]
    exact = torch.linalg.eigvalsh((block + block.T) / 2).numpy()
    found = hessian_spectrum(objective, parameters=patterns)
    assert found.eigenvalues == pytest.approx(exact, abs=1e-9)
    assert hessian_trace(objective, parameters=[patterns]).value == pytest.approx(exact.sum(), abs=1e-9)
    leading = leading_eigenpairs(objective, 1, parameters=patterns, tolerance=1e-8).values[0]
    assert abs(leading) == pytest.approx(np.abs(exact).max(), rel=1e-6)


@pytest.mark.parametrize("measure", [hessian_spectrum, hessian_trace, leading_eigenpairs])
def test_patterns_that_match_nothing(measure: Callable[..., Any]) -> None:
    _, objective = _net()
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no module or parameter.*0\.weight"):
        measure(objective, parameters="encoder.*")


def test_more_eigenvalues_than_parameters() -> None:
    _, objective = _net()
    with pytest.raises(ValueError, match="at most the number of parameters, 43"):
        hessian_spectrum(objective, num_eigenvalues=44)


@pytest.mark.parametrize("dense_below", [0, 5000])
def test_loss_linear_in_the_parameters_is_all_zeros(dense_below: int) -> None:
    module = nn.Linear(6, 1).double()
    objective = Objective(module, [normal(30, 6)], loss_fn=lambda module, x: module(x).mean())
    spectrum = hessian_spectrum(objective, dense_below=dense_below)
    assert spectrum.zeros.resolved
    assert spectrum.zeros.lower == spectrum.nullity == spectrum.zeros.upper == 7
    assert spectrum.zeros.note == "the matrix is zero"
    assert spectrum.num_negative == spectrum.frobenius_norm == 0.0


def test_loss_with_a_memory_is_refused() -> None:
    calls = [0]

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        calls[0] += 1
        return module(batch).square().mean() * (1 + calls[0] % 2)

    objective = Objective(nn.Linear(3, 2), [torch.ones(4, 3)], loss_fn=loss_fn)
    with pytest.raises(ValueError, match="same parameters give"):
        hessian_spectrum(objective)


class _Rounded(nn.Module):
    """Activations on a grid, with the straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.round(8 * x) / 8 - x).detach()


class _Gated(nn.Module):
    """Units that are switched on and off where they are not zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > 0.3)


@pytest.mark.parametrize("activation", [_Rounded, _Gated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measure", [hessian_spectrum, hessian_trace, leading_eigenpairs])
def test_discontinuous_loss_is_refused(
    activation: type[nn.Module], dtype: torch.dtype, measure: Callable[[Objective], Any]
) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(6, 20), activation(), nn.Linear(20, 3)).to(dtype)
        x = normal(200, 6, seed=seed).to(dtype)
        objective = Objective(module, [(x, normal(200, 3, seed=9).to(dtype))], loss_fn=half_squared_error)
        with pytest.raises(ValueError, match="The loss jumps by"):
            measure(objective)


class _NormInSingle(nn.Module):
    """As language models have it: their norms and losses are in single precision, whatever the weights are in."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(dim=1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_precision_within_the_module_is_no_jump(single: bool, dtype: torch.dtype) -> None:
    """The eigenvalues are those of the same function in double precision throughout."""

    def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = module(batch[0])
        return nn.functional.cross_entropy(logits.float() if single else logits, batch[1])

    for seed in range(10):
        torch.manual_seed(seed)
        x, labels = normal(100, 6, seed=seed), torch.arange(100) % 5
        norm = nn.RMSNorm(12, eps=1e-6, elementwise_affine=False)
        exact = nn.Sequential(nn.Linear(6, 12), norm, nn.Tanh(), nn.Linear(12, 5))
        module = nn.Sequential(exact[0], norm if single else _NormInSingle(), *exact[2:])
        found, expected = (
            hessian_spectrum(Objective(copy.deepcopy(net).to(of), [(x.to(of), labels)], loss_fn=loss))
            for net, of, loss in ((module, dtype, loss_fn), (exact, torch.float64, cross_entropy))
        )
        np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, atol=1e-3 * expected.largest)


def test_an_extremum_on_the_way_is_no_jump() -> None:
    """Wherever on the line it lies, and whatever the curvature: |w - c|^2 around 200 centres, whose Hessian is 2."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        size = 2 + trial % 5
        center = torch.randn(size, generator=generator, dtype=torch.float64)
        module = nn.Linear(size, 1, bias=False).double()
        module.weight.data[0] = center + 10.0 ** (-trial % 4) * 0.02 * torch.randn(size, generator=generator)

        def loss_fn(module: nn.Module, batch: Tensor, center: Tensor = center) -> Tensor:
            return (module.weight[0] - center).square().sum() + 0 * batch.sum()

        product = HessianOperator(Objective(module, [torch.ones(1)], loss_fn=loss_fn)) @ center
        torch.testing.assert_close(product, 2 * center)


class _Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool1d(x, 2)


def _product_with_ones(module: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    names = [name for name, _ in module.named_parameters()]

    def loss(*tensors: Tensor) -> Tensor:
        outputs = torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x,))
        return 0.5 * (outputs - targets).square().sum() / len(x)

    at = tuple(parameter.detach() for parameter in module.parameters())
    _, product = torch.autograd.functional.hvp(loss, at, tuple(torch.ones_like(tensor) for tensor in at))
    return torch.cat([piece.flatten() for piece in product])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, _Pooled, nn.Tanh])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 30.0])
def test_kinks_are_no_jumps(activation: type[nn.Module], dtype: torch.dtype, scale: float) -> None:
    """Also where all parameters lie on kinks, near a minimum, and in functions that grow fast.

    The product is that of PyTorch with the Hessian of the network as a function of its parameters.
    """
    for seed in range(5):
        torch.manual_seed(seed)
        width = 10 if activation is _Pooled else 20
        module = nn.Sequential(nn.Linear(6, 20), activation(), nn.Linear(width, 3)).to(dtype)
        for parameter in module.parameters():
            parameter.data *= scale
        x = normal(100, 6, seed=seed).to(dtype)
        for targets in (normal(100, 3, seed=9).to(dtype), module(x).detach()):
            operator = HessianOperator(Objective(module, [(x, targets)], loss_fn=half_squared_error))
            product = operator @ torch.ones(operator.shape[0], dtype=dtype)
            expected = _product_with_ones(module, x, targets)
            torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("power", "what"), [(1.5, "A product with the Hessian"), (0.5, "The gradient")])
def test_derivatives_that_are_not_finite(power: float, what: str) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight.abs().pow(power) * x

    objective = Objective(Root(), [normal(5, 3)], loss_fn=lambda module, x: module(x).sum())
    with pytest.raises(ValueError, match=f"{what} is not finite although the loss is"):
        hessian_spectrum(objective)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * gradient * x**2


def test_operation_without_second_derivative_is_named() -> None:
    module = nn.Linear(3, 2).double()
    objective = Objective(module, [normal(5, 3)], loss_fn=lambda module, x: _Once.apply(module(x)).mean())
    with pytest.raises(RuntimeError, match="_Once has no second derivative.*Replace"):
        hessian_spectrum(objective)


def test_norm_of_one_value_is_exact() -> None:
    found = hessian_spectrum(planted([2.0] * 50), dense_below=0)
    assert found.frobenius_norm == pytest.approx(2 * math.sqrt(50))
    assert found.frobenius_norm_standard_error == pytest.approx(0.0, abs=1e-6)


def test_a_divergence_without_jumps_says_nothing_of_those_of_the_loss() -> None:
    """Each is looked at once, in whatever order they are measured."""
    torch.manual_seed(0)
    inputs = torch.randn(600, 3)

    def loss_fn(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        outputs = module(batch)
        return outputs.square().mean() + 0.1 * (outputs > 0).to(outputs).mean()

    objective = Objective(nn.Linear(3, 2), [inputs], loss_fn=loss_fn)
    direction = torch.ones(objective.num_parameters)
    assert (HessianOperator(objective.behavioral("outputs")) @ direction).isfinite().all()
    for of_jumps in (objective, objective.behavioral("loss")):
        with pytest.raises(NoCurvatureError, match="The loss jumps"):
            HessianOperator(of_jumps) @ direction


def test_a_part_without_jumps_says_nothing_of_the_whole() -> None:
    """Measured first, as a function of one layer alone."""
    torch.manual_seed(1)
    module = nn.ModuleDict({"smooth": nn.Linear(3, 2), "jumping": nn.Linear(3, 2)})

    def loss_fn(module: Any, batch: torch.Tensor) -> torch.Tensor:
        jumping = module["jumping"](batch)
        return (module["smooth"](batch) + jumping).square().mean() + 0.1 * (jumping > 0).to(jumping).mean()

    objective = Objective(module, [torch.randn(600, 3)], loss_fn=loss_fn)
    assert hessian_trace(objective, parameters="smooth").value > 0
    for of_jumps in (objective, objective.restricted_to("jumping")):
        with pytest.raises(NoCurvatureError, match="The loss jumps"):
            HessianOperator(of_jumps) @ torch.ones(of_jumps.num_parameters)
