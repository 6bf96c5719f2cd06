"""Which zero eigenvalues a network has, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from phasewatch.hessian import ZeroCount, hessian_spectrum
from phasewatch.hessian.lanczos import own_generator
from phasewatch.hessian.precision import in_double_precision
from phasewatch.objective import Objective
from phasewatch.symmetry.architecture import find_architecture
from phasewatch.symmetry.directions import Added, Array, Directions, verified
from phasewatch.symmetry.generic import MOST_ENTRIES, generic_directions
from phasewatch.symmetry.span import Group, Lines, added_dimensions, basis_of_span
from phasewatch.symmetry.tape import Indices, Linearization, record
from phasewatch.symmetry.units import (
    PROBE,
    Closeness,
    annihilating_directions,
    data_rank_directions,
    layers_of,
    unit_directions,
)

GENERIC_KINDS = ("rescaling", "change of basis", "norm", "redundant bias", "softmax", "attention")
"""Kinds of zeros that the architecture forces, whatever the weights are."""

NON_GENERIC_KINDS = (
    *("dead", "zero outgoing", "zero incoming", "constant", "parallel", "annihilating"),
    *("always on", "same pattern", "data rank"),
)
"""Kinds of zeros that come and go in training, in the order in which dimensions are credited to them.

What is left is credited to ``PROBE``: zeros that a larger probe would not have, which say nothing of the network.
"""

_ORDER = {kind: i for i, kind in enumerate((*GENERIC_KINDS, *NON_GENERIC_KINDS, PROBE))}

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative change of the outputs up to which a direction counts as a zero."""

_MOST_COTANGENTS = 16

_MANY_OUTPUTS = 2**12
"""Outputs from which on a large network makes do with one cotangent."""

_MOST_PRODUCTS = 40
"""Products spent on verifying candidates above ``dense_below``; below, so many times fifty."""


@dataclass(frozen=True)
class Finding:
    """Zeros of one kind in one layer.

    Attributes:
        kind: One of ``GENERIC_KINDS`` or ``NON_GENERIC_KINDS``, or ``PROBE``.
        layer: Name of the module whose units they concern; of zeros of the probe perhaps "all layers".
        units: The units, in groups that belong together; empty where all of the layer is meant.
        dimensions: Dimensions that these directions add to those listed before.
    """

    kind: str
    layer: str
    units: tuple[tuple[int, ...], ...]
    dimensions: int


