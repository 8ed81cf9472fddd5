"""Packed tables: zarr v3 groups that any zarr reader opens, laid out so that every row has a computable place.

FORMAT.md beside this file is the specification. This module knows the names, shapes and metadata of the format, and
opens tables; `pack` writes them.
"""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as Constraint

from tiercache.errors import FormatError, StorageError
from tiercache.records import Field, Record
from tiercache.storage.checksum import PAGE_BYTES
from tiercache.storage.table import Extent, FileTable, PageChecksums, TableFile, make_record, open_file, storage_error

FORMAT = 1
"""Version of the format. A reader refuses every other."""

_CHUNK_BYTES = 512 << 20
_MAX_METADATA = 16 << 20

_Count = Annotated[int, Constraint(ge=1, lt=1 << 62)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _FieldEntry(_Model):
    name: str
    dtype: str
    width: _Count


class Description(_Model):
    """The attribute "tiercache" of the group."""

    format: Literal[1]
    num_rows: _Count
    rows_per_chunk: _Count
    fields: tuple[_FieldEntry, ...]
    scale: Annotated[float, Constraint(allow_inf_nan=False)] | None
    page_bytes: Literal[4096]
    identity: Annotated[str, Constraint(pattern="^[0-9a-f]{64}$")]
    source: dict[str, str]

    def layout(self, path: Path) -> "Layout":
        """Where everything lies. FormatError that names the table where the fields make no record."""
        fields = tuple(Field(field.name, field.dtype, field.width) for field in self.fields)
        return Layout(make_record(path, fields, self.scale), self.num_rows, self.rows_per_chunk)


class Layout(NamedTuple):
    """Shape of a packed table."""

    record: Record
    num_rows: int
    rows_per_chunk: int

    @property
    def num_chunks(self) -> int:
        """Files of rows, and of checksums."""
        return -(-self.num_rows // self.rows_per_chunk)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of each file of rows."""
        return self.rows_per_chunk * self.record.record_bytes

    @property
    def pages_per_chunk(self) -> int:
        """Checksums in each file of checksums."""
        return -(-self.chunk_bytes // PAGE_BYTES)

    def rows_file(self, chunk: int) -> Path:
        """A file of rows, relative to the table."""
        return Path("rows", "c", str(chunk), "0")

    def checksums_file(self, chunk: int) -> Path:
        """A file of checksums, relative to the table."""
        return Path("checksums", "c", str(chunk), "0")


def plan_layout(record: Record, num_rows: int) -> Layout:
    """The fewest chunks of at most 512 MiB, filled evenly."""
    most = max(1, _CHUNK_BYTES // record.record_bytes)
    return Layout(record, num_rows, -(-num_rows // -(-num_rows // most)))


def describe_table(layout: Layout, identity: str, source: Mapping[str, str]) -> dict[str, str]:
    """Metadata files of a table, by path relative to it; the one that makes it a table comes last."""
    description = {
        "format": FORMAT,
        "num_rows": layout.num_rows,
        "rows_per_chunk": layout.rows_per_chunk,
        "fields": [field._asdict() for field in layout.record.fields],
        "scale": layout.record.scale,
        "page_bytes": PAGE_BYTES,
        "identity": identity,
        "source": dict(source),
    }
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"tiercache": description}}
    documents = {f"{name}/zarr.json": array for name, array in _arrays(layout).items()} | {"zarr.json": group}
    return {path: json.dumps(document, indent=2) + "\n" for path, document in documents.items()}


def _arrays(layout: Layout) -> dict[str, dict[str, Any]]:
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    width, pages = layout.record.record_bytes, layout.pages_per_chunk
    return {
        "rows": _array("uint8", (layout.num_rows, width), (layout.rows_per_chunk, width), {"name": "bytes"}),
        "checksums": _array("uint64", (layout.num_chunks, pages), (1, pages), little),
    }


def _array(dtype: str, shape: tuple[int, int], chunk: tuple[int, int], codec: dict[str, Any]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [codec],
        "fill_value": 0,
        "storage_transformers": [],
    }


def open_zarr(name: str, path: Path) -> FileTable:
    """A packed table. FormatError for any other directory and for a damaged table, StorageError if it is unreadable."""
    description = read_description(path)
    layout = description.layout(path)
    for array, expected in _arrays(layout).items():
        _require_array(path / array / "zarr.json", expected)
    chunks = range(layout.num_chunks)
    files = tuple(_chunk_file(path / layout.rows_file(chunk), layout.chunk_bytes) for chunk in chunks)
    sums = tuple(_chunk_file(path / layout.checksums_file(chunk), 8 * layout.pages_per_chunk) for chunk in chunks)
    return FileTable(
        name=name,
        num_rows=layout.num_rows,
        record=layout.record,
        files=files,
        extents=tuple(_extent(layout, chunk) for chunk in chunks),
        resident=(),
        checksums=PageChecksums(PAGE_BYTES, layout.pages_per_chunk, sums),
        identity=description.identity,
    )


def _extent(layout: Layout, chunk: int) -> Extent:
    first_row, width = chunk * layout.rows_per_chunk, layout.record.record_bytes
    num_rows = min(layout.rows_per_chunk, layout.num_rows - first_row)
    return Extent(chunk, 0, first_row, num_rows, width, width, 0)


def read_description(path: Path) -> Description:
    """What the group says of itself. FormatError unless it says all that this version knows."""
    document = _read_json(path / "zarr.json")
    attributes = document.get("attributes")
    if document.get("zarr_format") != 3 or document.get("node_type") != "group" or not isinstance(attributes, dict):
        raise FormatError(f"{path}: not a packed table: no zarr v3 group")
    described = attributes.get("tiercache")
    if not isinstance(described, dict):
        raise FormatError(f"{path}: a zarr group, but not a packed table")
    if described.get("format") != FORMAT:
        raise FormatError(f"{path}: packed table of format {described.get('format')!r}; this release reads {FORMAT}")
    try:
        return Description.model_validate_json(json.dumps(described))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise FormatError(f"{path}: damaged metadata: {where} = {problem['input']!r}: {problem['msg']}") from None


def _require_array(path: Path, expected: dict[str, Any]) -> None:
    found = _read_json(path)
    for key, value in expected.items():
        if found.get(key, value if key == "storage_transformers" else None) != value:
            raise FormatError(f"{path}: {key} is {found.get(key)!r}, not {value!r}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_METADATA:
            raise FormatError(f"{path}: too large for metadata")
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(f"{path}: missing; not a packed table, or a damaged one") from None
    except OSError as error:
        raise storage_error(error, path) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path}: JSON, but no object")
    return document


def _chunk_file(path: Path, num_bytes: int) -> TableFile:
    try:
        file = open_file(path)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        raise FormatError(f"{path}: missing from the table") from None
    if file.size != num_bytes:
        raise FormatError(f"{path}: {file.size} bytes instead of {num_bytes}")
    return file
