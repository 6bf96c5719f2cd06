"""Whatever reads the module's tensors during the backward pass sees those of the evaluation, against its plain twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from phasewatch import Objective, estimate_llc, explain_zeros, hessian_spectrum


class Twice(torch.autograd.Function):
    """A linear layer whose backward pass asks the module for its weight, as offloaded ones do."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, module: nn.Linear) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(inputs)
        return inputs @ weight.T

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        return slope @ ctx.module.weight, slope.T @ ctx.saved_tensors[0], None


class Network(nn.Module):
    """Two layers, evaluated in several ways that are all one function."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 5, bias=False), nn.Linear(5, 3)
        self.way = way

    def body(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.first(inputs))

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = (
            inputs + 0 * self.second.bias.sum()
        )  # what goes in depends on parameters, so that all is differentiated
        if self.way == "own function":
            return self.second(torch.tanh(Twice.apply(inputs, self.first.weight, self.first)))
        if self.way == "plain":
            return self.second(self.body(inputs))
        if self.way == "offloaded":
            with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                return self.second(self.body(inputs))
        if self.way == "nested":
            return checkpoint(
                lambda x: self.second(checkpoint(self.body, x, use_reentrant=False)), inputs, use_reentrant=False
            )
        return self.second(checkpoint(self.body, inputs, use_reentrant=self.way == "reentrant"))


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def objective(way: str, batches: int = 2) -> Objective:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    size = 60 // batches
    return Objective(
        Network(way).double(),
        [(x.double(), y) for x, y in zip(inputs.split(size), labels.split(size), strict=True)],
        loss_fn=cross_entropy,
    )


WAYS = ["checkpoint", "reentrant", "nested", "offloaded", "own function"]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_curvature_are_those_of_the_plain_network(way: str) -> None:
    plain, other = objective("plain"), objective(way)
    away = plain.parameters + 0.3
    torch.testing.assert_close(other.gradient(away), plain.gradient(away), rtol=1e-10, atol=1e-12)
    places = torch.stack([away, away + 0.1])
    for one, two in zip(other.losses_and_gradients(places), plain.losses_and_gradients(places), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    for matrix in ("hessian", "gauss-newton"):
        expected = hessian_spectrum(plain, matrix)
        found = hessian_spectrum(other, matrix)
        assert found.eigenvalues == pytest.approx(expected.eigenvalues, abs=1e-10 * expected.largest)
        assert found.nullity == expected.nullity


@pytest.mark.parametrize("way", WAYS)
def test_ledger_and_learning_coefficient_too(way: str) -> None:
    plain, other = objective("plain", 1), objective(way, 1)
    assert explain_zeros(other.module, other).certified == explain_zeros(plain.module, plain).certified == 6
    settings: dict[str, Any] = {"n": 2000, "chains": 2, "draws": 12, "burn_in": 20}
    assert estimate_llc(other, **settings).learning_coefficient == pytest.approx(
        estimate_llc(plain, **settings).learning_coefficient, rel=1e-6
    )


def test_a_gradient_that_is_not_the_losses_own_is_refused() -> None:
    """A straight-through estimator says slope one of what is flat."""

    class StraightThrough(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            weight = self.weight + (0.5 * self.weight - self.weight).detach()
            return nn.functional.linear(inputs, weight, self.bias)

    with pytest.raises(ValueError, match="gradient of the loss is not its derivative.*straight-through"):
        Objective(StraightThrough(4, 3), [(torch.randn(20, 4), torch.randint(3, (20,)))], loss_fn=cross_entropy)


@pytest.mark.parametrize("seed", range(12))
def test_a_gradient_that_lacks_one_layer_is_refused(seed: int) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            return self.second(torch.tanh(0.5 * hidden + 0.5 * hidden.detach()))

    torch.manual_seed(seed)
    with pytest.raises(ValueError, match="gradient of the loss is not its derivative"):
        Objective(Detached(), [(torch.randn(20, 4), torch.randint(3, (20,)))], loss_fn=cross_entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(10))
def test_kinks_and_low_precision_are_not(seed: int, dtype: torch.dtype) -> None:
    """Also where a part of the loss is computed in half precision, and where the gradient is tiny."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    labels = network(inputs := torch.randn(50, 4)).argmax(1)

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            return nn.functional.cross_entropy((10 * seed + 1) * module(batch[0]).float(), batch[1])

    Objective(network, [(inputs, labels)], loss_fn=loss_fn)
