"""Which boundaries of a noisy run are real: one regression of each signal on all of them at once.

A signal is a line in log time, at most one bend (an offset power law), and an abrupt or logistic change of level at
each boundary; about it there is first-order autocorrelated noise, whose correlation is fitted together with everything
else. Correlated noise, a power law and a real change can each explain a wiggle; they are compared by one penalised
likelihood. A boundary has a price (from the wanted rate of false alarms, shared out over the places where it might be)
and each signal that changes there another (as in Tickle, Eckley & Fearnhead 2021, "A computationally efficient,
high-dimensional multiple changepoint procedure").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, gammaincc
from scipy.stats import binom, chi2

from phasewatch.transitions.series import UNRELIABLE_VARIANCE

# A boundary: the half-way place and the 10-90 % width of the change, both in measurements; width 0 is abrupt.
Boundary = tuple[float, float]

# What is tried: correlations of the noise from one measurement to the next, widths of transitions in measurements, and
# scales and exponents of bends. Chosen.
CORRELATIONS = np.array([0.0, 0.2, 0.4, 0.6, 0.75, 0.88])
WIDTHS = np.array([0.0, 3.0, 4.5, 6.5, 9.0, 13.0, 19.0, 27.0, 40.0, 60.0, 90.0])
BEND_SCALES = 10
BEND_EXPONENTS = (0.4, 1.0)
# Prices, in units of twice the log-likelihood: of a change in one signal, more where its noise is correlated (a level
# that wanders makes steps look likelier than they are), of a bend, of slopes that differ, of correlation, of a ramp.
# Chosen.
CHANGE_PRICE = 4.0
CORRELATED_CHANGE_PRICE = 22.0
BEND_PRICE = 10.0
SLOPES_PRICE = 3.0
CORRELATION_PRICE = 12.0
WIDTH_PRICE = 3.0
# As many measurements of a signal as the fitting of it uses up. Chosen.
FITTED = 8
# What is left unexplained below this share of a signal's span is of no interest. Chosen.
RESOLUTION = 0.015
# Prior standard deviation of a slope's change at a boundary, in spans of the signal over the whole of log time. Chosen.
SLOPE_PRIOR = 0.5
# Effective number of places for each measurement: at and between measurements, of several widths. Chosen.
PLACES = 4.0
# Width of a ramp that is tried where a step may be none. Chosen.
RAMP = 5.0
# Times that all boundaries are moved and others tried beside them, at most. Chosen.
ROUNDS = 3
# Measurements that stand for a stage at least, even where they lie within a wide transition. Chosen.
LEAST_BESIDE = 3
# A logistic curve goes from 10 to 90 % over so many of its units.
LOG_81 = math.log(81.0)


def boundary_price(alpha: float, points: int, signals: int) -> float:
    """Gain that a boundary must bring beyond ``CHANGE_PRICE`` a signal, so that ``alpha`` of all null runs has one."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if chance_of_gain(middle, points, signals) > alpha:
            low = middle
        else:
            high = middle
    return high


def chance_of_gain(gain: float, points: int, signals: int) -> float:
    """Expected number of places in a null run at which a boundary gains so much beyond ``CHANGE_PRICE`` a signal.

    Under the null, twice the log-likelihood gained in a signal is chi-squared with one degree of freedom; what exceeds
    ``CHANGE_PRICE`` is at most exponential, so the sum over those of the signals that do is a mixture of gammas.
    """
    count = np.arange(1, signals + 1)
    share = binom.pmf(count, signals, chi2.sf(CHANGE_PRICE, 1))
    return PLACES * points * float(share @ gammaincc(count, max(gain, 0.0) / 2))


def changed_shares(index: np.ndarray, boundaries: Sequence[Boundary]) -> np.ndarray:
    """Share of the change at each boundary that has happened at each measurement, shape (points, boundaries)."""
    place, width = np.array(boundaries, dtype=float).reshape(-1, 2).T
    distance = index[:, None] - place
    return np.where(width > 0, expit(LOG_81 * distance / np.where(width > 0, width, 1.0)), distance >= 0)


