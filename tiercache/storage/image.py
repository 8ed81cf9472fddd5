"""Images: what the slots of tiers held, in one file, from which the next process begins warm.

An image is a safetensors file, its header padded so that the first slots lie on a page. Of each tier, the device's first, it
holds `T.slots` U8[n, stride]. Behind them are its books: of each tier `T.rows` I64[n], the row in each slot or -1 for none, and
`T.sums` I64[p], the XXH64 of each piece of `piece_of(stride)` slots; `about` U8[k], JSON that says of which tables they are;
and last `sum` I64[1], the XXH64 of the XXH64s of the books before it.

This module reads images; `image_writer` writes them.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as Constraint

from tiercache.errors import FormatError, StorageError
from tiercache.storage.checksum import xxh64
from tiercache.storage.safetensors import Tensor, read_header
from tiercache.storage.table import FileTable, TableFile, open_readonly, read_exactly

_PIECE_BYTES = 4 << 20
_THREADS = 4
_TRIES = 3
_MOST_ABOUT = 64 << 20
_WIDEST_GAP = 16
Slots = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
Places = npt.NDArray[np.int32]

AboutTable = tuple[str, int, list[tuple[str, int]], str, list[tuple[int, int]]]
"""Name, rows, (dtype, width) of each field, identity, (size, time of change) of each file."""


def piece_of(stride: int) -> int:
    """Slots that share a checksum: as many as fit 4 MiB, at least one."""
    return max(1, _PIECE_BYTES // stride)


def about_tables(tables: Mapping[str, FileTable]) -> list[AboutTable]:
    """What an image must say of the tables that it is of, to be theirs. Files that were written anew are other files."""
    return [
        (
            name,
            table.num_rows,
            [(field.dtype, field.width) for field in table.record.fields],
            table.identity,
            [(file.size, file.mtime_ns) for file in (*table.files, *table.resident_files)],
        )
        for name, table in tables.items()
    ]


class _About(BaseModel):
    """What an image says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    tiers: list[Literal["device", "host"]]
    stride: Annotated[int, Constraint(ge=1)]
    tables: list[AboutTable]


class Part(NamedTuple):
    """One tier's part of an open image."""

    file: TableFile
    descriptor: int
    offset: int  # byte of slot 0
    rows: Numbers  # int64[n], row in each slot or -1
    sums: Numbers  # int64[p], of each piece
    stride: int  # bytes of a slot

    def pieces(self, positions: Numbers) -> Iterator[tuple[int, int, slice]]:
        """(first slot, number of slots, which of the positions, ascending, are in it) of each piece that has some."""
        length = piece_of(self.stride)
        for first in range(0, self.rows.size, length):
            count = min(length, self.rows.size - first)
            begin, end = np.searchsorted(positions, (first, first + count))
            if begin < end:
                yield first, count, slice(begin, end)

    def read(self, positions: Numbers, put: Callable[[slice, Places, Slots], None]) -> None:
        """Read pieces in parallel and compare their checksums. FormatError where one is wrong.

        put: called with which of the positions are in a piece, with where they are in it, int32[m], and with it,
        uint8[n, stride]; by several threads.
        """

        def one(piece: tuple[int, int, slice]) -> None:
            first, count, which = piece
            slots = np.empty((count, self.stride), np.uint8)
            read_exactly(self.descriptor, self.file.path, slots, self.offset + first * self.stride)
            self.require_intact(first, slots)
            put(which, (positions[which] - first).astype(np.int32), slots)

        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(one, self.pieces(positions)):
                pass

    def require_intact(self, first: int, slots: Slots) -> None:
        """FormatError unless these are the slots of the piece that begins with slot `first`."""
        if xxh64(slots.ctypes.data, slots.nbytes) != self.sums[first // piece_of(self.stride)]:
            last = first + len(slots) - 1
            raise FormatError(f"{self.file.path}: damaged: the checksum of slots {first} to {last} is wrong")


@contextmanager
def open_image(path: Path, tables: list[AboutTable], record_bytes: int) -> Iterator[dict[str, Part]]:
    """The parts of an image by tier; it stays the same whoever replaces it meanwhile.

    FormatError for a damaged image, and for one of other tables. record_bytes: of the widest record.
    """
    with ExitStack() as stack:
        file, descriptor, tensors = _open(path, stack)
        books = _read_books(file, descriptor, tensors)
        about = _parse(path, books["about"].tobytes())
        _require_same(path, about, tables)
        if not record_bytes <= about.stride < record_bytes + _WIDEST_GAP:
            raise _no_image(path, f"slots of {about.stride} bytes for records of {record_bytes}")
        if set(tensors) != {f"{tier}.{name}" for tier in about.tiers for name in ("slots", "rows", "sums")} | {"about", "sum"}:
            raise _no_image(path, f"tensors {sorted(tensors)[:8]}")
        yield {tier: _part(file, descriptor, tensors[f"{tier}.slots"], tier, books, about.stride) for tier in about.tiers}


def _open(path: Path, stack: ExitStack) -> tuple[TableFile, int, dict[str, Tensor]]:
    """The file, its descriptor, and what its header says, all of one image."""
    for tries_left in reversed(range(_TRIES)):
        tensors = read_header(path)
        if not {"about", "sum"} <= set(tensors):
            raise _no_image(path, f"tensors {sorted(tensors)[:8]}")
        file = tensors["about"].file
        try:
            descriptor = open_readonly(file)
        except StorageError as error:
            if error.errno != errno.ESTALE or not tries_left:
                raise
            continue  # replaced since its header was read
        stack.callback(os.close, descriptor)
        return file, descriptor, tensors
    raise AssertionError


def _read_books(file: TableFile, descriptor: int, tensors: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.uint8]]:
    """The books by name, as bytes. FormatError unless they are what was written."""
    names = [name for name in tensors if not name.endswith(".slots")]
    names.sort(key=lambda name: tensors[name].offset)
    if names[-1] != "sum" or tensors["sum"].nbytes != 8 or tensors["about"].nbytes > _MOST_ABOUT:
        raise _no_image(file.path, "books in disorder")
    books: dict[str, npt.NDArray[np.uint8]] = {}
    for name in names:
        if name not in ("about", "sum"):
            _require_small(file, tensors, name)
        books[name] = np.empty(tensors[name].nbytes, np.uint8)
        read_exactly(descriptor, file.path, books[name], tensors[name].offset)
    if digest([books[name] for name in names[:-1]]) != books["sum"].view(np.int64)[0]:
        raise FormatError(f"{file.path}: damaged: the checksum of its books is wrong")
    return books


