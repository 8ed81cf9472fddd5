"""Row numbers as few bytes, and back: repeats of what came shortly before, and the rest as bits.

Text repeats itself, and the rows of an n-gram repeat together: a run of rows that came before in the same block is named by
its distance and length. The other rows are hashes, which nothing compresses; they take as many bits as the largest of them.

A sequence is three LEB128 numbers: how many fresh rows come, how many rows are then repeated (0 at the end, where no distance
follows), and from how far back.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache import index
from tiercache.native import int64, lean

_SHORTEST = 2
"""Rows of a repeat: one alone would take more bytes than its bits."""

_STRIDE = 4
"""The rows of an n-gram are 4 or more that repeat together."""

_NUMBER_BYTES = 5
"""Of the longest number here, below 2**32."""


class Packed(NamedTuple):
    """Rows, packed.

    bits       int64[w], the fresh rows, `width` bits each, from the low end of each word
    sequences  uint8[s]
    """

    bits: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.uint8]
    width: int
    num_fresh: int


class Packer:
    """Packs rows; keeps the memory that this takes for the next ones."""

    def __init__(self) -> None:
        self._last = np.empty(0, np.int32)
        self._fresh = np.empty(0, np.int64)
        self._sequences = np.empty(0, np.uint8)

    def pack(self, rows: npt.NDArray[np.int64]) -> Packed:
        """Pack int64[n], not negative, n < 2**31. The sequences are good until the next call."""
        if self._fresh.size < rows.size:
            self._last = np.empty(1 << rows.size.bit_length(), np.int32)
            self._fresh = np.empty(rows.size, np.int64)
        longest = (rows.size // _SHORTEST + 1) * 3 * _NUMBER_BYTES
        if self._sequences.size < longest:
            self._sequences = np.empty(longest, np.uint8)
        num_bytes, num_fresh, largest = _find(rows, self._last, self._fresh, self._sequences)
        width = int(largest).bit_length()
        bits = np.zeros(-(-num_fresh * width // 64), np.int64)
        _pack_bits(self._fresh[:num_fresh], width, bits)
        return Packed(bits, self._sequences[:num_bytes], width, int(num_fresh))


def unpack(packed: Packed, num_rows: int) -> npt.NDArray[np.int64]:
    """The rows, int64[num_rows]. ValueError where that is not what was packed; whatever it is, nothing else is touched."""
    fresh = np.empty(packed.num_fresh, np.int64)
    _unpack_bits(packed.bits, packed.width, fresh)
    rows = np.empty(num_rows, np.int64)
    if not _expand(fresh, packed.sequences, rows):
        raise ValueError("the rows do not add up")
    return rows


def pack_numbers(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Numbers below 2**32, int64[n], as LEB128."""
    out = np.empty(numbers.size * _NUMBER_BYTES, np.uint8)
    return out[: _put_all(numbers, out)]


def unpack_numbers(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int64]:
    """The numbers, int64[count]. ValueError where that is not what was packed."""
    numbers = np.empty(count, np.int64)
    if not _get_all(packed, numbers):
        raise ValueError("the numbers do not add up")
    return numbers


@lean
def _put(out: Any, at: int, number: int) -> int:
    """Write a number; where the next one goes."""
    while number > 127:
        out[at] = (number & 127) | 128
        number >>= 7
        at += 1
    out[at] = number
    return at + 1


@lean
def _get(packed: Any, at: int) -> tuple[int, int]:
    """A number, and where the next one is: -1 where this one does not end in time."""
    number = shift = 0
    while at < packed.size and shift < 7 * _NUMBER_BYTES:
        byte = int64(packed[at])
        number |= (byte & 127) << shift
        shift += 7
        at += 1
        if byte < 128:
            return number, at
    return number, -1


@lean
def _put_all(numbers: Any, out: Any) -> int:
    at = 0
    for i in range(numbers.size):
        at = _put(out, at, numbers[i])
    return at


@lean
def _get_all(packed: Any, numbers: Any) -> bool:
    at = 0
    for i in range(numbers.size):
        numbers[i], at = _get(packed, at)
        if at < 0:
            return False
    return bool(at == packed.size)


@lean
def _find(rows: Any, last: Any, fresh: Any, sequences: Any) -> tuple[int, int, int]:
    """(bytes of sequences, fresh rows, largest of these). last: room for 2**k positions, one for each hash of a row.

    Where nothing repeats, one row in _STRIDE is looked for, and now and then _STRIDE in a row, which finds long repeats that
    are out of step. A repeat that one of its rows finds is followed both ways.
    """
    for i in range(last.size):
        last[i] = -1
    mask = last.size - 1
    at = num_fresh = largest = i = missed = 0
    begin = 0  # of the fresh rows that no sequence has yet
    while i < rows.size:
        row = rows[i]
        home = index.tag_of(row) & mask
        before = int64(last[home])
        last[home] = i
        length = back = 0
        if before >= 0 and rows[before] == row:
            while i + length < rows.size and rows[before + length] == rows[i + length]:
                length += 1
            while back < before and i - back > begin and rows[before - back - 1] == rows[i - back - 1]:
                back += 1
        if length + back < _SHORTEST:
            i += 1 if missed < 16 or missed & 15 < _STRIDE else _STRIDE
            missed += 1
            continue
        missed = 0
        for k in range(begin, i - back):
            fresh[num_fresh] = rows[k]
            largest = max(largest, rows[k])
            num_fresh += 1
        at = _put(sequences, _put(sequences, _put(sequences, at, i - back - begin), back + length), i - before)
        for k in range(i + _STRIDE, i + length, _STRIDE):
            last[index.tag_of(rows[k]) & mask] = k
        i += length
        begin = i
    if begin < rows.size:
        at = _put(sequences, _put(sequences, at, rows.size - begin), 0)
        for k in range(begin, rows.size):
            fresh[num_fresh] = rows[k]
            largest = max(largest, rows[k])
            num_fresh += 1
    return at, num_fresh, largest


@lean
def _expand(fresh: Any, sequences: Any, rows: Any) -> bool:
    """Write the rows; False where the sequences are of others."""
    at = taken = i = 0
    while at < sequences.size:
        count, at = _get(sequences, at)
        if at < 0 or count > fresh.size - taken or count > rows.size - i:
            return False
        for k in range(count):
            rows[i + k] = fresh[taken + k]
        taken += count
        i += count
        length, at = _get(sequences, at)
        if at < 0 or length == 0:
            break
        distance, at = _get(sequences, at)
        if at < 0 or distance < 1 or distance > i or length > rows.size - i:
            return False
        for k in range(length):
            rows[i + k] = rows[i + k - distance]
        i += length
    return bool(at == sequences.size and taken == fresh.size and i == rows.size)


@lean
def _pack_bits(fresh: Any, width: int, bits: Any) -> None:
    bit = 0
    for i in range(fresh.size):
        if width == 0:
            return
        word, shift = bit >> 6, bit & 63
        bits[word] |= fresh[i] << shift
        if shift + width > 64:
            bits[word + 1] |= fresh[i] >> (64 - shift)
        bit += width


@lean
def _unpack_bits(bits: Any, width: int, fresh: Any) -> None:
    """bits: as many words as this takes."""
    mask = (np.int64(1) << width) - 1
    bit = 0
    for i in range(fresh.size):
        if width == 0:
            fresh[i] = 0
            continue
        word, shift = bit >> 6, bit & 63
        row = bits[word] >> shift
        if shift + width > 64:
            row &= (np.int64(1) << (64 - shift)) - 1
            row |= bits[word + 1] << (64 - shift)
        fresh[i] = row & mask
        bit += width
