"""Restart: how fast a tier is warm again from its image or a hot set, against reading its rows again; what it then serves.

The rows asked for are Zipf-like (exponent 1, scattered over the table), 48 a batch. The image and the rows of a hot set are
read from the disk and not from the page cache.
"""

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import GIB, ROW_BYTES, Figure, Rows, bench_table, parser, report
from rich.progress import track

from tiercache import Store

BATCH, _BATCHES = 48, 1000
POLICIES = ("gittins", "s3fifo")


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--capacity", type=float, default=0.1, help="GiB of the tier, which must fill up (%(default)s)")
    options.add_argument("--batches", type=int, default=60_000, help="before the restart (%(default)s)")
    arguments = options.parse_args()
    table = bench_table(arguments.dir, int(arguments.size * GIB))
    image = Path(arguments.dir) / "tiers.image"
    config = {"table": [{"path": table.path}], "host": {"capacity": int(arguments.capacity * GIB)}}
    batches = _zipf(table.num_rows, arguments.batches + _BATCHES)
    hot_sets = {policy: Path(arguments.dir) / f"{policy}.npy" for policy in POLICIES}
    steady = {}
    for policy in reversed(POLICIES):  # the default last
        with Store.open(_with_host(config, policy=policy)) as store:
            for first in track(range(0, arguments.batches - _BATCHES, 100), f"Warming {policy}", transient=True):
                store.fetch(batches[first : first + 100])
            steady[policy] = _hit_rate(store, batches[arguments.batches - _BATCHES : arguments.batches])
            store.save_hot_set(hot_sets[policy])
            begin = time.perf_counter()
            num_rows = store.save(image)
            saving = time.perf_counter() - begin
            held = store._host.level.slots["key"].copy()
    size = image.stat().st_size
    times = []
    for _ in range(4):  # the first compiles
        _forget(image)
        begin = time.perf_counter()
        Store.open({**config, "restore": image}).close()
        times.append(time.perf_counter() - begin)
    restoring = median(times[1:])
    with Store.open({**config, "restore": image}) as store:
        warm = _hit_rate(store, batches[arguments.batches :])
    with Store.open(config) as store:
        cold = _hit_rate(store, batches[arguments.batches :])
    with Store.open(config) as store:
        rows = held[held >= 0]
        begin = time.perf_counter()
        for first in range(0, rows.size, 10_000):
            store.fetch(rows[first : first + 10_000])
        reading = time.perf_counter() - begin
    image.unlink()
    figures = [
        Figure("Store.open with restore", restoring, "s", "reading the rows again", reading, at_most=0.25),
        Figure("Store.open with restore", size / GIB / restoring, "GiB/s"),
        Figure("store.save", saving, "s"),
        Figure(f"hit rate of the first {_BATCHES} batches, restored", warm, "", "steady", steady["gittins"], at_least=0.9),
        Figure(f"hit rate of the first {_BATCHES} batches, begun empty", cold, "", "steady", steady["gittins"]),
    ]
    for policy, path in hot_sets.items():
        figures += _begun_with(policy, config, path, batches[arguments.batches :], steady[policy])
        path.unlink()
    report("restart", f"Restart: a tier of {num_rows:,} rows of {ROW_BYTES} B", figures, arguments)


def _begun_with(policy: str, config: dict[str, Any], path: Path, batches: Rows, steady: float) -> list[Figure]:
    """How long a store takes to begin with a hot set, and what it serves then."""
    _forget(Path(config["table"][0]["path"]))
    with Store.open(_with_host(config, policy=policy, hot_set=path)) as store:
        (loaded,) = store.stats().hot_sets
        warm = _hit_rate(store, batches)
    what = f"{policy}, begun with a hot set of {loaded.rows:,} rows ({path.stat().st_size / 2**20:.1f} MiB)"
    return [
        Figure(f"{what}: reading them", loaded.seconds, "s"),
        Figure(f"{what}: hit rate of the first {_BATCHES} batches", warm, "", "steady", steady, at_least=0.9),
    ]


def _with_host(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A config with more settings of its host tier."""
    return {**config, "host": {**config["host"], **settings}}


def _zipf(num_rows: int, num_batches: int) -> Rows:
    """Rows int64[num_batches, 48] whose ranks have probability 1 / rank, each rank somewhere in the table."""
    random = np.random.default_rng(0)
    ranks = np.exp(random.random((num_batches, BATCH)) * np.log(num_rows)).astype(np.int64)
    rows: Rows = ranks * 0x9E3779B1 % num_rows
    return rows


def _hit_rate(store: Store, batches: Rows) -> float:
    before = store.stats().host
    for batch in batches:
        store.fetch(batch)
    after = store.stats().host
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return hits / (hits + misses)


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
