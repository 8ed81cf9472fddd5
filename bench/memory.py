"""Memory: how much a process grows that serves random rows of a large table through a small host tier."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from _common import GIB, BenchTable, Figure, bench_table, console, parser, report

from tiercache import Store

BATCH, HOST_BYTES, MIB = 10_000, 256 << 20, 1 << 20


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=2_000_000, help="rows to fetch (%(default)s)")
    arguments = options.parse_args()
    table = bench_table(arguments.dir, int(arguments.size * GIB))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, console.status(f"Fetching {arguments.rows:,} rows"):
        grown, peak = pool.submit(measure, table, arguments.rows).result()
    allowed = 1.15 * HOST_BYTES / MIB + 150
    figures = [
        Figure("resident set at the end", grown / MIB, "MiB", at_most=allowed),
        Figure("peak of the resident set", peak / MIB, "MiB", at_most=allowed),
    ]
    what = f"{arguments.rows:,} random rows of {arguments.size:g} GiB through {HOST_BYTES // MIB} MiB"
    report("memory", f"Memory: growth by {what}", figures, arguments)


def measure(table: BenchTable, num_rows: int) -> tuple[int, int]:
    """Growth in bytes since the imports, in the end and at the peak, of a process that fetches random rows."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    random = np.random.default_rng(0)
    with Store.open(table.config(HOST_BYTES)) as store:
        for _ in range(0, num_rows, BATCH):
            store.fetch(random.integers(0, table.num_rows, BATCH))
        return _resident("VmRSS") - before, _resident("VmHWM") - before


def _resident(what: str) -> int:
    """Bytes of a line of this process's status."""
    line = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return 1024 * int(line[1])


if __name__ == "__main__":
    main()
