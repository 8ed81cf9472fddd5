"""Row numbers of a text's suffix n-grams, by the hashing of the Engram paper's demo.

Position t has one n-gram of each order 2..N that ends there. An n-gram is mixed into one integer, the exclusive or of
each token's product with an odd multiplier of its distance, and each head of the order takes that integer modulo a
prime of its own. The heads' ranges follow one another in one table. Tokens before the start of a document count as the
pad id.

Cheng et al., "Conditional Memory via Scalable Lookup", arXiv 2601.07372.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.native import jit


@dataclass(frozen=True, kw_only=True)
class NgramHasher:
    """Hashing of one layer. Pure and thread-safe.

    multipliers  one odd integer a distance, this token's first; its length is the highest order N
    primes       rows of each head, one tuple an order 2..N, all of one length H
    vocabulary   number of token ids after compression; multipliers are such that no product overflows
    pad_id       token before the start of a document, compressed
    compression  int64[tokenizer's ids], id to compressed id; None where token ids come compressed or the table has none
    """

    multipliers: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]
    vocabulary: int
    pad_id: int
    compression: npt.NDArray[np.int64] | None = None

    @cached_property
    def num_rows(self) -> int:
        """Rows of the table: the sum of all primes."""
        return sum(map(sum, self.primes))

    @cached_property
    def num_heads(self) -> int:
        """Rows that one token reads: (N - 1) * H."""
        return sum(map(len, self.primes))

    @cached_property
    def moduli(self) -> npt.NDArray[np.int64]:
        """int64[N - 1, H], the primes."""
        return np.array(self.primes, np.int64)

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64[N - 1, H], first row of each head."""
        ends = np.cumsum(self.moduli.ravel())
        return (ends - self.moduli.ravel()).reshape(self.moduli.shape)

    def rows(
        self,
        tokens: npt.ArrayLike,
        documents: npt.ArrayLike | None = None,
        previous: npt.ArrayLike = (),
    ) -> npt.NDArray[np.int64]:
        """Rows of each position: int64[T, (N - 1) * H], all heads of order 2, then of order 3, and so on.

        tokens: integers [T]. documents: integers [D], the documents' lengths, which sum to T; None for one document.
        previous: the tokens that came before in the first document, oldest first; all but the last N - 1 are ignored,
        so that a text hashed in chunks gives the rows of the whole. Raises ValueError for an id outside the vocabulary.
        """
        before = _ids(previous)[-len(self.multipliers) + 1 :]
        ids = np.concatenate([before, _ids(tokens)])
        lengths = np.array([ids.size], np.int64)
        if documents is not None:
            lengths = _ids(documents).copy()
            if (lengths < 0).any() or lengths.sum() != ids.size - before.size:
                raise ValueError(f"documents of {lengths.sum()} tokens for {ids.size - before.size} tokens")
            if lengths.size:
                lengths[0] += before.size
        ids = self._compress(ids)
        out = np.empty((ids.size, self.num_heads), np.int64)
        multipliers = np.array(self.multipliers, np.int64)
        _hash(ids, lengths, self.pad_id, multipliers, self.moduli, self.offsets, out)
        return out[before.size :]

    def _compress(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        num_ids = self.vocabulary if self.compression is None else self.compression.size
        outside = np.flatnonzero((ids < 0) | (ids >= num_ids))
        if outside.size:
            raise ValueError(f"token id {ids[outside[0]]} is outside 0..{num_ids - 1}")
        return ids if self.compression is None else self.compression[ids]


def demo_hashers(
    layers: Sequence[int] = (1, 15),
    *,
    vocabulary: int,
    table_vocabularies: Sequence[int] = (646_400, 646_400),
    heads: int = 8,
    pad_id: int = 2,
    seed: int = 0,
    compression: npt.NDArray[np.int64] | None = None,
) -> tuple[NgramHasher, ...]:
    """The hashers of all layers with a table, in the order given; no prime serves twice, so the order matters.

    vocabulary: number of compressed ids. table_vocabularies: a head's size in rows, about, for each order 2..N.
    pad_id: before compression.
    """
    seen: set[int] = set()
    pad = pad_id if compression is None else int(compression[pad_id])
    return tuple(
        NgramHasher(
            multipliers=_multipliers(vocabulary, len(table_vocabularies) + 1, seed + 10_007 * layer),
            primes=tuple(_primes_from(size, heads, seen) for size in table_vocabularies),
            vocabulary=vocabulary,
            pad_id=pad,
            compression=compression,
        )
        for layer in layers
    )


def fit_hasher(num_rows: int, *, vocabulary: int, layer: int = 1) -> NgramHasher:
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


def _multipliers(vocabulary: int, count: int, seed: int) -> tuple[int, ...]:
    half = max(1, (2**63 - 1) // vocabulary // 2)
    drawn = np.random.default_rng(seed).integers(0, half, count, np.int64)
    return tuple(2 * int(number) + 1 for number in drawn)


def _primes_from(first: int, count: int, seen: set[int]) -> tuple[int, ...]:
    """The `count` smallest primes from `first` up that are not in `seen`; adds them to it."""
    primes: list[int] = []
    candidate = first
    while len(primes) < count:
        if candidate not in seen and _is_prime(candidate):
            primes.append(candidate)
        candidate += 1
    seen.update(primes)
    return tuple(primes)


def _is_prime(number: int) -> bool:
    if number < 4:
        return number > 1
    return number % 2 == 1 and all(number % divisor for divisor in range(3, int(number**0.5) + 2, 2))


def _ids(values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"expected one dimension, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"expected integers, got {array.dtype}")
    return array.astype(np.int64)


@jit
def _hash(ids: Any, lengths: Any, pad: int, multipliers: Any, moduli: Any, offsets: Any, out: Any) -> None:
    num_orders, heads = moduli.shape
    start = 0
    for length in lengths:
        stop = start + length
        for t in range(start, stop):
            mix = ids[t] * multipliers[0]
            for order in range(num_orders):
                past = t - order - 1
                token = ids[past] if past >= start else pad
                mix ^= token * multipliers[order + 1]
                for head in range(heads):
                    out[t, order * heads + head] = mix % moduli[order, head] + offsets[order, head]
        start = stop
