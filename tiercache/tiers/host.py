"""The host tier: a level, its bytes in one buffer of huge pages, and the gather out of it.

`gather` is `torch.cat([slots, staging])[where]` in one pass over places, asking for each record's lines before it copies it.
"""

import mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tiercache.groups import Groups
from tiercache.level import Level
from tiercache.native import PREFETCH_BYTES, Settled, copy, fence, int64, lean, prefetch, stream
from tiercache.records import Record
from tiercache.stack import StackPlan
from tiercache.storage.image import Part

_AHEAD, _NEAR, _WIDE_AHEAD = 48, 16, 4
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


class Memories(NamedTuple):
    """Where the records of places are, as addresses and bytes: a place below `num_upper` is a slot of the upper buffer, one
    from there on a slot of the lower one, ~i row i of the staging area. All rows are `stride` bytes apart.
    """

    upper: int
    num_upper: int
    lower: int
    staging: int
    stride: int


@lean
def gather(where: Any, memories: Memories, out: int, num_bytes: int) -> None:
    """Copy record i from its place where[i] (int32[n]) to address out + i * num_bytes."""
    for i in range(where.size):
        _ask(where, i + _AHEAD, memories, num_bytes)
        copy(out + i * num_bytes, _source(memories, int64(where[i])), num_bytes)


@lean
def gather_streaming(where: Any, memories: Memories, out: int, num_bytes: int, buffer: int) -> None:
    """`gather` for an output that no cache holds: records are laid side by side in `buffer` and leave it as whole lines.

    So the output's lines are not read before they are written. `out` is a multiple of 64; `buffer` has room for
    _STREAM_BYTES and one record.
    """
    filled = int64(0)
    for i in range(where.size):
        _ask(where, i + _AHEAD, memories, num_bytes)
        copy(buffer + filled, _source(memories, int64(where[i])), num_bytes)
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
def gather_wide(where: Any, memories: Memories, out: int, num_bytes: int, streaming: bool) -> None:
    """`gather` for records of many lines: with each line that is copied, one of a record ahead is asked for.

    streaming: past the caches; then `out` and `num_bytes` are multiples of 64.
    """
    whole = num_bytes & ~63
    for i in range(where.size):
        source = _source(memories, int64(where[i]))
        ahead = _source(memories, int64(where[min(i + _WIDE_AHEAD, where.size - 1)]))
        for at in range(0, whole, 64):
            prefetch(ahead + at)
            if streaming:
                stream(out + at, source + at, 64)
            else:
                copy(out + at, source + at, 64)
        copy(out + whole, source + whole, num_bytes - whole)
        out += num_bytes
    if streaming:
        fence()


@lean
def _source(memories: Memories, place: int) -> int:
    """Address of the record at a place."""
    if place >= memories.num_upper:
        return memories.lower + (place - memories.num_upper) * memories.stride
    if place >= 0:
        return memories.upper + place * memories.stride
    return memories.staging + ~place * memories.stride


@lean
def _ask(where: Any, i: int, memories: Memories, num_bytes: int) -> None:
    """Ask for the record of a position, if it is in a slot."""
    if i < where.size and where[i] >= 0:
        begin = _source(memories, int64(where[i]))
        for line in range(begin, begin + num_bytes, PREFETCH_BYTES):
            prefetch(line)


class Slots(NamedTuple):
    """Where slots are: the address of the first, and bytes between them."""

    address: int
    stride: int


@lean
def copy_slots(sources: Any, lower: Slots, slots: Any, upper: Slots) -> None:
    """Copy slots sources[i] (int32[m]) of `lower` to slots slots[i] (int32[m]) of `upper`, as much as fits both."""
    num_bytes = min(lower.stride, upper.stride)
    for i in range(sources.size):
        if i + _NEAR < sources.size:
            begin = lower.address + int64(sources[i + _NEAR]) * lower.stride
            for line in range(begin, begin + num_bytes, PREFETCH_BYTES):
                prefetch(line)
        source = lower.address + int64(sources[i]) * lower.stride
        copy(upper.address + int64(slots[i]) * upper.stride, source, num_bytes)


def gather_to(where: npt.NDArray[np.int32], memories: Memories, out: int, num_bytes: int) -> None:
    """`gather`, past the caches where the output is large."""
    is_large = where.size * num_bytes >= _LARGE_BYTES and not out % 64
    if num_bytes > _STREAM_BYTES:
        _gather_wide(where, memories, out, num_bytes, is_large and not num_bytes % 64)
    elif not is_large:
        _gather(where, memories, out, num_bytes)
    else:
        buffer = np.empty(2 * _STREAM_BYTES, np.uint8)
        _gather_streaming(where, memories, out, num_bytes, buffer.ctypes.data)


_gather, _gather_wide, _gather_streaming = Settled(gather), Settled(gather_wide), Settled(gather_streaming)


