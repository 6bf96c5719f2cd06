"""Programs with the samples last in memory, against what was traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from phasewatch.objective.program import losses_and_gradients
from phasewatch.objective.simplified import simplified
from phasewatch.objective.turned import turn

PLACES, SAMPLES, WIDTH, CLASSES = 3, 40, 6, 5
GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.randn(SAMPLES, WIDTH, generator=GENERATOR)
LABELS = torch.randint(CLASSES, (SAMPLES,), generator=GENERATOR)
LABELS[::7] = -100
FACTORS = torch.randn(SAMPLES, CLASSES, generator=GENERATOR)
SIZES = (WIDTH * WIDTH, WIDTH, CLASSES * WIDTH, CLASSES)
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of the outputs, shape ``(samples, classes)``, and the labels."""


def outputs(vector: Tensor, data: Tensor, nonlinearity: Callable[[Tensor], Tensor]) -> Tensor:
    first, bias, second, last = vector.split(SIZES)
    hidden = nonlinearity(functional.linear(data, first.view(WIDTH, WIDTH), bias))
    return functional.linear(hidden, second.view(CLASSES, WIDTH), last)


def sorted_over_samples(hidden: Tensor) -> Tensor:
    """What takes the entries in their order."""
    return torch.sort(hidden, dim=0).values


