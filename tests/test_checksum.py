"""XXH64 against its published values and the reference implementation."""

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache.storage.checksum import checksum_pages, verify_pages, xxh64


def digest(content: bytes | np.ndarray) -> int:
    array = np.frombuffer(bytes(content) + b"\0", np.uint8)
    return int(xxh64(array.ctypes.data, len(array) - 1)) & 0xFFFFFFFFFFFFFFFF


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_xxh64_has_its_known_values(content, expected):
    assert digest(content) == expected


@given(st.binary(max_size=200), st.integers(0, 7))
@settings(deadline=None)
def test_xxh64_equals_the_reference_at_any_length_and_address(content, shift):
    array = np.frombuffer(bytes(shift) + content + b"\0", np.uint8)
    assert int(xxh64(array.ctypes.data + shift, len(content))) % 2**64 == xxhash.xxh64_intdigest(content)


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 3 * 4096 + 17])
def test_each_page_has_its_checksum_and_the_first_bad_one_is_found(num_bytes):
    content = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    sums = np.zeros(-(-num_bytes // 4096), np.int64)
    checksum_pages(content.ctypes.data, num_bytes, 4096, sums.ctypes.data)
    expected = [xxhash.xxh64_intdigest(content[start : start + 4096]) for start in range(0, num_bytes, 4096)]
    assert sums.view(np.uint64).tolist() == expected
    assert verify_pages(content.ctypes.data, num_bytes, 4096, sums.ctypes.data) == -1
    for place in {num_bytes - 1, num_bytes // 2, 0}:
        content[place] ^= 0x40
        assert verify_pages(content.ctypes.data, num_bytes, 4096, sums.ctypes.data) == place // 4096
