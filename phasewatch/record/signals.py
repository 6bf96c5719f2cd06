"""The catalogue of signals: what each is called, and how it is shown and searched.

A new signal is one row here (from outside: :func:`describe`) and one estimator that emits it under the row's name
(:class:`phasewatch.estimators.Estimator`). Record, detector, TensorBoard, figure and page take all else from the row;
rows from outside are kept in the record, for the process that reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

LOSS, LLC, NULLITY, NULLITY_GGN = "loss", "llc", "nullity", "nullity_ggn"
TRAINING_LOSS = "training_loss"
"""The loss as training computes it, at every step, in a transition that it was seen by."""

LLC_BEHAVIORAL, LLC_COARSE = "llc_behavioral", "llc_behavioral_coarse"
"""The learning coefficient of the function that the network computes, at a fine and at a coarse resolution."""

EFFECTIVE_RANK_COARSE = "effective_rank_coarse"
"""Half of it is the coarse coefficient were the divergence quadratic; it is told where that was not measured."""
LLC_OUTPUTS, LLC_OUTPUTS_COARSE = "llc_outputs", "llc_outputs_coarse"
"""The same where outputs are compared in the metric of a fixed variance, so that margins that grow do not lower it."""

HELD_OUT = "held_out"
"""Name of the data that the network is not trained on, on which λ of the function is measured."""

SPECTRUM = "hessian_eigenvalues"
"""Name of the histogram that holds the spectrum of the Hessian."""

DETAIL = ""
"""Group of what is recorded, and looked at only by those who ask for it."""

NORMAL_95 = 1.959964
"""Half of the 95 % interval of a normal law, in standard errors."""


@dataclass(frozen=True)
class Signal:
    """What is known of a signal before it is measured.

    Attributes:
        name: What it is recorded under.
        title: What it is, in words.
        unit: Of its values; empty for a pure number.
        group: What a person looks at: signals of one group share a chart, and this is its heading. ``DETAIL``: none.
        bounds: Names of its lower and upper bound. Where these are not measured, its standard error makes them.
        count: Whether it is a whole number of things.
        detected: Whether transitions are looked for in it, and what it did across them is told.
        searched_as: Name of the signal that is searched in its place where that was measured too: what is read off the
            same weights wanders with them, and is no further witness.
        stands_in_for: Name of the signal in whose place it is looked at, where that was not measured; otherwise it is a
            detail.
        linear: Whether only differences of it mean something, so that no logarithm is taken of it.
        family: What its name begins with, if there is a signal like it for each part of a network or each set of data.
    """

    name: str
    title: str
    unit: str = ""
    group: str = DETAIL
    bounds: tuple[str, str] | None = None
    count: bool = False
    detected: bool = False
    searched_as: str = ""
    stands_in_for: str = ""
    linear: bool = False
    family: str = ""


# Units; λ is half the number of dimensions of a regular model.
_LOSS, _DIMENSIONS, _CURVATURE, _EIGENVALUES = "loss", "half dimensions", "loss / weight²", "eigenvalues"
_TRACE, _KNOWN_ZEROS = "hessian_trace", "zeros_certified"
# Headings of more than one signal.
_FUNCTION = "learning coefficient λ of the function"
_OUTPUTS = "half the effective rank in the output metric of fixed variance"
_EXTREMES = "largest and smallest Hessian eigenvalue"
_CAUSES = "zeros by cause"
_DISTANCES = "distance of the nearest units from degeneracy"


def _bounded(name: str, title: str, group: str, *, detected: bool = False) -> tuple[Signal, ...]:
    """A number of zero eigenvalues with what is measured beside it."""
    bounds = (f"{name}_lower", f"{name}_upper")
    return (
        Signal(name, title, _EIGENVALUES, group, bounds=bounds, count=True, detected=detected),
        Signal(bounds[0], f"{title}, at least", _EIGENVALUES, count=True),
        Signal(bounds[1], f"{title}, at most", _EIGENVALUES, count=True),
        Signal(f"{name}_threshold", f"{title}: what counts as zero", _CURVATURE),
    )


def _cause(kind: str, what: str, *, detected: bool = True) -> Signal:
    return Signal(
        f"zeros_{kind}",
        f"zeros: {what}",
        _EIGENVALUES,
        _CAUSES,
        count=True,
        detected=detected,
        searched_as=_KNOWN_ZEROS if detected else "",
    )


def _of_function(name: str, resolution: str) -> tuple[Signal, ...]:
    """The learning coefficient of the function at one resolution, with what is measured beside it."""
    what = f"λ of the function, {resolution}"
    return (
        Signal(
            name,
            f"learning coefficient {what}",
            _DIMENSIONS,
            _FUNCTION,
            bounds=(f"{name}_lower", f"{name}_upper"),
            detected=True,
            # Counts linearly in the description length.
            linear=True,
            family=name,
        ),
        Signal(f"{name}_resolution", f"{what}: resolution, the mean divergence", "nats", family=name),
        Signal(f"{name}_nbeta", f"{what}: inverse temperature nβ", "samples", family=name),
        Signal(f"{name}_heat_capacity", f"{what}: heat capacity", _DIMENSIONS, family=name),
        Signal(
            f"{name}_spread_slope", f"{what}: slope in the logarithm of the prior's spread", _DIMENSIONS, family=name
        ),
        Signal(f"{name}_rhat", f"{what}: R-hat of the chains", family=name),
        Signal(f"{name}_ess", f"{what}: effective number of draws", "draws", family=name),
        Signal(f"{name}_acceptance", f"{what}: share of the moves accepted", family=name),
        Signal(f"{name}_virial", f"{what}: virial over its value at equilibrium", family=name),
        Signal(f"{name}_hits", f"{what}: share of the moves that hit the bound on the divergence", family=name),
    )


_ROWS = (
    *_of_function(LLC_BEHAVIORAL, "fine"),
    *_of_function(LLC_COARSE, "coarse"),
    Signal(LOSS, "loss on the probe", _LOSS, "loss", detected=True, family=LOSS),
    Signal(f"{LOSS}_{HELD_OUT}", "loss on held-out samples", _LOSS, "loss", detected=True, searched_as=LOSS),
    Signal("gradient_norm", "length of the gradient on the probe", "loss / weight", family="gradient_norm"),
    Signal(f"gradient_norm_{HELD_OUT}", "length of the gradient on held-out samples", "loss / weight"),
    Signal(LLC_OUTPUTS, f"{_OUTPUTS}, fine", _DIMENSIONS, _OUTPUTS, linear=True, family=LLC_OUTPUTS),
    Signal(LLC_OUTPUTS_COARSE, f"{_OUTPUTS}, coarse", _DIMENSIONS, _OUTPUTS, linear=True, family=LLC_OUTPUTS_COARSE),
    Signal("misfit_change", "change of the misfit over the draws", _LOSS, linear=True, family="misfit_change"),
    Signal(
        "description_length",
        "description length n L + λ log n",
        "loss × samples",
        linear=True,
        family="description_length",
    ),
    Signal(
        LLC,
        "learning coefficient λ of the loss",
        _DIMENSIONS,
        "learning coefficient λ of the loss",
        bounds=("llc_lower", "llc_upper"),
        detected=True,
        searched_as=LLC_BEHAVIORAL,
        # Counts linearly in the free energy, and may be negative.
        linear=True,
        family=LLC,
    ),
    Signal("llc_nbeta", "λ of the loss: inverse temperature nβ", "samples", family=LLC),
    Signal("llc_rhat", "λ: R-hat of the chains", family=LLC),
    Signal("llc_ess", "λ: effective number of draws", "draws", family=LLC),
    Signal("llc_acceptance", "λ: share of the moves accepted", family=LLC),
    Signal("llc_step_size", "λ: step size of the sampler", family=LLC),
    Signal("llc_fluctuation", "singular fluctuation ν", _DIMENSIONS, family=LLC),
    Signal("llc_quadratic", "λ if the loss were quadratic", _DIMENSIONS),
    Signal("hessian_max", "largest Hessian eigenvalue", _CURVATURE, _EXTREMES, detected=True, searched_as=_TRACE),
    Signal("hessian_min", "smallest Hessian eigenvalue", _CURVATURE, _EXTREMES, detected=True, searched_as=_TRACE),
    Signal(_TRACE, "trace of the Hessian", _CURVATURE, "trace of the Hessian", detected=True),
    Signal("hessian_negative", "negative eigenvalues of the Hessian", _EIGENVALUES, count=True),
    Signal("rank_half", "half the rank of the Hessian", _DIMENSIONS),
    *_bounded(NULLITY, "zero eigenvalues of the Hessian", "zero eigenvalues of the Hessian", detected=True),
    *_bounded(
        NULLITY_GGN, "zero eigenvalues of the Gauss-Newton matrix", "zero eigenvalues of the Gauss-Newton matrix"
    ),
    Signal(
        EFFECTIVE_RANK_COARSE,
        "effective rank at the coarse resolution",
        "directions",
        "effective rank",
        detected=True,
        stands_in_for=LLC_COARSE,
        family=EFFECTIVE_RANK_COARSE,
    ),
    Signal(
        "effective_rank",
        "effective rank at the fine resolution",
        "directions",
        "effective rank",
        family="effective_rank",
    ),
    Signal(
        "probe_share",
        "effective rank on half of the probe, as a share of that on all of it",
        group="effective rank on half of the probe over that on all",
    ),
    Signal(_KNOWN_ZEROS, "zeros: all whose cause is known", _EIGENVALUES, _CAUSES, count=True, detected=True),
    _cause("generic", "forced by the architecture", detected=False),
    _cause("dead", "units that are off for all samples"),
    _cause("zero_outgoing", "units without outgoing weights"),
    _cause("zero_incoming", "units without incoming weights"),
    _cause("constant", "units that say the same of all samples"),
    _cause("parallel", "units that say the same as another one"),
    _cause("annihilating", "units whose effects cancel"),
    _cause("always_on", "units that are on for all samples"),
    _cause("same_pattern", "units that are on and off together"),
    _cause("data_rank", "directions that the data leave unseen"),
    _cause("probe", "that a larger probe would not have", detected=False),
    _cause("unexplained", "cause not known", detected=False),
    Signal("distance_dead", "distance: dead", group=_DISTANCES),
    Signal("distance_zero_outgoing", "distance: without outgoing weights", group=_DISTANCES),
    Signal("distance_constant", "distance: constant", group=_DISTANCES),
    Signal("distance_parallel", "distance: parallel", group=_DISTANCES),
    Signal("distance_annihilating", "distance: annihilating", group=_DISTANCES),
    Signal("distance_zero_incoming", "distance: without incoming weights"),
    Signal("distance_always_on", "distance: always on"),
    Signal("distance_same_pattern", "distance: same pattern"),
    Signal("distance_data_rank", "distance: unseen directions of the data"),
    Signal("overhead", "time for measuring as a share of the time for training"),
)

CATALOGUE: dict[str, Signal] = {row.name: row for row in _ROWS}
"""The rows by name, in the order in which signals are shown and searched."""


def describe(signal: Signal) -> None:
    """Add a row to the catalogue, for the signal of an estimator of one's own.

    Example:
        >>> describe(Signal("sharpness", "sharpness of the loss", group="sharpness", detected=True))
        >>> look_up("sharpness").title
        'sharpness of the loss'
        >>> del CATALOGUE["sharpness"]

    Raises:
        ValueError: If another row of that name is there already.
    """
    known = CATALOGUE.setdefault(signal.name, signal)
    if known != signal:
        raise ValueError(
            f"the signal {signal.name!r} is described already ({known.title!r}); give the one of your estimator "
            "another name"
        )


def described() -> list[dict[str, Any]]:
    """The rows that were added to the catalogue, as plain Python: the header of a record keeps them."""
    return [asdict(row) for row in CATALOGUE.values() if row not in _ROWS]


def take_up(rows: Iterable[Mapping[str, Any]]) -> None:
    """Describe signals as a record has them; where there is a row of that name already, it stays."""
    for row in rows:
        bounds = None if row["bounds"] is None else tuple(row["bounds"])
        CATALOGUE.setdefault(row["name"], Signal(**{**row, "bounds": bounds}))


def look_up(name: str) -> Signal:
    """The row of a signal; of one that nobody has described, a row that makes it a detail.

    Of a family (``llc_<part>``, ``loss_<data>``, ``llc_<data>_rhat``) it is the row of its kind, told apart by the
    title, and a detail in which no transition is looked for.

    Example:
        >>> look_up("llc_validation_rhat").title
        'λ: R-hat of the chains (validation)'
    """
    return CATALOGUE.get(name) or _in_family(name) or Signal(name, name.replace("_", " "))


def is_described(name: str) -> bool:
    """Whether the catalogue has a row for a signal, or for its family."""
    return name in CATALOGUE or _in_family(name) is not None


def detected(names: Collection[str]) -> list[str]:
    """Those of the names in whose signals transitions are looked for, in the order of the catalogue."""
    rows = [row for row in CATALOGUE.values() if row.detected and row.name in names]
    return [row.name for row in rows if row.stands_in_for not in names]


def searched(names: Collection[str]) -> list[str]:
    """Those of the detected in which transitions are looked for, where all of the names were measured."""
    return [name for name in detected(names) if CATALOGUE[name].searched_as not in names]


def groups() -> dict[str, list[Signal]]:
    """What a person looks at: heading to the signals beneath it, in the order of the catalogue."""
    found: dict[str, list[Signal]] = {}
    for row in CATALOGUE.values():
        if row.group != DETAIL:
            found.setdefault(row.group, []).append(row)
    return found


def is_one_of_several_counts(name: str) -> bool:
    """Whether a signal is a count that shares its chart with others: one that never occurs is not worth a line."""
    row = look_up(name)
    return row.count and len(groups().get(row.group, ())) > 1


def _in_family(name: str) -> Signal | None:
    """The row of a member of a family: ``<family>_<which><rest>``, the longest rest that fits."""
    members = [row for row in CATALOGUE.values() if row.family]
    for row in sorted(members, key=lambda row: -len(row.name)):
        rest = row.name.removeprefix(row.family)
        which = name.removeprefix(f"{row.family}_").removesuffix(rest)
        if which and name == f"{row.family}_{which}{rest}":
            bounds = (f"{name}_lower", f"{name}_upper") if row.bounds else None
            title = f"{row.title} ({which})"
            return replace(row, name=name, title=title, group=DETAIL, bounds=bounds, detected=False)
    return None
