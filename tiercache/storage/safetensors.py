"""safetensors, read in place: the headers of one file or of a sharded checkpoint become the extents of a table.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), and
the tensors' bytes, row-major, without holes. Headers are parsed and checked here; nothing in a file is trusted.
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from tiercache.errors import ConfigError, FormatError
from tiercache.records import DTYPES, Field, Record
from tiercache.storage.table import Extent, FileTable, TableFile, make_record, open_file, open_readonly, read_exactly

INDEX_SUFFIX = ".safetensors.index.json"

_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 32
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {
    name: bits
    for bits, names in {
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "U16 I16 F16 BF16",
        32: "U32 I32 F32",
        64: "U64 I64 F64 C64",
    }.items()
    for name in names.split()
}
_SCALE_DTYPES = ("F32", "BF16", "F16")


class Tensor(NamedTuple):
    """One tensor of a file, as its header has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: TableFile
    offset: int  # byte in the file
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}{list(self.shape)}"


def open_safetensors(name: str, path: Path, fields: Sequence[str] = (), resident: Sequence[str] = ()) -> FileTable:
    """The table that `fields` of a file or an index make up.

    `fields` and `resident` are as in the config. FormatError for a damaged file, ConfigError for fields that it does
    not have, StorageError where it cannot be read. The table has a note where fp8 values seem to miss their scale.
    """
    located: Mapping[str, Tensor | Path]
    located = _read_index(path) if path.name.endswith(INDEX_SUFFIX) else read_header(path)
    if not fields:
        fields = [_only_table(path, list(_resolve(located, located).values())).name]
    if len(set(fields)) < len(fields):
        raise ConfigError(f"fields = {list(fields)}: a field occurs twice")
    if unknown := [field for field in resident if field not in fields]:
        raise ConfigError(f"resident = {unknown}: not among the fields {list(fields)}")
    parts = {field: _parts(path, located, field) for field in fields}
    scales = [field for field in fields if len(fields) > 1 and _is_scale(parts[field])]
    if len(scales) > 1:
        raise FormatError(f"{path}: {', '.join(scales)}: a table has one global scale")
    scale = _read_scale(parts.pop(scales[0])[0]) if scales else None
    if not set(parts) - set(resident):
        raise ConfigError(f"resident = {list(resident)}: at least one field has to stay on disk")
    table = _assemble(name, path, parts, scale, resident)
    return replace(table, notes=_unscaled(path, located, table.record, parts))


def read_header(path: Path) -> dict[str, Tensor]:
    """Every tensor of one file, by name. FormatError unless the header is sound and its tensors fill the file."""
    file = open_file(path)
    if file.size < 8:
        raise FormatError(f"{path}: {file.size} bytes cannot be a safetensors file")
    length = int.from_bytes(_read(file, 0, 8).tobytes(), "little")
    if not 2 <= length <= min(_MAX_HEADER, file.size - 8):
        raise FormatError(f"{path}: a header of {length} bytes in a file of {file.size}: not safetensors, or truncated")
    entries = _parse_json(path, _read(file, 8, length).tobytes())
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in entries.items()}
    _require_tiling(file, 8 + length, tensors.values())
    return tensors


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object whose keys are distinct."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a JSON header: {error}") from error
    if not isinstance(parsed, dict):
        raise FormatError(f"{path}: the header is JSON, but no object")
    return parsed


