"""From rows to reads: where the bytes of missing rows lie, and which requests bring them. Plans; reads nothing.

Pieces are sorted by address and neighbours share one request: all that touch, and those with at most one page between,
up to what a bounce buffer holds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import jit, memcpy
from tiercache.storage.checksum import PAGE_BYTES
from tiercache.storage.queue import (
    AT,
    FD,
    FIRST_PIECE,
    FLAG,
    IDENTITY,
    LENGTH,
    NEEDED,
    NUM_BYTES,
    NUM_PIECES,
    OFFSET,
    PIECE_COLUMNS,
    READ_COLUMNS,
    SKIP,
    SUMS,
    TAKEN,
    TARGET,
)
from tiercache.storage.table import FileTable

FILE_BITS = 44
"""An AT is `file << FILE_BITS | offset`: files of 16 TiB, and half a million of them."""

BOUNCE_BYTES = 32 << 10
"""Longest request, unless one row needs more."""

_GAP = 4096
_E_FIRST, _E_ROWS, _E_AT, _E_STRIDE, _E_BYTES, _E_RECORD = range(6)


class Layout(NamedTuple):
    """A FileTable as arrays.

    extents   int64[k, 6], field by field, by first row: first row, rows, AT, stride, bytes, byte of the record
    fields    int64[f + 1], where each field's extents begin
    resident  int64[r, 3]: address of a field held in RAM, bytes a row, byte of the record
    """

    extents: npt.NDArray[np.int64]
    fields: npt.NDArray[np.int64]
    resident: npt.NDArray[np.int64]


class Files(NamedTuple):
    """What a request needs of the files, by number.

    descriptors  int64[n]
    sizes        int64[n], bytes
    sums         int64[n], address of each file's page checksums, or 0
    identities   int64[n], address of what each file must be, or 0
    """

    descriptors: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    sums: npt.NDArray[np.int64]
    identities: npt.NDArray[np.int64]


class Targets(NamedTuple):
    """Where records go: a place >= 0 is a slot, ~i is staging row i. Addresses and strides in bytes.

    `group` slots that follow one another share a flag.
    """

    slots: int
    slot_stride: int
    staging: int
    staging_stride: int
    flags: int
    flag_stride: int
    group: int = 1


def new_layout(table: FileTable, first_file: int) -> Layout:
    """The layout of a table whose files have numbers from `first_file` up."""
    ordered = sorted(table.extents, key=lambda extent: (extent.record_offset, extent.first_row))
    extents = np.array(
        [
            (e.first_row, e.num_rows, (e.file + first_file) << FILE_BITS | e.offset, e.stride, e.nbytes, e.record_offset)
            for e in ordered
        ],
        np.int64,
    ).reshape(-1, 6)
    _, starts = np.unique(extents[:, _E_RECORD], return_index=True)
    resident = [(array.ctypes.data, array.shape[1], offset) for offset, array in table.resident]
    return Layout(
        extents,
        np.append(starts, len(extents)).astype(np.int64),
        np.array(resident, np.int64).reshape(-1, 3),
    )


def longest_piece(tables: Sequence[FileTable]) -> int:
    """The most bytes that one piece of these tables has."""
    return max((extent.nbytes for table in tables for extent in table.extents), default=1)


def bounce_bytes(longest: int, alignment: int) -> int:
    """Bytes of a bounce buffer that holds any one piece with its alignment."""
    around = longest + 2 * max(alignment, PAGE_BYTES)
    return max(BOUNCE_BYTES, around + -around % 4096)


def plan_reads(
    layout: Layout, files: Files, rows: npt.NDArray[np.int64], places: npt.NDArray[np.int32], targets: Targets,
    alignment: int, slot_bytes: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Requests for rows (int64[n], of the table) to their distinct places (int32[n]): the reads and pieces of a job.

    Copies the fields held in RAM. A flag must count `layout.fields.size - 1` pieces of each of its slots already.
    """
    num_fields = len(layout.fields) - 1
    located = np.empty((rows.size * num_fields, PIECE_COLUMNS), np.int64)
    at = np.empty(rows.size * num_fields, np.int64)
    _locate(layout, rows, places, targets, located, at)
    pieces = np.empty_like(located)
    reads = np.zeros((at.size, READ_COLUMNS), np.int64)
    num_reads = _merge(at, located, files, alignment, slot_bytes, pieces, reads)
    return reads[:num_reads], pieces


