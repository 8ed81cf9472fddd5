"""The host tier's bytes: one buffer in huge pages, and the gather out of it.

`gather` is `torch.cat([slots, staging])[where]` in one pass over places, asking for each record's lines before it copies it.
"""

import mmap
from typing import Any

import numpy as np

from tiercache.native import copy, int64, lean, prefetch

_AHEAD = 16


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
                for line in range(begin & ~63, begin + num_bytes, 64):
                    prefetch(line)
        place = int64(where[i])
        source = slots + place * slot_stride if place >= 0 else staging + ~place * staging_stride
        copy(out + i * num_bytes, source, num_bytes)
