"""Tune: tokens a second that `tiercache tune` predicts for stores of several sizes, against what these stores then do.

Of each trace the first half fills the tiers, and the second counts. Zipf's rows come again and again, in batches of 48 tokens,
from all over the table, or from a part of it, where they share reads. Text is read and written as a server does, and many of
its rows nobody asked for before. The machine is measured before and after each store, as it changes from minute to minute, and
the mean of both predictions counts.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import GIB, ROW_BYTES, BenchTable, Figure, bench_table, console, parser, report

from tiercache import Store
from tiercache.config import StoreConfig
from tiercache.engram.families import hashed
from tiercache.lab.machine import Machine
from tiercache.lab.measure import measure
from tiercache.lab.synthetic import zipf
from tiercache.lab.tokens import SHIPPED_VOCABULARY, load_tokens
from tiercache.lab.trace import Trace, serving
from tiercache.lab.tune import Predictor, Sizes
from tiercache.lab.work import Asked, ReadCounter, ask
from tiercache.recording.blocks import RecordedTable
from tiercache.storage import open_table

_WITHIN = 0.15


class Case(NamedTuple):
    """A trace, and tiers with room for these shares of its rows. ahead: reads are begun a batch ahead."""

    trace: str
    host: float
    device: float = 0.0
    ahead: bool = False

    @property
    def name(self) -> str:
        device = f"device tier {self.device:.0%}, " if self.device else ""
        return f"{self.trace}: {device}host tier {self.host:.0%}{', prefetched' if self.ahead else ''}"


_CASES = (
    Case("Zipf", 0.02),
    Case("Zipf", 0.1),
    Case("Zipf", 0.4),
    Case("Zipf", 0.9),
    Case("Zipf", 0.2, 0.05),
    Case("Zipf", 0.1, ahead=True),
    Case("Zipf, together", 0.1),
    Case("text", 0.1),
)
_HEADS, _ROWS, _BATCHES, _SIZE = 16, 200_000, 400, 48 * 16


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=12_000, help="of the text (%(default)s)")
    options.add_argument("--sample", type=float, default=1.0, help="share of the rows that is simulated (%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    table = bench_table(arguments.dir, int(arguments.size * GIB))
    traces = _traces(table.num_rows, arguments.tokens)
    asked = {name: ask(trace, rate=arguments.sample) for name, trace in traces.items()}
    figures = []
    before: dict[bool, Machine] = {}
    for case in _CASES:
        with console.status(case.name):
            figures.append(_compare(case, table, traces[case.trace], asked[case.trace], before))
    report("tune", "Tune: predictions for tiers with room for a share of the rows asked for", figures, arguments)


def _traces(num_rows: int, num_tokens: int) -> dict[str, Trace]:
    """By name, traces of 16 rows a token."""
    near = zipf(_ROWS, batches=_BATCHES, size=_SIZE)
    stream = load_tokens().first(num_tokens)
    text = hashed("demo", stream.tokens, stream.documents, vocabulary=SHIPPED_VOCABULARY, num_rows=num_rows)
    assert text.shape[1] == _HEADS
    far = near._replace(rows=near.rows * (num_rows // _ROWS))
    return {"Zipf": far, "Zipf, together": near, "text": serving(text, stream.documents)}


def _compare(case: Case, table: BenchTable, trace: Trace, asked: Asked, before: dict[bool, Machine]) -> Figure:
    """before: the machine as it was measured last, without a device tier and with one."""
    config, sizes = _config(case, table, asked)
    files = [open_table("table", table.path)]
    about = [RecordedTable("table", table.num_rows, ROW_BYTES, files[0].identity)]
    stacked = bool(case.device)
    machines = [before[stacked] if stacked in before else measure(config, files)]
    work = _prefetched if case.ahead else _fetched
    with Store.open(config) as store:
        seconds = work(store, trace, asked.first)
    machines.append(measure(config, files))
    before[stacked] = machines[1]
    reads = ReadCounter(files, machines[0].disk.alignment, rate=asked.rate)
    rates = [
        Predictor(config, about, machine, asked, reads, rows_per_token=_HEADS, ahead=case.ahead).rate(sizes)
        for machine in machines
    ]
    tokens = int(asked.rows[asked.first :].sum()) / _HEADS
    within = {"at_least": 1 - _WITHIN, "at_most": 1 + _WITHIN}
    return Figure(case.name, sum(rates) / 2, "tokens/s", "the store", tokens / seconds, **within)


def _config(case: Case, table: BenchTable, asked: Asked) -> tuple[StoreConfig, Sizes]:
    slot_bytes = -(-ROW_BYTES // 16) * 16 if case.device else ROW_BYTES
    device, host = (int(share * asked.touched) * slot_bytes for share in (case.device, case.host))
    config: dict[str, Any] = table.config(host)
    if case.device:
        config["device"] = {"device": "cpu", "capacity": device}
    return StoreConfig.load(config), Sizes(device if case.device else None, host)


def _buffer(store: Store, trace: Trace) -> torch.Tensor:
    return torch.empty((int(np.diff(trace.offsets).max()), store.dim()), dtype=store.dtype())


def _fetched(store: Store, trace: Trace, first: int) -> float:
    """Seconds of the batches from the first on that counts, fetched one after the other."""
    out, begin = _buffer(store, trace), time.perf_counter()
    for batch, rows in enumerate(trace.batches()):
        if batch == first:
            begin = time.perf_counter()
        store.fetch(rows, out=out[: rows.size])
    return time.perf_counter() - begin


def _prefetched(store: Store, trace: Trace, first: int) -> float:
    """The same, the next batch's reads begun before one is taken."""
    out, begin = _buffer(store, trace), time.perf_counter()
    ticket, size = None, 0
    for batch, rows in enumerate(trace.batches()):
        if batch == first:
            begin = time.perf_counter()
        following = store.prefetch(rows, deadline=0)
        if ticket is not None:
            ticket.take(out=out[:size])
        ticket, size = following, rows.size
    assert ticket is not None
    ticket.take(out=out[:size])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
