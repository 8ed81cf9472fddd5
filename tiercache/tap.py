"""Tap: the rows of a batch are copied for whoever records them, within the compiled call that plans the batch.

A tap is a ring of rows and a ring of entries, one a batch. Who plans batches fills them, one at a time under the store's lock;
one thread empties them and takes no lock: it looks at what is listed, reads that, and says how far it is done. If there is no
room, whole batches are left out and counted; nobody ever waits.

A batch's rows lie side by side. Where they would pass the end of the ring, and otherwise as soon as they fit in front of
those that wait, they begin at its start: so the part of the ring in use is as small as it can be, and stays in the caches.
"""

import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import (
    PREFETCH_BYTES,
    SYS_WRITE,
    fence,
    int64,
    lean,
    load64,
    memcpy,
    narrow,
    prefetch,
    store64,
    stream_narrow,
    syscall,
)

Rows = npt.NDArray[np.int64]

WORTH_ROWS = 1 << 17
"""Rows that wait and are worth waking the thread for."""

MOST_ROWS = 1 << 22
"""Rows that may wait: 32 MiB of them, or 16; taken page by page as they are needed. No larger batch is taken."""

MOST_BATCHES = 1 << 17
"""Batches that may wait."""

_PAST_CACHES = 256
"""Rows of a batch from which on they are copied past the caches. The fence that this takes costs what a few lines do that
another core has.
"""

LOST = -1
"""In place of a batch's row of the store: batches were left out here."""

TAPS = 8
"""Column of a level's counters: the taps that batches are copied to, as `chain` says, or 0."""

(
    _NEXT, _ROWS_AT, _LIST_AT, _ROW_BYTES, _WAKE, _ONE, _HEAD, _TOP, _ROUND, _SEEN, LOOKED, LISTED, DONE, TAKEN_BATCHES,
    TAKEN_ROWS, LOST_BATCHES, LOST_ROWS, _UNTOLD_BATCHES, _UNTOLD_ROWS, STOPPED,
) = range(20)  # fmt: skip
"""Columns of a tap's counts. The address of the next tap's counts, or 0; those of the rings; bytes of a row in its ring; the
descriptor that wakes the thread, and what is written to it; where the next row goes; where it would have gone when rows last
went to the start, and the entry with which they did; rows that the thread has looked at; entries looked at, listed, and done
with. Of the whole recording, batches and rows taken, and left out; those left out that no entry tells of yet; and whether all
is left out from now on."""

FIRST, SIZE, AT, BATCHES = range(4)
"""Columns of an entry: a row of the batch's table, or LOST; rows; where they are in the ring; batches, more than one only where
they were left out."""


class Waiting(NamedTuple):
    """What waits in a tap: `entries` int64[n, 4], in order."""

    entries: Rows

    @property
    def firsts(self) -> Rows:
        """int64[n]: a row of each batch's table as rows of the store, or LOST."""
        return self.entries[:, FIRST]

    @property
    def sizes(self) -> Rows:
        """int64[n]: rows of each."""
        return self.entries[:, SIZE]

    @property
    def at(self) -> Rows:
        """int64[n]: where each one's rows are in the ring."""
        return self.entries[:, AT]

    @property
    def batches(self) -> Rows:
        """int64[n]: 1, or how many were left out there."""
        return self.entries[:, BATCHES]


class Tap:
    """The rings, and their counts. num_rows: of the store, which decides how wide a row is in the ring."""

    def __init__(self, num_rows: int) -> None:
        self.rows = np.empty(MOST_ROWS, np.int32 if num_rows <= 1 << 31 else np.int64)
        self._list = np.empty((MOST_BATCHES, 4), np.int64)
        self.counts = np.zeros(24, np.int64)
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        columns = [_ROWS_AT, _LIST_AT, _ROW_BYTES, _WAKE, _ONE]
        self.counts[columns] = self.rows.ctypes.data, self._list.ctypes.data, self.rows.itemsize, self.wake, 1
        self.address = self.counts.ctypes.data

    def add(self, first: int, rows: Rows) -> None:
        """A batch of the table that has row `first` of the store. Under the store's lock."""
        _put(self.address, first, rows)

    def look(self) -> Waiting:
        """What waits. The thread's."""
        return Waiting(self._list[np.arange(int(self.counts[DONE]), look(self.address)) % MOST_BATCHES])

    def done(self, count: int) -> None:
        """The thread has read this many more entries, and the rows of those."""
        release(self.address, count)

    def untold(self) -> tuple[int, int]:
        """(batches, rows) left out behind everything listed. When nobody fills the tap any more."""
        return int(self.counts[_UNTOLD_BATCHES]), int(self.counts[_UNTOLD_ROWS])


def chain(taps: list[Tap]) -> int:
    """Let one call fill all of these; what a level's counters hold for that. Under the store's lock."""
    addresses = [tap.address for tap in taps] + [0]
    for tap, following in zip(taps, addresses[1:], strict=True):
        tap.counts[_NEXT] = following
    return addresses[0]


