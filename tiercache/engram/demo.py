"""Engram as its paper's demo hashes: compressed token ids, one document, primes that no head of any layer shares.

What lies before the start of a sequence counts as the compressed pad id; nothing else ends the look-back.

Cheng et al., "Conditional Memory via Scalable Lookup", arXiv 2601.07372.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiercache.engram.compression import Compression, to_map
from tiercache.engram.hasher import check_least
from tiercache.engram.primes import next_primes
from tiercache.engram.xor import XorHasher


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoHasher(XorHasher):
    """Hashing of one layer."""


def demo_hashers(
    layers: Sequence[int] = (1, 15),
    *,
    vocabulary: int,
    table_vocabularies: Sequence[int] = (646_400, 646_400),
    heads: int = 8,
    pad_id: int = 2,
    seed: int = 0,
    compression: Compression | npt.ArrayLike | None = None,
) -> tuple[DemoHasher, ...]:
    """The hashers of all layers with a table, in the order given; no prime serves twice, so the order matters.

    vocabulary: number of compressed ids. table_vocabularies: a head's size in rows, about, for each order 2..N.
    pad_id: before compression. compression: a map, or its ids, int64[tokenizer's ids].
    """
    ids = to_map(compression)
    seen: set[int] = set()
    return tuple(
        DemoHasher(
            multipliers=draw_multipliers(vocabulary, len(table_vocabularies) + 1, layer, seed),
            primes=tuple(next_primes(size, heads, seen) for size in table_vocabularies),
            vocabulary=vocabulary,
            pad=compressed(pad_id, ids),
            compression=ids,
        )
        for layer in layers
    )


def fit_hasher(num_rows: int, *, vocabulary: int, layer: int = 1) -> DemoHasher:
    """The demo's hashing of 2- and 3-grams with heads as large as a table of `num_rows` rows allows.

    Raises ValueError for a table of less than some hundred rows.
    """
    size = num_rows // 16
    while size > 1:
        (hasher,) = demo_hashers((layer,), vocabulary=vocabulary, table_vocabularies=(size, size))
        excess = hasher.num_rows - num_rows
        if excess <= 0:
            return hasher
        size -= -(-excess // 16)
    raise ValueError(f"num_rows = {num_rows}: 16 different primes do not fit")


def draw_multipliers(vocabulary: int, count: int, layer: int, seed: int) -> tuple[int, ...]:
    """Odd numbers whose product with any symbol fits int64, drawn by numpy's generator (PCG64)."""
    check_least(1, vocabulary=vocabulary)
    half = max(1, (2**63 - 1) // vocabulary // 2)
    drawn = np.random.default_rng(seed + 10_007 * layer).integers(0, half, count, np.int64)
    return tuple(2 * int(number) + 1 for number in drawn)


def compressed(token: int, compression: npt.NDArray[np.int64] | None) -> int:
    """A token's symbol."""
    if compression is None:
        return token
    if not 0 <= token < compression.size:
        raise ValueError(f"pad id {token}: allowed is 0..{compression.size - 1}")
    return int(compression[token])
