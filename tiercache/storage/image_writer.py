"""Writing images; `image` says what they are."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.errors import FormatError, StorageError
from tiercache.storage.checksum import xxh64
from tiercache.storage.image import AboutTable, Numbers, Slots, digest, piece_of
from tiercache.storage.publish import publishing, require_place
from tiercache.storage.safetensors import read_header
from tiercache.storage.table import failures

_ALIGNMENT = 4096
_PREFIX = 8


class Writer:
    """Writes slots piece by piece, tier after tier in the order of `sizes`."""

    def __init__(self, path: Path, descriptor: int, sizes: Mapping[str, int], tables: list[AboutTable], stride: int) -> None:
        self.piece = piece_of(stride)
        self._path, self._descriptor, self._stride = path, descriptor, stride
        self.rows = {tier: np.full(size, -1, np.int64) for tier, size in sizes.items()}
        self._sums = {tier: np.zeros(-(-size // self.piece), np.int64) for tier, size in sizes.items()}
        about = {"format": 1, "tiers": list(sizes), "stride": stride, "tables": tables}
        text = json.dumps(about).encode()
        self._about = np.frombuffer(text.ljust(-(-len(text) // 8) * 8), np.uint8)
        header, self._starts, size = self._lay_out()
        with failures(path):
            os.posix_fallocate(descriptor, 0, size)  # refused before anything is written, if the disk is too full
        self._write(0, header)

    def _books(self) -> dict[str, npt.NDArray[Any]]:
        """The books but the last, in their order."""
        books: dict[str, npt.NDArray[Any]] = {}
        for tier, rows in self.rows.items():
            books |= {f"{tier}.rows": rows, f"{tier}.sums": self._sums[tier]}
        return books | {"about": self._about}

    def _lay_out(self) -> tuple[bytes, dict[str, int], int]:
        """(header, byte of each tensor, bytes of the file)."""
        shapes: dict[str, tuple[str, tuple[int, ...]]]
        shapes = {f"{tier}.slots": ("U8", (rows.size, self._stride)) for tier, rows in self.rows.items()}
        shapes |= {name: ("U8" if name == "about" else "I64", book.shape) for name, book in self._books().items()}
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

    def write(self, tier: str, first: int, slots: Slots, rows: Numbers) -> None:
        """Write one piece, its slots and their rows, -1 for what is to be no row."""
        self.rows[tier][first : first + len(slots)] = rows
        self._sums[tier][first // self.piece] = xxh64(slots.ctypes.data, slots.nbytes)
        self._write(self._starts[f"{tier}.slots"] + first * self._stride, slots.reshape(-1).data)

    def finish(self) -> None:
        """Write the books behind the slots."""
        books = self._books()
        for name, book in books.items():
            self._write(self._starts[name], book.data)
        self._write(self._starts["sum"], np.array([digest(list(books.values()))], np.int64).data)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        with failures(self._path):
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count


@contextmanager
def writing(path: Path, sizes: Mapping[str, int], tables: list[AboutTable], stride: int) -> Iterator[Writer]:
    """A writer of an image that replaces the one at `path` if the block succeeds, and vanishes if not.

    sizes: slots of each tier, the device's first. StorageError where it cannot be written, where something else than an image
    is in its place, and where another is just being written.
    """
    _require_replaceable(path)
    with publishing(path, "an image") as descriptor:
        writer = Writer(path, descriptor, sizes, tables, stride)
        yield writer
        writer.finish()


def _require_replaceable(path: Path) -> None:
    """StorageError where something is at the path that is no image, or no file can be."""
    if require_place(path, "an image"):
        with suppress(FormatError):
            if {"about", "sum"} <= set(read_header(path)):
                return
        raise StorageError(errno.EEXIST, "is something else than an image, and is not overwritten", str(path))
