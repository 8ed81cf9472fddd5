"""io_uring, driven from compiled code: one thread, one ring, no GIL, no copy but the one out of the bounce buffer.

The ring lies in memory shared with the kernel: entries are written as int64 words, published with a release store of the
tail, and completions are read after an acquire load of theirs. The thread sleeps in the kernel only; a new job wakes it
through an eventfd on which the ring itself keeps a read pending. The entry layouts are those of <linux/io_uring.h>.

Buffers are registered with the kernel where the limit of locked memory allows it, which saves about a seventh of the CPU.
"""

import mmap
import os
import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import (
    SYS_IO_URING_ENTER,
    SYS_IO_URING_REGISTER,
    SYS_IO_URING_SETUP,
    int64,
    lean,
    load32,
    lock,
    store32,
    syscall,
    unlock,
)
from tiercache.storage.engine import Underway, aligned_buffer
from tiercache.storage.queue import (
    BROKEN,
    ECANCELED,
    EIO,
    ENODATA,
    FD,
    LENGTH,
    NEEDED,
    OFFSET,
    SCRATCH_BYTES,
    STOP,
    Queue,
    complete,
    fail_all,
    finish,
    get,
    give_up,
    look_again,
    read_at,
    stop,
    take,
)

_READ, _READ_FIXED = 22, 4
_COOP_TASKRUN = 1 << 8
_GETEVENTS = 1
_REGISTER_BUFFERS = 0
_EVENT = 1 << 32
_EINTR, _EAGAIN, _EBUSY = 4, 11, 16


class Ring(NamedTuple):
    """What the serving loop needs, all in mapped or owned memory.

    words   int64[8]        ring descriptor, addresses of the SQ tail and CQ head and tail, opcode, buffer and its slot bytes,
                            event descriptor
    entries int64[n, 8]     submission queue entries
    events  int64[m, 2]     completion queue entries
    slots   int64[n, 4]     per bounce slot: line, read, bytes landed, bytes needed
    free    int64[n]        stack of free bounce slots
    counter uint64[1]       where the pending read of the eventfd lands
    looked  uint8[SCRATCH_BYTES]
    """

    words: npt.NDArray[np.int64]
    entries: npt.NDArray[np.int64]
    events: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    free: npt.NDArray[np.int64]
    counter: npt.NDArray[np.uint64]
    looked: npt.NDArray[np.uint8]


_FILE, _SQ_TAIL, _CQ_HEAD, _CQ_TAIL, _OPCODE, _BUFFER, _SLOT_BYTES, _WAKE = range(8)
_LINE, _WHICH, _LANDED, _NEEDED = range(4)


