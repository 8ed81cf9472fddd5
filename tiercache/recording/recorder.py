"""Recorder: writes what a store is asked for to a file, behind the back of whoever asks.

A batch's rows are copied to a tap as it is planned (`tap.py`). A thread looks at what waits there, at the latest after a
second, packs it and writes it: it takes no lock of the store's, and Python's for moments. If it is too slow, whole batches are
left out and counted; nobody ever waits. Each block is one write: what a killed process leaves can be read up to its last whole
block.
"""

import errno
import fcntl
import os
import select
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tiercache.errors import ClosedError
from tiercache.native import lean
from tiercache.recording.blocks import Block, Encoder, RecordedTable, bases_of, end_block, head_block, whole_bytes
from tiercache.stats import RecordingStats
from tiercache.storage.table import failures, storage_error
from tiercache.tap import (
    LOST,
    LOST_BATCHES,
    LOST_ROWS,
    STOPPED,
    TAKEN_BATCHES,
    TAKEN_ROWS,
    TAPS,
    WORTH_ROWS,
    Tap,
    Waiting,
    chain,
)

Rows = npt.NDArray[np.int64]

INTERVAL_S = 1.0
"""After which what has come together is written, however little it is."""

BLOCK_ROWS = WORTH_ROWS
"""Rows that are worth a block: more of them repeat more, and are longer in coming."""


class _Writer:
    """What the thread has: where batches come from, and where they go. Both descriptors are its own once it runs."""

    def __init__(self, descriptor: int, tap: Tap, bases: Rows, lock: Any) -> None:
        self.descriptor, self.tap, self.bases, self.lock = descriptor, tap, bases, lock
        self.ending = threading.RLock()  # of the next three
        self.running = self.closing = False
        self.open = True
        self.bytes_written = 0
        self.error: OSError | None = None
        self._encoder = Encoder()

    def end(self) -> None:
        """Have the thread write what waits and end. A second time, or where it never began, there is nothing to do."""
        with self.ending:
            self.closing = True
            if not self.running:
                self._close()
            elif self.open:
                os.eventfd_write(self.tap.wake, 1)

    def run(self) -> None:
        """The thread."""
        with self.ending:
            if self.closing:
                return
            self.running = True
        try:
            self._write_until_closing()
        except BaseException as error:
            self.error = self.error or OSError(errno.EIO, f"the thread that writes it has ended: {error!r}")
            raise
        finally:
            with self.lock:
                self.tap.counts[STOPPED] = 1
            with self.ending:
                self._close()

    def _close(self) -> None:
        if self.open:
            self.open = False
            os.close(self.tap.wake)
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # a forked child may hold the file open
            os.close(self.descriptor)

    def _write_until_closing(self) -> None:
        poll = select.poll()
        poll.register(self.tap.wake, select.POLLIN)
        lost, closing = (0, 0), False
        while not closing:
            if poll.poll(1000 * INTERVAL_S):
                os.eventfd_read(self.tap.wake)
            closing = self.closing
            if closing:
                with self.lock:
                    self.tap.counts[STOPPED] = 1
            for block, count in _blocks(self.tap.look(), self.tap.rows, self.bases, lost):
                lost = (0, 0) if block.sizes.size else block.dropped
                if block.sizes.size:
                    self._write(block)
                self.tap.done(count)
        try:
            if self.error is None:
                untold = self.tap.untold()
                _write_all(self.descriptor, end_block((lost[0] + untold[0], lost[1] + untold[1])))
                os.fsync(self.descriptor)
        except OSError as error:
            self.error = error

    def _write(self, block: Block) -> None:
        """Write a block. What cannot be written counts as left out, and so does all that comes."""
        if self.error is None:
            try:
                data = self._encoder.encode(block)
                _write_all(self.descriptor, data.data)
                self.bytes_written += data.size
                return
            except OSError as error:
                self.error = error
            except MemoryError:
                self.error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        with self.lock:
            self.tap.counts[STOPPED] = 1
            self.tap.counts[[TAKEN_BATCHES, TAKEN_ROWS]] -= block.sizes.size, block.rows.size
            self.tap.counts[[LOST_BATCHES, LOST_ROWS]] += block.sizes.size, block.rows.size