def _require_small(file: TableFile, tensors: Mapping[str, Tensor], name: str) -> None:
    """FormatError for a book that is longer than a number for each slot of its tier."""
    slots = tensors.get(f"{name.rpartition('.')[0]}.slots")
    if slots is None or not slots.shape or tensors[name].nbytes > 8 * slots.shape[0]:
        raise _no_image(file.path, f"tensor {tensors[name]}")


def digest(books: list[npt.NDArray[Any]]) -> int:
    """What `sum` says of the books."""
    sums = np.array([xxh64(book.ctypes.data, book.nbytes) for book in books], np.int64)
    return int(xxh64(sums.ctypes.data, sums.nbytes))


def _parse(path: Path, text: bytes) -> _About:
    try:
        return _About.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise _no_image(path, f"{where or 'its description'}: {problem['msg'][:80]}") from None


def _no_image(path: Path, why: str) -> FormatError:
    return FormatError(f"{path}: not an image of tiers: {why[:200]}")


def _part(file: TableFile, descriptor: int, slots: Tensor, tier: str, books: Mapping[str, Slots], stride: int) -> Part:
    num_slots = slots.shape[0] if slots.shape else 0
    rows, sums = books[f"{tier}.rows"], books[f"{tier}.sums"]
    if (slots.dtype, slots.shape) != ("U8", (num_slots, stride)) or rows.nbytes != 8 * num_slots:
        raise _no_image(file.path, f"tensor {slots}")
    if sums.nbytes != 8 * -(-num_slots // piece_of(stride)):
        raise _no_image(file.path, f"{sums.nbytes // 8} checksums of {num_slots} slots")
    return Part(file, descriptor, slots.offset, rows.view(np.int64), sums.view(np.int64), stride)


def _require_same(path: Path, about: _About, tables: list[AboutTable]) -> None:
    advice = "delete it, and the tiers begin empty"
    saved, here = [table[0] for table in about.tables], [table[0] for table in tables]
    if saved != here:
        raise FormatError(f"{path}: image of tables {saved[:8]}; this store has {here[:8]}: {advice}")
    for old, new in zip(about.tables, tables, strict=True):
        if old != new:
            raise FormatError(f"{path}: image of another table {new[0]!r}, or of files that have changed since: {advice}")
