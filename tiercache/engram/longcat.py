"""LongCat-Flash's n-gram embedding of the input: a rolling hash of the last tokens, a polynomial in the size of the vocabulary.

The head j of order n has a table of its own, of an odd number of rows m. Its row is the sum of the last n tokens, each
times the vocabulary's power of its distance modulo m, modulo m. The sum ends before the start of a sequence, at a
negative id (a position without a token), and at an end-of-text token unless that is the current one; a position without
a token reads row 0 of each head. All sums fit 64 bits, so it does not matter that only the whole is reduced.

LongCat-Flash-Lite: arXiv 2601.21204.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tiercache.engram.hasher import ANY_NEGATIVE, Hasher, Ids, Placed, check_least, checked_tensors, raise_outside
from tiercache.engram.window import ABSENT, advance, new_line, start, take
from tiercache.native import lean


@dataclass(frozen=True, kw_only=True, eq=False)
class LongcatHasher(Hasher):
    """Hashing of the input's tables, which follow one another.

    vocabulary  number of token ids
    ratio       rows of a head over the vocabulary, about
    orders      highest order N
    heads       heads H of each order 2..N
    eos         end-of-text id

    Raises ValueError where a sum of products would not fit int64.
    """

    vocabulary: int
    ratio: int
    orders: int
    heads: int
    eos: int

    def __post_init__(self) -> None:
        check_least(1, vocabulary=self.vocabulary, ratio=self.ratio, heads=self.heads)
        check_least(2, orders=self.orders)
        if not 0 <= self.eos < self.vocabulary:
            raise ValueError(f"eos = {self.eos}: allowed is 0..{self.vocabulary - 1}")
        largest = self.ratio * self.vocabulary + 2 * self.num_heads - 1
        if self.orders * (self.vocabulary - 1) * (largest - 1) >= 2**63:
            raise ValueError(f"vocabulary = {self.vocabulary}, ratio = {self.ratio}: sums would not fit 63 bits")
        # Made now, as torch's compiler cannot look into a property that is still to be computed.
        self._placed  # noqa: B018

    @property
    def num_rows(self) -> int:
        """Rows of all tables together."""
        return int(self.moduli.sum())

    @property
    def num_heads(self) -> int:
        """Rows that one token reads: (N - 1) * H."""
        return (self.orders - 1) * self.heads

    @property
    def context(self) -> int:
        """Look-back: N - 1."""
        return self.orders - 1

    @cached_property
    def moduli(self) -> Ids:
        """int64[num_heads], rows of each head."""
        return self.ratio * self.vocabulary + 2 * np.arange(self.num_heads, dtype=np.int64) + 1

    @cached_property
    def offsets(self) -> Ids:
        """int64[num_heads], first row of each head."""
        return np.cumsum(self.moduli) - self.moduli

    @cached_property
    def weights(self) -> Ids:
        """int64[N, num_heads], what a token counts at each distance: 0 where a head's order does not reach."""
        weights = np.zeros((self.orders, self.num_heads), np.int64)
        for head, modulus in enumerate(self.moduli.tolist()):
            for distance in range(head // self.heads + 2):
                weights[distance, head] = pow(self.vocabulary, distance, modulus)
        return weights

    def runs(self, tokens: Ids, lengths: Ids, previous: Ids, out: Ids) -> None:
        """See Hasher."""
        before, bounds = previous.reshape(-1), (ANY_NEGATIVE, self.vocabulary)
        arrays = self.weights, self.moduli, self.offsets, out.reshape(-1)
        line = new_line(self.context)
        bad = _hash_runs(tokens, lengths, before, line, *bounds, self.eos, _NO_COMPRESSION, *arrays)
        raise_outside(bad, tokens, before, *bounds)

    def torch_rows(self, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """See Hasher."""
        ids = checked_tensors(tokens, previous, self.context, self.vocabulary, ANY_NEGATIVE)
        weights, moduli, offsets = self._placed.on(ids.device)
        first, last = self.context, ids.shape[1]
        ended = ids[:, first:] < 0
        total = torch.where(ended, 0, ids[:, first:])[..., None] * weights[0]
        for distance in range(1, self.orders):
            token = ids[:, first - distance : last - distance]
            ended = ended | (token < 0) | (token == self.eos)
            total = total + torch.where(ended, 0, token)[..., None] * weights[distance]
        return total % moduli + offsets

    @cached_property
    def _placed(self) -> Placed:
        return Placed(self.weights, self.moduli, self.offsets)


def longcat_hasher(
    *,
    eos_token_id: int,
    vocab_size: int = 131_072,
    ngram_vocab_size_ratio: int = 78,
    emb_neighbor_num: int = 4,
    emb_split_num: int = 4,
) -> LongcatHasher:
    """The hasher of a model's input embedding. The arguments are the model's config; its own values are the defaults."""
    check_least(0, eos_token_id=eos_token_id)
    return LongcatHasher(
        vocabulary=vocab_size,
        ratio=ngram_vocab_size_ratio,
        orders=emb_neighbor_num,
        heads=emb_split_num,
        eos=eos_token_id,
    )


_NO_COMPRESSION = np.empty(0, np.int32)


@lean
def _write(line: Any, count: int, weights: Any, moduli: Any, offsets: Any, out: Any, place: int) -> None:
    """Write the rows of a line's tokens to out[place:]."""
    orders, num_heads = weights.shape
    for at in range(orders - 1, orders - 1 + count):
        for head in range(num_heads):
            total = line[at] * weights[0, head]
            for distance in range(1, orders):
                total += line[at - distance] * weights[distance, head]
            out[place + head] = total % moduli[head] + offsets[head]
        place += num_heads


@lean
def _hash_runs(
    tokens: Any,
    lengths: Any,
    previous: Any,
    line: Any,
    low: int,
    num_ids: int,
    eos: int,
    compression: Any,
    weights: Any,
    moduli: Any,
    offsets: Any,
    out: Any,
) -> int:
    """As `Hasher.runs` says; `previous` and `out` are flat.

    Returns the position of an id outside the vocabulary, -1 if there is none; positions in `previous` follow the tokens'.
    """
    context, num_previous = weights.shape[0] - 1, previous.size // max(lengths.size, 1)
    begin = 0
    for run in range(lengths.size):
        past, end = run * num_previous, begin + lengths[run]
        came = start(line, context, previous, past, past + num_previous, low, num_ids, eos, 0, compression)
        if came < past + num_previous:
            return tokens.size + came
        last = previous[came - 1] if num_previous else ABSENT
        while begin < end:
            count = take(line, context, tokens, begin, end, last, low, num_ids, eos, 0, compression)
            if count == 0:
                return begin
            _write(line, count, weights, moduli, offsets, out, begin * moduli.size)
            advance(line, context, count)
            begin += count
            last = tokens[begin - 1]
    return -1
