"""Kernels of the device tier. Each equals one line of torch, which its docstring says.

The bytes of a row are cut into vectors, as wide as one load or store can be, and the vectors of all rows are numbered through:
vector v is vector `v % VECTORS` of row `v // VECTORS`. Each thread moves a few of them. So every lane works whatever the width
of a row, neighbours in a warp read neighbouring bytes, and the output is written from end to end.

A launch neither allocates nor waits, and goes to the current stream of the current device, so that it can be captured in a CUDA
graph. The first one for a record, an output dtype and its alignment compiles; it belongs before the capture.
"""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from tiercache.records import DTYPES, Record

_LOADED = {"BF16": tl.bfloat16, "F16": tl.float16, "F32": tl.float32, "F8_E4M3": tl.int8, "I8": tl.int8, "U8": tl.uint8}
"""What a value is loaded as; fp8 as its bits."""

_WORDS = {16: (tl.int64, 2), 8: (tl.int64, 1), 4: (tl.int32, 1), 2: (tl.int16, 1), 1: (tl.int8, 1)}
"""Word, and words per vector, that copy vectors of so many bytes."""

_VECTOR_BYTES = 16
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_COPY_BLOCK, _DECODE_BLOCK = 512, 256
"""Vectors per program: four and two for each thread."""

_NAN, _LEAST_SCALE = tl.constexpr(0x7FC00000), tl.constexpr(0x00400000)
_E4M3_BITS, _E4M3_UNIT = tl.constexpr(0x87F00000 - (1 << 32)), tl.constexpr(2.0**120)

_kernel = triton.jit(
    do_not_specialize=["num_rows", "num_device", "scale"],
    do_not_specialize_on_alignment=["where", "sources", "slots"],
)
"""Decorator of kernels. None is compiled anew for another number of rows."""


def gather(
    where: torch.Tensor,
    device_slots: torch.Tensor,
    host_slots: torch.Tensor,
    staging: torch.Tensor,
    out: torch.Tensor,
    record: Record,
) -> None:
    """`record.decode_to(cat([device_slots, host_slots, staging.flip(0)])[where][:, :record.record_bytes], out)` in one pass.

    where: int32[n]; a place p < 0 is row ~p of staging, p < D a slot of the device, another slot p - D of the host.
    device_slots: uint8[D, stride], host_slots: uint8[H, stride], staging: uint8[S, stride], any of them empty; the device can
    read all three; strides and addresses are multiples of 16. out: uint8[n, record_bytes] for the bytes as they are, or
    dtype[n, dim] of bfloat16, float16, float32 or the values' own dtype. All are contiguous.
    """
    if not where.numel():
        return
    memories = where, device_slots, host_slots, staging
    num_rows, num_device, stride = where.shape[0], *device_slots.shape
    if out.dtype == torch.uint8 or record.is_verbatim(out.dtype):
        vector_bytes = math.gcd(record.record_bytes, out.data_ptr(), _VECTOR_BYTES)
        vectors = record.record_bytes // vector_bytes
        _copy[_programs(num_rows, vectors, _COPY_BLOCK)](
            *memories,
            out.view(torch.uint8),
            num_rows,
            num_device,
            stride,
            vectors,
            *_WORDS[vector_bytes],
            _COPY_BLOCK,
            **_OPTIONS,
        )
    else:
        layout = _layout(record, out.dtype)
        scale = 1.0 if record.scale is None else float(record.scale)
        _decode[_programs(num_rows, layout["VECTORS"], _DECODE_BLOCK)](
            *memories, out, num_rows, num_device, scale, stride, BLOCK=_DECODE_BLOCK, **layout, **_OPTIONS
        )


def fill(sources: torch.Tensor, slots: torch.Tensor, device_slots: torch.Tensor, host_slots: torch.Tensor) -> None:
    """`device_slots[slots] = host_slots[sources]`.

    sources, slots: int32[m], no slot twice. device_slots: uint8[D, stride], host_slots: uint8[H, stride]; the device can read
    both; stride and addresses are multiples of 16. All are contiguous.
    """
    if slots.numel():
        num_rows, vectors = slots.shape[0], device_slots.shape[1] // _VECTOR_BYTES
        _fill[_programs(num_rows, vectors, _COPY_BLOCK)](
            sources, slots, device_slots, host_slots, num_rows, vectors, *_WORDS[_VECTOR_BYTES], _COPY_BLOCK, **_OPTIONS
        )


