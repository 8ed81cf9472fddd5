"""Recorder: writes what a store is asked for to a file, behind the back of whoever asks.

A fetch copies its rows to one of two buffers, in one compiled call. A thread takes the buffer, at the latest after a second,
packs it and writes it, without holding Python's lock for more than moments. If a buffer is full before the thread is done with
the other, whole batches are left out and counted; nobody ever waits. Each block is one write: what a killed process leaves can
be read up to its last whole block.
"""

import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean, memcpy, store64
from tiercache.recording.blocks import Block, RecordedTable, bases_of, data_block, end_block, head_block, whole_bytes
from tiercache.recording.codec import Packer
from tiercache.stats import RecordingStats
from tiercache.storage.table import failures, storage_error

Rows = npt.NDArray[np.int64]

INTERVAL_S = 1.0
"""After which what has come together is written, however little it is."""

BLOCK_ROWS = 1 << 17
"""Rows that are worth a block: more of them repeat more, and are longer in coming."""

BUFFER_ROWS = 1 << 22
"""Rows that a buffer has room for, 32 MiB, taken page by page as they are needed. No larger batch is recorded."""

BUFFER_BATCHES = 1 << 17

_LOST = -1
"""In place of a table's first row: this batch was left out."""

_ROWS_AT, _LIST_AT, _USED, _LISTED, _MORE_BATCHES, _MORE_ROWS, _BATCHES, _ROWS, _LOST_BATCHES, _LOST_ROWS, _STOPPED = range(11)
"""Columns of a recorder's counts: addresses of the buffer being filled, its rows and its list; rows and batches in it; batches
and rows left out after all of these. Of the whole recording, batches and rows taken, and left out; and whether everything is
left out from now on."""


class _Buffer(NamedTuple):
    """Batches that wait. Under the store's lock while it is filled, the thread's own afterwards.

    rows     int64[BUFFER_ROWS], rows of the store
    batches  int64[BUFFER_BATCHES, 2]: first row of the table, or _LOST, and number of rows
    """

    rows: Rows
    batches: npt.NDArray[np.int64]


class _Filled(NamedTuple):
    """The part of a buffer in use, and how many (batches, rows) were left out after it."""

    rows: Rows
    batches: npt.NDArray[np.int64]
    more: tuple[int, int]


@lean
def _put(counts: Any, base: int, rows: Any) -> bool:
    """Copy a batch to the buffer, or count it as left out; whether the thread should look."""
    size, used, listed = rows.size, counts[_USED], counts[_LISTED]
    in_list = listed < BUFFER_BATCHES
    taken = in_list and used + size <= BUFFER_ROWS and counts[_STOPPED] == 0
    if in_list:
        store64(counts[_LIST_AT] + 16 * listed, base if taken else int64(_LOST))
        store64(counts[_LIST_AT] + 16 * listed + 8, size)
        counts[_LISTED] = listed + 1
    else:
        counts[_MORE_BATCHES] += 1
        counts[_MORE_ROWS] += size
    if not taken:
        counts[_LOST_BATCHES] += 1
        counts[_LOST_ROWS] += size
        return counts[_STOPPED] == 0
    memcpy(counts[_ROWS_AT] + 8 * used, rows.ctypes.data, 8 * size)
    counts[_USED] = used + size
    counts[_BATCHES] += 1
    counts[_ROWS] += size
    return used < BLOCK_ROWS <= used + size or 2 * listed == BUFFER_BATCHES


class _Inbox:
    """Where batches wait: a buffer that is being filled, and one that was, or is still to be."""

    def __init__(self) -> None:
        self.counts = np.zeros(16, np.int64)
        self._filling, self._spare = _new_buffer(), _new_buffer()
        self._fill(self._filling)
        self.closing = False
        self.bytes_written = 0
        self.error: OSError | None = None

    def take(self) -> _Filled:
        """What is waiting, good until the next call. Under the store's lock."""
        used, listed, *more = self.counts[_USED:_BATCHES].tolist()
        buffer = self._filling
        self._filling, self._spare = self._spare, buffer
        self._fill(self._filling)
        return _Filled(buffer.rows[:used], buffer.batches[:listed], (more[0], more[1]))

    def _fill(self, buffer: _Buffer) -> None:
        self.counts[:_BATCHES] = buffer.rows.ctypes.data, buffer.batches.ctypes.data, 0, 0, 0, 0


def _new_buffer() -> _Buffer:
    return _Buffer(np.empty(BUFFER_ROWS, np.int64), np.empty((BUFFER_BATCHES, 2), np.int64))


