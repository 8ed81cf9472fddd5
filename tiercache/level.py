"""A level: which rows are in which slots of one tier, and every decision about it. No bytes, no torch, no files.

A batch is planned in two steps. `probe` finds what is resident, before anything changes; if that is all, no more is to do.
Else it is pinned, so that no row of a batch is evicted by another row of the same batch, and `admit` takes the missing rows
in first-seen order and asks the policy for a slot each. The policy is told of each distinct row of a batch once: the hits
first, then the misses. The simulator and the live store run these same functions.

A row's place is one int32, the same everywhere: `slot >= 0`, or `~i` for row `i` of the batch's staging area, where rows
that the policy kept out are read to.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache import index
from tiercache.native import int64, lean, prefetch
from tiercache.policies.base import BYPASS, EMPTY, Policy, on_hit, on_miss

SLOT = np.dtype([("key", "i8"), ("stamp", "i4"), ("pins", "i2"), ("pending", "i1"), ("mark", "u1")])
"""Per slot: its row or EMPTY; the batch that last used it; plans that hold it; reads it waits for (negative: failed); a
byte for the policy, which a hit thus finds in the line that it reads anyway."""

BATCH, PINNED, HITS, MISSES, BYPASSES = range(5)
"""Columns of `counters`: number of the batch, slots pinned now, distinct hits, distinct misses, misses kept out."""

MAX_PINS = 32_000
"""Plans that may hold one slot at the same time."""

_AHEAD = 64
"""Rows between asking for an index line, reading it, and using the slot's line that it leads to."""
_LAST_STAMP = 2**31 - 1


class Plan(NamedTuple):
    """Where each row of a batch is, and what must be read. Its slots are pinned until `Level.unpin`.

    where   int32[n]  place of each position
    misses  int64[m]  distinct rows to read, in first-seen order
    fill    int32[m]  place each is read to
    held    int32[h]  distinct slots pinned by this plan: those of its hits, then those it fills
    hits    number of distinct rows that were resident
    staged  number of rows of the staging area
    pending number of hits whose bytes another plan's reads have yet to bring
    """

    where: npt.NDArray[np.int32]
    misses: npt.NDArray[np.int64]
    fill: npt.NDArray[np.int32]
    held: npt.NDArray[np.int32]
    hits: int
    staged: int
    pending: int


