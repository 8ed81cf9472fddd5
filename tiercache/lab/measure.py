"""Measures what this machine takes for a fetch: a config's own table files through its own storage settings, and its memory
through a small store of rows of the same record. Some seconds, in which nothing else should run.

Each size is measured in several rounds, interleaved; a figure is the median of its rounds' means. So a pause of the machine in
one round does not count, while what every round has does.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from math import gcd
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tiercache.config import StoreConfig
from tiercache.errors import ConfigError
from tiercache.lab.machine import Below, DiskFigures, Machine, Resident
from tiercache.storage.memory import MemoryTable
from tiercache.storage.table import FileTable
from tiercache.store import Store

Rows = npt.NDArray[np.int64]
Fetch = Callable[[Rows], float]
"""Fetch rows; the seconds."""

_ROUNDS = 5
_RESIDENT = tuple(4**power for power in range(9))
_COLD = tuple(2**power for power in range(14))
_RESIDENT_S, _COLD_S = 0.01, 0.025
"""Time of one size in one round, at least."""

_ARRAY_BYTES = 128 << 20
"""Rows that the store in memory has. Its tiers hold half of them, and a quarter: more than the caches of a processor."""

_DISK_SLOTS = 32_768
"""Slots of the tier over the files: full after some fetches, so that rows have to leave it as they do in service."""

_RUN_BYTES = 24 << 10
"""Rows that lie together, to be read by one read."""

Done = Callable[[], Any]

STEPS = 2 * _ROUNDS
"""Calls of `done`."""


def require_measurable(config: StoreConfig) -> None:
    """ConfigError where a config has a device tier on a device that this machine has not."""
    device = "" if config.device is None else config.device.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device.device = {device!r}: this machine has none to measure; --machine gives the figures of one")


def measure(config: StoreConfig, tables: Sequence[FileTable], *, about: str = "", done: Done = lambda: None) -> Machine:
    """The figures of this machine for a store of this config over these tables, of which the largest is read.

    done: called STEPS times. ConfigError for a device that is not here; StorageError where the files cannot be read.
    """
    require_measurable(config)
    largest = max(tables, key=lambda table: table.num_rows * table.record_bytes)
    resident, below = _measure_memory(config, largest, done)
    disk = _measure_disk(config, largest, resident, done)
    device = "" if config.device is None else config.device.device
    return Machine(
        about=about, record_bytes=largest.record_bytes, device=device, resident=resident, below=below, disk=disk
    )


class _Table(NamedTuple):
    """A table of a store as it is measured. scattered: so many of its rows, others each time, none of them neighbours."""

    store: Store
    name: str
    fetch: Fetch
    scattered: Callable[[int], Rows]


def _open(stack: ExitStack, config: StoreConfig, name: str, sources: dict[str, Any], tiers: dict[str, int]) -> _Table:
    """A store of this config whose tiers have so many bytes."""
    update: dict[str, Any] = {"restore": None, "trace": None}
    for tier, capacity in tiers.items():
        section = getattr(config, tier)
        # A tier of fixed rows would take none of those that are measured.
        policy = {"policy": "lru", "policy_options": {}} if section.policy == "static" else {}
        update[tier] = section.model_copy(update={"capacity": capacity, "hot_set": None, **policy})
    if sources:
        update["tables"] = ()
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        store = stack.enter_context(Store.open(config.model_copy(update=update), tables=sources))
    place = "cpu" if config.device is None else config.device.device
    out = torch.empty((_most_rows(store.record_bytes(name)), store.dim(name)), dtype=store.dtype(name), device=place)

    def fetch(rows: Rows) -> float:
        begin = time.perf_counter()
        store.fetch(rows, out=out[: rows.size], table=name)
        if place.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return _Table(store, name, fetch, _scatter(store.num_rows(name)))


def _most_rows(record_bytes: int) -> int:
    """Rows of the largest fetch that is measured."""
    return max(min(max(_RESIDENT), _ARRAY_BYTES // 4 // record_bytes), 1)


def _scatter(num_rows: int) -> Callable[[int], Rows]:
    """Gives so many rows at a time, none twice before all others, neighbours far apart."""
    step = max(int(num_rows * 0.6180339887), 1)
    while gcd(step, num_rows) != 1:
        step += 1
    given = 0

    def take(count: int) -> Rows:
        nonlocal given
        rows = (given * step + np.arange(count) * step) % num_rows
        given = (given + count) % num_rows
        return rows

    return take


def _mean(call: Callable[[], float], least_s: float) -> float:
    """Mean of a call's figure, called until so much time has passed."""
    total, count, end = 0.0, 0, time.perf_counter() + least_s
    while not count or time.perf_counter() < end:
        total += call()
        count += 1
    return total / count


