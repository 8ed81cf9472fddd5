"""Small: a decode step's worth of resident rows, against engramdb-python's warm page cache and against an embedding.

Each contestant serves every set of rows once a round, in a block of its own, and so finds in the CPU's caches what it left
there itself.
"""

from functools import partial
from statistics import median

import engramdb
import numpy as np
import torch
from _common import GIB, NUM_SHARDS, ROW_BYTES, Cache, Figure, bench_table, console, latencies, parser, report

from tiercache import Store

BATCH, _SETS, _HOST_BYTES = 48, 500, 256 << 20


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=12, help="(%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    table = bench_table(arguments.dir, int(arguments.size * GIB), shards=True)
    Cache(table.files()).drop()
    theirs = engramdb.Store(str(table.shards), NUM_SHARDS, table.rows_per_shard, ROW_BYTES)
    capacity = min(_HOST_BYTES // ROW_BYTES, table.num_rows)
    random = np.random.default_rng(0)
    with Store.open(table.config(capacity * ROW_BYTES)) as store:
        with console.status("Filling the host tier"):
            # Neighbouring rows, which fill the tier with few reads.
            first = np.arange(0, table.num_rows - capacity // 64, table.num_rows // 64)[:64]
            resident = (first[:, None] + np.arange(capacity // 64)).reshape(-1)
            for start in range(0, resident.size, 100_000):
                store.fetch(resident[start : start + 100_000])
        places = [random.choice(resident.size, BATCH, replace=False) for _ in range(_SETS)]
        sets = [resident[each] for each in places]
        tensor = torch.ones((resident.size, ROW_BYTES // 2), dtype=torch.bfloat16)
        for each in sets:
            theirs.fetch(each)
        misses = store.stats().host.misses
        inputs = [torch.from_numpy(each) for each in sets]
        there = [torch.from_numpy(each) for each in places]
        out = torch.empty((BATCH, ROW_BYTES // 2), dtype=torch.bfloat16)
        samples: dict[str, list[float]] = {"fetch": [], "out": [], "engramdb": [], "embedding": []}
        for _ in range(arguments.rounds):
            samples["fetch"] += latencies(store.fetch, inputs)
            samples["embedding"] += latencies(partial(_embedding, tensor), there)
            samples["out"] += latencies(partial(store.fetch, out=out), inputs)
            samples["engramdb"] += latencies(theirs.fetch, sets)
        if store.stats().host.misses != misses:
            raise SystemExit("a row was not resident")
    p50 = {name: 1e6 * median(runs) for name, runs in samples.items()}
    figures = [
        Figure("fetch", p50["fetch"], "us", "engramdb-python, page cache", p50["engramdb"], at_most=0.2),
        Figure("fetch", p50["fetch"], "us", "F.embedding", p50["embedding"], at_most=8),
        Figure("fetch(out=)", p50["out"], "us", "F.embedding", p50["embedding"]),
    ]
    report("small", f"Small: {BATCH} resident rows of {ROW_BYTES} B", figures, arguments)


def _embedding(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(rows, tensor)


if __name__ == "__main__":
    main()
