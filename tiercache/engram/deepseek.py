"""DeepSeek-V4.1: the demo's hashing with orders 2 to 4, and images between the tokens.

The look-back goes over the chunks in which a sequence arrives. It ends before the start of the sequence and at a
position that is part of an image: a negative id marks it. Everything from there on back counts as the compressed pad
id. An end-of-text token ends nothing.

An image's own position reads the rows of the n-grams that are all padding: rows that exist, the same for every such
position, so that they cost one read each and no special case in whatever fetches them. They mean nothing; the model
masks them out of its gate (`tokens < 0`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy.typing as npt

from tiercache.engram.compression import Compression, to_map
from tiercache.engram.demo import compressed, draw_multipliers
from tiercache.engram.hasher import ANY_NEGATIVE
from tiercache.engram.primes import next_primes
from tiercache.engram.xor import XorHasher


@dataclass(frozen=True, kw_only=True, eq=False)
class DeepseekHasher(XorHasher):
    """Hashing of one layer. A negative token id is a position that is part of an image."""

    low: ClassVar[int] = ANY_NEGATIVE


def deepseek_hashers(
    layer_ids: Sequence[int] = (1, 14),
    *,
    compression: Compression | npt.ArrayLike | None,
    max_ngram_size: int = 4,
    vocab_size: int = 16_000_000,
    n_heads: int = 8,
    pad_token_id: int = 2,
    compressed_vocab_size: int = 99_092,
    num_embeddings: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[DeepseekHasher, ...]:
    """The hashers of all layers with a table. The arguments are the model's `engram_*` values; its own are the defaults.

    compression: a map, see tiercache.engram.compression, or its ids, int64[tokenizer's ids]; None where token ids come
    compressed.
    num_embeddings: rows of each layer's table, which are compared. Raises ValueError where a value does not fit the others.
    """
    ids = to_map(compression)
    seen: set[int] = set()
    hashers = tuple(
        DeepseekHasher(
            multipliers=draw_multipliers(compressed_vocab_size, max_ngram_size, layer, seed),
            primes=tuple(next_primes(vocab_size, n_heads, seen) for _ in range(2, max_ngram_size + 1)),
            vocabulary=compressed_vocab_size,
            pad=compressed(pad_token_id, ids),
            compression=ids,
        )
        for layer in layer_ids
    )
    sizes = [hasher.num_rows for hasher in hashers]
    if num_embeddings is not None and sizes != list(num_embeddings):
        raise ValueError(f"num_embeddings = {list(num_embeddings)}: these settings give tables of {sizes} rows")
    return hashers
