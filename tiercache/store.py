"""Store: tables of rows, held in tiers, behind `fetch`."""

import math
import os
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from tiercache import hot, warm
from tiercache.assemble import beginning_of, level_of, most_rising, recorded_tables, stats_of, stride_of
from tiercache.config import StoreConfig
from tiercache.errors import ConfigError
from tiercache.expectation import Expectation, Lookout, require_foresight
from tiercache.flight import Flight, Ticket
from tiercache.flights import Flights
from tiercache.graph import StaticFetch
from tiercache.groups import Groups
from tiercache.level import PINNED
from tiercache.recording.blocks import RecordedTable
from tiercache.recording.recorder import Recorder
from tiercache.request import Table, checked, rows_of, shape_of, with_values
from tiercache.source import Source
from tiercache.stats import StoreStats
from tiercache.storage import open_table
from tiercache.storage import queue as q
from tiercache.storage.disk import Disk
from tiercache.storage.image import AboutTable, about_tables
from tiercache.storage.memory import sources_of
from tiercache.storage.reader import Reader, SourceReader
from tiercache.storage.table import FileTable
from tiercache.tiers import DeviceTier, open_device_tier
from tiercache.tiers.device import Device, StreamTier
from tiercache.tiers.host import HostTier

_PATIENCE_NS = 100_000_000
"""When a prefetch without a deadline is due, in ns from now: behind every fetch, before prefetches for later."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Store:
    """Fixed-size rows of one or more tables, served through a tier of host memory. Made by `Store.open`.

    Safe to use from several threads. Not from a process forked after `open`: there every call raises ClosedError.
    """

    def __init__(
        self,
        config: StoreConfig,
        tables: Mapping[str, FileTable | Source],
        options: Mapping[str, Mapping[str, Any]],
        device: Device | None = None,
        hot_sets: Mapping[str, npt.NDArray[np.int64]] | None = None,
    ) -> None:
        """For `open`; tables are described and not yet open. options: of each tier's policy. device: for the config's.
        hot_sets: rows that tiers begin with.
        """
        self.config = config
        size = config.group_rows
        self._stride = stride_of((table.record.record_bytes for table in tables.values()), config)
        num_rows = sum(table.num_rows for table in tables.values())
        levels = {
            tier: level_of(tier, section, options, self._stride, num_rows, size)
            for tier, section in (("host", config.host), ("device", config.device))
            if section is not None
        }
        capacities = (level.capacity for level in levels.values())
        self._groups = Groups(size, num_rows, *capacities) if size > 1 else None
        self._host = HostTier(levels["host"], self._stride * size, self._groups)
        self._device: DeviceTier | None = None
        if config.device is not None:
            most = most_rising(config.device, self._stride, size)
            self._device = open_device_tier(config.device.device, levels["device"], self._host, most, device)
        self._top = self._device or self._host
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
        self._sources: list[SourceReader] = []
        try:
            queue = self._disk.engine.queue if self._disk else q.new_queue()
            self._flights = Flights(self._host, self._top, self._groups, self._stride, queue)
            self._tables = self._open_readers(tables, queue)
        except BaseException:
            if self._disk:
                self._disk.close()
            raise
        begun = self._disk, self._sources, self._top, self._flights.recorders
        self._finalizer = weakref.finalize(self, _end, os.getpid(), *begun)
        self._files = {name: table for name, table in tables.items() if isinstance(table, FileTable)}
        try:
            self._restored = () if config.restore is None else self._restore(config.restore, num_rows)
            self._hot_sets = hot.load(self._tiers, hot_sets or {}, self._tables.values())
            if config.trace is not None:
                self.record(config.trace.path)
        except BaseException:
            self.close()
            raise

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
        num_rows = sum(table.num_rows for table in described.values())
        begin = beginning_of(settings, num_rows)
        store = cls(settings, described, begin.options, hot_sets=begin.hot_sets)
        for note in (*(store._disk.notes if store._disk else ()), *store._restored):
            warnings.warn(f"tiercache: {note}", RuntimeWarning, stacklevel=2)
        return store

    def _open_readers(self, tables: Mapping[str, FileTable | Source], queue: q.Queue) -> dict[str, Table]:
        readers = iter(self._disk.readers if self._disk else ())
        opened: dict[str, Table] = {}
        base = 0
        for name, table in tables.items():
            reader: Reader
            if isinstance(table, FileTable):
                reader = next(readers)
            else:
                reader = SourceReader(table, queue)
                self._sources.append(reader)
            record = table.record
            dtype = _DTYPES.get(self.config.dtype, record.default_dtype)
            verbatim = record.is_verbatim(dtype)
            size = self.config.group_rows
            opened[name] = Table(name, base, table.num_rows, record, dtype, reader, verbatim, size)
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
        stream: Any = None,
        *,
        out: torch.Tensor | None = None,
        table: str | None = None,
        raw: bool = False,
    ) -> torch.Tensor:
        """Rows by number, in the order and shape asked for, duplicates included.

        indices: integer tensor or array of any shape, or numbers; rows of `table`, which may be left out where there is
        one. Returns dtype[*indices.shape, dim], or uint8[*indices.shape, record_bytes] with `raw`; written to `out` where
        that is given. With a device tier the rows are on its device, ready on `stream` (None: the current one) like the
        result of any operator; without streams, it must be None. Indices on the device cost one synchronisation with it.
        Where `group_rows` is above 1, the indices are groups one behind the other.

        Raises IndexError for a row out of range (the first one is named), TypeError and ValueError for indices or an
        output that do not fit (or are not whole groups), KeyError for an unknown table; then nothing has changed. StorageError
        where rows could not be read: none of this call's are kept, and the next fetch works. ClosedError after `close`.
        """
        wanted = self._table(table)
        rows, shape = rows_of(indices, wanted, self._top.torch_device)
        result, records = self._outputs(wanted, shape, rows.size, stream, out, raw)
        flight = Flight(wanted, rows, shape, self._top.room(rows))
        try:
            if not self._flights.serve(flight, records):
                begun_ns = time.monotonic_ns()
                self._flights.read(flight, 0)
                self._flights.finish(flight, records, stream, begun_ns)
        except BaseException:
            self._flights.give_up(flight)
            raise
        return self._decoded(wanted, records, result)

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
        rows, shape = rows_of(indices, wanted, self._top.torch_device)
        due = time.monotonic_ns() + (_PATIENCE_NS if deadline is None else int(min(deadline, 1e9) * 1e9))
        flight = Flight(wanted, rows, shape, self._top.room(rows))
        try:
            self._flights.plan(flight)
            self._flights.read(flight, due)
            return Ticket(self, flight, self._flights.abandon)
        except BaseException:
            self._flights.give_up(flight)
            raise

    def expect(self, indices: Any, *, table: str | None = None) -> Expectation:
        """Say which rows are going to be asked for, in this order, so that the host tier keeps and drops rows accordingly.

        Reads nothing. For one sequence whose next tokens are known: a prompt, the rest of it, draft tokens. Sequences are taken
        to advance in turns; `Expectation.extend` adds rows to one. A fetch or prefetch of a row is the use that was expected
        soonest of it, whoever asks. Rows that are not asked for are given up when they are overdue for long, or by
        `Expectation.cancel`. At most 2 million rows are expected at a time, about 60 bytes each; those beyond are not kept.

        indices and table are as in `fetch`, and so are the errors; ConfigError where the host tier's policy is not gittins,
        and with `group_rows`; RuntimeError where 4096 sequences expect rows. The first call of all takes up 8 bytes a slot;
        the first on a machine compiles for some seconds.
        """
        wanted = self._table(table)
        lane = self._expect(wanted, indices, None)
        assert self._flights.lookout is not None
        return Expectation(self, wanted, lane, self._flights.lookout.leave)

    def static_fetch(
        self,
        shape: tuple[int, ...],
        *,
        out: torch.Tensor | None = None,
        table: str | None = None,
        raw: bool = False,
    ) -> StaticFetch:
        """A fetch of indices of one shape, again and again, whose gather can be captured in a CUDA graph.

        Needs a device tier with streams: ValueError without one. The other arguments and errors are those of `fetch`.
        """
        wanted = self._table(table)
        shape = shape_of(shape)
        if not isinstance(self._device, StreamTier):
            raise ValueError("static_fetch: needs a device tier with streams; a store on the CPU has none")
        if math.prod(shape) % wanted.group_rows:
            raise ValueError(f"shape = {shape}: this store serves groups of {wanted.group_rows} rows; allowed are whole groups")
        result, _ = self._outputs(wanted, shape, 0, None, out, raw)
        return StaticFetch(self._flights, self._device, wanted, shape, result)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Save what the tiers hold to an image, for the setting `restore` of the next store; the number of rows in it.

        Other threads may fetch meanwhile. An image that is there is replaced once the new one is whole and on the disk. Only a
        store whose tables are all on disk can be saved: ConfigError where one is a source, as nobody knows what that holds
        next time. StorageError where the image cannot be written, where something else is in its place, or where somebody
        else is just writing it. A relative path begins at the current directory.
        """
        self._flights.require_here()
        self._flights.require_open()
        about = self._about("save")
        with self._flights.lock:
            self._flights.reap_all()  # what has risen is then known to be there
        return warm.save(Path(path), self._tiers, about, self._host.stride, self._flights.lock, self._flights.require_open)

    def save_hot_set(self, path: str | os.PathLike[str]) -> int:
        """Save which rows the tiers hold, for the setting `hot_set` of a tier of the next store; how many they are.

        int64 row numbers of the store in a .npy file: those of the device tier, then the others of the host tier, and in each
        of them those first that were used last. Other threads may fetch meanwhile. A hot set that is there is replaced once
        the new one is whole and on the disk. StorageError where it cannot be written, where something else is in its place, or
        where somebody else is just writing it; ConfigError with `group_rows`. A relative path begins at the current directory.
        """
        self._flights.require_here()
        self._flights.require_open()
        self._require_rows("save_hot_set")
        return hot.save(Path(path), [tier.level for tier in self._tiers.values()])

    def record(self, path: str | os.PathLike[str]) -> Recorder:
        """Begin to record the rows of every fetch and prefetch, in the order in which they are planned, until it is closed.

        It goes on in a file that is there and of the same tables, behind its last whole block. What a thread cannot write fast
        enough is left out, whole batches at a time, and counted in `stats().recordings`. StorageError where the file cannot be
        written or somebody is recording to it, FormatError where it is something else or of other tables.
        """
        self._flights.require_here()
        with self._flights.lock:
            self._flights.require_open()
            counters = self._top.level.counters
        if self._groups is not None:
            counters = np.zeros_like(counters)  # a level of groups is asked for keys, not rows: see `Flights`
        flights = self._flights
        return Recorder(Path(path), self.recorded_tables(), flights.lock, flights.recorders, counters, flights.require_open)

    def recorded_tables(self) -> list[RecordedTable]:
        """What a recording says of the tables, in the order of their rows."""
        return recorded_tables(self._tables, self._files)

    def stats(self) -> StoreStats:
        """Counts since open, and what serves."""
        self._flights.require_here()
        with self._flights.lock:
            self._flights.require_open()
            row_ns = self._flights.waited_ns / max(self._flights.waited_rows, 1)
            return StoreStats(
                fetches=self._flights.num_fetches,
                rows=self._flights.num_rows,
                row_ns=row_ns,
                flights=len(self._flights),
                host=stats_of(self._host, row_ns),
                storage=self._disk.stats() if self._disk else None,
                device=None if self._device is None else stats_of(self._device, row_ns),
                recordings=tuple(recorder.stats() for recorder in self._flights.recorders),
                hot_sets=self._hot_sets,
            )

    def check(self) -> None:
        """Raise AssertionError where the books do not add up. Reads every slot's entry: for tests, and for doubts."""
        self._flights.require_here()
        with self._flights.lock:
            if self._flights.closed:
                return
            self._flights.reap_all()
            for tier in {self._host, self._top}:
                tier.level.check()
                if self._groups is not None:
                    assert tier.members is not None
                    self._groups.check(tier.level, tier.members)
                if not self._flights:
                    assert tier.level.counters[PINNED] == 0, "slots are pinned and nothing is in flight"
                    assert not tier.level.slots["pending"].any(), "slots are pending and nothing is in flight"

    def close(self) -> None:
        """End everything that `open` began: reads in flight land, the others are given up. A second close does nothing.

        Recordings end too: StorageError, when all else is closed, where one could not be written.
        Tickets that were not taken, and fetches in other threads that still wait, raise ClosedError.
        """
        if self._flights.process != os.getpid():
            self._finalizer.detach()
            return
        with self._flights.lock:
            self._flights.closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _tiers(self) -> dict[str, HostTier | DeviceTier]:
        """The tiers by name, the device's first."""
        return ({} if self._device is None else {"device": self._device}) | {"host": self._host}

    def _about(self, what: str) -> list[AboutTable]:
        """What an image says of the tables. ConfigError where one is a source, and for tiers of groups."""
        self._require_rows(what)
        if sources := [name for name in self._tables if name not in self._files]:
            raise ConfigError(f"{what}: table {sources[0]!r} is a source, not a file; allowed are tables on disk")
        return about_tables(self._files)

    def _require_rows(self, what: str) -> None:
        if self._groups is not None:
            raise ConfigError(f"{what}: the tiers hold groups of {self._groups.size} rows; allowed is group_rows = 1")

    def _restore(self, path: Path, num_rows: int) -> tuple[str, ...]:
        """Fill the tiers from an image; notes on it."""
        about = self._about(f"restore = {str(path)!r}")
        if not os.path.lexists(path) and path.parent.is_dir():
            return (f"restore: nothing is at {path} yet, the tiers begin empty",)
        record_bytes = max(table.record_bytes for table in self._files.values())
        return warm.restore(path, self._tiers, about, record_bytes, num_rows)

    def _table(self, name: str | None) -> Table:
        if name is None:
            if len(self._tables) > 1:
                raise KeyError(f"table: is required, as there are several: {', '.join(self._tables)}")
            return next(iter(self._tables.values()))
        if name not in self._tables:
            raise KeyError(f"table = {name!r}: this store has {', '.join(self._tables)}")
        return self._tables[name]

    def _outputs(
        self, table: Table, shape: tuple[int, ...], size: int, stream: Any, out: torch.Tensor | None, raw: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is returned, what a gather writes): the same, or records to be decoded."""
        if stream is not None and not self._top.decodes:
            raise ValueError(f"stream = {stream!r}: a store on the CPU has no streams; allowed is None")
        row_shape = (*shape, table.record.record_bytes if raw else table.record.dim)
        dtype = torch.uint8 if raw else table.dtype
        if out is None:
            result = with_values(self._top.empty(row_shape, dtype, stream), "rows")
        else:
            result = checked(out, row_shape, dtype, self._top.torch_device)
        if raw or table.verbatim or self._top.decodes:
            return result, result
        records = torch.empty((size, table.record.record_bytes), dtype=torch.uint8, device="cpu")
        return result, with_values(records, "rows")

    def _decoded(self, table: Table, records: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The result, with the records decoded into it unless they are it."""
        if records is not result:
            table.record.decode_to(records, result.view(-1, table.record.dim))
        return result

    def _expect(self, table: Table, indices: Any, expectation: Expectation | None) -> int:
        """Announce rows of a table behind an expectation's others: how many there was room for. Without one: a new lane."""
        rows, _ = rows_of(indices, table, self._top.torch_device)
        self._require_rows("expect")
        require_foresight(self._host.level)
        self._flights.require_here()
        with self._flights.lock:
            self._flights.require_open()
            if self._flights.lookout is None:
                self._flights.lookout = Lookout(self._host.level)
            if expectation is not None:
                if expectation._lane is None:
                    raise RuntimeError("this expectation was cancelled before")
                return self._flights.lookout.level.announce(rows, expectation._lane)
            lane = self._flights.lookout.take()
            self._flights.lookout.level.announce(rows, lane)
            return lane

    def _left(self, expectation: Expectation) -> int:
        """For `Expectation.left`."""
        self._flights.require_here()
        with self._flights.lock:
            lane = expectation._lane
            return 0 if lane is None else self._host.level.num_left(lane)

    def _cancel(self, expectation: Expectation) -> None:
        """For `Expectation.cancel`."""
        self._flights.require_here()
        with self._flights.lock:
            lane = expectation._lane
            if lane is not None:
                self._host.level.cancel(lane)
                expectation._lane = None
                expectation._leave(lane)

    def _take(self, ticket: Ticket, flight: Flight, stream: Any, out: torch.Tensor | None, raw: bool) -> torch.Tensor:
        """For `Ticket.take`."""
        table = flight.table
        result, records = self._outputs(table, flight.shape, flight.plan.where.size, stream, out, raw)
        if ticket._claim() is not flight:
            raise RuntimeError("this ticket was taken or cancelled before")
        try:
            self._flights.require_here()
            self._flights.require_open()
            self._flights.finish(flight, records, stream)
        except BaseException:
            self._flights.give_up(flight)
            raise
        return self._decoded(table, records, result)

def _end(
    process: int,
    disk: Disk | None,
    sources: list[SourceReader],
    top: HostTier | DeviceTier,
    recorders: list[Recorder],
) -> None:
    """End what a store's `open` began, all of it even if a source's `close` fails; in the process that opened it only."""
    if process != os.getpid():
        return
    with ExitStack() as stack:
        stack.callback(top.close)
        if disk is not None:
            stack.callback(disk.close)
        for source in sources:
            stack.callback(source.close)
        for recorder in list(recorders):
            stack.callback(recorder.close)
