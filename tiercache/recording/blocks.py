"""The file of a recording: blocks, each whole in itself. `FORMAT.md` specifies them.

    head   what the tables are; begins the file, and each further part of it that a later process appended
    data   batches, in the order in which they were planned
    end    the recording was closed; without one, its process was killed
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tiercache.errors import FormatError
from tiercache.native import lean, memcpy
from tiercache.recording.codec import NUMBER_BYTES, Packed, Packer, num_words, pack_rows, put_all, unpack, unpack_numbers
from tiercache.storage.checksum import xxh64
from tiercache.tap import MOST_BATCHES

MAGIC = b"TCrecord"
HEAD, DATA, END = 1, 2, 3

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("kind", "<u4"),
        ("width", "<u4"),
        ("payload_bytes", "<u4"),
        ("num_batches", "<u4"),
        ("num_rows", "<u4"),
        ("num_fresh", "<u4"),
        ("lists_bytes", "<u4"),
        ("unused", "<u4"),
        ("dropped_batches", "<u8"),
        ("dropped_rows", "<u8"),
        ("payload_sum", "<i8"),
        ("header_sum", "<i8"),
    ]
)
"""Of each block; 72 bytes."""

_HEADER_WORDS = HEADER.itemsize // 8
_MAGIC_WORD = int.from_bytes(MAGIC, "little")

MOST_ROWS = 1 << 23
"""Rows and batches of a block."""

_MOST_BYTES = 1 << 27
_WIDEST = 62


class RecordedTable(NamedTuple):
    """A table as a recording knows it. identity: of the data; empty for a source."""

    name: str
    num_rows: int
    record_bytes: int
    identity: str


def bases_of(tables: list[RecordedTable]) -> npt.NDArray[np.int64]:
    """int64[t], the row of the store that each table begins with."""
    sizes = np.array([table.num_rows for table in tables], np.int64)
    return np.cumsum(sizes) - sizes


class Block(NamedTuple):
    """Batches. Batch i is of table tables[i] and has the next sizes[i] of `rows`, which count from that table's first.

    dropped: (batches, rows) that were asked for before this block's and after the last block's, and are not recorded.
    """

    tables: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    rows: npt.NDArray[Any]
    dropped: tuple[int, int]


class Damaged(ValueError):
    """A block that is not as it was written."""


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    tables: list[
        tuple[str, Annotated[int, Field(ge=1, le=1 << 48)], Annotated[int, Field(ge=1, le=1 << 24)], str]
    ] = Field(min_length=1)

    @field_validator("tables")
    @classmethod
    def _distinct(cls, tables: list[tuple[str, int, int, str]]) -> list[tuple[str, int, int, str]]:
        if len({table[0] for table in tables}) < len(tables) or sum(table[1] for table in tables) > 1 << 48:
            raise ValueError("allowed are tables of distinct names, with 2**48 rows in all")
        return tables


def head_block(tables: list[RecordedTable]) -> bytes:
    """The block that says of which tables a recording is."""
    payload = json.dumps({"format": 1, "tables": tables}).encode()
    return _header(HEAD, len(payload), _sum(payload), (0, 0)) + payload


def end_block(dropped: tuple[int, int]) -> bytes:
    """The block that ends a recording."""
    return _header(END, 0, _sum(b""), dropped)


class Encoder:
    """The memory that blocks of batches are made in. `room`: rows that it is enough for.

    lists      int64[2 MOST_BATCHES], for the table and the size of each batch
    places     int32[p], `sequences` uint8[s]: a packer's
    words      int64[w], the bytes of a block; `data` uint8[8 w], the same memory
    """

    def __init__(self) -> None:
        self.lists = np.empty(2 * MOST_BATCHES, np.int64)
        self._packer = Packer()
        self.make_room(0)

    @property
    def places(self) -> npt.NDArray[np.int32]:
        return self._packer.places

    @property
    def sequences(self) -> npt.NDArray[np.uint8]:
        return self._packer.sequences

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        return self.words.view(np.uint8)

    def make_room(self, num_rows: int) -> None:
        """Be ready for a block of this many rows, and any number of batches."""
        self._packer.make_room(num_rows)
        most = 8 * num_rows + NUMBER_BYTES * self.lists.size + self.sequences.size
        self.words = np.empty((HEADER.itemsize + most) // 8 + 1, np.int64)
        self.room = num_rows

    def encode(self, block: Block) -> npt.NDArray[np.uint8]:
        """The bytes, good until the next call. At most MOST_BATCHES batches."""
        if block.rows.size > self.room:
            self.make_room(block.rows.size)
        lists = self.lists[: 2 * block.sizes.size]
        lists[0::2], lists[1::2] = block.tables, block.sizes
        num_bytes = encode(block.rows, lists, *block.dropped, self.places, self.sequences, self.words, self.data)
        return self.data[:num_bytes]


@lean
def encode(
    rows: Any, lists: Any, dropped_batches: int, dropped_rows: int, places: Any, sequences: Any, words: Any, data: Any
) -> int:
    """Write a block to `data`, whose memory is that of `words`; its bytes. lists: of each batch, its table and its rows."""
    sequences_bytes, num_fresh, width = pack_rows(rows, places, words[_HEADER_WORDS:], sequences)
    lists_at = 8 * (_HEADER_WORDS + num_words(num_fresh, width))
    end = lists_at + put_all(lists, data[lists_at:])
    lists_bytes = end - lists_at
    memcpy(data.ctypes.data + end, sequences.ctypes.data, sequences_bytes)
    end += sequences_bytes
    payload = end - 8 * _HEADER_WORDS
    counts = (width, lists.size // 2, rows.size, num_fresh, lists_bytes)
    payload_sum = xxh64(data.ctypes.data + 8 * _HEADER_WORDS, payload)
    _put_header(words, DATA, payload, payload_sum, dropped_batches, dropped_rows, counts)
    return end


@lean
def _put_header(
    words: Any, kind: int, payload: int, payload_sum: int, dropped_batches: int, dropped_rows: int, counts: Any
) -> None:
    """Write HEADER. payload: bytes. counts: width, batches, rows, fresh rows, bytes of the lists."""
    width, num_batches, num_rows, num_fresh, lists_bytes = counts
    words[0] = _MAGIC_WORD
    words[1] = kind | width << 32
    words[2] = payload | num_batches << 32
    words[3] = num_rows | num_fresh << 32
    words[4] = lists_bytes
    words[5], words[6] = dropped_batches, dropped_rows
    words[7], words[8] = payload_sum, 0
    words[8] = xxh64(words.ctypes.data, 8 * _HEADER_WORDS)


def _header(kind: int, payload: int, payload_sum: int, dropped: tuple[int, int]) -> bytes:
    """The header of a block without batches."""
    words = np.zeros(_HEADER_WORDS, np.int64)
    _put_header(words, kind, payload, payload_sum, *dropped, (0, 0, 0, 0, 0))
    return words.tobytes()


def _sum(data: bytes) -> int:
    array = np.frombuffer(data, np.uint8)
    return int(xxh64(array.ctypes.data, array.size))


def read_header(file: BinaryIO) -> Any:
    """The next block's header; None at the end of the file. Damaged where it is none."""
    data = file.read(HEADER.itemsize)
    if not data:
        return None
    if len(data) < HEADER.itemsize:
        raise Damaged("the file ends within a block's header")
    header = np.frombuffer(data, HEADER).copy()
    found = int(header["header_sum"][0])
    header["header_sum"] = 0
    if header["magic"][0] != MAGIC or found != _sum(header.tobytes()):
        raise Damaged("what should be a block's header is none")
    header = header[0]
    if (
        header["kind"] not in (HEAD, DATA, END)
        or header["payload_bytes"] > _MOST_BYTES
        or max(header["num_rows"], header["num_batches"]) > MOST_ROWS
        or header["width"] > _WIDEST
    ):
        raise Damaged("a block's header says what no writer of this format does")
    return header


