"""Kernels of the device tier: equal to torch in Triton's interpreter, and what the compiler makes of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels are Triton's")

import triton.language as tl
from triton.runtime import interpreter

from tiercache.records import Field, Record, plain
from tiercache.tiers.kernels import fill, gather

_ROOT = Path(__file__).parent.parent
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 8)))
RECORDS = {
    "blocks of 32": BLOCKS,
    "scales first": Record(BLOCKS.fields[::-1]),
    "blocks of 3": Record((Field("weight", "F8_E4M3", 24), Field("scale", "F8_E8M0", 8))),
    "blocks of 24": Record((Field("weight", "F8_E4M3", 72), Field("scale", "F8_E8M0", 3))),
    "blocks of 1": Record((Field("scale", "F8_E8M0", 5), Field("weight", "F8_E4M3", 5))),
    "one block": Record((Field("weight", "F8_E4M3", 48), Field("scale", "F8_E8M0", 1))),
    "fp8": plain("F8_E4M3", 64),
    "fp8, odd": plain("F8_E4M3", 77),
    "scaled fp8": Record((Field("weight", "F8_E4M3", 64),), 0.3),
    "bf16": plain("BF16", 160),
    "bf16, odd": plain("BF16", 5),
    "f16": plain("F16", 132),
    "f32": plain("F32", 20),
    "f32, one": plain("F32", 1),
    "u8": plain("U8", 64),
    "i8": plain("I8", 33),
}


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Conversions between bfloat16 and float32 by torch: the interpreter's own neither round to even nor keep subnormals.

    Numpy, which the interpreter computes with, warns where numbers overflow; the kernels may.
    """
    dtypes = {tl.bfloat16: torch.bfloat16, tl.float32: torch.float32}

    def convert(data: Any, source: Any, target: Any, _: Any) -> Any:
        numbers = torch.from_numpy(np.array(data)).view(dtypes[source]).to(dtypes[target])
        return numbers.view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    with np.errstate(all="ignore"):
        yield


def random_slots(num_slots: int, stride: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (num_slots, stride), np.uint8))