def _tensor(file: TableFile, data: int, name: str, entry: Any) -> Tensor:
    """One entry of a header; `data` is the byte where tensors begin."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise FormatError(f"{file.path}: tensor {name!r} has no dtype")
    dtype, shape, offsets = entry["dtype"], entry.get("shape"), entry.get("data_offsets")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise FormatError(f"{file.path}: tensor {name!r} needs a shape and two data_offsets, integers from 0 up")
    begin, end = offsets
    if not begin <= end <= file.size - data:
        raise FormatError(
            f"{file.path}: tensor {name!r} lies at {begin}:{end} of {file.size - data} data bytes; truncated or damaged"
        )
    bits = _BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise FormatError(f"{file.path}: tensor {name!r}, {dtype} of shape {shape}, does not have {end - begin} bytes")
    return Tensor(name, dtype, tuple(shape), file, data + begin, end - begin)


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    """A short list of integers from 0 up."""
    short = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS
    return short and all(type(number) is int and 0 <= number < 1 << 62 for number in value)


def _require_tiling(file: TableFile, data: int, tensors: Iterable[Tensor]) -> None:
    """Tensors neither overlap nor leave holes, and the last ends with the file."""
    place, before = data, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != place:
            problem = "overlaps" if tensor.offset < place else "leaves a hole after"
            raise FormatError(f"{file.path}: tensor {tensor.name!r} {problem} {before}")
        place, before = place + tensor.nbytes, repr(tensor.name)
    if place != file.size:
        raise FormatError(f"{file.path}: {file.size - place} bytes behind the last tensor belong to none")


def _read_index(path: Path) -> dict[str, Path]:
    """File of every tensor of a sharded checkpoint."""
    file = open_file(path)
    if file.size > _MAX_HEADER:
        raise FormatError(f"{path}: {file.size} bytes are too many for an index")
    weight_map = _parse_json(path, _read(file, 0, file.size).tobytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{path}: no weight_map from tensor names to file names")
    for shard in set(weight_map.values()):
        if not shard or not shard.isprintable() or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise FormatError(f"{path}: shard {shard!r} does not lie beside the index")
    return {name: path.parent / shard for name, shard in weight_map.items()}


def _resolve(located: Mapping[str, Tensor | Path], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors; opens those files of an index that hold them, and no other."""
    headers: dict[Path, dict[str, Tensor]] = {}
    found = {}
    for name in names:
        place = located[name]
        if isinstance(place, Path):
            if place not in headers:
                headers[place] = read_header(place)
            if name not in headers[place]:
                raise FormatError(f"{place}: the index says that tensor {name!r} is here, but it is not")
            place = headers[place][name]
        found[name] = place
    return found


def _only_table(path: Path, tensors: list[Tensor]) -> Tensor:
    tables = [tensor for tensor in tensors if len(tensor.shape) == 2]
    if len(tables) != 1:
        raise ConfigError(f"{path}: name the fields of a row; 2-D tensors here: {_listed(map(str, tables))}")
    return tables[0]


def _parts(path: Path, located: Mapping[str, Tensor | Path], field: str) -> list[Tensor]:
    """The tensors that hold a field, in row order."""
    if "{shard}" not in field:
        numbered = {0: field} if field in located else {}
    else:
        pattern = re.compile(r"(\d+)".join(map(re.escape, field.split("{shard}", 1))), re.ASCII)
        matches = [match for match in map(pattern.fullmatch, located) if match]
        numbered = {int(match[1]): match[0] for match in matches}
        if len(numbered) < len(matches):
            raise FormatError(f"{path}: {field}: two tensors have the same number")
    if not numbered:
        raise ConfigError(f"field = {field!r}: {path} does not have it; it has {_listed(map(repr, located))}")
    order = sorted(numbered)
    if gaps := [number for number, after in itertools.pairwise(order) if after != number + 1]:
        raise FormatError(f"{path}: {field}: number {gaps[0] + 1} is missing between {order[0]} and {order[-1]}")
    return list(_resolve(located, (numbered[number] for number in order)).values())


def _listed(names: Iterable[str], most: int = 40) -> str:
    names = sorted(names)
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_scale(parts: list[Tensor]) -> bool:
    return len(parts) == 1 and math.prod(parts[0].shape) == 1 and parts[0].dtype in _SCALE_DTYPES


def _read_scale(tensor: Tensor) -> float:
    raw = torch.from_numpy(_read(tensor.file, tensor.offset, tensor.nbytes))
    scale = raw.view(DTYPES[tensor.dtype]).float().item()
    if not math.isfinite(scale):
        raise FormatError(f"{tensor.file.path}: the global scale {tensor.name!r} is {scale}")
    return scale


def _unscaled(
    path: Path, located: Mapping[str, Tensor | Path], record: Record, parts: dict[str, list[Tensor]]
) -> tuple[str, ...]:
    """A note where fp8 values have no scale among the fields, though the file has tensors that are named like one."""
    (field, *others) = record.fields
    if others or field.dtype != "F8_E4M3" or record.scale is not None:
        return ()
    scales = [name for name in located if _is_named_like_a_scale(name, parts[field.name][0].name)]
    if not scales:
        return ()
    return (
        f"{path}: no scale among the fields, so that the F8_E4M3 values of {field.name!r} stay as they are; "
        f"named like their scale: {_listed(map(repr, scales))}",
    )


