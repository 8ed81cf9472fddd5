"""The device tier: hot rows in the memory of a processor that works through streams.

Three rules keep every byte right, whatever order the streams run in:

1. A slot that a gather or a copy reads, or is to read, stays pinned in its level until an event behind that work is done. So
   nobody overwrites a slot under a reader: not a copy a device slot, not the disk a host slot or a staging area.
2. What rises is copied on a stream of its own, `side`, from host slots whose bytes are there. A gather that reads a slot on
   its way up makes its stream wait for the last copy begun; `side` runs in order, so that is enough.
3. Places travel to the device through pinned memory that is used again only when the event behind its last reader is done.

The host waits for the device in five cases only: at `close`, if `MAX_PARCELS` batches of places are under way, where indices
come from the device, to save or restore an image, and in `load` of a static fetch whose launch before the last has not run.
"""

from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tiercache.errors import FormatError
from tiercache.level import Level
from tiercache.records import Record, plain
from tiercache.stack import StackPlan, plan_stack
from tiercache.storage.image import Part
from tiercache.storage.table import TableFile
from tiercache.tiers.host import HostTier

MAX_PARCELS = 256
"""Batches of places on their way at once."""


class Event(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether everything before it in its stream has run."""

    def wait(self) -> None:
        """Make the host wait until it is done."""


class Device(Protocol):
    """A processor with memory and streams. Every method but `close` only queues work on a stream, and returns at once."""

    torch_device: torch.device
    side: Any
    """The stream of what rises."""

    def current(self) -> Any:
        """The caller's current stream."""

    def slots(self, num_slots: int, slot_bytes: int) -> torch.Tensor:
        """Device memory, uint8[num_slots, slot_bytes], in one allocation."""

    def view(self, memory: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Host memory as kernels see it. It must come from `pinned` or have been given to `register`."""

    def register(self, memory: npt.NDArray[np.uint8]) -> None:
        """Pin memory that exists, until `close`."""

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """New pinned host memory."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, stream: Any) -> torch.Tensor:
        """A tensor that belongs to a stream."""

    def upload(self, source: npt.NDArray[np.int32], target: torch.Tensor, stream: Any) -> None:
        """Copy pinned host memory to the device."""

    def fill(
        self, sources: torch.Tensor, slots: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor, stream: Any
    ) -> None:
        """upper[slots] = lower[sources]; int32[m] each."""

    def gather(
        self,
        where: torch.Tensor,
        upper: torch.Tensor,
        lower: torch.Tensor,
        staging: torch.Tensor,
        out: torch.Tensor,
        record: Record,
        stream: Any,
    ) -> None:
        """Decode the records at places int32[n] into out: [n, dim], or copy them where out is uint8[n, record_bytes]."""

    def load(self, file: TableFile, offset: int, target: torch.Tensor) -> tuple[str, ...]:
        """Read one extent of a file into device memory that nothing else uses. Returns when it is there; notes on how."""

    def record(self, stream: Any) -> Event:
        """An event behind everything queued on the stream so far."""

    def wait(self, stream: Any, event: Event) -> None:
        """Make a stream wait for an event."""

    def close(self) -> None:
        """Wait for all work, and unpin what was registered."""


class Parcel:
    """Places on their way to the device: pinned memory, and the device's copy of it."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self.host = device.pinned(4 * size).view(np.int32)
        self.target = device.slots(1, 4 * size).view(-1).view(torch.int32)
        self.event: Event | None = None


class Parcels:
    """Parcels that are used again when they have arrived and been read. Safe from several threads, and takes no lock."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._idle: deque[Parcel] = deque()
        self._sent: set[Parcel] = set()
        """Given to a caller. One that is never given back, as its caller failed, stays here: its copy may be under way."""
        self._made = 0

    def send(self, places: npt.NDArray[np.int32], stream: Any, target: torch.Tensor | None = None) -> Parcel:
        """Queue a copy of places to the device: to `target`, or the parcel's. `give_back` the parcel after its readers."""
        parcel = self._parcel(places.size)
        self._sent.add(parcel)
        parcel.host[: places.size] = places
        target = parcel.target[: places.size] if target is None else target
        self._device.upload(parcel.host[: places.size], target, stream)
        return parcel

    def give_back(self, parcel: Parcel, event: Event) -> None:
        """The parcel is free once the event is done."""
        parcel.event = event
        self._idle.append(parcel)
        self._sent.discard(parcel)

    def _parcel(self, size: int) -> Parcel:
        try:
            parcel = self._idle.popleft()
        except IndexError:
            return self._new(size)
        if parcel.event is not None and not parcel.event.done():
            if self._made < MAX_PARCELS:
                self._idle.appendleft(parcel)
                return self._new(size)
            parcel.event.wait()
        return parcel if parcel.size >= size else Parcel(self._device, _parcel_size(size))

    def _new(self, size: int) -> Parcel:
        self._made += 1
        return Parcel(self._device, _parcel_size(size))


def _parcel_size(size: int) -> int:
    return max(256, 1 << (size - 1).bit_length())


class StreamTier:
    """A level above the host tier's, and its slots on a device; at most `most` rows rise in one batch.

    `plan` and `release` are called under the store's lock, `gather` is not.
    """

    decodes = True

    def __init__(self, level: Level, host: HostTier, most: int, device: Device) -> None:
        self.level = level
        self.device = device
        self.torch_device = device.torch_device
        self.capacity_bytes = level.capacity * host.stride
        self.groups = host.groups
        self.members = None if host.groups is None else host.groups.upper
        self._host, self._most = host, most
        self.stride = host.stride
        self._slots = device.slots(level.capacity, host.stride)
        device.register(host.buffer.slots)
        self._lower = device.view(host.buffer.slots)
        self._no_rows = device.view(host.buffer.slots[:0])
        record_stride = host.stride if host.groups is None else host.stride // host.groups.size
        self._records = self._slots.view(-1, record_stride), self._lower.view(-1, record_stride)
        """Both buffers as records, which a gather reads."""
        self._parcels = Parcels(device)
        self._last: Event | None = None
        """Behind every copy so far."""

    def room(self, rows: npt.NDArray[np.int64]) -> StackPlan:
        """Room for the plan of a batch."""
        return StackPlan(rows.size, above=True) if self.groups is None else self.groups.room(rows, above=True)

    def plan(self, plan: StackPlan, rows: npt.NDArray[np.int64], num_reads: int) -> None:
        """Plan a batch over both tiers, into new room, and queue the copies of what rises."""
        above = plan.above
        assert above is not None
        groups = self.groups
        keys, pieces = (rows, num_reads) if groups is None else (plan.keys, num_reads * groups.size)
        try:
            plan_stack(self.level, self._host.level, plan, keys, pieces, self._most, num_copies=1)
            if groups is not None:
                groups.settle(plan, self.level, served=False)
            if above.fill.size:
                self._raise(above.fill, above.held[above.hits :])
        except BaseException:
            self.level.forget(above)  # what is not copied has not risen
            raise
        if above.fill.size or above.pending:
            plan.after = self._last

    def serve(
        self, plan: StackPlan, rows: npt.NDArray[np.int64], num_reads: int, records: torch.Tensor, num_bytes: int
    ) -> bool:
        """`plan`; False, as nothing is served on the spot."""
        self.plan(plan, rows, num_reads)
        return False

    def _raise(self, sources: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> None:
        """Queue copies from host slots to device slots."""
        self._last = self._copy_up(sources, self._lower, slots)

    def _copy_up(self, sources: npt.NDArray[np.int32], lower: torch.Tensor, slots: npt.NDArray[np.int32]) -> Event:
        """Queue copies from rows of host memory to device slots; an event behind them."""
        side, size = self.device.side, sources.size
        parcels = self._parcels.send(sources, side), self._parcels.send(slots, side)
        self.device.fill(parcels[0].target[:size], parcels[1].target[:size], self._slots, lower, side)
        event = self.device.record(side)
        for parcel in parcels:
            self._parcels.give_back(parcel, event)
        return event

    def put(self, records: npt.NDArray[np.uint8], slots: npt.NDArray[np.int32]) -> None:
        """Copy records of a staging area, uint8[n, stride], to slots. Waits for the device."""
        self._copy_up(np.arange(slots.size, dtype=np.int32), self.device.view(records), slots).wait()

    def release(self, plan: StackPlan) -> None:
        """Let go of the slots of a plan, in both tiers. What it raised has arrived."""
        assert plan.above is not None
        self.level.arrived(plan.above)
        self.level.release(plan.above)
        self._host.level.release(plan.below)

    def gather(
        self,
        plan: StackPlan,
        staging: npt.NDArray[np.uint8],
        records: torch.Tensor,
        record: Record,
        stream: Any,
    ) -> Event:
        """Queue the decoding of a plan's rows into `records`, [n, dim], or uint8[n, record_bytes] for their bytes.

        Returns an event behind it: until it is done, the plan's slots stay pinned and the staging area alive.
        """
        stream = self.device.current() if stream is None else stream
        if plan.after is not None:
            self.device.wait(stream, plan.after)
        where = self._places(plan)
        parcel = self._parcels.send(where, stream)
        view = self.device.view(staging) if len(staging) else self._no_rows
        self.launch(parcel.target[: where.size], view, records, record, stream)
        event = self.device.record(stream)
        self._parcels.give_back(parcel, event)
        return event

    def _places(self, plan: StackPlan) -> npt.NDArray[np.int32]:
        """Where each row of a plan is."""
        return plan.where if self.groups is None else self.groups.places(plan.where)

    def send(self, plan: StackPlan, target: torch.Tensor, stream: Any) -> None:
        """Queue the way of the places of a plan's rows into a tensor of the device's, behind what they wait for."""
        if plan.after is not None:
            self.device.wait(stream, plan.after)
        parcel = self._parcels.send(self._places(plan), stream, target)
        self._parcels.give_back(parcel, self.device.record(stream))

    def launch(
        self, where: torch.Tensor, staging: torch.Tensor, out: torch.Tensor, record: Record, stream: Any
    ) -> None:
        """Queue a gather of rows, and nothing else. where: int32[n] of the device; staging as the device sees it."""
        stream = self.device.current() if stream is None else stream
        upper, lower = self._records
        staged = staging if self.groups is None else staging.view(-1, upper.shape[1])
        self.device.gather(where, upper, lower, staged, out, record, stream)

    def read_slots(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """A copy of slots on the host, uint8[n, stride]. They are pinned, and their bytes are there. Waits for the device."""
        side, stride = self.device.side, self._host.stride
        parcel = self._parcels.send(slots, side)
        records = self.device.empty((slots.size, stride), torch.uint8, side)
        whole = plain("U8", stride)
        self.device.gather(parcel.target[: slots.size], self._slots, self._lower, self._no_rows, records, whole, side)
        event = self.device.record(side)
        self._parcels.give_back(parcel, event)
        event.wait()
        return records.cpu().numpy()

    def restore(self, part: Part, positions: npt.NDArray[np.int64], slots: npt.NDArray[np.int32]) -> tuple[str, ...]:
        """Read slots positions[i] of an image to slots[i], straight from the disk; notes on how.

        Checksums are compared with what is on the device then. FormatError where one is wrong.
        """
        if part.stride != self._host.stride:
            raise FormatError(f"{part.file.path}: not an image of tiers: slots of {part.stride} bytes on the device")
        file = part.file._replace(path=Path(f"/proc/self/fd/{part.descriptor}"))
        breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(slots) != 1)) + 1
        notes: dict[str, None] = {}
        for first, end in zip([0, *breaks], [*breaks, positions.size], strict=True):
            if first < end:
                target = self._slots[slots[first] : slots[first] + end - first]
                offset = part.offset + int(positions[first]) * part.stride
                notes |= dict.fromkeys(self.device.load(file, offset, target))
        for first, count, which in part.pieces(positions):
            loaded = self._slots[torch.from_numpy(slots[which].astype(np.int64)).to(self.torch_device)].cpu().numpy()
            if len(loaded) == count:
                part.require_intact(first, loaded)
            else:
                part.read(positions[which], partial(_require_equal, part, loaded))
        return tuple(notes)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, stream: Any) -> torch.Tensor:
        """An output, of the stream that will write it."""
        return self.device.empty(shape, dtype, stream)

    def staging(self, num_slots: int) -> npt.NDArray[np.uint8]:
        """A staging area in pinned memory, uint8[num_slots, stride]."""
        stride = self._host.stride
        return self.device.pinned(num_slots * stride).reshape(num_slots, stride)

    def close(self) -> None:
        """Wait until the device has done all that was queued."""
        self.device.close()


def _require_equal(
    part: Part, loaded: npt.NDArray[np.uint8], _: slice, places: npt.NDArray[np.int32], piece: npt.NDArray[np.uint8]
) -> None:
    """FormatError unless some of a piece's slots were loaded as they are."""
    if not np.array_equal(loaded, piece[places]):
        raise FormatError(f"{part.file.path}: damaged: what the device read of it is not what the host reads")
