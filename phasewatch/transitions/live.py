"""Detection while the run goes on."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from ruptures.base import BaseEstimator

from phasewatch.record.transition import Flag, Transition, standing_transitions
from phasewatch.transitions.candidates import candidate_bounds, checked_search
from phasewatch.transitions.detect import RESOLVED, completed, scaled_run
from phasewatch.transitions.detection import Detection
from phasewatch.transitions.noisy import NoisySearch
from phasewatch.transitions.regression import PLACES
from phasewatch.transitions.resolved import resolved_transitions
from phasewatch.transitions.series import Scaled, checked_alpha

# Measurements that are looked at again with each new one. Once the run is longer, what ended before the second half of
# them is settled.
WINDOW = 240
# A change is looked for among this many newest measurements at every one, in all of them now and then.
RECENT = 12
REFRESH = 8
# A flag is withdrawn when so many searches in a row have not found it: what is on the verge comes and goes.
PATIENCE = 3
# Share of alpha that one look may spend. Looks that follow one another see nearly the same points, so their chances of
# a false alarm are far from adding up.
LOOK_SHARE = 0.05
# What the log odds of a change must exceed beyond those of alpha where, without it, the noise's correlation is 1.
CORRELATION_PRICE = 12.0


class LiveDetector:
    """Flags each transition at the measurement at which it is certain, and revises it when more is seen.

    A measurement costs a bounded time: the last 240 are searched again, and fully only where an exact segmentation has
    a boundary among the newest, or after an eighth more measurements.

    Where the points scatter, what is found is flagged once two things hold: its gain in likelihood pays for a twentieth
    of ``alpha``, and its odds against noise of any correlation that the history allows exceed one over its share of
    ``alpha``, by more the more correlated the noise would be without it (``phasewatch.transitions.odds``). In a short
    history much correlation is possible: there it takes more measurements, or a larger change. Where the course is
    resolved, a transition is flagged while it is ``under_way``, once the run is faster than in the stage before. A flag
    stands as long as its transition is found at all of ``alpha`` in one of three searches.

    Attributes:
        alpha: wanted rate of false alarms in a run without transitions.
        search: a search of ``ruptures`` that says where boundaries may lie, see ``detect_transitions``.
        flags: all that was said so far, in order.
    """

    def __init__(self, alpha: float = 0.05, search: BaseEstimator | None = None) -> None:
        """Start with an empty history.

        Raises:
            ValueError: if alpha is not strictly between 0 and 1.
            TypeError: if ``search`` is no search.
        """
        self.alpha = checked_alpha(alpha)
        self.search = checked_search(search)
        self.flags: list[Flag] = []
        self._steps: list[float] = []
        self._values: dict[str, list[float | None]] = {}
        self._errors: dict[str, list[float | None]] = {}
        self._reliable: dict[str, list[bool]] = {}
        self._read_beside: set[str] = set()
        self._searched = 0
        self._waiting = False
        self._missed: dict[int, int] = {}

    @property
    def transitions(self) -> list[Transition]:
        """The transitions as they are seen now, in order of their steps."""
        return standing_transitions(self.flags)

    def update(
        self,
        step: float,
        values: Mapping[str, float],
        standard_errors: Mapping[str, float] | None = None,
        reliable: Mapping[str, bool] | None = None,
        read_beside: Collection[str] = (),
    ) -> list[Flag]:
        """Take the measurement of one step and return what is new, revised or withdrawn as of now.

        Args:
            step: the step, later than all before.
            values: name to value; a signal that was not measured is left out or NaN.
            standard_errors: name to standard error.
            reliable: name to whether the value may be trusted; trusted where left out.
            read_beside: names of those in which no transition is looked for: they tell of what kind one is.

        Raises:
            ValueError: if the step is not a later one, or for the reasons of ``detect_transitions``. The measurement is
                then not taken.
        """
        self._append(step, values, standard_errors or {}, reliable or {}, read_beside)
        new = self._look()
        self.flags.extend(new)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return what the detector knows beside the measurements and its flags, as plain Python values."""
        return {
            "alpha": self.alpha,
            "searched": self._searched,
            "waiting": self._waiting,
            "missed": [[number, count] for number, count in self._missed.items()],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], measurements: Iterable[Sequence[Any]], flags: Iterable[Flag]
    ) -> None:
        """Continue from what ``state_dict`` returned: all that follows is as if the detector had never stopped.

        Args:
            state: the state.
            measurements: the arguments of every call of ``update`` until then, in order; where it refused them, they
                are refused again.
            flags: ``flags`` as they were then.

        Raises:
            ValueError: if the state lacks an entry.
        """
        try:
            alpha, searched = checked_alpha(state["alpha"]), int(state["searched"])
            waiting, missed = bool(state["waiting"]), {number: count for number, count in state["missed"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"not the state of a LiveDetector ({error!r}): expected what LiveDetector.state_dict() returned"
            ) from error
        self.alpha, self._waiting, self.flags = alpha, waiting, list(flags)
        self._steps, self._values, self._errors, self._reliable = [], {}, {}, {}
        self._read_beside = set()
        for step, values, errors, reliable, *beside in measurements:
            with suppress(ValueError):
                self._append(step, values, errors, reliable, *beside)
        # Of measurements and flags that are lost nothing can have been searched or missed.
        self._searched = min(searched, len(self._steps))
        known = {flag.number for flag in self.flags}
        self._missed = {number: count for number, count in missed.items() if number in known}

    def _append(
        self,
        step: float,
        values: Mapping[str, float],
        standard_errors: Mapping[str, float],
        reliable: Mapping[str, bool],
        read_beside: Collection[str] = (),
    ) -> None:
        step = _number(step, "step")
        if not math.isfinite(step) or (self._steps and step <= self._steps[-1]):
            raise ValueError(f"step {step:g} does not follow {self._steps[-1:]}; expected increasing steps")
        for what, given in (("standard_errors", standard_errors), ("reliable", reliable)):
            unknown = sorted(set(given) - set(values))
            if unknown:
                raise ValueError(f"{what} name {unknown}, but the values are those of {sorted(values)}")
        row = {name: _optional(value, f"value of {name!r}") for name, value in values.items()}
        errors = {name: _optional(error, f"standard error of {name!r}") for name, error in standard_errors.items()}
        negative = [name for name, error in errors.items() if error is not None and error < 0]
        if negative:
            raise ValueError(f"standard errors of {negative} are negative; expected them to be >= 0")
        # Nothing is taken before all of it was seen to be sound.
        for name in values:
            if name not in self._values:
                self._values[name] = [None] * len(self._steps)
                self._errors[name] = [None] * len(self._steps)
                self._reliable[name] = [True] * len(self._steps)
        self._steps.append(step)
        self._read_beside.update(read_beside)
        for name, column in self._values.items():
            column.append(row.get(name))
            self._errors[name].append(errors.get(name))
            self._reliable[name].append(bool(reliable.get(name, True)))

    def _look(self) -> list[Flag]:
        if not self._values.keys() - self._read_beside:
            return []
        first = self._first_in_window
        columns = (self._values, self._errors, self._reliable)
        given: list[Any] = [{name: column[first:] for name, column in kind.items()} for kind in columns]
        values, errors, reliable = given
        scaled = scaled_run(self._steps[first:], values, errors, reliable, self._read_beside)
        if isinstance(scaled, Detection) or not self._is_worth_a_search(scaled):
            return []
        self._searched = len(self._steps)
        if scaled.noise < RESOLVED:
            found = resolved_transitions(scaled, self.alpha, goes_on=True, search=self.search)
            convincing = partial(self._plain, found)
        else:
            search = NoisySearch(scaled, self.alpha, search=self.search)
            found = search.transitions
            convincing = partial(self._convincing, search)
        return self._compare(completed(found, None), convincing)

    def _plain(self, found: Sequence[Transition], new: Sequence[int], known: Collection[int]) -> list[int]:
        """Tell which new transitions of a resolved run may be flagged."""
        return [k for k in new if found[k].p_value <= LOOK_SHARE * self.alpha]

    def _convincing(self, search: NoisySearch, new: Sequence[int], known: Collection[int]) -> list[int]:
        """Tell which new transitions of a noisy run may be flagged: each for itself, or else all at once.

        Those that are known are taken for granted if they still have odds of their own: a level that wanders has them
        for a while, and would lend them to its next turn.
        """
        # Twice a log-likelihood of 2 log(1/share) more is a chance that is smaller by that share.
        strong = [k for k in new if search.gain(k) >= -2.0 * math.log(LOOK_SHARE)]
        if not strong:
            return []
        least = math.log(PLACES * search.points / self.alpha)
        believed = [k for k in known if search.odds([k], set(known) - {k}).log_ratio > 0.0]

        def convince(which: list[int]) -> bool:
            odds = search.odds(which, believed)
            return odds.log_ratio > len(which) * least + math.sqrt(len(which)) * CORRELATION_PRICE * odds.correlation

        flagged: list[int] = []
        for k in strong:
            if convince([k]):
                flagged.append(k)
                believed.append(k)
        # A change that is left out looks like a level that wanders: several may hide one another.
        rest = [k for k in strong if k not in flagged]
        return flagged + rest if len(rest) > 1 and convince(rest) else flagged

    def _is_worth_a_search(self, scaled: Scaled) -> bool:
        """Tell, at the cost of two segmentations, whether anything may have changed since the last search."""
        count = len(self._steps)
        if scaled.noise < RESOLVED or self._waiting or count >= self._searched + self._searched // REFRESH:
            return True
        recent = len(scaled.steps) - RECENT
        return any(bounds and bounds[-1] >= recent for bounds in candidate_bounds(scaled.searched_part, search=self.search))

    def _compare(
        self,
        found: Sequence[Transition],
        convincing: Callable[[Sequence[int], Collection[int]], list[int]],
    ) -> list[Flag]:
        """Match what is found now with what was flagged."""
        current = {flag.number: flag for flag in self.flags}
        settled = {flag.number for flag in current.values() if self._is_settled(flag)}
        open_flags = [flag for flag in current.values() if flag.number not in settled]
        standing = [current[number].transition for number in settled if current[number].action != "withdrawn"]
        # What is found of it in the rest of the window is nothing new.
        free = [k for k in range(len(found)) if not any(self._same(old, found[k]) for old in standing)]
        known = self._matched(open_flags, found, free)
        said: list[Flag] = []
        for k, flag in known.items():
            if flag.action == "withdrawn" or self._is_news(flag.transition, found[k]):
                said.append(Flag(flag.number, "revised", found[k], self._steps[-1]))
        new = [k for k in free if k not in known and not self._is_at_edge(found[k])]
        # What no stage parts from a known one may well be the same, cut in two by what is seen so far.
        apart = [k for k in new if not any(self._same(found[j], found[k]) for j in known)]
        flagged: list[int] = []
        for k in sorted(convincing(apart, known)):
            if not any(self._same(found[j], found[k]) for j in flagged):
                flagged.append(k)
        for number, k in enumerate(flagged, start=max(current, default=-1) + 1):
            said.append(Flag(number, "flagged", found[k], self._steps[-1]))
        self._waiting = len(flagged) < len(new)
        there = {flag.number for flag in known.values()}
        missed = [flag for flag in open_flags if flag.action != "withdrawn" and flag.number not in there]
        self._missed = {flag.number: self._missed.get(flag.number, 0) + 1 for flag in missed}
        gone = [flag for flag in missed if self._missed[flag.number] == PATIENCE]
        return said + [Flag(flag.number, "withdrawn", flag.transition, self._steps[-1]) for flag in gone]

    @property
    def _first_in_window(self) -> int:
        return max(0, len(self._steps) - WINDOW)

    def _is_at_edge(self, transition: Transition) -> bool:
        """Whether it lies in the first quarter of the window, which has lost what it comes after."""
        first = self._first_in_window
        return first > 0 and self._index(transition.start) < first + WINDOW // 4

    def _is_settled(self, flag: Flag) -> bool:
        """Whether what was flagged stands, or is withdrawn, for good."""
        if flag.transition.under_way and flag.action != "withdrawn":
            return False
        long_ago = self._first_in_window > 0 and self._index(flag.transition.end) < len(self._steps) - WINDOW // 2
        return long_ago or self._is_at_edge(flag.transition)

    def _matched(self, flags: Sequence[Flag], found: Sequence[Transition], which: Collection[int]) -> dict[int, Flag]:
        """Pair transitions found now with flags that they touch: first those of one kind, then the nearest."""
        pairs = []
        for flag in flags:
            old = self._as_of_now(flag)
            for k in which:
                if self._same(old, found[k]):
                    overlaps = min(old.end, found[k].end) > max(old.start, found[k].start)
                    away = abs(self._index(old.step) - self._index(found[k].step))
                    other_kind = flag.transition.kind != found[k].kind
                    pairs.append((flag.action == "withdrawn", not overlaps, other_kind, away, flag.number, k))
        known: dict[int, Flag] = {}
        by_number = {flag.number: flag for flag in flags}
        for *_, number, k in sorted(pairs):
            if number in by_number and k not in known:
                known[k] = by_number.pop(number)
        return known

    def _as_of_now(self, flag: Flag) -> Transition:
        """What was flagged; as long as it stands, what is under way goes on to the newest measurement."""
        if flag.transition.under_way and flag.action != "withdrawn":
            return replace(flag.transition, end=self._steps[-1])
        return flag.transition

    def _is_news(self, old: Transition, now: Transition) -> bool:
        """Whether a transition has ended, is of another kind or lies elsewhere.

        Elsewhere is more than a measurement away, and more than the quarter of its width that is doubtful anyway.
        """
        if old.label != now.label:
            return True
        start, end = self._index(old.start), self._index(old.end)
        moved = max(abs(self._index(now.start) - start), abs(self._index(now.end) - end))
        return not now.under_way and moved > max(1.0, 0.25 * (end - start))

    def _index(self, step: float) -> int:
        return bisect.bisect_left(self._steps, step)

    def _same(self, one: Transition, other: Transition) -> bool:
        """Whether two share some time, give or take a measurement."""
        apart = max(one.start, other.start), min(one.end, other.end)
        between = sum(apart[1] < step < apart[0] for step in self._steps[-WINDOW:])
        return apart[0] <= apart[1] or between <= 2


def _number(given: float, what: str) -> float:
    try:
        return float(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} is {given!r}; expected a number") from error


def _optional(given: float | None, what: str) -> float | None:
    """Return a plain float, or None for a missing value (which JSON can hold, as it cannot NaN)."""
    if given is None:
        return None
    number = _number(given, what)
    if math.isinf(number):
        raise ValueError(f"{what} is infinity; expected a finite number, or NaN where it is missing")
    return None if number != number else number
