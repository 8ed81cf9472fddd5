"""What the measurements share: the table they read, interleaved timing, and the report.

The table is one safetensors file of BF16 [num_rows, 132], so 264 bytes a row, whose bytes are a function of the row
number; beside it, on request, the same rows in 32 shard files. Both are kept for the next run.
"""

import argparse
import json
import math
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tiercache.records import Record, plain

ROW_BYTES = 264
NUM_SHARDS = 32
GIB = 1 << 30

Rows = npt.NDArray[np.int64]

_WORDS = ROW_BYTES // 8
_PIECE_ROWS = 1 << 16
_README = Path(__file__).with_name("README.md")

console = Console(width=None if sys.stdout.isatty() else 140)


def records(rows: Rows) -> npt.NDArray[np.uint8]:
    """The bytes of these rows, uint8[n, 264]: word w of row r is a mix of 33 * r + w."""
    terms = rows.astype(np.uint64)[:, None] * np.uint64(_WORDS), np.arange(_WORDS, dtype=np.uint64)
    words: npt.NDArray[np.uint64] = np.add(*terms, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    return words.view(np.uint8)


class Computed:
    """A Source whose rows are computed."""

    record: Record = plain("BF16", ROW_BYTES // 2)

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def read(self, rows: Rows, out: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        """Write the record of rows[i] to out[i]."""
        out[:] = records(rows)

    def close(self) -> None:
        """Nothing to close."""


class BenchTable(NamedTuple):
    """A table on disk. `offset` is the byte of its first row; `shards` the directory of the shard files, if made."""

    path: Path
    offset: int
    num_rows: int
    shards: Path | None

    @property
    def rows_per_shard(self) -> int:
        """Consecutive rows in each shard file."""
        return self.num_rows // NUM_SHARDS

    def config(self, capacity: int) -> dict[str, Any]:
        """Of a store over it with a host tier of `capacity` bytes."""
        return {"table": [{"path": self.path}], "host": {"capacity": capacity}}

    def files(self) -> list[Path]:
        """The files of rows."""
        return [self.path, *(sorted(self.shards.glob("shard_*.bin")) if self.shards else ())]


def bench_table(directory: Path, num_bytes: int, *, shards: bool = False) -> BenchTable:
    """The table of about `num_bytes` bytes in `directory`, made now unless an earlier run left it."""
    num_rows = num_bytes // ROW_BYTES // NUM_SHARDS * NUM_SHARDS
    tensor = {"dtype": "BF16", "shape": [num_rows, ROW_BYTES // 2], "data_offsets": [0, num_rows * ROW_BYTES]}
    header = json.dumps({"rows": tensor})
    header += " " * (-len(header) % 8)
    path, folder = directory / f"rows-{num_rows}.safetensors", directory / f"shards-{num_rows}"
    table = BenchTable(path, 8 + len(header), num_rows, folder if shards else None)
    missing = [target for target in (path, table.shards) if target is not None and not target.exists()]
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        needed, free = len(missing) * num_rows * ROW_BYTES, shutil.disk_usage(directory).free
        if free < needed + GIB:
            sys.exit(f"{directory}: {needed / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB are free")
        _write(table, missing, len(header).to_bytes(8, "little") + header.encode())
    return table


def _write(table: BenchTable, missing: Sequence[Path], header: bytes) -> None:
    partial = {target: target.with_name(target.name + ".partial") for target in missing}
    with ExitStack() as stack:
        single = stack.enter_context(partial[table.path].open("wb")) if table.path in partial else None
        pieces = []
        if single is not None:
            single.write(header)
        if table.shards in partial:
            folder = partial[table.shards]
            folder.mkdir(exist_ok=True)
            pieces = [stack.enter_context((folder / f"shard_{n:03d}.bin").open("wb")) for n in range(NUM_SHARDS)]
        for shard in track(range(NUM_SHARDS), f"Writing {table.num_rows:,} rows", console=console, transient=True):
            first = shard * table.rows_per_shard
            for start in range(first, first + table.rows_per_shard, _PIECE_ROWS):
                block = records(np.arange(start, min(start + _PIECE_ROWS, first + table.rows_per_shard))).data
                for file in (single, pieces[shard] if pieces else None):
                    if file is not None:
                        file.write(block)
        for file in (single, *pieces):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
    for target, temporary in partial.items():
        temporary.rename(target)


class Cache:
    """The page cache's share of some files, to be dropped."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._descriptors = [os.open(path, os.O_RDONLY) for path in paths]

    def drop(self) -> None:
        """Forget every page of the files that no process has mapped."""
        for descriptor in self._descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def distinct_batches(num_rows: int, num_batches: int, batch: int, seed: int = 0) -> Rows:
    """Random rows, int64[num_batches, batch], none twice."""
    random = np.random.default_rng(seed)
    return random.choice(num_rows, num_batches * batch, replace=False).reshape(num_batches, batch)


def memory_map(table: BenchTable) -> npt.NDArray[np.uint8]:
    """The table's rows, uint8[num_rows, 264], mapped anew with MADV_RANDOM."""
    rows = np.memmap(table.path, np.uint8, "r", table.offset, (table.num_rows, ROW_BYTES))
    rows._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return rows


class Sample(NamedTuple):
    """What one call took: elapsed seconds, and CPU seconds of all threads of the process."""

    seconds: float
    cpu_seconds: float


def timed(call: Callable[[], Any]) -> Sample:
    """Call once. What it returns is freed outside the measurement."""
    cpu, begin = time.process_time(), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    sample = Sample(seconds, time.process_time() - cpu)
    del result
    return sample


def latencies(call: Callable[[Any], Any], inputs: Sequence[Any]) -> list[float]:
    """Seconds of one call for each input, one after the other."""
    seconds = []
    for each in inputs:
        begin = time.perf_counter_ns()
        call(each)
        seconds.append((time.perf_counter_ns() - begin) / 1e9)
    return seconds


class Figure(NamedTuple):
    """One line of a report. The target bounds the ratio to the baseline where there is one, else the value itself.

    A figure without a target is there for comparison.
    """

    what: str
    value: float
    unit: str
    baseline: str = ""
    baseline_value: float = math.nan
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ratio(self) -> float:
        """Value by baseline."""
        return self.value / self.baseline_value

    @property
    def verdict(self) -> str:
        """PASS, MISS, or nothing where there is no target."""
        if self.at_least is None and self.at_most is None:
            return ""
        measured = self.ratio if self.baseline else self.value
        low, high = self.at_least or 0, math.inf if self.at_most is None else self.at_most
        return "PASS" if low <= measured <= high else "MISS"

    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        unit = "x" if self.baseline else self.unit
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        target = ", ".join(f"{sign} {_number(bound)} {unit}" for sign, bound in bounds if bound is not None)
        value, baseline = f"{_number(self.value)} {self.unit}", ""
        if self.baseline:
            baseline = f"{self.baseline}: {_number(self.baseline_value)} {self.unit}"
        return self.what, value, baseline, f"{self.ratio:.2f} x" if self.baseline else "", target, self.verdict


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


_COLUMNS = ("what", "median", "baseline", "ratio", "target", "")
_STYLES = {"PASS": "green", "MISS": "red"}


def parser(description: str | None, *, directory: bool = True) -> argparse.ArgumentParser:
    """Options that every measurement has; with `directory` also those of the table."""
    options = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    options.add_argument("--readme", action="store_true", help="write the result into bench/README.md as well")
    if directory:
        default = Path(os.environ.get("TMPDIR", "/var/tmp")) / "tiercache-bench"
        options.add_argument("--dir", type=Path, default=default, help="where the table is kept (%(default)s)")
        options.add_argument("--size", type=float, default=8, help="of the table, in GiB (%(default)s)")
        options.add_argument("--clean", action="store_true", help="delete the table at the end")
    return options


def report(name: str, title: str, figures: Sequence[Figure], options: argparse.Namespace) -> None:
    """Print the figures, write them into the README if asked for, delete the table if asked for."""
    directory = getattr(options, "dir", None)
    tabulate(name, title, _COLUMNS, [figure.cells() for figure in figures], options)
    if directory is not None and options.clean:
        shutil.rmtree(directory, ignore_errors=True)


def tabulate(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], options: argparse.Namespace) -> None:
    """Print a table, and write it into the README if asked for."""
    machine = hardware(getattr(options, "dir", None))
    choices = [word for word in sys.argv[1:] if word not in ("--readme", "--clean")]
    command = " ".join(["python", f"bench/{name}.py", *choices])
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.caption, table.caption_justify = machine, "left"
    for cells in rows:
        table.add_row(*(f"[{_STYLES[cell]}]{cell}[/]" if cell in _STYLES else cell for cell in cells))
    console.print(table)
    if options.readme:
        lines = [f"### {title}", "", f"`{command}`, {machine}", ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in (columns, ("---",) * len(columns), *rows)]
        _rewrite(name, "\n".join(lines))


def _rewrite(name: str, block: str) -> None:
    """Replace what stands between the README's two comments that name this measurement."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text, count = re.subn(
        f"{begin}.*?{end}", lambda _: f"{begin}\n{block}\n{end}", _README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if count != 1:
        sys.exit(f"{_README}: no place marked {begin} ... {end}")
    _README.write_text(text, encoding="utf-8")


def hardware(directory: Path | None) -> str:
    """Machine, versions, load and date in one line."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    parts = [f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"]
    if directory is not None:
        parts.append(_disk(directory))
    parts.append(f"Linux {platform.release()}, Python {platform.python_version()}")
    packages = ("tiercache", "torch", "numba", "numpy", "engramdb-python", "libcachesim", "triton")
    versions = [f"{package} {version(package)}" for package in packages]
    if shutil.which("fio"):
        versions.append(subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True).stdout.strip())
    parts.append(", ".join(versions))
    parts.append(f"load average {os.getloadavg()[0]:.1f}")
    parts.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    return "; ".join(parts)


def _disk(directory: Path) -> str:
    """Block device and file system under a directory."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if directory.resolve().is_relative_to(mount[1])]
    device, _, kind = max(inside, key=lambda mount: len(mount[1]))
    return f"{kind} on {device}"
