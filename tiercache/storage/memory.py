"""MemoryTable: a table that is an array. For tests and for tables that fit."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tiercache.errors import FormatError
from tiercache.records import DTYPES, Record, plain
from tiercache.storage.table import storage_error

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


def read_rows(path: Path) -> npt.NDArray[np.int64]:
    """Row numbers of a .npy file, int64[n]. StorageError where it cannot be read, FormatError where it is something else."""
    try:
        rows = np.load(path, allow_pickle=False)
    except OSError as error:
        raise storage_error(error, path) from error
    except (ValueError, EOFError) as error:
        raise FormatError(f"{path}: not a .npy file: {error}") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise FormatError(f"{path}: holds no list of row numbers, which is a 1-D array of integers")
    return rows.astype(np.int64)


def _bytes(array: npt.NDArray[Any] | torch.Tensor) -> npt.NDArray[np.uint8]:
    """uint8[num_rows, row_bytes] over the same memory."""
    if isinstance(array, torch.Tensor):
        tensor = array.detach().contiguous()
        return np.asarray(tensor.view(torch.uint8).numpy())
    return np.ascontiguousarray(array).view(np.uint8)
