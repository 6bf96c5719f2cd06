"""What a batch is made of: its tensors, everything else, and how many samples it has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes)
"""Leaves beside tensors that nothing can change in place."""


MOST_COLOURS = 4
"""Channels that an image may have. Chosen: a mask or a depth beside three colours."""


class UnknownSizeError(ValueError):
    """The number of samples of a batch cannot be read off it, and is not guessed."""


class Layout:
    """A batch without its tensors: puts it together again from these or from others.

    A batch of tuples, lists and dictionaries that hold tensors and plain constants is *plain*. Of any other (a
    dataclass, a mapping of another library, a graph, NumPy arrays) each copy is a deep one, in which tensors are
    replaced wherever they are, so that nothing done to a copy is seen by the next.

    Attributes:
        signature: Equal only where two batches differ in nothing but their tensors.
    """

    def __init__(self, batch: Any) -> None:
        """Take a batch to pieces; it is copied, and may be changed afterwards.

        Raises:
            TypeError: If it holds something that cannot be copied.
        """
        leaves, self._structure = tree_flatten(batch)
        self._leaves: list[Any] | None = None
        self._original: Any = None
        if all(isinstance(leaf, Tensor) or type(leaf) in _CONSTANTS for leaf in leaves):
            self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
            self._original_tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self.signature: tuple[Any, ...] = (str(self._structure), repr(self._leaves))
        else:
            self._original_tensors = []
            self._original = _substitute(batch, self._note)
            self.signature = (id(self),)

    def _note(self, tensor: Tensor) -> Tensor:
        self._original_tensors.append(tensor)
        return tensor

    @property
    def tensors(self) -> list[Tensor]:
        """The batch's tensors, each once, in the order in which :meth:`rebuild` takes them."""
        return self._original_tensors

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The batch with these tensors in place of its own, in containers of its own."""
        given = iter(tensors)
        if self._leaves is None:
            replacement = {id(own): next(given) for own in self._original_tensors}
            return _substitute(self._original, lambda tensor: replacement[id(tensor)])
        pairs = zip(self._leaves, self._is_tensor, strict=True)
        return tree_unflatten([next(given) if is_tensor else leaf for leaf, is_tensor in pairs], self._structure)


class _Substitution(TorchFunctionMode):
    """Puts another tensor in the place of each that ``copy.deepcopy`` comes to."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self._function(tensor)
        return memo[id(tensor)]


def _substitute(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    try:
        with _Substitution(function):
            return copy.deepcopy(batch)
    except Exception as error:
        raise TypeError(
            f"A batch of type {type(batch).__name__} cannot be copied ({type(error).__name__}: {error}), and must be, "
            "so that no evaluation sees what another did to it. Define __deepcopy__ on what cannot be copied, or give "
            "batches of tensors in tuples, lists and dictionaries."
        ) from error


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A copy of a batch of any kind, with a function of each tensor in its place."""
    layout = Layout(batch)
    return layout.rebuild([function(tensor) for tensor in layout.tensors])


def clone_batch(batch: Any) -> Any:
    """A copy of a batch that shares no memory with it; tensors are detached."""
    return map_tensors(lambda tensor: tensor.detach().clone(), batch)


def count_samples(batch: Any) -> int:
    """Number of samples of a batch, where that can be read off it.

    A packed sequence or a batch with an integer attribute ``num_graphs`` or ``batch_size`` says so itself. Otherwise
    tensors must agree in their first dimension, and lists that could be lists of samples must agree with them.
    Tensors without dimensions do not count.

    Raises:
        UnknownSizeError: If that leaves several answers or none.

    Example:
        >>> count_samples((torch.zeros(8, 3), {"labels": torch.zeros(8), "temperature": torch.tensor(0.5)}))
        8
    """
    if (stated := _stated_size(batch)) is not None:
        return stated
    found = sorted(set(_sizes(batch)) or set(_text_sizes(batch)))
    if len(found) == 1:
        return found[0]
    if found:
        reason = f"its tensors and lists have lengths {', '.join(map(str, found))}"
    else:
        reason = "it holds no tensor with a first dimension and no list of texts"
    raise UnknownSizeError(
        f"The number of samples of a batch ({type(batch).__name__}) cannot be read off: {reason}. Give it: "
        "batch_sizes=[...] to Objective and Watch, batch_size=... to a callback."
    )


def _stated_size(batch: Any) -> int | None:
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor):
        return int(batch.size(0)) if batch.dim() else None
    for name in ("num_graphs", "batch_size"):
        size = getattr(batch, name, None)
        if isinstance(size, torch.Size) and len(size) == 1:
            size = size[0]
        if type(size) is int and size > 0:
            return size
    return None


def _sizes(batch: Any) -> Iterator[int]:
    """All candidates for the number of samples."""
    if (stated := _stated_size(batch)) is not None:
        yield stated
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, (list, tuple)):
        yield from _sizes_of_sequence(batch)
    elif type(batch) not in _CONSTANTS and not isinstance(batch, Tensor):
        parts = [tensor for tensor in Layout(batch).tensors if tensor.dim()]
        yield from (int(tensor.size(0)) for tensor in parts)


def _sizes_of_sequence(batch: Sequence[Any]) -> Iterator[int]:
    """Columns of a batch, or its samples one by one: where both could be, both are candidates."""
    if all(isinstance(item, Tensor) and item.dim() for item in batch):
        lengths = [int(item.size(0)) for item in batch]
        yield from lengths
        alike = len({(item.shape[1:], item.dtype) for item in batch}) == 1
        # Images in a list look like columns with as many samples as colours.
        like_images = all(item.dim() == 3 and item.size(0) <= MOST_COLOURS for item in batch)
        if len(batch) > 1 and (like_images or (alike and (len(set(lengths)) > 1 or len(batch) > lengths[0]))):
            yield len(batch)
    elif len(batch) > 1 and all(_is_record(item) for item in batch):
        if any(_has_scalars(item) for item in batch):
            yield len(batch)
            return
        inner = {size for item in batch for size in _sizes(item)}
        yield from inner
        if len(inner) != 1 or len(batch) > max(inner):
            yield len(batch)
    else:
        for item in batch:
            yield from _sizes(item)


def _text_sizes(batch: Any) -> Iterator[int]:
    """Lengths of lists of texts, for batches that hold nothing else."""
    if isinstance(batch, dict):
        for value in batch.values():
            yield from _text_sizes(value)
    elif isinstance(batch, (list, tuple)):
        if batch and all(isinstance(item, str) for item in batch):
            yield len(batch)
        else:
            for item in batch:
                yield from _text_sizes(item)


def _is_record(item: Any) -> bool:
    return not isinstance(item, (Tensor, PackedSequence)) and type(item) not in _CONSTANTS


def _has_scalars(record: Any) -> bool:
    """Whether it holds what a batch of several samples has no use for: numbers, and tensors without dimensions."""
    leaves = tree_leaves(record)
    return any((isinstance(leaf, Tensor) and not leaf.dim()) or type(leaf) in (bool, int, float) for leaf in leaves)
