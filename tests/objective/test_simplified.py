"""Traces that leave out what need not be run, against what was traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from phasewatch.objective.program import losses_and_gradients
from phasewatch.objective.simplified import MOST_KEPT, simplified

PLACES, SAMPLES, WIDTH, CLASSES = 3, 7, 4, 5
DATA, TARGETS = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0)), torch.arange(SAMPLES) % CLASSES
Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def weights(vector: Tensor) -> list[Tensor]:
    first, bias, second = vector.split([WIDTH * WIDTH, WIDTH, CLASSES * WIDTH])
    return [first.view(WIDTH, WIDTH), bias, second.view(CLASSES, WIDTH)]


def cross_entropy(vector: Tensor, data: Tensor, targets: Tensor) -> Tensor:
    first, bias, second = weights(vector)
    return nn.functional.cross_entropy(nn.functional.linear(data, first, bias).relu() @ second.T, targets)


def in_double(vector: Tensor, data: Tensor, targets: Tensor) -> Tensor:
    first, bias, second = weights(vector)
    outputs = ((data @ first.T + bias).tanh() @ second.T).double()
    return nn.functional.cross_entropy(outputs, targets) - (data.mean() * outputs.softmax(1)).sum()


def flattened(vector: Tensor, data: Tensor, targets: Tensor) -> Tensor:
    """What is made of the log-probabilities wants them in their own order in memory."""
    first, bias, second = weights(vector)
    said = torch.log_softmax((data @ first.T + bias) @ second.T, dim=-1)
    return (said.view(-1) * torch.arange(said.numel())).sum() + said.T.reshape(-1)[:3].sum()


def linear(vector: Tensor, data: Tensor, targets: Tensor) -> Tensor:
    """With a gradient that is the same everywhere."""
    return vector.sum() * data.mean()


def square(vector: Tensor, data: Tensor, targets: Tensor) -> Tensor:
    """With a gradient that is the place itself."""
    return vector.square().sum() / 2


def added_to_one_row(vector: Tensor, data: Tensor, targets: Tensor) -> Tensor:
    """A sum of a product with what has more rows, and one with what is of another type."""
    first, bias, second = weights(vector)
    hidden = data @ first.T + bias
    row, rows = hidden[:1] @ first, (hidden @ second.T).double()
    return (row + hidden).tanh().mean() + (hidden @ second.T + rows).tanh().mean()


def with_gradients(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    def evaluation(vectors: Tensor, data: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return losses_and_gradients(lambda vector, tensors: loss(vector, *tensors))(vectors, [data, targets])

    return evaluation


@pytest.mark.parametrize("loss", [cross_entropy, in_double, flattened, linear, square, added_to_one_row])
def test_the_same_results_at_other_places_and_on_other_data(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(PLACES, WIDTH * WIDTH + WIDTH + CLASSES * WIDTH, generator=generator)
    evaluation = with_gradients(loss)
    steps = simplified(make_fx(evaluation)(vectors, DATA, TARGETS))
    for data, targets in ((DATA, TARGETS), (DATA.flip(0) + 1, TARGETS.roll(1))):
        kept = steps.once(data, targets)
        for place in (vectors, vectors.flip(0) - 0.5):
            for found, expected in zip(steps.each(place, *kept), evaluation(place, data, targets), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, linear, square])
def test_results_may_be_written_to(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Neither the places nor what was kept changes with them."""
    vectors = torch.ones(PLACES, WIDTH * WIDTH + WIDTH + CLASSES * WIDTH)
    steps = simplified(make_fx(with_gradients(loss))(vectors, DATA, TARGETS))
    kept = steps.once(DATA, TARGETS)
    first = [found.clone() for found in steps.each(vectors, *kept)]
    for found in steps.each(vectors, *kept):
        found.fill_(torch.nan)
    assert bool((vectors == 1).all())
    for found, expected in zip(steps.each(vectors, *kept), first, strict=True):
        assert torch.equal(found, expected)


def test_results_of_what_is_left_as_it_is_may_be_written_to() -> None:
    def evaluation(vectors: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        return vectors.T, data.T, (vectors * 2).mul_(3)

    vectors, data = torch.ones(2, 3), torch.ones(4, 5)
    steps = simplified(make_fx(evaluation)(vectors, data))
    for found in steps.each(vectors, *steps.once(data)):
        found.fill_(torch.nan)
    assert bool((vectors == 1).all())
    assert bool((data == 1).all())


@pytest.mark.parametrize("dims", [[-1], [1], [0, -1], [], None])
def test_sums_that_keep_their_dimensions(dims: list[int] | None) -> None:
    def evaluation(vectors: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        summed, other = (torch.sum(made, dim=dims, keepdim=True) for made in (vectors.exp(), vectors.cos()))
        return summed.view(summed.shape) * data, other.view(-1) * data

    vectors, data = torch.ones(2, 3), torch.ones(4, 2, 1)
    steps = simplified(make_fx(evaluation)(vectors, data))
    torch.testing.assert_close(steps.each(vectors, *steps.once(data)), evaluation(vectors, data))


def operations(function: Callable[..., object]) -> int:
    return sum(node.op == "call_function" for node in function.__self__.graph.nodes)  # type: ignore[attr-defined]


def test_what_depends_on_the_data_alone_is_computed_once() -> None:
    """Of a product of the data with themselves nothing is left; the trace itself has four times as many operations."""

    def evaluation(vectors: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        return (vectors * (data @ data.T).exp().sum(),)

    traced = make_fx(evaluation)(torch.ones(2, 3), DATA)
    assert operations(simplified(traced).each) == 1
    traced = make_fx(with_gradients(cross_entropy))(torch.ones(PLACES, 40), DATA, TARGETS)
    before = sum(node.op == "call_function" for node in traced.graph.nodes)
    assert operations(simplified(traced).each) < before / 2


def test_what_is_kept_is_bounded() -> None:
    def evaluation(vectors: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        return (vectors * (data[:, None] * data).exp(),)

    rows = int((MOST_KEPT / 4) ** 0.5) + 1
    data = torch.linspace(0, 1, rows)
    steps = simplified(make_fx(evaluation)(torch.ones(1), data))
    kept = steps.once(data)
    assert all(tensor.numel() <= rows for tensor in kept)
    assert torch.equal(steps.each(torch.full((1,), 2.0), *kept)[0], 2 * (data[:, None] * data).exp())


def test_what_is_kept_in_another_type_is_bounded() -> None:
    def evaluation(vectors: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        return (vectors * data,)

    data = torch.arange(MOST_KEPT // 2).to(torch.uint8)
    steps = simplified(make_fx(evaluation)(torch.ones(1), data))
    kept = steps.once(data)
    assert all(tensor.data_ptr() == data.data_ptr() for tensor in kept)
    assert torch.equal(steps.each(torch.full((1,), 2.0), *kept)[0], 2.0 * data)


def test_what_writes_in_place_is_left_as_it_is() -> None:
    def evaluation(vectors: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        made = data * 2
        made += 1
        made.mul_(vectors.sum())
        return (made,)

    vectors = torch.ones(2, 3)
    steps = simplified(make_fx(evaluation)(vectors, DATA))
    kept = steps.once(DATA)
    for _ in range(2):
        torch.testing.assert_close(steps.each(vectors, *kept)[0], (DATA * 2 + 1) * 6)
