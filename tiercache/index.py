"""The residency index: row -> slot. A direct map where that is no larger, else open addressing.

The direct map is int32[num_rows], slot + 1 of each row or 0. It is chosen where a tier has slots for a quarter of the rows
or more, since it then takes no more memory than the hash table, and one line a probe without any hashing.

The hash table is int64[num_entries], at most half full. An entry is `tag << 32 | slot + 1`, or 0 where free; the tag is a
32-bit hash of the row, and `_home(tag)` is where its search begins, so an entry can be moved without looking at its row. A
tag that matches is a candidate: the caller compares the row itself, `keys[slot]`, which it is about to touch anyway. Linear
probing; removal shifts the rest of the run back, so there are no tombstones and the table never needs rebuilding.

The functions take either table: compiled code knows which by its type.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean

_LOW = 0xFFFFFFFF
_HASHED_ENTRIES = 2
"""Entries of the hash table, per slot."""


def new_table(capacity: int, num_rows: int | None = None) -> npt.NDArray[Any]:
    """An empty index for `capacity` slots, and for rows below `num_rows` where that is known.

    Its memory is written, so that no probe waits for a new page.
    """
    table: npt.NDArray[Any]
    if num_rows is not None and 4 * num_rows <= 8 * _HASHED_ENTRIES * capacity:
        table = np.empty(num_rows, np.int32)
    else:
        table = np.empty(max(_HASHED_ENTRIES * capacity, 8), np.int64)
    table.fill(0)
    return table


@lean
def tag_of(row: int) -> int:
    """32-bit hash of a row, a bijection for rows below 2**32 (two multiply-xorshift rounds)."""
    x = (row ^ (row >> 32)) & _LOW
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
    return x ^ (x >> 15)


@lean
def _home(tag: int, num_entries: int) -> int:
    """Where the search for a tag begins: the tag scaled to the table's length."""
    return ((tag >> 1) * num_entries) >> 31


@lean
def address(table: Any, row: int) -> int:
    """Where the search for a row begins in memory: what to ask for ahead of it."""
    if table.itemsize == 4:
        return table.ctypes.data + 4 * row
    return table.ctypes.data + 8 * _home(tag_of(row), table.size)


@lean
def candidate(table: Any, row: int) -> int:
    """The slot that may hold `row`, to be compared with the slot's own row; -1 where none does."""
    if table.itemsize == 4:
        return int64(table[row]) - 1
    tag = tag_of(row)
    at = _home(tag, table.size)
    entry = int64(table[at])
    while entry != 0 and (entry >> 32) & _LOW != tag:
        at += 1
        if at == table.size:
            at = 0
        entry = int64(table[at])
    return (entry & _LOW) - 1


@lean
def find(table: Any, keys: Any, row: int) -> int:
    """The slot that holds `row`, or -1."""
    if table.itemsize == 4:
        return int64(table[row]) - 1
    tag = tag_of(row)
    at = _home(tag, table.size)
    entry = int64(table[at])
    while entry != 0:
        if (entry >> 32) & _LOW == tag:
            slot = (entry & _LOW) - 1
            if keys[slot] == row:
                return slot
        at += 1
        if at == table.size:
            at = 0
        entry = int64(table[at])
    return int64(-1)


@lean
def insert(table: Any, row: int, slot: int) -> None:
    """Add a row that is absent."""
    if table.itemsize == 4:
        table[row] = slot + 1
        return
    tag = tag_of(row)
    at = _home(tag, table.size)
    while table[at] != 0:
        at += 1
        if at == table.size:
            at = 0
    table[at] = (tag << 32) | (slot + 1)


@lean
def remove(table: Any, row: int, slot: int) -> None:
    """Remove a row that is present in `slot`."""
    if table.itemsize == 4:
        table[row] = 0
        return
    size = table.size
    tag = tag_of(row)
    entry = (tag << 32) | (slot + 1)
    hole = _home(tag, size)
    while table[hole] != entry:
        hole += 1
        if hole == size:
            hole = 0
    at = hole
    while True:
        at += 1
        if at == size:
            at = 0
        entry = int64(table[at])
        if entry == 0:
            break
        distance_home = at - _home((entry >> 32) & _LOW, size)
        if distance_home < 0:
            distance_home += size
        distance_hole = at - hole
        if distance_hole < 0:
            distance_hole += size
        if distance_home >= distance_hole:
            table[hole] = entry
            hole = at
    table[hole] = 0


def check(table: Any, keys: Any) -> None:
    """Every resident row is found in its own slot, and nothing else is in the table."""
    resident = np.flatnonzero(keys >= 0)
    assert np.count_nonzero(table) == resident.size, "index holds other entries than the resident rows"
    for slot in resident.tolist():
        assert find(table, keys, int(keys[slot])) == slot, f"row {keys[slot]} of slot {slot} is not found"
