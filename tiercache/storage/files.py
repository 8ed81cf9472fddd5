"""Descriptors: the files of a store's tables, open for reading with O_DIRECT where the file system takes it."""

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.errors import StorageError
from tiercache.native import SYS_STATX, pread, syscall
from tiercache.storage.engine import aligned_buffer
from tiercache.storage.identity import AT_EMPTY_PATH, identity_of
from tiercache.storage.table import TableFile, require_unchanged, storage_error

_STATX_DIOALIGN = 0x2000


class OpenFiles(NamedTuple):
    """Files in one order, that of their numbers in the store.

    `alignment` is that of every offset, length and buffer address: 1 where reads go through the page cache, and then
    `refusal` says why, unless that was asked for.
    """

    files: tuple[TableFile, ...]
    descriptors: npt.NDArray[np.int64]
    alignment: int
    refusal: str | None
    identities: tuple[npt.NDArray[np.uint8], ...]

    def require_unchanged(self, numbers: Sequence[int]) -> None:
        """StorageError (ESTALE) where one of these files is not any more what it was when it was opened, or has no name."""
        for number in numbers:
            file, status = self.files[number], os.fstat(int(self.descriptors[number]))
            if (status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns) != file[1:]:
                raise StorageError(errno.ESTALE, "the file changed since the table was opened", str(file.path))
            if status.st_nlink == 0:
                raise StorageError(errno.ESTALE, "the file was deleted or replaced since it was opened", str(file.path))

    def close(self) -> None:
        """Close every descriptor."""
        for descriptor in self.descriptors.tolist():
            os.close(descriptor)


def open_files(files: Sequence[TableFile], *, direct: bool) -> OpenFiles:
    """Open files that must be what they were when their tables were described. StorageError if one is not."""
    descriptors: list[int] = []
    try:
        alignment, refusal = 1, None
        if direct and files:
            alignment, refusal = _direct_alignment(files, descriptors)
        if alignment == 1:
            for descriptor in descriptors:
                os.close(descriptor)
            descriptors.clear()
            descriptors.extend(_open(file, 0) for file in files)
        identities = tuple(map(identity_of, descriptors))
        for descriptor, file in zip(descriptors, files, strict=True):
            require_unchanged(descriptor, file)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return OpenFiles(tuple(files), np.array(descriptors, np.int64), alignment, refusal, identities)


def _direct_alignment(files: Sequence[TableFile], descriptors: list[int]) -> tuple[int, str | None]:
    """Open all with O_DIRECT; the alignment that serves every file, or 1 and the reason."""
    alignment = 1
    for file in files:
        try:
            descriptors.append(_open(file, os.O_DIRECT))
        except OSError as error:
            if error.errno != 22:
                raise
            return 1, f"O_DIRECT is refused for {file.path}: {error.strerror}"
        own = _alignment_of(descriptors[-1])
        if own == 0:
            return 1, f"O_DIRECT reads fail on {file.path}"
        alignment = max(alignment, own)
    return alignment, None


def _open(file: TableFile, flags: int) -> int:
    try:
        return os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        raise storage_error(error, file.path) from error


def _alignment_of(descriptor: int) -> int:
    """The smallest alignment that the file system says it takes, and does; 0 where direct reads fail."""
    said = np.zeros(256, np.uint8)
    empty = np.zeros(1, np.uint8)
    result = syscall(
        SYS_STATX, descriptor, empty.ctypes.data, AT_EMPTY_PATH, _STATX_DIOALIGN, said.ctypes.data, 0
    )
    memory, offset = (int(word) for word in said.view(np.uint32)[38:40])
    candidates = [max(memory, offset)] if result == 0 and offset else [512, 4096]
    buffer = aligned_buffer(max(candidates))
    for alignment in candidates:
        if pread(descriptor, buffer.ctypes.data, alignment, 0) >= 0:
            return alignment
    return 0
