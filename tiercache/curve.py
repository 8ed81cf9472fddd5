"""The curve of a tier: the hit rates that LRU would have had at other sizes, counted while the tier serves.

Only some rows are watched, those whose hash is below a limit, but all uses of them: an LRU of `rate * size` watched rows has
about the hit rate of an LRU of `size` rows. How many uses were to be watched is known, and where there were more or fewer,
because a hot row is watched or is not, the difference is taken for uses that every size would have served (SHARDS-adj).

Watched rows lie in one ring in order of use, cut into segments at the scaled sizes. A use of a row of segment s is a hit of
every size from the s-th on. A use moves one slot over each border that it passes: there are no distances to count and no
times to renumber. What falls behind the largest size is a miss of every size and is forgotten, so that memory is fixed at any
number of rows.

A level notes the watched rows among those that it tells its policy of, in that order: each distinct row of a batch once, hits
before misses. Notes wait in its counters until there are enough of them to work through.

Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache import index
from tiercache.native import int64, lean, prefetch
from tiercache.policies.links import NEWER, members, new_rings, push, renew
from tiercache.stats import CurvePoint

LIMIT, NOTED, NEXT, FIRST_NOTE = 5, 6, 7, 9
"""Columns of a level's counters: rows with a hash below this are watched; notes that wait; the position of the last batch
where there was no more room for them, or its end; where the notes lie."""

NOTES_DUE, _NOTES = 256, 512
"""Notes that are worth working through, and room for notes."""

_BATCH = -1
"""A note that the rows behind it are of another batch."""

_BLOCK = 64
"""Rows that are looked at together, as few blocks have one that is watched."""

_AHEAD, _NEAR = 12, 6
"""Notes between asking for an index line, reading it, and using the slot that it leads to."""

_ROW = 2**63 - 1
"""What makes any note a row."""

_OCTAVES = range(-3, 4)
"""Sizes, as powers of two of the tier's own."""

_MOST_WATCHED, _LEAST_WATCHED, _SPARSEST = 1024, 64, 512
"""Watched rows that the tier's own size is scaled to: one in 512 of its slots, within these bounds and its size."""

_LOW = 0xFFFFFFFF
_ODD = 0x9E3779B1 >> 1 | 1


@lean
def hash_of(row: int) -> int:
    """A row's 32-bit hash that decides whether it is watched: its low bits, multiplied."""
    return ((row & _LOW) * _ODD) & _LOW


