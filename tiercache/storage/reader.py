"""Readers: what brings missing rows to their places, without the caller waiting. One for file tables, one for sources."""

import errno
import itertools
import os
import threading
import time
from heapq import heappop, heappush
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tiercache.errors import ClosedError, StorageError
from tiercache.native import broadcast, jit, load8, lock, memcpy, store8, store64, unlock
from tiercache.source import Source
from tiercache.storage import queue as q
from tiercache.storage.checksum import PAGE_BYTES
from tiercache.storage.engine import Engine
from tiercache.storage.files import OpenFiles
from tiercache.storage.reads import FILE_BITS, Files, Layout, Targets, addresses, plan_reads

_NO_RECORDS = np.empty((0, 0), np.uint8)
_IDLE_S = 1.0
"""How long a source's thread sleeps before it looks again, in case that what should wake it ran in its own thread."""


class Job(NamedTuple):
    """Reads on their way. `memory` is what they are planned in; the one who reads holds it as long as it is used."""

    queue: q.Queue
    result: npt.NDArray[np.int64]
    serial: int
    memory: tuple[Any, ...]
    task: "_Task | None" = None

    @property
    def done(self) -> bool:
        """Whether every read has landed or failed."""
        return bool(self.result[q.DONE])

    @property
    def succeeded(self) -> bool:
        """Whether it is done and no read of it has failed."""
        return self.done and not self.result[q.ERRNO]

    def cancel(self) -> None:
        """Give up what has not begun."""
        if self.task is None:
            q.cancel(self.queue, self.serial)
        else:
            self.task.give_up()

    def wait(self) -> None:
        """Wait until done. Signals are handled every 0.1 s."""
        if self.done:
            return
        if self.task is None:
            q.hasten(self.queue, self.serial)
        else:
            self.task.hasten()
        while not q.wait_done(self.queue, self.result):
            pass

    def end(self) -> None:
        """`cancel`, and wait for the rest, whatever interrupts: afterwards nothing of the job goes on."""
        while not self.done:
            try:
                self.cancel()
                q.wait_done(self.queue, self.result)
            except BaseException:
                continue


class Reader(Protocol):
    """Brings rows of one table to places of a tier."""

    num_reads: int
    """Pieces that one record comes in: what a slot's flag counts down from."""

    def submit(
        self,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int64],
        targets: Targets,
        deadline_ns: int,
        alive: tuple[Any, ...] = (),
    ) -> Job:
        """Begin to read rows of the table to distinct places; `wanted` rows are being read for another job already.

        `alive` is what owns the memory of the targets: it is held until the job is done. OSError or ClosedError where
        nothing can be begun. Whatever this raises, a signal's exception too, nothing of the job goes on afterwards.
        """

    def raise_error(self, job: Job) -> None:
        """StorageError if a read of a job that is done has failed, or its files have changed meanwhile."""

    def brought(self, job: Job) -> bool:
        """Whether `raise_error` would not raise."""


