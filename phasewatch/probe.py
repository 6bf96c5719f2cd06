"""The fixed data that a run is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from phasewatch.isolation import isolated, seed_everything
from phasewatch.objective.batches import UnknownSizeError, clone_batch, count_samples

DEFAULT_SAMPLES = 512
"""Of a probe that is drawn, unless it is said how many. Chosen."""


@dataclass(frozen=True)
class DrawnProbe:
    """Batches drawn from a data set.

    Attributes:
        batches: The batches.
        sizes: Samples in each; None where an item of the data set is a batch, and its size is its own.
    """

    batches: list[Any]
    sizes: list[int] | None

    def without_short_rest(self) -> DrawnProbe:
        """Without a last batch that is shorter than the first: its noise would dominate the sampler's."""
        if self.sizes is None or self.sizes[-1] == self.sizes[0]:
            return self
        return DrawnProbe(self.batches[:-1], self.sizes[:-1])


def support(loader: Any) -> list[int] | range | None:
    """The indices of the data set that a loader draws from, or None if only its stream can tell.

    A sampler of an unknown kind is not iterated: that could move its random stream, and with it the order of the
    training batches.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    dataset: Any = loader.dataset
    batch_sampler: Any = loader.batch_sampler
    if type(batch_sampler) not in (BatchSampler, type(None)) or not hasattr(dataset, "__len__"):
        return None
    sampler = loader.sampler if batch_sampler is None else batch_sampler.sampler
    if isinstance(sampler, SubsetRandomSampler):
        return list(sampler.indices)
    if type(sampler) in (RandomSampler, SequentialSampler, DistributedSampler):
        return range(len(dataset))
    return None


def batch_size_of(loader: Any) -> int | None:
    """Samples in a batch of a loader, where it says so; None too where an item of its data set is a batch."""
    # A sampler of batches has the size also where the user gave it.
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or getattr(loader, "batch_size", None)
    return size if isinstance(size, int) else None


def draw_probe(
    loader: DataLoader[Any], samples: int = DEFAULT_SAMPLES, seed: int = 0, *, batch_size: int | None = None
) -> DrawnProbe:
    """Batches of the data set of a loader, drawn without touching the loader or any global random stream.

    Args:
        loader: A loader whose :func:`support` is known; its ``collate_fn`` is used.
        samples: How many samples to draw, at most the whole data set.
        seed: Seeds the choice, and transforms that draw random numbers.
        batch_size: Samples in each batch, of the same samples; default the loader's own.

    Raises:
        ValueError: If the data set is empty.
    """
    indices = support(loader)
    assert indices is not None
    if not len(indices):
        raise ValueError("The data set is empty; there is nothing to measure on.")
    generator = torch.Generator().manual_seed(seed)
    chosen = [indices[i] for i in torch.randperm(len(indices), generator=generator)[:samples].tolist()]
    own_size = batch_size_of(loader)
    size = min(batch_size or own_size or len(chosen), len(chosen))
    private = DataLoader(
        loader.dataset,
        batch_size=None if own_size is None else size,
        sampler=chosen,
        collate_fn=loader.collate_fn,
        num_workers=0,
        generator=generator,
    )
    with isolated():
        seed_everything(seed)
        if own_size is not None:
            sizes = [min(size, len(chosen) - start) for start in range(0, len(chosen), size)]
            return DrawnProbe(list(private), sizes)
        batches: list[Any] = []
        for batch in private:
            batches.append(batch)
            if sum(map(count_samples, batches)) >= samples:
                break
        return DrawnProbe(batches, None)


class StreamProbe:
    """Clones of the first batches of a stream, for data that cannot be drawn from.

    Attributes:
        samples: How many samples to collect.
        batches: The clones so far.
        sizes: Samples in each.
    """

    def __init__(
        self, samples: int = DEFAULT_SAMPLES, batch_size: int | None = None, typical_size: int | None = None
    ) -> None:
        """Start empty.

        Args:
            samples: How many samples to collect.
            batch_size: Samples in each batch; default what can be read off it.
            typical_size: What its loader says of that; taken where nothing can be read off.
        """
        self.samples = samples
        self.batches: list[Any] = []
        self.sizes: list[int] = []
        self._batch_size = batch_size
        self._typical_size = typical_size

    @property
    def complete(self) -> bool:
        """Whether enough samples were seen."""
        return sum(self.sizes) >= self.samples

    def capture(self, batch: Any) -> None:
        """Keep a clone of the batch, unless the probe is complete.

        Raises:
            UnknownSizeError: If the number of its samples is neither given nor to be read off.
        """
        if not self.complete:
            self.sizes.append(self._size(batch))
            with torch.inference_mode(False):
                self.batches.append(clone_batch(batch))

    def restore(self, batches: Sequence[Any], sizes: Sequence[int]) -> None:
        """Take what an earlier process collected; it is complete."""
        self.batches, self.sizes, self.samples = list(batches), list(sizes), 0

    def _size(self, batch: Any) -> int:
        if self._batch_size is not None:
            return self._batch_size
        try:
            return count_samples(batch)
        except UnknownSizeError:
            if self._typical_size is None:
                raise
            return self._typical_size
