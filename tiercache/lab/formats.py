"""Traces in files: recordings of a store, and the two formats that libCacheSim reads, oracleGeneral and csv.

These two know requests, not batches. Here the time of a request is the number of its batch, so that a trace that was written
comes back as it was, but for batches without rows. In a trace from elsewhere, the requests of one time are one batch.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.errors import ConfigError, FormatError
from tiercache.lab.trace import Trace
from tiercache.recording.blocks import MAGIC, RecordedTable, bases_of, require_same
from tiercache.recording.reader import Recording
from tiercache.storage.table import failures

REQUEST = np.dtype([("time", "<u4"), ("object", "<u8"), ("num_bytes", "<u4"), ("next_use", "<i8")])
"""A request of oracleGeneral: 24 bytes. next_use: number of the request that is the object's next, or -1."""

_MOST_ROWS = 1 << 62
_CSV_HEADER = "time,obj_id,obj_size"
_AT_ONCE = 1 << 20


def load_trace(path: str | os.PathLike[str], format: str | None = None) -> Trace:
    """A trace in any format; a name of FORMATS, or found by the file's first bytes and its name.

    ConfigError where the format is not known, FormatError where the file is not of it, StorageError where it cannot be read.
    """
    path = Path(path)
    with failures(path), open(path, "rb") as file:
        begin = file.read(len(MAGIC))
    name = _SUFFIXES.get(path.suffix.lower()) if format is None else format
    if format is None and begin == MAGIC:
        name = "recording"
    if name is None or name not in FORMATS:
        given = f"format = {format!r}" if format is not None else f"{path}: of no format that its name or its content tells"
        raise ConfigError(f"{given}; allowed are {', '.join(FORMATS)}")
    return FORMATS[name](path)


def load_recording(path: str | os.PathLike[str], tables: Sequence[RecordedTable] | None = None) -> Trace:
    """A recording, whole. Its rows are rows of the store that was recorded, or of a store of `tables`.

    FormatError where it is of another table. Warns of DamagedRecording, and gives what could be read.
    """
    recording = Recording(path)
    about = recording.tables if tables is None else list(tables)
    require_same(recording.path, recording.tables, about)
    base_of = dict(zip((table.name for table in about), bases_of(about).tolist(), strict=True))
    bases = np.array([base_of[table.name] for table in recording.tables])
    rows, sizes = [_NONE], [_NONE]
    for block in recording.blocks():
        rows.append(block.rows + np.repeat(bases[block.tables], block.sizes))
        sizes.append(block.sizes)
    return Trace(np.concatenate(rows), np.append(0, np.cumsum(np.concatenate(sizes))))


_NONE = np.empty(0, np.int64)


def load_oracle(path: str | os.PathLike[str]) -> Trace:
    """A trace in libCacheSim's oracleGeneral format. FormatError for objects that are no row numbers, below 2**62."""
    path = Path(path)
    with failures(path):
        size = path.stat().st_size
        if size % REQUEST.itemsize:
            raise FormatError(f"{path}: {size} bytes; oracleGeneral has {REQUEST.itemsize} a request")
        requests = np.fromfile(path, REQUEST)
    return _batched(path, requests["time"], requests["object"])


def save_oracle(path: str | os.PathLike[str], trace: Trace, *, num_bytes: int = 1) -> None:
    """Write a trace in oracleGeneral: a request a row, objects of `num_bytes` bytes. ValueError beyond 2**32 - 1 batches."""
    requests = np.empty(trace.rows.size, REQUEST)
    requests["time"] = _times(trace)
    requests["object"], requests["num_bytes"] = trace.rows, num_bytes
    requests["next_use"] = _next_use(trace.rows)
    with failures(Path(path)):
        requests.tofile(path)


def load_csv(path: str | os.PathLike[str]) -> Trace:
    """A trace in libCacheSim's csv: time, object and more columns, which are not read; a first line of names is passed over."""
    path = Path(path)
    with failures(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline()
        names = int(not first[:1].isdigit())
        if not first or (names and os.path.getsize(path) == len(first.encode())):
            return Trace(_NONE, np.zeros(1, np.int64))
        try:
            columns = np.loadtxt(path, np.uint64, delimiter=",", skiprows=names, usecols=(0, 1), ndmin=2, unpack=True)
        except ValueError as error:
            raise FormatError(f"{path}: not a trace as csv, with a time and an object a line: {error}") from error
    return _batched(path, *columns)


def save_csv(path: str | os.PathLike[str], trace: Trace, *, num_bytes: int = 1) -> None:
    """Write a trace as csv: a line a row, `time,obj_id,obj_size` as the first."""
    times = _times(trace)
    with failures(Path(path)), open(path, "w", encoding="utf-8") as file:
        file.write(_CSV_HEADER + "\n")
        for start in range(0, times.size, _AT_ONCE):
            lines = zip(times[start : start + _AT_ONCE].tolist(), trace.rows[start : start + _AT_ONCE].tolist(), strict=True)
            file.writelines(f"{time},{row},{num_bytes}\n" for time, row in lines)


FORMATS: dict[str, Callable[[Path], Trace]] = {"recording": load_recording, "oracle": load_oracle, "csv": load_csv}
"""Every format by the name that the command line uses."""

_SUFFIXES = {".csv": "csv", ".bin": "oracle", ".oraclegeneral": "oracle"}


def _times(trace: Trace) -> npt.NDArray[np.int64]:
    """int64[n], the batch of each row."""
    if trace.num_batches >= 1 << 32:
        raise ValueError(f"a trace of {trace.num_batches} batches; these formats have times of 32 bits")
    return np.repeat(np.arange(trace.num_batches), np.diff(trace.offsets))


def _next_use(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64[n], where each row comes next, or -1."""
    order = np.argsort(rows, kind="stable")
    following = np.full(rows.size, -1, np.int64)
    same = rows[order[1:]] == rows[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following


def _batched(path: Path, times: npt.NDArray[Any], objects: npt.NDArray[np.uint64]) -> Trace:
    """Requests of one time as one batch."""
    if wrong := objects[objects >= _MOST_ROWS][:1].tolist():
        raise FormatError(f"{path}: has object {wrong[0]}; allowed are row numbers, below 2**62")
    starts = np.flatnonzero(np.diff(times) != 0) + 1 if times.size else _NONE
    offsets = np.concatenate([np.zeros(1, np.int64), starts, np.full(min(times.size, 1), times.size)])
    return Trace(objects.astype(np.int64), offsets)
