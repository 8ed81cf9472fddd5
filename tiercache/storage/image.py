"""Images: what the slots of tiers held, in one file, from which the next process begins warm.

An image is a safetensors file, its header padded so that the first slots lie on a page. Of each tier, the device's first, it
holds `T.slots` U8[n, stride]. Behind them are its books: of each tier `T.rows` I64[n], the row in each slot or -1 for none, and
`T.sums` I64[p], the XXH64 of each piece of `rows_per_piece` slots; `about` U8[k], JSON that says of which tables they are; and
last `sum` I64[1], the XXH64 of the books before it.

It is written to a hidden file beside its destination, flushed, and renamed: a reader finds the old image or the new one.
"""

import errno
import fcntl
import json
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

from tiercache.errors import FormatError
from tiercache.storage.checksum import xxh64
from tiercache.storage.safetensors import Tensor, read_header
from tiercache.storage.table import FileTable, TableFile, failures, open_readonly, read_exactly

_PIECE_BYTES = 4 << 20
_ALIGNMENT = 4096
_PREFIX = 8
_THREADS = 4
_Slots = npt.NDArray[np.uint8]
_Numbers = npt.NDArray[np.int64]


def about_tables(tables: Mapping[str, FileTable]) -> list[Any]:
    """What an image must say of the tables that it is of, to be theirs. Files that were written anew are other files."""
    return [
        [
            name,
            table.num_rows,
            [[field.name, field.dtype, field.width] for field in table.record.fields],
            table.identity,
            [[file.size, file.mtime_ns] for file in table.files],
        ]
        for name, table in tables.items()
    ]


_Count = Annotated[int, Constraint(ge=1)]


