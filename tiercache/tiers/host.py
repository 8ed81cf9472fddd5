"""The host tier: a level, its bytes in one buffer of huge pages, and the gather out of it.

`gather` is `torch.cat([slots, staging])[where]` in one pass over places, asking for each record's lines before it copies it.
"""

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.level import Level, Plan
from tiercache.native import PREFETCH_BYTES, copy, int64, lean, prefetch

_AHEAD = 32


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
    size = where.size
    for i in range(size):
        if i + _AHEAD < size:
            place = int64(where[i + _AHEAD])
            if place >= 0:
                begin = slots + place * slot_stride
                for line in range(begin, begin + num_bytes, PREFETCH_BYTES):
                    prefetch(line)
        place = int64(where[i])
        source = slots + place * slot_stride if place >= 0 else staging + ~place * staging_stride
        copy(out + i * num_bytes, source, num_bytes)


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
        gather(where, self.buffer.slots.ctypes.data, self.stride, staging.ctypes.data, self.stride, out, num_bytes)



_NO_RECORDS = np.empty((0, 8), np.uint8)
