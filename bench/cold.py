"""Cold: distinct random rows that nothing has cached, against fio, engramdb-python and a memory map.

Every contestant gets rows of its own in every round, so that nobody profits from what another made the host cache. Page
caches are dropped before each call; the store reads with O_DIRECT and has none.
"""

import argparse
import json
import subprocess
from functools import partial
from statistics import median
from typing import Any

import engramdb
import numpy as np
import torch
from _common import (
    GIB,
    NUM_SHARDS,
    ROW_BYTES,
    BenchTable,
    Cache,
    Figure,
    Sample,
    bench_table,
    distinct_batches,
    latencies,
    memory_map,
    parser,
    records,
    report,
    timed,
)
from rich.progress import track

from tiercache import Store

BATCH, SMALL = 10_000, 48
OURS, FIO, ENGRAMDB, MEMMAP = "tiercache", "fio", "engramdb-python", "numpy memmap, MADV_RANDOM"
_HOST_BYTES = 16 << 20  # far less than the rows that pass through


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    options.add_argument("--fio-seconds", type=float, default=2, help="of each run of fio (%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    table = bench_table(arguments.dir, int(arguments.size * GIB), shards=True)
    cache = Cache(table.files())
    theirs = engramdb.Store(str(table.shards), NUM_SHARDS, table.rows_per_shard, ROW_BYTES)
    with Store.open(table.config(_HOST_BYTES)) as ours:
        _require_equal(table, ours, theirs)
        large = _large(table, ours, theirs, cache, arguments)
        small = _small(table, ours, theirs, cache)
        storage = ours.stats().storage
    engine = f"{storage.engine} engine, alignment {storage.alignment}" if storage else ""
    figures = [*_large_figures(large), *_small_figures(small)]
    report("cold", f"Cold: {BATCH:,} of {table.num_rows:,} rows of {ROW_BYTES} B ({engine})", figures, arguments)


def _require_equal(table: BenchTable, ours: Store, theirs: Any) -> None:
    """Everybody serves the same bytes."""
    rows = distinct_batches(table.num_rows, 1, 1000, seed=1)[0]
    expected = records(rows)
    got = np.frombuffer(theirs.fetch(rows), np.uint8).reshape(-1, ROW_BYTES)
    for what in (ours.fetch(rows, raw=True).numpy(), got, memory_map(table)[rows]):
        if not np.array_equal(what, expected):
            raise SystemExit(f"{table.path}: holds other bytes than it should; delete it")


def _large(table: BenchTable, ours: Store, theirs: Any, cache: Cache, arguments: argparse.Namespace) -> dict[str, list[Sample]]:
    """Samples of each contestant for `BATCH` rows, interleaved."""
    samples: dict[str, list[Sample]] = {OURS: [], FIO: [], ENGRAMDB: [], MEMMAP: []}
    batches = iter(distinct_batches(table.num_rows, 5 * arguments.rounds, BATCH))
    for _ in track(range(arguments.rounds), f"{BATCH:,} rows"):
        samples[FIO].append(_fio(table, arguments.fio_seconds))
        for _ in range(2):
            samples[OURS].append(timed(partial(ours.fetch, torch.from_numpy(next(batches)))))
            cache.drop()
            samples[ENGRAMDB].append(timed(partial(theirs.fetch, next(batches))))
        mapped = memory_map(table)
        cache.drop()
        samples[MEMMAP].append(timed(partial(mapped.__getitem__, next(batches))))
        del mapped
        cache.drop()
    return samples


def _fio(table: BenchTable, seconds: float) -> Sample:
    """What fio takes for as many reads as a batch has rows."""
    done = subprocess.run(
        [
            "fio", "--name=cold", f"--filename={table.path}", "--readonly", "--rw=randread", "--bs=4k", "--iodepth=64",
            "--ioengine=io_uring", "--direct=1", "--norandommap", "--randrepeat=0", "--time_based",
            f"--runtime={seconds}", "--output-format=json",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    job = json.loads(done.stdout)["jobs"][0]
    elapsed = BATCH / job["read"]["iops"]
    return Sample(elapsed, (job["usr_cpu"] + job["sys_cpu"]) / 100 * elapsed)


def _large_figures(samples: dict[str, list[Sample]]) -> list[Figure]:
    rate = {name: BATCH / median(sample.seconds for sample in runs) / 1000 for name, runs in samples.items()}
    cpu = {name: median(sample.cpu_seconds for sample in runs) / BATCH * 1e6 for name, runs in samples.items()}
    what = f"{BATCH:,} rows"
    return [
        Figure(what, rate[OURS], "k rows/s", f"{FIO}, 4 KiB, QD 64", rate[FIO], at_least=0.90),
        Figure(what, rate[OURS], "k rows/s", ENGRAMDB, rate[ENGRAMDB], at_least=1.15),
        Figure(what, rate[OURS], "k rows/s", MEMMAP, rate[MEMMAP], at_least=4),
        Figure("CPU", cpu[OURS], "s/1 M rows", at_most=4.5),
        Figure("CPU", cpu[OURS], "s/1 M rows", ENGRAMDB, cpu[ENGRAMDB], at_most=0.4),
        Figure("CPU", cpu[OURS], "s/1 M rows", FIO, cpu[FIO]),
        Figure("CPU", cpu[OURS], "s/1 M rows", MEMMAP, cpu[MEMMAP]),
    ]


def _small(table: BenchTable, ours: Store, theirs: Any, cache: Cache, rounds: int = 300) -> dict[str, list[float]]:
    """Seconds of each contestant for `SMALL` rows, interleaved."""
    samples: dict[str, list[float]] = {OURS: [], ENGRAMDB: []}
    batches = distinct_batches(table.num_rows, 2 * rounds, SMALL, seed=2)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        samples[OURS] += latencies(ours.fetch, [torch.from_numpy(first)])
        cache.drop()
        samples[ENGRAMDB] += latencies(theirs.fetch, [second])
    return samples


def _small_figures(samples: dict[str, list[float]]) -> list[Figure]:
    p50 = {name: 1e6 * median(runs) for name, runs in samples.items()}
    return [Figure(f"{SMALL} rows", p50[OURS], "us", ENGRAMDB, p50[ENGRAMDB], at_most=1.0)]


if __name__ == "__main__":
    main()