class Recorder:
    """A recording that goes on until it is closed, or its store is. Made by `Store.record`; a context manager."""

    def __init__(self, path: Path, tables: list[RecordedTable], lock: Any, recorders: "list[Recorder]") -> None:
        """For `Store.record`, under its lock. recorders: those that the store tells."""
        self.path = path
        self._process = os.getpid()
        self._lock, self._recorders = lock, recorders
        self._inbox, self._wake = _Inbox(), threading.Event()
        self._counts = self._inbox.counts
        descriptor = _open(path, tables)
        arguments = (descriptor, bases_of(tables), lock, self._inbox, self._wake)
        self._thread = threading.Thread(target=_write, args=arguments, name="tiercache-record", daemon=True)
        self._finalizer = weakref.finalize(self, _finish, self._process, self._thread, self._wake, self._inbox)
        try:
            self._thread.start()
        except BaseException:
            self._finalizer.detach()
            os.close(descriptor)
            raise
        recorders.append(self)

    def add(self, base: int, rows: Rows) -> None:
        """Record a batch of the table that begins with row `base` of the store. Under the store's lock."""
        if _put(self._counts, base, rows):
            self._wake.set()

    def stats(self) -> RecordingStats:
        """Counts since it began."""
        inbox = self._inbox
        with self._lock:
            batches, rows, lost_batches, lost_rows = inbox.counts[_BATCHES:_STOPPED].tolist()
            error = None if inbox.error is None else str(inbox.error)
            return RecordingStats(str(self.path), batches, rows, lost_batches, lost_rows, inbox.bytes_written, error)

    def close(self) -> None:
        """Write what is waiting, and end the recording. A second close does nothing.

        StorageError where something could not be written: the recording then ends with the last block before it.
        """
        if self._process != os.getpid():
            self._finalizer.detach()
            return
        with self._lock:
            if self in self._recorders:
                self._recorders.remove(self)
        if self._finalizer.alive:
            self._finalizer()
            if self._inbox.error is not None:
                raise storage_error(self._inbox.error, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path, tables: list[RecordedTable]) -> int:
    """Descriptor of a file that ends with this recording's head; a new one, or one of the same tables.

    StorageError where it cannot be written or somebody records to it, FormatError where it is something else.
    """
    with ExitStack() as stack, failures(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(errno.EBUSY, "another store records to it") from error
        if os.fstat(descriptor).st_size:
            with open(path, "rb") as file:
                os.ftruncate(descriptor, whole_bytes(path, file, tables))
        _write_all(descriptor, head_block(tables))
        stack.pop_all()
        return descriptor


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _write(descriptor: int, bases: Rows, lock: Any, inbox: _Inbox, wake: threading.Event) -> None:
    """The thread: write blocks until told to end."""
    packer, lost, closing = Packer(), (0, 0), False
    while not closing:
        wake.wait(INTERVAL_S)
        wake.clear()
        closing = inbox.closing
        with lock:
            filled = inbox.take()
        for block in _blocks(filled, bases, lost):
            lost = (0, 0) if block.sizes.size else block.dropped
            if block.sizes.size:
                _write_block(descriptor, packer, block, inbox, lock)
        with lock:
            if inbox.counts[_USED] >= BLOCK_ROWS:
                wake.set()
    try:
        if inbox.error is None:
            _write_all(descriptor, end_block(lost))
            os.fsync(descriptor)
    except OSError as error:
        inbox.error = error
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the file open
        os.close(descriptor)


def _blocks(filled: _Filled, bases: Rows, lost: tuple[int, int]) -> Iterator[Block]:
    """What was waiting, in blocks of about BLOCK_ROWS rows; a block begins where batches were left out.

    lost: batches and rows that were left out before all. The last block has no batches, if some were left out at the end.
    """
    begin = at = 0
    firsts, all_sizes = filled.batches.T
    for end in (*np.flatnonzero(firsts == _LOST).tolist(), firsts.size):
        sizes = np.ascontiguousarray(all_sizes[begin:end])
        ends = at + np.cumsum(sizes)
        tables = np.searchsorted(bases, firsts[begin:end])
        number = (ends - at + np.arange(sizes.size)) // (BLOCK_ROWS + 1)
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), sizes.size]
        for first, last in pairwise(edges if sizes.size else [0]):
            rows = filled.rows[at : ends[last - 1]]
            if bases.size > 1:
                rows = rows - np.repeat(bases[tables[first:last]], sizes[first:last])
            yield Block(tables[first:last], sizes[first:last], rows, lost)
            lost, at = (0, 0), int(ends[last - 1])
        if end < firsts.size:
            lost = lost[0] + 1, lost[1] + int(all_sizes[end])
        begin = end + 1
    lost = lost[0] + filled.more[0], lost[1] + filled.more[1]
    if lost[0]:
        yield Block(_NONE, _NONE, _NONE, lost)


_NONE = np.empty(0, np.int64)


def _write_block(descriptor: int, packer: Packer, block: Block, inbox: _Inbox, lock: Any) -> None:
    """Write a block. What cannot be written counts as left out, and so does all that comes."""
    if inbox.error is None:
        try:
            data = data_block(packer, block)
            _write_all(descriptor, data)
            inbox.bytes_written += len(data)
            return
        except OSError as error:
            inbox.error = error
    with lock:
        inbox.counts[_STOPPED] = 1
        taken = np.array([block.sizes.size, block.rows.size])
        inbox.counts[_BATCHES:_LOST_BATCHES] -= taken
        inbox.counts[_LOST_BATCHES:_STOPPED] += taken


def _finish(process: int, thread: threading.Thread, wake: threading.Event, inbox: _Inbox) -> None:
    """End the thread, in the process that began it only."""
    if process == os.getpid():
        inbox.closing = True
        wake.set()
        if thread is not threading.current_thread():
            thread.join()
