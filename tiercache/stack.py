"""Two levels, one above the other: what of a batch is in the device tier, what below it, and what moves up.

The device level is asked first, the host level for what it has not. A row that is missing above and resident below has
been used before: the device level's policy is asked for a slot for it, in first-seen order and for a bounded number of rows
a batch. So rows rise when they are used again, what is read once never does, and everything that rises is copied from a
host slot whose bytes are there. A row that the upper level holds is no longer used below, and ages there.

A place is one int32 over both: a device slot, or `num_device_slots + host slot`, or `~i` for row i of the staging area.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache import index
from tiercache.curve import NOTED, NOTES_DUE, note_rows
from tiercache.level import (
    BYPASSES,
    MISSES,
    MISSES_AHEAD,
    PLAN_HELD,
    PLAN_HITS,
    PLAN_MISSES,
    Level,
    Plan,
    claim,
    find_batch,
    new_plan,
)
from tiercache.native import lean
from tiercache.policies.base import ask_miss
from tiercache.tap import TAPS, approach, fill

_NO_SLOTS = np.empty(0, np.int32)
_NO_ROWS = np.empty(0, np.int64)


class StackPlan:
    """Where each row of a batch is. Its slots of both levels are pinned until they are released.

    where    int32[n]  place of each position
    above    the device level's plan: its `held` are its hits, then the slots that what rises is copied to; its `fill` the host
             slots that it is copied from. None without a device level.
    below    the host level's plan for what the device level has not; its `where` is of those positions only
    absent   int32[n], rest int64[n]: room for those positions and their rows
    after    what a stream must wait for before it reads these places, if there are streams
    rows, keys  of groups only: int64[n * size], the row numbers, and int64[n], what the levels know them by
    """

    __slots__ = ("above", "absent", "after", "below", "keys", "rest", "rows", "where")

    rows: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]

    def __init__(self, size: int, *, above: bool) -> None:
        """Room for the plan of a batch of `size` rows."""
        self.below = new_plan(size)
        self.above = new_plan(size) if above else None
        self.where: npt.NDArray[np.int32] = (self.above or self.below).where
        self.absent = np.empty(size, np.int32) if above else _NO_SLOTS
        self.rest = np.empty(size, np.int64) if above else _NO_ROWS
        self.after: Any = None


def plan_stack(
    device: Level,
    host: Level,
    plan: StackPlan,
    rows: npt.NDArray[np.int64],
    num_reads: int,
    most: int,
    *,
    num_copies: int = 0,
    idly: bool = False,
) -> bool:
    """Plan a batch over both levels, into new room. rows: int64[n], not negative, duplicates welcome. Moves no bytes.

    most: rows that may rise. num_reads: reads that bring one record to the host tier; num_copies: copies that bring one
    to the device tier and have not been made when this returns, 0 or 1. `idly`: True, and nothing is pinned, if the device
    level has every row and its bytes are there.
    """
    above, below = plan.above, plan.below
    assert above is not None
    device.make_room(rows.size)
    books = device.slots, device.table, device.seen, device.counters, device.state
    missing: int = device.run(find_above, *books, rows, above, plan.absent, plan.rest, idly)
    if device.counters[NOTED] >= NOTES_DUE:
        device.take_notes(rows)
    if missing <= 0:
        return missing < 0
    host.plan_into(below, plan.rest[:missing], num_reads)
    books_above = device.slots, device.table, device.counters, device.state
    risen: int = device.run(rise_batch, *books_above, host.slots, above, below, num_copies, most)
    device.run(merge, device.table, device.slots, rows, plan.where, plan.absent[:missing], below.where, risen > 0)
    return False


@lean
def find_above(
    slots: Any, table: Any, seen: Any, counters: Any, state: Any, rows: Any, plan: Plan, absent: Any, rest: Any, idly: bool
) -> int:
    """`find_batch`; what was asked for is noted for the curve and copied for whoever records it.

    Collects the positions that are missing, and their rows.
    """
    approach(counters[TAPS])
    note_rows(counters, rows, 0)
    fill(counters[TAPS], rows)
    missing = find_batch(slots, table, seen, counters, state, rows, plan, idly)
    if missing > 0:
        at = 0
        for i in range(rows.size):
            if plan.where[i] < 0:
                absent[at], rest[at] = i, rows[i]
                at += 1
    return missing


@lean
def rise_batch(
    slots: Any, table: Any, counters: Any, state: Any, host_slots: Any, above: Plan, below: Plan, num_copies: int, most: int
) -> int:
    """Ask for a device slot for each host hit whose bytes are there, up to `most`; how many were given."""
    keys, pending = host_slots["key"], host_slots["pending"]
    num_held = above.counts[PLAN_HELD]
    risen = 0
    for i in range(below.counts[PLAN_HITS]):
        if risen == most:
            break
        if i + MISSES_AHEAD < below.counts[PLAN_HITS]:
            ask_miss(state, keys[below.all_held[i + MISSES_AHEAD]])
        source = below.all_held[i]
        if pending[source] != 0:
            continue
        slot = claim(slots, table, counters, state, keys[source], num_copies)
        if slot >= 0:
            above.all_held[num_held + risen] = slot
            above.all_fill[risen] = source
            risen += 1
    missing = below.counts[PLAN_HITS] + below.counts[PLAN_MISSES]
    counters[MISSES] += missing
    counters[BYPASSES] += missing - risen
    above.counts[PLAN_MISSES] = risen
    above.counts[PLAN_HELD] = num_held + risen
    return risen


@lean
def merge(table: Any, slots: Any, rows: Any, where: Any, absent: Any, below: Any, risen: bool) -> None:
    """Write the places of the positions that the device level had not; those of rows that rise are above now."""
    keys = slots["key"]
    num_slots = keys.size
    for i in range(absent.size):
        position = absent[i]
        place = below[i]
        if place >= 0:
            slot = index.find(table, keys, rows[position]) if risen else -1
            place = slot if slot >= 0 else place + num_slots
        where[position] = place
