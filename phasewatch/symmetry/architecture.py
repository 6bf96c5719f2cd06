"""What is known of a network: its hidden spaces and linear layers, as the rules for its calls find them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phasewatch.objective import Objective
from phasewatch.symmetry.rules import arithmetic, attention, elementwise, linear_maps, norms, shapes
from phasewatch.symmetry.sites import Site
from phasewatch.symmetry.spaces import Pairing, Passage, Redundancy, Space
from phasewatch.symmetry.tape import Call, Recording
from phasewatch.symmetry.walk import Walk

Rule = Callable[[Walk, Call], None]
"""What a call does to the spaces that it meets."""

LAYERS: dict[str, Rule] = {**elementwise.LAYERS, **linear_maps.LAYERS, **norms.LAYERS, **attention.LAYERS}
"""Rules for functions with parameters of their own, by the name of the function."""

FUNCTIONS: dict[str, Rule] = {
    **elementwise.FUNCTIONS,
    **shapes.FUNCTIONS,
    **arithmetic.FUNCTIONS,
    **attention.FUNCTIONS,
}
"""Rules for functions that are given units."""

_NAMED = 6
"""Parameters of which nothing is known that are named; the others are counted as others. Chosen, for one line."""


@dataclass(eq=False)
class Architecture:
    """What is known of a network.

    Attributes:
        spaces: All spaces.
        pairings: All attentions.
        sites: All linear layers.
        redundant: Pairs of writers that are added up.
        passages: All BatchNorms in evaluation mode.
        not_followed: What is not known of the network as a whole, in words.
    """

    spaces: list[Space]
    pairings: list[Pairing]
    sites: list[Site]
    redundant: list[Redundancy]
    passages: list[Passage]
    not_followed: list[str]

    @property
    def unknown(self) -> list[str]:
        """What is not known by now, in words: that of the spaces grows as directions are looked for in them."""
        reasons = [reason for space in self.spaces for reason in space.broken]
        return list(dict.fromkeys([*self.not_followed, *reasons]))


def find_architecture(objective: Objective, recording: Recording) -> Architecture:
    """Follow the units of every layer through the calls that were recorded."""
    walk = Walk(objective)
    for call in recording.calls:
        _visit(walk, call)
    for output in recording.outputs:
        if (found := walk.narrowed(output)) is not None:
            found[0].block()
            found[0].final = True
    spaces = [space for space in walk.spaces if space.merged_into is None]
    for reader in (reader for space in spaces for reader in space.readers):
        reader.writes = None if reader.writes is None else reader.writes.root
    missing, not_followed = walk.unknown_parameters, []
    if missing:
        names = ", ".join(missing[:_NAMED])
        not_followed.append(f"what is computed with {names}{' and others' * (len(missing) > _NAMED)}")
    return Architecture(spaces, walk.pairings, list(walk.sites.values()), walk.redundant, walk.passages, not_followed)


def _visit(walk: Walk, call: Call) -> None:
    if call.name in LAYERS:
        LAYERS[call.name](walk, call)
    elif any(walk.is_tracked(tensor) for tensor in call.tensors()):
        FUNCTIONS.get(call.name, Walk.give_up)(walk, call)