class _About(BaseModel):
    """What an image says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    tiers: list[str]
    stride: _Count
    rows_per_piece: _Count
    tables: list[Any]


class Part(NamedTuple):
    """One tier's part of an image."""

    file: TableFile
    offset: int  # byte of slot 0
    rows: _Numbers  # int64[n], row in each slot or -1
    sums: _Numbers  # int64[p], of each piece
    rows_per_piece: int
    stride: int  # bytes of a slot

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(first slot, number of slots) of each piece."""
        for first in range(0, self.rows.size, self.rows_per_piece):
            yield first, min(self.rows_per_piece, self.rows.size - first)

    def read(
        self,
        positions: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int32],
        put: Callable[[npt.NDArray[np.int64], npt.NDArray[np.int32], _Slots], None],
    ) -> None:
        """Read whole pieces in parallel, compare their checksums, and `put` the slots at `positions` (ascending) of each.

        put: positions int64[m] in a piece, slots int32[m], and the piece, uint8[n, stride]. FormatError for a wrong checksum.
        """
        descriptor = open_readonly(self.file)

        def one(piece: tuple[int, int]) -> None:
            first, count = piece
            begin, end = np.searchsorted(positions, (first, first + count))
            if begin < end:
                put(positions[begin:end] - first, slots[begin:end], self._piece(descriptor, first, count))

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(one, self.pieces()):
                    pass
        finally:
            os.close(descriptor)

    def _piece(self, descriptor: int, first: int, count: int) -> _Slots:
        slots = np.empty((count, self.stride), np.uint8)
        read_exactly(descriptor, self.file.path, slots, self.offset + first * self.stride)
        if xxh64(slots.ctypes.data, slots.nbytes) != self.sums[first // self.rows_per_piece]:
            raise FormatError(f"{self.file.path}: damaged: the checksum of slots {first} to {first + count - 1} is wrong")
        return slots


def open_image(path: Path, tables: list[Any]) -> dict[str, Part]:
    """The parts of an image by tier. FormatError for a damaged image, and for one of other tables."""
    tensors = read_header(path)
    if "about" not in tensors or "sum" not in tensors:
        raise FormatError(f"{path}: not an image of tiers")
    file = tensors["about"].file
    descriptor = open_readonly(file)
    try:
        _require_intact(descriptor, tensors)
        about = _parse(path, _read(descriptor, tensors, "about").tobytes())
        _require_same(path, about, tables)
        return {tier: _part(descriptor, tensors, tier, about) for tier in about.tiers}
    finally:
        os.close(descriptor)


def _require_intact(descriptor: int, tensors: Mapping[str, Tensor]) -> None:
    """FormatError unless the books are what was written."""
    last = tensors["sum"]
    slots = [tensor for name, tensor in tensors.items() if name.endswith(".slots")]
    begin = max((tensor.offset + tensor.nbytes for tensor in slots), default=last.offset)
    books = [tensor for tensor in tensors.values() if tensor.offset >= begin]
    if last.nbytes != 8 or begin >= last.offset or last.offset < max(tensor.offset for tensor in books):
        raise FormatError(f"{last.file.path}: not an image of tiers")
    data = np.empty(last.offset - begin, np.uint8)
    read_exactly(descriptor, last.file.path, data, begin)
    if xxh64(data.ctypes.data, data.size) != _read(descriptor, tensors, "sum").view(np.int64)[0]:
        raise FormatError(f"{last.file.path}: damaged: the checksum of its books is wrong")


def _read(descriptor: int, tensors: Mapping[str, Tensor], name: str) -> npt.NDArray[np.uint8]:
    tensor = tensors[name]
    data = np.empty(tensor.nbytes, np.uint8)
    read_exactly(descriptor, tensor.file.path, data, tensor.offset)
    return data


def _parse(path: Path, text: bytes) -> _About:
    try:
        return _About.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise FormatError(f"{path}: not an image of tiers: {where} = {problem['input']!r}: {problem['msg']}") from None


def _part(descriptor: int, tensors: Mapping[str, Tensor], tier: str, about: _About) -> Part:
    parts = {name: tensors.get(f"{tier}.{name}") for name in ("slots", "rows", "sums")}
    slots, file = parts["slots"], tensors["about"].file
    shapes = [part and (part.dtype, part.shape) for part in parts.values()]
    num_slots = slots.shape[0] if slots and slots.shape else 0
    num_pieces = -(-num_slots // about.rows_per_piece)
    if shapes != [("U8", (num_slots, about.stride)), ("I64", (num_slots,)), ("I64", (num_pieces,))]:
        raise FormatError(f"{file.path}: not an image of tiers: its tensors of tier {tier!r} do not fit")
    saved, expected = (_read(descriptor, tensors, f"{tier}.{name}").view(np.int64) for name in ("rows", "sums"))
    return Part(file, tensors[f"{tier}.slots"].offset, saved, expected, about.rows_per_piece, about.stride)


def _require_same(path: Path, about: _About, tables: list[Any]) -> None:
    advice = "delete it, and the tiers begin empty"
    saved = [table[0] for table in about.tables]
    if saved != [table[0] for table in tables]:
        raise FormatError(f"{path}: image of tables {saved}; this store has {[table[0] for table in tables]}: {advice}")
    for old, new in zip(about.tables, tables, strict=True):
        if old != new:
            raise FormatError(f"{path}: image of another table {new[0]!r}, or of files that have changed since: {advice}")


class Writer:
    """Writes slots piece by piece, tier after tier in the order of `sizes`."""

    def __init__(self, path: Path, descriptor: int, sizes: Mapping[str, int], tables: list[Any], stride: int) -> None:
        self.rows_per_piece = max(1, _PIECE_BYTES // stride)
        self._path, self._descriptor, self._stride = path, descriptor, stride
        self.rows = {tier: np.full(size, -1, np.int64) for tier, size in sizes.items()}
        self._sums = {tier: np.zeros(-(-size // self.rows_per_piece), np.int64) for tier, size in sizes.items()}
        about = _About(format=1, tiers=list(sizes), stride=stride, rows_per_piece=self.rows_per_piece, tables=tables)
        text = about.model_dump_json().encode()
        self._about = text.ljust(-(-len(text) // 8) * 8)
        header, self._starts, size = self._lay_out()
        with failures(path):
            os.posix_fallocate(descriptor, 0, size)  # refused before anything is written, if the disk is too full
        self._write(0, header)

    def _lay_out(self) -> tuple[bytes, dict[str, int], int]:
        """(header, byte of each tensor, bytes of the file)."""
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tier, rows in self.rows.items():
            shapes[f"{tier}.slots"] = ("U8", (rows.size, self._stride))
        for tier, rows in self.rows.items():
            shapes[f"{tier}.rows"] = ("I64", rows.shape)
            shapes[f"{tier}.sums"] = ("I64", self._sums[tier].shape)
        shapes["about"] = ("U8", (len(self._about),))
        shapes["sum"] = ("I64", (1,))
        entries, offset, offsets = {}, 0, {}
        for name, (dtype, shape) in shapes.items():
            end = offset + int(np.prod(shape)) * (8 if dtype == "I64" else 1)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
            offsets[name], offset = offset, end
        text = json.dumps(entries).encode()
        length = -(-(_PREFIX + len(text)) // _ALIGNMENT) * _ALIGNMENT - _PREFIX
        header = length.to_bytes(_PREFIX, "little") + text.ljust(length)
        return header, {name: len(header) + begin for name, begin in offsets.items()}, len(header) + offset

    def write(self, tier: str, first: int, slots: _Slots, rows: _Numbers) -> None:
        """Write one piece, its slots and their rows, -1 for what is to be no row."""
        self.rows[tier][first : first + len(slots)] = rows
        self._sums[tier][first // self.rows_per_piece] = xxh64(slots.ctypes.data, slots.nbytes)
        self._write(self._starts[f"{tier}.slots"] + first * self._stride, slots.reshape(-1).data)

    def finish(self) -> None:
        """Write the books behind the slots."""
        books = [array.tobytes() for tier in self.rows for array in (self.rows[tier], self._sums[tier])]
        data = np.frombuffer(b"".join([*books, self._about]), np.uint8)
        begin = self._starts[f"{next(iter(self.rows))}.rows"]
        self._write(begin, data.data)
        self._write(self._starts["sum"], np.array([xxh64(data.ctypes.data, data.size)], np.int64).tobytes())

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        with failures(self._path):
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count


@contextmanager
def writing(path: Path, sizes: Mapping[str, int], tables: list[Any], stride: int) -> Iterator[Writer]:
    """A writer of an image that replaces what is at `path` if the block succeeds, and vanishes if not.

    sizes: slots of each tier, the device's first. StorageError where it cannot be written, and where another is just being.
    """
    temporary = path.with_name(f".{path.name}.saving")
    with ExitStack() as closing, ExitStack() as removing:
        with failures(path):
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            closing.callback(os.close, descriptor)
            _require_alone(descriptor, temporary)
            removing.callback(temporary.unlink, missing_ok=True)
            os.ftruncate(descriptor, 0)
        writer = Writer(path, descriptor, sizes, tables, stride)
        yield writer
        writer.finish()
        with failures(path):
            os.fsync(descriptor)
            temporary.replace(path)
            removing.pop_all()
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            closing.callback(os.close, directory)
            os.fsync(directory)


def _require_alone(descriptor: int, path: Path) -> None:
    """OSError (EBUSY) where somebody else writes this file, or has just published it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        alone = False
    if not alone:
        raise OSError(errno.EBUSY, "an image is being saved there")

