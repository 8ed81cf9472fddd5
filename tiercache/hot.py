"""Hot sets: a list of the rows that tiers begin with, hottest first; int64 numbers of the store in a .npy file.

Beside an image of the tiers (`warm.py`) it is small, 8 bytes a row, and says nothing of bytes or files: it goes with tables
that were laid out anew, with tiers of another size, with tables that are sources, and may come from another machine or from a
profile. What it costs is to read the rows from their tables again.

Rows are admitted coldest first and pinned until all of them are: so a policy takes the hottest for the newest, and drops none
of them for another. They are read in the order of their numbers, which is that of their addresses, two pieces at a time.
"""

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tiercache.errors import FormatError, StorageError
from tiercache.level import Level, unpin
from tiercache.request import Table
from tiercache.stats import HotSetStats
from tiercache.storage.memory import read_rows
from tiercache.storage.publish import publishing, require_place
from tiercache.storage.reads import Targets
from tiercache.storage.table import failures
from tiercache.warm import begin_with

Rows = npt.NDArray[np.int64]

_PIECE_BYTES = 32 << 20
"""Of a staging area. Two of them keep an engine at its full depth, and the copies out of one hide behind the reads to the
other."""


class Tier(Protocol):
    """What a tier does for this module."""

    level: Level
    stride: int

    def staging(self, num_rows: int) -> npt.NDArray[np.uint8]:
        """A staging area, uint8[num_rows, stride]."""

    def put(self, records: npt.NDArray[np.uint8], slots: npt.NDArray[np.int32]) -> None:
        """Copy records of a staging area to slots, pinned ones. Returns when they are there."""


class Admitted(NamedTuple):
    """Rows int64[n] that have slots int32[n], pinned, whose bytes are not there."""

    rows: Rows
    slots: npt.NDArray[np.int32]


def save(path: Path, levels: Iterable[Level]) -> int:
    """Write the rows of levels, the upper one's first and in each of them those first that were used last; how many.

    StorageError where that cannot be written, or something else than a list of rows is in its place.
    """
    if require_place(path, "a hot set"):
        try:
            read_rows(path)
        except FormatError as error:
            raise StorageError(errno.EEXIST, "is something else than a hot set, and is not overwritten", str(path)) from error
    rows = np.concatenate([_newest_first(level) for level in levels])
    _, first = np.unique(rows, return_index=True)
    rows = rows[np.sort(first)]
    with publishing(path, "a hot set") as descriptor, failures(path), os.fdopen(descriptor, "wb", closefd=False) as file:
        np.save(file, rows)
    return int(rows.size)


def _newest_first(level: Level) -> Rows:
    """Rows in use, without a lock: one that moves meanwhile may be there twice."""
    rows, stamps = level.slots["key"].copy(), level.slots["stamp"].copy()
    used = np.flatnonzero(rows >= 0)
    newest: Rows = rows[used[np.argsort(stamps[used], kind="stable")[::-1]]]
    return newest


def admit(levels: Mapping[str, Level], hot_sets: Mapping[str, Rows]) -> dict[str, Admitted]:
    """Give the hottest rows slots of new levels, the device's first; below it, rows that it has are passed over.

    A level that holds rows already, of an image, is left as it is.
    """
    admitted: dict[str, Admitted] = {}
    for name, level in levels.items():
        if name not in hot_sets or (level.slots["key"] >= 0).any():
            continue
        rows = hot_sets[name]
        for above in admitted.values():
            rows = rows[~np.isin(rows, above.rows)]
        rows = np.ascontiguousarray(rows[: level.capacity][::-1])
        slots = begin_with(level, rows)
        kept = slots >= 0
        admitted[name] = Admitted(rows[kept], slots[kept])
    return admitted


def release(levels: Mapping[str, Level], admitted: Mapping[str, Admitted]) -> None:
    """Let go of the slots of what was admitted."""
    for name, (_, slots) in admitted.items():
        unpin(levels[name].slots, levels[name].counters, slots)


def load(tiers: Mapping[str, Tier], hot_sets: Mapping[str, Rows], tables: Iterable[Table]) -> tuple[HotSetStats, ...]:
    """Begin new tiers with hot sets, in range and without duplicates; what that took.

    StorageError where rows could not be read; then the tiers are of no use any more.
    """
    levels = {name: tier.level for name, tier in tiers.items()}
    tables = tuple(tables)
    admitted = admit(levels, hot_sets)
    loaded = []
    for name, rows in admitted.items():
        begin = time.monotonic()
        _read(tiers[name], rows, tables)
        loaded.append(HotSetStats(name, int(rows.rows.size), time.monotonic() - begin))
    release(levels, admitted)
    return tuple(loaded)


def _read(tier: Tier, admitted: Admitted, tables: Iterable[Table]) -> None:
    """Read rows to their slots."""
    order = np.argsort(admitted.rows)
    rows, slots = admitted.rows[order], admitted.slots[order]
    piece = max(1, min(_PIECE_BYTES // tier.stride, rows.size))
    staging = deque(tier.staging(piece) for _ in range(2))
    for area in staging:
        area[:] = 0  # a slot is as wide as the widest record, and is saved whole
    underway: deque[Callable[[], npt.NDArray[np.uint8]]] = deque()
    for table in tables:
        first, end = np.searchsorted(rows, (table.base, table.base + table.num_rows)).tolist()
        for begin in range(first, end, piece):
            part = slice(begin, min(begin + piece, end))
            if not staging:
                staging.append(underway.popleft()())
            underway.append(_begin(tier, table, rows[part] - table.base, slots[part], staging.popleft()))
    for finish in underway:
        finish()


def _begin(
    tier: Tier, table: Table, rows: Rows, slots: npt.NDArray[np.int32], area: npt.NDArray[np.uint8]
) -> Callable[[], npt.NDArray[np.uint8]]:
    """Begin to read rows of a table to a staging area; what waits for them, brings them to their slots and returns the area."""
    targets = Targets(0, 0, area.ctypes.data, tier.stride, 0, 0)
    places = ~np.arange(rows.size, dtype=np.int32)
    try:
        job = table.reader.submit(rows, places, _NO_ROWS, targets, 0, (area,))
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno or errno.EIO, f"reads of table {table.name!r} cannot be begun: {error}") from error

    def finish() -> npt.NDArray[np.uint8]:
        job.wait()
        table.reader.raise_error(job)
        tier.put(area[: rows.size], slots)
        return area

    return finish


_NO_ROWS = np.empty(0, np.int64)