@jit
def count_reads(layout: Any, files: Any, rows: Any, alignment: int, slot_bytes: int) -> tuple[int, int]:
    """(requests, their bytes) that `plan_reads` would make of rows (int64[n], of the table). Copies nothing."""
    num_fields = layout.fields.size - 1
    located = np.empty((rows.size * num_fields, PIECE_COLUMNS), np.int64)
    at = np.empty(rows.size * num_fields, np.int64)
    bare = Layout(layout.extents, layout.fields, layout.resident[:0])
    _locate(bare, rows, np.zeros(rows.size, np.int32), Targets(0, 0, 0, 0, 0, 0, 1), located, at)
    reads = np.zeros((at.size, READ_COLUMNS), np.int64)
    num_reads = _merge(at, located, files, alignment, slot_bytes, np.empty_like(located), reads)
    return num_reads, reads[:num_reads, LENGTH].sum()


@jit
def addresses(layout: Any, rows: Any, out: Any) -> None:
    """AT of the first field of each row: int64[n] to int64[n]."""
    for i in range(rows.size):
        extent = layout.extents[_extent_of(layout, 0, rows[i])]
        out[i] = extent[_E_AT] + (rows[i] - extent[_E_FIRST]) * extent[_E_STRIDE]


@jit
def _extent_of(layout: Any, field: int, row: int) -> int:
    low, high = layout.fields[field], layout.fields[field + 1]
    while high - low > 1:
        middle = (low + high) // 2
        if layout.extents[middle, _E_FIRST] <= row:
            low = middle
        else:
            high = middle
    return low


@jit
def _locate(layout: Any, rows: Any, places: Any, targets: Any, located: Any, at: Any) -> None:
    num_fields = layout.fields.size - 1
    n = 0
    for i in range(rows.size):
        row, place = rows[i], np.int64(places[i])
        if place >= 0:
            target = targets.slots + place * targets.slot_stride
            flag = targets.flags + place // targets.group * targets.flag_stride
        else:
            target, flag = targets.staging + ~place * targets.staging_stride, np.int64(0)
        for r in range(layout.resident.shape[0]):
            source, num_bytes, offset = layout.resident[r, 0], layout.resident[r, 1], layout.resident[r, 2]
            memcpy(target + offset, source + row * num_bytes, num_bytes)
        for field in range(num_fields):
            extent = layout.extents[_extent_of(layout, field, row)]
            at[n] = extent[_E_AT] + (row - extent[_E_FIRST]) * extent[_E_STRIDE]
            located[n, NUM_BYTES] = extent[_E_BYTES]
            located[n, TARGET] = target + extent[_E_RECORD]
            located[n, FLAG] = flag
            n += 1


@jit
def _merge(at: Any, located: Any, files: Any, alignment: int, slot_bytes: int, pieces: Any, reads: Any) -> int:
    order = np.argsort(at)
    num_reads = -1
    begin = end = np.int64(-1)
    for p in range(order.size):
        source = order[p]
        start = at[source] - at[source] % alignment
        last = at[source] + located[source, NUM_BYTES]
        stop = last + -last % alignment
        if num_reads < 0 or start > end + _GAP or stop - begin > slot_bytes or start >> FILE_BITS != begin >> FILE_BITS:
            num_reads += 1
            begin = start
            end = stop
            read = reads[num_reads]
            read[AT], read[FIRST_PIECE], read[TAKEN] = begin, p, 0
        read = reads[num_reads]
        end = max(end, stop)
        read[LENGTH] = end - begin
        read[NEEDED] = max(read[NEEDED], last - begin)
        read[NUM_PIECES] = p + 1 - read[FIRST_PIECE]
        pieces[p, SKIP] = at[source] - begin
        pieces[p, NUM_BYTES], pieces[p, TARGET], pieces[p, FLAG] = (
            located[source, NUM_BYTES],
            located[source, TARGET],
            located[source, FLAG],
        )
    num_reads += 1
    for r in range(num_reads):
        read = reads[r]
        file = read[AT] >> FILE_BITS
        read[FD], read[IDENTITY] = files.descriptors[file], files.identities[file]
        read[OFFSET] = read[AT] & ((1 << FILE_BITS) - 1)
        if files.sums[file] != 0:
            read[SUMS] = files.sums[file] + 8 * (read[OFFSET] // PAGE_BYTES)
            read[NEEDED] = min(read[LENGTH], files.sizes[file] - read[OFFSET])
    return num_reads
