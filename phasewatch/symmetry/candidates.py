"""What the structure of a network, and what its units do on the probe, suggest as zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phasewatch.objective import Objective
from phasewatch.objective.memory import give_back
from phasewatch.symmetry.architecture import find_architecture
from phasewatch.symmetry.directions import Added, Directions
from phasewatch.symmetry.effect import RelativeEffect
from phasewatch.symmetry.generic import generic_directions
from phasewatch.symmetry.ledger import ORDER
from phasewatch.symmetry.tape import Indices, record
from phasewatch.symmetry.units import (
    Closeness,
    annihilating_directions,
    data_rank_directions,
    layers_of,
    unit_directions,
)

_MOST_COTANGENTS = 16
"""Combinations of outputs of which gradients are seen, at most; a quarter of that on a large network. Chosen."""

_MANY_OUTPUTS = 2**12
"""Outputs from which on a large network makes do with one cotangent. Chosen."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Directions to look at; the recording that they are from is held no longer.

    Attributes:
        directions: What may be zeros, in the order in which dimensions are credited.
        effect: What a direction changes in the outputs.
        matrices: Coordinates of the weights of each layer, one row a unit.
        closeness: How far each hidden layer is from degenerate.
        unknown: What is not known of the network, in words.
    """

    directions: list[Directions]
    effect: RelativeEffect
    matrices: list[Indices]
    closeness: tuple[Closeness, ...]
    unknown: list[str]


def seek(objective: Objective, generator: torch.Generator, large: bool) -> Candidates:
    """Look at one layer after another: what all of them do on the probe together takes several times the memory.

    Args:
        objective: The loss on the probe.
        generator: Draws the combinations of outputs of which gradients are seen.
        large: Whether to leave out what is dear.
    """
    recording = record(objective, generator, lambda outputs: _cotangents(outputs, objective.num_batches, large))
    architecture = find_architecture(objective, recording)
    recording.let_go()
    _tidy(large)
    parameters = objective.parameters.double().cpu().numpy()
    effect = RelativeEffect(objective, recording.linearizations)
    of_units: list[Directions] = []
    closeness: list[Closeness] = []
    for layer in layers_of(architecture):
        _tidy(large)
        of_units += unit_directions(layer, parameters)
        closeness.append(layer.closeness(parameters))
        if layer.site is not None:
            layer.site.let_go()
        del layer  # before the next is made
    for site in architecture.sites:
        _tidy(large)
        of_units += annihilating_directions(site)
        of_units += data_rank_directions(site, thorough=not large, rank_limit=effect.rank_limit)
        site.let_go()
    generic = generic_directions(architecture, parameters)
    directions = [d for d in (*generic, *of_units, *_untouched(recording.gradient, objective)) if d.count]
    unknown = architecture.unknown
    if not recording.alike:
        unknown.append("what changes from batch to batch in the order of calls")
    return Candidates(
        directions=sorted(directions, key=lambda d: ORDER[d.kind]),
        effect=effect,
        matrices=[w.rows for space in architecture.spaces for w in space.writers if not w.diagonal],
        closeness=tuple(closeness),
        unknown=unknown,
    )


def _tidy(large: bool) -> None:
    """What the layers before have left behind is more than what is held of one."""
    if large:
        give_back()


def _untouched(gradient: Tensor, objective: Objective) -> list[Directions]:
    """Parameters that nothing depends on: unused ones, rows of embeddings for tokens that are not in the probe."""
    zero = (gradient == 0).cpu().numpy()
    found, start = [], 0
    for name, shape in objective.parameter_shapes.items():
        places = start + np.flatnonzero(zero[start : start + shape.numel()])
        start += shape.numel()
        if places.size:
            form = Added(places[:, None], np.ones((1, 1)))
            found.append(Directions("data rank", name.rpartition(".")[0] or name, (), (form,)))
    return found


def _cotangents(outputs: Sequence[Tensor], num_batches: int, large: bool) -> int:
    """As many as a sample has outputs tell all that a layer's gradients can; a large network makes do with a few.

    Units that are seen by the same few samples only seem to cancel where there are too few; with many outputs in
    all, that does not happen.
    """
    most = max(max(output.shape[-1] if output.dim() else 1 for output in outputs), 1)
    if large:
        many = num_batches * sum(output.numel() for output in outputs) > _MANY_OUTPUTS
        return min(most, 1 if many else _MOST_COTANGENTS // 4)
    return min(most, _MOST_COTANGENTS)
