"""Writing packed tables, checking them, and saying what a table is.

A table is built in a hidden directory beside its destination, every file and directory of it is flushed to the disk,
and one rename makes it appear: whatever happens before leaves nothing that opens. The builder holds a lock on the
hidden directory; one that nobody holds is left over from a builder that was killed, and the next removes it.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.errors import FormatError, StorageError
from tiercache.records import Record
from tiercache.source import Source
from tiercache.storage import open_table, require_path
from tiercache.storage.checksum import PAGE_BYTES, checksum_pages
from tiercache.storage.table import (
    FileTable,
    TableFile,
    failures,
    open_readonly,
    read_exactly,
    require_unchanged,
)
from tiercache.storage.zarr import Layout, describe_table, open_zarr, plan_layout, read_description

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all) after each piece."""

_PIECE_BYTES = 32 << 20
_PIECE_PAGES = _PIECE_BYTES // PAGE_BYTES


class PackReport(NamedTuple):
    """A table that was written."""

    path: Path
    num_rows: int
    record_bytes: int
    num_files: int
    num_bytes: int  # of records
    identity: str
    seconds: float
    notes: tuple[str, ...]  # on the source: fp8 values that seem to miss their scale


class BadPage(NamedTuple):
    """A page that is not what was written."""

    file: Path
    page: int
    first_row: int  # row of the table that owns the page's first byte


class VerifyReport(NamedTuple):
    """What the page checksums say."""

    num_pages: int
    num_bytes: int
    bad: tuple[BadPage, ...]


class TableInfo(NamedTuple):
    """What a table is."""

    kind: str  # "safetensors" or "packed"
    path: Path
    num_rows: int
    record: Record
    files: tuple[TableFile, ...]
    identity: str
    page_bytes: int | None  # of the checksums; None where there are none
    source: Mapping[str, str]  # what a packed table was made of


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    fields: Sequence[str] = (),
    progress: Progress | None = None,
) -> PackReport:
    """Write a table on disk as a packed one, in bounded memory. `fields` is as in the config.

    Raises StorageError if the destination exists, the disk is full, or the source changes meanwhile; nothing of the
    destination is left then. Errors of opening the source are those of `open_table`.
    """
    table = open_table("source", require_path(source, "the table to pack"), fields=fields)
    origin = {"kind": _kind(Path(source)), "name": Path(source).name, "identity": table.identity}
    with ExitStack() as stack:
        reader = _Reader(table, stack)
        report = _write(reader, Path(destination), origin, progress, reader.require_unchanged)
    return report._replace(notes=table.notes)


