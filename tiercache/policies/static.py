"""Static: the rows of a profile, and no others, each kept from its first use on.

A miss of a row of the hot set gets a slot for good; every other miss is kept out. Nothing is ever evicted, so a pinned
slot matters only where the first read failed and the row returns for the same slot.

What a ranking learned offline reaches, and with the counts of the trace itself the bound of every policy that never
changes its mind (the static optimum).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies import keyset
from tiercache.policies.base import BYPASS, EMPTY, Policy, bind
from tiercache.policies.keyset import ABSENT, KeySet


class State(NamedTuple):
    """hot KeySet: the rows to keep; slot_of int32[h]: slot of each, or -1; used int64[1]: slots handed out so far."""

    hot: KeySet
    slot_of: npt.NDArray[np.int32]
    used: npt.NDArray[np.int64]


def init(capacity: int, *, hot_rows: npt.ArrayLike) -> State:
    """State of `capacity` slots, 20 bytes a hot row.

    hot_rows  int64[n], hottest first; the first `capacity` distinct ones are kept
    """
    rows = np.asarray(hot_rows, np.int64).reshape(-1)
    _, first = np.unique(rows, return_index=True)
    rows = rows[np.sort(first)[:capacity]]
    if rows.size and rows.min() < 0:
        raise ValueError(f"hot_rows has {rows.min()}, must not be negative")
    hot = keyset.new_keyset(rows.size)
    _add_all(hot, rows)
    return State(hot, np.full(rows.size, -1, np.int32), np.zeros(1, np.int64))


@lean
def _add_all(hot: KeySet, rows: Any) -> None:
    """Add distinct rows."""
    for i in range(rows.size):
        keyset.add(hot, rows[i])


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """A hit changes nothing."""


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The slot of a hot row."""
    entry = keyset.find(state.hot, key)
    if entry == ABSENT:
        return int64(BYPASS)
    slot = int64(state.slot_of[entry])
    if slot < 0:
        slot = state.used[0]
        state.used[0] += 1
        state.slot_of[entry] = slot
    elif pins[slot] > 0:
        slot = int64(BYPASS)
    return slot


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """Each slot handed out belongs to one hot row and holds it or nothing."""
    used = int(state.used[0])
    known = np.flatnonzero(state.slot_of >= 0)
    slots = state.slot_of[known]
    assert sorted(slots.tolist()) == list(range(used)), "the slots of the hot rows are not those handed out"
    held = keys[slots]
    assert ((held == state.hot.keys[known]) | (held == EMPTY)).all(), "a slot holds another row than its own"
    assert (keys[used:] == EMPTY).all(), "a slot holds a key before it was handed out"
    keyset.check(state.hot, list(range(state.slot_of.size)))


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("static", init, check)
