"""A set of keys in arrays, each key with an entry number that stays its own until it is removed.

Chained hashing: `heads` gives the first entry of a bucket, `chain` the next one. Entry numbers are handed out from 0 up
and reused once free, so the caller can keep its own arrays beside them: the order of a ghost list, the slot of a hot
row.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean

ABSENT = -1
"""Answer of `find` for a key that is not in the set, and the end of a chain."""

_USED, _FREE = 0, 1
_LOW = 0xFFFFFFFF


class KeySet(NamedTuple):
    """Keys by entry number.

    keys  int64[n]  key of each entry
    chain int32[n]  next entry of the same bucket, or of the free list; -1 at the end
    heads int32[n]  first entry of each bucket + 1
    book  int64[2]  entries handed out so far; first free entry, or -1
    """

    keys: npt.NDArray[np.int64]
    chain: npt.NDArray[np.int32]
    heads: npt.NDArray[np.int32]
    book: npt.NDArray[np.int64]


def new_keyset(capacity: int) -> KeySet:
    """An empty set of at most `capacity` keys. 16 bytes a key."""
    return KeySet(
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.int32),
        np.zeros(max(capacity, 1), np.int32),
        np.array([0, ABSENT], np.int64),
    )


@lean
def mix(key: int) -> int:
    """32 well mixed bits of a key that is not negative. Every product stays below 2**63."""
    x = (key ^ (key >> 32)) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x5BD1E995) & _LOW
    return x ^ (x >> 16)


@lean
def find(entries: KeySet, key: int) -> int:
    """Entry number of a key, or ABSENT."""
    bucket = (mix(key) * entries.heads.size) >> 32
    entry = int64(entries.heads[bucket]) - 1
    while entry != ABSENT and entries.keys[entry] != key:
        entry = int64(entries.chain[entry])
    return entry


@lean
def add(entries: KeySet, key: int) -> int:
    """Add a key that is absent, where there is room; its entry number."""
    entry = int64(entries.book[_FREE])
    if entry != ABSENT:
        entries.book[_FREE] = entries.chain[entry]
    else:
        entry = int64(entries.book[_USED])
        entries.book[_USED] += 1
    bucket = (mix(key) * entries.heads.size) >> 32
    entries.keys[entry] = key
    entries.chain[entry] = entries.heads[bucket] - 1
    entries.heads[bucket] = entry + 1
    return entry


@lean
def remove(entries: KeySet, entry: int) -> None:
    """Remove a key by its entry number."""
    bucket = (mix(entries.keys[entry]) * entries.heads.size) >> 32
    at = int64(entries.heads[bucket]) - 1
    if at == entry:
        entries.heads[bucket] = entries.chain[entry] + 1
    else:
        while entries.chain[at] != entry:
            at = int64(entries.chain[at])
        entries.chain[at] = entries.chain[entry]
    entries.chain[entry] = entries.book[_FREE]
    entries.book[_FREE] = entry


def check(entries: KeySet, present: list[int]) -> None:
    """AssertionError unless exactly these entry numbers hold keys, each found by its key."""
    assert len(set(present)) == len(present), "an entry is present twice"
    for entry in present:
        assert find(entries, int64(entries.keys[entry])) == entry, f"entry {entry} is not found by its key"
    free = []
    entry = int(entries.book[_FREE])
    while entry != ABSENT:
        free.append(entry)
        entry = int(entries.chain[entry])
    assert sorted([*free, *present]) == list(range(int(entries.book[_USED]))), "an entry is neither free nor present"
