"""Tables on disk and in memory, and the engines that read them."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from tiercache.errors import ConfigError, FormatError, StorageError
from tiercache.storage.safetensors import INDEX_SUFFIX, open_safetensors
from tiercache.storage.table import FileTable, open_file, storage_error
from tiercache.storage.zarr import open_zarr


def open_table(
    name: str, path: str | os.PathLike[str], *, fields: Sequence[str] = (), resident: Sequence[str] = ()
) -> FileTable:
    """Open a .safetensors file, a .safetensors.index.json or a packed directory.

    `fields` and `resident` are as in the config. Raises StorageError for what cannot be read, FormatError for what is
    not a table, ConfigError for fields that it does not have.
    """
    path = require_path(path, f"the path of table {name!r}")
    if path.is_dir():
        if found := _loose_tables(path):
            raise FormatError(f"{path}: a directory, and not a packed table; a path names the file: {found}")
        for setting, value in (("fields", fields), ("resident", resident)):
            if value:
                raise ConfigError(
                    f"{setting} = {list(value)}: {path} is packed, its fields lie together; allowed is []"
                )
        return open_zarr(name, path)
    if path.name.endswith((".safetensors", INDEX_SUFFIX)):
        return open_safetensors(name, path, fields, resident)
    open_file(path)
    raise FormatError(f"{path}: neither .safetensors nor {INDEX_SUFFIX} nor a packed directory")


def require_path(path: str | os.PathLike[str], what: str) -> Path:
    """The path, if something is there. StorageError (ENOENT) that says what it is, if nothing is."""
    path = Path(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageError(errno.ENOENT, f"no such file or directory, {what}", str(path)) from error
    except OSError as error:
        raise storage_error(error, path) from error
    except ValueError as error:
        raise StorageError(errno.EINVAL, str(error), str(path)) from error
    return path


def _loose_tables(directory: Path) -> str:
    """The tables in a directory that is none itself: its indices, or else its .safetensors files; empty where it has none."""
    if (directory / "zarr.json").exists():
        return ""
    for suffix in (INDEX_SUFFIX, ".safetensors"):
        if found := sorted(str(path) for path in directory.glob(f"*{suffix}")):
            return ", ".join(found[:4]) + (f" or {len(found) - 4} more" if len(found) > 4 else "")
    return ""
