"""Mixed: small fetches alone, and while a large cold prefetch keeps the disk busy."""

from collections.abc import Iterator
from statistics import median

import numpy as np
import torch
from _common import (
    GIB,
    ROW_BYTES,
    BenchTable,
    Figure,
    Rows,
    bench_table,
    console,
    distinct_batches,
    latencies,
    parser,
    report,
)
from rich.progress import track

from tiercache import Store

BATCH, LARGE, _COLD_A_ROUND, _HOST_BYTES = 48, 100_000, 100, 1 << 30


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    table = bench_table(arguments.dir, int(arguments.size * GIB))
    with Store.open(table.config(_HOST_BYTES)) as store:
        idle, busy, idle_cold, busy_cold = _measure(store, table, arguments.rounds)
    p50, p99 = ([1e6 * median(float(np.percentile(run, q)) for run in runs) for runs in (idle, busy)] for q in (50, 99))
    cold = [1e6 * median(seconds for run in runs for seconds in run) for runs in (idle_cold, busy_cold)]
    worst = [1e6 * median(float(np.percentile(run, 99)) for run in runs) for runs in (idle_cold, busy_cold)]
    figures = [
        Figure(f"{BATCH} resident rows, p50", p50[1], "us", "idle", p50[0]),
        Figure(f"{BATCH} resident rows, p99", p99[1], "us", "idle", p99[0], at_most=5),
        Figure(f"{BATCH} resident rows, p99, worst round", *_worst(busy, idle)),
        Figure(f"{BATCH} cold rows, p50", cold[1], "us", "idle", cold[0], at_most=10),
        Figure(f"{BATCH} cold rows, p99", worst[1], "us", "idle", worst[0]),
    ]
    report("mixed", f"Mixed: small fetches while a prefetch of {LARGE:,} cold rows runs", figures, arguments)


Runs = list[list[float]]


def _worst(busy: Runs, idle: Runs) -> tuple[float, str, str, float]:
    """p99 of the worst round of each. It shows what the median hides: rounds differ by where the threads are put."""
    worst = [1e6 * max(float(np.percentile(run, 99)) for run in runs) for runs in (busy, idle)]
    return worst[0], "us", "idle", worst[1]


def _measure(store: Store, table: BenchTable, rounds: int) -> tuple[Runs, Runs, Runs, Runs]:
    """Seconds of small fetches, a list a round: resident idle and busy, cold idle and busy."""
    resident = _fill(store, table)
    cold = iter(_cold_rows(table, resident, rounds))
    random = np.random.default_rng(3)
    idle, busy, idle_cold, busy_cold = ([] for _ in range(4))  # type: tuple[Runs, Runs, Runs, Runs]
    for _ in track(range(rounds), "Rounds", console=console, transient=True):
        sets = [torch.from_numpy(random.choice(resident, BATCH)) for _ in range(20_000)]
        idle.append(latencies(store.fetch, sets))
        ticket = store.prefetch(_take(cold, LARGE))
        run: list[float] = []
        while not ticket.done:
            run += latencies(store.fetch, [sets[len(run) % len(sets)]])
        ticket.take()
        busy.append(run)
        idle_cold.append(latencies(store.fetch, [_take(cold, BATCH) for _ in range(_COLD_A_ROUND)]))
        batches = [_take(cold, BATCH) for _ in range(_COLD_A_ROUND)]
        ticket = store.prefetch(_take(cold, LARGE))
        run = []
        while batches and not ticket.done:
            run += latencies(store.fetch, [batches.pop()])
        ticket.take()
        busy_cold.append(run)
    return idle, busy, idle_cold, busy_cold


def _fill(store: Store, table: BenchTable) -> Rows:
    """Make a quarter of the tier's capacity resident: runs of neighbouring rows, which need few reads."""
    count = min(_HOST_BYTES // 4 // ROW_BYTES, table.num_rows // 4)
    first = np.arange(64) * (table.num_rows // 64)
    resident: Rows = (first[:, None] + np.arange(count // 64)).reshape(-1)
    with console.status("Filling the host tier"):
        for start in range(0, resident.size, LARGE):
            store.fetch(resident[start : start + LARGE])
    return resident


def _cold_rows(table: BenchTable, resident: Rows, rounds: int) -> Rows:
    """Distinct random rows that are not resident."""
    needed = rounds * 2 * (LARGE + _COLD_A_ROUND * BATCH)
    rows = distinct_batches(table.num_rows, 1, min(table.num_rows, needed * 5 // 4 + resident.size // 8), seed=4)[0]
    cold: Rows = rows[~np.isin(rows, resident)]
    return cold


def _take(rows: Iterator[np.int64], count: int) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(rows, np.int64, count))


if __name__ == "__main__":
    main()
