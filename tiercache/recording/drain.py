"""What waits in a tap goes to the file, all within one compiled call, which sleeps when there is nothing to do.

So the thread that records does not need Python's lock: a fetch that came back to Python while it had that lock for some
microseconds had to sleep, which cost more than the copying.
"""

import errno
from typing import Any

from tiercache.native import SYS_PPOLL, SYS_READ, SYS_WRITE, int64, lean, load64, store64, syscall
from tiercache.recording.blocks import encode
from tiercache.tap import AT, BATCHES, DONE, FIRST, LOOKED, LOST, SIZE, WORTH_ROWS, entry_at, look, release

BLOCK_ROWS = WORTH_ROWS
"""Rows that are worth a block: more of them repeat more, and are longer in coming. A larger batch is a block by itself."""

(
    FILE, WAKE, INTERVAL_NS, CLOSING, DROPPED_BATCHES, DROPPED_ROWS, BYTES_WRITTEN, _POLLED, _SECONDS, _NANOSECONDS, _COUNT,
) = range(11)  # fmt: skip
"""Columns of a drain's state, int64. The descriptors of the file and of what wakes the thread; the longest sleep; whether this
is the end; batches and rows that were left out and that no block tells of yet; bytes of the blocks written; memory for the
kernel."""

_POLLIN = 1
_EINTR = -errno.EINTR


@lean
def drain(
    tap: int, state: Any, ring: Any, bases: Any, room: int, lists: Any, places: Any, sequences: Any, words: Any, data: Any
) -> int:
    """Write what waits, again and again. 0 at the end, when all that was listed is written; rows of a block, where that needs
    more `room`; minus errno, where the block that is next could not be written whole.

    tap: its address; ring: of its rows; bases: the row of the store that each table begins with; the rest is an Encoder's.
    """
    result, closing = int64(0), int64(0)
    while result == 0 and closing == 0:
        if load64(state.ctypes.data + 8 * CLOSING) == 0 and load64(tap + 8 * DONE) == load64(tap + 8 * LOOKED):
            _sleep(state)
        closing = load64(state.ctypes.data + 8 * CLOSING)
        listed = look(tap)
        while result == 0 and load64(tap + 8 * DONE) < listed:
            result = _write_next(tap, listed, state, ring, bases, room, lists, places, sequences, words, data)
    return result


@lean
def _sleep(state: Any) -> None:
    """Until woken, or for the interval."""
    at = state.ctypes.data
    state[_POLLED] = state[WAKE] | _POLLIN << 32  # a struct pollfd
    state[_SECONDS], state[_NANOSECONDS] = state[INTERVAL_NS] // 1_000_000_000, state[INTERVAL_NS] % 1_000_000_000
    if syscall(SYS_PPOLL, at + 8 * _POLLED, 1, at + 8 * _SECONDS, 0, 0, 0) > 0:
        syscall(SYS_READ, state[WAKE], at + 8 * _COUNT, 8, 0, 0, 0)


@lean
def _write_next(
    tap: int, listed: int, state: Any, ring: Any, bases: Any, room: int, lists: Any, places: Any, sequences: Any, words: Any,
    data: Any,
) -> int:  # fmt: skip
    """Write the next block, or note that batches were left out. As `drain` returns."""
    number = load64(tap + 8 * DONE)
    entry = entry_at(tap, number)
    if load64(entry + 8 * FIRST) == LOST:
        state[DROPPED_BATCHES] += load64(entry + 8 * BATCHES)
        state[DROPPED_ROWS] += load64(entry + 8 * SIZE)
        release(tap, 1)
        return 0
    count, num_rows = _extent(tap, number, listed)
    if num_rows > room:
        return num_rows
    at = load64(entry + 8 * AT)
    rows = ring[at : at + num_rows]
    _localise(tap, number, count, rows, bases, lists)
    num_bytes = encode(rows, lists[: 2 * count], state[DROPPED_BATCHES], state[DROPPED_ROWS], places, sequences, words, data)
    result = _write(state[FILE], data.ctypes.data, num_bytes)
    if result == 0:
        release(tap, count)
        state[DROPPED_BATCHES], state[DROPPED_ROWS] = 0, 0
        store64(state.ctypes.data + 8 * BYTES_WRITTEN, state[BYTES_WRITTEN] + num_bytes)
    return result


@lean
def _extent(tap: int, number: int, listed: int) -> tuple[int, int]:
    """(batches, rows) of the block that begins with an entry: those whose rows follow one another in the ring."""
    at, end, num_rows = load64(entry_at(tap, number) + 8 * AT), number, int64(0)
    while end < listed:
        entry = entry_at(tap, end)
        size = load64(entry + 8 * SIZE)
        if (
            load64(entry + 8 * FIRST) == LOST
            or load64(entry + 8 * AT) != at + num_rows
            or (num_rows > 0 and num_rows + size > BLOCK_ROWS)
        ):
            break
        num_rows += size
        end += 1
    return end - number, num_rows


@lean
def _localise(tap: int, number: int, count: int, rows: Any, bases: Any, lists: Any) -> None:
    """Rows of the store become rows of their tables. lists: becomes each batch's table and size."""
    at = table = int64(0)
    for i in range(count):
        entry = entry_at(tap, number + i)
        first, size = load64(entry + 8 * FIRST), load64(entry + 8 * SIZE)
        while table + 1 < bases.size and bases[table + 1] <= first:
            table += 1
        while bases[table] > first:
            table -= 1
        lists[2 * i], lists[2 * i + 1] = table, size
        if table > 0:
            for k in range(at, at + size):
                rows[k] -= bases[table]
        at += size


@lean
def _write(file: int, address: int, num_bytes: int) -> int:
    """Write all; 0, or minus errno."""
    written = int64(0)
    while written < num_bytes:
        result = syscall(SYS_WRITE, file, address + written, num_bytes - written, 0, 0, 0)
        if result < 0 and result != _EINTR:
            return result
        if result > 0:
            written += result
    return 0
