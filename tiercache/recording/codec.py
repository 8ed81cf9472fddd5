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

_STRIDE = 8
"""Rows that mostly repeat together: those of an n-gram's heads."""

_PATIENCE, _PERIOD = 16, 128
"""Rows looked for in vain before only one in _STRIDE is; how often _STRIDE in a row are looked for then."""

_MOST_PLACES = 1 << 16
"""Places of rows that are remembered: 256 KiB, which stay in a core's cache."""

NUMBER_BYTES = 5
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
        self.places = np.empty(0, np.int32)
        self.sequences = np.empty(0, np.uint8)
        self._bits = np.empty(0, np.int64)

    def make_room(self, num_rows: int) -> None:
        """Be ready for this many rows."""
        places = min(1 << num_rows.bit_length(), _MOST_PLACES)
        if self.places.size < places:
            self.places = np.empty(places, np.int32)
        longest = (num_rows // _SHORTEST + 1) * 3 * NUMBER_BYTES
        if self.sequences.size < longest:
            self.sequences = np.empty(longest, np.uint8)

    def pack(self, rows: npt.NDArray[Any]) -> Packed:
        """Pack int32[n] or int64[n], not negative, below 2**62, n < 2**31. What comes back is good until the next call."""
        self.make_room(rows.size)
        if self._bits.size < rows.size:
            self._bits = np.empty(rows.size, np.int64)
        num_bytes, num_fresh, width = pack_rows(rows, self.places, self._bits, self.sequences)
        return Packed(self._bits[: num_words(num_fresh, width)], self.sequences[:num_bytes], width, num_fresh)


def unpack(packed: Packed, num_rows: int) -> npt.NDArray[np.int64]:
    """The rows, int64[num_rows]. ValueError where that is not what was packed; whatever it is, nothing else is touched."""
    fresh = np.empty(packed.num_fresh, np.int64)
    _unpack_bits(packed.bits, packed.width, fresh)
    rows = np.empty(num_rows, np.int64)
    if not _expand(fresh, packed.sequences, rows):
        raise ValueError("the rows do not add up")
    return rows


def unpack_numbers(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int64]:
    """The numbers, int64[count]. ValueError where that is not what was packed."""
    numbers = np.empty(count, np.int64)
    if not _get_all(packed, numbers):
        raise ValueError("the numbers do not add up")
    return numbers


@lean
def put(out: Any, at: int, number: int) -> int:
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
    while at < packed.size and shift < 7 * NUMBER_BYTES:
        byte = int64(packed[at])
        number |= (byte & 127) << shift
        shift += 7
        at += 1
        if byte < 128:
            return number, at
    return number, -1


@lean
def put_all(numbers: Any, out: Any) -> int:
    """Write numbers below 2**32; the bytes they take, NUMBER_BYTES each at most."""
    at = 0
    for i in range(numbers.size):
        at = put(out, at, numbers[i])
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
def num_words(num_fresh: int, width: int) -> int:
    """64-bit words that fresh rows take."""
    return (num_fresh * width + 63) >> 6


@lean
def pack_rows(rows: Any, places: Any, bits: Any, sequences: Any) -> tuple[int, int, int]:
    """(bytes of sequences, fresh rows, their width). places: room for 2**k positions, one for each hash of a row.

    Where nothing repeats, one row in _STRIDE is looked for, and now and then _STRIDE in a row, which finds long repeats that
    are out of step. A repeat that one of its rows finds is followed both ways.
    """
    width = _width(rows)
    for i in range(places.size):
        places[i] = -1
    mask = places.size - 1
    at = num_fresh = i = missed = 0
    begin = 0  # of the fresh rows that no sequence has yet
    while i < rows.size:
        row = rows[i]
        home = index.tag_of(int64(row)) & mask
        before = int64(places[home])
        places[home] = i
        length = back = 0
        if before >= 0 and rows[before] == row:
            while i + length < rows.size and rows[before + length] == rows[i + length]:
                length += 1
            while back < before and i - back > begin and rows[before - back - 1] == rows[i - back - 1]:
                back += 1
        if length + back < _SHORTEST:
            i += 1 if missed < _PATIENCE or missed % _PERIOD < _STRIDE else _STRIDE
            missed += 1
            continue
        missed = 0
        at = put(sequences, put(sequences, put(sequences, at, i - back - begin), back + length), i - before)
        num_fresh = _pack_bits(rows[begin : i - back], width, bits, num_fresh)
        for k in range(i + _STRIDE, i + length, _STRIDE):
            places[index.tag_of(int64(rows[k])) & mask] = k
        i += length
        begin = i
    if begin < rows.size:
        at = put(sequences, put(sequences, at, rows.size - begin), 0)
        num_fresh = _pack_bits(rows[begin:], width, bits, num_fresh)
    return at, num_fresh, width


@lean
def _width(rows: Any) -> int:
    """Bits of the largest row."""
    union = int64(0)
    for i in range(rows.size):
        union |= int64(rows[i])
    width = 0
    while union >> width != 0:
        width += 1
    return width


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
def _pack_bits(rows: Any, width: int, bits: Any, num_fresh: int) -> int:
    """Write rows behind the fresh ones that are there; how many these are then."""
    word, used = num_fresh * width >> 6, num_fresh * width & 63
    filling = bits[word] if used > 0 else int64(0)
    for i in range(rows.size if width > 0 else 0):
        row = int64(rows[i])
        filling |= row << used
        used += width
        if used >= 64:
            bits[word] = filling
            word += 1
            used -= 64
            filling = row >> (width - used)
    if used > 0:
        bits[word] = filling
    return num_fresh + rows.size


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
