"""What a caller may ask for: indices, tables, outputs. Every check of an argument, before anything changes."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from tiercache.native import entry_of, jit
from tiercache.records import Record
from tiercache.storage.reader import Reader


class Table(NamedTuple):
    """A table of an open store. Its row r is row `base + r` of the store; `dtype` is what fetch returns of it."""

    name: str
    base: int
    num_rows: int
    record: Record
    dtype: torch.dtype
    reader: Reader
    verbatim: bool
    """Whether a record's bytes are its decoded row."""
    group_rows: int = 1
    """Rows that are asked for together."""


def rows_of(indices: Any, table: Table, device: torch.device) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
    """(rows of the store int64[n], shape asked for). TypeError for what is not integers, IndexError for the first bad row.

    ValueError where they are not whole groups.
    """
    if isinstance(indices, torch.Tensor):
        check_tensor(with_values(indices, "indices"), device)
        array = (indices if indices.device.type == "cpu" else indices.cpu()).numpy()
    else:
        array = np.asarray(indices)
        if array.size == 0 and not isinstance(indices, np.ndarray):
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"indices are {array.dtype}; row numbers are integers")
        if not array.dtype.isnative:
            array = array.astype(np.int64)
    shape = array.shape
    if array.size % table.group_rows:
        raise ValueError(
            f"indices are {array.size} rows; this store serves groups of {table.group_rows}: allowed are whole groups"
        )
    rows = np.empty(array.size, np.int64)
    arguments = np.ascontiguousarray(array).reshape(-1), table.base, table.num_rows, rows
    localise = _entries.get(array.dtype)
    if localise is None:
        localise = _entries[array.dtype] = entry_of(_localise, arguments)
    bad = localise(*arguments)
    if bad >= 0:
        where = np.unravel_index(bad, shape)
        raise IndexError(
            f"row {array[where]} at position {tuple(int(axis) for axis in where)} is out of range: "
            f"table {table.name!r} has rows 0 to {table.num_rows - 1}"
        )
    return rows, shape


def shape_of(shape: Any) -> tuple[int, ...]:
    """A shape, from any sequence of counts. TypeError or ValueError for what is none."""
    try:
        counts = tuple(map(operator.index, shape))
    except TypeError as error:
        raise TypeError(f"shape = {shape!r}: allowed is a sequence of integers") from error
    if min(counts, default=0) < 0:
        raise ValueError(f"shape = {shape!r}: allowed are counts of 0 or more")
    return counts


def check_tensor(indices: torch.Tensor, device: torch.device) -> None:
    """TypeError for indices on a device or of a dtype that a store on `device` does not take. Needs no values."""
    if indices.device.type not in ("cpu", device.type):
        raise TypeError(f"indices are on {indices.device}; this store takes them on the CPU{_or(device)}")
    if indices.dtype not in _INTEGERS:
        raise TypeError(f"indices are {indices.dtype}; row numbers are integers")


def is_traced(indices: Any) -> bool:
    """Whether what is done with a tensor now may be recorded for others, or is done for a batch of them: traced, mapped."""
    return (
        type(indices) is not torch.Tensor
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def are_rows(indices: torch.Tensor, table: Table, rows: npt.NDArray[np.int64]) -> bool:
    """Whether `rows_of` gave these rows of the store, int64[n], for such indices. As many are asked about."""
    if indices.dtype not in _INTEGERS or indices.is_meta or isinstance(indices, FakeTensor | FunctionalTensor):
        return False
    array = (indices if indices.device.type == "cpu" else indices.cpu()).numpy()
    return bool(_same(np.ascontiguousarray(array).reshape(-1), table.base, rows))


def with_values(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor. TypeError where it only stands for one, as in a trace, and has no memory of its own."""
    if type(tensor) is torch.Tensor:
        if not tensor.is_meta and not torch._is_functional_tensor(tensor):
            return tensor
        kind = "on meta" if tensor.is_meta else "a tensor of torch.func.functionalize"
    elif isinstance(tensor, FakeTensor | FunctionalTensor):
        kind = f"a {type(tensor).__name__}"
    else:
        return tensor
    raise TypeError(f"{name} have no values: {kind}; code that is traced calls tiercache.as_operator(store) instead")


_INTEGERS = frozenset(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)


@jit
def _same(indices: Any, base: int, rows: Any) -> bool:
    """Whether rows[i] = base + indices[i]."""
    different = np.int64(0)
    for i in range(indices.size):
        different |= (base + np.int64(indices[i])) ^ rows[i]
    return different == 0


@jit
def _localise(indices: Any, base: int, num_rows: int, rows: Any) -> int:
    """rows[i] = base + indices[i]; the first position that is out of range, or -1. Reads each index once: it may change."""
    sign = np.int64(0)
    for i in range(indices.size):
        row = np.int64(indices[i])
        rows[i] = base + row
        sign |= row | (num_rows - 1 - row)
    if sign < 0:
        for i in range(indices.size):
            row = rows[i] - base
            if row < 0 or row >= num_rows:
                return i
    return -1


_entries: dict[np.dtype[Any], Callable[..., int]] = {}
"""`_localise` by the dtype of the indices, which is all that its arguments differ in."""


def checked(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`out`, if rows can be written to it. TypeError or ValueError where it does not fit."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is a {type(out).__name__}, not a torch.Tensor")
    if out.dtype != dtype:
        raise TypeError(f"out is {out.dtype}; these rows are {dtype}")
    if out.device != device:
        raise TypeError(f"out is on {out.device}; this store writes to {device}")
    with_values(out, "rows of out")
    if out.shape != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; these rows have {shape}")
    if not out.is_contiguous():
        raise ValueError("out is not contiguous")
    if out.requires_grad:
        raise ValueError("out requires a gradient; rows are not differentiable")
    if out.is_neg() or out._is_zerotensor() or (out.numel() and out.data_ptr() == 0):
        raise ValueError("out has no memory of its own that rows could be written to")
    return out


def _or(device: torch.device) -> str:
    return "" if device.type == "cpu" else f" or on {device}"
