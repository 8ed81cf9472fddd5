"""S3-FIFO: a small queue on trial, a main queue with second chances, and a ghost queue of what failed the trial.

A new key enters the small queue. At its end, a key that was hit `threshold` times moves to the main queue; the others
leave and are remembered, as keys only, in the ghost. A miss whose key is in the ghost enters the main queue at once. At
the end of the main queue, a key with hits left goes round again with one less. Small loses one unless it is empty or
main is over its share. So what is seen once passes through quickly, and what returns after some time is found again by
the ghost: both recency and frequency, and hits cost one saturating counter.

While the tier fills for the first time, the small queue takes only its share and the rest goes to main.

A pinned slot that comes up for eviction goes to the back of its queue. A key that is kept out because everything in
reach is pinned is remembered in the ghost, as though it had passed through the small queue.

Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023. With `small=0.10, ghost=0.90, threshold=2`
exactly libCacheSim's S3FIFO from 20 slots on (below, its small queue is of one slot or none and admits nothing).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies import keyset
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS, Policy, bind
from tiercache.policies.keyset import ABSENT, KeySet
from tiercache.policies.links import NEWER, members, new_rings, push, unlink

_MOST_USES = 3
_KEYS = 2**31
_SMALL, _MAIN = 0, 1
_SIZE, _NEWEST, _SHARE = 0, 2, 4
_USED, _NUM_GHOSTS, _MOST_GHOSTS, _THRESHOLD = 6, 7, 8, 9


class State(NamedTuple):
    """Two queues in one array, and the ghost.

    newer       int32[capacity + 2]  the slot that entered the same queue next; element `capacity + queue` is its anchor
    marks       uint8[capacity]      hits since it entered its queue or last went round, at most 3
    ghosts      KeySet               keys remembered
    ghost_links int32[ghosts + 1, 2] their order
    book        int64[10]            size, newest slot, share of either queue; slots handed out; ghosts; most ghosts;
                                     threshold
    """

    newer: npt.NDArray[np.int32]
    marks: npt.NDArray[np.uint8]
    ghosts: KeySet
    ghost_links: npt.NDArray[np.int32]
    book: npt.NDArray[np.int64]


def init(capacity: int, *, small: float = 0.25, ghost: float = 0.75, threshold: int = 1) -> State:
    """State of `capacity` slots: 5 bytes a slot and 24 a ghost.

    small      share of the slots in the small queue, above 0 and below 1
    ghost      keys remembered per slot, 0 or more, and less than 2**31 in all
    threshold  hits that move a key from small to main, 1 to 3
    """
    if not 0 < small < 1:
        raise ValueError(f"small is {small}, must be a share above 0 and below 1")
    if not 0 <= ghost * capacity < _KEYS:
        raise ValueError(f"ghost is {ghost}, must be 0 or more, and below 2**31 keys for {capacity} slots")
    if threshold not in range(1, _MOST_USES + 1):
        raise ValueError(f"threshold is {threshold}, must be 1, 2 or 3")
    share = max(1, int(capacity * small))
    most_ghosts = int(capacity * ghost)
    newer = np.zeros(capacity + 2, np.int32)
    newer[capacity:] = capacity, capacity + 1
    return State(
        newer,
        np.zeros(capacity, np.uint8),
        keyset.new_keyset(most_ghosts),
        new_rings(most_ghosts, 1),
        np.array([0, 0, capacity, capacity + 1, share, capacity - share, 0, 0, most_ghosts, threshold], np.int64),
    )


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Count the hit."""
    uses = state.marks[slot]
    state.marks[slot] = uses + (uses < _MOST_USES)


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """A slot from the end of one of the queues."""
    book = state.book
    slot = int64(book[_USED])
    if slot < keys.size:
        book[_USED] += 1
        _push(state, keys.size, _SMALL if book[_SIZE + _SMALL] < book[_SHARE + _SMALL] else _MAIN, slot)
        return slot
    ghost = keyset.find(state.ghosts, key)
    slot, queue = _evict(state, keys.size, pins)
    if slot < 0:
        if ghost == ABSENT:
            _remember(state, key)
        return slot
    if ghost != ABSENT:
        _forget(state, ghost)
    if queue == _SMALL and keys[slot] != EMPTY:
        _remember(state, keys[slot])
    _push(state, keys.size, _SMALL if ghost == ABSENT else _MAIN, slot)
    return slot


