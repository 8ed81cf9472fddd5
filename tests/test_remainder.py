"""Remainders without a division: equal to Python's for any value and modulus, above all where a quotient is near an integer."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.engram.remainder import LANES, LARGEST, SMALLEST, place_eight, reciprocals
from tiercache.native import jit

TOP = 2**63 - 1


@jit
def place_all(values, moduli, factors, offsets, out):  # type: ignore[no-untyped-def]
    for at in range(values.size):
        for head in range(0, moduli.size, LANES):
            place_eight(values[at], moduli, factors, offsets, head, out, at * moduli.size + head)


def place(values: list[int], moduli: list[int], offsets: list[int]) -> list[list[int]]:
    numbers = np.array(moduli, np.int64)
    out = np.full((len(values), numbers.size), -1, np.int64)
    place_all(np.array(values, np.int64), numbers, reciprocals(numbers), np.array(offsets, np.int64), out.reshape(-1))
    return out.tolist()


def near_multiples(modulus: int) -> list[int]:
    """Values beside multiples of a modulus, the largest and the smallest ones."""
    most = TOP // modulus
    factors = {0, 1, 2, most, most - 1, most // 2, most // 3, *(2**bits for bits in range(most.bit_length()))}
    values = {factor * modulus + step for factor in factors for step in (-1, 0, 1)}
    return sorted({value for value in values if 0 <= value <= TOP} | {TOP})


def test_extremes() -> None:
    sizes = [SMALLEST, SMALLEST + 1, 16_000_057, 2**25 - 39, 2**25, 2**31 - 1, 2**32 + 15, 2**52 - 1, 2**53 + 1]
    sizes += [2**53, 2**61 - 1, LARGEST - 1, LARGEST, 3 * SMALLEST - 1, 3**38, 10**18]
    for modulus in sizes:
        values = near_multiples(modulus)
        assert place(values, [modulus] * LANES, [0] * LANES) == [[value % modulus] * LANES for value in values]


moduli_of_any_size = st.integers(14, 62).flatmap(lambda bits: st.integers(SMALLEST, max(SMALLEST, 2**bits)))


@given(st.lists(moduli_of_any_size, min_size=2 * LANES, max_size=2 * LANES), st.data())
def test_any_value_and_modulus(moduli: list[int], data: st.DataObject) -> None:
    beside = st.sampled_from(moduli).flatmap(lambda modulus: st.sampled_from(near_multiples(modulus)))
    values = data.draw(st.lists(st.integers(0, TOP) | beside, max_size=20))
    offsets = data.draw(st.lists(st.integers(0, 2**60), min_size=len(moduli), max_size=len(moduli)))
    expected = [[value % modulus + offset for modulus, offset in zip(moduli, offsets, strict=True)] for value in values]
    assert place(values, moduli, offsets) == expected


def test_many_values_beside_multiples() -> None:
    """Quotients of every size, for the least moduli and for those of released models."""
    random = np.random.default_rng(0)
    for modulus in (SMALLEST, SMALLEST + 3, 646_403, 16_000_057, 20_000_171):
        quotients = (2 ** random.uniform(0, np.log2(TOP // modulus), 20_000)).astype(np.int64)
        values = (quotients * modulus + random.integers(-1, 2, quotients.size)).clip(0)
        numbers = np.full(LANES, modulus)
        out = np.empty((values.size, LANES), np.int64)
        place_all(values, numbers, reciprocals(numbers), np.zeros(LANES, np.int64), out.reshape(-1))
        assert np.array_equal(out, np.repeat(values[:, None] % modulus, LANES, 1))
