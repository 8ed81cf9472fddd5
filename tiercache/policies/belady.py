"""Belady: the key whose next use is farthest away leaves first. Needs the future, so it is the bound, not a policy.

The state is told all batches to come. Each distinct key of a batch is reported once, so the n-th report of a key is its n-th
batch, and a cursor a key finds the next one. A heap over the slots has the farthest on top. Every miss is admitted, as a
demand-filled tier must, even where the new key itself is the one used last.

A key that the future does not know, or knows no more of, counts as never used again. A pinned slot on top of the heap is
set aside while the next one is looked at.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import lean
from tiercache.policies import keyset
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS, Policy, bind
from tiercache.policies.keyset import ABSENT, KeySet



class State(NamedTuple):
    """The future, and a heap of slots by next use.

    rows   KeySet           every row of the future
    uses   int64[u]         batches that use each row, row by row, ascending
    end    int64[r]         where the batches of each row end in `uses`
    cursor int64[r]         the next use of each row in `uses`
    heap   int32[capacity]  slots; the one used farthest away first
    place  int32[capacity]  where each slot is in the heap
    due    int64[capacity]  batch of each slot's next use
    entry  int32[capacity]  row of each slot, as its number in `rows`
    aside  int32[64]        scratch: pinned slots set aside during a search
    book   int64[2]         slots in the heap; number of batches, which stands for never
    """

    rows: KeySet
    uses: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    cursor: npt.NDArray[np.int64]
    heap: npt.NDArray[np.int32]
    place: npt.NDArray[np.int32]
    due: npt.NDArray[np.int64]
    entry: npt.NDArray[np.int32]
    aside: npt.NDArray[np.int32]
    book: npt.NDArray[np.int64]


_SIZE, _NEVER = 0, 1


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
        np.zeros(MAX_PINNED_VICTIMS, np.int32),
        np.array([0, num_batches], np.int64),
    )


@lean
def _add_all(entries: KeySet, rows: Any) -> None:
    """Add distinct rows; entry i is rows[i]."""
    for i in range(rows.size):
        keyset.add(entries, rows[i])


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Put the slot where its next use belongs, which is nearer to the top."""
    state.due[slot] = _next_use(state, np.int64(state.entry[slot]))
    _rise(state, np.int64(state.place[slot]))


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The unpinned slot that is used again farthest away."""
    entry = keyset.find(state.rows, key)
    due = _next_use(state, entry)
    slot = state.book[_SIZE]
    if slot == keys.size:
        slot = _pop_unpinned(state, pins)
        if slot < 0:
            return slot
    state.entry[slot] = entry
    state.due[slot] = due
    _insert(state, slot)
    return slot


@lean
def _next_use(state: State, entry: int) -> int:
    """Go past the use that is reported now; batch of the one after it."""
    if entry == ABSENT:
        return state.book[_NEVER]
    if state.cursor[entry] < state.end[entry]:
        state.cursor[entry] += 1
    if state.cursor[entry] < state.end[entry]:
        return state.uses[state.cursor[entry]]
    return state.book[_NEVER]


@lean
def _pop_unpinned(state: State, pins: Any) -> int:
    """Take the topmost unpinned slot out of the heap, or BYPASS."""
    slot = _pop(state)
    if pins[slot] <= 0:
        return slot
    num_aside = 0
    while slot >= 0 and pins[slot] > 0 and num_aside < state.aside.size:
        state.aside[num_aside] = slot
        num_aside += 1
        slot = _pop(state) if state.book[_SIZE] > 0 else np.int64(BYPASS)
    if slot >= 0 and pins[slot] > 0:
        _insert(state, slot)
        slot = np.int64(BYPASS)
    for i in range(num_aside):
        _insert(state, np.int64(state.aside[i]))
    return slot


@lean
def _insert(state: State, slot: int) -> None:
    """Add a slot to the heap."""
    at = state.book[_SIZE]
    state.book[_SIZE] += 1
    state.heap[at] = slot
    state.place[slot] = at
    _rise(state, at)


@lean
def _pop(state: State) -> int:
    """Take the top out of the heap."""
    top = np.int64(state.heap[0])
    state.book[_SIZE] -= 1
    size = state.book[_SIZE]
    if size > 0:
        state.heap[0] = state.heap[size]
        state.place[state.heap[0]] = 0
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
    size = int(state.book[_SIZE])
    heap = state.heap[:size]
    assert sorted(heap.tolist()) == list(range(size)), "the heap is not the slots handed out"
    assert (state.place[heap] == np.arange(size)).all(), "a slot is elsewhere in the heap than it says"
    due = state.due[heap]
    assert (due[(np.arange(1, size) - 1) >> 1] >= due[1:]).all(), "a slot is due later than its parent"
    assert (keys[size:] == EMPTY).all(), "a slot holds a key before it was handed out"
    known = np.flatnonzero((keys[:size] != EMPTY) & (state.entry[:size] != ABSENT))
    assert (state.rows.keys[state.entry[known]] == keys[known]).all(), "a slot's row is not its key"
    assert (state.cursor <= state.end).all(), "a cursor is past the end"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("belady", init, check)
