"""Evaluations at several places and on several batches at once, against single ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from phasewatch import Objective
from phasewatch.objective import split_off_misfit


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Dropout(0.3)).double()


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def weighted(module: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The data hold a number that is no tensor."""
    return batch["weight"] * functional.cross_entropy(module(batch["x"]), batch["y"])


def branching(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What is run depends on a value in the data."""
    sign = -1 if float(batch[0][0, 0]) > 0 else 1
    return sign * cross_entropy(module, batch)


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, 5, generator=generator).double(), torch.randint(3, (n,), generator=generator)) for n in sizes
    ]


def named(sizes: list[int]) -> list[dict[str, Any]]:
    return [{"x": x, "y": y, "weight": 1.0 + k % 2} for k, (x, y) in enumerate(batches(sizes))]


@pytest.mark.parametrize("places", [1, 3])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("loss_fn", "data"), [(cross_entropy, batches), (weighted, named), (branching, batches)], ids=lambda f: f.__name__
)
def test_all_batches_are_the_weighted_mean_of_single_ones(
    loss_fn: Callable[..., Tensor], data: Callable[[list[int]], list[Any]], mode: str, places: int
) -> None:
    """Whatever is traced, stacked, or not; batches of several sizes, dropout on and off."""
    torch.manual_seed(0)
    objective = Objective(network(), data([8, 8, 4, 8, 4, 8, 1]), loss_fn=loss_fn, mode=mode)  # type: ignore[arg-type]
    vectors = objective.parameters + 0.3 * torch.randn(places, objective.num_parameters).double()
    singles = [objective.loss_and_gradient(vector) for vector in vectors]
    for _ in range(2):  # the second call takes what the first has kept
        losses, gradients = objective.losses_and_gradients(vectors)
        assert torch.allclose(losses, torch.stack([loss for loss, _ in singles]), rtol=1e-9)
        assert torch.allclose(gradients, torch.stack([gradient for _, gradient in singles]), rtol=1e-8, atol=1e-12)
        assert torch.allclose(objective.losses(vectors), losses, rtol=1e-9)
    for batch in range(objective.num_batches):
        losses, gradients = objective.losses_and_gradients(vectors, batch)
        assert torch.allclose(losses[-1], objective.loss(vectors[-1], batch), rtol=1e-9)


def test_parts_of_a_loss_over_all_batches() -> None:
    """What is read beside the outputs goes with its batch."""
    torch.manual_seed(1)
    objective = Objective(network(), batches([6, 6, 6, 2]), loss_fn=cross_entropy)
    vectors = objective.parameters + 0.3 * torch.randn(4, objective.num_parameters).double()
    for part in split_off_misfit(objective):
        expected = torch.stack([part.loss(vector) for vector in vectors])
        assert torch.allclose(part.losses(vectors), expected, rtol=1e-9, atol=1e-12)
        assert torch.allclose(part.losses_and_gradients(vectors)[0], expected, rtol=1e-9, atol=1e-12)


def test_losses_of_samples() -> None:
    """Each from a batch of its own; the second call takes the trace."""
    torch.manual_seed(2)
    objective = Objective(network(), batches([6, 5]), loss_fn=cross_entropy)
    vectors = objective.parameters + 0.3 * torch.randn(3, objective.num_parameters).double()
    x, y = objective.batches[1]
    alone = Objective(objective.module, [(x[i : i + 1], y[i : i + 1]) for i in range(5)], loss_fn=cross_entropy)
    expected = torch.stack([torch.stack([alone.loss(vector, i) for i in range(5)]) for vector in vectors])
    for _ in range(2):
        assert torch.allclose(objective.sample_losses(vectors, 1), expected, rtol=1e-9)


def test_one_at_a_time_says_the_same_with_one_place_in_memory() -> None:
    places: list[int] = []

    def seen(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        places.append(1)
        return cross_entropy(module, batch)

    torch.manual_seed(0)
    together = Objective(network(), batches([8, 8]), loss_fn=seen)
    apart = together.evaluated_one_at_a_time()
    vectors = together.parameters + 0.1 * torch.randn(4, together.num_parameters).double()
    for one, other in ((together, apart), (together.behavioral(), apart.behavioral())):
        for ours, theirs in zip(one.losses_and_gradients(vectors), other.losses_and_gradients(vectors), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(one.losses(vectors), other.losses(vectors))
    torch.testing.assert_close(apart.sample_losses(vectors, 0), together.sample_losses(vectors, 0))
    places.clear()
    apart.losses_and_gradients(vectors, 0)
    assert len(places) == 4
    for derived in (apart.behavioral(), apart.first_batches(1), apart.to(torch.float32), apart.restricted_to("0")):
        assert derived.one_at_a_time
