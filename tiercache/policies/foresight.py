"""Gittins with a look-ahead: for rows whose next use was announced, its time takes the place of the index.

A row that is used again in d units of time is worth 1 / d: one hit for the time that its slot is taken, on the scale of the
index. A row that nobody announced is not used before the window of what is known is over, and is as old as it will be then. If
the index at that age is g, then a hit takes the window and 1 / g:

    index = 1 / (window + 1 / g).

That is weighed with the plain index, as far as not all of the window is known. So rows that are known and rows that are not
compare on one scale, and what comes is kept out where it is worth less than everything that is looked at: with all of the
future known, that is Belady's choice.

All else, and so all that is learned, is `gittins`'s own.
"""

from collections import namedtuple
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.native import inlined, int64, lean
from tiercache.policies import expected, gittins
from tiercache.policies.base import EMPTY, Policy, bind
from tiercache.policies.expected import NO_DUE, NOW_TURN, TURN

_CLASSES = gittins._CLASSES
_NUM_AGES = gittins._NUM_AGES
_MOST = float(1 << 60)
_SOON = 1 / 4096
"""Turns; what is due sooner is due now."""

_named: Any = namedtuple
State = _named("State", [*gittins.State._fields, "expected", "due", "patient", "judged"])
"""A state of gittins, its arrays shared, and

    expected  Expected              what was announced
    due       int64[capacity]       the turn at which each slot's row is used next, or NO_DUE
    patient   int32[classes, 64]    index of a row that nobody announced, scaled
    judged    int64[1]              the class whose index that is comes next
"""


def look_ahead(state: gittins.State, room: int | None = None) -> Any:
    """The state with a look-ahead, whose arrays it shares: 8 bytes a slot more, and what `expected` says a use."""
    due = np.full(state.words.size, NO_DUE, np.int64)
    book = expected.new_expected() if room is None else expected.new_expected(room)
    return State(*state, book, due, state.worth.copy(), state.book[[gittins._GROUP]])


def init(capacity: int) -> Any:
    """State of `capacity` slots that looks ahead."""
    return look_ahead(gittins.init(capacity))


@lean
def now_of(state: Any) -> int:
    """The time, in accesses of the tier."""
    return int64(state.book[gittins._CLOCK])


@lean
def on_miss(state: Any, keys: Any, pins: Any, key: int) -> int:
    """As gittins, and note when the row that is let in is used next."""
    while state.judged[0] != state.book[gittins._GROUP]:
        learn_patience(state, int64(state.judged[0]))
        state.judged[0] = (state.judged[0] + 1) & (_CLASSES - 1)
    slot = int64(gittins.on_miss(state, keys, pins, key))
    if slot >= 0:
        state.due[slot] = expected.first_due(state.expected, key)
    return slot


@inlined
def _worth_of(state: Any, slot: int, now: int) -> int:
    """What keeping a slot is worth."""
    due = int64(state.due[slot])
    if due != NO_DUE:
        return _certain(state, due)
    word = int64(state.words[slot])
    age = ((now >> state.book[gittins._SHIFT]) - (word >> 6)) & (gittins._TURN - 1)
    return int64(state.patient[word & 63, state.age_of[age]])


@lean
def _least_of(state: Any, key: int, group: int, now: int) -> int:
    """What letting a key in is worth; where nothing is worth less, it is kept out."""
    due = int64(expected.first_due(state.expected, key))
    return 1 + (_certain(state, due) if due != NO_DUE else int64(state.patient[group, 0]))


@inlined
def _certain(state: Any, due: int) -> int:
    """One hit in so long; what is overdue is worth the less the longer it is."""
    turns = max(float(abs(due - state.expected.book[NOW_TURN])) / TURN, _SOON)
    value = gittins._SCALE * (1 << state.book[gittins._SHIFT]) / (turns * expected.pace(state.expected))
    return int64(min(value, _MOST))


@lean
def learn_patience(state: Any, group: int) -> None:
    """The index of a class at every age, for rows that nobody announced."""
    accesses, known = expected.horizon(state.expected)
    window = accesses / float(1 << state.book[gittins._SHIFT])
    for age in range(_NUM_AGES):
        then = int64(state.age_of[min(_begin(age) + int64(window), gittins._LAST_AGE)])
        index = float(state.worth[group, then])
        value = index / (1.0 + index * window / gittins._SCALE)
        state.patient[group, age] = int64(known * value + (1.0 - known) * state.worth[group, age])


@inlined
def _begin(column: int) -> int:
    """The first age of a column."""
    octave = column >> 2
    return int64(column) if octave < 2 else (4 + (int64(column) & 3)) << (octave - 1)


def check(state: Any, keys: npt.NDArray[np.int64]) -> None:
    """What gittins checks; and each slot knows when its row is used next."""
    gittins.check(state, keys)
    expected.check(state.expected)
    for slot in np.flatnonzero(keys != EMPTY).tolist():
        due = expected.first_due(state.expected, int(keys[slot]))
        assert state.due[slot] == due, f"slot {slot} is due at {due}, and says at {state.due[slot]}"
    assert (state.patient >= 0).all(), "an index is negative"


bind(State, on_hit=gittins.on_hit, on_miss=on_miss, ask=gittins.ask, ask_miss=gittins.ask_miss)
for _name, _function in (("worth_of", _worth_of), ("least_of", _least_of)):
    setattr(State, _name, staticmethod(_function))
POLICY = Policy("gittins", init, check)
