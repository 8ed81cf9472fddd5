"""A level: which rows are in which slots of one tier, and every decision about it. No bytes, no torch, no files.

A batch is planned in two steps. `probe` finds what is resident, before anything changes. It is pinned, so that no row of a
batch is evicted by another row of the same batch, and `admit` takes the missing rows in first-seen order and asks the policy
for a slot each. The policy is told of each distinct row of a batch once: the hits
first, then the misses. The simulator and the live store run these same functions.

A row's place is one int32, the same everywhere: `slot >= 0`, or `~i` for row `i` of the batch's staging area, where rows
that the policy kept out are read to.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache import index
from tiercache.ahead import announce_batch, ask_batch, cancel_lane
from tiercache.curve import FIRST_NOTE, NOTED, NOTES_DUE, Curve, note_rows
from tiercache.native import entry_of, inlined, int64, lean, prefetch
from tiercache.policies import LOOK_AHEAD
from tiercache.policies.base import BYPASS, EMPTY, Policy, ask, ask_miss, on_hit, on_miss
from tiercache.policies.expected import LEFT
from tiercache.tap import TAPS, approach, fill

SLOT = np.dtype([("key", "i8"), ("stamp", "i4"), ("pins", "i2"), ("pending", "i1"), ("mark", "u1")])
"""Per slot: its row or EMPTY; the batch that last used it; plans that hold it; reads it waits for (negative: failed); a
byte for the policy, which a hit thus finds in the line that it reads anyway."""

BATCH, PINNED, HITS, MISSES, BYPASSES = range(5)
"""Columns of `counters`: number of the batch, slots pinned now, distinct hits, distinct misses, misses kept out."""

MAX_PINS = 32_000
"""Plans that may hold one slot at the same time."""

_AHEAD = 64
"""Rows between asking for an index line, reading it, and using the slot's line that it leads to."""
MISSES_AHEAD = 8
"""Rows between asking for what a policy will read of a miss, and the miss."""
_LAST_STAMP = 2**31 - 1
_NO_ROWS = np.empty(0, np.int64)
_SERVED, _TAKE_NOTES = 1, 2
"""Bits of what `plan_batch` returns: nothing was pinned; the curve's notes should be worked through."""


PLAN_HITS, PLAN_MISSES, PLAN_STAGED, PLAN_PENDING, PLAN_HELD = range(5)
"""Columns of a plan's `counts`."""


class Plan(NamedTuple):
    """Where each row of a batch is, and what must be read. Its slots are pinned until `Level.release`.

    A plan is room first, which one compiled call fills: so whatever interrupts the caller finds it done or not begun.

    where       int32[n]  place of each position
    all_misses  int64[n], all_fill int32[n], all_held int32[n]: room, of which the properties are the part in use
    counts      int64[8]
    """

    where: npt.NDArray[np.int32]
    all_misses: npt.NDArray[np.int64]
    all_fill: npt.NDArray[np.int32]
    all_held: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]

    @property
    def misses(self) -> npt.NDArray[np.int64]:
        """int64[m]: distinct rows to read, in first-seen order."""
        return self.all_misses[: self.counts[PLAN_MISSES]]

    @property
    def fill(self) -> npt.NDArray[np.int32]:
        """int32[m]: place each is read to."""
        return self.all_fill[: self.counts[PLAN_MISSES]]

    @property
    def held(self) -> npt.NDArray[np.int32]:
        """int32[h]: distinct slots pinned by this plan: those of its hits, then those it fills."""
        return self.all_held[: self.counts[PLAN_HELD]]

    @property
    def hits(self) -> int:
        """Number of distinct rows that were resident."""
        return int(self.counts[PLAN_HITS])

    @property
    def staged(self) -> int:
        """Number of rows of the staging area."""
        return int(self.counts[PLAN_STAGED])

    @property
    def pending(self) -> int:
        """Number of hits whose bytes another plan's reads have yet to bring."""
        return int(self.counts[PLAN_PENDING])


