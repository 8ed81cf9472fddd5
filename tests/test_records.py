"""Records: layout, and `decode` against numpy arithmetic of the ml_dtypes types."""

import ml_dtypes
import numpy as np
import pytest
import torch

from tiercache.errors import FormatError
from tiercache.records import DTYPES, Field, Record, plain

NUMPY = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "U8": np.uint8,
}
DEEPSEEK = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 8)))


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable even where values are NaN."""
    return torch.where(tensor.float().isnan(), torch.tensor(0x7FFF1234), tensor.float().view(torch.int32))


def test_fields_lie_one_behind_the_other():
    assert DEEPSEEK.offsets == (0, 256)
    assert DEEPSEEK.record_bytes == 264
    assert DEEPSEEK.dim == 256
    assert plain("F32", 5).record_bytes == 20


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_plain_row_decodes_to_its_own_numbers(dtype):
    raw = random_bytes(50, 6 * DTYPES[dtype].itemsize)
    expected = torch.from_numpy(raw.view(NUMPY[dtype]).astype(np.float32))
    assert torch.equal(bits(plain(dtype, 6).decode(torch.from_numpy(raw), torch.float32)), bits(expected))


@pytest.mark.parametrize(
    ("dtype", "decoded"),
    [
        ("BF16", torch.bfloat16),
        ("F16", torch.float16),
        ("F32", torch.float32),
        ("I8", torch.int8),
        ("U8", torch.uint8),
        ("F8_E4M3", torch.bfloat16),
    ],
)
def test_a_row_keeps_its_dtype_and_fp8_becomes_bfloat16(dtype, decoded):
    record = plain(dtype, 3)
    assert record.default_dtype == decoded
    assert record.decode(torch.zeros(2, record.record_bytes, dtype=torch.uint8)).dtype == decoded
    assert DEEPSEEK.default_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_block_scales_are_powers_of_two_rounded_once(dtype):
    record = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 1)))
    values = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    exact = values.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.exp2(scales.astype(np.float64) - 127)
    exact[255] = np.nan
    decoded = record.decode(torch.from_numpy(np.hstack([values, scales])), dtype)
    assert torch.equal(bits(decoded), bits(torch.from_numpy(exact).to(dtype)))


def test_each_block_has_its_own_scale_in_either_order_of_fields():
    values, scales = random_bytes(20, 256), np.random.default_rng(1).integers(100, 140, (20, 8), np.uint8)
    expected = DEEPSEEK.decode(torch.from_numpy(np.hstack([values, scales])))
    for block in range(8):
        columns = slice(32 * block, 32 * (block + 1))
        numbers = values[:, columns].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scaled = torch.from_numpy(numbers * np.exp2(scales[:, block : block + 1].astype(np.float32) - 127))
        assert torch.equal(bits(expected[:, columns]), bits(scaled.bfloat16()))
    swapped = Record(DEEPSEEK.fields[::-1])
    assert torch.equal(bits(swapped.decode(torch.from_numpy(np.hstack([scales, values])))), bits(expected))


def test_a_global_scale_multiplies_every_value():
    raw = torch.from_numpy(random_bytes(30, 16))
    decoded = Record((Field("w", "F8_E4M3", 16),), 0.375).decode(raw, torch.float32)
    assert torch.equal(bits(decoded), bits(raw.view(torch.float8_e4m3fn).float() * 0.375))


def test_decode_copies_and_takes_any_alignment():
    block = torch.arange(65, dtype=torch.uint8)
    raw = block[1:].view(8, 8)
    decoded = plain("F32", 2).decode(raw)
    assert decoded.numpy().tobytes() == raw.numpy().tobytes()
    decoded.zero_()
    assert block.tolist() == list(range(65))


def test_no_rows_decode_to_no_rows():
    assert DEEPSEEK.decode(torch.empty(0, 264, dtype=torch.uint8)).shape == (0, 256)


def test_decode_to_writes_what_decode_returns():
    raw = torch.from_numpy(random_bytes(9, 264))
    out = torch.empty(9, 256, dtype=torch.float16)
    DEEPSEEK.decode_to(raw, out)
    assert torch.equal(bits(out), bits(DEEPSEEK.decode(raw, torch.float16)))


def test_only_a_plain_row_in_its_own_dtype_is_verbatim():
    assert plain("BF16", 4).is_verbatim(torch.bfloat16)
    assert not plain("BF16", 4).is_verbatim(torch.float32)
    assert not plain("F8_E4M3", 4).is_verbatim(torch.bfloat16)
    assert not DEEPSEEK.is_verbatim(torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "scale", "named"),
    [
        ((), None, "no fields"),
        ((Field("a", "F64", 4),), None, "'a' is F64; supported are BF16"),
        ((Field("a", "BF16", 0),), None, "'a' has 0 elements"),
        ((Field("a", "F8_E8M0", 4),), None, "'a' F8_E8M0"),
        ((Field("a", "BF16", 4), Field("b", "F16", 4)), None, "'b' F16"),
        ((Field("a", "F8_E4M3", 10), Field("b", "F8_E8M0", 4)), None, "4 blocks"),
        ((Field("a", "BF16", 4),), 2.0, "global scale"),
    ],
)
def test_fields_that_make_no_record_are_refused(fields, scale, named):
    with pytest.raises(FormatError, match=named):
        Record(fields, scale)