@lean
def note_rows(counters: Any, rows: Any, first: int) -> None:
    """Note the watched rows of a batch, from a position on, as far as there is room."""
    limit = counters[LIMIT]
    fresh = FIRST_NOTE + counters[NOTED] if first == 0 else int64(-1)
    rest = rows[first:] if limit > 0 else rows[:0]
    counters[NEXT] = rows.size
    for block in range(rest.size // _BLOCK):
        at = block * _BLOCK
        found = 0
        for i in range(_BLOCK):
            found += hash_of(rest[at + i]) < limit
        if found > 0 and not note_block(counters, rest[at : at + _BLOCK], fresh):
            counters[NEXT] = first + at
            return
    at = rest.size // _BLOCK * _BLOCK
    if not note_block(counters, rest[at:], fresh):
        counters[NEXT] = first + at


@lean
def note_block(counters: Any, rows: Any, fresh: int) -> bool:
    """Note the watched among a few rows; False where there may be no room. fresh: where the batch's first note would lie."""
    limit, noted = counters[LIMIT], FIRST_NOTE + counters[NOTED]
    if noted + 1 + rows.size > counters.size:
        return rows.size == 0
    for i in range(rows.size):
        if hash_of(rows[i]) < limit:
            if noted == fresh:
                counters[noted] = _BATCH
                noted += 1
            counters[noted] = rows[i]
            noted += 1
    counters[NOTED] = noted - FIRST_NOTE
    return True


class Watched(NamedTuple):
    """The watched rows that the largest size would hold.

    keys     int64[depth]         row of each slot
    links    int32[depth + 1, 2]  the ring of the slots in use
    segment  uint8[depth]         segment of each slot
    table    the index: row -> slot
    edges    int64[m]             scaled sizes, ascending, the last of them `depth`; segment j ends at edges[j]
    oldest   int32[m]             oldest slot of each segment, -1 while it is not full
    uses     int64[m + 1]         uses of rows of each segment; the last, of rows that were in none
    batch    int64[depth]         batch in which each slot was used
    counts   int64[2]             slots in use; batches
    """

    keys: npt.NDArray[np.int64]
    links: npt.NDArray[np.int32]
    segment: npt.NDArray[np.uint8]
    table: npt.NDArray[np.int64]
    edges: npt.NDArray[np.int64]
    oldest: npt.NDArray[np.int32]
    uses: npt.NDArray[np.int64]
    batch: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


class Curve:
    """Of a tier of `capacity` slots: hit rates at 1/8 to 8 times that. Not safe from several threads: the store locks.

    `watched` is what the tier's own size is scaled to, a few thousand rows at most; it decides the accuracy and the cost.
    """

    def __init__(self, capacity: int, watched: int | None = None) -> None:
        self.sizes = sorted({max(1, int(capacity * 2.0**octave)) for octave in _OCTAVES})
        if watched is None:
            watched = max(_LEAST_WATCHED, min(capacity // _SPARSEST, _MOST_WATCHED))
        self.limit = round(min(watched / capacity, 1) * 2**32)
        self.rate = self.limit / 2**32
        scaled = np.array([max(1, round(size * self.rate)) for size in self.sizes], np.int64)
        edges, self._segments = np.unique(scaled, return_inverse=True)
        depth = int(edges[-1])
        self.watched = Watched(
            np.full(depth, -1, np.int64),
            new_rings(depth, 1),
            np.zeros(depth, np.uint8),
            index.new_table(depth),
            edges,
            np.full(edges.size, -1, np.int32),
            np.zeros(edges.size + 1, np.int64),
            np.zeros(depth, np.int64),
            np.zeros(2, np.int64),
        )

    def counters(self, counters: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A level's counters with room for notes, which ask for them."""
        counters = np.append(counters[:FIRST_NOTE], np.zeros(_NOTES, np.int64))
        counters[LIMIT] = self.limit
        return counters

    def take(self, counters: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> None:
        """Work through the notes of a level. rows: of the batch before, from which those follow that had no room."""
        take_notes(self.watched, counters, rows)

    def points(self, accesses: int) -> tuple[CurvePoint, ...]:
        """The curve after so many accesses of the level, all notes taken; all rates are 0 before the first."""
        uses = self.watched.uses
        expected = accesses * self.rate
        if expected <= 0:
            return tuple(CurvePoint(size, 0.0) for size in self.sizes)
        hits = np.cumsum(uses[:-1])[self._segments] + (expected - uses.sum())
        rates = np.clip(hits / expected, 0, 1).tolist()
        return tuple(CurvePoint(size, rate) for size, rate in zip(self.sizes, rates, strict=True))

    @property
    def num_uses(self) -> int:
        """Uses of watched rows so far."""
        return int(self.watched.uses.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the books, the notes included."""
        return sum(part.nbytes for part in self.watched) + 8 * _NOTES

    def check(self) -> None:
        """Raise AssertionError where the books do not add up."""
        watched, used = self.watched, int(self.watched.counts[0])
        index.check(watched.table, watched.keys)
        ring = members(watched.links, watched.keys.size)[::-1]
        assert sorted(ring) == list(range(used)), "the ring is not the slots in use"
        segments = np.searchsorted(watched.edges, np.arange(used), side="right")
        assert np.array_equal(watched.segment[ring], segments), "a slot is in another segment than its place says"
        oldest = [ring[edge - 1] if edge <= used else -1 for edge in watched.edges.tolist()]
        assert watched.oldest.tolist() == oldest, "a segment ends elsewhere"


@lean
def take_notes(watched: Watched, counters: Any, rows: Any) -> None:
    """See `Curve.take`."""
    counts = watched.counts
    while True:
        end = FIRST_NOTE + counters[NOTED]
        for i in range(FIRST_NOTE, end):
            if i + _AHEAD < end:
                prefetch(index.address(watched.table, counters[i + _AHEAD] & _ROW))
            if i + _NEAR < end:
                slot = index.candidate(watched.table, counters[i + _NEAR] & _ROW)
                if slot >= 0:
                    prefetch(watched.keys.ctypes.data + 8 * slot)
                    prefetch(watched.links.ctypes.data + 8 * slot)
                    prefetch(watched.batch.ctypes.data + 8 * slot)
            if counters[i] == _BATCH:
                counts[1] += 1
            else:
                use(watched, counters[i])
        counters[NOTED] = 0
        if counters[NEXT] >= rows.size:
            break
        note_rows(counters, rows, counters[NEXT])


@lean
def use(watched: Watched, row: int) -> None:
    """A watched row was used; not a second time in a batch, as far as that is not forgotten."""
    keys, links, segment, table, edges, oldest, uses, batch, counts = watched
    anchor = keys.size
    slot = index.find(table, keys, row)
    if slot >= 0:
        if batch[slot] == counts[1]:
            return
        borders = int64(segment[slot])
        move(links, segment, oldest, slot, borders)
    elif counts[0] < anchor:
        slot = int64(counts[0])
        counts[0] += 1
        borders = edges.size
        grow(links, segment, edges, oldest, slot)
        keys[slot] = row
        index.insert(table, row, slot)
    else:
        slot = int64(oldest[edges.size - 1])
        borders = edges.size
        index.remove(table, keys[slot], slot)
        move(links, segment, oldest, slot, edges.size - 1)
        keys[slot] = row
        index.insert(table, row, slot)
    uses[borders] += 1
    batch[slot] = counts[1]


@lean
def grow(links: Any, segment: Any, edges: Any, oldest: Any, slot: int) -> None:
    """Put the next slot into the ring, the newest. Of the segments only the first are full."""
    anchor = segment.size
    full = int64(0)
    while oldest[full] >= 0:
        full += 1
    shift(links, segment, oldest, slot, full)
    segment[slot] = 0
    push(links, anchor, slot)
    if slot + 1 == edges[full]:
        oldest[full] = links[anchor, NEWER]


@lean
def move(links: Any, segment: Any, oldest: Any, slot: int, borders: int) -> None:
    """Make a slot of segment `borders` the newest of the ring."""
    anchor = segment.size
    if oldest[borders] == slot and links[slot, NEWER] != anchor:
        oldest[borders] = links[slot, NEWER]
    shift(links, segment, oldest, slot, borders)
    segment[slot] = 0
    renew(links, anchor, slot)


@lean
def shift(links: Any, segment: Any, oldest: Any, slot: int, borders: int) -> None:
    """Move the oldest slot of each of the first segments to the next one, before `slot` becomes the newest of the ring."""
    anchor = segment.size
    for j in range(borders):
        leaving = oldest[j]
        newer = links[leaving, NEWER]
        oldest[j] = newer if newer != anchor else slot
        segment[leaving] = j + 1
