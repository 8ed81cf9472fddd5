"""The read queue: every read that is wanted and not yet done, shared by the store's threads and the engine's.

A *job* is one plan's reads. It lies in the caller's memory, as int64 tables that the engine reads by address:

    reads   [n, 10] sorted by AT: one request to the disk each, with the pieces that it brings
    pieces  [p, 4]  bytes within a read, where they go, and whom to tell
    wanted  [w]     AT of bytes that an earlier job is to bring and this one needs too
    result  [8]     what became of it

AT is a linear address over all files (`file << 44 | offset`). `jobs` holds one line a job in progress. The engine takes the
job that is due first. Its clock counts reads, not time, so that order does not depend on how fast the disk is just now: a job
is due after as many reads as it has itself, or as fit before its deadline if that is later. So a small job overtakes a big one
unless that is nearly done, and nothing starves. A job's wanted bytes are taken first, out of the jobs that hold them.

A piece's flag is an int8 count of the pieces that its slot still waits for. It falls by one with each that arrives; a
failure adds FAILED, so that the count stays exact and its sign tells. Completion is told under the mutex, by one condition
variable. Everything here holds the mutex only for bookkeeping, never for a read or a copy, and needs no GIL.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import (
    MUTEX_BYTES,
    broadcast,
    clock_ns,
    int64,
    jit,
    lean,
    load8,
    load64,
    lock,
    memcpy,
    store8,
    store64,
    unlock,
    wait,
)
from tiercache.storage.checksum import PAGE_BYTES, verify_pages
from tiercache.storage.identity import IDENTITY_BYTES, changed

AT, FD, OFFSET, LENGTH, NEEDED, FIRST_PIECE, NUM_PIECES, TAKEN, SUMS, IDENTITY = range(10)
"""Columns of `reads`: LENGTH bytes are asked for, a multiple of the alignment, and the first NEEDED must come (the file may
end behind them); SUMS is the address of the checksums of their pages, or 0; IDENTITY that of what the file must be, or 0."""

READ_COLUMNS, PIECE_COLUMNS = 10, 4

SKIP, NUM_BYTES, TARGET, FLAG = range(4)
"""Columns of `pieces`: bytes of the read before it, its length, the address it goes to, the address of its flag or 0."""

DONE, ERRNO, FAILED_AT, FAILED_LENGTH, FAILED_READS, BAD_PAGE, QUEUED = range(7)
"""Columns of `result`. ERRNO to BAD_PAGE are of the first failure; QUEUED is the serial, once the job has one."""

SERIAL, DUE, READS, NUM_READS, CURSOR, LEFT, PIECES, WANTED, NUM_WANTED, RESULT = range(10)
"""Columns of `jobs`; a line whose SERIAL is 0 is free."""

STOP, NEXT_SERIAL, WATCHERS, READS_DONE, BYTES_READ, ACTIVE, BROKEN, CLOCK = range(8)
"""Columns of `control`: end; last serial; threads that watch flags; reads and bytes done; jobs; fatal errno; reads taken."""

FAILED = -64
"""Added to a flag when one of its pieces could not be read."""

EIO, ECANCELED, EUCLEAN, ENODATA, ESTALE = 5, 125, 117, 61, 116
FAIR_NS = 12_000
"""Time of one read, in ns, by which deadlines become counts of reads."""

SCRATCH_BYTES = 16 + IDENTITY_BYTES
"""What a thread that finishes reads needs beside them."""

MAX_JOBS = 256
_SLICE_NS = 100_000_000


class Queue(NamedTuple):
    """Shared state: `sync` holds the mutex and two condition variables (something to do; something done)."""

    sync: npt.NDArray[np.int64]
    control: npt.NDArray[np.int64]
    jobs: npt.NDArray[np.int64]


def new_queue() -> Queue:
    """An empty queue."""
    return Queue(
        np.zeros(3 * MUTEX_BYTES // 8, np.int64), np.zeros(16, np.int64), np.zeros((MAX_JOBS, 16), np.int64)
    )


@lean
def _mutex(queue: Any) -> int:
    return queue.sync.ctypes.data


@lean
def _work(queue: Any) -> int:
    return queue.sync.ctypes.data + 64


@lean
def _done(queue: Any) -> int:
    return queue.sync.ctypes.data + 128


@lean
def read_at(queue: Any, line: int, read: int) -> int:
    """Address of a read of the job at a line."""
    return queue.jobs[line, READS] + 8 * READ_COLUMNS * read


@lean
def get(entry: int, column: int) -> int:
    """A column of the read or piece at an address."""
    return load64(entry + 8 * column)


@lean
def _pieces(queue: Any, line: int, entry: int) -> tuple[int, int]:
    """(address of the first piece of the read at an address, address behind its last)."""
    first = queue.jobs[line, PIECES] + 8 * PIECE_COLUMNS * get(entry, FIRST_PIECE)
    return first, first + 8 * PIECE_COLUMNS * get(entry, NUM_PIECES)


@lean
def _reason(queue: Any) -> int:
    """The errno of what is refused or given up: what broke the engine, or ECANCELED."""
    return queue.control[BROKEN] if queue.control[BROKEN] != 0 else int64(ECANCELED)


@jit
def submit(queue: Any, reads: Any, pieces: Any, wanted: Any, result: Any, deadline_ns: int) -> int:
    """Queue a job; returns its serial, 0 where the table is full, or minus the errno that broke the engine.

    The arrays must stay alive until result[DONE] is set. `deadline_ns` is of the monotonic clock.
    """
    ahead = max(reads.shape[0], (deadline_ns - clock_ns(np.empty(2, np.int64), 1)) // FAIR_NS)
    serial = 0
    lock(_mutex(queue))
    if queue.control[BROKEN] != 0 or queue.control[STOP] != 0:
        serial = -_reason(queue)
    else:
        for line in range(MAX_JOBS):
            if queue.jobs[line, SERIAL] == 0:
                queue.control[NEXT_SERIAL] += 1
                queue.control[ACTIVE] += 1
                serial = queue.control[NEXT_SERIAL]
                job = queue.jobs[line]
                job[DUE], job[READS], job[NUM_READS] = queue.control[CLOCK] + ahead, reads.ctypes.data, reads.shape[0]
                job[CURSOR], job[LEFT], job[PIECES] = 0, reads.shape[0], pieces.ctypes.data
                job[WANTED], job[NUM_WANTED], job[RESULT] = wanted.ctypes.data, wanted.size, result.ctypes.data
                job[SERIAL] = serial
                result[QUEUED] = serial
                if reads.shape[0] == 0 and wanted.size == 0:
                    _end(queue, line)
                broadcast(_work(queue))
                break
    unlock(_mutex(queue))
    return serial


@lean
def _end(queue: Any, line: int) -> None:
    """A job has no reads left."""
    store64(queue.jobs[line, RESULT] + 8 * DONE, 1)
    queue.jobs[line, SERIAL] = 0
    queue.control[ACTIVE] -= 1
    broadcast(_done(queue))


@lean
def _find_line(queue: Any, serial: int) -> int:
    for line in range(MAX_JOBS):
        if queue.jobs[line, SERIAL] == serial:
            return line
    return -1


@lean
def _most_urgent(queue: Any) -> int:
    """The line of the job that is due first and has something to take, or -1."""
    best, line, left = int64(-1), int64(0), queue.control[ACTIVE]
    while left > 0:
        job = queue.jobs[line]
        if job[SERIAL] != 0:
            left -= 1
            can_take = job[CURSOR] < job[NUM_READS] or job[NUM_WANTED] > 0
            if can_take and (best < 0 or job[DUE] < queue.jobs[best, DUE]):
                best = line
        line += 1
    return best


@lean
def _holder(queue: Any, at: int, asking: int) -> tuple[int, int]:
    """(line, read) of another job's read that is to bring the byte at `at` and is not yet taken, or (-1, -1)."""
    for line in range(MAX_JOBS):
        job = queue.jobs[line]
        if line == asking or job[SERIAL] == 0 or job[CURSOR] >= job[NUM_READS]:
            continue
        low, high = int64(0), job[NUM_READS]
        while low < high:
            middle = (low + high) // 2
            if get(read_at(queue, line, middle), AT) <= at:
                low = middle + 1
            else:
                high = middle
        entry = read_at(queue, line, low - 1)
        if low > 0 and get(entry, TAKEN) == 0 and at < get(entry, AT) + get(entry, LENGTH):
            return int64(line), low - 1
    return int64(-1), int64(-1)


