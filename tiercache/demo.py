"""The demo: real text through a store whose table is thirty times its memory, with every byte checked.

The table's bytes are a function of the row number, so that what a fetch returns can be checked without reading the
table a second way.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from tiercache.engram.demo import fit_hasher
from tiercache.errors import ConfigError, TierCacheError
from tiercache.lab.bounds import uses_of
from tiercache.lab.curves import curves
from tiercache.lab.plot import plot_curves
from tiercache.lab.replay import Replay, replay_live
from tiercache.lab.tokens import SHIPPED_VOCABULARY, load_tokens
from tiercache.lab.trace import Trace, serving
from tiercache.records import Field, Record
from tiercache.storage.pack import pack_rows
from tiercache.store import Store

RECORD = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 8)))
NUM_ROWS = (2 << 30) // RECORD.record_bytes
HOST_BYTES = 64 << 20
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SEQUENCES = 16

_WORDS = RECORD.record_bytes // 8
_BLOCK_ROWS = 1024


class WrongBytes(TierCacheError):
    """A fetch returned other bytes than the table holds."""


class FormulaRows:
    """A Source whose records are computed: word w of row r is a mix of 33 * r + w."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.record = RECORD
        self._words = np.arange(_WORDS, dtype=np.uint64)

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """Write the record of `rows[i]` to `out[i]`. rows: int64[n]; out: uint8[n, 264]."""
        words = out.view(np.uint64)
        for start in range(0, rows.size, _BLOCK_ROWS):
            block = words[start : start + _BLOCK_ROWS]
            first = rows[start : start + _BLOCK_ROWS, None].astype(np.uint64) * np.uint64(_WORDS)
            np.add(first, self._words, out=block)
            block *= np.uint64(0x9E3779B97F4A7C15)
            block ^= block >> np.uint64(32)
            block *= np.uint64(0xD6E8FEB86659FD93)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Records of rows, uint8[n, 264]."""
        out = np.empty((rows.size, RECORD.record_bytes), np.uint8)
        self.read(rows, out)
        return out

    def close(self) -> None:
        """Nothing to close."""


class Result(NamedTuple):
    """A finished demo. rows: number of records compared, duplicates included."""

    replay: Replay
    rows: int
    picture: Path


def run(
    directory: Path, *, num_tokens: int = 100_000, num_rows: int = NUM_ROWS, console: Console | None = None
) -> Result:
    """Make the table in `directory`, or find it there, and serve the shipped text from it.

    Raises WrongBytes where one byte differs, ConfigError where the directory is a file, and the errors of packing and of
    the store.
    """
    console = console or Console()
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"directory = {str(directory)!r}: is a file; allowed is a directory, or a name for a new one")
    rows = FormulaRows(num_rows)
    config = {"table": [{"path": directory / "table"}], "host": {"capacity": HOST_BYTES}}
    _make_table(config, rows, console)
    text = load_tokens().first(num_tokens)
    hasher = fit_hasher(num_rows, vocabulary=SHIPPED_VOCABULARY)
    trace = serving(hasher.rows(text.tokens, text.documents), text.documents, sequences=SEQUENCES)
    # The curves are computed beside the replay, which mostly waits for the disk.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        drawn = pool.submit(curves, trace, SHARES)
        with Store.open(config) as store:
            replay = _stream(store, trace, rows)
            console.print(f"Served {trace.rows.size:,} rows, every byte compared", soft_wrap=True)
            console.print(_batches(replay, trace, SEQUENCES * hasher.num_heads))
            console.print(_hit_rates(replay, store))
        with Console(stderr=True).status("Simulating every policy at every size"):
            result = drawn.result()
    picture = directory / "hit_rate.png"
    plot_curves(
        picture,
        result,
        record_bytes=RECORD.record_bytes,
        title=f"N-gram rows of {text.tokens.size:,} tokens of real text, {SEQUENCES} sequences served together",
        mark_slots=replay.capacity,
    )
    said = f"Hit rate against cache size, every policy and the bounds: {picture}"
    console.print(said, soft_wrap=True, markup=False, emoji=False)
    return Result(replay, trace.rows.size, picture)


def _make_table(config: Mapping[str, Any], rows: FormulaRows, console: Console) -> None:
    path: Path = config["table"][0]["path"]
    size = f"{rows.num_rows:,} rows of {RECORD.record_bytes} B, {rows.num_rows * RECORD.record_bytes / 2**30:.1f} GiB"
    if path.exists() and _holds(config, rows):
        console.print(f"Table of {size}, from an earlier run: {path}", soft_wrap=True, markup=False, emoji=False)
        return
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        task = progress.add_task(f"Writing {size}", total=None)
        pack_rows(rows, path, progress=lambda done, total: progress.update(task, completed=done, total=total))
    with Console(stderr=True).status("Compiling"):
        if not _holds(config, rows):
            raise WrongBytes(f"{path}: the table just written holds other bytes")


def _holds(config: Mapping[str, Any], rows: FormulaRows) -> bool:
    """Whether the table opens and a hundred of its rows are right."""
    try:
        with Store.open(config) as store:
            if store.num_rows() != rows.num_rows:
                return False
            sample = np.arange(0, rows.num_rows, -(-rows.num_rows // 100))
            records = store.fetch(sample, raw=True).numpy()
    except TierCacheError:
        return False
    return np.array_equal(records, rows.take(sample))


def _stream(store: Store, trace: Trace, rows: FormulaRows) -> Replay:
    """Replay the trace; compare every record that comes."""
    uses = uses_of(trace)
    with _progress() as progress:
        task = progress.add_task(f"Serving {trace.rows.size:,} rows, every byte compared", total=trace.rows.size)

        def compare(wanted: npt.NDArray[np.int64], records: npt.NDArray[np.uint8]) -> None:
            wrong = (records != rows.take(wanted)).any(1)
            if wrong.any():
                raise WrongBytes(f"row {wanted[wrong.argmax()]}: a fetch gave other bytes than the table holds")
            progress.advance(task, wanted.size)

        return replay_live(store, trace, uses, on_batch=compare)


def _batches(replay: Replay, trace: Trace, largest_step: int) -> Table:
    sizes = np.diff(trace.offsets)
    table = Table("batches", "number", "rows", "rows/s", "p50 ms", "p99 ms", title="Fetches", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, chosen in (
        ("prefill, 512 tokens", sizes > largest_step),
        (f"decode, {SEQUENCES} sequences", sizes <= largest_step),
        ("all", sizes >= 0),
    ):
        rows, latency_ns = int(sizes[chosen].sum()), replay.latency_ns[chosen]
        if rows:
            p50, p99 = np.percentile(latency_ns, (50, 99)) / 1e6
            rate = rows / (latency_ns.sum() / 1e9)
            table.add_row(name, f"{latency_ns.size:,}", f"{rows:,}", f"{rate:,.0f}", f"{p50:.2f}", f"{p99:.2f}")
    return table


def _hit_rates(replay: Replay, store: Store) -> Table:
    counts, bounds = replay.counts, replay.bounds
    table = Table("", "hits", "hit rate", title="Distinct rows of a batch found in memory", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    tier = f"host tier, {replay.tier}, {replay.capacity * RECORD.record_bytes / 2**20:.0f} MiB"
    for name, hits in (
        (tier, counts.hits),
        ("static-optimal, same size", bounds.static),
        ("Belady, same size", bounds.belady),
        ("unbounded", bounds.unbounded),
    ):
        table.add_row(name, f"{hits:,}", f"{100 * hits / bounds.accesses:.1f} %")
    storage = store.stats().storage
    engine = f" by {storage.engine}" if storage else ""
    table.caption = f"{counts.misses:,} misses, {replay.bytes_read / 2**20:,.0f} MiB read{engine}"
    table.caption_justify = "left"
    return table


def _progress() -> Progress:
    """A bar on stderr; none where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    return Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True)