def read_payload(file: BinaryIO, header: Any) -> bytes:
    """The bytes behind a header. Damaged where they are not what was written."""
    payload = file.read(int(header["payload_bytes"]))
    if len(payload) < header["payload_bytes"]:
        raise Damaged("the file ends within a block")
    if _sum(payload) != header["payload_sum"]:
        raise Damaged("a block's checksum is wrong")
    return payload


def tables_of(payload: bytes) -> list[RecordedTable]:
    """What a head block says. Damaged where it is none that this version reads."""
    try:
        head = _Head.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"its head is not one that this version reads: {where}: {first['msg']}") from None
    return [RecordedTable(*table) for table in head.tables]


def batches_of(header: Any, payload: bytes, tables: list[RecordedTable]) -> Block:
    """What a data block holds. Damaged where it does not add up."""
    num_fresh, num_batches, num_rows = (int(header[name]) for name in ("num_fresh", "num_batches", "num_rows"))
    lists_at = -(-num_fresh * int(header["width"]) // 64) * 8
    sequences_at = lists_at + int(header["lists_bytes"])
    if num_fresh > num_rows or sequences_at > len(payload):
        raise Damaged("a block is shorter than its header says")
    data = np.frombuffer(payload, np.uint8)
    bits = np.frombuffer(payload, np.int64, lists_at // 8)
    try:
        lists = unpack_numbers(data[lists_at:sequences_at], 2 * num_batches).reshape(-1, 2)
        which, sizes = np.ascontiguousarray(lists.T)
        rows = unpack(Packed(bits, data[sequences_at:], int(header["width"]), num_fresh), num_rows)
    except ValueError as error:
        raise Damaged(f"a block's batches cannot be read: {error}") from error
    if sizes.sum() != num_rows or (which >= len(tables)).any():
        raise Damaged("a block's batches do not add up")
    limits = np.repeat(np.array([table.num_rows for table in tables])[which], sizes)
    if (rows >= limits).any():
        raise Damaged("a block has rows that its table has not")
    return Block(which, sizes, rows, (int(header["dropped_batches"]), int(header["dropped_rows"])))


def whole_bytes(path: Path, file: BinaryIO, tables: list[RecordedTable]) -> int:
    """Bytes of the whole blocks of a recording of these tables, behind which another may be appended.

    A block whose end is missing is left out: its writer was killed. FormatError for anything else that is no whole recording,
    or is one of other tables. Reads all of it: nothing behind a damaged block can be read.
    """
    size = file.seek(0, 2)
    file.seek(0)
    end = 0
    try:
        while size - end >= HEADER.itemsize:
            file.seek(end)
            header = read_header(file)
            stop = end + HEADER.itemsize + int(header["payload_bytes"])
            if stop > size:
                break
            payload = read_payload(file, header)
            if header["kind"] == HEAD:
                recorded = tables_of(payload)
                require_same(path, recorded, tables)
                if recorded != tables:
                    raise FormatError(f"{path}: recorded of {_named(recorded)}; here are {_named(tables)}, which cannot follow")
            end = stop
    except Damaged as error:
        raise FormatError(f"{path}: nothing can be appended to it: from byte {end}: {error}") from error
    if end == 0:
        raise FormatError(f"{path}: is no recording of a store, and is not overwritten")
    return end


def require_same(path: Path, recorded: list[RecordedTable], tables: list[RecordedTable]) -> None:
    """FormatError unless each recorded table is among these. The identity counts where both have one."""
    by_name = {table.name: table for table in tables}
    for table in recorded:
        other = by_name.get(table.name)
        if other is None:
            raise FormatError(f"{path}: recorded of table {table.name!r}; here are {', '.join(map(repr, by_name))}")
        for what, mine, theirs in zip(("rows", "bytes a record"), table[1:3], other[1:3], strict=True):
            if mine != theirs:
                raise FormatError(f"{path}: recorded of another table {table.name!r}: {mine} {what}; here it has {theirs}")
        if table.identity and other.identity and table.identity != other.identity:
            raise FormatError(
                f"{path}: recorded of another table {table.name!r}: identity {table.identity}; here it is {other.identity}"
            )


def _named(tables: list[RecordedTable]) -> str:
    """Tables in words, with the identities that make them the same."""
    return ", ".join(f"{table.name!r} ({table.identity or 'without identity'})" for table in tables)


def blocks(file: BinaryIO) -> Iterator[tuple[int, Any, bytes]]:
    """(offset, header, payload) of each block. Damaged at the first that is not whole."""
    while True:
        offset = file.tell()
        header = read_header(file)
        if header is None:
            return
        yield offset, header, read_payload(file, header)