@lean
def take(queue: Any) -> tuple[int, int]:
    """(line, read) of the next read to issue, now taken, or (-1, -1). Holds the mutex."""
    while True:
        line = _most_urgent(queue)
        if line < 0:
            return int64(-1), int64(-1)
        job = queue.jobs[line]
        if job[NUM_WANTED] > 0:
            job[NUM_WANTED] -= 1
            holder, read = _holder(queue, load64(job[WANTED] + 8 * job[NUM_WANTED]), line)
            if job[NUM_WANTED] == 0 and job[LEFT] == 0:
                _end(queue, line)
            if holder < 0:
                continue
            line = holder
        else:
            read = job[CURSOR]
            job[CURSOR] += 1
        entry = read_at(queue, line, read)
        if get(entry, TAKEN) == 0:
            store64(entry + 8 * TAKEN, 1)
            queue.control[CLOCK] += 1
            return int64(line), int64(read)


@lean
def deliver(queue: Any, line: int, read: int, buffer: int) -> None:
    """Copy a read's bytes where its pieces belong. Without the mutex: nobody else touches a taken read."""
    piece, end = _pieces(queue, line, read_at(queue, line, read))
    while piece < end:
        memcpy(get(piece, TARGET), buffer + get(piece, SKIP), get(piece, NUM_BYTES))
        piece += 8 * PIECE_COLUMNS


