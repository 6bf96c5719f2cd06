"""Which zero eigenvalues a network has, and why: candidates, what is verified of them, what they add, what is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from phasewatch.hessian import ZeroCount, hessian_spectrum
from phasewatch.hessian.lanczos import own_generator
from phasewatch.hessian.precision import in_double_precision
from phasewatch.objective import Objective
from phasewatch.symmetry.candidates import Candidates, seek
from phasewatch.symmetry.directions import Directions, verified
from phasewatch.symmetry.effect import TOLERANCE
from phasewatch.symmetry.ledger import GENERIC_KINDS, NON_GENERIC_KINDS, ORDER, Finding, ZeroLedger
from phasewatch.symmetry.span import Group, Lines, added_dimensions
from phasewatch.symmetry.units import PROBE

_MOST_PRODUCTS, _MOST_PRODUCTS_IF_LARGE = 2_000, 40
"""Products spent on verifying candidates, up to ``dense_below`` parameters and above. Chosen, for some seconds."""


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

    candidates = seek(exact, own_generator(seed), large)
    most_products = _MOST_PRODUCTS_IF_LARGE if large else _MOST_PRODUCTS
    zeros, failed, untested = verified(
        candidates.directions, candidates.effect, exact.num_parameters, tolerance, rng, most_products
    )
    credit = _credited(zeros, candidates, exact.num_parameters, rng)
    counted = None if large else _counted(exact, credit.certified)

    unknown = list(candidates.unknown)
    if untested:
        unknown.append(f"whether {sum(d.count for d in untested):,} further directions are zeros")
    if credit.left_out:
        unknown.append("how many dimensions all directions span: some were left out")
    return ZeroLedger(
        num_parameters=exact.num_parameters,
        findings=credit.findings,
        generic=sum(credit.of_kind(kind) for kind in GENERIC_KINDS),
        non_generic={kind: credit.of_kind(kind) for kind in NON_GENERIC_KINDS},
        probe=credit.of_kind(PROBE),
        certified=credit.certified,
        zeros=counted,
        unexplained=None if counted is None or counted.count is None else counted.count - credit.certified,
        closeness=candidates.closeness,
        unknown=tuple(unknown),
        broken=_broken(failed),
        tolerance=tolerance,
        rank_limit=candidates.effect.rank_limit,
        directions=tuple(zeros),
    )


@dataclass(frozen=True)
class _Credit:
    """Which kinds and layers the dimensions of the zeros are credited to.

    Attributes:
        findings: In the order in which they are credited, none without a dimension.
        left_out: Whether there were too many directions to see all dimensions that they span.
    """

    findings: tuple[Finding, ...]
    left_out: bool

    @property
    def certified(self) -> int:
        """All dimensions."""
        return sum(finding.dimensions for finding in self.findings)

    def of_kind(self, kind: str) -> int:
        """Those of one kind."""
        return sum(finding.dimensions for finding in self.findings if finding.kind == kind)


def _credited(
    zeros: Sequence[Directions], candidates: Candidates, num_parameters: int, rng: np.random.Generator
) -> _Credit:
    """What each kind and layer adds to those before it; what is due to the number of outputs alone comes last."""
    together: dict[tuple[str, str], list[Directions]] = defaultdict(list)
    for directions in sorted(zeros, key=lambda d: ORDER[d.kind]):
        together[directions.kind, directions.layer].append(directions)
    groups = [
        Group(layer, tuple(form for d in several for form in d.forms), kind in GENERIC_KINDS)
        for (kind, layer), several in together.items()
    ]
    dimensions, left_out = added_dimensions(groups, Lines(num_parameters, candidates.matrices), rng)
    findings = [
        Finding(kind, layer, tuple(dict.fromkeys(units for d in several for units in d.units)), count)
        for ((kind, layer), several), count in zip(together.items(), dimensions, strict=True)
        if count
    ]
    missing = num_parameters - candidates.effect.rank_limit - sum(dimensions)
    if missing > 0:
        findings.append(Finding(PROBE, "all layers", (), missing))
    return _Credit(tuple(findings), left_out)


def _counted(objective: Objective, certified: int) -> ZeroCount:
    """The zeros of the dense matrix, of which so many are known."""
    spectrum = hessian_spectrum(objective, matrix="gauss-newton", dense_below=objective.num_parameters)
    return spectrum.zeros.certified_by(certified)


def _broken(failed: list[tuple[Directions, float]]) -> tuple[str, ...]:
    """Expected symmetries that do not hold, as a norm's scaling does not for its epsilon."""
    worst: dict[tuple[str, str], float] = {}
    for directions, size in failed:
        if directions.kind in GENERIC_KINDS and directions.kind != "redundant bias":
            key = (directions.kind, directions.layer)
            worst[key] = max(size, worst.get(key, 0.0))
    return tuple(f"{kind} of {layer} changes the outputs by {size:.1e}" for (kind, layer), size in worst.items())


def _check_model(model: nn.Module, objective: Objective) -> None:
    given = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    for name, shape in objective.parameter_shapes.items():
        if given.get(name) != shape:
            found = f"shape {tuple(given[name])}" if name in given else "no such trainable parameter"
            raise ValueError(
                f"The objective has a parameter {name!r} of shape {tuple(shape)}, the model has {found}. Give the "
                "model from which the objective was made."
            )
