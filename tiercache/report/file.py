"""The file of a report: found to be writable before the work begins, there as a whole or as it was before."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tiercache.errors import ConfigError

MARK = b"<!doctype html>\n<!-- tiercache replay -->\n"
"""How every report begins, and nothing else that may be overwritten."""

Save = Callable[[str], None]


@contextmanager
def report_file(path: Path) -> Iterator[Save]:
    """Gives what saves a page: it replaces an older report in one step. Without a call the path stays as it is.

    ConfigError, at once, where the path cannot be written, or is there and is no report.
    """
    target = Path(os.path.realpath(path))
    _require_ours(path, target)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    except OSError as error:
        raise ConfigError(f"--report {str(path)!r}: cannot be written: {error.strerror}") from error

    def save(page: str) -> None:
        content = MARK + page.encode("utf-8", "backslashreplace")
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fchmod(descriptor, _mode_of(target))
        _require_ours(path, target)
        os.replace(name, target)

    try:
        yield save
    finally:
        os.close(descriptor)
        if os.path.exists(name):
            os.unlink(name)


def _require_ours(path: Path, target: Path) -> None:
    """ConfigError for what is there and is not to be replaced."""
    refused = f"--report {str(path)!r}"
    try:
        if not target.exists():
            return
        if not target.is_file():
            raise ConfigError(f"{refused}: is no file; allowed is a name for a new file, or an older report")
        with target.open("r+b") as file:
            begin = file.read(len(MARK))
    except OSError as error:
        raise ConfigError(f"{refused}: cannot be written: {error.strerror}") from error
    if begin != MARK:
        raise ConfigError(f"{refused}: is there and is no report; allowed is a name for a new file, or an older report")


def _mode_of(target: Path) -> int:
    """Permissions of the file that is there, else those that a new file has."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