def pack_rows(source: Source, destination: str | os.PathLike[str], *, progress: Progress | None = None) -> PackReport:
    """Write the rows of any source, read in order, as a packed table. The source stays open. Raises as `pack`."""
    return _write(source, Path(destination), {"kind": "rows"}, progress, lambda: None)


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> VerifyReport:
    """Read all of a packed table from the disk and compare every page with its checksum.

    Raises FormatError for what is no packed table, StorageError where it cannot be read.
    """
    path = require_path(path, "the table to verify")
    if not path.is_dir():
        raise FormatError(f"{path}: only packed tables have checksums to verify")
    table = open_zarr("verify", path)
    assert table.checksums is not None
    total = sum(file.size for file in table.files)
    bad: list[BadPage] = []
    done = 0
    for extent, expected in zip(table.extents, table.checksums.load(), strict=True):
        file = table.files[extent.file]
        for first_page, sums in _read_checksums(file):
            for page in first_page + np.flatnonzero(sums != expected[first_page : first_page + sums.size]):
                row = extent.first_row + int(page) * PAGE_BYTES // extent.stride
                bad.append(BadPage(file.path, int(page), row))
            if progress is not None:
                progress(done + min(file.size, (first_page + sums.size) * PAGE_BYTES), total)
        done += file.size
    return VerifyReport(sum(-(-file.size // PAGE_BYTES) for file in table.files), total, tuple(bad))


def inspect(path: str | os.PathLike[str], *, fields: Sequence[str] = ()) -> TableInfo:
    """Say what a table is. Raises as `open_table`; for a file of several tensors the ConfigError lists them."""
    path = require_path(path, "the table to inspect")
    table = open_table("inspect", path, fields=fields)
    page_bytes = table.checksums.page_bytes if table.checksums else None
    source = read_description(path).source if path.is_dir() else {}
    return TableInfo(_kind(path), path, table.num_rows, table.record, table.files, table.identity, page_bytes, source)


def _kind(path: Path) -> str:
    return "packed" if path.is_dir() else "safetensors"


class _Reader:
    """Source over consecutive rows of a file table without resident fields."""

    def __init__(self, table: FileTable, stack: ExitStack) -> None:
        self.num_rows, self.record = table.num_rows, table.record
        self._table = table
        self._descriptors = [open_readonly(file) for file in table.files]
        for descriptor in self._descriptors:
            stack.callback(os.close, descriptor)

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """Write the records of rows[0] ... rows[-1], which are consecutive, to `out`."""
        first, end = int(rows[0]), int(rows[-1]) + 1
        for extent in self._table.extents:
            begin, stop = max(first, extent.first_row), min(end, extent.first_row + extent.num_rows)
            if begin < stop:
                piece = np.empty((stop - begin, extent.nbytes), np.uint8)
                offset = extent.offset + (begin - extent.first_row) * extent.stride
                read_exactly(self._descriptors[extent.file], self._table.files[extent.file].path, piece, offset)
                columns = slice(extent.record_offset, extent.record_offset + extent.nbytes)
                out[begin - first : stop - first, columns] = piece

    def require_unchanged(self) -> None:
        """StorageError if a file changed since the table was opened."""
        for descriptor, file in zip(self._descriptors, self._table.files, strict=True):
            require_unchanged(descriptor, file)

    def close(self) -> None:
        """The stack closes the files."""


def _write(
    source: Source,
    destination: Path,
    origin: Mapping[str, str],
    progress: Progress | None,
    before_publishing: Callable[[], None],
) -> PackReport:
    started = time.monotonic()
    layout = plan_layout(source.record, source.num_rows)
    num_bytes = layout.num_rows * layout.record.record_bytes
    with _staging(destination, layout) as staging:
        builder = _Builder(source, layout, staging, lambda done: progress and progress(done, num_bytes))
        for chunk in range(layout.num_chunks):
            builder.write_chunk(chunk)
        identity = builder.digest.hexdigest()
        before_publishing()
        for name, text in describe_table(layout, identity, origin).items():
            with _create(staging / name) as descriptor:
                _write_all(descriptor, staging / name, text.encode())
    return PackReport(
        path=destination,
        num_rows=layout.num_rows,
        record_bytes=layout.record.record_bytes,
        num_files=layout.num_chunks,
        num_bytes=num_bytes,
        identity=identity,
        seconds=time.monotonic() - started,
        notes=(),
    )


class _Builder:
    """Writes chunk after chunk. Memory: a piece of records, and room before it for a page that the last piece began."""

    def __init__(self, source: Source, layout: Layout, root: Path, progress: Callable[[int], Any]) -> None:
        width = layout.record.record_bytes
        self._source, self._layout, self._root, self._progress = source, layout, root, progress
        self._piece_rows = min(layout.rows_per_chunk, max(1, _PIECE_BYTES // width))
        self._buffer = np.empty(PAGE_BYTES + self._piece_rows * width, np.uint8)
        self._records = self._buffer[PAGE_BYTES:].reshape(self._piece_rows, width)
        self.digest = hashlib.sha256(identity_header(layout.record, layout.num_rows))

    def write_chunk(self, chunk: int) -> None:
        """Write one file of rows, zeros behind the table's last, and its file of checksums."""
        layout = self._layout
        first, path = chunk * layout.rows_per_chunk, self._root / layout.rows_file(chunk)
        sums = np.empty(layout.pages_per_chunk, np.int64)
        begun, pages = 0, 0  # bytes of an unfinished page, finished pages
        with _create(path) as descriptor:
            for start in range(first, first + layout.rows_per_chunk, self._piece_rows):
                records = self._records[: min(self._piece_rows, first + layout.rows_per_chunk - start)]
                self._fill(records, start)
                _write_all(descriptor, path, records.reshape(-1).data)
                begun, pages = self._add_checksums(sums, begun, pages, records.size)
                self._progress(min(layout.num_rows, start + len(records)) * layout.record.record_bytes)
        if begun:
            checksum_pages(self._buffer[PAGE_BYTES - begun :].ctypes.data, begun, PAGE_BYTES, sums[pages:].ctypes.data)
        path = self._root / layout.checksums_file(chunk)
        with _create(path) as descriptor:
            _write_all(descriptor, path, sums.astype("<i8").data)

    def _fill(self, records: npt.NDArray[np.uint8], start: int) -> None:
        num_real = max(0, min(len(records), self._layout.num_rows - start))
        if num_real:
            self._source.read(np.arange(start, start + num_real), records[:num_real])
            self.digest.update(records[:num_real].reshape(-1).data)
        records[num_real:] = 0

    def _add_checksums(self, sums: npt.NDArray[np.int64], begun: int, pages: int, num_bytes: int) -> tuple[int, int]:
        """Checksum the pages that a piece finishes; keep the rest of it before the next."""
        data = self._buffer[PAGE_BYTES - begun : PAGE_BYTES + num_bytes]
        num_whole = data.size // PAGE_BYTES
        checksum_pages(data.ctypes.data, num_whole * PAGE_BYTES, PAGE_BYTES, sums[pages:].ctypes.data)
        rest = data[num_whole * PAGE_BYTES :].copy()
        self._buffer[PAGE_BYTES - rest.size : PAGE_BYTES] = rest
        return rest.size, pages + num_whole


def identity_header(record: Record, num_rows: int) -> bytes:
    """What the identity of a packed table digests before the records."""
    layout = [num_rows, record.scale, [[field.name, field.dtype, field.width] for field in record.fields]]
    return json.dumps(layout, separators=(",", ":")).encode()


@contextmanager
def _staging(destination: Path, layout: Layout) -> Iterator[Path]:
    """A directory that becomes the destination if the block succeeds, and vanishes if not."""
    if os.path.lexists(destination):
        raise StorageError(errno.EEXIST, "the destination exists and is not overwritten", str(destination))
    prefix = f".{destination.name}.packing-"
    staging = destination.with_name(prefix + secrets.token_hex(8))
    with failures(destination.parent):
        _remove_leftovers(destination.parent, prefix)
        _require_space(destination, layout)
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: there the leftovers of killed builders stay
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield staging
        with failures(destination):
            for directory, _, _ in os.walk(staging, topdown=False):
                _flush_directory(Path(directory))
            staging.rename(destination)
            _flush_directory(destination.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _remove_leftovers(directory: Path, prefix: str) -> None:
    for path in directory.iterdir():
        if path.name.startswith(prefix):
            with suppress(OSError), ExitStack() as stack:  # somebody's still, or gone already
                lock = os.open(path, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)


def _require_space(destination: Path, layout: Layout) -> None:
    status = os.statvfs(destination.parent)
    free, needed = (
        status.f_bavail * status.f_frsize,
        layout.num_chunks * (layout.chunk_bytes + 8 * layout.pages_per_chunk),
    )
    if free < needed:
        raise StorageError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free", str(destination))


@contextmanager
def _create(path: Path) -> Iterator[int]:
    """Descriptor of a new file, which is on the disk after the block."""
    with failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        with failures(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, path: Path, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    with failures(path):
        while view:
            view = view[os.write(descriptor, view) :]


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_checksums(file: TableFile) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(first page, checksums int64[n]) of a file piece by piece, read from the disk and not from the page cache."""
    descriptor = open_readonly(file)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = np.empty(min(_PIECE_PAGES * PAGE_BYTES, file.size), np.uint8)
        for start in range(0, file.size, buffer.size):
            piece = buffer[: min(buffer.size, file.size - start)]
            read_exactly(descriptor, file.path, piece, start)
            sums = np.empty(-(-piece.size // PAGE_BYTES), np.int64)
            checksum_pages(piece.ctypes.data, piece.size, PAGE_BYTES, sums.ctypes.data)
            yield start // PAGE_BYTES, sums
    finally:
        os.close(descriptor)