def gather_groups(
    where: npt.NDArray[np.int32], memories: Memories, out: int, num_bytes: int, groups: Groups
) -> None:
    """Copy the records of groups, each of `num_bytes` bytes, from their places. A slot's records lie at even distances."""
    stride = memories.stride // groups.size
    if num_bytes == stride:
        gather_to(where, memories, out, memories.stride)
    else:
        apart = memories._replace(num_upper=memories.num_upper * groups.size, stride=stride)
        gather_to(groups.places(where), apart, out, num_bytes)


class CpuMemory:
    """What tiers share whose memory the CPU reads: everything is done when a call returns, and there are no streams."""

    torch_device = torch.device("cpu")
    decodes = False
    """Whether `gather` writes decoded rows; else it writes records."""

    def __init__(self, buffer: HostBuffer, resident: Memories, groups: Groups | None) -> None:
        self.buffer = buffer
        self.groups = groups
        self.stride = resident.stride
        self.at = Slots(buffer.slots.ctypes.data, self.stride)
        self._resident = resident
        """Where slots are, without a staging area."""

    def read_slots(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """A copy of slots, uint8[n, stride]."""
        records = np.empty((slots.size, self.stride), np.uint8)
        here = np.arange(slots.size, dtype=np.int32)
        copy_slots(slots, self.at, here, Slots(records.ctypes.data, self.stride))
        return records

    def restore(self, part: Part, positions: npt.NDArray[np.int64], slots: npt.NDArray[np.int32]) -> tuple[str, ...]:
        """Read slots positions[i] of an image to slots[i]. FormatError for a wrong checksum."""

        def put(which: slice, places: npt.NDArray[np.int32], piece: npt.NDArray[np.uint8]) -> None:
            copy_slots(places, Slots(piece.ctypes.data, part.stride), slots[which], self.at)

        part.read(positions, put)
        return ()

    def put(self, records: npt.NDArray[np.uint8], slots: npt.NDArray[np.int32]) -> None:
        """Copy records uint8[n, stride] to slots."""
        here = np.arange(slots.size, dtype=np.int32)
        copy_slots(here, Slots(records.ctypes.data, self.stride), slots, self.at)

    def gather(
        self,
        plan: StackPlan,
        staging: npt.NDArray[np.uint8],
        records: torch.Tensor,
        record: Record,
        stream: None,
    ) -> None:
        """Copy the records of a plan's places to `records`. staging: uint8[s, stride]."""
        memories = self._resident._replace(staging=staging.ctypes.data)
        self._gather(plan.where, memories, records.data_ptr(), record.record_bytes)

    def _gather(self, where: npt.NDArray[np.int32], memories: Memories, out: int, num_bytes: int) -> None:
        if self.groups is None:
            gather_to(where, memories, out, num_bytes)
        else:
            gather_groups(where, memories, out, num_bytes, self.groups)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, stream: None) -> torch.Tensor:
        """An output."""
        return torch.empty(shape, dtype=dtype, device="cpu")

    def staging(self, num_slots: int) -> npt.NDArray[np.uint8]:
        """A staging area, uint8[num_slots, stride]."""
        return np.empty((num_slots, self.stride), np.uint8)

    def close(self) -> None:
        """Nothing is on its way."""


class HostTier(CpuMemory):
    """A level and its buffer. Not safe from several threads: the store locks."""

    def __init__(self, level: Level, stride: int, groups: Groups | None = None) -> None:
        """stride: bytes of a slot. groups: what the slots hold, where that is not one row each."""
        self.level = level
        self.members = None if groups is None else groups.lower
        buffer = HostBuffer(level.capacity, stride)
        self.capacity_bytes: int = buffer.slots.nbytes
        super().__init__(buffer, Memories(0, 0, buffer.slots.ctypes.data, 0, stride), groups)

    def room(self, rows: npt.NDArray[np.int64]) -> StackPlan:
        """Room for the plan of a batch."""
        return StackPlan(rows.size, above=False) if self.groups is None else self.groups.room(rows, above=False)

    def plan(self, plan: StackPlan, rows: npt.NDArray[np.int64], num_reads: int) -> None:
        """Plan a batch, into new room. num_reads: reads that bring a record."""
        self._plan(plan, rows, num_reads, idly=False)

    def serve(
        self, plan: StackPlan, rows: npt.NDArray[np.int64], num_reads: int, records: torch.Tensor, num_bytes: int
    ) -> bool:
        """Plan a batch; True if every row was resident: then its records, of `num_bytes` bytes, are in `records`."""
        served = self._plan(plan, rows, num_reads, idly=True)
        if served:
            self._gather(plan.where, self._resident, records.data_ptr(), num_bytes)
        return served

    def _plan(self, plan: StackPlan, rows: npt.NDArray[np.int64], num_reads: int, *, idly: bool) -> bool:
        groups = self.groups
        if groups is None:
            return self.level.plan_into(plan.below, rows, num_reads, idly=idly)
        served = self.level.plan_into(plan.below, plan.keys, num_reads * groups.size, idly=idly)
        return groups.settle(plan, self.level, served=served)

    def release(self, plan: StackPlan) -> None:
        """Let go of the slots of a plan."""
        self.level.release(plan.below)