@lean
def _evict(state: State, capacity: int, pins: Any) -> tuple[int, int]:
    """Take a victim out of its queue: the slot and the queue, or BYPASS where too many are pinned."""
    book = state.book
    patience = MAX_PINNED_VICTIMS
    if book[_SIZE + _MAIN] <= book[_SHARE + _MAIN]:
        while book[_SIZE + _SMALL] > 0:
            slot = _pop(state, capacity, _SMALL)
            if state.marks[slot] >= book[_THRESHOLD]:
                _push(state, capacity, _MAIN, slot)
            elif pins[slot] <= 0:
                return slot, _SMALL
            else:
                _rotate(state, capacity, _SMALL, slot)
                patience -= 1
                if patience < 0:
                    return int64(BYPASS), _SMALL
    while True:
        slot = _pop(state, capacity, _MAIN)
        if state.marks[slot] == 0 and pins[slot] <= 0:
            return slot, _MAIN
        if state.marks[slot] == 0:
            patience -= 1
        else:
            state.marks[slot] -= np.uint8(1)
        _rotate(state, capacity, _MAIN, slot)
        if patience < 0:
            return int64(BYPASS), _MAIN


@lean
def _pop(state: State, capacity: int, queue: int) -> int:
    """Take the oldest slot out of a queue that has one."""
    anchor = capacity + queue
    slot = int64(state.newer[anchor])
    following = state.newer[slot]
    state.newer[anchor] = following
    if following == anchor:
        state.book[_NEWEST + queue] = anchor
    state.book[_SIZE + queue] -= 1
    return slot


@lean
def _rotate(state: State, capacity: int, queue: int, slot: int) -> None:
    """Put a slot at the newest end of a queue."""
    state.newer[state.book[_NEWEST + queue]] = slot
    state.newer[slot] = capacity + queue
    state.book[_NEWEST + queue] = slot
    state.book[_SIZE + queue] += 1


@lean
def _push(state: State, capacity: int, queue: int, slot: int) -> None:
    """Put a slot at the newest end of a queue, without hits."""
    state.marks[slot] = 0
    _rotate(state, capacity, queue, slot)


@lean
def _remember(state: State, key: int) -> None:
    """Make a key the newest ghost; the oldest leaves where there is no room."""
    if state.book[_MOST_GHOSTS] == 0:
        return
    anchor = state.book[_MOST_GHOSTS]
    if state.book[_NUM_GHOSTS] == state.book[_MOST_GHOSTS]:
        _forget(state, int64(state.ghost_links[anchor, NEWER]))
    push(state.ghost_links, anchor, keyset.add(state.ghosts, key))
    state.book[_NUM_GHOSTS] += 1


@lean
def _forget(state: State, ghost: int) -> None:
    """Drop a ghost."""
    unlink(state.ghost_links, ghost)
    keyset.remove(state.ghosts, ghost)
    state.book[_NUM_GHOSTS] -= 1


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """Each slot handed out is in one queue; sizes are right; no ghost is resident."""
    book = [int(value) for value in state.book]
    used = book[_USED]
    found: list[int] = []
    for queue in (_SMALL, _MAIN):
        slots, slot = [keys.size + queue], int(state.newer[keys.size + queue])
        while slot != keys.size + queue and len(slots) <= keys.size:
            slots.append(slot)
            slot = int(state.newer[slot])
        assert slots[-1] == book[_NEWEST + queue], f"the newest is not the end of queue {queue}"
        assert len(slots) - 1 == book[_SIZE + queue], f"queue {queue} is miscounted"
        found += slots[1:]
    assert sorted(found) == list(range(used)), "the queues are not the slots handed out"
    assert (keys[used:] == EMPTY).all(), "a slot holds a key before it was handed out"
    assert not state.marks.size or state.marks.max() <= _MOST_USES, "a counter is beyond its limit"
    ghosts = members(state.ghost_links, book[_MOST_GHOSTS])
    assert len(ghosts) == book[_NUM_GHOSTS] <= book[_MOST_GHOSTS], "the ghosts are miscounted"
    keyset.check(state.ghosts, ghosts)
    assert not np.isin(state.ghosts.keys[ghosts], keys).any(), "a ghost is resident"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("s3fifo", init, check)