class FileReader:
    """Reads a file table through an engine's queue."""

    def __init__(
        self, layout: Layout, files: Files, open_files: OpenFiles, engine: Engine, alignment: int, slot_bytes: int
    ) -> None:
        self.num_reads = len(layout.fields) - 1
        self._layout, self._files, self._open = layout, files, open_files
        self._engine, self._alignment, self._slot_bytes = engine, alignment, slot_bytes

    def submit(
        self,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int64],
        targets: Targets,
        deadline_ns: int,
        alive: tuple[Any, ...] = (),
    ) -> Job:
        reads, pieces = plan_reads(
            self._layout, self._files, rows, places, targets, self._alignment, self._slot_bytes
        )
        wanted_at = np.empty(wanted.size, np.int64)
        if wanted.size:
            addresses(self._layout, wanted, wanted_at)
        memory, result = (reads, pieces, wanted_at), np.zeros(8, np.int64)
        queue, underway = self._engine.queue, self._engine.underway
        try:
            underway.hold(result, (memory, alive))
            while (serial := q.submit(queue, reads, pieces, wanted_at, result, deadline_ns)) == 0:
                q.wait_any(queue)
            if serial < 0:
                raise OSError(-serial, os.strerror(-serial))
            self._engine.wake()
            return Job(queue, result, serial, memory)
        except BaseException:
            if result[q.QUEUED]:
                Job(queue, result, int(result[q.QUEUED]), memory).end()
            underway.release(result)
            raise

    def raise_error(self, job: Job) -> None:
        self._engine.underway.release(job.result)
        reads = job.memory[0]
        number = int(job.result[q.ERRNO])
        if number:
            at, length = int(job.result[q.FAILED_AT]), int(job.result[q.FAILED_LENGTH])
            path, offset = self._open.files[at >> FILE_BITS].path, at & ((1 << FILE_BITS) - 1)
            if number == q.EUCLEAN:
                page = offset // PAGE_BYTES + int(job.result[q.BAD_PAGE])
                what = f"page {page} does not match its checksum"
            elif number == q.ESTALE:
                self._open.require_unchanged([at >> FILE_BITS])
                what = "the file changed while it was read"
            elif number == q.ENODATA:
                what = "the file ends too soon: it shrank since it was opened"
            else:
                what = os.strerror(number)
            failed = int(job.result[q.FAILED_READS])
            raise StorageError(
                number, f"{what} (read of {length} bytes at offset {offset}; {failed} of {len(reads)} reads failed)", str(path)
            )
        self._open.require_unchanged(q.files_of(reads))
        if job.memory[2].size:
            self._open.require_unchanged(np.unique(job.memory[2] >> FILE_BITS).tolist())

    def brought(self, job: Job) -> bool:
        try:
            self.raise_error(job)
        except OSError:
            return False
        return True


class _Task:
    """One read of a source. Holds all memory that it writes until it is done."""

    __slots__ = ("alive", "begun", "due_ns", "error", "places", "reader", "result", "rows", "targets")

    def __init__(
        self,
        reader: "SourceReader",
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int32],
        targets: Targets,
        due_ns: int,
        alive: tuple[Any, ...],
    ) -> None:
        self.reader = reader
        self.rows, self.places, self.targets, self.alive = rows, places, targets, alive
        self.due_ns = due_ns
        self.result = np.zeros(8, np.int64)
        self.begun = False
        self.error: BaseException | None = None

    @property
    def waiting(self) -> bool:
        """Whether it has neither begun nor been given up."""
        return not self.begun and not self.result[q.DONE]

    def give_up(self) -> None:
        """Fail it with ECANCELED, if it still waits."""
        self.reader._give_up(self)

    def hasten(self) -> None:
        """Somebody waits for it now."""
        self.reader._hasten(self, _fair_ns(self.rows))


def _fair_ns(rows: npt.NDArray[np.int64]) -> int:
    """When a read of these rows is due that somebody waits for: as with files, after a fair time for its length."""
    return time.monotonic_ns() + q.FAIR_NS * rows.size