@dataclass(frozen=True, repr=False)
class ZeroLedger:
    """The zero eigenvalues of the Gauss-Newton matrix by what causes them.

    Every direction counted was verified to leave the outputs on the probe as they are, as far as the loss sees
    them; where the gradient is zero they are zeros of the Hessian too. Beside them are those zeros of which only the
    number is known, by which there are more parameters than the probe has outputs that the loss tells apart.

    Attributes:
        num_parameters: Number of rows of the matrix.
        findings: What was found, in the order in which dimensions were credited.
        generic: Dimensions that the architecture forces.
        non_generic: Dimensions of each non-generic kind beyond those listed before it.
        probe: Further dimensions that a larger probe would not have: changes that no sample sees but a further one most
            likely would, and what is due to the number of outputs alone.
        certified: Sum of all these, a lower bound of the nullity.
        zeros: Count of the zero eigenvalues of the dense matrix in double precision, with what is certified; None above
            ``dense_below``.
        unexplained: Zeros counted but not explained; None where they were not counted, or not to a number.
        closeness: How far each hidden layer is from degenerate; the table lists what is within ``NEARLY``.
        unknown: Parts of the architecture that are not known, and directions that were left out for being too many;
            their zeros are among the unexplained.
        broken: Symmetries that were expected but do not hold exactly, with the relative change of the outputs.
        tolerance: Relative change of the outputs up to which a direction counted as a zero.
        rank_limit: Number of outputs on the probe that the loss can tell apart, the greatest rank that there can be.
        directions: All that was verified.
    """

    num_parameters: int
    findings: tuple[Finding, ...]
    generic: int
    non_generic: Mapping[str, int]
    probe: int
    certified: int
    zeros: ZeroCount | None
    unexplained: int | None
    closeness: tuple[Closeness, ...]
    unknown: tuple[str, ...]
    broken: tuple[str, ...]
    tolerance: float
    rank_limit: int
    directions: tuple[Directions, ...]

    def zero_space(self) -> Tensor:
        """A basis of the space of verified zeros, for ``known_zeros`` of :func:`phasewatch.hessian_spectrum`.

        Returns:
            Orthonormal rows, shape ``(dimensions, num_parameters)``, in double precision on the CPU; as many as are
            certified, less those of which only the number is known.

        Raises:
            ValueError: If that is too large to be written out.
        """
        entries = sum(d.count for d in self.directions) * self.num_parameters
        if entries > MOST_ENTRIES:
            raise ValueError(
                f"The verified zeros are the span of {sum(d.count for d in self.directions):,} directions of "
                f"{self.num_parameters:,} parameters, {entries:,} numbers; at most {MOST_ENTRIES:,} are written out."
            )
        return torch.from_numpy(basis_of_span([f for d in self.directions for f in d.forms], self.num_parameters))

    @property
    def nullity(self) -> int | None:
        """Number of zero eigenvalues, where they were counted and the count is resolved."""
        return None if self.zeros is None else self.zeros.count

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """The findings of one kind.

        Raises:
            ValueError: If there is no such kind.
        """
        if kind not in _ORDER:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(_ORDER)}.")
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def table(self) -> str:
        """The ledger as text, one line for each kind and layer."""
        lines = [f"{'kind':<16} {'layer':<24} {'zeros':>7}  units"]
        lines += [f"{f.kind:<16} {f.layer:<24} {f.dimensions:>7,}  {_listed(f.units)}" for f in self.findings]
        lines.append(f"{'certified':<41} {self.certified:>7,}  of {self.num_parameters:,} parameters")
        if self.zeros is not None:
            state = "  of what is not known, perhaps" if self.unexplained and self.unknown else ""
            lines.append(f"{'unexplained':<41} {_number(self.unexplained):>7}{state}")
            lines.append(f"{'nullity':<41} {_number(self.zeros.count):>7}  {self.zeros!r}")
        for layer in self.closeness:
            for kind, (distance, units) in layer.nearly().items():
                lines.append(f"{'nearly ' + kind:<21} {layer.layer:<19} {distance:>7.1e}  {_listed((units,))}")
        lines += [f"not exact: {text}" for text in self.broken]
        lines += [f"not known: {text}" for text in self.unknown]
        if self.rank_limit < self.num_parameters:
            lines.append("the probe has fewer outputs than the network has parameters, which makes zeros by itself")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """The account in one line."""
        counts = {**self.non_generic, PROBE: self.probe}
        parts = [f"generic {self.generic}", *(f"{kind} {count}" for kind, count in counts.items() if count)]
        if self.zeros is None:
            return f"ZeroLedger({' + '.join(parts)} = {self.certified} certified, nullity not counted)"
        if self.nullity is None:
            bracket = f"[{self.zeros.lower}, {self.zeros.upper}]"
            return f"ZeroLedger({' + '.join(parts)} = {self.certified} certified, nullity unresolved in {bracket})"
        state = f"; not known: {', '.join(self.unknown)}" if self.unexplained and self.unknown else ""
        return f"ZeroLedger({' + '.join(parts)} + unexplained {self.unexplained} = nullity {self.nullity}{state})"


