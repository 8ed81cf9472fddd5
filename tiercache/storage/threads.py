"""pread from many threads: the engine that works everywhere. The threads run compiled code and never hold the GIL."""

import threading
from typing import Any

import numpy as np

from tiercache.native import int64, jit, lean, lock, pread, unlock, wait
from tiercache.storage.engine import Underway, aligned_buffer
from tiercache.storage.queue import (
    ECANCELED,
    ENODATA,
    FD,
    LENGTH,
    NEEDED,
    OFFSET,
    SCRATCH_BYTES,
    STOP,
    Queue,
    fail_all,
    finish,
    get,
    look_again,
    read_at,
    stop,
    take,
)

_EINTR = 4
_IDLE_NS = 1_000_000_000
MAX_THREADS = 64


class ThreadsEngine:
    """`depth` threads (64 at most), each with one read of up to `slot_bytes` in flight."""

    name = "threads"
    notes: tuple[str, ...] = ()

    def __init__(self, queue: Queue, depth: int, slot_bytes: int, alignment: int) -> None:
        self.queue = queue
        self.underway = Underway()
        self._slot_bytes, self._alignment = slot_bytes, alignment
        num_threads = min(depth, MAX_THREADS)
        self._buffer = aligned_buffer(num_threads * slot_bytes)
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), name=f"tiercache-read-{number}", daemon=True)
            for number in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _serve(self, number: int) -> None:
        serve(self.queue, self._buffer.ctypes.data + number * self._slot_bytes, self._alignment)

    def wake(self) -> None:
        """Nothing to do: the threads wait on the queue's own condition variable."""

    def close(self) -> None:
        stop(self.queue)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()


@jit
def serve(queue: Any, buffer: int, alignment: int) -> None:
    """Serve the queue with one bounce buffer until it is stopped."""
    mutex, work = queue.sync.ctypes.data, queue.sync.ctypes.data + 64
    scratch, looked = np.empty(2, np.int64), np.zeros(SCRATCH_BYTES, np.uint8)
    while True:
        lock(mutex)
        line, read = take(queue)
        while line < 0 and queue.control[STOP] == 0:
            wait(work, mutex, _IDLE_NS, scratch)
            line, read = take(queue)
        if queue.control[STOP] != 0:
            fail_all(queue, ECANCELED)
        unlock(mutex)
        if line < 0:
            return
        entry = read_at(queue, line, read)
        errno = _read(get(entry, FD), buffer, get(entry, LENGTH), get(entry, NEEDED), get(entry, OFFSET), alignment)
        look_again(looked.ctypes.data)
        finish(queue, line, read, buffer, errno, looked.ctypes.data)


@lean
def _read(descriptor: int, buffer: int, length: int, needed: int, offset: int, alignment: int) -> int:
    """Read until the needed bytes have come; 0 or an errno."""
    landed = int64(0)
    while landed < needed:
        result = int64(pread(descriptor, buffer + landed, length - landed, offset + landed))
        if result == -_EINTR:
            continue
        if result < 0:
            return -result
        if landed + result < needed and result < alignment:
            return ENODATA
        landed += result if landed + result >= needed else result - result % alignment
    return 0
