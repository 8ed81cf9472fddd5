"""N-gram hashing: equal to the published vectors, and to a slow oracle on any text, cut anywhere."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiercache.engram.hashing import NgramHasher, demo_hashers, fit_hasher

VOCABULARY = 1000
SMALL = demo_hashers((3,), vocabulary=VOCABULARY, table_vocabularies=(50, 70, 90), heads=2, pad_id=7)[0]

token_lists = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads((Path(__file__).parent / "golden_hashing.json").read_text())


@pytest.fixture(scope="module")
def hashers(golden: Any) -> dict[str, NgramHasher]:
    layers = (1, 15)
    made = demo_hashers(layers, vocabulary=golden["compressed_vocab"])
    return {str(layer): hasher for layer, hasher in zip(layers, made, strict=True)}


@pytest.mark.parametrize("layer", ["1", "15"])
def test_multipliers_and_primes_are_the_papers(golden: Any, hashers: dict[str, NgramHasher], layer: str) -> None:
    assert list(hashers[layer].multipliers) == golden["multipliers"][layer]
    assert [list(order) for order in hashers[layer].primes] == golden["primes"][layer]


@pytest.mark.parametrize("layer", ["1", "15"])
def test_rows_are_the_papers(golden: Any, hashers: dict[str, NgramHasher], layer: str) -> None:
    hasher = hashers[layer]
    hashes = hasher.rows(golden["compressed"]) - hasher.offsets.ravel()
    assert hashes[0].tolist() == golden["hash_first_tok"][layer]
    assert hashes[-1].tolist() == golden["hash_last_tok"][layer]
    assert hashlib.sha256(hashes.astype("<i8").tobytes()).hexdigest() == golden["sha256_int64le"][layer]


def test_a_compression_map_is_applied_to_tokens_and_to_the_pad_id(golden: Any) -> None:
    compression = np.zeros(130_000, np.int64)
    compression[golden["ids"]] = golden["compressed"]
    compression[2] = 2
    (hasher,) = demo_hashers((1,), vocabulary=golden["compressed_vocab"], compression=compression)
    (plain,) = demo_hashers((1,), vocabulary=golden["compressed_vocab"])
    assert np.array_equal(hasher.rows(golden["ids"]), plain.rows(golden["compressed"]))
    compression[2] = 5
    (moved,) = demo_hashers((1,), vocabulary=golden["compressed_vocab"], compression=compression)
    assert moved.pad_id == 5


def oracle(hasher: NgramHasher, documents: list[list[int]]) -> npt.NDArray[np.int64]:
    """Rows in Python integers, straight from the definition."""
    rows = []
    for document in documents:
        padded = [hasher.pad_id] * (len(hasher.multipliers) - 1) + document
        for end in range(len(hasher.multipliers), len(padded) + 1):
            row, base = [], 0
            for order, primes in enumerate(hasher.primes, 2):
                mix = 0
                for distance in range(order):
                    mix ^= padded[end - 1 - distance] * hasher.multipliers[distance]
                for prime in primes:
                    row.append(base + mix % prime)
                    base += prime
            rows.append(row)
    return np.array(rows, np.int64).reshape(-1, hasher.num_heads)


@given(st.lists(token_lists, max_size=6))
def test_documents_start_anew(documents: list[list[int]]) -> None:
    tokens = [token for document in documents for token in document]
    rows = SMALL.rows(tokens, [len(document) for document in documents])
    assert np.array_equal(rows, oracle(SMALL, documents))


@given(token_lists, st.lists(st.integers(0, 30), max_size=5))
def test_chunks_give_the_rows_of_the_whole(tokens: list[int], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    chunks = [SMALL.rows(tokens[a:b], previous=tokens[:a]) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(chunks), SMALL.rows(tokens))


@given(token_lists, token_lists)
def test_previous_tokens_belong_to_the_first_document(previous: list[int], tokens: list[int]) -> None:
    cut = len(tokens) // 2
    rows = SMALL.rows(tokens, [cut, len(tokens) - cut], previous=previous)
    assert np.array_equal(rows, oracle(SMALL, [previous + tokens[:cut], tokens[cut:]])[len(previous) :])


def test_rows_stay_inside_the_table_at_the_edge_of_int64() -> None:
    (hasher,) = demo_hashers((1,), vocabulary=2, table_vocabularies=(11, 11), heads=3)
    tokens = np.ones(1000, np.uint32)
    rows = hasher.rows(tokens)
    assert rows.min() >= 0
    assert rows.max() < hasher.num_rows
    assert np.array_equal(rows, oracle(hasher, [tokens.tolist()]))


@pytest.mark.parametrize("num_rows", [2000, 8_134_407])
def test_fitted_heads_fill_the_table(num_rows: int) -> None:
    hasher = fit_hasher(num_rows, vocabulary=VOCABULARY)
    assert 0.9 * num_rows < hasher.num_rows <= num_rows
    assert len({prime for order in hasher.primes for prime in order}) == 16


def test_a_table_too_small_for_sixteen_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="num_rows = 100"):
        fit_hasher(100, vocabulary=VOCABULARY)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_an_id_outside_the_vocabulary_is_named(token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token} is outside"):
        SMALL.rows([1, token])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        SMALL.rows(np.zeros(3))
    with pytest.raises(ValueError, match="one dimension"):
        SMALL.rows(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="documents of 3 tokens for 2"):
        SMALL.rows([1, 2], [3])
