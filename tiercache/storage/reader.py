"""Readers: what brings missing rows to their places, without the caller waiting. One for file tables, one for sources."""

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tiercache.errors import StorageError
from tiercache.native import broadcast, jit, load8, lock, memcpy, store8, store64, unlock
from tiercache.source import Source
from tiercache.storage import queue as q
from tiercache.storage.checksum import PAGE_BYTES
from tiercache.storage.engine import Engine
from tiercache.storage.files import OpenFiles
from tiercache.storage.reads import FILE_BITS, Files, Layout, Targets, addresses, plan_reads

_NO_WORDS = np.empty(0, np.int64)


class Job(NamedTuple):
    """Reads on their way. Keeps alive all that the engine's threads touch until `result[DONE]`."""

    queue: q.Queue
    result: npt.NDArray[np.int64]
    serial: int
    memory: tuple[Any, ...]
    future: "Future[None] | None" = None

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
        q.cancel(self.queue, self.serial)

    def wait(self) -> None:
        """Wait until done. Signals are handled every 0.1 s."""
        if not self.done:
            q.hasten(self.queue, self.serial)
            while not q.wait_done(self.queue, self.result):
                pass


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
    ) -> Job:
        """Begin to read distinct rows of the table to their places; `wanted` rows are being read for another job already.

        The targets must stay alive until the job is done. OSError where nothing can be begun.
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
    ) -> Job:
        reads, pieces = plan_reads(
            self._layout, self._files, rows, places, targets, self._alignment, self._slot_bytes
        )
        wanted_at = np.empty(wanted.size, np.int64)
        addresses(self._layout, wanted, wanted_at)
        result = np.zeros(8, np.int64)
        queue = self._engine.queue
        while (serial := q.submit(queue, reads, pieces, wanted_at, result, deadline_ns)) == 0:
            q.wait_any(queue)
        if serial < 0:
            raise OSError(-serial, os.strerror(-serial))
        self._engine.wake()
        return Job(queue, result, serial, (reads, pieces, wanted_at))

    def raise_error(self, job: Job) -> None:
        reads = job.memory[0]
        number = int(job.result[q.ERRNO])
        if number:
            at, length = int(job.result[q.FAILED_AT]), int(job.result[q.FAILED_LENGTH])
            path, offset = self._open.files[at >> FILE_BITS].path, at & ((1 << FILE_BITS) - 1)
            if number == q.EUCLEAN:
                page = offset // PAGE_BYTES + int(job.result[q.BAD_PAGE])
                what = f"page {page} does not match its checksum"
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


class SourceReader:
    """Reads a Source in one thread of its own."""

    num_reads = 1

    def __init__(self, source: Source, queue: q.Queue) -> None:
        self._source, self._queue = source, queue
        self._closing = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tiercache-source")

    def submit(
        self,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int64],
        targets: Targets,
        deadline_ns: int,
    ) -> Job:
        result = np.zeros(8, np.int64)
        future = self._pool.submit(self._read, rows, places, targets, result)
        return Job(self._queue, result, 0, (rows, places), future)

    def _read(
        self, rows: npt.NDArray[np.int64], places: npt.NDArray[np.int32], targets: Targets, result: npt.NDArray[np.int64]
    ) -> None:
        records = np.empty((rows.size, self._source.record.record_bytes), np.uint8)
        number = errno.EIO
        try:
            if self._closing:
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            if rows.size:
                self._source.read(rows, records)
            number = 0
        finally:
            _land(self._queue, records, places, targets, result, number)

    def raise_error(self, job: Job) -> None:
        assert job.future is not None
        error = job.future.exception()
        if isinstance(error, StorageError) or (error is not None and not isinstance(error, OSError)):
            raise error
        if error is not None:
            raise StorageError(error.errno or errno.EIO, f"the source failed: {error}") from error

    def brought(self, job: Job) -> bool:
        return job.succeeded

    def close(self) -> None:
        """End the thread, after the read that was begun, and let go of the source."""
        self._closing = True
        self._pool.shutdown(wait=True, cancel_futures=False)
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
            flag = targets.flags + place * targets.flag_stride
            store8(flag, load8(flag) - 1 + (q.FAILED if errno != 0 else 0))
    result[q.ERRNO] = errno
    store64(result.ctypes.data, 1)
    broadcast(mutex + 128)
    unlock(mutex)
