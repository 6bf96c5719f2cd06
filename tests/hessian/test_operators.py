from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cross_entropy, half_squared_error, mlp, normal
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phasewatch.hessian import GaussNewtonOperator, HessianOperator, effective_rank, hessian_spectrum, operators
from phasewatch.objective import Objective, second_derivatives


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3, bias=False)
        self.decoder = nn.Linear(4, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) @ self.decoder.weight


class TokenNet(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.core = core
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.core(self.embedding(tokens))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden.mean(1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _tokens(core: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 5, (9, 6), generator=generator)
    labels = torch.randint(0, 3, (9,), generator=generator)
    return TokenNet(core), [(tokens[:6], labels[:6]), (tokens[6:], labels[6:])]


def _images(*layers: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    images = normal(9, 2, 6, 6)
    labels = torch.arange(9) % 3
    return nn.Sequential(*layers), [(images[:6], labels[:6]), (images[6:], labels[6:])]


def _batch_norm() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    module, batches = _images(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    module(normal(32, 2, 6, 6, seed=3).float())  # running statistics other than the initial ones
    return module, batches


def _tied() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    x = normal(9, 4)
    return TiedAutoencoder(), [(x[:6], x[:6]), (x[6:], x[6:])]


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, activation="gelu", batch_first=True)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, list]], Callable]] = {
    "tied": (_tied, half_squared_error),
    "batch norm": (_batch_norm, cross_entropy),
    "conv": (lambda: _images(nn.Conv2d(2, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), cross_entropy),
    "attention": (lambda: _tokens(SelfAttention()), cross_entropy),
    "encoder layer": (lambda: _tokens(_encoder_layer()), cross_entropy),
    "lstm": (lambda: _tokens(nn.LSTM(4, 4, batch_first=True)), cross_entropy),
}


def _objective(name: str) -> Objective:
    make, loss_fn = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, batches = make()
    return Objective(module, batches, loss_fn=loss_fn).to(torch.float64)


def _forward_over_reverse_free_hessian(objective: Objective) -> Tensor:
    """An independent Hessian: central differences of the gradient, right to about 1e-8."""
    h = 1e-5
    rows = []
    for i in range(objective.num_parameters):
        step = torch.zeros_like(objective.parameters)
        step[i] = h
        with second_derivatives():
            up = objective.gradient(objective.parameters + step)
            down = objective.gradient(objective.parameters - step)
        rows.append((up - down) / (2 * h))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_hessian_is_the_derivative_of_the_gradient(name: str) -> None:
    objective = _objective(name)
    expected = _forward_over_reverse_free_hessian(objective)
    computed = HessianOperator(objective).dense()
    assert torch.allclose(computed, expected, atol=1e-8, rtol=1e-6)
    assert torch.allclose(computed, computed.T, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_is_the_product_of_its_factors(name: str) -> None:
    objective = _objective(name)
    total = torch.zeros(objective.num_parameters, objective.num_parameters, dtype=torch.float64)
    for batch, weight in enumerate(objective.batch_weights):
        with second_derivatives():
            inputs, targets = objective.batches[batch]

            def outputs(vector: Tensor, inputs: Tensor = inputs) -> Tensor:
                tensors = {**objective.unflatten(vector), **objective.fixed}
                return torch.func.functional_call(objective.module, tensors, (inputs,))

            def loss(y: Tensor, targets: Tensor = targets, squared: bool = name == "tied") -> Tensor:
                if squared:
                    return 0.5 * (y - targets).square().sum(1).mean()
                return nn.functional.cross_entropy(y, targets)

            jacobian = torch.autograd.functional.jacobian(outputs, objective.parameters).flatten(0, 1)
            y = outputs(objective.parameters).detach()
            curvature = torch.autograd.functional.hessian(loss, y).reshape(y.numel(), y.numel())
        total += weight * jacobian.T @ curvature @ jacobian
    assert torch.allclose(GaussNewtonOperator(objective).dense(), total, atol=1e-12)


def test_hessian_equals_torch_func_hessian_with_a_short_last_batch() -> None:
    x, y = normal(11, 4), normal(11, 2, seed=1)
    module = mlp(4, 5, 2)
    shapes = {name: p.shape for name, p in module.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        tensors = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        return 0.5 * (torch.func.functional_call(module, tensors, (x,)) - y).square().sum(1).mean()

    objective = Objective(module, [(x[:8], y[:8]), (x[8:], y[8:])], loss_fn=half_squared_error)
    expected = torch.func.hessian(loss)(objective.parameters)
    assert torch.allclose(HessianOperator(objective).dense(), expected, atol=1e-13)
    vector = normal(objective.num_parameters, seed=5)
    assert torch.allclose(HessianOperator(objective) @ vector, expected @ vector, atol=1e-13)


@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator])
def test_products_do_not_depend_on_which_graphs_are_kept(operator: type[HessianOperator]) -> None:
    objective = _objective("encoder layer")
    kept = operator(objective)
    vectors = normal(3, objective.num_parameters)
    expected = [kept @ v for v in vectors]
    assert kept.kept_bytes > 0
    for budget in (0, kept.kept_bytes - 1):
        other = operator(objective, graph_memory=budget)
        assert all(torch.equal(other @ v, e) for v, e in zip(vectors, expected, strict=True))
        assert other.kept_bytes <= budget
    assert 0 < other.kept_bytes < kept.kept_bytes
    assert other.products == 3


@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("forward", [True, False])
def test_what_is_built_anew_is_freed_at_once(
    operator: type[HessianOperator], forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only when the collector comes by: on a transformer that took gigabytes."""
    monkeypatch.setattr(operators, "_FORWARD_MODE_FROM", 0 if forward else 1e9)
    objective = _objective("encoder layer")
    graphs: list[weakref.ref[object]] = []
    build = operator._linearize

    def seen(self: Any, parameters: Tensor, batch: int) -> tuple[Any, list[Tensor]]:
        product, derivatives = build(self, parameters, batch)
        graphs.append(weakref.ref(product))
        return product, derivatives

    monkeypatch.setattr(operator, "_linearize", seen)
    matrix, vector = operator(objective, graph_memory=0), normal(objective.num_parameters)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            matrix @ vector
        assert len(graphs) > 3 and all(graph() is None for graph in graphs)
    finally:
        gc.enable()


@pytest.mark.parametrize("weighted", [False, True])
def test_of_log_probabilities_it_is_that_of_logits(weighted: bool) -> None:
    """The same network with its log-softmax inside, whose loss is linear in what it says; some labels are ignored."""
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    batch = normal(40, 6), torch.arange(40) % 4
    weights = {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)} if weighted else {}

    def entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1], ignore_index=3, **weights)

    def likelihood(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.nll_loss(module(batch[0]), batch[1], ignore_index=3, **weights)

    outside = Objective(logits, [batch], loss_fn=entropy)
    inside = Objective(nn.Sequential(logits, nn.LogSoftmax(-1)), [batch], loss_fn=likelihood)
    expected = GaussNewtonOperator(outside).dense()
    assert expected.trace() > 0.1
    for objective in (inside, inside.behavioral()):
        assert torch.allclose(GaussNewtonOperator(objective).dense(), expected, atol=1e-12)
    spread = torch.ones(outside.num_parameters, dtype=torch.float64)
    ranks = [effective_rank(objective.behavioral(), spread, 100.0).value for objective in (outside, inside)]
    assert ranks[0] > 1
    assert ranks[1] == pytest.approx(ranks[0], rel=1e-9)


def test_what_is_linear_and_no_log_probability_has_no_gauss_newton_matrix() -> None:
    """And of a cross-entropy of log-probabilities, which is bent already, nothing is counted twice."""
    torch.manual_seed(0)
    module = nn.Linear(3, 4).double()
    batch = normal(20, 3), torch.arange(20) % 4
    linear = Objective(module, [batch], loss_fn=lambda m, b: (m(b[0]) * nn.functional.one_hot(b[1])).sum(1).mean())
    assert not GaussNewtonOperator(linear).dense().any()
    for start in (module, _zeroed(module)):  # there all are as likely, and changes like the outputs change nothing
        outside, inside = (
            GaussNewtonOperator(Objective(network, [batch], loss_fn=cross_entropy)).dense()
            for network in (start, nn.Sequential(start, nn.LogSoftmax(-1)))
        )
        assert torch.allclose(inside, outside, atol=1e-12)


def _zeroed(module: nn.Linear) -> nn.Linear:
    other = copy.deepcopy(module)
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    return other


def test_kept_bytes_count_what_the_graph_holds() -> None:
    """Of ``exp(x w)`` with a scalar ``w`` the graph holds a few copies of the n numbers, whatever n."""

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(self.w * x)

    def kept(n: int) -> int:
        operator = HessianOperator(Objective(Scalar(), [normal(n)], loss_fn=lambda m, x: m(x).mean()))
        operator @ torch.ones(1)
        return operator.kept_bytes

    arrays = (kept(2000) - kept(1000)) / (1000 * 8)
    assert arrays == int(arrays)
    assert 2 <= arrays <= 6


def test_linear_loss_has_no_curvature() -> None:
    objective = Objective(nn.Linear(3, 2), [torch.ones(4, 3)], loss_fn=lambda m, x: m(x).mean())
    for matrix in ("hessian", "gauss-newton"):
        for dense_below in (0, 100):
            spectrum = hessian_spectrum(objective, matrix=matrix, dense_below=dense_below)
            assert spectrum.nullity == spectrum.num_parameters == 8
            assert spectrum.zeros.resolved
            assert "the matrix is zero" in spectrum.zeros.note
            assert spectrum.trace == spectrum.largest == spectrum.smallest == 0.0


def test_infinite_second_derivative_is_an_error_that_says_why() -> None:
    def loss_fn(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).abs().pow(1.5).mean()

    module = nn.Linear(2, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    objective = Objective(module, [torch.ones(4, 2)], loss_fn=loss_fn)
    with pytest.raises(ValueError, match=r"Hessian is not finite although the loss is"):
        hessian_spectrum(objective)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("dense_below", [0, 100])
def test_missing_second_derivative_is_an_error_that_says_so(dense_below: int) -> None:
    objective = Objective(nn.Linear(2, 1), [torch.ones(4, 2)], loss_fn=lambda m, x: OnceOnly.apply(m(x)).mean())
    with pytest.raises(RuntimeError, match=r"The operation OnceOnly has no second derivative.*once_differentiable"):
        hessian_spectrum(objective, dense_below=dense_below)


class FlashAttention(nn.Module):
    """Insists on a kernel that cannot be differentiated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.projection(x)[:, None]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return nn.functional.scaled_dot_product_attention(q, q, q)


def test_missing_second_derivative_is_named_where_torch_names_it() -> None:
    objective = Objective(FlashAttention(), [torch.ones(2, 3, 4)], loss_fn=lambda m, x: m(x).square().mean())
    with pytest.raises(RuntimeError, match=r"The operation \S*flash_attention\S* has no second derivative.*MATH"):
        hessian_spectrum(objective)


def test_wrong_vector_is_an_error() -> None:
    operator = HessianOperator(_objective("tied"))
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(12,\)"):
        operator @ torch.ones(3)


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
def test_measuring_inside_inference_mode_and_autocast_gives_the_same(matrix: str) -> None:
    objective = _objective("encoder layer")
    expected = hessian_spectrum(objective, matrix=matrix).eigenvalues
    with torch.inference_mode(), torch.autocast("cpu"):
        computed = hessian_spectrum(objective, matrix=matrix).eigenvalues
    assert (computed == expected).all()


class Doubled(torch.autograd.Function):
    """Has no forward-mode derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, *slopes: Tensor) -> Tensor:
        return 2 * slopes[0]


class DoubledWrongly(Doubled):
    """Its forward-mode derivative is not that of its backward pass."""

    @staticmethod
    def jvp(ctx: object, *tangents: Tensor) -> Tensor:
        return 3 * tangents[0]


@pytest.mark.parametrize("function", [None, Doubled, DoubledWrongly])
def test_products_in_forward_mode_are_those_by_backward_passes(
    monkeypatch: pytest.MonkeyPatch, function: type[Doubled] | None
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layers = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = x if function is None else function.apply(self.attend.out_proj.weight.sum() * x)
            return self.layers(x + self.attend(x, x, x, need_weights=False)[0]).mean(1)

    batches = [(normal(4, 5, 8, seed=i), torch.tensor([0, 1, 2, 1])) for i in range(2)]
    objective = Objective(Net().double(), batches, loss_fn=cross_entropy)
    vector = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = GaussNewtonOperator(objective) @ vector
    monkeypatch.setattr("phasewatch.hessian.operators._FORWARD_MODE_FROM", 0)
    operator = GaussNewtonOperator(objective)
    for _ in range(2):
        assert torch.allclose(operator @ vector, expected, rtol=1e-9, atol=1e-12)
    assert operator._forward_mode is (function is None)
    assert operator.rank_limit() == 2 * 4 * 3
