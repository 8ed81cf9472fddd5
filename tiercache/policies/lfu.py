"""LFU: the key with the fewest uses since it entered leaves first; among equals, the one that reached that count first.

Slots of the same count share a ring, and the rings are themselves in a ring by count, so that both a hit (to the next
ring) and an eviction (the oldest of the first ring) touch a constant number of links. The ring of count 1 is always
there; every other one exists while it has members. Counts start again when a key returns.

A pinned slot that comes up for eviction goes to the back of its ring; when a whole ring is pinned, the next one is
asked.

Matani, Shah, Mitra, "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010. Exactly libCacheSim's LFU
as long as no more than MAX_RINGS different counts are alive; beyond that, a slot that finds no ring free keeps its
count.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS, Policy, bind
from tiercache.policies.links import NEWER, members, new_rings, oldest_unpinned, push, unlink

MAX_RINGS = 65_536
"""Most different counts at the same time; reaching it takes more than two thousand million hits."""

_ONCE = 0
_USED, _FREE = 0, 1


class State(NamedTuple):
    """The rings of slots, and the ring of rings.

    links int32[capacity + r, 2]  ring `i` of slots has the anchor `capacity + i`
    ring  int32[capacity]         ring of each slot
    order int32[r, 2]             rings by count; ring 0, of count 1, is the anchor. Of a free one: next free, -1
    uses  int64[r]                uses of the members of each ring
    book  int64[2]                slots handed out so far; first free ring, or 0
    """

    links: npt.NDArray[np.int32]
    ring: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    uses: npt.NDArray[np.int64]
    book: npt.NDArray[np.int64]


def init(capacity: int) -> State:
    """State of `capacity` slots, 12 bytes a slot."""
    num_rings = min(capacity, MAX_RINGS) + 1
    order = np.zeros((num_rings, 2), np.int32)
    order[1:, 0] = np.arange(2, num_rings + 1) % num_rings
    order[1:, 1] = -1
    return State(
        new_rings(capacity, num_rings),
        np.zeros(capacity, np.int32),
        order,
        np.ones(num_rings, np.int64),
        np.array([0, 1 % num_rings], np.int64),
    )


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Move the slot to the ring of the next count."""
    anchors = keys.size
    old = int64(state.ring[slot])
    count = state.uses[old] + 1
    new = int64(state.order[old, NEWER])
    if state.uses[new] != count:
        if old != _ONCE and state.links[anchors + old, 0] == state.links[anchors + old, 1]:
            state.uses[old] = count
            return
        new = _open(state, old, count)
    unlink(state.links, slot)
    push(state.links, anchors + new, slot)
    state.ring[slot] = new
    _close_if_empty(state, anchors, old)


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The slot with the lowest count that has no pin."""
    slot = int64(state.book[_USED])
    if slot < keys.size:
        state.book[_USED] += 1
    else:
        slot = _victim(state, keys.size, pins)
        if slot < 0:
            return slot
        unlink(state.links, slot)
        _close_if_empty(state, keys.size, int64(state.ring[slot]))
    push(state.links, keys.size + _ONCE, slot)
    state.ring[slot] = _ONCE
    return slot


@lean
def _victim(state: State, anchors: int, pins: Any) -> int:
    """The oldest unpinned member of the first ring that has one, or BYPASS."""
    ring, patience = int64(_ONCE), int64(MAX_PINNED_VICTIMS)
    while patience >= 0:
        slot, patience = oldest_unpinned(state.links, anchors + ring, pins, patience)
        if slot >= 0:
            return slot
        ring = int64(state.order[ring, NEWER])
        if ring == _ONCE:
            break
    return int64(BYPASS)


@lean
def _open(state: State, after: int, count: int) -> int:
    """A ring for `count` behind the ring `after`; `after` itself where none is free."""
    ring = int64(state.book[_FREE])
    if ring == 0:
        return after
    state.book[_FREE] = state.order[ring, 0]
    following = state.order[after, NEWER]
    state.order[ring, 0] = after
    state.order[ring, 1] = following
    state.order[after, 1] = ring
    state.order[following, 0] = ring
    state.uses[ring] = count
    return ring


@lean
def _close_if_empty(state: State, anchors: int, ring: int) -> None:
    """Free a ring without members, unless it is that of count 1."""
    if ring != _ONCE and state.links[anchors + ring, NEWER] == anchors + ring:
        unlink(state.order, ring)
        state.order[ring, 0] = state.book[_FREE]
        state.order[ring, 1] = -1
        state.book[_FREE] = ring


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """Each slot handed out is in the ring that it names; rings ascend; none but the first is empty."""
    used = int(state.book[_USED])
    rings = [_ONCE, *members(state.order, _ONCE)]
    counts = state.uses[rings]
    assert counts[0] == 1, "the first ring is that of count 1"
    assert (np.diff(counts) > 0).all(), "the rings do not ascend"
    found: list[int] = []
    for ring in rings:
        slots = members(state.links, keys.size + ring)
        assert slots or ring == _ONCE, f"ring {ring} is open and empty"
        assert (state.ring[slots] == ring).all(), f"a member of ring {ring} names another"
        found += slots
    assert sorted(found) == list(range(used)), "the rings are not the slots handed out"
    assert (keys[used:] == EMPTY).all(), "a slot holds a key before it was handed out"
    assert (state.order[:, 1] == -1).sum() + len(rings) == state.uses.size, "a ring is neither open nor free"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("lfu", init, check)
