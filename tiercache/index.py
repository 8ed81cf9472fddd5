"""The residency index: row -> slot, by open addressing.

`table` is int64[num_entries], at most half full. An entry is `tag << 32 | slot + 1`, or 0 where free; the tag is a 32-bit
hash of the row, and `home(tag)` is where its search begins, so an entry can be moved without looking at its row. A tag
that matches is a candidate: the caller compares the row itself, `keys[slot]`, which it is about to touch anyway. Probes of
a batch run block by block, each line asked for before it is read.

Linear probing; removal shifts the rest of the run back, so there are no tombstones and the table never needs rebuilding.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.native import jit

_LOW = 0xFFFFFFFF


def new_table(capacity: int) -> npt.NDArray[np.int64]:
    """An empty index for `capacity` slots: int64[max(2 * capacity, 8)]. Written, so that no probe waits for a new page."""
    table = np.empty(max(2 * capacity, 8), np.int64)
    table.fill(0)
    return table


@jit
def tag_of(row: int) -> int:
    """32-bit hash of a row, a bijection for rows below 2**32 (two multiply-xorshift rounds)."""
    x = (row ^ (row >> 32)) & _LOW
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
    return x ^ (x >> 15)


@jit
def home(tag: int, num_entries: int) -> int:
    """Where the search for a tag begins: the tag scaled to the table's length."""
    return ((tag >> 1) * num_entries) >> 31


@jit
def candidate(table: Any, tag: int) -> int:
    """The first slot whose tag matches, or -1."""
    at = home(tag, table.size)
    entry = table[at]
    while entry != 0:
        if (entry >> 32) & _LOW == tag:
            return (entry & _LOW) - 1
        at += 1
        if at == table.size:
            at = 0
        entry = table[at]
    return -1


@jit
def find(table: Any, keys: Any, row: int) -> int:
    """The slot that holds `row`, or -1."""
    tag = tag_of(row)
    at = home(tag, table.size)
    entry = table[at]
    while entry != 0:
        if (entry >> 32) & _LOW == tag:
            slot = (entry & _LOW) - 1
            if keys[slot] == row:
                return slot
        at += 1
        if at == table.size:
            at = 0
        entry = table[at]
    return -1


@jit
def insert(table: Any, row: int, slot: int) -> None:
    """Add a row that is absent."""
    tag = tag_of(row)
    at = home(tag, table.size)
    while table[at] != 0:
        at += 1
        if at == table.size:
            at = 0
    table[at] = (tag << 32) | (slot + 1)


@jit
def remove(table: Any, row: int, slot: int) -> None:
    """Remove a row that is present in `slot`."""
    size = table.size
    tag = tag_of(row)
    entry = (tag << 32) | (slot + 1)
    hole = home(tag, size)
    while table[hole] != entry:
        hole += 1
        if hole == size:
            hole = 0
    at = hole
    while True:
        at += 1
        if at == size:
            at = 0
        entry = table[at]
        if entry == 0:
            break
        distance_home = at - home((entry >> 32) & _LOW, size)
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