class Level:
    """Bookkeeping of one tier of `capacity` slots under a policy. Not safe from several threads: the store locks.

    `num_rows`, where it is known, bounds the rows and lets the index be a direct map.
    """

    def __init__(
        self, policy: Policy, capacity: int, options: Mapping[str, Any] | None = None, num_rows: int | None = None
    ) -> None:
        self.policy = policy
        self.capacity = capacity
        self.slots = np.zeros(capacity, SLOT)
        self.slots["key"] = EMPTY
        self.state = policy.init(capacity, **(options or {}))
        if "marks" in self.state._fields:
            self.state = self.state._replace(marks=self.slots["mark"])
        self.table = index.new_table(capacity, num_rows)
        self.seen = np.zeros(8, np.int64)
        self.counters = np.zeros(8, np.int64)

    def plan(self, rows: npt.NDArray[np.int64], num_reads: int = 0) -> Plan:
        """Plan a batch. rows: int64[n], not negative, duplicates welcome. Changes the level; reads and writes no record.

        `num_reads` is how many reads bring one record: a slot to fill is pending until they have.
        """
        where, held, found = self.probe(rows)
        return self.settle(rows, where, held, found, num_reads)

    def probe(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], tuple[int, int, int]]:
        """Begin a batch: places, distinct slots, and the counts that the compiled `probe` returns."""
        where, held = np.empty(rows.size, np.int32), np.empty(rows.size, np.int32)
        found = probe(self.slots, self.table, self.seen, self.counters, self.state, rows, where, held)
        return where, held, found

    def settle(
        self,
        rows: npt.NDArray[np.int64],
        where: npt.NDArray[np.int32],
        held: npt.NDArray[np.int32],
        found: tuple[int, int, int],
        num_reads: int,
    ) -> Plan:
        """The plan of a batch that was probed: pins what is resident, admits what is missing."""
        hits, missing, pending = found
        pin(self.slots, self.counters, held[:hits])
        if not missing:
            return Plan(where, _NO_ROWS, _NO_PLACES, held[:hits], hits, 0, pending)
        misses, fill = np.empty(missing, np.int64), np.empty(missing, np.int32)
        if self.seen.size < 2 * missing:
            self.seen = np.zeros(1 << (2 * missing).bit_length(), np.int64)
        num_held, num_misses, staged = admit(
            self.slots, self.table, self.seen, self.counters, self.state, rows, where, misses, fill, held, hits, num_reads
        )
        return Plan(where, misses[:num_misses], fill[:num_misses], held[:num_held], hits, staged, pending)

    @property
    def nbytes(self) -> int:
        """Bytes of the books."""
        return _nbytes((self.slots, self.table, self.seen, self.state))

    def replay(self, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Plan the batches rows[offsets[b] : offsets[b + 1]] one after the other; their distinct hits, int64[b]."""
        longest = int(np.diff(offsets).max(initial=0))
        if self.seen.size < 2 * longest:
            self.seen = np.zeros(1 << (2 * longest).bit_length(), np.int64)
        where, held, fill = (np.empty(longest, np.int32) for _ in range(3))
        misses, hits = np.empty(longest, np.int64), np.empty(offsets.size - 1, np.int64)
        replay(
            self.slots, self.table, self.seen, self.counters, self.state, rows, offsets, hits, where, held, misses, fill
        )
        return hits

    def unpin(self, held: npt.NDArray[np.int32]) -> None:
        """Let go of the slots of a plan."""
        unpin(self.slots, self.counters, held)

    def drop(self, slots: npt.NDArray[np.int32]) -> None:
        """Forget what these slots hold, pinned or not: their read failed."""
        for slot in slots.tolist():
            drop(self.slots, self.table, slot)

    def check(self) -> None:
        """Raise AssertionError where the books do not add up."""
        keys, pins = self.slots["key"], self.slots["pins"]
        assert (pins >= 0).all(), "a slot was unpinned more often than pinned"
        assert np.count_nonzero(pins) == self.counters[PINNED], "pinned slots are miscounted"
        assert np.unique(keys[keys >= 0]).size == np.count_nonzero(keys >= 0), "a row is in two slots"
        index.check(self.table, keys)
        self.policy.check(self.state, keys)


def _nbytes(part: Any) -> int:
    """Bytes of an array, or of the arrays of a tuple."""
    return sum(_nbytes(inner) for inner in part) if isinstance(part, tuple) else int(part.nbytes)


_NO_ROWS = np.empty(0, np.int64)
_NO_PLACES = np.empty(0, np.int32)


@lean
def probe(
    slots: Any, table: Any, seen: Any, counters: Any, state: Any, rows: Any, where: Any, held: Any
) -> tuple[int, int, int]:
    """Begin a batch: find its resident rows, and tell the policy of them.

    Fills where[i] with the slot of rows[i], or -1, and held with the distinct slots.
    Returns (distinct hits, positions missing, distinct hits whose bytes are still on their way).
    """
    keys, stamps, pending = slots["key"], slots["stamp"], slots["pending"]
    if counters[BATCH] == _LAST_STAMP:
        stamps[:] = 0
        seen[:] = 0
        counters[BATCH] = 0
    counters[BATCH] += 1
    batch = np.int32(counters[BATCH])
    slots_at = slots.ctypes.data
    size = rows.size
    num_held = missing = waiting = 0
    distance = _AHEAD if size > 4 else 0
    for i in range(min(distance, size)):
        prefetch(index.address(table, rows[i]))
    for near in range(size + distance):
        if near + distance < size:
            prefetch(index.address(table, rows[near + distance]))
        if near < size:
            slot = index.candidate(table, rows[near])
            where[near] = slot
            prefetch(slots_at + 16 * slot)
        i = near - distance
        if i < 0:
            continue
        slot = int64(where[i])
        if slot >= 0 and keys[slot] != rows[i]:
            slot = index.find(table, keys, rows[i])
            where[i] = slot
        if slot < 0:
            missing += 1
        elif stamps[slot] != batch:
            stamps[slot] = batch
            waiting += pending[slot] != 0
            held[num_held] = slot
            num_held += 1
            on_hit(state, keys, slot)
    counters[HITS] += num_held
    return num_held, missing, waiting


@lean
def pin(slots: Any, counters: Any, held: Any) -> None:
    """Pin distinct slots, once each."""
    pins = slots["pins"]
    base = slots.ctypes.data
    for i in range(held.size):
        if i + 16 < held.size:
            prefetch(base + 16 * int64(held[i + 16]))
        slot = held[i]
        counters[PINNED] += pins[slot] == 0
        pins[slot] += np.int16(1)


@lean
def admit(
    slots: Any,
    table: Any,
    seen: Any,
    counters: Any,
    state: Any,
    rows: Any,
    where: Any,
    misses: Any,
    fill: Any,
    held: Any,
    num_held: int,
    num_reads: int,
) -> tuple[int, int, int]:
    """End a batch: give each distinct missing row a slot, or a place in the staging area.

    `seen` (int64, a power of two at least twice the missing positions) tells a row's second sight within the batch; its
    entries carry the batch's number and so need no clearing. Returns (slots held, distinct misses, rows staged).
    """
    keys, stamps, pins, pending = slots["key"], slots["stamp"], slots["pins"], slots["pending"]
    batch = counters[BATCH]
    mask = seen.size - 1
    num_misses = staged = 0
    for i in range(rows.size):
        if where[i] >= 0:
            continue
        row = rows[i]
        at = index.tag_of(row) & mask
        while seen[at] >> 32 == batch and misses[seen[at] & mask] != row:
            at = (at + 1) & mask
        if seen[at] >> 32 == batch:
            where[i] = fill[seen[at] & mask]
            continue
        seen[at] = (batch << 32) | num_misses
        slot = int64(BYPASS)
        if counters[PINNED] < keys.size:
            slot = int64(on_miss(state, keys, pins, row))
        if slot >= 0:
            if keys[slot] >= 0:
                index.remove(table, keys[slot], slot)
            keys[slot] = row
            index.insert(table, row, slot)
            stamps[slot] = batch
            pins[slot] = 1
            pending[slot] = num_reads
            counters[PINNED] += 1
            held[num_held] = slot
            num_held += 1
        else:
            slot = ~int64(staged)
            staged += 1
        where[i] = slot
        misses[num_misses] = row
        fill[num_misses] = slot
        num_misses += 1
    counters[MISSES] += num_misses
    counters[BYPASSES] += staged
    return num_held, num_misses, staged


@lean
def unpin(slots: Any, counters: Any, held: Any) -> None:
    """Let go of distinct slots that one plan pinned."""
    pins = slots["pins"]
    base = slots.ctypes.data
    for i in range(held.size):
        if i + 16 < held.size:
            prefetch(base + 16 * int64(held[i + 16]))
        slot = held[i]
        pins[slot] -= np.int16(1)
        counters[PINNED] -= pins[slot] == 0


@lean
def drop(slots: Any, table: Any, slot: int) -> None:
    """Forget what a slot holds."""
    keys = slots["key"]
    slots["pending"][slot] = 0
    if keys[slot] >= 0:
        index.remove(table, keys[slot], slot)
        keys[slot] = EMPTY


@lean
def replay(
    slots: Any,
    table: Any,
    seen: Any,
    counters: Any,
    state: Any,
    rows: Any,
    offsets: Any,
    batch_hits: Any,
    where: Any,
    held: Any,
    misses: Any,
    fill: Any,
) -> None:
    """Plan batch after batch of a trace: rows int64[n], offsets int64[b + 1], batch_hits int64[b] (distinct, written).

    where, held, misses and fill are room for the longest batch, as in a Plan.
    """
    for b in range(offsets.size - 1):
        batch = rows[offsets[b] : offsets[b + 1]]
        if batch.size <= 4 and offsets[b + 1] + 16 < rows.size:
            for i in range(offsets[b], offsets[b + 1]):
                prefetch(index.address(table, rows[i + 16]))
        num_held, missing, _ = probe(slots, table, seen, counters, state, batch, where, held)
        batch_hits[b] = num_held
        if missing:
            pin(slots, counters, held[:num_held])
            num_held, _, _ = admit(
                slots, table, seen, counters, state, batch, where, misses, fill, held, num_held, 0
            )
            unpin(slots, counters, held[:num_held])


@lean
def pending_of(slots: Any, held: Any, out: Any) -> int:
    """Collect the held slots whose bytes another plan's reads have yet to bring; how many. Under the store's lock."""
    pending = slots["pending"]
    count = 0
    for i in range(held.size):
        if pending[held[i]] != 0 and count < out.size:
            out[count] = held[i]
            count += 1
    return count
