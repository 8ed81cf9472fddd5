"""W-TinyLFU: a window for the recent, a main part for the frequent, and a sketch that says who is frequent.

A new key enters the window, an LRU list. What falls out of it stands against the key that the main part would give up
next, and stays only if the sketch has seen it more often. The main part is a segmented LRU: keys enter on probation, a
hit moves them to the protected segment, whose oldest go back on probation when it is over its share.

The sketch is a count-min sketch of 4-bit counters, four for a key, all in one cache line; sixteen counters a slot.
Every access counts. Counters age without a pause: a hand goes over the sketch and halves one line of it after so many
accesses that each counter is halved once in `period * capacity` of them.

A pinned slot that comes up for eviction goes to the newest end of its list. If the window has nothing to give, the new
key itself stands against the main part's victim, and is kept out if it loses.

Einziger, Friedman, Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions on Storage 13(4),
2017.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS, Policy, bind
from tiercache.policies.keyset import mix
from tiercache.policies.links import NEWER, members, new_rings, oldest_unpinned, push, renew, unlink

_WINDOW, _PROBATION, _PROTECTED = 0, 1, 2
_USED, _WINDOW_SIZE, _PROTECTED_SIZE, _WINDOW_SHARE, _PROTECTED_SHARE = 0, 1, 2, 3, 4
_HAND, _CREDIT, _INTERVAL = 5, 6, 7
_LINE_BYTES = 64
_LONGEST_PERIOD = 2**31


class State(NamedTuple):
    """Three lists in one array, and the sketch.

    links   int32[capacity + 3, 2]  rings of slots: window, probation, protected
    list_of uint8[capacity]         list of each slot
    sketch  uint8[lines, 64]        two counters a byte; in each line four groups of 32 counters
    book    int64[8]                slots handed out; size of window and of protected; what either may be; line that
                                    is halved next, accesses until then, and from one to the next
    """

    links: npt.NDArray[np.int32]
    list_of: npt.NDArray[np.uint8]
    sketch: npt.NDArray[np.uint8]
    book: npt.NDArray[np.int64]


def init(capacity: int, *, window: float = 0.50, protected: float = 0.80, period: int = 5) -> State:
    """State of `capacity` slots, 17 bytes a slot.

    window     share of the slots in the window, 0 to 1
    protected  share of the main part that is protected, 0 to 1
    period     accesses per slot in which every counter is halved once, from 1 to 2**31
    """
    for name, share in (("window", window), ("protected", protected)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}, must be a share from 0 to 1")
    if not 1 <= period <= _LONGEST_PERIOD:
        raise ValueError(f"period is {period}, must be from 1 to 2**31")
    window_share = int(capacity * window)
    protected_share = int((capacity - window_share) * protected)
    lines = max(1, -(-capacity * 8 // _LINE_BYTES))
    interval = max(1, period * capacity // lines)
    return State(
        new_rings(capacity, 3),
        np.zeros(capacity, np.uint8),
        _aligned_lines(lines),
        np.array([0, 0, 0, window_share, protected_share, 0, interval, interval], np.int64),
    )


def _aligned_lines(lines: int) -> npt.NDArray[np.uint8]:
    """uint8[lines, 64] of zeros that begins at a cache line."""
    raw = np.zeros((lines + 1) * _LINE_BYTES, np.uint8)
    skip = -raw.ctypes.data % _LINE_BYTES
    return raw[skip : skip + lines * _LINE_BYTES].reshape(lines, _LINE_BYTES)


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Count the key, and move its slot up."""
    if keys[slot] != EMPTY:
        count(state, keys[slot])
    which = state.list_of[slot]
    if which == _PROBATION:
        unlink(state.links, slot)
        _enter(state, keys.size, _PROTECTED, slot)
        if state.book[_PROTECTED_SIZE] > state.book[_PROTECTED_SHARE]:
            demoted = int64(state.links[keys.size + _PROTECTED, NEWER])
            _leave(state, demoted)
            _enter(state, keys.size, _PROBATION, demoted)
    else:
        renew(state.links, keys.size + int64(which), slot)


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The slot of the less frequent of the window's oldest and the main part's next."""
    capacity = keys.size
    count(state, key)
    slot = int64(state.book[_USED])
    if slot < capacity:
        state.book[_USED] += 1
        _enter(state, capacity, _WINDOW, slot)
        if state.book[_WINDOW_SIZE] > state.book[_WINDOW_SHARE]:
            _admit(state, capacity, int64(state.links[capacity + _WINDOW, NEWER]))
        return slot
    candidate, patience = oldest_unpinned(state.links, capacity + _WINDOW, pins, MAX_PINNED_VICTIMS // 2)
    victim, patience = oldest_unpinned(state.links, capacity + _PROBATION, pins, patience + MAX_PINNED_VICTIMS // 2)
    if victim < 0:
        victim, _ = oldest_unpinned(state.links, capacity + _PROTECTED, pins, patience)
    if candidate < 0:
        return _contest(state, keys, victim, key)
    if victim >= 0 and estimate(state, keys[candidate]) > estimate(state, keys[victim]):
        _leave(state, victim)
        _admit(state, capacity, candidate)
    else:
        victim = candidate
        _leave(state, victim)
    _enter(state, capacity, _WINDOW, victim)
    return victim


@lean
def _contest(state: State, keys: Any, victim: int, key: int) -> int:
    """The victim's slot for a key that the window has no room for, or BYPASS if it has been seen less often."""
    if victim >= 0 and estimate(state, key) > estimate(state, keys[victim]):
        _leave(state, victim)
        _enter(state, keys.size, _PROBATION, victim)
        return victim
    return int64(BYPASS)