def explain_zeros(model: nn.Module, objective: Objective, *, dense_below: int = 5000, seed: int = 0) -> ZeroLedger:
    r"""Count the zero eigenvalues of the Gauss-Newton matrix by what causes them.

    Candidates are built from the structure of the network, which is read off one forward pass, and from what its
    units do on the probe. A candidate :math:`\xi` counts only if :math:`H_\ell J \xi = 0` up to ``tolerance``, with
    the Jacobian :math:`J` of the outputs and the Hessian :math:`H_\ell` of the loss in them. Away from a critical
    point such a direction is no zero of the Hessian: there :math:`H \xi = -(D\xi)^\top g`.

    Args:
        model: The network of the objective, with the same parameters by name and shape.
        objective: The loss on the probe; its parameters are the point at which zeros are counted.
        dense_below: All eigenvalues are computed, and the unexplained zeros counted, up to this many parameters.
        seed: Seeds the random combinations by which candidates are found and verified.

    Returns:
        The ledger. ``generic + sum(non_generic.values()) + probe + unexplained`` is the nullity; no direction counts
        twice.

    Raises:
        ValueError: If the model is not that of the objective, or if the loss is computed inside the network, so
            that there are no outputs to look at.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        >>> x = torch.randn(200, 3, dtype=torch.float64)
        >>> def loss_fn(module, batch):
        ...     return (module(batch[0]) - batch[1]).square().mean()
        >>> explain_zeros(net, Objective(net, [(x, net(x).detach())], loss_fn=loss_fn))
        ZeroLedger(generic 4 + unexplained 0 = nullity 4)
    """
    _check_model(model, objective)
    exact = in_double_precision(objective)
    if exact.dtype not in TOLERANCE:
        exact = exact.to(torch.float32)
    large = exact.num_parameters > dense_below
    tolerance = TOLERANCE[exact.dtype]
    rng = np.random.default_rng(seed)
    sought = _sought(exact, own_generator(seed), large)

    most_products = _MOST_PRODUCTS if large else 50 * _MOST_PRODUCTS
    kept, failed, untested = verified(
        sought.candidates, sought.effect, exact.num_parameters, tolerance, rng, most_products
    )
    together: dict[tuple[str, str], list[Directions]] = defaultdict(list)
    for directions in sorted(kept, key=lambda d: _ORDER[d.kind]):
        together[directions.kind, directions.layer].append(directions)
    groups = [
        Group(layer, tuple(form for d in several for form in d.forms), kind in GENERIC_KINDS)
        for (kind, layer), several in together.items()
    ]
    dimensions, left_out = added_dimensions(groups, Lines(exact.num_parameters, sought.matrices), rng)
    findings = [
        Finding(kind, layer, tuple(dict.fromkeys(units for d in several for units in d.units)), count)
        for ((kind, layer), several), count in zip(together.items(), dimensions, strict=True)
        if count
    ]
    missing = exact.num_parameters - sought.effect.rank_limit - sum(dimensions)
    if missing > 0:
        findings.append(Finding(PROBE, "all layers", (), missing))
    certified = sum(f.dimensions for f in findings)
    generic = sum(f.dimensions for f in findings if f.kind in GENERIC_KINDS)
    non_generic = {kind: sum(f.dimensions for f in findings if f.kind == kind) for kind in NON_GENERIC_KINDS}
    zeros = None
    if not large:
        counted = hessian_spectrum(exact, matrix="gauss-newton", dense_below=dense_below).zeros
        zeros = counted.certified_by(certified)
    unknown = list(sought.unknown)
    if untested:
        unknown.append(f"whether {sum(d.count for d in untested):,} further directions are zeros")
    if left_out:
        unknown.append("how many dimensions all directions span: some were left out")
    return ZeroLedger(
        num_parameters=exact.num_parameters,
        findings=tuple(findings),
        generic=generic,
        non_generic=non_generic,
        probe=sum(f.dimensions for f in findings if f.kind == PROBE),
        certified=certified,
        zeros=zeros,
        unexplained=None if zeros is None or zeros.count is None else zeros.count - certified,
        closeness=sought.closeness,
        unknown=tuple(unknown),
        broken=_broken(failed),
        tolerance=tolerance,
        rank_limit=sought.effect.rank_limit,
        directions=tuple(kept),
    )


@dataclass(frozen=True, eq=False)
class _Sought:
    """What the structure of a network and its units on the probe suggest; the recording of them is held no longer.

    Attributes:
        candidates: Directions that may be zeros, in the order in which dimensions are credited.
        effect: What a direction changes in the outputs.
        matrices: Coordinates of the weights of each layer, one row a unit.
        closeness: How far each hidden layer is from degenerate.
        unknown: What is not known of the network, in words.
    """

    candidates: list[Directions]
    effect: _RelativeEffect
    matrices: list[Indices]
    closeness: tuple[Closeness, ...]
    unknown: list[str]