@dataclass(frozen=True)
class Fit:
    """A regression at its best correlation.

    Attributes:
        criterion: minus twice the log-likelihood, prices included but those of changes in white noise.
        correlation: index into ``CORRELATIONS``.
        columns: columns of the design that it uses; the last ``slopes`` of them with a Gaussian prior.
        slopes: number of boundaries at which the slope may change.
    """

    criterion: float
    correlation: int
    columns: tuple[int, ...]
    slopes: int


class SignalRegression:
    """The regression of one signal. All its fits use the Gram matrices of one design, made by ``use``."""

    def __init__(
        self,
        steps: np.ndarray,
        time: np.ndarray,
        values: np.ndarray,
        sigma: np.ndarray,
        span: float,
        trusted: np.ndarray,
        drift: bool = True,
    ) -> None:
        """Take one signal on its scale, with the standard deviation of each point (infinite where missing).

        Points that are not ``trusted`` count as the 25th of one. Without ``drift`` all stages are plateaus.
        """
        present = np.isfinite(sigma)
        self.index = np.flatnonzero(present).astype(float)
        self.sigma = sigma[present]
        self.time = time[present]
        self.points = len(self.sigma)
        self.effective = float(np.where(trusted[present], 1.0, 1.0 / UNRELIABLE_VARIANCE).sum())
        self.extent = float(np.ptp(time)) or 1.0
        y = values[present]
        self.mean = float(y.mean())
        self.y = (y - self.mean) / self.sigma
        self.drift = drift
        elapsed = steps[present] - steps[present][0]
        scales = np.geomspace(max(float(np.diff(elapsed).min()), 1e-4 * elapsed[-1]), 0.6 * elapsed[-1], BEND_SCALES)
        relative = 1.0 + elapsed[:, None] / scales
        bends = np.concatenate([relative**-exponent for exponent in BEND_EXPONENTS], axis=1)
        self.bends = (bends - bends.mean(axis=0)) / self.sigma[:, None]
        line = np.column_stack([np.ones(self.points), (self.time - self.time.mean()) / self.extent])
        self.line = line[:, : 1 + drift] / self.sigma[:, None]
        unit = span / float(np.median(self.sigma))
        self.prior = 1.0 / (SLOPE_PRIOR * unit) ** 2
        self.unexplained = self.points * (RESOLUTION * unit) ** 2

    def changes(self, boundaries: Sequence[Boundary]) -> np.ndarray:
        """The columns of changes of level."""
        return changed_shares(self.index, boundaries) / self.sigma[:, None]

    def use(self, boundaries: Sequence[Boundary]) -> None:
        """Make the Gram matrices, one for each correlation, of all columns that fits may choose from."""
        count = len(boundaries)
        self.boundaries = tuple(boundaries)
        places = np.interp([place for place, _ in boundaries], self.index, self.time)
        kinks = np.maximum(self.time[:, None] - places, 0.0) / (self.extent * self.sigma[:, None])
        z = np.column_stack([self.line, self.changes(boundaries), kinks, self.bends, self.y])
        ahead = z[1:].T @ z[:-1]
        inner = z[1:-1]
        rho = CORRELATIONS[:, None, None]
        # The innovations' Gram matrix, with the first point at its stationary variance.
        self._gram = (z.T @ z)[None] - rho * (ahead + ahead.T) + rho**2 * (inner.T @ inner)
        self._every = np.arange(len(CORRELATIONS))[:, None, None]
        self._own = np.diagonal(self._gram, axis1=1, axis2=2)
        self._first_change = self.line.shape[1]
        self._first_kink = self._first_change + count
        self._first_bend = self._first_kink + count
        self._fits: dict[tuple[tuple[int, ...], tuple[int, ...]], Fit] = {}

    def fit(self, boundaries: tuple[int, ...], changes: tuple[int, ...]) -> Fit:
        """Fit with changes of level at some boundaries, slopes common to all stages or not, whichever is better."""
        fit = self._fit_once((), changes)
        if boundaries and self.drift:
            fit = min(fit, self._fit_once(boundaries, changes), key=lambda fit: fit.criterion)
        return fit

    def _fit_once(self, kinks: tuple[int, ...], changes: tuple[int, ...]) -> Fit:
        key = (kinks, changes)
        if key not in self._fits:
            self._fits[key] = self._fit(kinks, changes)
        return self._fits[key]

    def _fit(self, kinks: tuple[int, ...], changes: tuple[int, ...], bend: bool = False) -> Fit:
        m, count = self.points, len(kinks)
        firsts = [*range(self._first_change), *(self._first_change + j for j in changes)]
        free = [*firsts, *(self._first_kink + j for j in kinks)]
        rest = slice(self._first_bend, None)
        gram = self._gram[self._every, np.array(free)[:, None], free]
        price = np.zeros(len(CORRELATIONS))
        if count:
            inside = gram[:, -count:, -count:]
            price += np.linalg.slogdet(np.eye(count) + inside / self.prior)[1] + SLOPES_PRICE
            gram[:, range(-count, 0), range(-count, 0)] += self.prior
        scale = _scales(gram)
        normal = gram * scale[:, :, None] * scale[:, None, :] + 1e-10 * np.eye(len(free))
        right = self._gram[:, free, rest] * scale[:, :, None]
        solved = np.linalg.solve(normal, right)
        own = self._own[:, rest]
        left = own - (right * solved).sum(axis=1)
        moment = self._gram[:, rest, -1] - (right * solved[:, :, -1:]).sum(axis=1)
        straight = np.maximum(left[:, -1], 1e-9)
        fresh = left[:, :-1] > 1e-6 * own[:, :-1]
        gain = np.where(fresh, moment[:, :-1] ** 2 / np.where(fresh, left[:, :-1], 1.0), 0.0)
        which = gain.argmax(axis=1)
        bent = np.maximum(straight - gain.max(axis=1), 1e-3 * m)
        bends = self.drift & (
            self.effective * np.log((straight + self.unexplained) / (bent + self.unexplained)) > BEND_PRICE
        )
        bends |= bend & self.drift
        residual = np.where(bends, bent, straight)
        price += BEND_PRICE * bends + (CORRELATION_PRICE + CORRELATED_CHANGE_PRICE * len(changes)) * CORRELATIONS
        criterion = self.effective * np.log((residual + self.unexplained) / m) - np.log(1 - CORRELATIONS**2) + price
        best = int(criterion.argmin())
        extra = [self._first_bend + int(which[best])] if bends[best] else []
        columns = (*firsts, *extra, *free[len(firsts) :])
        return Fit(float(criterion[best]), best, columns, count)

    def evidence(self, fit: Fit) -> np.ndarray:
        """Return the log marginal likelihood of the columns of a fit at each of ``CORRELATIONS``.

        Coefficients and the log of the scale have flat priors (restricted likelihood; Patterson & Thompson 1971,
        Harville 1974), so what fitted columns take from the residuals' correlation is made up for.
        """
        columns = list(fit.columns)
        gram = self._gram[:, columns][:, :, columns]
        own, moment = self._own[:, -1], self._gram[:, columns, -1]
        if fit.slopes:
            gram[:, range(-fit.slopes, 0), range(-fit.slopes, 0)] += self.prior
        scale = _scales(gram)
        normal = gram * scale[:, :, None] * scale[:, None, :] + 1e-9 * np.eye(len(columns))
        solved = np.linalg.solve(normal, (moment * scale)[..., None])[..., 0]
        residual = np.maximum(own - (moment * scale * solved).sum(axis=1), 1e-9) + self.unexplained
        used = np.where(scale > 0, scale, 1.0)
        determinant = np.linalg.slogdet(normal)[1] - 2.0 * np.log(used).sum(axis=1) - fit.slopes * math.log(self.prior)
        freedom = self.effective - len(columns) + fit.slopes
        bent = columns[-1 - fit.slopes] >= self._first_bend
        price = BEND_PRICE * bent + SLOPES_PRICE * (fit.slopes > 0)
        return np.asarray(-0.5 * (freedom * np.log(residual) - np.log(1 - CORRELATIONS**2) + determinant + price))

    def strengths(self, boundaries: tuple[int, ...], changes: tuple[int, ...]) -> np.ndarray:
        """Squared z of each change, all others being fitted too."""
        fit = self.fit(boundaries, changes)
        effects, covariance, _ = self._coefficients(fit, np.array([fit.columns]))
        here = slice(self._first_change, self._first_change + len(changes))
        variance = np.diagonal(covariance[0])[here]
        squared: np.ndarray = effects[0, here] ** 2 / np.where(variance > 0, variance, 1.0)
        return squared

    def _coefficients(self, fit: Fit, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit each of several sets of columns (sets, columns), with the correlation and slopes of a fit.

        Returns:
            Their coefficients, the covariances of these and the unexplained variances.
        """
        gram = self._gram[fit.correlation][columns[:, :, None], columns[:, None, :]]
        if fit.slopes:
            gram[:, range(-fit.slopes, 0), range(-fit.slopes, 0)] += self.prior
        scale = _scales(gram)
        normal = gram * scale[:, :, None] * scale[:, None, :] + 1e-9 * np.eye(columns.shape[1])
        inverse = np.linalg.inv(normal) * scale[:, :, None] * scale[:, None, :]
        moment = self._gram[fit.correlation][columns, -1]
        coefficients = (inverse @ moment[:, :, None])[:, :, 0]
        residual = np.maximum(self._own[fit.correlation, -1] - (moment * coefficients).sum(axis=1), 1e-9)
        variance = (residual + self.unexplained) / self._freedom(fit)
        return coefficients, inverse * variance[:, None, None], variance

    def _freedom(self, fit: Fit) -> int:
        return max(self.points - 1 - len(fit.columns) + fit.slopes, 3)

    def effect(self, changes: tuple[int, ...], j: int) -> tuple[float, float, float, int]:
        """Return the level before boundary ``j``, its change, the change's standard error and degrees of freedom.

        Levels are continued to the half-way place of the boundary, all other boundaries being fitted too. Whether
        slopes differ and how the course bends is not known: slopes and a bend are allowed for, whatever the data
        preferred, and the bends are averaged by their likelihoods (Hoeting et al. 1999, eq. 1 and what follows it).
        """
        every = tuple(range(len(self.boundaries)))
        changes = tuple(sorted({*changes, j}))
        fit = self._fit(every if self.drift else (), changes, bend=True)
        place = np.array([self.boundaries[j][0]])
        at = np.interp(place, self.index, np.arange(self.points))
        rows = np.arange(self.points)
        line = [np.interp(at, rows, column * self.sigma) for column in self.line.T]
        shares = changed_shares(place, self.boundaries).T
        shares[j] = 0.0
        time = np.interp(at, rows, self.time)
        kinks = [np.maximum(time - np.interp(b[0], self.index, self.time), 0.0) / self.extent for b in self.boundaries]
        bends = [np.interp(at, rows, column * self.sigma) for column in self.bends.T]
        here = np.concatenate([*line, *shares, *kinks, *bends])
        columns = np.array([fit.columns])
        if self.drift:
            columns = np.repeat(columns, len(bends), axis=0)
            columns[columns >= self._first_bend] = self._first_bend + np.arange(len(bends))
        coefficients, covariance, variance = self._coefficients(fit, columns)
        share = np.exp(-0.5 * self.effective * np.log(variance / variance.min()))
        share /= share.sum()
        position = fit.columns.index(self._first_change + j)
        change = coefficients[:, position]
        before = (here[columns] * coefficients).sum(axis=1)
        mean = float(share @ change)
        error = math.sqrt(share @ (covariance[:, position, position] + (change - mean) ** 2))
        return self.mean + float(share @ before), mean, error, self._freedom(fit)

    def choose(self, boundaries: tuple[int, ...], changes: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        """Return the best criterion, and at which of the boundaries this signal changes: at most at ``changes``."""
        # Fitted coefficients make likelihood ratios of short series too large.
        small = max(self.points - FITTED, 1) / self.points
        best = (math.inf, changes)
        while True:
            value = self.fit(boundaries, changes).criterion * small + CHANGE_PRICE * len(changes)
            best = min(best, (value, changes))
            if not changes or value > best[0] + 25.0:
                return best
            strengths = self.strengths(boundaries, changes)
            weakest = int(strengths.argmin())
            if strengths[weakest] > 60.0:
                return best
            changes = changes[:weakest] + changes[weakest + 1 :]

    def gains(
        self, candidates: Sequence[Boundary], others: Sequence[Boundary], fit: Fit
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return twice the log-likelihood gained by a change at each candidate, and how large that change would be.

        Correlation and bend are those of ``fit``.
        """
        rho = CORRELATIONS[fit.correlation]
        bend = [c - self._first_bend for c in fit.columns if c >= self._first_bend]
        design = np.column_stack([self.line, self.bends[:, bend], self.changes(others)])
        basis = np.linalg.qr(innovations(design, rho))[0]
        columns = innovations(self.changes(candidates), rho)
        size = (columns**2).sum(axis=0)
        columns = columns - basis @ (basis.T @ columns)
        y = innovations(self.y[:, None], rho)[:, 0]
        residual = y - basis @ (basis.T @ y)
        total = float(residual @ residual) + self.unexplained
        left = (columns**2).sum(axis=0)
        fresh = left > 1e-4 * size
        change = np.where(fresh, columns.T @ residual / np.where(fresh, left, 1.0), 0.0)
        freedom = self.points - design.shape[1] - 1
        gain = (
            freedom * self.effective / self.points * np.log(total / np.maximum(total - change**2 * left, 1e-4 * total))
        )
        return gain, change


def _scales(gram: np.ndarray) -> np.ndarray:
    """Bring the columns of Gram matrices to length one; those are left out that are zero in all points of a signal."""
    squares = np.diagonal(gram, axis1=1, axis2=2)
    return np.asarray(np.where(squares > 0, 1.0 / np.sqrt(np.where(squares > 0, squares, 1.0)), 0.0))


def innovations(columns: np.ndarray, rho: float) -> np.ndarray:
    """What is new at each point in first-order autoregressive noise, the first point at its stationary variance."""
    return np.concatenate([columns[:1] * math.sqrt(1 - rho**2), columns[1:] - rho * columns[:-1]])


@dataclass(frozen=True)
class Selection:
    """A set of boundaries and which signals change at each.

    Attributes:
        criterion: penalised minus twice log-likelihood of all signals.
        boundaries: in order.
        changes: per signal, the boundaries (by number) at which it changes.
    """

    criterion: float
    boundaries: tuple[Boundary, ...]
    changes: tuple[tuple[int, ...], ...]


class BoundarySearch:
    """Chooses among candidate boundaries, and moves and widens them."""

    def __init__(
        self, signals: Sequence[SignalRegression], points: int, price: float, known: Sequence[Boundary] = ()
    ) -> None:
        """Take the signals, the number of measurements, the price of a boundary, and boundaries known beforehand.

        Those that are known cost nothing, stay where they are, and are in every selection, in order.
        """
        self.signals = signals
        self.points = points
        self.price = price
        self.known = tuple(known)

    def best(self, candidates: Sequence[Sequence[int]]) -> Selection:
        """Return the best selection that starts from any of some segmentations, given by their inner bounds."""
        usable = [
            [c for c in bounds if 3 <= c <= self.points - 3 and self._is_another(c - 0.5)] for bounds in candidates
        ]
        starts: dict[tuple[Boundary, ...], None] = {}
        for bounds in usable:
            starts[self._with_known([(c - 0.5, 0.0) for c in bounds])] = None
            # What two or three boundaries cut up may be one ramp.
            merged = _merged(bounds, max(8.0, self.points / 8))
            starts[self._with_known(merged)] = None
            # A row of ramps, each taken for a step, would look no better than a drift.
            starts[self._with_known([(place, max(width, RAMP)) for place, width in merged])] = None
        # A step half-way through a ramp is worth little: what would fall for that is given its place and width first.
        for start in list(starts):
            every = tuple(range(len(start)))
            starts[tuple(self.moved(start, [every for _ in self.signals]))] = None
        best = min((self.prune(start) for start in starts), key=lambda s: s.criterion)
        for _ in range(ROUNDS):
            moved = self.moved(best.boundaries, best.changes)
            trial = [*moved]
            for place in sorted({c - 0.5 for bounds in usable for c in bounds}):
                if _is_apart(place, trial):
                    trial.append((place, 0.0))
            options = [self.prune(sorted(trial)), *(self.prune(joined) for joined in self._joined(moved))]
            better = min(options, key=lambda s: s.criterion)
            if better.criterion >= best.criterion - 1e-6:
                break
            best = better
        return best

    def _with_known(self, boundaries: Sequence[Boundary]) -> tuple[Boundary, ...]:
        return tuple(sorted([*self.known, *(b for b in boundaries if self._is_another(b[0]))]))

    def _is_another(self, place: float) -> bool:
        """Whether a stage would part a boundary there from those that are known."""
        return all(abs(place - known[0]) >= self._apart(known) for known in self.known)

    def _apart(self, boundary: Boundary) -> float:
        """How far the next boundary is away at least."""
        return 0.5 * boundary[1] + LEAST_BESIDE if boundary in self.known else 2.0

    def prepare(self, selection: Selection) -> None:
        """Make the signals ready to be asked about a selection."""
        for signal in self.signals:
            signal.use(selection.boundaries)

    def described(self, selection: Selection, signals: Sequence[SignalRegression]) -> tuple[BoundarySearch, Selection]:
        """Return the same for more signals: at which of the selected boundaries those change that were not searched."""
        own = {id(signal): changes for signal, changes in zip(self.signals, selection.changes, strict=True)}
        every = tuple(range(len(selection.boundaries)))
        changes_of = []
        for signal in signals:
            signal.use(selection.boundaries)
            changes_of.append(own[id(signal)] if id(signal) in own else signal.choose(every, every)[1])
        search = BoundarySearch(signals, self.points, self.price, self.known)
        return search, Selection(selection.criterion, selection.boundaries, tuple(changes_of))

    def gain(self, selection: Selection, which: int) -> float:
        """Return what one boundary of a selection brings beyond its price, in units of twice the log-likelihood."""
        self.prepare(selection)
        rest = tuple(j for j in range(len(selection.boundaries)) if j != which)
        without = sum(signal.choose(rest, rest)[0] for signal in self.signals)
        without += self.price * (len(rest) - len(self.known))
        return without - selection.criterion

    def prune(self, boundaries: Sequence[Boundary]) -> Selection:
        """Drop boundaries, the weakest first, and return the best of all stages of this."""
        for signal in self.signals:
            signal.use(boundaries)
        kept = tuple(range(len(boundaries)))
        known = {j for j in kept if boundaries[j] in self.known}
        allowed = [kept for _ in self.signals]
        best: tuple[float, tuple[int, ...], list[tuple[int, ...]]] | None = None
        while True:
            chosen = [signal.choose(kept, changes) for signal, changes in zip(self.signals, allowed, strict=True)]
            criterion = sum(value for value, _ in chosen) + self.price * (len(kept) - len(known))
            if best is None or criterion < best[0]:
                best = (criterion, kept, [changes for _, changes in chosen])
            if len(kept) == len(known):
                break
            weight = dict.fromkeys(kept, 0.0)
            for signal, (_, changes) in zip(self.signals, chosen, strict=True):
                if changes:
                    for j, strength in zip(changes, signal.strengths(kept, changes), strict=True):
                        weight[j] += max(strength - CHANGE_PRICE, 0.0)
            weakest = min(set(kept) - known, key=lambda j: weight[j])
            kept = tuple(j for j in kept if j != weakest)
            # Only a signal that loses a change has to look at the others again.
            allowed = [kept if weakest in changes else changes for _, changes in chosen]
        criterion, kept, chosen_changes = best
        number = {j: k for k, j in enumerate(kept)}
        changes_of = tuple(tuple(number[j] for j in changes) for changes in chosen_changes)
        return Selection(criterion, tuple(boundaries[j] for j in kept), changes_of)

    def moved(self, start: Sequence[Boundary], changes_of: Sequence[tuple[int, ...]]) -> list[Boundary]:
        """Move and widen each boundary in turn to where the signals that change there want it."""
        boundaries = list(start)
        for signal in self.signals:
            signal.use(boundaries)
        everywhere = tuple(range(len(boundaries)))
        fits = [s.fit(everywhere, c) for s, c in zip(self.signals, changes_of, strict=True)]
        for j in everywhere:
            if boundaries[j] in self.known:
                continue
            candidates = self._around(boundaries, j)
            gain = np.array([-WIDTH_PRICE * (width > 0) for _, width in candidates])
            for signal, changes, fit in zip(self.signals, changes_of, fits, strict=True):
                if j in changes:
                    gain += signal.gains(candidates, [boundaries[k] for k in changes if k != j], fit)[0]
            boundaries[j] = candidates[int(gain.argmax())]
        return boundaries

    def _around(self, boundaries: Sequence[Boundary], j: int) -> list[Boundary]:
        """Places and widths near those of a boundary, itself first."""
        place, width = boundaries[j]
        low = boundaries[j - 1][0] + self._apart(boundaries[j - 1]) if j else 2.5
        high = boundaries[j + 1][0] - self._apart(boundaries[j + 1]) if j + 1 < len(boundaries) else self.points - 3.5
        reach = max(4.0, 0.6 * width + 2.0)
        low, high = max(low, place - reach), min(high, place + reach)
        # What lies nearer than that would be under way in two transitions at once.
        left = boundaries[j - 1][0] + 0.5 * boundaries[j - 1][1] if j else -math.inf
        right = boundaries[j + 1][0] - 0.5 * boundaries[j + 1][1] if j + 1 < len(boundaries) else math.inf
        candidates = [(place, width)]
        for wide in WIDTHS[max(14.0, self.points / 3) >= WIDTHS].tolist():
            spacing = max(0.5, wide / 8) if wide else 1.0
            first = low if wide else math.floor(low) + 0.5
            places = np.arange(first, high + 0.01, spacing)
            candidates += [(float(c), wide) for c in places if left <= c - 0.5 * wide and c + 0.5 * wide <= right]
        return candidates

    def whereabouts(self, selection: Selection, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return possible half-way places of a boundary, their posterior probabilities, and the change's spread.

        Priors are flat; the spread is, per signal, the standard deviation of the change that comes of not knowing place
        and width.
        """
        boundaries = selection.boundaries
        candidates = self._around(boundaries, j)[1:]
        if not candidates:
            return np.array([boundaries[j][0]]), np.ones(1), np.zeros(len(self.signals))
        every = tuple(range(len(boundaries)))
        gain = np.array([-WIDTH_PRICE * (width > 0) for _, width in candidates])
        changed = np.zeros((len(self.signals), len(candidates)))
        for row, (signal, changes) in enumerate(zip(self.signals, selection.changes, strict=True)):
            others = [boundaries[k] for k in changes if k != j]
            own, changed[row] = signal.gains(candidates, others, signal.fit(every, changes))
            if j in changes:
                gain += own
        mass = np.exp(0.5 * (gain - gain.max())) * _spacing(candidates)
        mass /= mass.sum()
        spread = np.sqrt(((changed - (changed @ mass)[:, None]) ** 2) @ mass)
        return np.array([place for place, _ in candidates]), mass, spread

    def within(self, low: float, high: float) -> tuple[Boundary, tuple[float, float, float]]:
        """Return the one boundary between two places that all signals most likely share, and the interval of it."""
        candidates: list[Boundary] = []
        for width in WIDTHS[max(14.0, self.points / 3) >= WIDTHS].tolist():
            spacing = max(0.5, width / 8) if width else 1.0
            inside = np.arange(max(math.floor(low) + 0.5, 2.5), min(high, self.points - 3.0) + 0.01, spacing)
            candidates += [(float(p), width) for p in inside if width / 2 <= p <= self.points - 1 - width / 2]
        best: tuple[Boundary, ...] = ()
        # How correlated the noise is shows once the change is known.
        for _ in range(2):
            gain = np.array([-WIDTH_PRICE * (width > 0) for _, width in candidates])
            every = tuple(range(len(best)))
            for signal in self.signals:
                signal.use(best)
                gain += signal.gains(candidates, [], signal.fit(every, every))[0]
            best = (candidates[int(gain.argmax())],)
        mass = np.exp(0.5 * (gain - gain.max())) * _spacing(candidates)
        return best[0], interval_of(np.array([p for p, _ in candidates]), mass / mass.sum())

    def _joined(self, boundaries: Sequence[Boundary]) -> list[list[Boundary]]:
        """The same boundaries with two neighbours made one ramp."""
        joined = []
        for j in range(len(boundaries) - 1):
            (a, wide_a), (b, wide_b) = boundaries[j], boundaries[j + 1]
            if {boundaries[j], boundaries[j + 1]} & {*self.known}:
                continue
            width = b - a + 0.5 * (wide_a + wide_b)
            if width <= max(8.0, self.points / 8):
                joined.append([*boundaries[:j], (0.5 * (a + b), width), *boundaries[j + 2 :]])
        return joined


def _is_apart(place: float, boundaries: Sequence[Boundary]) -> bool:
    """Whether a boundary there would be another than these."""
    return all(abs(place - b) > max(2.0, 0.6 * width) for b, width in boundaries)


def _merged(bounds: Sequence[int], reach: float) -> list[Boundary]:
    merged: list[Boundary] = []
    k = 0
    while k < len(bounds):
        last = k
        while last + 1 < len(bounds) and bounds[last + 1] - bounds[k] <= reach:
            last += 1
        merged.append((0.5 * (bounds[k] + bounds[last]) - 0.5, float(bounds[last] - bounds[k])))
        k = last + 1
    return merged


def _spacing(candidates: Sequence[Boundary]) -> np.ndarray:
    """Measurements between the places that are tried: widths have unequal numbers of them, and are to weigh alike."""
    widths = np.array([width for _, width in candidates])
    return np.where(widths > 0, np.maximum(0.5, widths / 8), 1.0)


def interval_of(places: np.ndarray, mass: np.ndarray) -> tuple[float, float, float]:
    """Return the 95 % interval of a place and its median; no narrower than the gap between two measurements."""
    order = np.argsort(places, kind="stable")
    below = np.cumsum(mass[order])
    low, middle, high = (
        float(places[order][min(int(np.searchsorted(below, q)), len(places) - 1)]) for q in (0.025, 0.5, 0.975)
    )
    return min(low, middle) - 0.5, middle, max(high, middle) + 0.5