@lean
def complete(queue: Any, line: int, read: int, errno: int, bad_page: int) -> None:
    """Tell that a read is done, or failed with an errno. Holds the mutex."""
    job = queue.jobs[line]
    entry = read_at(queue, line, read)
    piece, end = _pieces(queue, line, entry)
    while piece < end:
        flag = get(piece, FLAG)
        if flag != 0:
            left = load8(flag) - 1
            if errno != 0 and left >= 0:
                left += FAILED
            store8(flag, left)
        piece += 8 * PIECE_COLUMNS
    if errno != 0:
        result = job[RESULT]
        store64(result + 8 * FAILED_READS, get(result, FAILED_READS) + 1)
        if get(result, ERRNO) == 0:
            store64(result + 8 * ERRNO, errno)
            store64(result + 8 * BAD_PAGE, bad_page)
            store64(result + 8 * FAILED_AT, get(entry, AT))
            store64(result + 8 * FAILED_LENGTH, get(entry, LENGTH))
    else:
        queue.control[READS_DONE] += 1
        queue.control[BYTES_READ] += get(entry, LENGTH)
    job[LEFT] -= 1
    if job[LEFT] == 0 and job[NUM_WANTED] == 0:
        _end(queue, line)
    elif queue.control[WATCHERS] > 0:
        broadcast(_done(queue))


@lean
def finish(queue: Any, line: int, read: int, buffer: int, errno: int, scratch: int) -> None:
    """A taken read has landed in `buffer`, or failed with an errno: check it, copy it out, tell. Without the mutex.

    Bytes of a file that has changed never arrive. scratch: address of SCRATCH_BYTES zeros of the calling thread, whose first
    word it sets to -1 (`look_again`) before reads that land later are finished: one look at a file serves all that landed
    before it.
    """
    bad_page = int64(-1)
    if errno == 0:
        entry = read_at(queue, line, read)
        if get(entry, IDENTITY) != 0 and _changed(entry, scratch):
            errno = ESTALE
        elif get(entry, SUMS) != 0:
            bad_page = int64(verify_pages(buffer, get(entry, NEEDED), PAGE_BYTES, get(entry, SUMS)))
        if bad_page >= 0:
            errno = EUCLEAN
        elif errno == 0:
            deliver(queue, line, read, buffer)
    lock(_mutex(queue))
    complete(queue, line, read, errno, bad_page)
    unlock(_mutex(queue))


@lean
def look_again(scratch: int) -> None:
    """Files may have changed since they were looked at last."""
    store64(scratch, -1)


@lean
def _changed(entry: int, scratch: int) -> bool:
    """Whether the file of a read is not what it was at open; looks once for reads of one file that follow each other."""
    descriptor, identity = get(entry, FD), get(entry, IDENTITY)
    if load64(scratch) != descriptor:
        store64(scratch, descriptor)
        store64(scratch + 8, changed(descriptor, identity, scratch + 16))
    return load64(scratch + 8) != 0