def _is_named_like_a_scale(name: str, weight: str) -> bool:
    """Whether a name is that of the weight with "scale" in one part or as one more: x.scale or x.weight.scale for x.weight."""
    parts, ours = name.split("."), weight.split(".")
    differing = [part for part, own in itertools.zip_longest(parts, ours) if part != own]
    return len(parts) >= len(ours) and len(differing) == 1 and "scale" in differing[0]


def _field(path: Path, name: str, parts: list[Tensor]) -> Field:
    """What a record holds of a field."""
    for part in parts:
        if part.dtype not in DTYPES:
            raise FormatError(
                f"{part.file.path}: tensor {part.name!r} is {part.dtype}; supported are {', '.join(DTYPES)}"
            )
        if len(part.shape) != 2:
            raise FormatError(f"{part.file.path}: tensor {part} is not [rows, width]")
    if len(kinds := {(part.dtype, part.shape[1]) for part in parts}) > 1:
        raise FormatError(f"{path}: {name}: pieces differ in dtype or width: {sorted(kinds)}")
    return Field(name, parts[0].dtype, parts[0].shape[1])


def _assemble(
    name: str, path: Path, parts: dict[str, list[Tensor]], scale: float | None, resident: Sequence[str]
) -> FileTable:
    record = make_record(path, tuple(_field(path, field, tensors) for field, tensors in parts.items()), scale)
    counts = {field: sum(tensor.shape[0] for tensor in tensors) for field, tensors in parts.items()}
    num_rows = next(iter(counts.values()))
    if num_rows == 0 or set(counts.values()) != {num_rows}:
        raise FormatError(f"{path}: fields need one number of rows, at least 1; here are {counts}")
    files = tuple(dict.fromkeys(tensor.file for field in parts if field not in resident for tensor in parts[field]))
    extents: list[Extent] = []
    held: list[tuple[int, npt.NDArray[np.uint8]]] = []
    for field, offset in zip(record.fields, record.offsets, strict=True):
        if field.name in resident:
            held.append((offset, _read_whole(parts[field.name], num_rows, field.nbytes)))
        else:
            extents += _extents(parts[field.name], files, field.nbytes, offset)
    others = tuple(dict.fromkeys(tensor.file for tensors in parts.values() for tensor in tensors if tensor.file not in files))
    identity = _identity(record, num_rows, parts)
    return FileTable(name, num_rows, record, files, tuple(extents), tuple(held), None, identity, others)


def _extents(parts: list[Tensor], files: Sequence[TableFile], nbytes: int, record_offset: int) -> list[Extent]:
    extents, first_row = [], 0
    for part in parts:
        if rows := part.shape[0]:
            file = files.index(part.file)
            extents.append(Extent(file, part.offset, first_row, rows, nbytes, nbytes, record_offset))
        first_row += part.shape[0]
    return extents


def _read(file: TableFile, offset: int, nbytes: int, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
    out = np.empty(nbytes, np.uint8) if out is None else out
    descriptor = open_readonly(file)
    try:
        read_exactly(descriptor, file.path, out, offset)
    finally:
        os.close(descriptor)
    return out


def _read_whole(parts: list[Tensor], num_rows: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """A field in RAM: uint8[num_rows, nbytes]."""
    whole = np.empty((num_rows, nbytes), np.uint8)
    first_row = 0
    for part in parts:
        if part.nbytes:
            _read(part.file, part.offset, part.nbytes, whole[first_row : first_row + part.shape[0]])
        first_row += part.shape[0]
    return whole


def _identity(record: Record, num_rows: int, parts: dict[str, list[Tensor]]) -> str:
    """Digest of the layout and of samples of the bytes: the same for a copy, however it is named or cut into files."""
    layout = [num_rows, record.scale, [(field.dtype, field.width) for field in record.fields]]
    digest = hashlib.sha256(json.dumps(layout).encode())
    for field, tensors in zip(record.fields, parts.values(), strict=True):
        total = num_rows * field.nbytes
        starts = {max(0, total - _SAMPLE_BYTES) * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}
        for start in sorted(starts):
            digest.update(_sample(tensors, start, min(_SAMPLE_BYTES, total)))
    return digest.hexdigest()


def _sample(parts: list[Tensor], start: int, nbytes: int) -> bytes:
    """A piece of a field's bytes, wherever they lie."""
    pieces, first = [], 0
    for part in parts:
        begin, end = max(start, first), min(start + nbytes, first + part.nbytes)
        if begin < end:
            pieces.append(_read(part.file, part.offset + begin - first, end - begin).tobytes())
        first += part.nbytes
    return b"".join(pieces)
