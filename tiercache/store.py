"""Store: tables of rows, held in tiers, behind `fetch`."""

import errno
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from tiercache.config import HostConfig, StoreConfig
from tiercache.errors import ClosedError, ConfigError, StorageError
from tiercache.flight import Flight, Ticket
from tiercache.level import BYPASSES, HITS, MAX_PINS, MISSES, PINNED, SLOT, Level, Plan, pending_of
from tiercache.policies import POLICIES
from tiercache.request import Table, output, rows_of
from tiercache.source import Source
from tiercache.stats import LevelStats, StoreStats
from tiercache.storage import open_table
from tiercache.storage import queue as q
from tiercache.storage.disk import Disk
from tiercache.storage.memory import read_rows, sources_of
from tiercache.storage.reader import Reader, SourceReader
from tiercache.storage.reads import Targets
from tiercache.storage.table import FileTable
from tiercache.tiers.host import HostTier

_PATIENCE_NS = 100_000_000
"""When a prefetch without a deadline is due, in ns from now: behind every fetch, before prefetches for later."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PENDING = SLOT.fields["pending"][1]  # type: ignore[index]


class Store:
    """Fixed-size rows of one or more tables, served through a tier of host memory. Made by `Store.open`.

    Safe to use from several threads. Not from a process forked after `open`: there every call raises ClosedError.
    """

    def __init__(
        self, config: StoreConfig, tables: Mapping[str, FileTable | Source], options: Mapping[str, Any]
    ) -> None:
        """For `open`; tables are described and not yet open."""
        self.config = config
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._fetches = self._rows = self._flights = 0
        self._abandoned: deque[Flight] = deque()
        self._stride = -(-max(table.record.record_bytes for table in tables.values()) // 8) * 8
        num_rows = sum(table.num_rows for table in tables.values())
        capacity = _capacity(config.host, self._stride, num_rows)
        self._host = HostTier(_level(config.host.policy, capacity, options, num_rows), self._stride)
        on_disk = [table for table in tables.values() if isinstance(table, FileTable)]
        self._disk = (
            Disk(
                on_disk,
                engine=config.storage.engine,
                queue_depth=config.storage.queue_depth,
                direct=config.storage.direct,
                verify=config.storage.verify == "page",
            )
            if on_disk
            else None
        )
        self._queue = self._disk.engine.queue if self._disk else q.new_queue()
        self._sources: list[SourceReader] = []
        self._tables = self._open_readers(tables)
        self._finalizer = weakref.finalize(self, _end, self._process, self._disk, self._sources)

    @classmethod
    def open(
        cls,
        config: StoreConfig | str | os.PathLike[str] | Mapping[str, Any],
        *,
        tables: Mapping[str, Source | npt.NDArray[Any] | torch.Tensor] | None = None,
    ) -> Self:
        """Open a store.

        config: a TOML file, a mapping of the same shape, or a StoreConfig. tables: sources or 2-D arrays by name, beside
        the tables on disk that the config names.

        Raises ConfigError for a setting and for what is no source, FormatError and StorageError for a table that cannot be
        served. What the kernel or the file system refuses (io_uring, O_DIRECT) is told once, as a warning and in
        `stats().storage.notes`; so are fp8 values whose scale seems to be there and is not among the fields.
        """
        settings = StoreConfig.load(config)
        described: dict[str, FileTable | Source] = {
            table.name: open_table(table.name, table.path, fields=table.fields, resident=table.resident)
            for table in settings.tables
        }
        for name, table in sources_of(tables).items():
            if name in described:
                raise ConfigError(f"tables = {name!r}: the config has a table of this name; allowed are other names")
            described[name] = table
        if not described:
            raise ConfigError("table: is required; a store needs at least one table")
        options: dict[str, Any] = dict(settings.host.policy_options)
        if (path := settings.host.hot_set) is not None:
            options["hot_rows"] = _hot_rows(path, sum(table.num_rows for table in described.values()))
        store = cls(settings, described, options)
        for note in store._disk.notes if store._disk else ():
            warnings.warn(f"tiercache: {note}", RuntimeWarning, stacklevel=2)
        return store

    def _open_readers(self, tables: Mapping[str, FileTable | Source]) -> dict[str, Table]:
        readers = iter(self._disk.readers if self._disk else ())
        opened: dict[str, Table] = {}
        base = 0
        for name, table in tables.items():
            reader: Reader
            if isinstance(table, FileTable):
                reader = next(readers)
            else:
                reader = SourceReader(table, self._queue)
                self._sources.append(reader)
            record = table.record
            dtype = _DTYPES.get(self.config.dtype, record.default_dtype)
            verbatim = record.is_verbatim(dtype)
            opened[name] = Table(name, base, table.num_rows, record, dtype, reader, verbatim)
            base += table.num_rows
        return opened

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables."""
        return tuple(self._tables)

    def num_rows(self, table: str | None = None) -> int:
        """Rows of a table."""
        return self._table(table).num_rows

    def dim(self, table: str | None = None) -> int:
        """Values in a row of a table."""
        return self._table(table).record.dim

    def dtype(self, table: str | None = None) -> torch.dtype:
        """What `fetch` returns of a table."""
        return self._table(table).dtype

    def record_bytes(self, table: str | None = None) -> int:
        """Bytes of a row of a table as it is stored: what `fetch` returns of it with `raw`."""
        return self._table(table).record.record_bytes

    def fetch(
        self,
        indices: Any,
        stream: None = None,
        *,
        out: torch.Tensor | None = None,
        table: str | None = None,
        raw: bool = False,
    ) -> torch.Tensor:
        """Rows by number, in the order and shape asked for, duplicates included.

        indices: integer tensor or array of any shape, or numbers; rows of `table`, which may be left out where there is
        one. Returns dtype[*indices.shape, dim], or uint8[*indices.shape, record_bytes] with `raw`; written to `out` where
        that is given. `stream` is for stores with a device tier, and None here.

        Raises IndexError for a row out of range (the first one is named), TypeError and ValueError for indices or an
        output that do not fit, KeyError for an unknown table; then nothing has changed. StorageError where rows could
        not be read: none of this call's are kept, and the next fetch works. ClosedError after `close`.
        """
        wanted = self._table(table)
        rows, shape = rows_of(indices, wanted)
        result = self._output(wanted, shape, stream, out, raw)
        verbatim = raw or wanted.verbatim
        records = result if verbatim else torch.empty((rows.size, wanted.record.record_bytes), dtype=torch.uint8)
        with self._entered():
            plan = self._host.fetch(rows, wanted.reader.num_reads, records.data_ptr(), wanted.record.record_bytes)
            self._fetches += 1
            self._rows += rows.size
            flight = None if plan is None else self._hold(wanted, shape, plan)
        if flight is not None:
            self._read(flight, 0)
            self._finish(flight, records)
        if not verbatim:
            wanted.record.decode_to(records, result.view(-1, wanted.record.dim))
        return result

    def prefetch(self, indices: Any, *, deadline: float | None = None, table: str | None = None) -> Ticket:
        """Begin to bring rows into the tier, and return without waiting for the reads.

        What it does itself is to plan them: about half a microsecond a row, so 50 ms for 100,000 rows.

        indices and table are as in `fetch`, and so are the errors. deadline: seconds from now until the rows are needed;
        reads are ordered by it. Without one they come after the fetches. `take` the ticket, or `fetch` the rows: both wait
        for what is on its way and read nothing twice. Rows that the policy keeps out of the tier only the ticket has.
        """
        wanted = self._table(table)
        if deadline is not None and not (isinstance(deadline, Real) and deadline >= 0):
            raise ValueError(f"deadline = {deadline!r}: allowed are seconds from now, 0 or more")
        rows, shape = rows_of(indices, wanted)
        due = time.monotonic_ns() + (_PATIENCE_NS if deadline is None else int(min(deadline, 1e9) * 1e9))
        with self._entered():
            plan = self._host.level.plan(rows, wanted.reader.num_reads)
            self._fetches += 1
            self._rows += rows.size
            flight = self._hold(wanted, shape, plan)
        self._read(flight, due)
        return Ticket(self, flight, self._abandoned.append)

    def stats(self) -> StoreStats:
        """Counts since open, and what serves."""
        self._require_here()
        with self._lock:
            self._require_open()
            level, counters = self._host.level, self._host.level.counters
            host = LevelStats(
                policy=level.policy.name,
                capacity_slots=level.capacity,
                capacity_bytes=self._host.buffer.slots.nbytes,
                bookkeeping_bytes=level.nbytes,
                used_slots=int(np.count_nonzero(level.slots["key"] >= 0)),
                pinned_slots=int(counters[PINNED]),
                hits=int(counters[HITS]),
                misses=int(counters[MISSES]),
                bypasses=int(counters[BYPASSES]),
            )
            return StoreStats(
                fetches=self._fetches,
                rows=self._rows,
                flights=self._flights,
                host=host,
                storage=self._disk.stats() if self._disk else None,
            )

    def check(self) -> None:
        """Raise AssertionError where the books do not add up. Reads every slot's entry: for tests, and for doubts."""
        self._require_here()
        with self._lock:
            if self._closed:
                return
            self._reap()
            self._host.level.check()
            if self._flights == 0:
                assert self._host.level.counters[PINNED] == 0, "slots are pinned and nothing is in flight"
                assert not self._host.level.slots["pending"].any(), "slots are pending and nothing is in flight"

    def close(self) -> None:
        """End everything that `open` began: reads in flight land, the others are given up. A second close does nothing.

        Tickets that were not taken, and fetches in other threads that still wait, raise ClosedError.
        """
        if self._process != os.getpid():
            self._finalizer.detach()
            return
        with self._lock:
            self._closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _table(self, name: str | None) -> Table:
        if name is None:
            if len(self._tables) > 1:
                raise KeyError(f"table: is required, as there are several: {', '.join(self._tables)}")
            return next(iter(self._tables.values()))
        if name not in self._tables:
            raise KeyError(f"table = {name!r}: this store has {', '.join(self._tables)}")
        return self._tables[name]

    def _require_here(self) -> None:
        if os.getpid() != self._process:
            raise ClosedError("this store was opened in another process; open it again in this one")

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the store is closed")

    def _output(
        self, table: Table, shape: tuple[int, ...], stream: None, out: torch.Tensor | None, raw: bool
    ) -> torch.Tensor:
        if stream is not None:
            raise ValueError(f"stream = {stream!r}: a store without a device tier has no streams; allowed is None")
        if raw:
            return output(out, (*shape, table.record.record_bytes), torch.uint8)
        return output(out, (*shape, table.record.dim), table.dtype)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """The lock of a store that serves this process and has room for a flight."""
        self._require_here()
        with self._lock:
            self._require_open()
            if self._abandoned:
                self._reap()
            if self._flights >= MAX_PINS:
                raise RuntimeError(f"{self._flights} tickets are in flight; take, cancel or drop some")
            yield

    def _hold(self, table: Table, shape: tuple[int, ...], plan: Plan) -> Flight:
        """A flight of what was planned. Under the lock."""
        flight = Flight(table, shape, plan)
        self._flights += 1
        if plan.pending:
            level = self._host.level
            borrowed = np.empty(plan.pending, np.int32)
            flight.borrowed = borrowed[: pending_of(level.slots, plan.held[: plan.hits], borrowed)]
            flight.borrowed_rows = level.slots["key"][flight.borrowed]
        return flight

    def _read(self, flight: Flight, due_ns: int) -> None:
        """Begin a flight's reads."""
        table, plan = flight.table, flight.plan
        if not plan.misses.size and not flight.borrowed.size:
            return
        flight.staging = np.empty((plan.staged, self._stride), np.uint8)
        try:
            flight.job = self._submit(flight, plan.misses, plan.fill, flight.borrowed_rows, due_ns)
        except (OSError, RuntimeError) as error:
            self._release(flight, failed=True)
            raise self._closed_or(error, table) from error

    def _submit(
        self,
        flight: Flight,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int64],
        due_ns: int,
    ) -> Any:
        slots, entries = self._host.buffer.slots, self._host.level.slots
        targets = Targets(
            slots.ctypes.data,
            self._stride,
            flight.staging.ctypes.data,
            self._stride,
            entries.ctypes.data + _PENDING,
            SLOT.itemsize,
        )
        base = flight.table.base
        return flight.table.reader.submit(rows - base, places, wanted - base, targets, due_ns)

    def _closed_or(self, error: OSError | RuntimeError, table: Table) -> Exception:
        if self._closed:
            return ClosedError("the store was closed meanwhile")
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            return StorageError(error.errno or errno.EIO, f"reads of table {table.name!r} cannot be begun: {error}")
        return error

    def _take(self, ticket: Ticket, flight: Flight, stream: None, out: torch.Tensor | None, raw: bool) -> torch.Tensor:
        """For `Ticket.take`."""
        result = self._output(flight.table, flight.shape, stream, out, raw)
        if ticket._claim() is not flight:
            raise RuntimeError("this ticket was taken or cancelled before")
        self._require_here()
        if self._closed:
            self._abandoned.append(flight)
            self._require_open()
        record = flight.table.record
        if raw or flight.table.verbatim:
            self._finish(flight, result)
        else:
            records = torch.empty((flight.plan.where.size, record.record_bytes), dtype=torch.uint8)
            self._finish(flight, records)
            record.decode_to(records, result.view(-1, record.dim))
        return result

    def _finish(self, flight: Flight, records: torch.Tensor) -> None:
        """Wait for a flight's rows, write their records, let go of it."""
        try:
            if flight.job is not None:
                self._await(flight)
            num_bytes = flight.table.record.record_bytes
            self._host.gather(flight.plan.where, flight.staging, records.data_ptr(), num_bytes)
            self._release(flight)
        finally:
            if not flight.released:
                self._abandoned.append(flight)

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
        if lost.any():
            self._read_again(flight, flight.borrowed[lost], flight.borrowed_rows[lost])

    def _read_again(self, flight: Flight, slots: npt.NDArray[np.int32], rows: npt.NDArray[np.int64]) -> None:
        """Read rows that were to come into these slots to the staging area instead."""
        where, staged = flight.plan.where, len(flight.staging)
        flight.staging = np.concatenate([flight.staging, np.empty((rows.size, self._stride), np.uint8)])
        places = ~np.arange(staged, staged + rows.size, dtype=np.int32)
        try:
            flight.job = self._submit(flight, rows, places, _NO_ROWS, 0)
        except (OSError, RuntimeError) as error:
            raise self._closed_or(error, flight.table) from error
        flight.job.wait()
        self._raise_error(flight, flight.job)
        for slot, place in zip(slots.tolist(), places.tolist(), strict=True):
            where[where == slot] = place

    def _raise_error(self, flight: Flight, job: Any) -> None:
        """StorageError where a job failed, ClosedError where it did because of `close`; the flight is let go of then."""
        try:
            flight.table.reader.raise_error(job)
        except BaseException as error:
            self._release(flight, failed=True)
            if self._closed and isinstance(error, OSError):
                raise ClosedError("the store was closed before the rows had been read") from error
            raise

    def _release(self, flight: Flight, *, failed: bool = False) -> None:
        with self._lock:
            self._let_go(flight, failed)

    def _let_go(self, flight: Flight, failed: bool) -> None:
        """Unpin a flight's slots; forget those that it was to fill if it failed. Under the lock."""
        if flight.released:
            return
        flight.released = True
        plan = flight.plan
        if failed:
            self._host.level.drop(plan.held[plan.hits :])
        self._host.level.unpin(plan.held)
        self._flights -= 1

    def _reap(self) -> None:
        """Let go of flights that nobody waits for and whose reads are done. Under the lock."""
        for _ in range(len(self._abandoned)):
            flight = self._abandoned.popleft()
            if not flight.done:
                self._abandoned.append(flight)
            else:
                self._let_go(flight, flight.job is not None and not flight.table.reader.brought(flight.job))


