"""Publishing: a file takes another's place once it is whole and on the disk.

It is written under a hidden name beside its destination, flushed, and renamed: a reader finds the old file or the new one.
What a killed writer leaves of the hidden file, the next one takes over.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

from tiercache.storage.table import failures


@contextmanager
def publishing(path: Path, what: str) -> Iterator[int]:
    """Descriptor of a new file that replaces the one at `path` if the block succeeds, and vanishes if not. what: in words.

    StorageError where it cannot be written, and where another is just being written.
    """
    with failures(path):
        path = path.resolve()  # of a link, its target is replaced
    temporary = path.with_name(f".{path.name}.saving")
    with ExitStack() as closing, ExitStack() as removing:
        with failures(path):
            file = closing.enter_context(FileIO(temporary, "r+", opener=_create))
            descriptor = file.fileno()
            _require_alone(descriptor, temporary, what)
            removing.callback(temporary.unlink, missing_ok=True)
            os.ftruncate(descriptor, 0)
            with suppress(FileNotFoundError):
                os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
        yield descriptor
        with failures(path):
            os.fsync(descriptor)
            temporary.replace(path)
            removing.pop_all()
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            closing.callback(os.close, directory)
            os.fsync(directory)


def _create(path: str, _: int) -> int:
    """Descriptor of the hidden file: never of what a link leads to."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _require_alone(descriptor: int, path: Path, what: str) -> None:
    """OSError (EBUSY) where somebody else writes this file, or has just published it."""
    status = os.fstat(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(status, path.stat()) and stat.S_ISREG(status.st_mode)
    except (BlockingIOError, FileNotFoundError):
        alone = False
    if not alone:
        raise OSError(errno.EBUSY, f"{what} is being saved there")


def require_place(path: Path, what: str) -> bool:
    """Whether something is at the path. StorageError where no file can be."""
    with failures(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            status = None
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from error
        if not path.name or (status and stat.S_ISDIR(status.st_mode)):
            raise IsADirectoryError(errno.EISDIR, f"a directory; {what} is a file")
    return status is not None
