"""MemoryTable: a table that is an array. For tests and for tables that fit. And what else a caller may hand over."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tiercache.errors import ConfigError, FormatError
from tiercache.records import DTYPES, Record, plain
from tiercache.source import Source
from tiercache.storage.table import storage_error

_ROWS = 1 << 62
_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


class MemoryTable:
    """A Source over a 2-D array, which is referred to and not copied if its rows are contiguous.

    array: [num_rows, width], numpy or a CPU torch tensor. Without `record` its dtype must be one that records know, and
    each row is one plain field. With `record` only the bytes count: a row must have `record.record_bytes` of them.
    Raises TypeError for a dtype that is not known, ValueError for a wrong shape.
    """

    def __init__(self, array: npt.NDArray[Any] | torch.Tensor, record: Record | None = None) -> None:
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"a table is [num_rows, width], both at least 1, not {tuple(array.shape)}")
        dtype = str(array.dtype).removeprefix("torch.")
        if record is None and dtype not in _NAMES:
            raise TypeError(f"an array of {dtype} needs a record; without one, {', '.join(_NAMES)} are understood")
        self.rows = _bytes(array)
        self.record = plain(_NAMES[dtype], array.shape[1]) if record is None else record
        self.num_rows, row_bytes = self.rows.shape
        if row_bytes != self.record.record_bytes:
            raise ValueError(f"rows of {row_bytes} bytes for a record of {self.record.record_bytes}")

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self.record.record_bytes

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """Write the record of `rows[i]` to `out[i]`. rows: int64[n] in range; out: uint8[n, record_bytes]."""
        np.take(self.rows, rows, axis=0, out=out, mode="clip")

    def close(self) -> None:
        """Nothing to let go of: the array belongs to the caller."""


def sources_of(tables: object) -> dict[str, Source]:
    """The sources that a caller gave by name; an array becomes a MemoryTable. ConfigError for what is none."""
    if tables is None:
        return {}
    if not isinstance(tables, Mapping):
        raise ConfigError(f"tables = {_short(tables)}: allowed is a mapping from names to sources or 2-D arrays")
    sources = {name: _source(name, table) for name, table in tables.items()}
    if (num_rows := sum(source.num_rows for source in sources.values())) >= _ROWS:
        raise ConfigError(f"tables: have {num_rows} rows in all; a store has less than 2**62")
    return sources


def _source(name: object, table: Any) -> Source:
    where = f"tables[{name!r}] = {_short(table)}"
    if not isinstance(name, str):
        raise ConfigError(f"{where}: a table's name is text")
    if isinstance(table, np.ndarray | torch.Tensor):
        return MemoryTable(table)
    if isinstance(table, str | os.PathLike):
        raise ConfigError(f"{where}: allowed is a source or a 2-D array; a path belongs to a table of the config")
    missing = [member for member in ("num_rows", "record", "read", "close") if not hasattr(table, member)]
    if missing:
        raise ConfigError(f"{where}: allowed is a source or a 2-D array; to be a source it lacks {', '.join(missing)}")
    if not isinstance(table.record, Record):
        raise ConfigError(f"{where}: its record is a {type(table.record).__name__}, not a tiercache.Record")
    num_rows = table.num_rows
    if not isinstance(num_rows, int | np.integer) or isinstance(num_rows, bool) or num_rows < 1:
        raise ConfigError(f"{where}: its num_rows is {num_rows!r}; allowed are 1 or more, as an integer")
    for method in ("read", "close"):
        if not callable(getattr(table, method)):
            raise ConfigError(f"{where}: its {method} cannot be called")
    source: Source = table
    return source if type(num_rows) is int else _Counted(int(num_rows), table.record, table.read, table.close)


@dataclass
class _Counted:
    """A source whose `num_rows` is an integer of another type than int: sums of numpy's would overflow at its width."""

    num_rows: int
    record: Record
    read: Callable[[npt.NDArray[np.int64], npt.NDArray[np.uint8]], Any]
    close: Callable[[], Any]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def read_rows(path: Path) -> npt.NDArray[np.int64]:
    """Row numbers of a .npy file, int64[n]. StorageError where it cannot be read, FormatError where it is something else."""
    if path.exists() and not path.is_file():
        raise FormatError(f"{path}: not a file")
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
        if mapped.ndim != 1 or mapped.dtype.kind not in "iu":
            raise FormatError(f"{path}: holds no list of row numbers, which is a 1-D array of integers")
        rows = np.fromfile(path, mapped.dtype, mapped.size, offset=mapped.offset)
    except OSError as error:
        raise storage_error(error, path) from error
    except FormatError:
        raise
    except (ValueError, EOFError, SyntaxError, TokenError) as error:
        raise FormatError(f"{path}: not a whole .npy file; allowed is a 1-D array of integers in one") from error
    if rows.size != mapped.size:
        raise FormatError(f"{path}: ends after {rows.size} of {mapped.size} row numbers")
    if rows.dtype.kind == "u" and rows.max(initial=0) >= 1 << 63:
        raise FormatError(f"{path}: has row {rows.max()}; allowed are rows below 2**63")
    return rows.astype(np.int64)


def _bytes(array: npt.NDArray[Any] | torch.Tensor) -> npt.NDArray[np.uint8]:
    """uint8[num_rows, row_bytes] over the same memory."""
    if isinstance(array, torch.Tensor):
        tensor = array.detach().contiguous()
        return np.asarray(tensor.view(torch.uint8).numpy())
    return np.ascontiguousarray(array).view(np.uint8)