def _level(policy: str, capacity: int, options: Mapping[str, Any], num_rows: int) -> Level:
    """The books of the host tier. ConfigError where the policy does not take these parameters."""
    try:
        return Level(POLICIES[policy], capacity, options, num_rows)
    except (TypeError, ValueError) as error:
        given = {name: value for name, value in options.items() if not isinstance(value, np.ndarray)}
        takes = ", ".join(POLICIES[policy].parameters) or "no options"
        message = f"host.policy_options = {given}: policy {policy!r} refuses them: {error}; it takes {takes}"
        raise ConfigError(message) from error


def _hot_rows(path: Path, num_rows: int) -> npt.NDArray[np.int64]:
    """Rows of a hot set. ConfigError where one is none of the store's: the file belongs to other tables."""
    rows = read_rows(path)
    wrong = rows[(rows < 0) | (rows >= num_rows)]
    if wrong.size:
        raise ConfigError(f"host.hot_set = {str(path)!r}: has row {wrong[0]}; allowed are rows 0 to {num_rows - 1}")
    return rows


def _capacity(host: HostConfig, stride: int, num_rows: int) -> int:
    """Slots of the host tier: what fits its bytes, and never more than there are rows."""
    if host.capacity < stride:
        raise ConfigError(
            f"host.capacity = {host.capacity}: holds no row of {stride} bytes; allowed are {stride} bytes or more"
        )
    return min(host.capacity // stride, num_rows, 2**31 - 1)


_NO_ROWS = np.empty(0, np.int64)


def _end(process: int, disk: Disk | None, sources: list[SourceReader]) -> None:
    """End what a store's `open` began, all of it even if a source's `close` fails; in the process that opened it only."""
    if process != os.getpid():
        return
    with ExitStack() as stack:
        if disk is not None:
            stack.callback(disk.close)
        for source in sources:
            stack.callback(source.close)
