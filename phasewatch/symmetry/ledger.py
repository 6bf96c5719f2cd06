"""The account of a network's zero eigenvalues: by kind, layer and unit, beside their number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor

from phasewatch.hessian import ZeroCount
from phasewatch.shown import shown
from phasewatch.symmetry.directions import Directions
from phasewatch.symmetry.generic import MOST_ENTRIES
from phasewatch.symmetry.span import basis_of_span
from phasewatch.symmetry.units import PROBE, Closeness

GENERIC_KINDS = ("rescaling", "change of basis", "norm", "redundant bias", "softmax", "attention")
"""Kinds of zeros that the architecture forces, whatever the weights are."""

NON_GENERIC_KINDS = (
    *("dead", "zero outgoing", "zero incoming", "constant", "parallel", "annihilating"),
    *("always on", "same pattern", "data rank"),
)
"""Kinds of zeros that come and go in training, in the order in which dimensions are credited to them.

What is left is credited to ``PROBE``: zeros that a larger probe would not have, which say nothing of the network.
"""

ORDER = {kind: i for i, kind in enumerate((*GENERIC_KINDS, *NON_GENERIC_KINDS, PROBE))}
"""Place of each kind in the order in which dimensions are credited."""


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
        if kind not in ORDER:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(ORDER)}.")
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def table(self) -> str:
        """The ledger as text, one line for each kind and layer."""
        rows = [(f.kind, f.layer, f"{f.dimensions:,}", _listed(f.units)) for f in self.findings]
        rows.append(("certified", "", f"{self.certified:,}", f"of {self.num_parameters:,} parameters"))
        if self.zeros is not None:
            state = "of what is not known, perhaps" if self.unexplained and self.unknown else ""
            rows.append(("unexplained", "", _number(self.unexplained), state))
            rows.append(("nullity", "", _number(self.zeros.count), repr(self.zeros)))
        for layer in self.closeness:
            for kind, (distance, units) in layer.nearly().items():
                rows.append((f"nearly {kind}", layer.layer, f"{distance:.1e}", _listed((units,))))
        columns, alignment = ("kind", "layer", "zeros", "units"), ("left", "left", "right", "left")
        lines = [tabulate(rows, columns, "simple", disable_numparse=True, colalign=alignment)]
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

    def _repr_html_(self) -> str:
        unexplained = "not known" if self.unexplained is None else self.unexplained
        causes = {"generic": self.generic, **self.non_generic, PROBE: self.probe, "unexplained": unexplained}
        return shown(repr(self), ("cause", "zero eigenvalues"), causes.items())


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def _listed(units: tuple[tuple[int, ...], ...]) -> str:
    shown = ["+".join(map(str, group)) if len(group) <= 4 else f"{len(group)} units" for group in units[:8]]
    return ", ".join(shown) + (f", … ({len(units)} in all)" if len(units) > 8 else "")
