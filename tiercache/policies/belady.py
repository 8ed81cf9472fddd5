"""Belady: the key whose next use is farthest away leaves first. Needs the future, so it is the bound, not a policy.

The state is told all batches to come. Each distinct key of a batch is reported once, so the n-th report of a key is its
n-th batch, and a cursor a key finds the next one. A heap over the slots has the farthest on top. Every miss is
admitted, as a demand-filled tier must, even where the new key itself is the one used last.

A key that the future does not know, or knows no more of, counts as never used again. A pinned slot that comes to the
top is set aside until the next batch, when the pins of this one are gone; there is no limit to how many, for without
one the keys of a large batch that are never used again would hide every other victim.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies import keyset
from tiercache.policies.base import BYPASS, EMPTY, Policy, bind
from tiercache.policies.keyset import ABSENT, KeySet


class State(NamedTuple):
    """The future, and a heap of slots by next use.

    rows   KeySet           every row of the future
    uses   int64[u]         batches that use each row, row by row, ascending
    end    int64[r]         where the batches of each row end in `uses`
    cursor int64[r]         the next use of each row in `uses`
    heap   int32[capacity]  slots handed out: first the heap, the one used farthest away on top, then those set aside
    place  int32[capacity]  where each slot is in the heap
    due    int64[capacity]  batch of each slot's next use
    entry  int32[capacity]  row of each slot, as its number in `rows`
    book   int64[4]         slots in the heap; slots handed out; number of batches, which stands for never; batch now
    """

    rows: KeySet
    uses: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    cursor: npt.NDArray[np.int64]
    heap: npt.NDArray[np.int32]
    place: npt.NDArray[np.int32]
    due: npt.NDArray[np.int64]
    entry: npt.NDArray[np.int32]
    book: npt.NDArray[np.int64]


_SIZE, _USED, _NEVER, _NOW = 0, 1, 2, 3


def init(capacity: int, *, future: tuple[npt.ArrayLike, npt.ArrayLike]) -> State:
    """State of `capacity` slots: 20 bytes a slot, and 32 a distinct row and 8 an access of the future.

    future  (rows int64[n], offsets int64[b + 1]): batch i is rows[offsets[i] : offsets[i + 1]], duplicates welcome
    """
    rows, offsets = (np.asarray(part, np.int64) for part in future)
    num_batches = offsets.size - 1
    batch = np.repeat(np.arange(num_batches), np.diff(offsets))
    order = np.argsort(rows, kind="stable")
    rows, batch = rows[order], batch[order]
    new_row = np.diff(rows, prepend=-1) != 0
    kept = new_row | (np.diff(batch, prepend=-1) != 0)
    rows, uses = rows[kept], batch[kept]
    starts = np.flatnonzero(new_row[kept])
    entries = keyset.new_keyset(starts.size)
    _add_all(entries, rows[starts])
    return State(
        entries,
        uses,
        np.append(starts[1:], uses.size),
        starts,
        np.zeros(capacity, np.int32),
        np.zeros(capacity, np.int32),
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.int32),
        np.array([0, 0, num_batches, 0], np.int64),
    )


@lean
def _add_all(entries: KeySet, rows: Any) -> None:
    """Add distinct rows; entry i is rows[i]."""
    for i in range(rows.size):
        keyset.add(entries, rows[i])


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Put the slot where its next use belongs, which is nearer to the top."""
    state.due[slot] = _next_use(state, int64(state.entry[slot]))
    at = int64(state.place[slot])
    if at < state.book[_SIZE]:
        _rise(state, at)


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The unpinned slot that is used again farthest away."""
    entry = keyset.find(state.rows, key)
    due = _next_use(state, entry)
    slot = int64(state.book[_USED])
    if slot < keys.size:
        state.heap[slot] = slot
        state.place[slot] = slot
        state.book[_USED] += 1
    else:
        slot = int64(BYPASS)
        while slot < 0 and state.book[_SIZE] > 0:
            slot = _pop(state)
            if pins[slot] > 0:
                slot = int64(BYPASS)
        if slot < 0:
            return slot
    state.entry[slot] = entry
    state.due[slot] = due
    _join(state, slot)
    return slot


@lean
def _next_use(state: State, entry: int) -> int:
    """Go past the use that is reported now; batch of the one after it. In a new batch nothing is aside any more."""
    now = due = int64(state.book[_NEVER])
    if entry != ABSENT and state.cursor[entry] < state.end[entry]:
        now = int64(state.uses[state.cursor[entry]])
        state.cursor[entry] += 1
        if state.cursor[entry] < state.end[entry]:
            due = int64(state.uses[state.cursor[entry]])
    if now != state.book[_NOW] or now == state.book[_NEVER]:
        state.book[_NOW] = now
        while state.book[_SIZE] < state.book[_USED]:
            _join(state, int64(state.heap[state.book[_SIZE]]))
    return due


@lean
def _join(state: State, slot: int) -> None:
    """Let a slot that is aside into the heap."""
    size, at = state.book[_SIZE], state.place[slot]
    other = state.heap[size]
    state.heap[at] = other
    state.place[other] = at
    state.heap[size] = slot
    state.place[slot] = size
    state.book[_SIZE] += 1
    _rise(state, size)


@lean
def _pop(state: State) -> int:
    """Set the top of the heap aside, as the first of those."""
    top = int64(state.heap[0])
    state.book[_SIZE] -= 1
    size = state.book[_SIZE]
    last = state.heap[size]
    state.heap[size] = top
    state.place[top] = size
    if size > 0:
        state.heap[0] = last
        state.place[last] = 0
        _sink(state, size)
    return top


@lean
def _rise(state: State, at: int) -> None:
    """Let the slot at a place of the heap go up until its parent is due later."""
    slot = state.heap[at]
    due = state.due[slot]
    while at > 0:
        parent = (at - 1) >> 1
        above = state.heap[parent]
        if state.due[above] >= due:
            break
        state.heap[at] = above
        state.place[above] = at
        at = parent
    state.heap[at] = slot
    state.place[slot] = at


@lean
def _sink(state: State, size: int) -> None:
    """Let the slot at the top go down until its children are due earlier."""
    slot = state.heap[0]
    due = state.due[slot]
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and state.due[state.heap[child + 1]] > state.due[state.heap[child]]:
            child += 1
        below = state.heap[child]
        if state.due[below] <= due:
            break
        state.heap[at] = below
        state.place[below] = at
        at = child
    state.heap[at] = slot
    state.place[slot] = at


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """The heap holds the slots handed out, in order, and each slot's row and next use are right."""
    size, used = int(state.book[_SIZE]), int(state.book[_USED])
    assert sorted(state.heap[:used].tolist()) == list(range(used)), "the heap is not the slots handed out"
    assert (state.place[state.heap[:used]] == np.arange(used)).all(), "a slot is elsewhere in the heap than it says"
    heap = state.heap[:size]
    due = state.due[heap]
    assert (due[(np.arange(1, size) - 1) >> 1] >= due[1:]).all(), "a slot is due later than its parent"
    assert (keys[used:] == EMPTY).all(), "a slot holds a key before it was handed out"
    known = np.flatnonzero((keys[:used] != EMPTY) & (state.entry[:used] != ABSENT))
    assert (state.rows.keys[state.entry[known]] == keys[known]).all(), "a slot's row is not its key"
    assert (state.cursor <= state.end).all(), "a cursor is past the end"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("belady", init, check)