class SourceReader:
    """Reads a Source in one thread of its own, which begins with the first read: what is due first is read first.

    The thread lets go of the source when it ends, so that nobody does while it reads.
    """

    num_reads = 1

    def __init__(self, source: Source, queue: q.Queue) -> None:
        self._source, self._queue = source, queue
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, _Task]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._closing = self._finished = self._closed_by_itself = False
        self._failure: BaseException | None = None

    def submit(
        self,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int64],
        targets: Targets,
        deadline_ns: int,
        alive: tuple[Any, ...] = (),
    ) -> Job:
        task = _Task(self, rows, places, targets, max(deadline_ns, _fair_ns(rows)), alive)
        job = Job(self._queue, task.result, 0, (rows, places), task)
        try:
            with self._changed:
                self._require_thread()
                self._hasten_holders(wanted, task.due_ns)
                heappush(self._waiting, (task.due_ns, next(self._numbers), task))
                self._changed.notify()
            return job
        except BaseException:
            job.end()
            raise

    def _require_thread(self) -> None:
        """Start the thread, if there is none. ClosedError when closing, OSError where the system gives no thread."""
        if self._closing:
            raise ClosedError("the store was closed meanwhile")
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._serve, name="tiercache-source", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from error

    def _hasten_holders(self, wanted: npt.NDArray[np.int64], due_ns: int) -> None:
        """Let reads that are to bring wanted rows not be due later than who wants them."""
        if wanted.size:
            for _, _, task in list(self._waiting):
                if task.due_ns > due_ns and np.isin(wanted, task.rows).any():
                    self._hasten(task, due_ns)

    def _hasten(self, task: _Task, due_ns: int) -> None:
        with self._changed:
            if task.waiting and due_ns < task.due_ns:
                task.due_ns = due_ns
                heappush(self._waiting, (due_ns, next(self._numbers), task))

    def _give_up(self, task: _Task) -> None:
        with self._changed:
            if task.waiting:
                task.error = OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                _land(self._queue, _NO_RECORDS, task.places, task.targets, task.result, errno.ECANCELED)

    def _serve(self) -> None:
        """The thread: read until closed, then let go of the source."""
        with self._changed:
            if self._thread is not threading.current_thread():
                return
        while self._serve_one():
            pass
        try:
            self._finish()
        except BaseException as error:
            if self._closed_by_itself:
                raise
            self._failure = error
        finally:
            self._ended.set()

    def _serve_one(self) -> bool:
        """Wait for the read that is due first, and do it; False when closing."""
        task = self._next()
        if task is None:
            return False
        records, number = _NO_RECORDS, errno.EIO
        try:
            if task.rows.size:
                records = self._records(task.rows, distinct=task.targets.group == 1)
            number = 0
        except BaseException as error:
            task.error = error
        finally:
            _land(self._queue, records, task.places, task.targets, task.result, number)
        return True

    def _records(self, rows: npt.NDArray[np.int64], *, distinct: bool) -> npt.NDArray[np.uint8]:
        """The source's records of these rows, each of which it is asked for once."""
        wanted, places = (rows, None) if distinct else np.unique(rows, return_inverse=True)
        records = np.empty((wanted.size, self._source.record.record_bytes), np.uint8)
        self._source.read(wanted, records)
        return records if places is None else records[places]

    def _next(self) -> _Task | None:
        with self._changed:
            while not self._closing:
                while self._waiting:
                    task = heappop(self._waiting)[-1]
                    if task.waiting:
                        task.begun = True
                        return task
                self._changed.wait(_IDLE_S)
        return None

    def raise_error(self, job: Job) -> None:
        assert job.task is not None
        error = job.task.error
        if isinstance(error, StorageError) or (error is not None and not isinstance(error, OSError)):
            raise error
        if error is not None:
            raise StorageError(error.errno or errno.EIO, f"the source failed: {error}") from error

    def brought(self, job: Job) -> bool:
        return job.succeeded

    def close(self) -> None:
        """Let the read that was begun land, give up the others, end the thread and let go of the source.

        Called by the thread itself, as when it collects the last reference to a store, this returns at once, and all of it
        is done when the read has landed.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
            if thread is threading.current_thread():
                self._closed_by_itself = True
                return
        if thread is not None and thread.ident is not None:
            self._ended.wait()
            thread.join()
        self._finish()
        if self._failure is not None:
            raise self._failure

    def _finish(self) -> None:
        """Give up what waits and let go of the source, once."""
        with self._changed:
            if self._finished:
                return
            self._finished = True
            for _, _, task in self._waiting:
                self._give_up(task)
            self._waiting.clear()
        self._source.close()


@jit
def _land(queue: Any, records: Any, places: Any, targets: Any, result: Any, errno: int) -> None:
    """Bring a source's records to their places and tell; or tell that none came."""
    num_bytes = records.shape[1]
    for i in range(places.size):
        place = np.int64(places[i])
        target = targets.slots + place * targets.slot_stride
        if place < 0:
            target = targets.staging + ~place * targets.staging_stride
        if errno == 0:
            memcpy(target, records.ctypes.data + i * num_bytes, num_bytes)
    mutex = queue.sync.ctypes.data
    lock(mutex)
    for i in range(places.size):
        place = np.int64(places[i])
        if place >= 0:
            flag = targets.flags + place // targets.group * targets.flag_stride
            left = load8(flag) - 1
            store8(flag, left + (q.FAILED if errno != 0 and left >= 0 else 0))
    result[q.ERRNO] = errno
    store64(result.ctypes.data, 1)
    broadcast(mutex + 128)
    unlock(mutex)
