"""The data that a run is measured on: what is chosen, and that choosing leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from phasewatch.isolation import RandomState
from phasewatch.objective.batches import UnknownSizeError, count_samples
from phasewatch.probe import StreamProbe, draw_probe, support

SAMPLES = 40


def numbered() -> TensorDataset:
    """Every sample is its own index."""
    return TensorDataset(torch.arange(SAMPLES))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(SAMPLES)


class Mine(Sampler[int]):
    """A sampler of an unknown kind, whose iteration would move a random stream."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the sampler of the user was iterated")

    def __len__(self) -> int:
        return SAMPLES


class MyBatches(BatchSampler):
    pass


class Noisy(Dataset[Tensor]):
    """Items that draw from every global random stream."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


def indices(batches: list[Any]) -> list[int]:
    return [int(i) for batch in batches for i in batch[0]]


KNOWN = {
    "in order": lambda: DataLoader(numbered(), batch_size=8),
    "shuffled": lambda: DataLoader(numbered(), batch_size=8, shuffle=True),
    "batch sampler": lambda: DataLoader(
        numbered(), batch_sampler=BatchSampler(SequentialSampler(numbered()), 8, drop_last=False)
    ),
    "distributed": lambda: DataLoader(
        numbered(), batch_size=8, sampler=DistributedSampler(numbered(), num_replicas=2, rank=1)
    ),
    "workers": lambda: DataLoader(numbered(), batch_size=8, shuffle=True, num_workers=2),
}
UNKNOWN = {
    "stream": lambda: DataLoader(Stream(), batch_size=8),
    "own sampler": lambda: DataLoader(numbered(), batch_size=8, sampler=Mine()),
    "weighted": lambda: DataLoader(numbered(), batch_size=8, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)),
    "own batch sampler": lambda: DataLoader(
        numbered(), batch_sampler=MyBatches(SequentialSampler(numbered()), 8, False)
    ),
    "own sampler in a batch sampler": lambda: DataLoader(numbered(), batch_sampler=BatchSampler(Mine(), 8, False)),
    "list of batches": lambda: [torch.arange(8)],
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_map_style_data_set_is_drawn_from_without_repetition(case: str) -> None:
    loader = KNOWN[case]()
    assert list(support(loader) or []) == list(range(SAMPLES))
    probe = draw_probe(loader, 24)
    assert [count_samples(b) for b in probe.batches] == probe.sizes == [8, 8, 8]
    drawn = indices(probe.batches)
    assert len(set(drawn)) == 24 and set(drawn) <= set(range(SAMPLES))
    assert drawn != sorted(drawn)
    assert drawn == indices(draw_probe(loader, 24).batches) != indices(draw_probe(loader, 24, seed=1).batches)
    assert drawn == indices(draw_probe(loader, 24, batch_size=24).batches)
    assert set(indices(draw_probe(loader, 1000).batches)) == set(range(SAMPLES))


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_only_a_stream_can_tell(case: str) -> None:
    assert support(UNKNOWN[case]()) is None


def test_a_subset_sampler_limits_the_probe_to_its_subset() -> None:
    loader = DataLoader(numbered(), batch_size=4, sampler=SubsetRandomSampler(range(10, 22)))
    assert set(indices(draw_probe(loader).batches)) == set(range(10, 22))


def test_every_sample_is_as_likely_as_any_other() -> None:
    """Chi-square over 400 seeds of 10 from 40; beyond 85 with probability below 3e-5 if the draw is uniform."""
    loader = DataLoader(numbered(), batch_size=10)
    drawn = [i for seed in range(400) for i in indices(draw_probe(loader, 10, seed).batches)]
    counts = np.bincount(drawn, minlength=SAMPLES)
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 85


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own_generator", [True, False])
def test_the_users_loader_and_the_random_streams_are_as_if_nothing_was_drawn(workers: int, own_generator: bool) -> None:
    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return DataLoader(Noisy(), batch_size=8, shuffle=True, generator=generator, num_workers=workers)

    def two_epochs(draw: bool) -> list[Tensor]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        given = loader()
        seen = list(given)
        if draw:
            before = RandomState.capture()
            draw_probe(given, 16)
            assert RandomState.capture() == before
        return seen + list(given)

    untouched, drawn_from = two_epochs(False), two_epochs(True)
    assert all(torch.equal(a, b) for a, b in zip(untouched, drawn_from, strict=True))


def test_transforms_that_draw_see_the_same_numbers_for_the_same_seed() -> None:
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True)
    first = torch.cat(draw_probe(loader, 16).batches)
    torch.rand(3), np.random.rand(), random.random()
    assert torch.equal(first, torch.cat(draw_probe(loader, 16).batches))
    assert not torch.equal(first, torch.cat(draw_probe(loader, 16, seed=1).batches))


def test_batch_size_and_collate_are_the_loaders_own_and_short_rests_are_left_out() -> None:
    def collate(items: list[Any]) -> dict[str, Any]:
        return {"index": torch.stack([item[0] for item in items]), "count": len(items)}

    probe = draw_probe(DataLoader(numbered(), batch_size=12, collate_fn=collate), 30)
    assert [b["count"] for b in probe.batches] == probe.sizes == [12, 12, 6]
    full = probe.without_short_rest()
    assert [b["count"] for b in full.batches] == full.sizes == [12, 12]
    one = draw_probe(DataLoader(numbered(), batch_size=12, collate_fn=collate), 7).without_short_rest()
    assert [b["count"] for b in one.batches] == one.sizes == [7]


def test_without_automatic_batching_an_item_is_a_batch() -> None:
    class Batches(Dataset[Tensor]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Tensor:
            return torch.full((6,), index)

    probe = draw_probe(DataLoader(Batches(), batch_size=None), 14)
    batches = probe.batches
    assert probe.sizes is None and [len(b) for b in batches] == [6, 6, 6]  # the first number of batches with 14 samples
    assert len({int(b[0]) for b in batches}) == 3


def test_an_empty_data_set() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(0, 3)), batch_sampler=BatchSampler(SequentialSampler([]), 4, False))
    with pytest.raises(ValueError, match="data set is empty"):
        draw_probe(loader)


def test_a_random_sampler_with_replacement_still_gives_each_sample_once() -> None:
    sampler = RandomSampler(numbered(), replacement=True, num_samples=400)
    assert len(set(indices(draw_probe(DataLoader(numbered(), batch_size=8, sampler=sampler)).batches))) == SAMPLES


def test_a_stream_is_captured_until_there_are_enough_samples() -> None:
    probe = StreamProbe(20)
    for batch in DataLoader(Stream(), batch_size=8):
        probe.capture(batch)
    assert torch.equal(torch.cat(probe.batches), torch.arange(24))
    assert probe.complete


def test_what_was_captured_shares_nothing_with_the_stream() -> None:
    batch = {"x": torch.ones(4, 2), "names": ["a", "b"], "pair": (torch.zeros(4), 3)}
    probe = StreamProbe(4)
    with torch.inference_mode():
        probe.capture(batch)
    batch["x"].mul_(5)
    batch["names"].append("c")
    (kept,) = probe.batches
    assert torch.equal(kept["x"], torch.ones(4, 2)) and kept["names"] == ["a", "b"]
    assert not kept["x"].is_inference()


@pytest.mark.parametrize(("given", "typical", "sizes"), [(None, 5, [5, 5]), (3, 5, [3, 3, 3])])
def test_a_stream_whose_batches_do_not_say_their_size(given: int | None, typical: int | None, sizes: list[int]) -> None:
    """Asked for, or known to the loader; never guessed."""
    batch = {"table": torch.zeros(7, 2), "rows": torch.zeros(4)}
    probe = StreamProbe(9, batch_size=given, typical_size=typical)
    for _ in range(3):
        probe.capture(batch)
    assert probe.sizes == sizes
    with pytest.raises(UnknownSizeError, match=r"lengths 4, 7. Give it: .*batch_size=\.\.\. to a callback"):
        StreamProbe(9).capture(batch)
