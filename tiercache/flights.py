"""Flights: what of a store is under way, from its plan under the lock, by reads without it, to its end."""

import errno
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tiercache.errors import ClosedError, StorageError
from tiercache.flight import Flight
from tiercache.groups import Groups
from tiercache.level import MAX_PINS, PLAN_MISSES, SLOT, pending_of
from tiercache.request import Table
from tiercache.storage import queue as q
from tiercache.storage.reads import Targets
from tiercache.tiers.host import HostTier

if TYPE_CHECKING:
    from tiercache.expectation import Lookout
    from tiercache.recording.recorder import Recorder
    from tiercache.tiers import DeviceTier

_REAPED_AT_ONCE = 16
"""Abandoned flights that a call looks after."""

_PENDING = SLOT.fields["pending"][1]  # type: ignore[index]
_NO_ROWS = np.empty(0, np.int64)


class Flights:
    """The flights of a store, and the lock that all of its books are under.

    closed       whether nothing begins any more; `process` is that of the store
    num_fetches  fetches and prefetches since open; `num_rows` is what they asked for
    waited_ns    how long fetches waited for rows from below the tiers; `waited_rows` is how many those were
    recorders    of what is planned
    lookout      what is expected, once somebody expects something
    """

    def __init__(
        self, host: HostTier, top: "HostTier | DeviceTier", groups: Groups | None, stride: int, queue: q.Queue
    ) -> None:
        """For tiers of slots of `stride` bytes a row, whose reads end in a queue."""
        self.lock = threading.RLock()
        self.closed = False
        self.num_fetches = self.num_rows = 0
        self.waited_ns = self.waited_rows = 0
        self.recorders: list[Recorder] = []
        self.lookout: Lookout | None = None
        self.process = os.getpid()
        self._host, self._top, self._groups = host, top, groups
        self._stride, self._queue = stride, queue
        self._num_above = 0 if top is host else top.level.capacity
        self._under_way: set[Flight] = set()
        self._abandoned: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def require_here(self) -> None:
        """ClosedError in a process forked since."""
        if os.getpid() != self.process:
            raise ClosedError("this store was opened in another process; open it again in this one")

    def require_open(self) -> None:
        """ClosedError after `close`."""
        if self.closed:
            raise ClosedError("the store is closed")

    def plan(self, flight: Flight) -> None:
        """Plan a flight, which the store knows from now on."""
        self.require_here()
        with self.lock:
            self._enter(flight)
            self._top.plan(flight.plan, flight.rows, flight.table.reader.num_reads)
            self._begin(flight)

    def serve(self, flight: Flight, records: torch.Tensor) -> bool:
        """Plan a flight; True, and it is over, where its rows were all there and are now in `records`."""
        self.require_here()
        with self.lock:
            self._enter(flight)
            reader, num_bytes = flight.table.reader, flight.table.record.record_bytes
            served = self._top.serve(flight.plan, flight.rows, reader.num_reads, records, num_bytes)
            self._begin(flight, served=served)
        return served

    def _enter(self, flight: Flight) -> None:
        """A flight begins, if the store serves and has room for it; the store knows it from now on. Under the lock."""
        self.require_open()
        if self._abandoned:
            self._reap(_REAPED_AT_ONCE)
        if len(self._under_way) >= MAX_PINS:
            raise RuntimeError(f"{len(self._under_way)} tickets are in flight; take, cancel or drop some")
        self._under_way.add(flight)
        if self.lookout is not None:
            self.lookout.level.ask(flight.rows)

    def _begin(self, flight: Flight, *, served: bool = False) -> None:
        """A flight was planned: count it, and see which slots it waits for that other flights' reads fill. Under the lock."""
        rows = flight.rows
        if not rows.size or self._groups is not None:
            for recorder in self.recorders:
                recorder.add(flight.table.base, rows)
        self.num_fetches += 1
        self.num_rows += rows.size
        if served:
            self._under_way.discard(flight)
            return
        below = flight.plan.below
        if below.pending:
            level = self._host.level
            borrowed = np.empty(below.pending, np.int32)
            flight.borrowed = borrowed[: pending_of(level.slots, below.held[: below.hits], borrowed)]
            flight.borrowed_rows = level.slots["key"][flight.borrowed]

    def read(self, flight: Flight, due_ns: int) -> None:
        """Begin a flight's reads."""
        plan = flight.plan.below
        if not plan.misses.size and not flight.borrowed.size:
            return
        if plan.staged > len(flight.staging):
            flight.staging = self._top.staging(plan.staged)
        flight.staged = plan.staged
        if self._groups is None:
            flight.job = self._submit(flight, plan.misses, plan.fill, flight.borrowed_rows, due_ns)
        else:
            wanted = self._groups.rows_in(flight.borrowed)
            flight.job = self._submit(flight, self._groups.missing(flight.plan), plan.fill, wanted, due_ns)

    def _submit(
        self,
        flight: Flight,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int64],
        due_ns: int,
    ) -> Any:
        """Begin to read rows to places, which are of groups where the tiers keep such."""
        slots, entries = self._host.buffer.slots, self._host.level.slots
        targets = Targets(
            slots.ctypes.data,
            self._stride,
            flight.staging.ctypes.data,
            self._stride,
            entries.ctypes.data + _PENDING,
            SLOT.itemsize,
            flight.table.group_rows,
        )
        places = places if self._groups is None else self._groups.places(places)
        base = flight.table.base
        alive = slots, entries, flight.staging
        try:
            return flight.table.reader.submit(rows - base, places, wanted - base, targets, due_ns, alive)
        except (OSError, RuntimeError) as error:
            raise self._closed_or(error, flight.table) from error

    def _closed_or(self, error: OSError | RuntimeError, table: Table) -> Exception:
        if self.closed:
            return ClosedError("the store was closed meanwhile")
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            return StorageError(error.errno or errno.EIO, f"reads of table {table.name!r} cannot be begun: {error}")
        return error

    def finish(self, flight: Flight, records: torch.Tensor, stream: Any, begun_ns: int | None = None) -> None:
        """Wait for a flight's rows, write them, let go of it. begun_ns: when its reads began, if that was not ahead of time."""
        waited_ns = 0
        if flight.job is not None:
            self._await(flight)
            waited_ns = 0 if begun_ns is None else time.monotonic_ns() - begun_ns
        flight.event = self._top.gather(flight.plan, flight.staging, records, flight.table.record, stream)
        with self.lock:
            if waited_ns:
                self.waited_ns += waited_ns
                self.waited_rows += int(flight.plan.below.counts[PLAN_MISSES]) * flight.table.group_rows
            self._end(flight)

    def _await(self, flight: Flight) -> None:
        """Wait until every row of a flight has arrived. Rows that another flight failed to bring are read again."""
        job = flight.job
        assert job is not None
        job.wait()
        self._raise_error(flight, job)
        if not flight.borrowed.size:
            return
        flags = self._host.level.slots.ctypes.data + _PENDING + SLOT.itemsize * flight.borrowed.astype(np.int64)
        while not q.wait_flags(self._queue, flags):
            pass
        self._raise_error(flight, job)
        entries = self._host.level.slots[flight.borrowed]
        lost = (entries["pending"] != 0) | (entries["key"] != flight.borrowed_rows)
        if self._groups is not None:  # a stray waited for the slot of another group
            lost &= np.isin(flight.borrowed + self._num_above, flight.plan.where)
        if lost.any():
            slots = flight.borrowed[lost]
            rows = flight.borrowed_rows[lost] if self._groups is None else self._groups.rows_in(slots)
            self._read_again(flight, slots, rows)

    def _read_again(self, flight: Flight, slots: npt.NDArray[np.int32], rows: npt.NDArray[np.int64]) -> None:
        """Read rows that were to come into these slots to the staging area instead."""
        where, old, begin = flight.plan.where, flight.staging, flight.staged
        flight.staged += slots.size
        if flight.staged > len(old):
            flight.staging = self._top.staging(flight.staged)
            flight.staging[:begin] = old[:begin] if begin else 0
        places = ~np.arange(begin, flight.staged, dtype=np.int32)
        flight.job = self._submit(flight, rows, places, _NO_ROWS, 0)
        flight.job.wait()
        self._raise_error(flight, flight.job)
        for slot, place in zip(slots.tolist(), places.tolist(), strict=True):
            where[where == self._num_above + slot] = place

    def load(self, flight: Flight) -> None:
        """For a StaticFetch, which gives the flight up where this raises: bring its rows to its places, and hold them."""
        self.plan(flight)
        self.read(flight, 0)
        if flight.job is not None:
            self._await(flight)

    def _raise_error(self, flight: Flight, job: Any) -> None:
        """StorageError where a job failed, ClosedError where it did because of `close`."""
        try:
            flight.table.reader.raise_error(job)
        except OSError as error:
            if self.closed:
                raise ClosedError("the store was closed before the rows had been read") from error
            raise

    def give_up(self, flight: Flight) -> None:
        """End a flight that failed or was interrupted, planned or not. What it was to fill and was not brought is forgotten."""
        if self.process != os.getpid():
            return
        with self.lock:
            if flight.brought:
                self._host.level.forget(flight.plan.below)
                self._end(flight)
            else:
                self._abandoned.append(flight)
        if flight.job is not None:
            flight.job.cancel()

    def _end(self, flight: Flight) -> None:
        """Nobody waits for a flight any more: let go of it once no read and no stream touches its slots. Under the lock."""
        flight.ended = True
        if flight.done:
            self._let_go(flight)
        else:
            self._abandoned.append(flight)

    def _let_go(self, flight: Flight) -> None:
        """Unpin a flight's slots. Under the lock."""
        self._top.release(flight.plan)
        self._under_way.discard(flight)

    def abandon(self, flight: Flight) -> None:
        """Nobody waits for a flight any more. Takes no lock, as the collector may come here while its thread holds one."""
        self._abandoned.append(flight)

    def reap_all(self) -> None:
        """Let go of every flight that can be. Under the lock."""
        self._reap(len(self._abandoned))

    def _reap(self, most: int) -> None:
        """Let go of flights that nobody waits for, and whose reads and gathers are done; looks at `most`. Under the lock."""
        for _ in range(min(most, len(self._abandoned))):
            flight = self._abandoned.popleft()
            if not flight.done:
                self._abandoned.append(flight)
                continue
            if not flight.ended and flight.job is not None and not flight.table.reader.brought(flight.job):
                self._host.level.forget(flight.plan.below)
            self._let_go(flight)