def _programs(num_rows: int, vectors: int, block: int) -> tuple[int]:
    """Grid of a kernel."""
    return (-(-num_rows * vectors // block),)


@cache
def _layout(record: Record, dtype: torch.dtype) -> dict[str, Any]:
    """What `_decode` is compiled for. A vector is one load where it can be, and not more than two stores."""
    kinds = [field.dtype for field in record.fields]
    scales = kinds.index("F8_E8M0") if "F8_E8M0" in kinds else None
    values = 0 if scales is None else 1 - scales
    narrow, wide = sorted((DTYPES[kinds[values]].itemsize, dtype.itemsize))
    width = math.gcd(record.dim, min(_VECTOR_BYTES // narrow, 2 * _VECTOR_BYTES // wide))
    return {
        "VECTORS": record.dim // width,
        "WIDTH": width,
        "VALUES": record.offsets[values],
        "LOADED": _LOADED[kinds[values]],
        "FP8": kinds[values] == "F8_E4M3",
        "SCALES": 0 if scales is None else record.offsets[scales],
        "SCALE_BLOCK": 0 if scales is None else record.dim // record.fields[scales].width,
    }


@_kernel
def _copy(
    where: tl.tensor,
    device_slots: tl.tensor,
    host_slots: tl.tensor,
    staging: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_device: tl.tensor,
    STRIDE: tl.constexpr,
    VECTORS: tl.constexpr,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The bytes of row i, from its place where[i] to row i of `out`: VECTORS vectors of WIDTH words."""
    row, column = _deal(VECTORS, BLOCK)
    inside = (row < num_rows)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    record = _record(tl.load(where + row, row < num_rows), device_slots, host_slots, staging, num_device, STRIDE)
    source = record.to(tl.pointer_type(WORD))[:, None] + (column * WIDTH)[:, None] + lane
    target = out.to(tl.pointer_type(WORD)) + ((row * VECTORS + column) * WIDTH)[:, None] + lane
    tl.store(target, tl.load(source, inside), inside)


@_kernel
def _decode(
    where: tl.tensor,
    device_slots: tl.tensor,
    host_slots: tl.tensor,
    staging: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_device: tl.tensor,
    scale: tl.tensor,
    STRIDE: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    LOADED: tl.constexpr,
    FP8: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The values of row i, from its place where[i], as numbers to row i of `out`: VECTORS vectors of WIDTH values.

    The values, of type LOADED, begin at byte VALUES of a record, the scales, each for SCALE_BLOCK values, at byte SCALES.
    Without scales SCALE_BLOCK is 0, and `scale` is that of all fp8 values.
    """
    row, column = _deal(VECTORS, BLOCK)
    inside = (row < num_rows)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    record = _record(tl.load(where + row, row < num_rows), device_slots, host_slots, staging, num_device, STRIDE)
    source = (record + VALUES).to(tl.pointer_type(LOADED))[:, None] + (column * WIDTH)[:, None] + lane
    values = tl.load(source, inside)
    if FP8:
        numbers = _e4m3(values)
        if SCALE_BLOCK == 0:
            numbers *= scale
        elif SCALE_BLOCK % WIDTH == 0:
            numbers *= _e8m0(tl.load((record + SCALES + column // (SCALE_BLOCK // WIDTH))[:, None], inside))
        else:
            numbers *= _e8m0(tl.load((record + SCALES)[:, None] + ((column * WIDTH)[:, None] + lane) // SCALE_BLOCK, inside))
    else:
        numbers = values.to(tl.float32)
    tl.store(out + ((row * VECTORS + column) * WIDTH)[:, None] + lane, numbers.to(out.dtype.element_ty), inside)


@_kernel
def _fill(
    sources: tl.tensor,
    slots: tl.tensor,
    device_slots: tl.tensor,
    host_slots: tl.tensor,
    num_rows: tl.tensor,
    VECTORS: tl.constexpr,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Slot sources[i] of the host to slot slots[i] of the device: VECTORS vectors of WIDTH words."""
    row, column = _deal(VECTORS, BLOCK)
    inside = (row < num_rows)[:, None]
    words = (column * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    source = tl.load(sources + row, row < num_rows).to(tl.int64)[:, None] * (VECTORS * WIDTH) + words
    target = tl.load(slots + row, row < num_rows).to(tl.int64)[:, None] * (VECTORS * WIDTH) + words
    read = tl.load(host_slots.to(tl.pointer_type(WORD)) + source, inside, eviction_policy="evict_first")
    tl.store(device_slots.to(tl.pointer_type(WORD)) + target, read, inside)


@triton.jit
def _deal(VECTORS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Of each of this program's vectors the row, int64[BLOCK], and the place in the row, int32[BLOCK].

    Only the first vector's row takes a division of 64 bits.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first // VECTORS
    column = (first - row * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)
    return row + column // VECTORS, column % VECTORS


@triton.jit
def _record(
    place: tl.tensor,
    device_slots: tl.tensor,
    host_slots: tl.tensor,
    staging: tl.tensor,
    num_device: tl.tensor,
    STRIDE: tl.constexpr,
) -> tl.tensor:
    """Address of the record at each place: uint8*[BLOCK].

    Across the choice of memory the compiler loses sight of the alignment that wide loads need, and so is told.
    """
    memory = tl.where(place < 0, staging, tl.where(place < num_device, device_slots, host_slots))
    slot = tl.where(place < 0, -1 - place, tl.where(place < num_device, place, place - num_device))
    return tl.multiple_of(memory + slot.to(tl.int64) * STRIDE, 16)


@triton.jit
def _e4m3(bits: tl.tensor) -> tl.tensor:
    """`bits.view(float8_e4m3fn).float()`, from int8: exponent and mantissa go where a float32 has them, and to their unit."""
    number = ((bits.to(tl.int32) << 20) & _E4M3_BITS).to(tl.float32, bitcast=True) * _E4M3_UNIT
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def _e8m0(bits: tl.tensor) -> tl.tensor:
    """`bits.view(float8_e8m0fnu).float()`, from uint8: the exponent of a float32; 0 is the subnormal 2^-127, 255 is NaN."""
    exponent = bits.to(tl.int32)
    number = tl.where(exponent == 0, _LEAST_SCALE, tl.where(exponent == 255, _NAN, exponent << 23))
    return number.to(tl.float32, bitcast=True)
