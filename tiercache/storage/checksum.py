"""XXH64 with seed 0, of memory at an address, and of its pages: compiled, callable from compiled code.

The algorithm is that of the public xxHash specification. It is written once over five operations on unsigned 64-bit
words, each with a compiled twin; results are the int64 that has the same bits.
"""

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from tiercache.native import lean, load64, store64

PAGE_BYTES = 4096
"""Page of the checksums in packed tables."""

_P1 = 0x9E3779B185EBCA87
_P2 = 0xC2B2AE3D27D4EB4F
_P3 = 0x165667B19E3779F9
_P4 = 0x85EBCA77C2B2AE63
_P5 = 0x27D4EB2F165667C5
_MASK = 0xFFFFFFFFFFFFFFFF


def _add(a: int, b: int) -> int:
    return (int(a) + int(b)) & _MASK


def _multiply(a: int, b: int) -> int:
    return (a * b) & _MASK


def _rotate(a: int, bits: int) -> int:
    return (a << bits | a >> (64 - bits)) & _MASK


def _fold(a: int, bits: int) -> int:
    return a ^ (a >> bits)


def _signed(a: int) -> int:
    return a - (a >> 63 << 64)


def _word(address: int, num_bytes: int) -> int:
    return int.from_bytes(ctypes.string_at(int(address), num_bytes), "little")


@overload(_add)
def _add_twin(a, b):  # type: ignore[no-untyped-def]
    return lambda a, b: np.uint64(a) + np.uint64(b)


@overload(_multiply)
def _multiply_twin(a, b):  # type: ignore[no-untyped-def]
    return lambda a, b: np.uint64(a) * np.uint64(b)


@overload(_rotate)
def _rotate_twin(a, bits):  # type: ignore[no-untyped-def]
    return lambda a, bits: (np.uint64(a) << np.uint64(bits)) | (np.uint64(a) >> np.uint64(64 - bits))


@overload(_fold)
def _fold_twin(a, bits):  # type: ignore[no-untyped-def]
    return lambda a, bits: np.uint64(a) ^ (np.uint64(a) >> np.uint64(bits))


@overload(_signed)
def _signed_twin(a):  # type: ignore[no-untyped-def]
    return lambda a: np.int64(a)


def _loader(bits: int) -> Any:
    """Little-endian load of a word at any address."""

    @intrinsic
    def load(context, address):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            return builder.zext(builder.load(pointer, align=1), ir.IntType(64))

        return types.uint64(types.int64), emit

    return load


_load8, _load32, _load64 = _loader(8), _loader(32), _loader(64)


@overload(_word, prefer_literal=True)
def _word_twin(address, num_bytes):  # type: ignore[no-untyped-def]
    load = {1: _load8, 4: _load32, 8: _load64}[num_bytes.literal_value]
    return lambda address, num_bytes: load(address)


@lean
def _round(lane: int, word: int) -> int:
    return _multiply(_rotate(_add(lane, _multiply(word, _P2)), 31), _P1)


@lean
def _merge(digest: int, lane: int) -> int:
    return _add(_multiply(digest ^ _round(0, lane), _P1), _P4)


@lean
def _stripes(address: int, end: int) -> int:
    """Digest of the whole 32-byte stripes before `end`, four independent lanes at a time."""
    a, b, c, d = _add(_P1, _P2), _add(_P2, 0), _add(0, 0), _add(_MASK - _P1, 1)
    while address + 32 <= end:
        a = _round(a, _word(address, 8))
        b = _round(b, _word(address + 8, 8))
        c = _round(c, _word(address + 16, 8))
        d = _round(d, _word(address + 24, 8))
        address += 32
    digest = _add(_add(_rotate(a, 1), _rotate(b, 7)), _add(_rotate(c, 12), _rotate(d, 18)))
    return _merge(_merge(_merge(_merge(digest, a), b), c), d)


@lean
def _rest(digest: int, address: int, end: int) -> int:
    """Take in the last 0 to 31 bytes."""
    while address + 8 <= end:
        digest = _add(_multiply(_rotate(digest ^ _round(0, _word(address, 8)), 27), _P1), _P4)
        address += 8
    if address + 4 <= end:
        digest = _add(_multiply(_rotate(digest ^ _multiply(_word(address, 4), _P1), 23), _P2), _P3)
        address += 4
    while address < end:
        digest = _multiply(_rotate(digest ^ _multiply(_word(address, 1), _P5), 11), _P1)
        address += 1
    return digest


@lean
def xxh64(address: int, num_bytes: int) -> int:
    """XXH64 of the memory at an address, as int64 bits."""
    digest = _stripes(address, address + num_bytes) if num_bytes >= 32 else _add(_P5, 0)
    digest = _rest(_add(digest, num_bytes), address + num_bytes // 32 * 32, address + num_bytes)
    digest = _multiply(_fold(digest, 33), _P2)
    digest = _multiply(_fold(digest, 29), _P3)
    return _signed(_fold(digest, 32))


@lean
def checksum_pages(address: int, num_bytes: int, page_bytes: int, out: int) -> None:
    """Checksums of the pages of memory at an address (the last may be short), int64[num_pages], to address `out`."""
    for start in range(0, num_bytes, page_bytes):
        store64(out, xxh64(address + start, min(page_bytes, num_bytes - start)))
        out += 8


@lean
def verify_pages(address: int, num_bytes: int, page_bytes: int, expected: int) -> int:
    """First page whose checksum is not that of int64[num_pages] at address `expected`; -1 if all are."""
    for start in range(0, num_bytes, page_bytes):
        if xxh64(address + start, min(page_bytes, num_bytes - start)) != load64(expected + start // page_bytes * 8):
            return start // page_bytes
    return -1
