"""A module's structure as our own: the copy that is evaluated, whose tensors stand where, what it keeps in between."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

_SHARED_TYPES = (Dataset, DataLoader)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def structure_copy(module: nn.Module) -> nn.Module:
    """The module tree with its Python state copied and its parameters, buffers and data sets shared.

    Raises:
        TypeError: If something in it cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    for submodule in module.modules():
        for value in vars(submodule).values():
            if isinstance(value, _SHARED_TYPES):
                memo[id(value)] = value
            # kept losses and reparametrized weights are parts of a graph, which deepcopy refuses
            graph = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_leaf)
            memo.update({id(leaf): leaf.detach().clone() for leaf in graph})
    try:
        duplicate = copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and the measurement needs a "
            "copy so as not to touch the original. Define __deepcopy__ on what cannot be copied, or keep it outside "
            "of the module."
        ) from error
    copies = {id(one): other for one, other in zip(module.modules(), duplicate.modules(), strict=True)}
    for submodule in module.modules():
        _bind_uncompiled(vars(submodule), copies[id(submodule)], copies)
    for submodule in duplicate.modules():
        if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)):
            submodule.sparse = False  # the same numbers, and a gradient that fits into a vector
        submodule._backward_hooks.clear()
        submodule._backward_pre_hooks.clear()
        for name, child in submodule._modules.items():
            submodule._modules[name] = _uncompiled(child)
    return _uncompiled(duplicate)


def _bind_uncompiled(attributes: Mapping[str, Any], own: nn.Module, copies: Mapping[int, nn.Module]) -> None:
    """A method that was compiled, as in ``module.forward = torch.compile(module.forward)``, belongs to the original."""
    for name, value in attributes.items():
        if isinstance(value, types.FunctionType) and hasattr(value, "_torchdynamo_orig_callable"):
            plain = value._torchdynamo_orig_callable
            if plain.__globals__["__name__"] == "torch._dynamo.external_utils":  # around methods of torch's own modules
                plain = plain.__wrapped__
            owner = copies.get(id(getattr(plain, "__self__", None)))
            vars(own)[name] = plain if owner is None else types.MethodType(plain.__func__, owner)


def _uncompiled(module: Any) -> Any:
    """What ``torch.compile`` wraps: compiled graphs have no second derivatives."""
    return getattr(module, "_orig_mod", module)