def stride_of(record: Record) -> int:
    return -(-record.record_bytes // 16) * 16


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable even where values are NaN."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return tensor.view(torch.uint8)
    return torch.where(tensor.isnan(), torch.tensor(0x7FFF1234), tensor.float().view(torch.int32))


def gathered(where: torch.Tensor, memories: list[torch.Tensor], record: Record, dtype: torch.dtype | None) -> torch.Tensor:
    """What `gather` writes, raw if without a dtype; what lies behind is as it was."""
    width = record.record_bytes if dtype is None else record.dim
    buffer = torch.full((where.shape[0] + 2, width), 99, dtype=dtype or torch.uint8)
    out = buffer[:-2]
    gather(where, *memories, out, record)
    assert (buffer[-2:] == 99).all()
    return out


def expected(where: torch.Tensor, memories: list[torch.Tensor], record: Record, dtype: torch.dtype | None) -> torch.Tensor:
    device_slots, host_slots, staging = memories
    raw = torch.cat([device_slots, host_slots, staging.flip(0)])[where][:, : record.record_bytes]
    return raw if dtype is None else record.decode(raw, dtype)


def places(num_rows: int, memories: list[torch.Tensor]) -> torch.Tensor:
    """Each place, in random order, and random ones on top: int32[num_rows]."""
    random = np.random.default_rng(num_rows)
    device_slots, host_slots, staging = (len(memory) for memory in memories)
    every = random.permutation(np.arange(-staging, device_slots + host_slots))
    more = random.choice(every, max(num_rows - every.size, 0))
    return torch.from_numpy(np.concatenate([every, more])[:num_rows].astype(np.int32))


def check(record: Record, dtype: torch.dtype | None, num_rows: int, slots: tuple[int, int, int] = (9, 20, 7)) -> None:
    memories = [random_slots(number, stride_of(record), seed) for seed, number in enumerate(slots)]
    where = places(num_rows, memories)
    assert torch.equal(bits(gathered(where, memories, record, dtype)), bits(expected(where, memories, record, dtype)))


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("dtype", [None, *FLOATS])
def test_gather_decodes_every_kind_of_record(name: str, dtype: torch.dtype | None) -> None:
    for num_rows in (0, 1, 77):
        check(RECORDS[name], dtype, num_rows)


@pytest.mark.parametrize(
    ("dtype", "own"), [("U8", torch.uint8), ("I8", torch.int8), ("F8_E4M3", torch.float8_e4m3fn), ("F32", torch.float32)]
)
def test_gather_copies_rows_in_their_own_dtype(dtype: str, own: torch.dtype) -> None:
    for width in (16, 6, 1):
        record = plain(dtype, width)
        memories = [random_slots(5, stride_of(record), seed) for seed in range(3)]
        where = places(40, memories)
        out = torch.empty((40, width), dtype=own)
        gather(where, *memories, out, record)
        assert torch.equal(out.view(torch.uint8), expected(where, memories, record, None))


@pytest.mark.parametrize(("record", "dtype"), [(BLOCKS, None), (BLOCKS, torch.bfloat16), (plain("BF16", 8), torch.float32)])
def test_gather_of_10_000_rows(record: Record, dtype: torch.dtype | None) -> None:
    check(record, dtype, 10_000, (300, 5000, 40))


@pytest.mark.parametrize("slots", [(9, 0, 0), (0, 9, 0), (0, 0, 9), (0, 5, 4), (5, 0, 4), (5, 4, 0)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gather_with_empty_memories(slots: tuple[int, int, int], dtype: torch.dtype | None) -> None:
    check(BLOCKS, dtype, 77, slots)


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_gather_into_an_output_of_any_alignment(shift: int) -> None:
    for record in (plain("U8", 32), plain("U8", 24), plain("U8", 20)):
        memories = [random_slots(5, stride_of(record), seed) for seed in range(3)]
        where = places(50, memories)
        buffer = torch.full((50 * record.record_bytes + 2 * shift,), 99, dtype=torch.uint8)
        out = buffer[shift:-shift].view(50, -1)
        gather(where, *memories, out, record)
        assert torch.equal(out, expected(where, memories, record, None))
        assert set(buffer[:shift].tolist() + buffer[-shift:].tolist()) == {99}


@pytest.mark.parametrize(
    ("width", "shift", "vector_bytes"),
    [(320, 0, 16), (264, 0, 8), (320, 8, 8), (320, 4, 4), (132, 0, 4), (320, 2, 2), (77, 0, 1)],
)
def test_words_are_as_wide_as_rows_and_output_are_aligned(
    monkeypatch: pytest.MonkeyPatch, width: int, shift: int, vector_bytes: int
) -> None:
    kernel = MagicMock()
    monkeypatch.setattr("tiercache.tiers.kernels._copy", kernel)
    slots = torch.zeros((1, 320), dtype=torch.uint8)
    out = torch.empty(3 * width + shift, dtype=torch.uint8)[shift:].view(3, width)
    gather(torch.zeros(3, dtype=torch.int32), slots, slots[:0], slots[:0], out, plain("U8", width))
    words = [each for each in kernel[0].call_args.args if isinstance(each, tl.dtype)]
    vectors, lanes = kernel[0].call_args.args[-4], kernel[0].call_args.args[-2]
    assert words[0].primitive_bitwidth // 8 * lanes == vector_bytes
    assert vectors * vector_bytes == width


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_fp8_value_times_every_scale(dtype: torch.dtype) -> None:
    record = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 1)))
    slots = torch.zeros((256, 272), dtype=torch.uint8)
    slots[:, :256] = torch.arange(256, dtype=torch.uint8)
    slots[:, 256] = torch.arange(256, dtype=torch.uint8)
    check_all(record, slots, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [None, 1.0, 0.375, 0.1, -3e38, 1e-30, 1e-40, float("inf"), float("nan"), 0.0])
