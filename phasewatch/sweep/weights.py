"""The weights of a checkpoint, put into the network that they are of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from phasewatch.sweep.checkpoints import state_dicts
from phasewatch.sweep.formats import CheckpointError

WRAPPERS = ("module.", "_orig_mod.")
"""What stands before every name where the network was wrapped: by DistributedDataParallel, by ``torch.compile``."""
PREFERRED = ("", "state_dict", "model_state_dict", "model")
"""Where a checkpoint's weights stand; these count before others that fit as well, such as averaged ones."""
MOST_LISTED = 4
"""Names that an error tells. Chosen."""


def load_weights(module: nn.Module, content: Any, path: Path) -> None:
    """Put the weights of a checkpoint into a network.

    They are what in it has the names and shapes of the network's own, be that wrapped by DistributedDataParallel or
    ``torch.compile``.

    Args:
        module: The network.
        content: What is in the checkpoint.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: If nothing in it, or more than one thing, fits; says what differs.
    """
    found = {place: _unwrapped(state, module) for place, state in state_dicts(content)}
    if not found:
        raise CheckpointError(f"{path} holds no weights; expected names and tensors, as state_dict() has them.")
    strict = getattr(module, "strict_loading", True)  # a LightningModule's own
    differences = {place: _difference(state, module, strict) for place, state in found.items()}
    fitting = [place for place, difference in differences.items() if not difference]
    if not fitting:
        own = module.state_dict().keys()
        nearest = max(found, key=lambda place: len(found[place].keys() & own))
        where = f" ({nearest})" if nearest else ""
        raise CheckpointError(
            f"{path}{where} is of another network than {type(module).__name__}: {differences[nearest]}. Give the "
            "network, with the settings, that it was saved from, or leave this checkpoint out."
        )
    chosen = next((place for place in PREFERRED if place in fitting), fitting[0] if len(fitting) == 1 else None)
    if chosen is None:
        raise CheckpointError(
            f"{path} holds several sets of weights that fit: {', '.join(fitting)}. Save the one that is meant alone."
        )
    module.load_state_dict(found[chosen], strict=False)  # what is missing is told above, or tied to what is there


def _unwrapped(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The same under the names that the network's own have, where it is known what stands before them."""
    own = module.state_dict().keys()
    bare = dict(state)
    for _ in WRAPPERS:
        for wrapper in WRAPPERS:
            if not own & bare.keys() and all(name.startswith(wrapper) for name in bare):
                bare = {name.removeprefix(wrapper): tensor for name, tensor in bare.items()}
    return bare


def _difference(state: Mapping[str, Tensor], module: nn.Module, strict: bool) -> str:
    """What keeps these from being the weights of the network; empty where nothing does."""
    own = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    there = {tensor.data_ptr() for name, tensor in own.items() if name in state and not is_lazy(tensor)}
    # a tied tensor is loaded under any of its names; safetensors keeps one of them
    missing = [name for name in own if name not in state and (is_lazy(own[name]) or own[name].data_ptr() not in there)]
    unknown = [name for name in state if name not in own and isinstance(state[name], Tensor)]
    shapes = [
        f"{name} is {tuple(state[name].shape)} there and {tuple(tensor.shape)} in the network"
        for name, tensor in own.items()
        if name in state and not is_lazy(tensor) and tensor.shape != state[name].shape
    ]
    told = []
    if missing and (strict or len(missing) == len(own)):
        told.append(f"it lacks {_some(missing)}")
    if unknown and strict:
        told.append(f"it has {_some(unknown)}, which the network has not")
    if shapes:
        told.append(_some(shapes))
    return "; ".join(told)


def _some(names: Collection[str]) -> str:
    more = len(names) - MOST_LISTED
    return ", ".join(list(names)[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
