"""Counting zero eigenvalues, with what is not known about the count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from phasewatch.hessian.density import Probe

COVERAGE = 0.99
"""Probability with which a bracket from random probes holds the count. Chosen."""

RESOLVED_WIDTH = 0.01
"""A count is known where its bracket is at most this share of all eigenvalues wide. Chosen."""

LEAST_GAP = 10.0
"""Ratio of the least eigenvalue that is not zero to what counts as zero, below which there is no gap between them.
Chosen."""


@dataclass(frozen=True)
class ZeroCount:
    r"""How many eigenvalues are zero, as far as rounding and the number of products allow to say.

    Attributes:
        guess: Eigenvalues with :math:`|\lambda| \le` ``threshold`` as far as they were seen, within the bracket.
        threshold: The noise of the computation; eigenvalues below it cannot be told from zero.
        lower: Least count that is compatible with what was computed.
        upper: Greatest count that is compatible with what was computed; below ``lower`` where more are certified.
        gap: Ratio of the least magnitude counted as not zero to the greatest counted as zero (or to a tenth of the
            threshold, if that is greater); None where the single eigenvalues are not known, and ``upper`` is a limit
            for all that is within ``LEAST_GAP`` thresholds.
        size: Number of all eigenvalues.
        note: What to know about the count, in words; empty if there is nothing.
        certified: Dimension of a space of zeros that was verified direction by direction, as the ledger of
            :func:`phasewatch.explain_zeros` does: at least so many are zero for a reason, whatever the threshold. None
            where nobody asked.
    """

    guess: int
    threshold: float
    lower: int
    upper: int
    gap: float | None
    size: int
    note: str = ""
    certified: int | None = None

    @property
    def resolved(self) -> bool:
        """Whether there is a gap behind the zeros, and a bracket that is no wider than 1 % (``RESOLVED_WIDTH``).

        The bracket's ends must not contradict each other, and the gap must be a factor of ``LEAST_GAP``; where all up
        to the upper end are certified, none is needed.
        """
        gap = self.gap is None or self.gap >= LEAST_GAP or self.certified == self.upper
        return gap and 0 <= self.upper - self.lower <= RESOLVED_WIDTH * self.size

    @property
    def count(self) -> int | None:
        """The number of zeros; None where it is not resolved, as no number in a wide bracket stands for an unknown."""
        return self.guess if self.resolved else None

    def certified_by(self, dimensions: int) -> ZeroCount:
        """The same count, knowing that a space of so many dimensions consists of zeros.

        The lower limit rises to it, and the bracket may become narrow enough to count as resolved. Where the count
        leaves no room for so many zeros one of the two is wrong: then it is not resolved, and the note says so.

        Args:
            dimensions: Dimension of the verified space, of this matrix.

        Raises:
            ValueError: If there are not so many eigenvalues.
        """
        if not 0 <= dimensions <= self.size:
            raise ValueError(f"dimensions is {dimensions}; expected at least 0 and at most {self.size}, the size.")
        raised = replace(
            self, guess=max(self.guess, dimensions), lower=max(self.lower, dimensions), certified=dimensions
        )
        if dimensions > self.upper:
            note = f"{dimensions} zeros are certified, but at most {self.upper} were counted"
            return replace(raised, note=note)
        return replace(raised, note="") if raised.resolved and not self.resolved else raised

    def __repr__(self) -> str:
        """The count and its bracket, or the bracket alone."""
        counted = "unresolved" if self.count is None else f"{self.count}"
        counted += "" if self.lower == self.upper == self.count else f" in [{self.lower}, {self.upper}]"
        counted += "" if self.certified is None else f", {self.certified} certified"
        note = f", note={self.note!r}" if self.note else ""
        return f"ZeroCount({counted} at |λ| <= {self.threshold:.3g}{note})"


def count_zeros(eigenvalues: NDArray[np.float64], rounding: float, noise: float) -> ZeroCount:
    """Count zeros where all eigenvalues are known, by two rules that must agree.

    The first rule counts up to ``threshold = max(rounding, noise)``; it has to hold for a threshold ten times less
    and ten times more. The second puts the limit into the widest gap of the logarithms; what is below a tenth of
    the threshold counts as being there, as rounding has no order of magnitude.

    Args:
        eigenvalues: All of them.
        rounding: Error of the eigensolver, usually ``N eps |H|``.
        noise: Error of the matrix itself, as measured.
    """
    magnitudes = np.sort(np.abs(eigenvalues))
    threshold = max(rounding, noise)
    if magnitudes[-1] == 0.0:
        zeros = len(magnitudes)
        return ZeroCount(zeros, 0.0, zeros, zeros, float("inf"), zeros, "the matrix is zero")
    count = _number_within(magnitudes, threshold)
    floor = threshold / 10
    ladder = np.concatenate([[floor], np.maximum(magnitudes, floor)])
    ratios = ladder[1:] / ladder[:-1]
    by_gap = int(np.argmax(ratios))
    counts = [_number_within(magnitudes, threshold / 10), count, _number_within(magnitudes, threshold * 10), by_gap]
    note = ""
    if min(counts) < max(counts):
        note = (
            f"no clear gap at zero: {counts[0]}, {counts[1]}, {counts[2]} eigenvalues below {threshold / 10:.1e}, "
            f"{threshold:.1e}, {threshold * 10:.1e}; the widest gap is above {by_gap}"
        )
    gap = float(ratios[count]) if count < len(ratios) else float("inf")
    return ZeroCount(count, threshold, min(counts), max(counts), gap, len(magnitudes), note)


def bracket_zeros(probes: Sequence[Probe], threshold: float) -> ZeroCount:
    """Bracket the number of zeros where only random probes of the spectrum are known.

    Each probe's share of eigenvalues up to the threshold is bracketed by the Chebyshev-Markov-Stieltjes inequality
    from its quadrature (Golub & Meurant 2010, section 6.2), or more narrowly by polynomials that are small beyond the
    threshold, with certainty up to rounding. That share is distributed
    as ``Beta(k/2, (d - k)/2)`` for a uniform direction in ``d`` dimensions of which ``k`` are counted, from which
    the limits for ``k`` follow as in Clopper & Pearson (1934), at the level ``COVERAGE``. Known directions whose
    residual is above the threshold may each shift the count by one, and widen the bracket. The upper limit is that of
    all within ``LEAST_GAP`` thresholds, so that the bracket is narrow only where there is a gap behind the zeros.

    Args:
        probes: At least one; directions drawn independently given what was known before each.
        threshold: Noise of the computation.
    """
    size = probes[0].dimension + len(probes[0].known)
    shares = np.array([_share_within(probe, threshold) for probe in probes])
    norms = np.array([probe.squared_norm for probe in probes])
    lower_share, share, _ = norms @ shares / norms.sum()
    beyond = LEAST_GAP * threshold
    upper_share = norms @ np.array([_share_within(probe, beyond)[2] for probe in probes]) / norms.sum()
    known_zeros, known_beyond = (
        np.array([_number_within(np.abs(p.known), limit) for p in probes]) for limit in (threshold, beyond)
    )
    dimensions = np.array([p.dimension for p in probes])
    slack = max(int((p.known_residuals > threshold).sum()) for p in probes)
    tail = (1 - COVERAGE) / 2

    def distribution(k: int, x: float, known: NDArray[np.int64]) -> float:
        """Probability that the pooled share is at most ``x`` if ``k`` eigenvalues are counted, with those known."""
        a = np.clip(k - known, 0, dimensions).sum() / 2
        b = dimensions.sum() / 2 - a
        if a == 0 or b == 0:
            return float(x >= (b == 0))
        return float(betainc(a, b, np.clip(x, 0, 1)))

    slop = 1e-9  # rounding of the weights
    upper = _greatest(lambda k: distribution(k, upper_share + slop, known_beyond) >= tail, size)
    lower = size - _greatest(lambda k: 1 - distribution(size - k, lower_share - slop, known_zeros) >= tail, size)
    lower, upper = max(min(lower, upper) - slack, 0), min(max(lower, upper) + slack, size)
    guess = round(float(np.average(known_zeros, weights=norms) + share * np.average(dimensions, weights=norms)))
    found = ZeroCount(min(max(guess, lower), upper), threshold, lower, upper, None, size, "")
    if found.resolved:
        return found
    return replace(found, note=f"unresolved below {threshold:.1e}: more Lanczos steps would narrow the bracket")


def _share_within(probe: Probe, threshold: float) -> tuple[float, float, float]:
    """Lower limit, estimate and upper limit for the probe's measure of ``[-threshold, threshold]``."""
    inside = np.flatnonzero(np.abs(probe.nodes) <= threshold)
    mass = float(probe.weights[inside].sum())
    if probe.exact:
        return mass, mass, mass
    first = int(np.searchsorted(probe.nodes, -threshold))
    last = int(np.searchsorted(probe.nodes, threshold, side="right"))
    upper = mass + float(probe.weights[max(first - 1, 0) : first].sum() + probe.weights[last : last + 1].sum())
    upper = min(upper, _christoffel_bound(probe, threshold))
    lower = max(float(probe.weights[inside[1:-1]].sum()), _share_of_converged(probe, inside, threshold))
    spacing = np.diff(probe.nodes, prepend=-np.inf, append=np.inf)
    isolation = np.minimum(spacing[:-1], spacing[1:])
    # An isolated Ritz value is off by no more than its squared residual over its distance to the others.
    isolated = (probe.residuals <= isolation / 10) & (isolation > 0)
    error = np.zeros_like(isolation)
    error[isolated] = probe.residuals[isolated] ** 2 / isolation[isolated]
    estimate = float(probe.weights[np.abs(probe.nodes) <= threshold + error].sum())
    return lower, min(max(estimate, lower), upper), upper


