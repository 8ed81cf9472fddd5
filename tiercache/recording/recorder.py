"""Recorder: writes what a store is asked for to a file, behind the back of whoever asks.

A batch's rows are copied to a tap as it is planned (`tap.py`). A thread looks at what waits there, at the latest after a
second, packs it and writes it (`drain.py`): until the end it takes no lock, not the store's nor Python's. If it is too slow,
whole batches are left out and counted; nobody ever waits. Each block is one write: what a killed process leaves can be read
up to its last whole block.
"""

import errno
import fcntl
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tiercache.errors import ClosedError
from tiercache.recording.blocks import Encoder, RecordedTable, bases_of, end_block, head_block, whole_bytes
from tiercache.recording.drain import BYTES_WRITTEN, CLOSING, DROPPED_BATCHES, DROPPED_ROWS, FILE, INTERVAL_NS, WAKE, drain
from tiercache.stats import RecordingStats
from tiercache.storage.table import failures, storage_error
from tiercache.tap import LOST, LOST_BATCHES, LOST_ROWS, STOPPED, TAKEN_BATCHES, TAKEN_ROWS, TAPS, Tap, chain

Rows = npt.NDArray[np.int64]

INTERVAL_S = 1.0
"""After which what has come together is written, however little it is."""


class _Writer:
    """What the thread has: where batches come from, and where they go. Both descriptors are its own once it runs."""

    def __init__(self, descriptor: int, tap: Tap, bases: Rows, lock: Any) -> None:
        self.descriptor, self.tap, self.bases, self.lock = descriptor, tap, bases, lock
        self.ending = threading.RLock()  # of the next two, and of what `state` says of the end
        self.begun = False
        self.open = True
        self.state = np.zeros(16, np.int64)
        self.state[[FILE, WAKE, INTERVAL_NS]] = descriptor, tap.wake, int(1e9 * INTERVAL_S)
        self.error: OSError | None = None
        self._encoder = Encoder()

    def end(self) -> None:
        """Have the thread write what waits and end. A second time, or where it never began, there is nothing to do."""
        with self.ending:
            self.state[CLOSING] = 1
            if not self.begun:
                self._close()
            elif self.open:
                os.eventfd_write(self.tap.wake, 1)

    def run(self) -> None:
        """The thread."""
        with self.ending:
            if not self.open:
                return
            self.begun = True
        error: OSError | None = None
        try:
            self._write_until_closing()
        except OSError as found:
            error = found
        except MemoryError:
            error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        except BaseException as found:
            error = OSError(errno.EIO, f"the thread that writes it has ended: {found!r}")
            raise
        finally:
            self._give_up(error)
            with self.ending:
                self._close()

    def _close(self) -> None:
        if self.open:
            self.open = False
            os.close(self.tap.wake)
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # a forked child may hold the file open
            os.close(self.descriptor)

    def _write_until_closing(self) -> None:
        self._drain()
        with self.lock:
            self.tap.counts[STOPPED] = 1
        self._drain()
        dropped = self.state[[DROPPED_BATCHES, DROPPED_ROWS]] + self.tap.untold()
        _write_all(self.descriptor, end_block((int(dropped[0]), int(dropped[1]))))
        os.fsync(self.descriptor)

    def _drain(self) -> None:
        """Write what waits until the end is near."""
        memory, tap = self._encoder, self.tap
        result = -1
        while result:
            room = memory.room, memory.lists, memory.places, memory.sequences, memory.words, memory.data
            result = int(drain(tap.address, self.state, tap.rows, self.bases, *room))
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            if result > 0:
                memory.make_room(result)

    def _give_up(self, error: OSError | None) -> None:
        """Record nothing more. What still waits, because it could not be written, counts as left out."""
        with self.lock:
            counts = self.tap.counts
            counts[STOPPED] = 1
            waiting = self.tap.look()
            batches, rows = waiting.batches, waiting.sizes
            taken = waiting.firsts != LOST
            unwritten = np.array([batches[taken].sum(), rows[taken].sum()])
            counts[[TAKEN_BATCHES, TAKEN_ROWS]] -= unwritten
            counts[[LOST_BATCHES, LOST_ROWS]] += unwritten
            self.tap.done(taken.size)
            self.error = error


class Recorder:
    """A recording that goes on until it is closed, or its store is. Made by `Store.record`; a context manager."""

    def __init__(
        self,
        path: Path,
        tables: list[RecordedTable],
        lock: Any,
        recorders: "list[Recorder]",
        counters: Rows,
        require_open: Callable[[], None],
    ) -> None:
        """For `Store.record`, without its lock: a file that is there is read, which takes its time.

        lock, recorders, require_open: the store's; counters: of the level that is asked first.
        """
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
            with lock:
                require_open()
                self._thread.start()
                self._writer.begun = True  # whether it came to run or not: what is recorded from here on, it writes
                recorders.append(self)
                self._connect(recorders)
        except BaseException:
            with lock:
                self._leave()
            self._writer.end()  # which nobody waits for here
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
            written = int(writer.state[BYTES_WRITTEN])
            return RecordingStats(str(self.path), batches, rows, lost_batches, lost_rows, written, error)

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
                _cut(path, descriptor, whole_bytes(path, file, tables))
        _write_all(descriptor, head_block(tables))
        stack.pop_all()
        return descriptor


def _cut(path: Path, descriptor: int, whole: int) -> None:
    """Leave the whole blocks of a file. A RuntimeWarning where there is more."""
    torn = os.fstat(descriptor).st_size - whole
    if torn:
        warnings.warn(
            f"{path}: ends within a block, as one whose process was killed or that was cut; its last {torn} bytes are removed, "
            "and what they held is missing between what was recorded before and what is now",
            RuntimeWarning,
            stacklevel=2,
        )
        os.ftruncate(descriptor, whole)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _finish(process: int, thread: threading.Thread, writer: _Writer) -> None:
    """End the thread, in the process that began it only."""
    if process == os.getpid():
        writer.end()
        if writer.begun and thread is not threading.current_thread():
            thread.join()