def _sought(exact: Objective, generator: torch.Generator, large: bool) -> _Sought:
    """Look at one layer after another: what all of them do on the probe together takes several times the memory."""
    recording = record(exact, generator, lambda outputs: _cotangents(outputs, exact.num_batches, large))
    architecture = find_architecture(exact, recording)
    recording.let_go()
    parameters = exact.parameters.double().cpu().numpy()
    effect = _RelativeEffect(exact, recording.linearizations)
    candidates: list[Directions] = []
    closeness: list[Closeness] = []
    for layer in layers_of(architecture):
        candidates += unit_directions(layer, parameters)
        closeness.append(layer.closeness(parameters))
        if layer.site is not None:
            layer.site.let_go()
    for site in architecture.sites:
        candidates += annihilating_directions(site)
        candidates += data_rank_directions(site, thorough=not large, rank_limit=effect.rank_limit)
        site.let_go()
    candidates = [*generic_directions(architecture, parameters), *candidates, *_untouched(recording.gradient, exact)]
    unknown = architecture.unknown
    if not recording.alike:
        unknown.append("what changes from batch to batch in the order of calls")
    return _Sought(
        sorted((c for c in candidates if c.count), key=lambda d: _ORDER[d.kind]),
        effect,
        [w.rows for space in architecture.spaces for w in space.writers if not w.diagonal],
        tuple(closeness),
        unknown,
    )


class _RelativeEffect:
    """Size of the change of the outputs along a direction, weighted as the loss sees it, relative to the largest."""

    def __init__(self, objective: Objective, linearizations: Sequence[Linearization]) -> None:
        self._objective = objective
        self._batches = linearizations
        parts = zip(objective.batch_weights, self._batches, strict=True)
        self._scale = float(np.sqrt(sum(weight**2 * batch.squared_norm for weight, batch in parts)))

    @cached_property
    def rank_limit(self) -> int:
        """Number of outputs that the loss tells apart: of a softmax one less for each distribution."""
        return sum(batch.rank_limit(TOLERANCE[self._objective.dtype]) for batch in self._batches)

    def __call__(self, direction: Array) -> float:
        norm = float(np.linalg.norm(direction))
        return self._size(direction) / (self._scale * norm) if norm and self._scale else 0.0

    def _size(self, direction: Array) -> float:
        vector = torch.as_tensor(direction).to(self._objective.parameters)
        total = 0.0
        for weight, batch in zip(self._objective.batch_weights, self._batches, strict=True):
            total += float(sum(change.double().square().sum() for change in batch(vector))) * weight**2
        return float(np.sqrt(total))


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


def _broken(failed: list[tuple[Directions, float]]) -> tuple[str, ...]:
    """Expected symmetries that do not hold, as a norm's scaling does not for its epsilon."""
    worst: dict[tuple[str, str], float] = {}
    for directions, size in failed:
        if directions.kind in GENERIC_KINDS and directions.kind != "redundant bias":
            key = (directions.kind, directions.layer)
            worst[key] = max(size, worst.get(key, 0.0))
    return tuple(f"{kind} of {layer} changes the outputs by {size:.1e}" for (kind, layer), size in worst.items())


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def _listed(units: tuple[tuple[int, ...], ...]) -> str:
    shown = ["+".join(map(str, group)) if len(group) <= 4 else f"{len(group)} units" for group in units[:8]]
    return ", ".join(shown) + (f", … ({len(units)} in all)" if len(units) > 8 else "")


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


def _check_model(model: nn.Module, objective: Objective) -> None:
    given = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    for name, shape in objective.parameter_shapes.items():
        if given.get(name) != shape:
            found = f"shape {tuple(given[name])}" if name in given else "no such trainable parameter"
            raise ValueError(
                f"The objective has a parameter {name!r} of shape {tuple(shape)}, the model has {found}. Give the "
                "model from which the objective was made."
            )
