"""The fixed data that a run is measured on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
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

DEFAULT_SAMPLES = 512


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


def draw_probe(
    loader: DataLoader[Any], samples: int = DEFAULT_SAMPLES, seed: int = 0, *, in_one_batch: bool = False
) -> list[Any]:
    """Batches of the data set of a loader, drawn without touching the loader or any global random stream.

    Args:
        loader: A loader whose :func:`support` is known; its batch size and ``collate_fn`` are used.
        samples: How many samples to draw, at most the whole data set.
        seed: Seeds the choice, and transforms that draw random numbers.
        in_one_batch: Whether to collate all samples into one batch, which needs more memory and has no noise.

    Raises:
        ValueError: If the data set is empty.
    """
    indices = support(loader)
    assert indices is not None
    if not len(indices):
        raise ValueError("The training data set is empty; there is nothing to measure on.")
    generator = torch.Generator().manual_seed(seed)
    chosen = [indices[i] for i in torch.randperm(len(indices), generator=generator)[:samples].tolist()]
    batch_sampler: Any = loader.batch_sampler  # has the batch size also where the user gave a sampler of batches
    size = len(chosen) if in_one_batch or batch_sampler is None else min(batch_sampler.batch_size, len(chosen))
    private = DataLoader(
        loader.dataset,
        batch_size=None if batch_sampler is None else size,
        drop_last=batch_sampler is not None,  # the noise of a very short batch would dominate the sampler's
        sampler=chosen,
        collate_fn=loader.collate_fn,
        num_workers=0,
        generator=generator,
    )
    with isolated():
        seed_everything(seed)
        if batch_sampler is not None:
            return list(private)
        batches: list[Any] = []
        for batch in private:
            batches.append(batch)
            if sum(batch_size(b) for b in batches) >= samples:
                break
        return batches


class StreamProbe:
    """Clones of the first batches of a stream, for data that cannot be drawn from.

    Attributes:
        samples: How many samples to collect.
        batches: The clones so far.
    """

    def __init__(self, samples: int = DEFAULT_SAMPLES) -> None:
        """Start empty."""
        self.samples = samples
        self.batches: list[Any] = []

    @property
    def complete(self) -> bool:
        """Whether enough samples were seen."""
        return sum(batch_size(batch) for batch in self.batches) >= self.samples

    def capture(self, batch: Any) -> None:
        """Keep a clone of the batch, unless the probe is complete."""
        if not self.complete:
            with torch.inference_mode(False):
                self.batches.append(clone_batch(batch))


def batch_size(batch: Any) -> int:
    """Number of samples of a batch: the length of the first tensor in it, 1 if there is none."""
    lengths = (leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    return next(lengths, 1)


def clone_batch(batch: Any) -> Any:
    """A copy of a batch that shares no memory with it."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), batch)