class UringEngine:
    """`depth` reads in flight at most, each of up to `slot_bytes`; `alignment` is that of O_DIRECT, 1 without it.

    Raises OSError where the kernel refuses a ring.
    """

    name = "uring"
    notes: tuple[str, ...] = ()

    def __init__(self, queue: Queue, depth: int, slot_bytes: int, alignment: int) -> None:
        self.queue = queue
        self.underway = Underway()
        self._alignment = alignment
        self._buffer = aligned_buffer(depth * slot_bytes)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="tiercache-uring", daemon=True)
        self._file = -1
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._map_ring(depth)
            opcode = _READ_FIXED if self._register_buffer() else _READ
            self._ring.words[_OPCODE :] = (opcode, self._buffer.ctypes.data, slot_bytes, self._wake)
        except BaseException:
            self._close_descriptors()
            raise

    def _map_ring(self, depth: int) -> None:
        parameters = np.zeros(30, np.uint32)
        entries = depth + 1
        for parameters[2] in (_COOP_TASKRUN, 0):
            self._file = syscall(SYS_IO_URING_SETUP, entries, parameters.ctypes.data, 0, 0, 0, 0)
            if self._file != -22:
                break
        if self._file < 0:
            raise OSError(-self._file, f"io_uring_setup: {os.strerror(-self._file)}")
        num_submit, num_complete = int(parameters[0]), int(parameters[1])
        submit_at, complete_at = parameters[10:20].astype(np.int64), parameters[20:30].astype(np.int64)
        ring_bytes = int(max(submit_at[6] + 4 * num_submit, complete_at[5] + 16 * num_complete))
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._maps = (
            mmap.mmap(self._file, ring_bytes, flags=flags, offset=0),
            mmap.mmap(self._file, 64 * num_submit, flags=flags, offset=0x10000000),
        )
        shared = np.frombuffer(self._maps[0], np.uint8)
        base = shared.ctypes.data
        shared[submit_at[6] : submit_at[6] + 4 * num_submit].view(np.uint32)[:] = np.arange(num_submit)
        words = np.zeros(8, np.int64)
        words[:4] = (self._file, base + submit_at[1], base + complete_at[0], base + complete_at[1])
        self._ring = Ring(
            words,
            np.frombuffer(self._maps[1], np.int64).reshape(num_submit, 8),
            shared[complete_at[5] : complete_at[5] + 16 * num_complete].view(np.int64).reshape(num_complete, 2),
            np.zeros((depth, 4), np.int64),
            np.arange(depth, dtype=np.int64),
            np.zeros(1, np.uint64),
            np.zeros(SCRATCH_BYTES, np.uint8),
        )

    def _register_buffer(self) -> bool:
        vector = np.array([self._buffer.ctypes.data, self._buffer.nbytes], np.int64)
        return syscall(SYS_IO_URING_REGISTER, self._file, _REGISTER_BUFFERS, vector.ctypes.data, 1, 0, 0) == 0

    def start(self) -> None:
        self._thread.start()

    def _serve(self) -> None:
        try:
            serve(self.queue, self._ring, self._alignment)
        finally:
            give_up(self.queue, EIO)

    def wake(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        stop(self.queue)
        self.wake()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        for descriptor in (self._file, self._wake):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._wake = -1


@lean
def _prepare(ring: Any, tail: int, opcode: int, descriptor: int, offset: int, address: int, length: int, mark: int) -> None:
    """Write the submission entry at `tail`."""
    entry = ring.entries[tail & (ring.entries.shape[0] - 1)]
    entry[0] = opcode | (descriptor << 32)
    entry[1] = offset
    entry[2] = address
    entry[3] = length
    entry[4] = mark
    entry[5] = 0
    entry[6] = 0
    entry[7] = 0


@lean
def _issue(queue: Any, ring: Any, slot: int, tail: int) -> None:
    """Write the entry that reads what is left of a slot's read."""
    place = ring.slots[slot]
    entry, landed = read_at(queue, place[_LINE], place[_WHICH]), place[_LANDED]
    words = ring.words
    _prepare(
        ring,
        tail,
        words[_OPCODE],
        get(entry, FD),
        get(entry, OFFSET) + landed,
        words[_BUFFER] + slot * words[_SLOT_BYTES] + landed,
        get(entry, LENGTH) - landed,
        slot,
    )


@lean
def serve(queue: Any, ring: Any, alignment: int) -> None:
    """Serve the queue until it is stopped and nothing is in flight."""
    mutex = queue.sync.ctypes.data
    words, slots, free = ring.words, ring.slots, ring.free
    depth = int64(slots.shape[0])
    num_free = depth
    tail = int64(load32(words[_SQ_TAIL]))
    head = int64(load32(words[_CQ_HEAD]))
    unsubmitted = int64(0)
    armed = stopping = False
    while True:
        if not armed:
            _prepare(ring, tail, _READ, words[_WAKE], 0, ring.counter.ctypes.data, 8, _EVENT)
            tail, unsubmitted, armed = tail + 1, unsubmitted + 1, True
        lock(mutex)
        if queue.control[STOP] != 0 or queue.control[BROKEN] != 0:
            stopping = True
            fail_all(queue, ECANCELED)
        while num_free > 0:
            line, read = take(queue)
            if line < 0:
                break
            num_free -= 1
            slot = free[num_free]
            slots[slot, _LINE], slots[slot, _WHICH], slots[slot, _LANDED] = line, read, 0
            slots[slot, _NEEDED] = get(read_at(queue, line, read), NEEDED)
            _issue(queue, ring, slot, tail)
            tail, unsubmitted = tail + 1, unsubmitted + 1
        unlock(mutex)
        in_flight = depth - num_free
        if stopping and in_flight == 0:
            return
        store32(words[_SQ_TAIL], tail)
        wanted = max(int64(1), min(in_flight // 4, 8))
        result = int64(syscall(SYS_IO_URING_ENTER, words[_FILE], unsubmitted, wanted, _GETEVENTS, 0, 0))
        if result >= 0:
            unsubmitted -= result
        elif -result not in (_EINTR, _EAGAIN, _EBUSY):
            _give_up(queue, ring, -result, num_free)
            return
        end = int64(load32(words[_CQ_TAIL]))
        look_again(ring.looked.ctypes.data)
        while head != end:
            event = ring.events[head & (ring.events.shape[0] - 1)]
            mark, result = event[0], (event[1] & 0x7FFFFFFF) - (event[1] & 0x80000000)
            head = (head + 1) & 0xFFFFFFFF
            if mark == _EVENT:
                armed = False
                continue
            if _landed(queue, ring, mark, result, alignment):
                _issue(queue, ring, mark, tail)
                tail, unsubmitted = tail + 1, unsubmitted + 1
            else:
                free[num_free] = mark
                num_free += 1
        store32(words[_CQ_HEAD], head)


@lean
def _landed(queue: Any, ring: Any, slot: int, result: int, alignment: int) -> bool:
    """Take a completion; True where the read must be issued again for the rest of it."""
    place = ring.slots[slot]
    line, read = place[_LINE], place[_WHICH]
    buffer = ring.words[_BUFFER] + slot * ring.words[_SLOT_BYTES]
    if result in (-_EINTR, -_EAGAIN):
        return True
    if result < 0:
        finish(queue, line, read, buffer, -result, ring.looked.ctypes.data)
        return False
    if place[_LANDED] + result >= place[_NEEDED]:
        finish(queue, line, read, buffer, 0, ring.looked.ctypes.data)
        return False
    step = result - result % alignment
    if step == 0:
        finish(queue, line, read, buffer, ENODATA, ring.looked.ctypes.data)
        return False
    place[_LANDED] += step
    return True


@lean
def _give_up(queue: Any, ring: Any, errno: int, num_free: int) -> None:
    """The kernel refuses the ring: fail everything. The bounce buffer stays alive, since reads may yet land in it."""
    for i in range(num_free):
        ring.slots[ring.free[i], _LINE] = -1
    lock(queue.sync.ctypes.data)
    queue.control[BROKEN] = errno
    for slot in range(ring.slots.shape[0]):
        if ring.slots[slot, _LINE] >= 0:
            complete(queue, ring.slots[slot, _LINE], ring.slots[slot, _WHICH], errno, -1)
    fail_all(queue, errno)
    unlock(queue.sync.ctypes.data)