def new_plan(size: int) -> Plan:
    """Room for the plan of a batch of `size` rows."""
    return Plan(
        np.empty(size, np.int32),
        np.empty(size, np.int64),
        np.empty(size, np.int32),
        np.empty(size, np.int32),
        np.zeros(8, np.int64),
    )


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
        self.counters = np.zeros(FIRST_NOTE, np.int64)
        self.curve: Curve | None = None
        self._entries: dict[Callable[..., Any], Callable[..., Any]] = {}

    def watch(self, curve: Curve) -> None:
        """Keep a curve of what is asked of the level from now on."""
        self.curve = curve
        self.counters = curve.counters(self.counters)

    def look_ahead(self, room: int | None = None) -> None:
        """From now on rows may be announced. room: uses kept at most. ValueError if the policy makes no use of them."""
        if self.foresees:
            return
        if self.policy.name not in LOOK_AHEAD:
            raise ValueError(f"policy {self.policy.name!r} does not look ahead; allowed is {', '.join(LOOK_AHEAD)}")
        policy, begin = LOOK_AHEAD[self.policy.name]
        state = begin(self.state, room)
        self._entries.clear()
        self.policy, self.state = policy, state

    @property
    def foresees(self) -> bool:
        """Whether rows may be announced."""
        return "expected" in self.state._fields

    @property
    def num_expected(self) -> int:
        """Uses that were announced and have not come."""
        return int(self.state.expected.book[LEFT]) if self.foresees else 0

    def num_left(self, lane: int) -> int:
        """Uses of a lane that have not come."""
        return int(self.state.expected.lanes["left"][lane])

    def announce(self, rows: npt.NDArray[np.int64], lane: int) -> int:
        """Rows (int64[n]) are going to be used in this order, behind the others of a lane. How many there was room for."""
        return int(announce_batch(self.slots, self.table, self.state, rows, lane))

    def ask(self, rows: npt.NDArray[np.int64]) -> None:
        """The next use of each position's row is over: rows (int64[n]) are planned next, by this level or one above it."""
        if self.num_expected:
            ask_batch(self.slots, self.table, self.state, rows)

    def cancel(self, lane: int) -> None:
        """What a lane announced is not going to come."""
        cancel_lane(self.slots, self.table, self.state, lane)

    def plan(self, rows: npt.NDArray[np.int64], num_reads: int = 0) -> Plan:
        """Plan a batch. rows: int64[n], not negative, duplicates welcome. Changes the level; reads and writes no record.

        `num_reads` is how many reads bring one record: a slot to fill is pending until they have.
        """
        plan = new_plan(rows.size)
        self.plan_into(plan, np.ascontiguousarray(rows, np.int64), num_reads)
        return plan

    def plan_into(self, plan: Plan, rows: npt.NDArray[np.int64], num_reads: int, *, idly: bool = False) -> bool:
        """`plan`, into new room. `idly`: True, and nothing is pinned, if every row is resident and its bytes are there."""
        self.make_room(rows.size)
        books = self.slots, self.table, self.seen, self.counters, self.state
        done = self.run(plan_batch, *books, rows, plan, num_reads, idly)
        if done & _TAKE_NOTES:
            self.take_notes(rows)
        return bool(done & _SERVED)

    def take_notes(self, rows: npt.NDArray[np.int64] = _NO_ROWS) -> None:
        """Bring the curve up to date. rows: of the batch before, if all of it may not be noted yet."""
        if self.curve is not None:
            self.curve.take(self.counters, rows)

    def make_room(self, size: int) -> None:
        """Be ready for a batch of `size` rows."""
        if self.seen.size < 2 * size:
            self.seen = np.zeros(1 << (2 * size).bit_length(), np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the books."""
        return _nbytes((self.slots, self.table, self.seen, self.state)) + (self.curve.nbytes if self.curve else 0)

    def replay(
        self, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], edges: npt.NDArray[np.int64] = _NO_ROWS
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Plan the batches rows[offsets[b] : offsets[b + 1]] one after the other.

        edges: int64[k + 1] ascending, or none. Returns the distinct hits of each batch, int64[b], and the distinct misses of
        the rows edges[k] : edges[k + 1], int64[k]; those of rows outside count for the first or the last.
        """
        longest = int(np.diff(offsets).max(initial=0))
        self.make_room(longest)
        hits = np.empty(offsets.size - 1, np.int64)
        missed = np.zeros(max(edges.size - 1, 0), np.int64)
        books = self.slots, self.table, self.seen, self.counters, self.state
        replay(*books, rows, offsets, new_plan(longest), hits, edges, missed)
        return hits, missed

    def release(self, plan: Plan) -> None:
        """Let go of the slots of a plan. A second time, or for a plan that was never made, it does nothing."""
        self.run(release, self.slots, self.counters, plan)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call compiled code whose arguments are of the same types in every call, as are the books of this level."""
        entry = self._entries.get(function)
        if entry is None:
            entry = self._entries[function] = entry_of(function, arguments)
        return entry(*arguments)

    def arrived(self, plan: Plan) -> None:
        """The slots that a plan fills wait for nothing any more."""
        self.slots["pending"][plan.held[plan.hits :]] = 0

    def forget(self, plan: Plan) -> None:
        """Forget what the slots hold that a plan was to fill: a read failed."""
        forget(self.slots, self.table, plan)

    def check(self) -> None:
        """Raise AssertionError where the books do not add up."""
        keys, pins = self.slots["key"], self.slots["pins"]
        assert (pins >= 0).all(), "a slot was unpinned more often than pinned"
        assert np.count_nonzero(pins) == self.counters[PINNED], "pinned slots are miscounted"
        assert np.unique(keys[keys >= 0]).size == np.count_nonzero(keys >= 0), "a row is in two slots"
        index.check(self.table, keys)
        self.policy.check(self.state, keys)
        if self.curve is not None:
            self.curve.check()


def _nbytes(part: Any) -> int:
    """Bytes of an array, or of the arrays of a tuple."""
    return sum(_nbytes(inner) for inner in part) if isinstance(part, tuple) else int(part.nbytes)


@lean
def plan_batch(
    slots: Any, table: Any, seen: Any, counters: Any, state: Any, rows: Any, plan: Plan, num_reads: int, idly: bool
) -> int:
    """Plan a batch. Bits: _SERVED, if every row was resident and `idly` said that this will do; _TAKE_NOTES."""
    approach(counters[TAPS])
    note_rows(counters, rows, 0)
    fill(counters[TAPS], rows)
    missing = find_batch(slots, table, seen, counters, state, rows, plan, idly)
    if missing > 0:
        counts = plan.counts
        counts[PLAN_HELD], counts[PLAN_MISSES], counts[PLAN_STAGED] = admit(
            slots, table, seen, counters, state, rows, plan.where, plan.all_misses, plan.all_fill, plan.all_held,
            counts[PLAN_HELD], num_reads,
        )  # fmt: skip
    return _SERVED * int64(missing < 0) + _TAKE_NOTES * int64(counters[NOTED] >= NOTES_DUE)


@inlined
def find_batch(
    slots: Any, table: Any, seen: Any, counters: Any, state: Any, rows: Any, plan: Plan, idly: bool
) -> int:
    """Plan the hits of a batch: how many positions are missing, or -1 if nothing was pinned, which `idly` allows."""
    num_held, missing, pending = probe(slots, table, seen, counters, state, rows, plan.where, plan.all_held)
    plan.counts[PLAN_HITS], plan.counts[PLAN_PENDING] = num_held, pending
    if idly and missing == 0 and pending == 0:
        return int64(-1)
    pin(slots, counters, plan.all_held[:num_held])
    plan.counts[PLAN_HELD] = num_held
    return missing


@inlined
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
            ask(state, slot)
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


@inlined
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
    batch = counters[BATCH]
    mask = seen.size - 1
    num_misses = staged = 0
    for i in range(rows.size):
        if i + MISSES_AHEAD < rows.size and where[i + MISSES_AHEAD] < 0:
            ask_miss(state, rows[i + MISSES_AHEAD])
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
        slot = claim(slots, table, counters, state, row, num_reads)
        if slot >= 0:
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


@inlined
def claim(slots: Any, table: Any, counters: Any, state: Any, row: int, num_reads: int) -> int:
    """A slot for a row that is absent, pinned, now the row's own and waiting for `num_reads` reads; or BYPASS."""
    keys, pins = slots["key"], slots["pins"]
    slot = int64(BYPASS)
    if counters[PINNED] < keys.size:
        slot = int64(on_miss(state, keys, pins, row))
    if slot >= 0:
        if keys[slot] >= 0:
            index.remove(table, keys[slot], slot)
        keys[slot] = row
        index.insert(table, row, slot)
        slots["stamp"][slot] = counters[BATCH]
        pins[slot] = 1
        slots["pending"][slot] = num_reads
        counters[PINNED] += 1
    return slot


@lean
def release(slots: Any, counters: Any, plan: Plan) -> None:
    """Unpin the slots of a plan."""
    unpin(slots, counters, plan.all_held[: plan.counts[PLAN_HELD]])
    plan.counts[PLAN_HELD] = 0


@lean
def forget(slots: Any, table: Any, plan: Plan) -> None:
    """Drop the slots that a plan was to fill."""
    for i in range(plan.counts[PLAN_HITS], plan.counts[PLAN_HELD]):
        drop(slots, table, plan.all_held[i])


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
    plan: Plan,
    batch_hits: Any,
    edges: Any,
    missed: Any,
) -> None:
    """Plan batch after batch of a trace: see `Level.replay`. plan: room for the longest; batch_hits, missed: written."""
    for b in range(offsets.size - 1):
        batch = rows[offsets[b] : offsets[b + 1]]
        if batch.size <= 4 and offsets[b + 1] + 16 < rows.size:
            for i in range(offsets[b], offsets[b + 1]):
                prefetch(index.address(table, rows[i + 16]))
        plan.counts[PLAN_MISSES] = 0
        plan_batch(slots, table, seen, counters, state, batch, plan, 0, True)
        batch_hits[b] = plan.counts[PLAN_HITS]
        if missed.size > 0:
            _count_kinds(plan, edges, missed)
        release(slots, counters, plan)


@lean
def _count_kinds(plan: Plan, edges: Any, missed: Any) -> None:
    """Count the misses of a batch between the edges."""
    for i in range(plan.counts[PLAN_MISSES]):
        row, kind = plan.all_misses[i], 0
        while kind + 1 < missed.size and row >= edges[kind + 1]:
            kind += 1
        missed[kind] += 1


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