def weighted(said: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(said, labels, weight=torch.arange(1.0, CLASSES + 1), label_smoothing=0.1)


def in_double(said: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(said.double(), labels)


def against_targets(said: Tensor, labels: Tensor) -> Tensor:
    targets = torch.outer(labels.float().cos(), torch.arange(1.0, CLASSES + 1))
    return functional.mse_loss(said, targets) + functional.huber_loss(2 * said, targets)


def squared(said: Tensor, labels: Tensor) -> Tensor:
    return (said - FACTORS).square().mean()


def normalized_over_samples(said: Tensor, labels: Tensor) -> Tensor:
    centred = said - said.mean(dim=0, keepdim=True)
    return (centred / said.std(dim=0)).pow(4).sum(dim=1).mean() + said.sum(dim=(0, 1)).square()


def normalized_over_classes(said: Tensor, labels: Tensor) -> Tensor:
    return (functional.layer_norm(said, (CLASSES,)) - labels[:, None]).abs().mean()


def read_in_order(said: Tensor, labels: Tensor) -> Tensor:
    first = said.reshape(-1)[: 2 * CLASSES]
    return (first * torch.arange(len(first))).sum() + said.view(4, -1).square().sum(dim=1).log1p().prod()


def one_against_the_other(said: Tensor, labels: Tensor) -> Tensor:
    """Of both orders in one operation; with one entry a class, and one a sample."""
    return (said * FACTORS - said.T.contiguous().T.exp() / said.mT.cosh().mT + said.mean(1, True)).tanh().mean()


def with_a_bias_of_the_classes(said: Tensor, labels: Tensor) -> Tensor:
    return torch.where(said > torch.arange(CLASSES), said, said * 0.1).logsumexp(dim=-1).mean()


def averaged_over_networks(said: Tensor, labels: Tensor) -> Tensor:
    """A sum over neither of the dimensions that are exchanged."""
    return (torch.stack([said, 2 * said, said.tanh()]).log_softmax(dim=-1).mean(dim=0) * FACTORS).square().mean()


def read_as_they_lie(said: Tensor, labels: Tensor) -> Tensor:
    """By an operation that takes for granted that the last dimension is the last in memory."""
    said = said.tanh().log_softmax(dim=1)[None, None]
    return functional.scaled_dot_product_attention(said, said, said).square().mean()


def gathered_and_read_as_they_lie(said: Tensor, labels: Tensor) -> Tensor:
    chosen = said.log_softmax(dim=1).gather(1, torch.stack([labels % CLASSES, labels % 2], dim=1))
    return torch.view_as_complex(chosen).abs().mean()


def with_an_option_named_value(said: Tensor, labels: Tensor) -> Tensor:
    return (torch.addcmul(said, said, FACTORS, value=2) - FACTORS).mean()


LOSSES = (
    functional.cross_entropy,
    weighted,
    in_double,
    against_targets,
    squared,
    normalized_over_samples,
    normalized_over_classes,
    read_in_order,
    one_against_the_other,
    with_a_bias_of_the_classes,
    averaged_over_networks,
    read_as_they_lie,
    gathered_and_read_as_they_lie,
    with_an_option_named_value,
)


def with_gradients(loss: Loss, nonlinearity: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return at_several_places(lambda vector, data, labels: loss(outputs(vector, data, nonlinearity), labels))


def at_several_places(of_one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Losses and gradients."""

    def evaluation(vectors: Tensor, data: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return losses_and_gradients(lambda vector, tensors: of_one(vector, *tensors))(vectors, [data, labels])

    return evaluation


def places() -> Tensor:
    return torch.randn(PLACES, sum(SIZES), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "nonlinearity", [torch.relu, torch.tanh, functional.gelu, functional.softplus, sorted_over_samples]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_results(loss: Loss, nonlinearity: Callable[[Tensor], Tensor]) -> None:
    evaluation = with_gradients(loss, nonlinearity)
    steps = simplified(make_fx(evaluation)(places(), DATA, LABELS))
    for data, labels in ((DATA, LABELS), (DATA.flip(0) + 1, LABELS.roll(1))):
        expected = evaluation(places() - 0.5, data, labels)
        found = steps.each(places() - 0.5, *steps.once(data, labels))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def with_added_of_fewer_dimensions(vector: Tensor, data: Tensor) -> Tensor:
    factor = vector[: WIDTH * WIDTH].view(1, WIDTH, WIDTH)
    added = vector[0], vector[:WIDTH], data, data[:, :1]
    return torch.stack([torch.baddbmm(each, data[None], factor, beta=0.5).tanh().mean() for each in added])


def with_numbers_for_parameters(vector: Tensor, data: Tensor) -> Tensor:
    return ((vector[0] * data[:, 0]).exp() + vector[1]).sum()


def summed_over_networks(vector: Tensor, data: Tensor) -> Tensor:
    factors = vector[: 2 * WIDTH * WIDTH].view(2, WIDTH, WIDTH)
    return torch.bmm(data.expand(2, *data.shape), factors).tanh().sum(dim=0) * data


def transposed_numbers(vector: Tensor, data: Tensor) -> Tensor:
    return torch.transpose(torch.transpose(vector.sum(), 0, -1), 0, -1) * data


@pytest.mark.parametrize(
    "function",
    [with_added_of_fewer_dimensions, with_numbers_for_parameters, summed_over_networks, transposed_numbers],
)
@pytest.mark.parametrize("samples", [SAMPLES, WIDTH + 1])
def test_the_same_results_at_one_place(function: Callable[[Tensor, Tensor], Tensor], samples: int) -> None:
    vectors, data = places(), DATA[:samples]
    steps = simplified(make_fx(lambda vector, data: (function(vector, data),))(vectors[0], data))
    found = steps.each(vectors[1], *steps.once(data + 1))
    torch.testing.assert_close(found, (function(vectors[1], data + 1),), rtol=1e-4, atol=1e-5)


def is_product(node: Node) -> bool:
    return node.target in (torch.bmm, torch.baddbmm)


@pytest.mark.parametrize("loss", [functional.cross_entropy, in_double, squared])
def test_products_have_the_samples_last_and_nothing_is_copied(loss: Loss) -> None:
    """Of the five products of two layers those with samples on a side have them as columns; the fifth has none."""
    traced = make_fx(with_gradients(loss, torch.relu))(places(), DATA, LABELS)
    nodes = simplified(traced).each.__self__.graph.nodes  # type: ignore[attr-defined]
    shapes = sorted(tuple(node.meta["val"].shape[1:]) for node in nodes if is_product(node))
    assert shapes == sorted([(WIDTH, SAMPLES), (CLASSES, SAMPLES), (WIDTH, SAMPLES), (CLASSES, WIDTH), (WIDTH, WIDTH)])
    assert not [node for node in nodes if node.target is torch.ops.aten.clone.default]


def test_of_one_output_nothing_is_multiplied_as_matrices_that_are_vectors() -> None:
    """The slopes of a layer with one output are an outer product, and its output is read in any order."""

    def loss(vector: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        first, bias, second, _ = vector.split(SIZES)
        hidden = functional.linear(data, first.view(WIDTH, WIDTH), bias).tanh()
        return functional.mse_loss(functional.linear(hidden, second[:WIDTH].view(1, WIDTH)), FACTORS[:, :1])

    evaluation = at_several_places(loss)
    steps = simplified(make_fx(evaluation)(places(), DATA, LABELS))
    found, expected = steps.each(places() / 2, *steps.once(DATA, LABELS)), evaluation(places() / 2, DATA, LABELS)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    products = [node for node in steps.each.__self__.graph.nodes if is_product(node)]  # type: ignore[attr-defined]
    shapes = sorted(tuple(node.meta["val"].shape[1:]) for node in products)
    assert shapes == sorted([(WIDTH, SAMPLES), (1, SAMPLES), (WIDTH, 1), (WIDTH, WIDTH)])


def test_with_fewer_samples_than_features_products_are_left_as_they_are() -> None:
    few = DATA[: WIDTH - 2], LABELS[: WIDTH - 2]
    graph = make_fx(with_gradients(functional.cross_entropy, torch.relu))(places(), *few).graph
    before = [
        (node.target, node.meta["val"].shape) for node in graph.nodes if node.target is torch.ops.aten.bmm.default
    ]
    turn(graph)
    after = [(node.target, node.meta["val"].shape) for node in graph.nodes if node.target is torch.ops.aten.bmm.default]
    assert after == before
    assert len(before) == 5