@lean
def approach(address: int) -> None:
    """A chain of taps is filled soon: ask for the memory that this will touch first."""
    while address != 0:
        for line in range(0, 8 * STOPPED, PREFETCH_BYTES):
            prefetch(address + line)
        listed = load64(address + 8 * LISTED)
        prefetch(entry_at(address, listed))
        prefetch(entry_at(address, load64(address + 8 * DONE)))
        ring = load64(address + 8 * _ROWS_AT) + load64(address + 8 * _ROW_BYTES) * load64(address + 8 * _HEAD)
        for line in range(0, 4 * PREFETCH_BYTES, PREFETCH_BYTES):
            prefetch(ring + line)
        address = load64(address + 8 * _NEXT)


@lean
def fill(address: int, rows: Any) -> None:
    """Copy a batch to a chain of taps. One without rows is left to `Tap.add`: nothing tells its table."""
    while address != 0 and rows.size > 0:
        _put(address, int64(rows[0]), rows)
        address = load64(address + 8 * _NEXT)


@lean
def look(address: int) -> int:
    """How many entries are listed, all of which the thread knows of now: only what comes after them wakes it. The thread's."""
    listed = load64(address + 8 * LISTED)
    for number in range(load64(address + 8 * LOOKED), listed):
        entry = entry_at(address, number)
        if load64(entry + 8 * FIRST) != LOST:
            _add(address, _SEEN, load64(entry + 8 * SIZE))
    store64(address + 8 * LOOKED, listed)
    return listed


@lean
def release(address: int, count: int) -> None:
    """This many more entries have been read, and the rows of those. The thread's."""
    store64(address + 8 * DONE, load64(address + 8 * DONE) + count)


@lean
def entry_at(address: int, number: int) -> int:
    """The address of an entry."""
    return load64(address + 8 * _LIST_AT) + 32 * (number % MOST_BATCHES)


@lean
def _put(address: int, first: int, rows: Any) -> None:
    """Copy a batch to a tap, or count it as left out."""
    size = int64(rows.size)
    stopped = load64(address + 8 * STOPPED)
    listed, done = load64(address + 8 * LISTED), load64(address + 8 * DONE)
    waiting, end = load64(address + 8 * TAKEN_ROWS) - load64(address + 8 * _SEEN), listed
    at = int64(_place(address, size, listed, done)) if stopped == 0 else int64(-1)
    if at < 0:
        _add(address, LOST_BATCHES, int64(1))
        _add(address, LOST_ROWS, size)
        _add(address, _UNTOLD_BATCHES, int64(1))
        _add(address, _UNTOLD_ROWS, size)
    else:
        if load64(address + 8 * _UNTOLD_BATCHES) > 0:
            _tell(address, end, at)
            end += 1
        _list(address, end, first, size, at, int64(1))
        end += 1
        target = load64(address + 8 * _ROWS_AT) + load64(address + 8 * _ROW_BYTES) * at
        if load64(address + 8 * _ROW_BYTES) == 4:
            if size < _PAST_CACHES:
                narrow(target, rows.ctypes.data, size)
            else:
                stream_narrow(target, rows.ctypes.data, size)
                fence()
        else:
            memcpy(target, rows.ctypes.data, 8 * size)
        store64(address + 8 * _HEAD, at + size)
        _add(address, TAKEN_BATCHES, int64(1))
        _add(address, TAKEN_ROWS, size)
        store64(address + 8 * LISTED, end)
    if stopped == 0 and (
        at < 0 or waiting < WORTH_ROWS <= waiting + size or listed - done < MOST_BATCHES // 2 <= end - done
    ):  # one that is stopped may have closed its descriptor
        syscall(SYS_WRITE, load64(address + 8 * _WAKE), address + 8 * _ONE, 8, 0, 0, 0)


@lean
def _place(address: int, size: int, listed: int, done: int) -> int:
    """Where a batch's rows go, or -1. Two entries must be free: one may tell of batches left out before.

    Rows that went to the start may be caught between those that waited then: the next go behind these, and nothing goes to the
    start again before they are done with.
    """
    if listed - done + 2 > MOST_BATCHES:
        return -1
    head, tail = load64(address + 8 * _HEAD), int64(-1)
    if listed > done:
        tail = load64(entry_at(address, done) + 8 * AT)
    if tail < 0:
        return 0 if size <= MOST_ROWS else -1
    if head < tail:
        if head + size < tail:
            return head
        head = load64(address + 8 * _TOP)
    elif load64(address + 8 * _ROUND) <= done and size < tail and (head >= 2 * WORTH_ROWS or head + size > MOST_ROWS):
        store64(address + 8 * _TOP, head)
        store64(address + 8 * _ROUND, listed)
        return 0
    return head if head + size <= MOST_ROWS else -1


@lean
def _tell(address: int, listed: int, at: int) -> None:
    """List what was left out."""
    batches, rows = load64(address + 8 * _UNTOLD_BATCHES), load64(address + 8 * _UNTOLD_ROWS)
    _list(address, listed, int64(LOST), rows, at, batches)
    store64(address + 8 * _UNTOLD_BATCHES, 0)
    store64(address + 8 * _UNTOLD_ROWS, 0)


@lean
def _list(address: int, listed: int, first: int, size: int, at: int, batches: int) -> None:
    """Write an entry."""
    entry = entry_at(address, listed)
    store64(entry + 8 * FIRST, first)
    store64(entry + 8 * SIZE, size)
    store64(entry + 8 * AT, at)
    store64(entry + 8 * BATCHES, batches)


@lean
def _add(address: int, column: int, count: int) -> None:
    store64(address + 8 * column, load64(address + 8 * column) + count)
