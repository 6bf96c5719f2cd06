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

from phasewatch.record.signals import LOSS, TRAINING_LOSS
from phasewatch.record.trace import Observed, joined
from phasewatch.record.transition import Flag, Transition, standing_transitions
from phasewatch.transitions.candidates import candidate_bounds, checked_search
from phasewatch.transitions.detect import RESOLVED, Search, completed, dense_signals, scaled_run
from phasewatch.transitions.detection import Detection
from phasewatch.transitions.events import LEARNING_RATE, Event, find_events, named_by_events, without_passing
from phasewatch.transitions.regression import PLACES
from phasewatch.transitions.series import Scaled, checked_alpha

# Measurements that are looked at again with each new one. Once the run is longer, what ended before the second half of
# them is settled. Chosen.
WINDOW = 240
# A change is looked for among this many newest measurements at every one, in all of them once there are an eighth more.
# Chosen.
RECENT = 12
REFRESH = 8
# A flag is withdrawn when so many searches in a row have not found it, and stands again when so many have: what is on
# the verge comes and goes. Chosen.
PATIENCE = 3
# Share of alpha that one look may spend. Looks that follow one another see nearly the same points, so their chances of
# a false alarm are far from adding up. Chosen.
LOOK_SHARE = 0.05
# The loss at every step is searched again once it has gone on by this share: a longer run has longer stages. Chosen.
OBSERVED_ANEW = 0.025
# Looks at the loss at every step, one after another, that must have seen a transition. There are hundreds in a run, at
# ever more of the same points: of 42 null runs of the benchmark's kinds, on other seeds, 9 were flagged with one look,
# of 28 with two 4, and what was flagged by chance was mostly gone in the look after.
LOOKS = 3
# What the log odds of a change must exceed beyond those of alpha where, without it, the noise's correlation is 1.
# Chosen.
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
    stands as long as its transition is found at all of ``alpha`` in one of three searches, and stands again, once it
    was withdrawn, when that is found in three, one after another.

    Where the loss at every step is shown to it (:meth:`observe`), it is searched too, with half of ``alpha``, and says
    where a transition is, once three looks in a row have seen it: many are taken, and what is chance in one is mostly
    gone in the next. What was done to the run and what befell it names those that it made.

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
        self._observed: dict[str, Observed] = {}
        self._resumed: list[float] = []
        self._known: list[Transition] = []
        self._suspected: list[list[Transition]] = []
        self._looked_until: float | None = None
        self._searched = 0
        self._waiting = False
        self._contradicted: dict[int, int] = {}

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

    def observe(self, observed: Mapping[str, Observed], resumed: Iterable[float] = ()) -> None:
        """Take what was observed at every step since this was called last; the next measurement is seen with it.

        Args:
            observed: name to steps and values, as :attr:`phasewatch.record.Run.observed` has them. Transitions are
                looked for in the ``"loss"``; it and the learning rates (``"learning_rate"``, ``"learning_rate_1"``)
                tell of what befell the run.
            resumed: steps at which the run was taken up again.
        """
        self._resumed += resumed
        for name, new in observed.items():
            if name == LOSS or name.startswith(LEARNING_RATE):
                pieces = [self._observed[name], new] if name in self._observed else [new]
                self._observed[name] = joined(pieces)

    def withdraw(self, refuted: Iterable[Flag], step: float, why: str) -> list[Flag]:
        """Withdraw what something else than the detector has refuted, and return the flags that say so.

        Args:
            refuted: flags of transitions that stand.
            step: of the last measurement.
            why: the reason.
        """
        said = [Flag(flag.number, "withdrawn", flag.transition, step, why) for flag in refuted]
        self.flags.extend(said)
        return said

    def state_dict(self) -> dict[str, Any]:
        """Return what the detector knows beside the measurements and its flags, as plain Python values.

        What was observed is not in it: it is in the record, and to be observed again.
        """
        return {
            "alpha": self.alpha,
            "known": [transition.to_dict() for transition in self._known],
            "suspected": [[transition.to_dict() for transition in look] for look in self._suspected],
            "looked_until": self._looked_until,
            "searched": self._searched,
            "waiting": self._waiting,
            "contradicted": [[number, count] for number, count in self._contradicted.items()],
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
            seen = [Transition.from_dict(plain) for plain in state["known"]]
            suspected = [[Transition.from_dict(plain) for plain in look] for look in state["suspected"]]
            looked_until = _optional(state["looked_until"], "looked_until")
            waiting = bool(state["waiting"])
            contradicted = {int(number): int(count) for number, count in state["contradicted"]}
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"not the state of a LiveDetector ({error!r}): expected what LiveDetector.state_dict() returned"
            ) from error
        self.alpha, self._waiting, self.flags = alpha, waiting, list(flags)
        self._known, self._suspected, self._looked_until = seen, suspected, looked_until
        self._steps, self._values, self._errors, self._reliable = [], {}, {}, {}
        self._read_beside = set()
        for step, values, errors, reliable, *beside in measurements:
            with suppress(ValueError):
                self._append(step, values, errors, reliable, *beside)
        # Of measurements and flags that are lost nothing can have been searched or contradicted.
        self._searched = min(searched, len(self._steps))
        known = {flag.number for flag in self.flags}
        self._contradicted = {number: count for number, count in contradicted.items() if number in known}

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
        alpha = self.alpha if LOSS not in self._observed else 0.5 * self.alpha
        news = self._look_at_observed(alpha)
        scaled = self._scaled()
        if scaled is None:
            if not news:
                return []
            found = list(self._known)

            def convincing(new: Sequence[int], known: Collection[int]) -> list[int]:
                return list(new)
        else:
            if not (news or self._is_worth_a_search(scaled)):
                return []
            self._searched = len(self._steps)
            search = Search(scaled, alpha, search=self.search, known=self._known, goes_on=True)
            found = search.transitions
            convincing = partial(self._convincing, search, alpha)
        found = completed(found, None)
        if found:
            found = named_by_events(found, self._events())
        return self._compare(found, convincing)

    def _scaled(self) -> Scaled | None:
        """The last measurements; None where they are too few to search."""
        if not self._values.keys() - self._read_beside:
            return None
        first = self._first_in_window
        columns = (self._values, self._errors, self._reliable)
        given: list[Any] = [{name: column[first:] for name, column in kind.items()} for kind in columns]
        values, errors, reliable = given
        scaled = scaled_run(self._steps[first:], values, errors, reliable, self._read_beside)
        return None if isinstance(scaled, Detection) else scaled

    def _look_at_observed(self, alpha: float) -> bool:
        """Look for transitions in the loss at every step, once it has gone on by a share; tell whether it was done."""
        if LOSS not in self._observed:
            return False
        steps, until = self._observed[LOSS].steps, self._looked_until
        if until is not None and steps[-1] - steps[0] < (1.0 + OBSERVED_ANEW) * (until - steps[0]):
            return False
        dense = dense_signals({TRAINING_LOSS: without_passing(self._observed[LOSS], self._events())}, ())
        if dense is None:
            return False
        self._looked_until = float(steps[-1])
        search = Search(dense.scaled, alpha, search=self.search)
        every = range(len(search.transitions))
        convinced = self._convincing(search, alpha, every, ())
        placed = dense.placed(search.transitions)
        suspected = [one for k, one in enumerate(placed) if one is not None and k in convinced]
        lately = self._suspected if len(self._suspected) == LOOKS - 1 else [[]]
        known = [one for one in placed if one is not None and self._was_seen(one, self._known)]
        known += [one for one in suspected if one not in known and all(self._was_seen(one, look) for look in lately)]
        self._suspected = [*self._suspected, suspected][1 - LOOKS :]
        self._known = sorted(known, key=lambda one: one.step)
        return True

    def _events(self) -> list[Event]:
        return find_events(self._observed, self._resumed)

    def _was_seen(self, one: Transition, before: Iterable[Transition]) -> bool:
        return any(self._same(one, old) for old in before)

    def _convincing(self, search: Search, alpha: float, new: Sequence[int], known: Collection[int]) -> list[int]:
        """Tell which new transitions may be flagged: each for itself, or else all at once.

        Those that are known are taken for granted if they still have odds of their own: a level that wanders has them
        for a while, and would lend them to its next turn.
        """
        given = [k for k in new if search.is_known(k)]
        new = [k for k in new if k not in given]
        noisy = search.noisy
        if noisy is None:
            return given + [k for k in new if search.transitions[k].p_value <= LOOK_SHARE * alpha]
        # Twice a log-likelihood of 2 log(1/share) more is a chance that is smaller by that share.
        strong = [k for k in new if noisy.gain(k) >= -2.0 * math.log(LOOK_SHARE)]
        if not strong:
            return given
        least = math.log(PLACES * noisy.points / alpha)
        found = range(len(noisy.transitions))
        believed = [k for k in (*given, *known) if k in found and search.is_known(k)]
        believed += [
            k
            for k in known
            if k in found and k not in believed and noisy.odds([k], set(known) & set(found) - {k}).log_ratio > 0.0
        ]

        def convince(which: list[int]) -> bool:
            odds = noisy.odds(which, believed)
            return odds.log_ratio > len(which) * least + math.sqrt(len(which)) * CORRELATION_PRICE * odds.correlation

        flagged: list[int] = []
        for k in strong:
            if convince([k]):
                flagged.append(k)
                believed.append(k)
        # A change that is left out looks like a level that wanders: several may hide one another.
        rest = [k for k in strong if k not in flagged]
        return given + (flagged + rest if len(rest) > 1 and convince(rest) else flagged)

    def _is_worth_a_search(self, scaled: Scaled) -> bool:
        """Tell, at the cost of two segmentations, whether anything may have changed since the last search."""
        count = len(self._steps)
        if scaled.noise < RESOLVED or self._waiting or count >= self._searched + self._searched // REFRESH:
            return True
        recent = len(scaled.steps) - RECENT
        return any(
            bounds and bounds[-1] >= recent for bounds in candidate_bounds(scaled.searched_part, search=self.search)
        )

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
        free = [k for k in range(len(found)) if not self._was_seen(found[k], standing)]
        known = self._matched(open_flags, found, free)
        there = {flag.number for flag in known.values()}
        against = [flag for flag in open_flags if (flag.number in there) is (flag.action == "withdrawn")]
        counts = {flag.number: self._contradicted.get(flag.number, 0) + 1 for flag in against}
        turned = {number for number, count in counts.items() if count >= PATIENCE}
        self._contradicted = {number: count for number, count in counts.items() if number not in turned}
        said: list[Flag] = []
        for k, flag in known.items():
            if flag.number in turned or (flag.action != "withdrawn" and self._is_news(flag.transition, found[k])):
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
        self._waiting = len(flagged) < len(new) or any(flag.action == "withdrawn" for flag in known.values())
        gone = [flag for flag in against if flag.number in turned and flag.action != "withdrawn"]
        why = f"not found in {PATIENCE} searches, one after another"
        return said + [Flag(flag.number, "withdrawn", flag.transition, self._steps[-1], why) for flag in gone]

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
