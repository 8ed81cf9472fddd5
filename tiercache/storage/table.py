"""FileTable: where the bytes of every row lie in files. A description; it holds no open file and reads nothing.

An extent is one field of consecutive rows in one file: that of `row` lies at `offset + (row - first_row) * stride`, has
`nbytes` bytes, and goes to byte `record_offset` of the record. The extents of a field that is not resident cover every
row exactly once, and an extent lies wholly inside its file.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.errors import FormatError, StorageError
from tiercache.records import Field, Record

_PIECE = 64 << 20


class TableFile(NamedTuple):
    """A file as it was when the table was opened; served only while all of it but the path stays so."""

    path: Path
    size: int  # bytes
    device: int
    inode: int
    mtime_ns: int


class Extent(NamedTuple):
    """One field of consecutive rows in one file."""

    file: int  # index in FileTable.files
    offset: int  # byte of its first row's field
    first_row: int
    num_rows: int
    stride: int  # bytes between rows in the file
    nbytes: int  # bytes of this field per row
    record_offset: int  # byte in the record


class PageChecksums(NamedTuple):
    """XXH64 of every page of every file of a table; stays on disk until loaded."""

    page_bytes: int
    pages_per_file: int
    files: tuple[TableFile, ...]  # little-endian uint64[pages_per_file] each, one for each file of the table

    def load(self) -> npt.NDArray[np.int64]:
        """The bits of the checksums, int64[num_files, pages_per_file]. StorageError where they cannot be read."""
        table = np.empty((len(self.files), self.pages_per_file), np.int64)
        for file, row in zip(self.files, table, strict=True):
            descriptor = open_readonly(file)
            try:
                read_exactly(descriptor, file.path, row.view(np.uint8), 0)
            finally:
                os.close(descriptor)
        return table


@dataclass(frozen=True, eq=False)
class FileTable:
    """Rows of one record layout in files."""

    name: str
    num_rows: int
    record: Record
    files: tuple[TableFile, ...]
    extents: tuple[Extent, ...]
    resident: tuple[tuple[int, npt.NDArray[np.uint8]], ...]  # (record_offset, uint8[num_rows, nbytes] in RAM)
    checksums: PageChecksums | None
    identity: str  # hex digest that names the data
    resident_files: tuple[TableFile, ...] = ()  # others that were read for what is in RAM
    notes: tuple[str, ...] = ()  # what whoever opens it should know

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self.record.record_bytes


def open_file(path: str | os.PathLike[str]) -> TableFile:
    """Identify a regular file that can be read. StorageError if it cannot, FormatError if it is something else."""
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path}: not a regular file")
    return _identify(path, status)


def open_readonly(file: TableFile) -> int:
    """Open a file that must still be the one identified before; the descriptor. StorageError if not."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error(error, file.path) from error
    try:
        require_unchanged(descriptor, file)
    except StorageError:
        os.close(descriptor)
        raise
    return descriptor


def require_unchanged(descriptor: int, file: TableFile) -> None:
    """StorageError (ESTALE) unless the open descriptor is the file that was identified, of the same size and time."""
    if _identify(file.path, os.fstat(descriptor)) != file:
        raise StorageError(errno.ESTALE, "the file changed since the table was opened", str(file.path))


def make_record(path: Path, fields: tuple[Field, ...], scale: float | None) -> Record:
    """Record of the fields found at a path, which its FormatError names."""
    try:
        return Record(fields, scale)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _identify(path: Path, status: os.stat_result) -> TableFile:
    return TableFile(path, status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns)


def read_exactly(descriptor: int, path: Path, out: npt.NDArray[np.uint8], offset: int) -> None:
    """Fill a contiguous array from a file, 64 MiB at a time. StorageError if a read fails or the file ends too soon."""
    view = out.reshape(-1).data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done : done + _PIECE]], offset + done)
        except OSError as error:
            raise storage_error(error, path) from error
        if count == 0:
            raise StorageError(
                errno.EIO, f"the file ends at byte {offset + done}, {len(view) - done} bytes too soon", str(path)
            )
        done += count


def storage_error(error: OSError, path: str | os.PathLike[str]) -> StorageError:
    """The same failure, as an error of this package that names the path."""
    number = errno.EIO if error.errno is None else error.errno
    return StorageError(number, error.strerror or str(error), os.fspath(path))


@contextmanager
def failures(path: Path) -> Iterator[None]:
    """Failures of the system become StorageErrors that name the path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, path) from error
