"""Where all samples may be taken as one batch, and where that would be another loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phasewatch.objective.merging import one_batch_serves

Batch = tuple[Tensor, Tensor]


def data(samples: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 6, generator=generator), torch.randint(3, (samples,), generator=generator)


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def in_batch_negatives(module: nn.Module, batch: Batch) -> Tensor:
    """Each sample against all others of its batch."""
    scores = module(batch[0]) @ module(batch[0] + 0.1).T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def over_tokens(module: nn.Module, batch: Batch) -> Tensor:
    """A mean over those labels that are not padding, of which the batches hold unequal shares."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1], ignore_index=2)


def summed(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="sum") / 16


def of_one_size(module: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0].view(16, 6)), batch[1])


@pytest.mark.parametrize(
    ("loss_fn", "serves"),
    [(cross_entropy, True), (in_batch_negatives, False), (over_tokens, False), (summed, False), (of_one_size, False)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_only_a_mean_over_samples_is_the_same_in_one_batch(loss_fn: Any, serves: bool) -> None:
    whole = data()
    assert one_batch_serves(network(), split(whole, [16] * 4), None, lambda: whole, loss_fn=loss_fn) is serves


def test_a_short_rest_weighs_by_its_samples() -> None:
    whole = data()
    sizes = [20, 20, 20, 4]
    assert one_batch_serves(network(), split(whole, sizes), sizes, lambda: whole, loss_fn=cross_entropy)


def test_a_mean_over_samples_at_the_start_alone_is_not_enough() -> None:
    """The head is zero at first, and all losses are then log 3."""
    module = network()
    nn.init.zeros_(module[4].weight), nn.init.zeros_(module[4].bias)
    whole = data()
    with torch.no_grad():
        module[4].bias += 1e-6 * torch.tensor([1.0, 0.0, -1.0])
        module[4].weight += 1e-3 * torch.randn(3, 8)

    def compares(module: nn.Module, batch: Batch) -> Tensor:
        outputs = module(batch[0])
        return nn.functional.cross_entropy(outputs, batch[1]) + 30 * outputs.var(dim=0).sum()

    assert not one_batch_serves(module, split(whole, [16] * 4), None, lambda: whole, loss_fn=compares)


def test_what_does_not_fit_is_not_even_collated() -> None:
    """A language model with a large vocabulary: the logits of all sequences would take gigabytes."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20_000, 2), nn.Linear(2, 20_000)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]).flatten(0, 1), batch[0].flatten())

    tokens = torch.randint(20_000, (64, 64))
    batches = [(part,) for part in tokens.split(4)]

    def collate_all() -> Any:
        raise AssertionError("collated")

    assert not one_batch_serves(Small(), batches, None, collate_all, loss_fn=loss_fn)