def _measure_memory(config: StoreConfig, table: FileTable, done: Done) -> tuple[Resident, Below | None]:
    longest = _most_rows(table.record_bytes)
    num_rows = 64 * (-(-_ARRAY_BYTES // table.record_bytes) // 64 + 1)
    rows = MemoryTable(np.zeros((num_rows, table.record_bytes), np.uint8), table.record)
    tiers = {"host": num_rows * table.record_bytes // 2}
    if config.device is not None:
        tiers["device"] = tiers["host"] // 2
    with ExitStack() as stack:
        served = _open(stack, config, "rows", {"rows": rows}, tiers)
        random = np.random.default_rng(0)
        hot = served.scattered(num_rows // (4 if config.device is None else 16))
        for _ in range(4):  # used again, they rise
            for part in np.array_split(hot, -(-hot.size // longest)):
                served.fetch(part)
        sizes = [size for size in _RESIDENT if size <= min(hot.size, longest)]
        rounds: list[list[float]] = []
        for _ in range(_ROUNDS):
            rounds.append([_mean(partial(_fetch_some, served, hot, size, random), _RESIDENT_S) for size in sizes])
            done()
        resident = Resident(rows=tuple(sizes), seconds=tuple(map(median, zip(*rounds, strict=True))))
        if config.device is None:
            return resident, None
        most = min(longest, config.device.promotion // -(-table.record_bytes // 16) // 16, num_rows // 64)
        few, many = (_below(served, size, resident) for size in (min(16, most), max(most, 32)))
    row_seconds = max((many[1] - few[1]) / (many[0] - few[0]), 0.0)
    return resident, Below(call_seconds=max(few[1] - few[0] * row_seconds, 0.0), row_seconds=row_seconds)


def _fetch_some(served: _Table, rows: Rows, count: int, random: np.random.Generator) -> float:
    return served.fetch(random.choice(rows, count))


def _below(served: _Table, size: int, resident: Resident) -> tuple[float, float]:
    """(rows, seconds) that a fetch of rows that the host tier has takes beyond one of rows that the device tier has."""
    batches = [served.scattered(size) for _ in range(max(4, 2048 // size))]
    for rows in batches:
        served.fetch(rows)
    before = served.store.stats()
    total = [served.fetch(rows) for rows in batches]
    after = served.store.stats()
    rows_below = (after.host.hits - before.host.hits) / len(batches)
    return max(rows_below, 1.0), median(total) - float(np.interp(size, resident.rows, resident.seconds))


def _measure_disk(config: StoreConfig, table: FileTable, resident: Resident, done: Done) -> DiskFigures:
    slots = max(min(_DISK_SLOTS, table.num_rows // 4, _ARRAY_BYTES // table.record_bytes), 1)
    tiers = {"host": 64 * slots + slots * table.record_bytes}
    if config.device is not None:
        tiers["device"] = 64 + tiers["host"] // 4
    with ExitStack() as stack:
        served = _open(stack, config, table.name, {}, tiers)
        sizes = [size for size in _COLD if size <= max(min(slots // 2, _most_rows(table.record_bytes)), 1)]
        for _ in range(-(-slots // sizes[-1])):
            served.fetch(served.scattered(sizes[-1]))
        rounds: list[list[tuple[float, float, float, float]]] = []
        for _ in range(_ROUNDS):
            rounds.append([_cold(served, size) for size in sizes])
            done()
        found = [tuple(map(median, zip(*each, strict=True))) for each in zip(*rounds, strict=True)]
        if found[0][1] < 0.5:
            few = f"table {table.name!r}: its {table.num_rows} rows are too few to measure reads"
            raise ConfigError(f"{few}; --machine gives the figures of a machine")
        row_seconds = found[-1][3] / sizes[-1]
        run = max(min(_RUN_BYTES // table.record_bytes, sizes[-1]), 1)
        dense = _dense(served, run, max(sizes[-1] // run, 1), table.num_rows)
        stats = served.store.stats().storage
    assert stats is not None
    points: list[tuple[float, float, float]] = []
    for size, (seconds, reads, num_bytes, _) in zip(sizes, found, strict=True):
        waited = seconds - size * row_seconds - float(np.interp(size, resident.rows, resident.seconds))
        if not points or (reads > points[-1][0] and reads >= 0.9 * size):
            points.append((reads, max(waited, 1e-9), num_bytes / reads))
    read_bytes = points[0][2]
    figures = DiskFigures(
        row_seconds=row_seconds,
        reads=tuple(reads for reads, _, _ in points),
        seconds=tuple(seconds for _, seconds, _ in points),
        read_bytes=read_bytes,
        byte_seconds=0.0,
        alignment=stats.alignment,
        engine=stats.engine,
    )
    return figures.model_copy(update={"byte_seconds": _byte_seconds(figures, dense, resident)})


def _cold(served: _Table, size: int) -> tuple[float, float, float, float]:
    """Of a fetch of so many rows that the tier has not: (seconds, reads, bytes, seconds of planning alone)."""
    before = served.store.stats().storage
    calls = 0

    def fetch() -> float:
        nonlocal calls
        calls += 1
        return served.fetch(served.scattered(size))

    seconds = _mean(fetch, _COLD_S)
    after = served.store.stats().storage
    assert before is not None
    assert after is not None
    begin = time.perf_counter()
    ticket = served.store.prefetch(served.scattered(size), table=served.name)
    planned = time.perf_counter() - begin
    ticket.take()
    return seconds, (after.reads - before.reads) / calls, (after.bytes_read - before.bytes_read) / calls, planned


class _Dense(NamedTuple):
    """A fetch of rows that lie together."""

    rows: int
    seconds: float
    reads: float
    num_bytes: float


def _dense(served: _Table, run: int, runs: int, num_rows: int) -> _Dense:
    random = np.random.default_rng(1)
    seconds, before = [], served.store.stats().storage
    for _ in range(_ROUNDS):
        first = random.choice(max(num_rows // run, 1), min(runs, max(num_rows // run, 1)), replace=False) * run
        rows = (first[:, None] + np.arange(run)).reshape(-1)
        seconds.append(served.fetch(rows[rows < num_rows]))
    after = served.store.stats().storage
    assert before is not None
    assert after is not None
    reads, num_bytes = after.reads - before.reads, after.bytes_read - before.bytes_read
    return _Dense(run * runs, median(seconds), reads / _ROUNDS, num_bytes / _ROUNDS)


def _byte_seconds(figures: DiskFigures, dense: _Dense, resident: Resident) -> float:
    """What a byte of a longer read takes, from a fetch of rows that lie together."""
    further = dense.num_bytes - dense.reads * figures.read_bytes
    if further <= 0:
        return 0.0
    reads = float(np.interp(dense.reads, (0, *figures.reads), (0, *figures.seconds)))
    rest = dense.seconds - dense.rows * figures.row_seconds - float(np.interp(dense.rows, resident.rows, resident.seconds))
    return max(rest - reads, 0.0) / further