def test_every_fp8_value_times_a_global_scale(scale: float | None, dtype: torch.dtype) -> None:
    slots = torch.arange(256, dtype=torch.uint8).view(1, 256)
    check_all(Record((Field("weight", "F8_E4M3", 256),), scale), slots, dtype)


@pytest.mark.parametrize("stored", ["BF16", "F16", "U8", "I8"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_value_of_a_small_dtype(stored: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536).to(torch.uint16).view(torch.uint8).view(-1, 256)
    check_all(plain(stored, 128 if stored.endswith("16") else 256), every, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    high = torch.arange(0, 65536, 3, dtype=torch.int64)[:, None] << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    numbers = (high | low).reshape(-1)[: 64 * 3000].to(torch.uint32).view(-1, 64)
    check_all(plain("F32", 64), numbers.view(torch.uint8), dtype)


def check_all(record: Record, slots: torch.Tensor, dtype: torch.dtype) -> None:
    """Every slot, as the device's."""
    memories = [slots, slots[:0], slots[:0]]
    where = torch.arange(len(slots), dtype=torch.int32)
    out = torch.empty((len(slots), record.dim), dtype=dtype)
    gather(where, *memories, out, record)
    assert torch.equal(bits(out), bits(expected(where, memories, record, dtype)))


def test_offsets_have_64_bits() -> None:
    stride = 1 << 30
    slots = torch.empty((4, stride), dtype=torch.uint8)  # address space; only what is written below takes memory
    for slot in range(4):
        slots[slot, :32] = slot + 1
    where = torch.tensor([3, 0, 2, 1], dtype=torch.int32)
    out = torch.empty((4, 32), dtype=torch.uint8)
    gather(where, slots, slots[:0], slots[:0], out, plain("U8", 32))
    assert out[:, 0].tolist() == out[:, 31].tolist() == [4, 1, 3, 2]
    gather(~where, slots[:0], slots[:0], slots, out, plain("U8", 32))
    assert out[:, 0].tolist() == out[:, 31].tolist() == [4, 1, 3, 2]


@pytest.mark.parametrize("num_rows", [0, 1, 77, 10_000])
@pytest.mark.parametrize("stride", [16, 272])
def test_fill_copies_whole_slots(num_rows: int, stride: int) -> None:
    random = np.random.default_rng(num_rows)
    device_slots, host_slots = random_slots(num_rows + 9, stride, 0), random_slots(num_rows // 2 + 1, stride, 1)
    sources = torch.from_numpy(random.integers(0, len(host_slots), num_rows).astype(np.int32))
    slots = torch.from_numpy(random.permutation(len(device_slots))[:num_rows].astype(np.int32))
    after = device_slots.clone()
    after[slots] = host_slots[sources]
    fill(sources, slots, device_slots, host_slots)
    assert torch.equal(device_slots, after)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `bench/kernels.py` reports: the kernels compiled for each kind of GPU, none in the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "error", str(_ROOT / "bench" / "kernels.py"), "--json"]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    loaded: list[dict[str, Any]] = json.loads(result.stdout)
    return loaded


def test_kernels_compile_for_gpus_without_spills(reports: list[dict[str, Any]]) -> None:
    assert {report["capability"] for report in reports} == {80, 90, 100}
    assert len(reports) == 3 * 6
    for report in reports:
        assert report["spills"] == report["local_bytes"] == 0, report
        assert report["registers"] <= 64, report
        assert not report["flushes"], f"subnormal numbers are flushed: {report}"


def test_kernels_load_and_store_16_bytes_at_once(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        widest = "8" if report["kernel"].endswith("264 B, raw") else "16"
        # Beside the vectors only places, of 4 bytes, and scales, of 1, are loaded, one for each vector.
        assert set(report["loads"]) <= {widest, "4", "1"}, report
        assert set(report["stores"]) == {widest}, report
        assert report["loads"][widest] == (2 if "to" in report["kernel"].split() else 4), report


def test_tiercache_does_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import tiercache, tiercache.cli"
    subprocess.run([sys.executable, "-c", code], check=True)