class Recorder:
    """A recording that goes on until it is closed, or its store is. Made by `Store.record`; a context manager."""

    def __init__(
        self, path: Path, tables: list[RecordedTable], lock: Any, recorders: "list[Recorder]", counters: Rows
    ) -> None:
        """For `Store.record`, under its lock. recorders: the store's; counters: of the level that is asked first."""
        self.path = path
        self._process = os.getpid()
        self._lock, self._recorders, self._counters = lock, recorders, counters
        self._tap = Tap(sum(table.num_rows for table in tables))
        try:
            descriptor = _open(path, tables)
        except BaseException:
            os.close(self._tap.wake)
            raise
        self._writer = _Writer(descriptor, self._tap, bases_of(tables), lock)
        self._thread = threading.Thread(target=self._writer.run, name="tiercache-record", daemon=True)
        self._finalizer = weakref.finalize(self, _finish, self._process, self._thread, self._writer)
        try:
            self._thread.start()
            recorders.append(self)
            self._connect(recorders)
        except BaseException:
            self._leave()
            self._writer.end()  # which nobody waits for here: the thread needs the lock
            self._finalizer.detach()
            raise

    def _leave(self) -> None:
        """Record nothing more. Under the store's lock."""
        others = [recorder for recorder in self._recorders if recorder is not self]
        self._connect(others)  # first: nobody may fill a tap that nothing keeps alive
        self._recorders[:] = others

    def _connect(self, recorders: "list[Recorder]") -> None:
        """Have the level's batches copied to the taps of these, which the store's list keeps alive. Under the store's lock."""
        self._counters[TAPS] = chain([recorder._tap for recorder in recorders])

    def add(self, base: int, rows: Rows) -> None:
        """Record a batch of the table that begins with row `base` of the store, which the level was not asked for. Under the
        store's lock.
        """
        self._tap.add(base, rows)

    def stats(self) -> RecordingStats:
        """Counts since it began. ClosedError in a process forked since."""
        if self._process != os.getpid():
            raise ClosedError("this recording was begun in another process")
        writer, counts = self._writer, self._tap.counts
        with self._lock:
            batches, rows, lost_batches, lost_rows = counts[TAKEN_BATCHES : LOST_ROWS + 1].tolist()
            error = None if writer.error is None else str(writer.error)
            return RecordingStats(str(self.path), batches, rows, lost_batches, lost_rows, writer.bytes_written, error)

    def close(self) -> None:
        """Write what is waiting, and end the recording. A second close does nothing, unless the first was interrupted.

        StorageError where something could not be written: the recording then ends with the last block before it.
        """
        if self._process != os.getpid():
            self._finalizer.detach()
            return
        with self._lock:
            self._leave()
        if self._finalizer.alive:
            _finish(self._process, self._thread, self._writer)
            self._finalizer.detach()
            if self._writer.error is not None:
                raise storage_error(self._writer.error, self.path)

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


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _blocks(
    waiting: Waiting, ring: npt.NDArray[Any], bases: Rows, lost: tuple[int, int]
) -> Iterator[tuple[Block, int]]:
    """What waits, in blocks of about BLOCK_ROWS rows, each with the number of its entries. One begins where batches were left
    out, and where rows do not follow those before them in the ring.

    lost: batches and rows that were left out before all. A block that only tells of batches left out has none of its own.
    """
    gone, sizes = waiting.firsts == LOST, np.where(waiting.firsts == LOST, 0, waiting.sizes)
    ends = np.cumsum(sizes)
    number = (ends - 1) // BLOCK_ROWS
    begins = gone.copy()
    begins[1:] |= gone[:-1] | (waiting.at[1:] != waiting.at[:-1] + sizes[:-1]) | (np.diff(number) != 0)
    edges = [0, *(np.flatnonzero(begins[1:]) + 1).tolist(), sizes.size]
    tables = np.searchsorted(bases, waiting.firsts, side="right") - 1
    for first, last in pairwise(edges if sizes.size else [0]):
        if gone[first]:
            lost = lost[0] + int(waiting.batches[first]), lost[1] + int(waiting.sizes[first])
            yield Block(_NONE, _NONE, _NONE, lost), 1
            continue
        at = int(waiting.at[first])
        rows = ring[at : at + int(sizes[first:last].sum())]
        if bases.size > 1:
            _localise(rows, sizes[first:last], bases[tables[first:last]])
        yield Block(tables[first:last], sizes[first:last], rows, lost), last - first
        lost = (0, 0)


_NONE = np.empty(0, np.int64)


@lean
def _localise(rows: Any, sizes: Any, bases: Any) -> None:
    """Rows of the store become rows of their tables: batch i has the next sizes[i], of the table that begins with bases[i]."""
    at = 0
    for i in range(sizes.size):
        for k in range(at, at + sizes[i]):
            rows[k] -= bases[i]
        at += sizes[i]


def _finish(process: int, thread: threading.Thread, writer: _Writer) -> None:
    """End the thread, in the process that began it only."""
    if process == os.getpid():
        writer.end()
        if writer.running and thread is not threading.current_thread():
            thread.join()