@lean
def _admit(state: State, capacity: int, slot: int) -> None:
    """Move a slot from the window to the main part."""
    _leave(state, slot)
    _enter(state, capacity, _PROBATION, slot)


@lean
def _enter(state: State, capacity: int, which: int, slot: int) -> None:
    """Make a slot that is in no list the newest of one."""
    push(state.links, capacity + which, slot)
    state.list_of[slot] = which
    state.book[_WINDOW_SIZE] += which == _WINDOW
    state.book[_PROTECTED_SIZE] += which == _PROTECTED


@lean
def _leave(state: State, slot: int) -> None:
    """Take a slot out of its list."""
    unlink(state.links, slot)
    state.book[_WINDOW_SIZE] -= state.list_of[slot] == _WINDOW
    state.book[_PROTECTED_SIZE] -= state.list_of[slot] == _PROTECTED


@lean
def count(state: State, key: int) -> None:
    """Add one to the counters of a key, up to 15, and let the sketch age."""
    bits = mix(key)
    line = (bits * state.sketch.shape[0]) >> 32
    bits = mix(key + 1)
    for group in range(0, 64, 16):
        byte = group + (bits & 15)
        pair = int64(state.sketch[line, byte])
        shift = (bits & 16) >> 2
        if (pair >> shift) & 15 < 15:
            state.sketch[line, byte] = pair + (1 << shift)
        bits >>= 5
    state.book[_CREDIT] -= 1
    if state.book[_CREDIT] == 0:
        _age(state)


@lean
def estimate(state: State, key: int) -> int:
    """How often a key was counted lately, at most 15; 0 for EMPTY."""
    if key < 0:
        return int64(0)
    bits = mix(key)
    line = (bits * state.sketch.shape[0]) >> 32
    bits = mix(key + 1)
    fewest = int64(15)
    for group in range(0, 64, 16):
        pair = int64(state.sketch[line, group + (bits & 15)])
        fewest = min(fewest, (pair >> ((bits & 16) >> 2)) & 15)
        bits >>= 5
    return fewest


@lean
def _age(state: State) -> None:
    """Halve the line under the hand."""
    hand = state.book[_HAND]
    for byte in range(64):
        state.sketch[hand, byte] = (int64(state.sketch[hand, byte]) >> 1) & 0x77
    state.book[_HAND] = hand + 1 if hand + 1 < state.sketch.shape[0] else 0
    state.book[_CREDIT] = state.book[_INTERVAL]


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """Each slot handed out is in the list that it names, and no list is over its share."""
    book = [int(value) for value in state.book]
    lists = [members(state.links, keys.size + which) for which in (_WINDOW, _PROBATION, _PROTECTED)]
    for which, slots in enumerate(lists):
        assert (state.list_of[slots] == which).all(), f"a slot of list {which} names another"
    assert sorted(itertools.chain(*lists)) == list(range(book[_USED])), "the lists are not the slots handed out"
    assert len(lists[_WINDOW]) == book[_WINDOW_SIZE] <= book[_WINDOW_SHARE], "the window is miscounted or too long"
    assert len(lists[_PROTECTED]) == book[_PROTECTED_SIZE] <= book[_PROTECTED_SHARE], "protected is miscounted"
    assert (keys[book[_USED] :] == EMPTY).all(), "a slot holds a key before it was handed out"
    assert 0 <= book[_HAND] < state.sketch.shape[0], "the hand is outside the sketch"
    assert 0 < book[_CREDIT] <= book[_INTERVAL], "the next halving is out of range"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("wtinylfu", init, check)
