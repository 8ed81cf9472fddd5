"""Policies: misses and replay speed against libcachesim on the shipped text, batches of one row.

The rows are the paper's hashing of the token ids (2- and 3-grams, 8 heads). Both replay the same trace: ours from an array,
theirs from a memory-mapped binary file through its own reader. The default policy has no equal there; its speed is held against
that of libcachesim's W-TinyLFU.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import libcachesim
import numpy as np
from _common import Figure, Rows, parser, report
from rich.progress import track

from tiercache.engram.demo import demo_hashers
from tiercache.lab.simulator import simulate
from tiercache.lab.tokens import SHIPPED, SHIPPED_VOCABULARY, load_tokens
from tiercache.policies import DEFAULT

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fifo": ("FIFO", {}),
    "lru": ("LRU", {}),
    "lfu": ("LFU", {}),
    "sieve": ("Sieve", {}),
    "s3fifo": ("S3FIFO", {"small": 0.10, "ghost": 0.90, "threshold": 2}),
    "arc": ("ARC", {}),
}
"""libcachesim's name, and our parameters that equal its defaults."""

_RIVAL: tuple[str, dict[str, Any]] = ("WTinyLFU", {})
TIMED = ("fifo", "lru", "sieve", "s3fifo", DEFAULT)
SHARES = (0.01, 0.05, 0.10)
POINT = 0.001

_REQUEST = np.dtype([("time", "<u4"), ("key", "<u8"), ("num_bytes", "<u4"), ("next_use", "<i8")])


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--trace", type=Path, default=SHIPPED, help="token stream (%(default)s)")
    options.add_argument("--tokens", type=int, default=200_000, help="of the stream (%(default)s)")
    options.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    arguments = options.parse_args()
    rows = _rows(arguments)
    num_touched = np.unique(rows).size
    figures = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.bin"
        _write(rows, path)
        cells = [(name, share) for share in SHARES for name in (*PEERS, DEFAULT)]
        for name, share in track(cells, "Replaying", transient=True):
            figures += _compare(name, share, int(num_touched * share), rows, path, arguments.rounds)
    title = f"Policies: {rows.size:,} accesses of text to {num_touched:,} rows, a tier of a share of them"
    report("policies", title, figures, arguments)


def _rows(arguments: argparse.Namespace) -> Rows:
    stream = load_tokens(arguments.trace).first(arguments.tokens)
    hasher = demo_hashers(vocabulary=SHIPPED_VOCABULARY)[0]
    return hasher.rows(stream.tokens, stream.documents).reshape(-1)


def _write(rows: Rows, path: Path) -> None:
    """The trace in libcachesim's oracleGeneral format."""
    requests = np.zeros(rows.size, _REQUEST)
    requests["time"], requests["key"], requests["num_bytes"] = np.arange(rows.size), rows + 1, 1
    requests["next_use"] = -1
    requests.tofile(path)


def _compare(name: str, share: float, capacity: int, rows: Rows, path: Path, rounds: int) -> list[Figure]:
    """Difference of the miss ratios, and the ratio of the speeds, in interleaved runs."""
    peer, parameters = PEERS.get(name, _RIVAL)
    simulate(name, capacity, rows[:16], **parameters)
    ours, theirs = [], []
    for _ in range(rounds if name in TIMED else 1):
        begin = time.perf_counter()
        misses = simulate(name, capacity, rows, **parameters).misses
        ours.append(time.perf_counter() - begin)
        reader = libcachesim.TraceReader(
            str(path),
            libcachesim.TraceType.ORACLE_GENERAL_TRACE,
            libcachesim.ReaderInitParam(ignore_obj_size=True),
        )
        cache = getattr(libcachesim, peer)(cache_size=capacity)
        begin = time.perf_counter()
        miss_ratio, _ = cache.process_trace(reader)
        theirs.append(time.perf_counter() - begin)
    points = 100 * abs(misses / rows.size - miss_ratio)
    what = f"{name}, {share:.0%}: {misses:,} misses"
    figures = [Figure(f"{what}, distance from {peer}", points, "points", at_most=100 * POINT)] if name in PEERS else []
    if name in TIMED:
        speed, base = (rows.size / median(runs) / 1e6 for runs in (ours, theirs))
        baseline = "libcachesim" if name in PEERS else f"libcachesim's {peer}"
        figures.append(Figure(f"{name}, {share:.0%}: replay", speed, "M rows/s", baseline, base, at_least=1.0))
    return figures


if __name__ == "__main__":
    main()
