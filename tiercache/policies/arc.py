"""ARC: two LRU lists, of keys used once and of keys used more often, whose sizes follow the ghosts of both.

A new key enters the first list, a hit moves its slot to the newest end of the second. What leaves either list is
remembered, as a key only, in that list's ghost. A miss that is found in the first ghost says that the first list is too
short, one in the second ghost that it is too long: the target moves, by the other ghost's length over this one's but at
least 1, and the key enters the second list. The first list and its ghost never exceed the capacity, all four lists
never twice the capacity.

A pinned slot that comes up for eviction goes to the newest end of its list; a list that has nothing to give leaves the
choice to the other one.

Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. libCacheSim keeps the target as a
float, this one in units of 2**-32 slots, so the two may part where the sum of many fractions lands on a whole number.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies import keyset
from tiercache.policies.base import EMPTY, MAX_PINNED_VICTIMS, Policy, bind
from tiercache.policies.keyset import ABSENT, KeySet
from tiercache.policies.links import NEWER, members, new_rings, oldest_unpinned, push, renew, unlink

_ONCE, _OFTEN = 0, 1
_SIZE, _NUM_GHOSTS, _USED, _TARGET = 0, 2, 4, 5


class State(NamedTuple):
    """The lists and their ghosts; list 0 is of keys used once, list 1 of the others.

    links       int32[capacity + 2, 2]  rings of slots
    list_of     uint8[capacity]         list of each slot
    ghosts      KeySet                  keys remembered, at most `capacity`
    ghost_links int32[capacity + 2, 2]  rings of ghosts
    ghost_list  uint8[capacity]         list that each ghost left
    book        int64[6]                size of either list, of either ghost; slots handed out; target of list 0, << 32
    """

    links: npt.NDArray[np.int32]
    list_of: npt.NDArray[np.uint8]
    ghosts: KeySet
    ghost_links: npt.NDArray[np.int32]
    ghost_list: npt.NDArray[np.uint8]
    book: npt.NDArray[np.int64]


def init(capacity: int) -> State:
    """State of `capacity` slots, 34 bytes a slot."""
    return State(
        new_rings(capacity, 2),
        np.zeros(capacity, np.uint8),
        keyset.new_keyset(capacity),
        new_rings(capacity, 2),
        np.zeros(capacity, np.uint8),
        np.zeros(6, np.int64),
    )


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Make the slot the newest of the second list."""
    if state.list_of[slot] == _OFTEN:
        renew(state.links, keys.size + _OFTEN, slot)
        return
    unlink(state.links, slot)
    state.book[_SIZE + _ONCE] -= 1
    _enter(state, keys.size, _OFTEN, slot)


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The slot that REPLACE of the paper gives up."""
    capacity = keys.size
    slot = int64(state.book[_USED])
    if slot < capacity:
        state.book[_USED] += 1
        _enter(state, capacity, _ONCE, slot)
        return slot
    ghost = keyset.find(state.ghosts, key)
    if ghost == ABSENT:
        return _replace_for_new(state, keys, pins)
    left = state.ghost_list[ghost]
    _adapt(state, capacity, left)
    slot = _victim(state, capacity, pins, left == _OFTEN)
    if slot >= 0:
        _forget(state, ghost)
        _leave(state, keys, slot, True)
        _enter(state, capacity, _OFTEN, slot)
    return slot


@lean
def _replace_for_new(state: State, keys: Any, pins: Any) -> int:
    """Make room for a key that no ghost remembers, within the bounds of the lists."""
    book, capacity = state.book, keys.size
    if book[_SIZE + _ONCE] == capacity:
        slot, _ = oldest_unpinned(state.links, capacity + _ONCE, pins, MAX_PINNED_VICTIMS)
    else:
        slot = _victim(state, capacity, pins, False)
    if slot < 0:
        return slot
    if book[_SIZE + _ONCE] == capacity:
        _leave(state, keys, slot, False)
    else:
        if book[_SIZE + _ONCE] + book[_NUM_GHOSTS + _ONCE] == capacity:
            _forget(state, int64(state.ghost_links[capacity + _ONCE, NEWER]))
        elif book[_NUM_GHOSTS + _ONCE] + book[_NUM_GHOSTS + _OFTEN] == capacity:
            _forget(state, int64(state.ghost_links[capacity + _OFTEN, NEWER]))
        _leave(state, keys, slot, True)
    _enter(state, capacity, _ONCE, slot)
    return slot


@lean
def _adapt(state: State, capacity: int, left: int) -> None:
    """Move the target towards the list whose ghost was hit."""
    once, often = state.book[_NUM_GHOSTS + _ONCE], state.book[_NUM_GHOSTS + _OFTEN]
    if left == _ONCE:
        state.book[_TARGET] = min(state.book[_TARGET] + _step(often, once), capacity << 32)
    else:
        state.book[_TARGET] = max(state.book[_TARGET] - _step(once, often), 0)


@lean
def _step(other: int, hit: int) -> int:
    """Ratio of two sizes, at least 1, rounded to a multiple of 2**-32, << 32."""
    return max(((other << 32) + (hit >> 1)) // hit, 1 << 32)


@lean
def _victim(state: State, capacity: int, pins: Any, often_wanted: bool) -> int:
    """The oldest unpinned slot of the list that is over its target, else of the other; or BYPASS."""
    size, target = state.book[_SIZE + _ONCE] << 32, state.book[_TARGET]
    first = _ONCE if size > 0 and (size > target or (size == target and often_wanted)) else _OFTEN
    slot, patience = oldest_unpinned(state.links, capacity + first, pins, MAX_PINNED_VICTIMS)
    if slot < 0:
        slot, _ = oldest_unpinned(state.links, capacity + 1 - first, pins, patience)
    return slot


@lean
def _enter(state: State, capacity: int, which: int, slot: int) -> None:
    """Make a slot that is in no list the newest of one."""
    push(state.links, capacity + which, slot)
    state.list_of[slot] = which
    state.book[_SIZE + which] += 1


@lean
def _leave(state: State, keys: Any, slot: int, remember: bool) -> None:
    """Take a slot out of its list, and make its key a ghost."""
    which = int64(state.list_of[slot])
    unlink(state.links, slot)
    state.book[_SIZE + which] -= 1
    if remember and keys[slot] != EMPTY:
        ghost = keyset.add(state.ghosts, keys[slot])
        push(state.ghost_links, keys.size + which, ghost)
        state.ghost_list[ghost] = which
        state.book[_NUM_GHOSTS + which] += 1


@lean
def _forget(state: State, ghost: int) -> None:
    """Drop a ghost."""
    unlink(state.ghost_links, ghost)
    keyset.remove(state.ghosts, ghost)
    state.book[_NUM_GHOSTS + int64(state.ghost_list[ghost])] -= 1


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """Each slot handed out is in the list that it names; the bounds of the paper hold; no ghost is resident."""
    capacity, book = keys.size, [int(value) for value in state.book]
    slots, ghosts = [], []
    for which in (_ONCE, _OFTEN):
        listed = members(state.links, capacity + which)
        remembered = members(state.ghost_links, capacity + which)
        assert len(listed) == book[_SIZE + which], f"list {which} is miscounted"
        assert len(remembered) == book[_NUM_GHOSTS + which], f"ghost {which} is miscounted"
        assert (state.list_of[listed] == which).all(), f"a slot of list {which} names the other"
        assert (state.ghost_list[remembered] == which).all(), f"a ghost of list {which} names the other"
        slots += listed
        ghosts += remembered
    assert sorted(slots) == list(range(book[_USED])), "the lists are not the slots handed out"
    assert (keys[book[_USED] :] == EMPTY).all(), "a slot holds a key before it was handed out"
    assert book[_SIZE + _ONCE] + book[_NUM_GHOSTS + _ONCE] <= capacity, "the first list and its ghost are too long"
    assert len(ghosts) <= capacity, "the ghosts are too many"
    assert 0 <= book[_TARGET] <= capacity << 32, "the target is out of range"
    keyset.check(state.ghosts, ghosts)
    assert not np.isin(state.ghosts.keys[ghosts], keys).any(), "a ghost is resident"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("arc", init, check)
