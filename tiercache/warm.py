"""Warm restart: the tiers of a store are saved to an image while it serves, and the next store begins with them.

Saving goes piece by piece, each for a moment under the store's lock: its slots are pinned, so that nobody overwrites them,
copied without the lock, and let go. Slots whose bytes are on their way are left out. The order is that of their last use, the
oldest first, and a restore admits them in this order: so a policy finds them as old as they were, and of an image that is too
large for the tier the newest rows are taken.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiercache import index
from tiercache.errors import FormatError
from tiercache.level import BATCH, PLAN_HELD, Level, Plan, claim, new_plan, pin, unpin
from tiercache.native import lean, prefetch
from tiercache.storage.image import AboutTable, Part, open_image
from tiercache.storage.image_writer import writing

_AHEAD = 32
_NO_ROW = _NO_SLOT = -1


class Tier(Protocol):
    """What a tier does for this module."""

    level: Level

    def read_slots(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """A copy of slots on the host, uint8[n, stride]. They are pinned, and their bytes are there."""

    def restore(self, part: Part, positions: npt.NDArray[np.int64], slots: npt.NDArray[np.int32]) -> tuple[str, ...]:
        """Read slots positions[i] (ascending) of an image to slots[i]; notes on how. FormatError for a wrong checksum."""


def save(
    path: Path,
    tiers: Mapping[str, Tier],
    tables: list[AboutTable],
    stride: int,
    lock: AbstractContextManager[Any],
    require_open: Callable[[], None],
) -> int:
    """Write an image of the tiers, the device's first; the number of rows in it."""
    orders = {name: _by_age(tier.level) for name, tier in tiers.items()}
    with writing(path, {name: order.size for name, order in orders.items()}, tables, stride) as image:
        for name, tier in tiers.items():
            for first in range(0, orders[name].size, image.piece):
                wanted = orders[name][first : first + image.piece]
                rows, slots = _copy(tier, wanted, lock, require_open)
                image.write(name, first, slots, rows)
        return sum(int(np.count_nonzero(rows >= 0)) for rows in image.rows.values())


def _copy(
    tier: Tier, wanted: npt.NDArray[np.int32], lock: AbstractContextManager[Any], require_open: Callable[[], None]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """(row in each of the wanted slots, int64[n], or -1; the slots, uint8[n, stride], zeros where there is no row)."""
    held = new_plan(wanted.size)
    try:
        with lock:
            require_open()
            rows = _hold(tier.level, wanted, held)
        slots = tier.read_slots(wanted)
        with lock:
            tier.level.release(held)
    except BaseException:  # wherever that came from; to release twice does nothing
        with lock:
            tier.level.release(held)
        raise
    slots[rows < 0] = 0
    return rows, slots


def _by_age(level: Level) -> npt.NDArray[np.int32]:
    """Slots in use, those that were used longest ago first. A guess where the level changes meanwhile; `_hold` looks again."""
    used = np.flatnonzero(level.slots["key"] >= 0).astype(np.int32)
    return used[np.argsort(level.slots["stamp"][used], kind="stable")]


def _hold(level: Level, wanted: npt.NDArray[np.int32], held: Plan) -> npt.NDArray[np.int64]:
    """Pin those of the wanted slots whose bytes are there; the row in each, int64[n], or -1."""
    rows = np.empty(wanted.size, np.int64)
    hold(level.slots, level.counters, wanted, rows, held)
    return rows


@lean
def hold(slots: Any, counters: Any, wanted: Any, rows: Any, held: Plan) -> None:
    """See `_hold`; `held` is room for as many slots."""
    count = 0
    for i in range(wanted.size):
        slot = wanted[i]
        rows[i] = _NO_ROW
        if slots["key"][slot] >= 0 and slots["pending"][slot] == 0:
            rows[i] = slots["key"][slot]
            held.all_held[count] = slot
            count += 1
    pin(slots, counters, held.all_held[:count])
    held.counts[PLAN_HELD] = count


def restore(
    path: Path, tiers: Mapping[str, Tier], tables: list[AboutTable], record_bytes: int, num_rows: int
) -> tuple[str, ...]:
    """Fill new tiers from an image; notes on how. A tier that the image has no part of stays empty.

    FormatError for an image that is damaged or of other tables, StorageError where it cannot be read.
    """
    notes: tuple[str, ...] = ()
    with open_image(path, tables, record_bytes) as parts:
        for name, tier in tiers.items():
            if name in parts:
                notes += _fill(tier, parts[name], num_rows)
    return notes


def _fill(tier: Tier, part: Part, num_rows: int) -> tuple[str, ...]:
    level = tier.level
    if part.rows.size and (part.rows.min() < _NO_ROW or part.rows.max() >= num_rows):
        raise FormatError(f"{part.file.path}: not an image of tiers: it has rows that the tables have not")
    positions = np.flatnonzero(part.rows >= 0)[-level.capacity :]
    slots = begin_with(level, part.rows[positions])
    kept = slots >= 0
    notes = tier.restore(part, positions[kept], slots[kept])
    unpin(level.slots, level.counters, slots[kept])
    return notes


def begin_with(level: Level, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Give each row int64[n], the coldest first and none twice, a slot of a new level, pinned, or -1 where the policy keeps it
    out: int32[n].
    """
    slots = np.empty(rows.size, np.int32)
    adopt(level.slots, level.table, level.counters, level.state, rows, slots)
    if level.policy.rank is not None:
        level.policy.rank(level.state, level.slots["key"], slots[slots >= 0][::-1])
    return slots


@lean
def adopt(slots: Any, table: Any, counters: Any, state: Any, rows: Any, out: Any) -> None:
    """Give each distinct row a slot of a new level, pinned, or -1 where the policy keeps it out. They count as no misses."""
    counters[BATCH] += 1
    for i in range(rows.size):
        if i + _AHEAD < rows.size:
            prefetch(index.address(table, rows[i + _AHEAD]))
        out[i] = _NO_SLOT
        if index.find(table, slots["key"], rows[i]) < 0:
            out[i] = claim(slots, table, counters, state, rows[i], 0)
