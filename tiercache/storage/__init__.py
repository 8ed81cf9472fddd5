"""Tables on disk and in memory, and the engines that read them."""

import os
from collections.abc import Sequence
from pathlib import Path

from tiercache.errors import ConfigError, FormatError
from tiercache.storage.safetensors import INDEX_SUFFIX, open_safetensors
from tiercache.storage.table import FileTable, open_file
from tiercache.storage.zarr import open_zarr


def open_table(
    name: str, path: str | os.PathLike[str], *, fields: Sequence[str] = (), resident: Sequence[str] = ()
) -> FileTable:
    """Open a .safetensors file, a .safetensors.index.json or a packed directory.

    `fields` and `resident` are as in the config. Raises StorageError for what cannot be read, FormatError for what is
    not a table, ConfigError for fields that it does not have.
    """
    path = Path(path)
    if path.is_dir():
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
