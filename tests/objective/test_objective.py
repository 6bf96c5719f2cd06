"""The loss as a pure function: against autograd on the module itself, for many kinds of module."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from phasewatch.isolation import RandomState
from phasewatch.objective import Objective

Batch = tuple[Tensor, Tensor]


def half_mean_squared_error(module: nn.Module, batch: Batch) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


def regression(*shape: int, outputs: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randn(shape[0], outputs, generator=generator)


class Recurrent(nn.Module):
    """The last output of a recurrent layer through a linear head."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.recurrent = kind(3, 4, batch_first=True, **options)
        self.head = nn.LazyLinear(2)
        self(torch.zeros(1, 2, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.recurrent(inputs)[0][:, -1])


class Tied(nn.Module):
    """One matrix under three names, and a shared submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.second(torch.tanh(self.first(inputs)))))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layer(inputs)[:, 0])


MODULES: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "linear": (lambda: nn.Linear(3, 2), regression(5, 3)),
    "partly frozen": (
        lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 2)),
        regression(5, 3),
    ),
    "tied": (Tied, regression(5, 3)),
    "RNN": (lambda: Recurrent(nn.RNN), regression(4, 5, 3)),
    "LSTM": (lambda: Recurrent(nn.LSTM), regression(4, 5, 3)),
    "LSTM, two layers, both directions": (
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        regression(4, 5, 3),
    ),
    "GRU": (lambda: Recurrent(nn.GRU), regression(4, 5, 3)),
    "attention": (Attention, regression(4, 3, 4)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        regression(5, 3),
    ),
}


def own_gradient(module: nn.Module, batch: Batch, loss_fn: Any = half_mean_squared_error) -> tuple[Tensor, Tensor]:
    """Loss and gradient from ``backward`` on the module itself."""
    loss = loss_fn(module, batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    module.zero_grad()
    return loss.detach(), gradient


@pytest.mark.parametrize("case", MODULES)
def test_loss_and_gradient_are_those_of_backward_on_the_module(case: str) -> None:
    make, batch = MODULES[case]
    torch.manual_seed(1)
    module = make().double().eval()
    batch = (batch[0].double(), batch[1].double())
    objective = Objective(module, [batch], loss_fn=half_mean_squared_error)
    loss, gradient = own_gradient(module, batch)
    torch.testing.assert_close(objective.loss(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-10, atol=1e-14)
    trainable = [p for p in module.parameters() if p.requires_grad]
    assert torch.equal(objective.parameters, parameters_to_vector(trainable))
    assert objective.num_parameters == sum(p.numel() for p in trainable)


@pytest.mark.parametrize("case", MODULES)
def test_at_other_parameters_it_is_the_module_with_those_parameters(case: str) -> None:
    make, batch = MODULES[case]
    torch.manual_seed(1)
    module = make().double().eval()
    batch = (batch[0].double(), batch[1].double())
    objective = Objective(module, [batch], loss_fn=half_mean_squared_error)
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    elsewhere = objective.parameters + 0.3 * torch.randn(objective.num_parameters, dtype=torch.float64)
    loss, gradient = objective.loss_and_gradient(elsewhere)
    assert all(torch.equal(kept[name], tensor) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        for p, piece in zip(
            [p for p in module.parameters() if p.requires_grad], objective.unflatten(elsewhere).values(), strict=True
        ):
            p.copy_(piece)
    expected_loss, expected_gradient = own_gradient(module, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_a_short_last_batch_weighs_by_its_samples() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = (t.double() for t in regression(11, 3))
    split = list(zip(inputs.split(4), targets.split(4), strict=True))
    objective = Objective(module, split, loss_fn=half_mean_squared_error)
    loss, gradient = own_gradient(module, (inputs, targets))
    assert objective.batch_sizes == [4, 4, 3] and objective.num_samples == 11
    torch.testing.assert_close(objective.loss(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.loss_and_gradient()[0], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-10, atol=1e-14)
    last_loss, last_gradient = own_gradient(module, split[2])
    torch.testing.assert_close(objective.loss(batch=2), last_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.gradient(batch=2), last_gradient, rtol=1e-10, atol=1e-14)


def test_given_batch_sizes_set_the_weights() -> None:
    batches = [{"text": "ab", "target": torch.tensor(1.0)}, {"text": "c", "target": torch.tensor(3.0)}]

    def loss_fn(module: Any, batch: Any) -> Tensor:
        return (module.weight.sum() - batch["target"]).square()

    objective = Objective(nn.Linear(1, 1, bias=False), batches, loss_fn=loss_fn, batch_sizes=[3, 1])
    w = objective.parameters.item()
    assert objective.loss().item() == pytest.approx(0.75 * (w - 1) ** 2 + 0.25 * (w - 3) ** 2, rel=1e-6)
    with pytest.raises(ValueError, match=r"batch_sizes is \[3\]; expected 2 positive numbers"):
        Objective(nn.Linear(1, 1), batches, loss_fn=loss_fn, batch_sizes=[3])


def test_modes_of_every_submodule_stay_and_the_copy_evaluates() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1)))
    module.train()
    module[1].eval(), module[3][0].eval()
    modes = [m.training for m in module.modules()]
    buffers = {name: tensor.clone() for name, tensor in module.named_buffers()}
    seen: list[list[bool]] = []

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        seen.append([m.training for m in module.modules()])
        return half_mean_squared_error(module, batch)

    for mode in ("eval", "train"):
        Objective(module, [regression(6, 3, outputs=4)], loss_fn=loss_fn, mode=mode).gradient()
        assert [m.training for m in module.modules()] == modes
        assert {flag for flags in seen for flag in flags} == {mode == "train"}
        seen.clear()
    assert all(torch.equal(buffers[name], tensor) for name, tensor in module.named_buffers())


def test_batchnorm_in_train_mode_normalizes_with_the_batch_and_is_the_same_at_each_evaluation() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    module[1].running_mean.fill_(5.0)
    batch = tuple(t.double() for t in regression(6, 3, outputs=4))
    objective = Objective(module, [batch], loss_fn=half_mean_squared_error, mode="train")
    values = [objective.loss() for _ in range(3)]
    features = module[0](batch[0])
    by_hand = (features - features.mean(0)) / (features.var(0, unbiased=False) + module[1].eps).sqrt()
    torch.testing.assert_close(values[0], 0.5 * (by_hand - batch[1]).square().mean(), rtol=1e-10, atol=0)
    assert all(torch.equal(value, values[0]) for value in values)


def test_tied_weights_count_once_and_collect_every_use() -> None:
    module = Tied()
    objective = Objective(module, [regression(5, 3)], loss_fn=half_mean_squared_error)
    assert objective.num_parameters == 9 + 3 + 6 + 2
    assert list(objective.parameter_shapes) == ["first.weight", "first.bias", "head.weight", "head.bias"]
    direction = torch.zeros(objective.num_parameters, dtype=torch.float64)
    direction[0] = 1e-5
    double = objective.to(torch.float64)
    up, down = (double.loss(double.parameters + sign * direction) for sign in (1, -1))
    assert ((up - down) / 2e-5).item() == pytest.approx(double.gradient()[0].item(), rel=1e-6)


def noisy_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Draws from all three global streams."""
    shift = torch.randn(()) + random.random() + float(np.random.rand())
    return half_mean_squared_error(module, (batch[0] + shift, batch[1]))


def test_a_loss_that_draws_random_numbers_sees_the_same_ones_each_time_and_leaves_the_streams() -> None:
    batches = [regression(5, 3, seed=s) for s in (0, 0)]
    module = nn.Linear(3, 2)
    before = RandomState.capture()
    objective = Objective(module, batches, loss_fn=noisy_loss, seed=4)
    first, gradient = objective.loss_and_gradient()
    assert RandomState.capture() == before
    torch.rand(7), random.random(), np.random.rand()
    moved = RandomState.capture()
    assert torch.equal(objective.loss(), objective.loss())
    assert torch.equal(objective.loss_and_gradient()[0], first)
    assert torch.equal(objective.gradient(), gradient)
    assert torch.equal(objective.batch_losses, torch.stack([objective.loss(batch=i) for i in range(2)]))
    assert RandomState.capture() == moved
    assert not torch.equal(objective.loss(batch=0), objective.loss(batch=1))  # equal data, noise of its own
    other_seed = Objective(module, batches, loss_fn=noisy_loss, seed=5)
    assert not torch.equal(objective.batch_losses, other_seed.batch_losses)


def test_dropout_in_train_mode_is_differentiable_against_its_own_differences() -> None:
    """Only with common random numbers does a difference quotient of a noisy loss equal its gradient."""
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    batch = tuple(t.double() for t in regression(6, 3))
    objective = Objective(module, [batch], loss_fn=half_mean_squared_error, mode="train")
    direction = torch.randn(objective.num_parameters, dtype=torch.float64)
    up, down = (objective.loss(objective.parameters + sign * 1e-6 * direction) for sign in (1, -1))
    assert ((up - down) / 2e-6).item() == pytest.approx((objective.gradient() @ direction).item(), rel=1e-6)
    quiet = Objective(module, [batch], loss_fn=half_mean_squared_error)
    assert quiet.loss().item() == pytest.approx(half_mean_squared_error(module.eval(), batch).item(), rel=1e-12)


def test_a_loss_that_changes_its_batch_and_its_buffers_sees_them_fresh_each_time() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(inputs) * self.calls

    def loss_fn(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        targets = batch.pop("targets")
        batch["inputs"].mul_(2)
        return half_mean_squared_error(module, (batch["inputs"], targets))

    module = Counting()
    inputs, targets = regression(5, 3)
    given = {"inputs": inputs.clone(), "targets": targets.clone()}
    objective = Objective(module, [given], loss_fn=loss_fn)
    assert given.keys() == {"inputs", "targets"} and torch.equal(given["inputs"], inputs)
    assert module.calls == 0
    expected = half_mean_squared_error(nn.Linear.forward.__get__(module), (2 * inputs, targets))  # type: ignore[arg-type]
    for value in (objective.batch_losses[0], objective.loss(), objective.loss_and_gradient()[0], objective.loss()):
        torch.testing.assert_close(value, expected.detach())


def test_what_is_given_can_change_afterwards() -> None:
    module, batch = nn.Linear(3, 2), regression(5, 3)
    objective = Objective(module, [batch], loss_fn=half_mean_squared_error)
    before = objective.loss()
    with torch.no_grad():
        module.weight.add_(1)
        batch[0].zero_()
    assert torch.equal(objective.loss(), before)


def test_hooks_and_gradients_of_the_module_stay() -> None:
    module, batch = nn.Linear(3, 2), regression(5, 3)
    half_mean_squared_error(module, batch).backward()
    gradient = module.weight.grad.clone()
    backward_calls: list[int] = []
    module.register_full_backward_hook(lambda *_: backward_calls.append(1))
    Objective(module, [batch], loss_fn=half_mean_squared_error).gradient()
    assert torch.equal(module.weight.grad, gradient)
    assert not backward_calls
    half_mean_squared_error(module, batch).backward()
    assert backward_calls == [1]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_made_and_used_where_gradients_are_off(context: Any) -> None:
    module, batch = nn.Linear(3, 2), regression(5, 3)
    expected = own_gradient(module, batch)[1]
    with context():
        objective = Objective(module, [batch], loss_fn=half_mean_squared_error)
    torch.testing.assert_close(objective.gradient(), expected)


def test_half_precision_parameters_are_computed_in_float32() -> None:
    module, batch = nn.Linear(3, 2).to(torch.bfloat16), regression(5, 3)
    objective = Objective(module, [batch], loss_fn=half_mean_squared_error)
    assert objective.dtype == torch.float32
    torch.testing.assert_close(objective.loss(), half_mean_squared_error(module.float(), batch).detach())


def test_another_dtype_is_the_same_function() -> None:
    torch.manual_seed(3)
    module, batch = Recurrent(nn.LSTM), regression(4, 5, 3)
    objective = Objective(module, [batch], loss_fn=half_mean_squared_error).to(torch.float64)
    double = module.double()
    expected = own_gradient(double, (batch[0].double(), batch[1].double()))[1]
    torch.testing.assert_close(objective.gradient(), expected, rtol=1e-12, atol=1e-15)
    assert objective.to(torch.float64) is objective


def not_a_scalar(module: Any, batch: Any) -> Any:
    return (module(batch[0]) - batch[1]).square().mean(dim=1)


def a_float(module: Any, batch: Any) -> Any:
    return half_mean_squared_error(module, batch).item()


def detached(module: Any, batch: Any) -> Any:
    return half_mean_squared_error(module, batch).detach()


def of_something_else(module: Any, batch: Any) -> Any:
    return torch.ones(3, requires_grad=True).sum()


def infinite(module: Any, batch: Any) -> Any:
    return half_mean_squared_error(module, batch) / 0


GOOD = nn.Linear(3, 2)
BATCHES = [regression(5, 3)]
BAD: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "one loss a sample": (GOOD, BATCHES, {"loss_fn": not_a_scalar}, ValueError, r"shape \(5,\); expected a scalar"),
    "a float": (GOOD, BATCHES, {"loss_fn": a_float}, TypeError, "returned a float; expected a scalar tensor"),
    "detached": (GOOD, BATCHES, {"loss_fn": detached}, ValueError, "does not depend on the trainable parameters"),
    "of something else": (GOOD, BATCHES, {"loss_fn": of_something_else}, ValueError, "does not depend"),
    "infinite": (GOOD, BATCHES, {"loss_fn": infinite}, ValueError, "loss of batch 0 is inf; expected a finite number"),
    "no batches": (GOOD, [], {}, ValueError, "batches is empty"),
    "empty batch": (GOOD, [(torch.zeros(0, 3), torch.zeros(0, 2))], {}, ValueError, "hold no samples"),
    "a tensor": (GOOD, torch.zeros(5, 3), {}, TypeError, r"Wrap a single batch as \[batch\]"),
    "a number": (GOOD, 3, {}, TypeError, "batches is a int; expected a list"),
    "no parameters": (nn.Tanh(), BATCHES, {}, ValueError, "no trainable parameters"),
    "all frozen": (nn.Linear(3, 2).requires_grad_(False), BATCHES, {}, ValueError, "requires_grad=True"),
    "complex": (nn.Linear(3, 2, dtype=torch.complex64), BATCHES, {}, TypeError, "'weight' has type torch.complex64"),
    "no module": (torch.tanh, BATCHES, {}, TypeError, "expected a torch.nn.Module"),
    "lazy": (nn.LazyLinear(2), BATCHES, {}, TypeError, "'weight' is uninitialised"),
    "no device": (nn.Linear(3, 2, device="meta"), BATCHES, {}, TypeError, "one real device"),
    "unknown mode": (GOOD, BATCHES, {"mode": "test"}, ValueError, "mode is 'test'; expected 'eval' or 'train'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_an_objective(case: str) -> None:
    module, batches, options, kind, message = BAD[case]
    before = RandomState.capture()
    with pytest.raises(kind, match=message):
        Objective(module, batches, **{"loss_fn": half_mean_squared_error, **options})
    assert RandomState.capture() == before


def test_a_module_that_cannot_be_copied_is_refused_with_the_mend() -> None:
    module = nn.Linear(3, 2)
    module.lines = (line for line in ["a", "b"])  # a generator has no copy
    with pytest.raises(TypeError, match="Linear cannot be copied.*Define __deepcopy__"):
        Objective(module, BATCHES, loss_fn=half_mean_squared_error)


def test_restricted_to_some_parameters_it_is_the_same_loss_with_the_others_fixed() -> None:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    whole = Objective(module, [(torch.randn(8, 3), torch.randn(8, 2))], loss_fn=half_mean_squared_error)
    part = whole.restricted_to("0")
    assert list(part.parameter_shapes) == ["0.weight", "0.bias"] and part.num_parameters == 16
    assert torch.equal(part.gradient(), whole.gradient()[:16])
    moved = whole.parameters + torch.cat([torch.full((16,), 0.1), torch.zeros(10)])
    assert part.loss(part.parameters + 0.1) == whole.loss(moved)
    assert torch.equal(whole.restricted_to("*.bias").gradient(), whole.gradient()[[12, 13, 14, 15, 24, 25]])
    assert whole.restricted_to("2.weight", "0").num_parameters == 24
    with pytest.raises(ValueError, match=r"'1' matches no .* one of: 0\.weight, 0\.bias, 2\.weight, 2\.bias"):
        whole.restricted_to("0", "1")
    with pytest.raises(ValueError, match="No pattern"):
        whole.restricted_to()


def test_the_gradient_at_the_start_is_found_in_the_first_pass() -> None:
    """No batch is evaluated once more for it, and what is made of the objective has a gradient of its own."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    calls = []

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(0)
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    batches = [(torch.randn(size, 3), torch.randint(2, (size,))) for size in (5, 4, 3)]
    objective = Objective(module, batches, loss_fn=loss_fn)
    before = len(calls)
    loss, gradient = objective.loss_and_gradient()
    assert len(calls) == before
    again, evaluated = objective.loss_and_gradient(objective.parameters)
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(gradient, evaluated)
    for other in (objective.first_batches(1), objective.to(torch.float64), objective.restricted_to("0")):
        torch.testing.assert_close(other.gradient(), other.gradient(other.parameters))
    gradient.zero_()  # what is given away is the caller's
    torch.testing.assert_close(objective.gradient(), evaluated)