def _christoffel_bound(probe: Probe, threshold: float) -> float:
    r"""Upper limit for the probe's measure of ``[-threshold, threshold]`` from its orthogonal polynomials.

    :math:`\int q^2 d\mu \ge \mu([-\tau, \tau]) \min q^2` for every polynomial, here for the one that is least with
    :math:`q(0) = 1`, that is :math:`q(x) = K(0, x) / K(0, 0)` with the kernel :math:`K(x, y) = \sum p_k(x) p_k(y)`
    (Golub & Meurant 2010, section 6.2). Between two of its zeros, all real, a polynomial is least at the ends, so that
    two values tell the minimum, as long as no zeros lie inside: they are interlaced with the nodes, of which there may
    be one.
    """
    points = np.array([0.0, -threshold, threshold, -2 * threshold, 2 * threshold])
    before, now = np.zeros(5), np.ones(5)
    kernel, scale, changes, best = np.zeros(3), 1.0, np.zeros(5, dtype=int), 1.0
    coupling = 0.0
    for diagonal, following in zip(probe.diagonal, probe.couplings, strict=True):
        kernel += now[0] * now[:3]
        nodes_inside = abs(int(changes[4] - changes[3]))
        least = float((kernel[1:] / kernel[0]).min())
        if least > 0.5 and nodes_inside <= 1:
            best = min(best, 1 / (kernel[0] * scale * least**2))
        if following <= 0.0:
            break
        after = ((points - diagonal) * now - coupling * before) / following
        changes = changes + (np.sign(after) != np.sign(now))
        before, now, coupling = now, after, following
        size = float(np.abs(now).max())
        if size > 1e50:
            before, now, kernel, scale = before / size, now / size, kernel / size**2, min(scale * size**2, 1e300)
    return float(best)


def _share_of_converged(probe: Probe, inside: NDArray[np.intp], threshold: float) -> float:
    r"""Lower limit for the measure from Ritz pairs that have converged inside the threshold.

    If :math:`u` is the part of the start in those Ritz vectors, :math:`|u|^2 = W`, and :math:`P` projects on the
    eigenspaces inside, then :math:`|(1 - P) y_i| \le r_i / (\tau - |\theta_i|)` bounds :math:`|(1 - P) u|`, and
    :math:`|P v| \ge (W - |(1 - P) u|) / \sqrt W`.
    """
    mass = float(probe.weights[inside].sum())
    margins = threshold - np.abs(probe.nodes[inside])
    if mass == 0.0 or (margins <= 0).any():
        return 0.0
    outside = float((np.sqrt(probe.weights[inside]) * probe.residuals[inside] / margins).sum())
    return max(mass - outside, 0.0) ** 2 / mass


def _number_within(magnitudes: NDArray[np.float64], threshold: float) -> int:
    return int((magnitudes <= threshold).sum())


def _greatest(holds: Callable[[int], bool], limit: int) -> int:
    """The greatest number up to ``limit`` for which a condition holds that holds for 0 and ends once."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