def check_parameters(trainable: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that are not whole, real and on one device.

    Raises:
        ValueError: If there are none.
        TypeError: If they are sharded, uninitialised, complex or spread over several devices.
    """
    if not trainable:
        raise ValueError("The module has no trainable parameters; at least one parameter needs requires_grad=True.")
    for name, parameter in trainable.items():
        if type(parameter).__name__ in ("DTensor", "FlatParameter") or hasattr(parameter, "ds_id"):
            raise TypeError(f"Parameter {name!r} is sharded (FSDP, DeepSpeed); phasewatch needs whole parameters.")
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise TypeError(f"Parameter {name!r} is uninitialised; run the lazy module on one batch first.")
        if not parameter.is_floating_point():
            raise TypeError(f"Parameter {name!r} has type {parameter.dtype}; only real floating-point is supported.")
    devices = {str(parameter.device) for parameter in trainable.values()}
    if len(devices) > 1 or "meta" in devices:
        raise TypeError(f"Parameters are on {sorted(devices)}; phasewatch needs all of them on one real device.")


class Places:
    """Where the parameters and buffers of a module stand, each under all names that it has."""

    def __init__(self, module: nn.Module) -> None:
        """Find them; a tied tensor has several places."""
        names: dict[int, str] = {}
        self._slots: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for prefix, owner in module.named_modules(remove_duplicate=False):
            for tensors in (owner._parameters, owner._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        name = names.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                        self._slots.setdefault(name, []).append((tensors, key))

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Put other tensors in their places, for all that is run inside.

        That must include backward passes: recomputation (``torch.utils.checkpoint``) and gradients written by hand read
        the module's tensors once more.
        """
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name, tensor in tensors.items():
                for slots, key in self._slots[name]:
                    before.append((slots, key, slots[key]))
                    slots[key] = tensor
            with _gradients_through_checkpoints():
                yield
        finally:
            for slots, key, tensor in reversed(before):
                slots[key] = tensor

    def replace(self, made_of: Callable[[Tensor], Tensor]) -> None:
        """Put another tensor in the place of each, for good; a tied one stays tied."""
        for places in self._slots.values():
            slots, key = places[0]
            tensor = made_of(slots[key])
            for slots, key in places:
                slots[key] = tensor


class KeptState:
    """A module as it is now, for later: a copy with tensors of its own, which wait in main memory.

    What a loss reads from other objects, as from a trainer, is what it will be then.
    """

    def __init__(self, module: nn.Module) -> None:
        """Copy it.

        Raises:
            TypeError: If something in it cannot be copied.
        """
        self._module = structure_copy(module)
        self._devices: dict[int, torch.device] = {}
        Places(self._module).replace(self._kept)

    def module(self) -> nn.Module:
        """The copy, its parameters and buffers where those of the module were."""
        Places(self._module).replace(self._back)
        return self._module

    def _kept(self, tensor: Tensor) -> Tensor:
        kept = _like(tensor, tensor.detach().to("cpu", copy=True))
        self._devices[id(kept)] = tensor.device
        return kept

    def _back(self, tensor: Tensor) -> Tensor:
        return _like(tensor, tensor.detach().to(self._devices.get(id(tensor), tensor.device)))


def _like(original: Tensor, tensor: Tensor) -> Tensor:
    """A parameter where the original is one."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=original.requires_grad)
    return tensor


class _NonReentrant:
    """In place of the reentrant ``CheckpointFunction``, whose backward pass sees parameters only in ``.grad``."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


@contextmanager
def _gradients_through_checkpoints() -> Iterator[None]:
    original = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = original  # type: ignore[misc]


class PythonState:
    """What the submodules of a module keep from call to call in attributes, lists and dictionaries.

    Hidden states and caches are such; parameters and buffers that were there from the start are not. Objects of other
    classes are left alone.
    """

    def __init__(self, module: nn.Module) -> None:
        """Copy the state as it is; scripted modules keep none that Python could see."""
        self._kept = [
            (m, {key: _copied(value) for key, value in _own(m).items()}, dict(m._buffers))
            for m in module.modules()
            if not isinstance(m, torch.jit.ScriptModule)
        ]

    def of_what_has_changed(self) -> PythonState | None:
        """The state of those submodules alone whose state is another by now; None if there are none."""
        changed = copy.copy(self)
        changed._kept = [
            (module, kept, buffers)
            for module, kept, buffers in self._kept
            if not _same(_own(module), kept)
            or module._buffers.keys() != buffers.keys()
            or any(buffer is None and module._buffers[key] is not None for key, buffer in buffers.items())
        ]
        return changed if changed._kept else None

    def shed(self) -> None:
        """Drop what lists and dictionaries have taken in since, however much they held; put all else back."""
        for module, kept, _ in self._kept:
            for key, before in kept.items():
                now = vars(module).get(key)
                if isinstance(before, (list, dict)) and type(now) is type(before):
                    _shorten(now, before)
                elif key in vars(module) and _is_data(now):
                    vars(module)[key] = _copied(before)

    def restore(self) -> None:
        """Put everything back as it was."""
        for module, kept, buffers in self._kept:
            now = _own(module)
            for key in now.keys() - kept.keys():
                delattr(module, key)
            for key, value in kept.items():
                if key in now or key not in vars(module):
                    vars(module)[key] = _copied(value)
            for key in module._buffers.keys() - buffers.keys():
                del module._buffers[key]
            module._buffers.update({key: None for key, buffer in buffers.items() if buffer is None})


def _own(module: nn.Module) -> dict[str, Any]:
    return {key: v for key, v in vars(module).items() if key not in _OF_EVERY_MODULE and _is_data(v)}


def _is_data(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    return value is None or isinstance(value, (Tensor, np.ndarray, np.generic, bool, int, float, complex, str, bytes))


def _shorten(now: Any, before: Any) -> None:
    """Take out of a list or dictionary, and of those in a dictionary, what it has beyond what it had."""
    if isinstance(now, list):
        del now[len(before) :]
    elif isinstance(now, dict):
        for new in now.keys() - before.keys():
            del now[new]
        for key, value in now.items():
            if isinstance(value, (list, dict)) and type(value) is type(before[key]):
                _shorten(value, before[key])


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


def _copied(value: Any) -> Any:
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in tree_leaves(value) if isinstance(x, Tensor)}
    return copy.deepcopy(value, memo)


def plain_attributes(module: nn.Module) -> str:
    """All numbers, texts and the like that the submodules have in attributes: another network where they differ."""
    plain = (bool, int, float, complex, str, tuple)
    return repr(
        [
            (name, key, value)
            for name, m in module.named_modules()
            for key, value in vars(m).items()
            if isinstance(value, plain) and key not in _OF_EVERY_MODULE
        ]
    )


def computing_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """The widest of the types, at least single precision."""
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype
