"""N-gram hashing: equal to published vectors, and to a slow oracle on any text, cut anywhere, on the host and in torch."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from tiercache.engram.compression import Compression
from tiercache.engram.deepseek import deepseek_hashers
from tiercache.engram.demo import DemoHasher, demo_hashers, fit_hasher
from tiercache.engram.hasher import Hasher
from tiercache.engram.longcat import longcat_hasher
from tiercache.engram.qwen import qwen_hashers
from tiercache.engram.window import ABSENT
from tiercache.engram.xor import XorHasher

families = pytest.mark.parametrize("name", FAMILIES)
GOLDEN = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "golden").glob("*.json")}


@pytest.mark.parametrize(("place", "layer"), [(0, "1"), (1, "15")])
def test_the_papers_demo(place: int, layer: str) -> None:
    golden = GOLDEN["demo_v1"]
    hasher = demo_hashers(vocabulary=golden["compressed_vocab"])[place]
    assert list(hasher.multipliers) == golden["multipliers"][layer]
    assert [list(order) for order in hasher.primes] == golden["primes"][layer]
    hashes = hasher.rows(golden["compressed"]) - hasher.offsets
    assert hashes[0].tolist() == golden["hash_first_tok"][layer]
    assert hashes[-1].tolist() == golden["hash_last_tok"][layer]
    assert hashlib.sha256(hashes.astype("<i8").tobytes()).hexdigest() == golden["sha256_int64le"][layer]


def test_deepseek_v41() -> None:
    golden = GOLDEN["dsv41"]
    hashers = deepseek_hashers(compression=None, num_embeddings=(384_006_168, 384_016_682))
    assert [list(hasher.multipliers) for hasher in hashers] == golden["multipliers"]
    assert [[list(order) for order in hasher.primes] for hasher in hashers] == golden["primes"]
    assert [hasher.offsets.tolist() for hasher in hashers] == golden["offsets"]
    assert [hasher.num_rows for hasher in hashers] == [384_006_168, 384_016_682]
    assert {(hasher.num_heads, hasher.context) for hasher in hashers} == {(24, 3)}
    rows = np.stack([hasher.rows(GOLDEN["demo_v1"]["compressed"]) for hasher in hashers], 1)
    assert rows.tolist() == golden["rows"]
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest() == golden["sha256_int64le"]


def test_qwen4exp() -> None:
    golden = GOLDEN["qwen4exp"]
    (hasher,) = qwen_hashers()
    assert list(hasher.multipliers) == golden["multipliers"]
    assert hasher.moduli.tolist() == golden["primes"]
    assert hasher.offsets.tolist() == golden["offsets"]
    assert (hasher.num_rows, hasher.num_heads, hasher.context) == (320_001_536, 16, 2)
    assert hasher.rows(golden["seq"]).tolist() == golden["rows"]


def test_longcat_has_the_published_number_of_rows() -> None:
    hasher = longcat_hasher(eos_token_id=2)
    assert (hasher.num_rows, hasher.num_heads, hasher.context) == (122_683_536, 12, 3)


def test_the_second_ple_layer_goes_on_with_the_primes_and_the_seeds() -> None:
    one, two = qwen_hashers((2, 7))
    assert min(two.moduli) > max(one.moduli)
    assert not set(one.multipliers) & set(two.multipliers)
    assert qwen_hashers((4, 9))[1].multipliers == two.multipliers


@families
@given(data=st.data())
def test_rows_are_the_oracles(name: str, data: Any) -> None:
    family = FAMILIES[name]
    tokens = data.draw(family.tokens(200))
    for hasher in family.hashers:
        rows = hasher.rows(tokens)
        assert rows.tolist() == family.oracle(hasher, tokens)
        assert not rows.size or rows.max() < hasher.num_rows


@families
@given(data=st.data())
def test_documents_start_anew_and_what_came_before_belongs_to_the_first(name: str, data: Any) -> None:
    family = FAMILIES[name]
    before, documents = data.draw(family.tokens()), data.draw(st.lists(family.tokens(), min_size=1, max_size=5))
    lengths = [len(document) for document in documents]
    for hasher in family.hashers:
        expected = family.oracle(hasher, before + documents[0])[len(before) :]
        for document in documents[1:]:
            expected += family.oracle(hasher, document)
        assert hasher.rows([*chain(*documents)], lengths, before).tolist() == expected


@families
@given(data=st.data())
def test_a_batch_on_the_host_and_in_torch_gives_the_rows(name: str, data: Any) -> None:
    family = FAMILIES[name]
    num_sequences, num_tokens = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 6))
    for hasher in family.hashers:
        length = hasher.context + num_tokens
        lists = st.lists(st.sampled_from(family.ids), min_size=length, max_size=length)
        texts = [data.draw(lists) for _ in range(num_sequences)]
        starts = [data.draw(st.integers(0, hasher.context)) for _ in texts]
        ids = np.array(texts, np.int64).reshape(num_sequences, length)
        for text, begin in zip(ids, starts, strict=True):
            text[:begin] = ABSENT
        previous, tokens = ids[:, : hasher.context], ids[:, hasher.context :]
        rows = hasher.batch(tokens, previous)
        assert rows.shape == (num_sequences, num_tokens, hasher.num_heads)
        for row, text, begin in zip(rows, texts, starts, strict=True):
            assert row.tolist() == family.oracle(hasher, text[begin:])[hasher.context - begin :]
        in_torch = hasher.torch_rows(torch.from_numpy(tokens.copy()).int(), torch.from_numpy(previous.copy()))
        assert in_torch.dtype == torch.int64
        assert torch.equal(in_torch, torch.from_numpy(rows))


@families
def test_a_long_text_with_few_ends(name: str) -> None:
    family = FAMILIES[name]
    random = np.random.default_rng(0)
    ends = np.array([token for token in family.ids if token < 0 or token == 4] or [7])
    tokens = np.where(random.random(9000) < 0.001, random.choice(ends, 9000), random.integers(0, 50, 9000))
    for hasher in family.hashers:
        rows = hasher.rows(tokens)
        whole = hasher.torch_rows(torch.from_numpy(tokens[None]), torch.full((1, hasher.context), ABSENT))
        assert np.array_equal(rows, whole[0].numpy())
        assert rows[5000:5100].tolist() == family.oracle(hasher, tokens[:5100].tolist())[5000:]


def test_an_images_position_reads_the_rows_of_padding_alone() -> None:
    (hasher, _) = deepseek_hashers(compression=None)
    rows = hasher.rows([5, -1, -9, 6])
    assert rows[1].tolist() == rows[2].tolist() == hasher.rows([2])[0].tolist()
    assert rows[3].tolist() == hasher.rows([6])[0].tolist()


@families
def test_torch_rows_can_be_compiled(name: str) -> None:
    family = FAMILIES[name]
    for hasher in family.hashers[-1:]:
        tokens, previous = torch.tensor([family.ids] * 2), torch.full((2, hasher.context), ABSENT)
        compiled = torch.compile(hasher.torch_rows, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(tokens, previous), hasher.torch_rows(tokens, previous))


def test_without_compilation_the_rows_are_the_same() -> None:
    code = (
        "import json; from families import FAMILIES; "
        "print(json.dumps([h.rows(f.ids * 5).tolist() for f in FAMILIES.values() for h in f.hashers]))"
    )
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert json.loads(ran.stdout) == [
        hasher.rows(family.ids * 5).tolist() for family in FAMILIES.values() for hasher in family.hashers
    ]


def test_rows_are_written_where_asked() -> None:
    hasher = fit_hasher(2000, vocabulary=50)
    out = np.zeros((3, 16), np.int64)
    assert hasher.rows([1, 2, 3], out=out) is out
    assert np.array_equal(out, hasher.rows([1, 2, 3]))
    with pytest.raises(ValueError, match=r"out = int64\[3, 16\], not contiguous: allowed"):
        hasher.rows([1, 2, 3], out=np.zeros((16, 3), np.int64).T)
    with pytest.raises(TypeError, match="out is a list"):
        hasher.rows([1, 2, 3], out=out.tolist())
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        hasher.rows([1, 2, 3], out=out)
    for wrong in (out[:2], out.astype(np.int32), np.zeros((16, 3), np.int64).T):
        with pytest.raises(ValueError, match=r"allowed is contiguous int64\[3, 16\]"):
            hasher.rows([1, 2, 3], out=wrong)


def test_a_compression_map_is_applied_to_tokens_and_to_the_pad_id() -> None:
    golden = GOLDEN["demo_v1"]
    compression = np.arange(130_000) % golden["compressed_vocab"]
    spare = np.setdiff1d(np.arange(129_000), [*golden["ids"], 2, 3])  # lead to what the others leave
    compression[golden["ids"]] = golden["compressed"]
    compression[[2, 3]] = 2, 99_091
    compression[spare[: golden["compressed_vocab"]]] = np.arange(golden["compressed_vocab"])
    (hasher,) = demo_hashers((1,), vocabulary=golden["compressed_vocab"], compression=compression)
    (plain,) = demo_hashers((1,), vocabulary=golden["compressed_vocab"])
    assert np.array_equal(hasher.rows(golden["ids"]), plain.rows(golden["compressed"]))
    compression[2] = 5
    (moved,) = demo_hashers((1,), vocabulary=golden["compressed_vocab"], compression=compression)
    assert moved.pad == 5


def test_a_map_of_another_number_of_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="compression leads to 50 ids: the hashing is for 99092"):
        deepseek_hashers(compression=np.arange(50))
    with pytest.raises(ValueError, match=r"compression = int32\[50\]"):
        demo_hashers(vocabulary=50, compression=np.arange(50, dtype=np.int32))
    for sparse in ([0, 1, 2, 99], [0, 1, 2, 2**31 + 5], [0, 0, 2]):
        with pytest.raises(ValueError, match=rf"leads to \d of the ids 0\.\.{sparse[-1]}: allowed is a map that leads to each"):
            demo_hashers(vocabulary=sparse[-1] + 1, compression=np.array(sparse))
    with pytest.raises(ValueError, match=r"compression leads to -1: allowed is 0\.\.2"):
        demo_hashers(vocabulary=3, compression=[0, 1, 2, -1])
    with pytest.raises(ValueError, match=r"compression = int64\[2, 2\]"):
        deepseek_hashers(compression=[[0, 1], [2, 3]], compressed_vocab_size=4)
    with pytest.raises(ValueError, match=r"pad id 60: allowed is 0\.\.49"):
        demo_hashers(vocabulary=50, compression=np.arange(50), pad_id=60)


def test_tables_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="num_embeddings = \\[384006168, 1\\]: these settings give tables of"):
        deepseek_hashers(compression=None, num_embeddings=(384_006_168, 1))


@pytest.mark.parametrize("num_rows", [2000, 8_134_407])
def test_fitted_heads_fill_the_table(num_rows: int) -> None:
    hasher = fit_hasher(num_rows, vocabulary=1000)
    assert 0.9 * num_rows < hasher.num_rows <= num_rows
    assert len({prime for order in hasher.primes for prime in order}) == 16


def test_a_table_too_small_for_sixteen_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="num_rows = 100"):
        fit_hasher(100, vocabulary=1000)


def test_a_map_is_given_as_it_is_or_by_its_ids() -> None:
    ids = [*range(50), 0, 1]
    made = Compression(np.array(ids), "ab" * 32)
    rows = [
        deepseek_hashers((1,), compression=given, compressed_vocab_size=50)[0].rows([50, 3, 51]).tolist()
        for given in (made, ids, np.array(ids))
    ]
    assert rows[0] == rows[1] == rows[2]


def test_an_id_too_large_for_deepseek_is_named_with_what_is_allowed() -> None:
    (hasher,) = deepseek_hashers((1,), compression=None, compressed_vocab_size=50)
    with pytest.raises(ValueError, match=r"token id 50 is outside 0\.\.49 \(negative: a position without a token\)"):
        hasher.rows([50])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: demo_hashers(vocabulary=0), "vocabulary = 0: allowed is 1 and more"),
        (lambda: deepseek_hashers(compression=None, compressed_vocab_size=-3), "vocabulary = -3: allowed is 1 and more"),
        (lambda: qwen_hashers(vocab_size=0), "vocab_size = 0: allowed is 1 and more"),
        (lambda: qwen_hashers(make_ngram_vocab_size_divisible_by=0), "divisible_by = 0: allowed is 1 and more"),
        (lambda: qwen_hashers(eos_token_id=None), "eos_token_id = None: allowed is an integer"),
        (lambda: longcat_hasher(eos_token_id=[2]), r"eos_token_id = \[2\]: allowed is an integer"),
    ],
)
def test_impossible_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@families
def test_an_id_outside_the_vocabulary_is_named(name: str) -> None:
    family = FAMILIES[name]
    hasher = family.hashers[0]
    num_ids = hasher.num_ids if isinstance(hasher, XorHasher) else 50
    negative = [] if min(family.ids) < 0 else [-1]
    for token in (num_ids, *negative):
        with pytest.raises(ValueError, match=rf"tokens: token id {token} is outside \S*\.\.{num_ids - 1}"):
            hasher.rows([1, *[1] * 300, token])
        with pytest.raises(ValueError, match=f"tokens: token id {token} is outside"):
            hasher.torch_rows(torch.tensor([[1, token]]), torch.full((1, hasher.context), ABSENT))
    for token in (num_ids, *[-2 for _ in negative]):
        before = [1] * (hasher.context - 1) + [token]
        with pytest.raises(ValueError, match=f"previous: token id {token} is outside"):
            hasher.rows([1, 1], previous=before)
        with pytest.raises(ValueError, match=f"previous: token id {token} is outside"):
            hasher.torch_rows(torch.tensor([[1]]), torch.tensor([before]))


def _demo(**changes: Any) -> Hasher:
    return DemoHasher(**({"multipliers": (3, 5), "primes": ((7,),), "vocabulary": 10, "pad": 2} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primes": ((7,), (11,))}, "allowed is one number for 1 orders"),
        ({"primes": ((),)}, "heads an order"),
        ({"multipliers": (3, 2**62)}, "multipliers from 3 to 4611686018427387904: allowed is 1..1024819115206086200"),
        ({"primes": ((0,),)}, "primes from 0 to 0"),
        ({"primes": ((2**61, 2**61, 2**61),)}, "primes sum to 6917529027641081856"),
        ({"pad": 10}, "pad = 10: allowed is 0..9"),
    ],
)
def test_impossible_hashers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _demo(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": 131_072}, "eos = 131072: allowed is 0..131071"),
        ({"emb_neighbor_num": 1}, "orders = 1: allowed is 2 and more"),
        ({"emb_split_num": 0}, "heads = 0"),
        ({"vocab_size": 2**31, "ngram_vocab_size_ratio": 8}, "sums would not fit 63 bits"),
    ],
)
def test_impossible_settings_of_longcat_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        longcat_hasher(**({"eos_token_id": 2} | changes))


def test_wrong_arguments_are_refused() -> None:
    hasher = fit_hasher(2000, vocabulary=50)
    with pytest.raises(TypeError, match="tokens: expected integers, got float64"):
        hasher.rows(np.zeros(3))
    with pytest.raises(ValueError, match="one dimension"):
        hasher.rows(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="documents of 1 tokens for 2"):
        hasher.rows([1, 2], [1])
    with pytest.raises(ValueError, match=r"documents: 3 at position 0: allowed is 0\.\.2"):
        hasher.rows([1, 2], [3])
    with pytest.raises(ValueError, match=r"documents: -1 at position 1: allowed is 0\.\.2"):
        hasher.rows([1, 2], [2, -1, 1])
    with pytest.raises(ValueError, match=r"documents: -1 at position 1: allowed is 0\.\.2"):
        hasher.rows([1, 2], [3, -1])
    with pytest.raises(ValueError, match=f"documents: {2**62} at position 0"):
        hasher.rows([1], [2**62, 2**62, 2**62, 2**62 + 1])
    for name, dtype, value in (("tokens", np.uint64, 2**64 - 1), ("previous", np.uint64, 2**63 + 5)):
        wide, narrow = torch.from_numpy(np.array([[1, value]], dtype)), torch.ones((1, 2), dtype=torch.int64)
        with pytest.raises(ValueError, match=f"{name}: {value} is no int64"):
            hasher.torch_rows(*((wide, narrow) if name == "tokens" else (narrow, wide)))
    with pytest.raises(ValueError, match="18446744073709551615 is no int64"):
        hasher.rows(np.array([2**64 - 1], np.uint64))
    with pytest.raises(ValueError, match=r"previous of shape \[2, 1\]: allowed is \[2, 2\]"):
        hasher.batch([[1], [2]], [[1], [2]])
    with pytest.raises(ValueError, match="tokens of shape"):
        hasher.torch_rows(torch.zeros(3, dtype=torch.int64), torch.zeros((1, 2), dtype=torch.int64))
    with pytest.raises(TypeError, match=r"previous: expected integers, got torch\.float32"):
        hasher.torch_rows(torch.zeros((1, 2), dtype=torch.int64), torch.zeros((1, 2)))
    with pytest.raises(ValueError, match="ple_layer_ids"):
        qwen_hashers((3, 2))
