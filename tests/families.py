"""Hashers of every family, small ones and those of the released models, each with a slow oracle in Python integers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from tiercache.engram.deepseek import deepseek_hashers
from tiercache.engram.demo import demo_hashers
from tiercache.engram.hasher import Hasher
from tiercache.engram.longcat import LongcatHasher, longcat_hasher
from tiercache.engram.qwen import QwenHasher, qwen_hashers
from tiercache.engram.xor import XorHasher

COMPRESSION = np.array([*range(30), *range(29, -1, -1), *range(30, 40)])
"""Ids 0..69 to 0..39."""


class Family(NamedTuple):
    """hashers: of different look-backs, all of which take the ids in `ids`."""

    hashers: tuple[Hasher, ...]
    ids: tuple[int, ...]
    oracle: Callable[[Hasher, Sequence[int]], list[list[int]]]

    def tokens(self, max_size: int = 20) -> st.SearchStrategy[list[int]]:
        """Lists of ids, in which special ones are frequent."""
        return st.lists(st.sampled_from(self.ids), max_size=max_size)


def _demo_symbol(hasher: XorHasher, tokens: Sequence[int], at: int, back: int) -> int:
    return _compressed(hasher, tokens[at - back]) if at >= back else hasher.pad


def _deepseek_symbol(hasher: XorHasher, tokens: Sequence[int], at: int, back: int) -> int:
    seen = tokens[max(at - back, 0) : at + 1]
    return hasher.pad if at < back or min(seen) < 0 else _compressed(hasher, tokens[at - back])


def _qwen_symbol(hasher: XorHasher, tokens: Sequence[int], at: int, back: int) -> int:
    return hasher.pad if at < back or hasher.pad in tokens[at - back : at] else tokens[at - back]


def _compressed(hasher: XorHasher, token: int) -> int:
    return token if hasher.compression is None else int(hasher.compression[token])


def _xor_oracle(symbol: Callable[..., int]) -> Callable[[Hasher, Sequence[int]], list[list[int]]]:
    def rows(hasher: Hasher, tokens: Sequence[int]) -> list[list[int]]:
        assert isinstance(hasher, XorHasher)
        result = []
        for at in range(len(tokens)):
            row, base = [], 0
            for order, primes in enumerate(hasher.primes, 2):
                mix = 0
                for back in range(order):
                    mix ^= symbol(hasher, tokens, at, back) * hasher.multipliers[back]
                for prime in primes:
                    row.append(base + mix % prime)
                    base += prime
            result.append(row)
        return result

    return rows


def _longcat_oracle(hasher: Hasher, tokens: Sequence[int]) -> list[list[int]]:
    assert isinstance(hasher, LongcatHasher)
    result = []
    for at in range(len(tokens)):
        row, base = [], 0
        for embedder in range((hasher.orders - 1) * hasher.heads):
            modulus, total = hasher.ratio * hasher.vocabulary + 2 * embedder + 1, 0
            for back in range(2 + embedder // hasher.heads):
                if at < back or tokens[at - back] < 0 or (back > 0 and tokens[at - back] == hasher.eos):
                    break
                total = (total + tokens[at - back] * (hasher.vocabulary**back % modulus)) % modulus
            row.append(base + total)
            base += modulus
        result.append(row)
    return result


_small_deepseek = deepseek_hashers(
    (3,), compression=COMPRESSION, max_ngram_size=3, vocab_size=30, n_heads=3, pad_token_id=40, compressed_vocab_size=40
)
_wide_deepseek = deepseek_hashers((3,), compression=COMPRESSION, pad_token_id=40, compressed_vocab_size=40)
_small_qwen = qwen_hashers(
    (1, 2), vocab_size=50, eos_token_id=4, ngram_size=4, heads_per_ngram=3, ngram_vocab_size_base=20
)
_wide_qwen = QwenHasher(
    multipliers=qwen_hashers()[0].multipliers, primes=qwen_hashers()[0].primes, vocabulary=248_320, pad=4, stop=4
)
_small_longcat = longcat_hasher(
    vocab_size=50, eos_token_id=4, ngram_vocab_size_ratio=2, emb_neighbor_num=5, emb_split_num=3
)

FAMILIES = {
    "demo": Family(
        (
            *demo_hashers((3,), vocabulary=50, table_vocabularies=(50, 70, 90), heads=2, pad_id=7),
            *demo_hashers(vocabulary=99_092),
        ),
        (0, 1, 2, 7, 33, 49),
        _xor_oracle(_demo_symbol),
    ),
    "deepseek": Family(
        (*_small_deepseek, *_wide_deepseek), (0, 1, 5, 54, 59, 69, -1, -7), _xor_oracle(_deepseek_symbol)
    ),
    "qwen": Family((*_small_qwen, _wide_qwen), (0, 1, 4, 4, 33, 49), _xor_oracle(_qwen_symbol)),
    "longcat": Family((_small_longcat, longcat_hasher(eos_token_id=4)), (0, 1, 4, 33, 49, -1, -3), _longcat_oracle),
}