@lean
def _cancel_line(queue: Any, line: int, errno: int) -> None:
    job = queue.jobs[line]
    serial, num_reads = job[SERIAL], job[NUM_READS]
    job[NUM_WANTED] = 0
    job[CURSOR] = num_reads
    if job[LEFT] == 0:
        _end(queue, line)
        return
    for read in range(num_reads):
        if job[SERIAL] == serial and get(read_at(queue, line, read), TAKEN) == 0:
            store64(read_at(queue, line, read) + 8 * TAKEN, 1)
            complete(queue, line, read, errno, -1)


@lean
def cancel(queue: Any, serial: int) -> None:
    """Fail what a job has not begun to read, with ECANCELED. A job that is done is left alone."""
    lock(_mutex(queue))
    line = _find_line(queue, serial)
    if line >= 0 and serial > 0:
        _cancel_line(queue, line, ECANCELED)
    unlock(_mutex(queue))


@lean
def fail_all(queue: Any, errno: int) -> None:
    """Fail what nobody has begun to read, in every job. Holds the mutex."""
    for line in range(MAX_JOBS):
        if queue.jobs[line, SERIAL] != 0:
            _cancel_line(queue, line, errno)


@jit
def hasten(queue: Any, serial: int) -> None:
    """Somebody waits for this job now: it is due after as many reads as are left of it."""
    lock(_mutex(queue))
    line = _find_line(queue, serial)
    if line >= 0 and serial > 0:
        job = queue.jobs[line]
        job[DUE] = min(job[DUE], queue.control[CLOCK] + job[NUM_READS] - job[CURSOR])
    unlock(_mutex(queue))


@jit
def wait_done(queue: Any, result: Any) -> bool:
    """Wait up to 0.1 s for a job to be done; whether it is."""
    scratch = np.empty(2, np.int64)
    address = result.ctypes.data + 8 * DONE
    if load64(address) == 0:
        lock(_mutex(queue))
        if load64(address) == 0:
            wait(_done(queue), _mutex(queue), _SLICE_NS, scratch)
        unlock(_mutex(queue))
    return load64(address) != 0


@jit
def wait_any(queue: Any) -> None:
    """Wait up to 0.1 s for some job to be done."""
    lock(_mutex(queue))
    wait(_done(queue), _mutex(queue), _SLICE_NS, np.empty(2, np.int64))
    unlock(_mutex(queue))


@lean
def _arrived(flags: Any) -> bool:
    for i in range(flags.size):
        left = load8(flags[i])
        if left not in (0, FAILED):
            return False
    return True


@jit
def wait_flags(queue: Any, flags: Any) -> bool:
    """Wait up to 0.1 s until no flag (int64[n], addresses) counts anything any more; whether that is so."""
    scratch = np.empty(2, np.int64)
    if not _arrived(flags):
        lock(_mutex(queue))
        queue.control[WATCHERS] += 1
        until = clock_ns(scratch, 1) + _SLICE_NS
        while not _arrived(flags) and clock_ns(scratch, 1) < until:
            wait(_done(queue), _mutex(queue), _SLICE_NS, scratch)
        queue.control[WATCHERS] -= 1
        unlock(_mutex(queue))
    return _arrived(flags)


@lean
def give_up(queue: Any, errno: int) -> None:
    """The engine's threads have ended, and nobody will read any more: fail what is queued and refuse what comes."""
    lock(_mutex(queue))
    if queue.control[STOP] == 0 and queue.control[BROKEN] == 0:
        queue.control[BROKEN] = errno
    fail_all(queue, _reason(queue))
    unlock(_mutex(queue))


@lean
def stop(queue: Any) -> None:
    """Ask the engine's threads to end once what is in flight has landed."""
    lock(_mutex(queue))
    queue.control[STOP] = 1
    broadcast(_work(queue))
    unlock(_mutex(queue))


def files_of(reads: npt.NDArray[np.int64]) -> list[int]:
    """Numbers of the files that these reads touch."""
    if len(reads) == 0:
        return []
    first, last = int(reads[0, AT]) >> 44, int(reads[-1, AT]) >> 44
    return [first] if first == last else np.unique(reads[:, AT] >> 44).tolist()
