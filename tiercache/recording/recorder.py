"""Recorder: writes what a store is asked for to a file, behind the back of whoever asks.

A fetch hands over the array of rows that it has made anyway. A thread packs and writes what has come together, at the latest
after a second. If it cannot keep up, whole batches are left out and counted; nobody ever waits for it. Each block is one write:
what a killed process leaves can be read up to its last whole block.
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
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tiercache.recording.blocks import Block, RecordedTable, bases_of, data_block, end_block, head_block, whole_bytes
from tiercache.recording.codec import Packer
from tiercache.stats import RecordingStats
from tiercache.storage.table import failures, storage_error

Rows = npt.NDArray[np.int64]

INTERVAL_S = 1.0
"""After which what has come together is written, however little it is."""

BLOCK_ROWS = 1 << 17
"""Rows that are worth a block: more of them repeat more, and are longer in coming."""

MOST_ROWS = 1 << 22
"""Rows that may wait for the thread, 32 MiB. A batch counts as _BATCH_ROWS more than it has."""

_BATCH_ROWS = 32
_LOST = -1
"""In place of a table's first row: what follows is how many batches and rows were left out here."""


class _Inbox:
    """What waits to be written. Under the store's lock."""

    def __init__(self) -> None:
        self.items: list[tuple[int, Rows]] = []
        self.waiting = self.batches = self.rows = 0
        self.lost_batches = self.lost_rows = 0
        self.lost_before = (0, 0)
        """Of the lost ones, how many the items tell of."""


class Recorder:
    """A recording that goes on until it is closed, or its store is. Made by `Store.record`; a context manager."""

    def __init__(self, path: Path, tables: list[RecordedTable], lock: Any, recorders: "list[Recorder]") -> None:
        """For `Store.record`, under its lock. recorders: those that the store tells."""
        self.path = path
        self._process = os.getpid()
        self._lock, self._recorders = lock, recorders
        self._inbox = _Inbox()
        self._wake, self._progress = threading.Event(), _Progress()
        descriptor = _open(path, tables)
        arguments = (descriptor, bases_of(tables), lock, self._inbox, self._wake, self._progress)
        self._thread = threading.Thread(target=_write, args=arguments, name="tiercache-record", daemon=True)
        self._finalizer = weakref.finalize(self, _finish, self._process, self._thread, self._wake, self._progress)
        self._thread.start()
        recorders.append(self)

    def add(self, base: int, rows: Rows) -> None:
        """Take over the rows of a batch, which nobody changes any more. Under the store's lock."""
        inbox = self._inbox
        cost = rows.size + _BATCH_ROWS
        if inbox.waiting + cost > MOST_ROWS or self._progress.error is not None:
            inbox.lost_batches += 1
            inbox.lost_rows += rows.size
            return
        if inbox.lost_batches != inbox.lost_before[0]:
            _tell_lost(inbox)
        inbox.items.append((base, rows))
        inbox.batches += 1
        inbox.rows += rows.size
        inbox.waiting += cost
        if inbox.waiting >= BLOCK_ROWS > inbox.waiting - cost:
            self._wake.set()

    def stats(self) -> RecordingStats:
        """Counts since it began."""
        with self._lock:
            inbox, progress = self._inbox, self._progress
            return RecordingStats(
                path=str(self.path),
                batches=inbox.batches - progress.failed[0],
                rows=inbox.rows - progress.failed[1],
                dropped_batches=inbox.lost_batches + progress.failed[0],
                dropped_rows=inbox.lost_rows + progress.failed[1],
                bytes_written=progress.bytes_written,
                error=None if progress.error is None else str(progress.error),
            )

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
            if self._progress.error is not None:
                raise storage_error(self._progress.error, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Progress:
    """What the thread has done."""

    def __init__(self) -> None:
        self.bytes_written = 0
        self.failed = (0, 0)
        """(batches, rows) that were taken and could not be written."""
        self.error: OSError | None = None
        self.closing = False


def _tell_lost(inbox: _Inbox) -> None:
    """Note that batches were left out here."""
    lost = inbox.lost_batches - inbox.lost_before[0], inbox.lost_rows - inbox.lost_before[1]
    inbox.items.append((_LOST, np.array(lost)))
    inbox.lost_before = inbox.lost_batches, inbox.lost_rows


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


def _write(
    descriptor: int,
    bases: Rows,
    lock: Any,
    inbox: _Inbox,
    wake: threading.Event,
    progress: _Progress,
) -> None:
    """The thread: write blocks until told to end."""
    packer = Packer()
    closing = False
    while not closing:
        wake.wait(INTERVAL_S)
        wake.clear()
        closing = progress.closing
        with lock:
            items, inbox.items = inbox.items, []
            lost = inbox.lost_batches - inbox.lost_before[0], inbox.lost_rows - inbox.lost_before[1]
            if closing:
                inbox.lost_before = inbox.lost_batches, inbox.lost_rows
        num_taken = 0
        for block in _blocks(items, bases):
            num_taken += block.rows.size + _BATCH_ROWS * block.sizes.size
            _write_block(descriptor, packer, block, progress)
        del items
        with lock:
            inbox.waiting -= num_taken
            if inbox.waiting >= BLOCK_ROWS:
                wake.set()
    try:
        if progress.error is None:
            _write_all(descriptor, end_block(lost))
            os.fsync(descriptor)
    except OSError as error:
        progress.error = error
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the file open
        os.close(descriptor)


def _blocks(items: list[tuple[int, Rows]], bases: Rows) -> Iterator[Block]:
    """What has come together, in blocks of about BLOCK_ROWS rows. A block begins where batches were left out."""
    lost, begin = (0, 0), 0
    told = [at for at, (base, _) in enumerate(items) if base == _LOST]
    for end in (*told, len(items)):
        if end > begin:
            yield from _even_blocks(items[begin:end], bases, lost)
        if end < len(items):
            lost = int(items[end][1][0]), int(items[end][1][1])
        begin = end + 1


def _even_blocks(items: list[tuple[int, Rows]], bases: Rows, lost: tuple[int, int]) -> Iterator[Block]:
    firsts, batches = zip(*items, strict=True)
    sizes = np.fromiter(map(len, batches), np.int64, len(batches))
    tables = np.searchsorted(bases, np.fromiter(firsts, np.int64, len(firsts)))
    number = np.cumsum(sizes + _BATCH_ROWS) // (BLOCK_ROWS + 1)
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), sizes.size]
    for begin, end in pairwise(edges):
        rows = np.concatenate(batches[begin:end])
        if bases.size > 1:
            rows -= np.repeat(bases[tables[begin:end]], sizes[begin:end])
        yield Block(tables[begin:end], sizes[begin:end], rows, lost if begin == 0 else (0, 0))


def _write_block(descriptor: int, packer: Packer, block: Block, progress: _Progress) -> None:
    """Write a block; what cannot be written is counted."""
    if progress.error is None:
        try:
            data = data_block(packer, block)
            _write_all(descriptor, data)
            progress.bytes_written += len(data)
            return
        except OSError as error:
            progress.error = error
    progress.failed = progress.failed[0] + block.sizes.size, progress.failed[1] + block.rows.size


def _finish(process: int, thread: threading.Thread, wake: threading.Event, progress: _Progress) -> None:
    """End the thread, in the process that began it only."""
    if process == os.getpid():
        progress.closing = True
        wake.set()
        if thread is not threading.current_thread():
            thread.join()
