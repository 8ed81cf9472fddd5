"""The host tier: a level, its bytes in one buffer of huge pages, and the gather out of it.

`gather` is `torch.cat([slots, staging])[where]` in one pass over places, asking for each record's lines before it copies it.
"""

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.level import Level, Plan
from tiercache.native import PREFETCH_BYTES, copy, fence, int64, lean, prefetch, stream

_AHEAD = 48
_STREAM_BYTES = 2048
_LARGE_BYTES = 4 << 20
"""Outputs from this size on are written past the caches, whose second level they exceed."""


class HostBuffer:
    """`capacity` slots of `slot_bytes` bytes, a multiple of 8. Memory is taken page by page as slots are first filled."""

    def __init__(self, capacity: int, slot_bytes: int) -> None:
        num_bytes = capacity * slot_bytes
        self._map = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._map.madvise(mmap.MADV_DONTFORK)
        self.slots = np.frombuffer(self._map, np.uint8, num_bytes).reshape(capacity, slot_bytes)


@lean
def gather(where: Any, slots: int, slot_stride: int, staging: int, staging_stride: int, out: int, num_bytes: int) -> None:
    """Copy record i from its place where[i] (int32[n]) to out + i * num_bytes. Addresses and strides in bytes."""
    for i in range(where.size):
        _ask(where, i + _AHEAD, slots, slot_stride, num_bytes)
        place = int64(where[i])
        source = slots + place * slot_stride if place >= 0 else staging + ~place * staging_stride
        copy(out + i * num_bytes, source, num_bytes)


@lean
def gather_streaming(
    where: Any, slots: int, slot_stride: int, staging: int, staging_stride: int, out: int, num_bytes: int, buffer: int
) -> None:
    """`gather` for an output that no cache holds: records are laid side by side in `buffer` and leave it as whole lines.

    So the output's lines are not read before they are written. `out` is a multiple of 64; `buffer` has room for
    _STREAM_BYTES and one record.
    """
    filled = int64(0)
    for i in range(where.size):
        _ask(where, i + _AHEAD, slots, slot_stride, num_bytes)
        place = int64(where[i])
        source = slots + place * slot_stride if place >= 0 else staging + ~place * staging_stride
        copy(buffer + filled, source, num_bytes)
        filled += num_bytes
        if filled >= _STREAM_BYTES:
            whole = filled & ~63
            stream(out, buffer, whole)
            out += whole
            filled -= whole
            copy(buffer, buffer + whole, filled)
    copy(out, buffer, filled)
    fence()


@lean
def _ask(where: Any, i: int, slots: int, slot_stride: int, num_bytes: int) -> None:
    """Ask for the record of a position, if it is in a slot."""
    if i < where.size and where[i] >= 0:
        begin = slots + int64(where[i]) * slot_stride
        for line in range(begin, begin + num_bytes, PREFETCH_BYTES):
            prefetch(line)


class HostTier:
    """A level and its buffer. Not safe from several threads: the store locks."""

    def __init__(self, level: Level, slot_bytes: int) -> None:
        self.level = level
        self.buffer = HostBuffer(level.capacity, slot_bytes)
        self.stride = slot_bytes

    def fetch(self, rows: npt.NDArray[np.int64], num_reads: int, out: int, num_bytes: int) -> Plan | None:
        """Plan a batch; None if every row was resident, and then its records (of `num_bytes` bytes) are at address `out`."""
        where, held, found = self.level.probe(rows)
        if found[1] or found[2]:
            return self.level.settle(rows, where, held, found, num_reads)
        self.gather(where, _NO_RECORDS, out, num_bytes)
        return None

    def gather(self, where: npt.NDArray[np.int32], staging: npt.NDArray[np.uint8], out: int, num_bytes: int) -> None:
        """Copy the records of these places to address `out`. staging: uint8[s, stride]."""
        slots, stride = self.buffer.slots.ctypes.data, self.stride
        if where.size * num_bytes < _LARGE_BYTES or num_bytes > _STREAM_BYTES or out % 64:
            gather(where, slots, stride, staging.ctypes.data, stride, out, num_bytes)
        else:
            buffer = np.empty(2 * _STREAM_BYTES, np.uint8)
            gather_streaming(where, slots, stride, staging.ctypes.data, stride, out, num_bytes, buffer.ctypes.data)


_NO_RECORDS = np.empty((0, 8), np.uint8)
