"""Groups: the 8 heads of an n-gram kept as one record of a tier, against each row by itself, in as many bytes.

Rates are what a tier of a share of the rows touched keeps of a text that is served, by simulation: distinct rows of a batch
that hit, and distinct groups, whose rows all hit or all miss. Throughputs are of fetches that hit, one thread each, of the same
groups out of two full stores.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from _common import GIB, Figure, Rows, console, parser, report, timed

from tiercache import Store
from tiercache.engram.families import hashed
from tiercache.lab.tokens import SHIPPED, SHIPPED_VOCABULARY, load_tokens
from tiercache.lab.trace import Trace, in_groups, serving
from tiercache.level import HITS, MISSES, Level
from tiercache.policies import DEFAULT, POLICIES
from tiercache.records import plain

SIZE = 8
SHARES = (0.01, 0.05, 0.10)
FAMILIES = {"deepseek": "V4.1", "demo": "demo"}
RECORDS, BATCHES = (264, 1280), (24 * 64, 100_000)
_FILL = 100_000


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--trace", type=Path, default=SHIPPED, help="token stream (%(default)s)")
    options.add_argument("--tokens", type=int, default=200_000, help="of the stream (%(default)s)")
    options.add_argument("--size", type=float, default=1, help="of each of the two host tiers, in GiB (%(default)s)")
    options.add_argument("--rounds", type=int, default=9, help="of the fetches; 0: rates only (%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    figures = []
    for family, name in FAMILIES.items() if arguments.tokens else ():
        with console.status(f"Rates, hashing of {name}"):
            figures += _rates(family, name, arguments)
    for record_bytes in RECORDS if arguments.rounds else ():
        with console.status(f"Fetches, records of {record_bytes} B"):
            figures += _throughputs(record_bytes, arguments)
    report("groups", f"Groups of {SIZE} rows, {arguments.tokens:,} tokens of text", figures, arguments)


class Kept(NamedTuple):
    """What a tier did: its hit rate, and what it missed of what was asked for, duplicates within a batch included."""

    rate: float
    read: float


def _rates(family: str, name: str, arguments: argparse.Namespace) -> list[Figure]:
    stream = load_tokens(arguments.trace).first(arguments.tokens)
    trace = serving(hashed(family, stream.tokens, stream.documents, vocabulary=SHIPPED_VOCABULARY), stream.documents)
    grouped = in_groups(trace, SIZE)
    known, first = np.unique(grouped.rows, return_index=True)
    touched = np.unique(trace.rows).size
    shared = (known.size * SIZE - touched) / trace.rows.size
    figures = [Figure(f"{name}: rows of new groups that an earlier group had, of 100 asked for", 100 * shared, "")]
    for share in SHARES:
        slots = int(share * touched) // SIZE
        rows, _ = _kept(slots * SIZE, trace)
        groups, resident = _kept(slots, grouped)
        held = trace.rows.reshape(-1, SIZE)[first[np.searchsorted(known, resident)]]
        what = f"{name}, tier of {share:.0%}"
        figures += [
            Figure(f"{what}: hit rate less that of rows", 100 * (groups.rate - rows.rate), "points", at_least=-1),
            Figure(f"{what}: hit rate", 100 * groups.rate, "%", "rows", 100 * rows.rate),
            Figure(f"{what}: rows read of 100 asked for", 100 * groups.read, "", "rows", 100 * rows.read),
            Figure(f"{what}: records that are there twice", 100 * (1 - np.unique(held).size / held.size), "%"),
        ]
    return figures


def _kept(slots: int, trace: Trace) -> tuple[Kept, Rows]:
    """What a tier of the default policy does with a trace, and the keys that it holds at the end."""
    level = Level(POLICIES[DEFAULT], slots)
    level.replay(*trace)
    hits, misses = (int(level.counters[column]) for column in (HITS, MISSES))
    keys: Rows = level.slots["key"][level.slots["key"] >= 0]
    return Kept(hits / (hits + misses), misses / trace.rows.size), keys


class _Numbered:
    """A Source of records that begin with their row number."""

    def __init__(self, num_rows: int, record_bytes: int) -> None:
        self.num_rows, self.record = num_rows, plain("U8", record_bytes)

    def read(self, rows: Rows, out: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        """Write the record of rows[i] to out[i]."""
        out[:, :8] = rows.view(np.uint8).reshape(-1, 8)

    def close(self) -> None:
        """Nothing to close."""


def _throughputs(record_bytes: int, arguments: argparse.Namespace) -> list[Figure]:
    """Fetches of resident groups, interleaved, every call with random groups of its own."""
    num_groups = int(arguments.size * GIB) // record_bytes // SIZE
    random = np.random.default_rng(0)
    table = _Numbered(4 * num_groups * SIZE, record_bytes)
    groups = random.choice(table.num_rows, num_groups * SIZE, replace=False).reshape(-1, SIZE)
    host = {"capacity": num_groups * SIZE * record_bytes}
    figures = []
    with (
        Store.open({"host": host}, tables={"rows": table}) as rows,
        Store.open({"host": host, "group_rows": SIZE}, tables={"rows": table}) as grouped,
    ):
        stores = {"rows": rows, "groups": grouped}
        for store in stores.values():
            for start in range(0, num_groups, _FILL // SIZE):
                store.fetch(groups[start : start + _FILL // SIZE], raw=True)
        before = [store.stats().host.misses for store in stores.values()]
        for batch in BATCHES:
            out = torch.zeros((batch // SIZE, SIZE, record_bytes), dtype=torch.uint8)
            samples: dict[str, list[float]] = {name: [] for name in stores}
            repeats = max(1, BATCHES[-1] // batch)
            for number in range(arguments.rounds + 2):
                wanted = [groups[random.integers(0, num_groups, batch // SIZE)] for _ in range(repeats)]
                for name, store in stores.items():
                    for each in wanted:
                        sample = timed(partial(store.fetch, torch.from_numpy(each), raw=True, out=out)).seconds
                        if number >= 2:
                            samples[name].append(sample)
                    assert np.array_equal(out[..., :8].contiguous().numpy().view(np.int64).reshape(each.shape), each)
            rate = {name: batch / median(runs) / 1e6 for name, runs in samples.items()}
            what = f"fetch(raw=True, out=) of {batch:,} resident rows of {record_bytes} B"
            figures.append(Figure(what, rate["groups"], "M rows/s", "rows", rate["rows"], at_least=1.5))
        if [store.stats().host.misses for store in stores.values()] != before:
            raise SystemExit("a tier did not hold every row asked for")
    return figures


if __name__ == "__main__":
    main()
