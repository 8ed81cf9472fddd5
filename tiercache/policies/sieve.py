"""SIEVE: a FIFO queue whose hand forgives each entry that was visited since it last passed.

Entries enter at the newest end and never move. A hit sets a byte. To evict, the hand walks from where it stopped
towards the newest end, clears the marks it meets, and takes the first entry without one; past the newest it starts
again at the oldest. New entries are therefore judged soon, and popular ones stay where they are. On a stream with a
long tail the hand takes a whole pass of the cache to come round, and what was popular once stays for long.

Entries leave only at the hand, which knows the entry behind it, so one link a slot is enough. A pinned slot is passed
over and keeps its mark.

Zhang et al., "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for Web Caches", NSDI 2024. Exactly
libCacheSim's Sieve.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS, Policy, bind

_USED, _NEWEST, _BEHIND = 0, 1, 2


class State(NamedTuple):
    """A queue in one array.

    newer   int32[capacity + 1]  the slot that entered next; the last element is the anchor, and leads to the oldest
    marks   uint8[capacity]      1 where a hit came since the hand last passed
    book    int64[3]             slots handed out so far; newest slot; slot behind the hand (or the anchor)
    """

    newer: npt.NDArray[np.int32]
    marks: npt.NDArray[np.uint8]
    book: npt.NDArray[np.int64]


def init(capacity: int) -> State:
    """State of `capacity` slots, 5 bytes a slot."""
    newer = np.zeros(capacity + 1, np.int32)
    newer[capacity] = capacity
    return State(newer, np.zeros(capacity, np.uint8), np.array([0, capacity, capacity], np.int64))


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Mark the slot."""
    state.marks[slot] = 1


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The first slot from the hand on that has neither mark nor pin."""
    slot = int64(state.book[_USED])
    if slot < keys.size:
        state.book[_USED] += 1
    else:
        slot = _evict(state, keys.size, pins)
        if slot < 0:
            return slot
    anchor = keys.size
    state.marks[slot] = 0
    state.newer[slot] = anchor
    state.newer[state.book[_NEWEST]] = slot
    state.book[_NEWEST] = slot
    return slot


@lean
def _evict(state: State, anchor: int, pins: Any) -> int:
    """Walk to the victim and take it out of the queue; BYPASS where too many are pinned."""
    behind = state.book[_BEHIND]
    slot = int64(state.newer[behind])
    patience = MAX_PINNED_VICTIMS
    while slot == anchor or state.marks[slot] != 0 or pins[slot] > 0:
        if slot != anchor:
            if pins[slot] <= 0:
                state.marks[slot] = 0
            elif patience == 0:
                state.book[_BEHIND] = slot
                return int64(BYPASS)
            else:
                patience -= 1
        behind = slot
        slot = int64(state.newer[slot])
    state.book[_BEHIND] = behind
    following = state.newer[slot]
    state.newer[behind] = following
    if following == anchor:
        state.book[_NEWEST] = behind
        state.book[_BEHIND] = anchor
    return slot


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """Each slot handed out is in the queue once; the newest and the hand are in it."""
    used, newest, behind = (int(value) for value in state.book)
    found, slot = [keys.size], int(state.newer[keys.size])
    while slot != keys.size and len(found) <= keys.size:
        found.append(slot)
        slot = int(state.newer[slot])
    assert sorted(found[1:]) == list(range(used)), "the queue is not the slots handed out"
    assert found[-1] == newest, "the newest is not the end of the queue"
    assert behind in found, "the hand is outside the queue"
    assert (keys[used:] == EMPTY).all(), "a slot holds a key before it was handed out"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("sieve", init, check)
