"""Qwen4Exp's per-layer n-gram embedding (PLE): token ids as they are, and texts that end at an end-of-text token.

What lies before the start of a sequence, or behind an end-of-text token as seen from a later one, counts as the
end-of-text id. Such a token is itself the last of its text. Multipliers are drawn by splitmix64, by the layer's place
among those with a table. The table is padded with rows that nothing reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from tiercache.engram.hasher import check_least
from tiercache.engram.primes import primes_from
from tiercache.engram.xor import XorHasher

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True, eq=False)
class QwenHasher(XorHasher):
    """Hashing of one layer. divisible_by: the table's rows are padded to a multiple of it."""

    divisible_by: int = 128

    def __post_init__(self) -> None:
        check_least(1, divisible_by=self.divisible_by)
        super().__post_init__()

    @cached_property
    def num_rows(self) -> int:
        """Rows of the table, padding included."""
        return -(-sum(map(sum, self.primes)) // self.divisible_by) * self.divisible_by


def qwen_hashers(
    ple_layer_ids: Sequence[int] = (2,),
    *,
    vocab_size: int = 248_320,
    eos_token_id: int = 248_044,
    ngram_size: int = 3,
    heads_per_ngram: int = 8,
    ngram_vocab_size_base: int = 20_000_000,
    make_ngram_vocab_size_divisible_by: int = 128,
    seed: int = 1234,
) -> tuple[QwenHasher, ...]:
    """The hashers of all layers with a table. The arguments are the model's config; its own values are the defaults.

    ple_layer_ids: ascending, as the model sorts them. Only their number matters.
    """
    check_least(0, eos_token_id=eos_token_id)
    check_least(1, vocab_size=vocab_size, make_ngram_vocab_size_divisible_by=make_ngram_vocab_size_divisible_by)
    if list(ple_layer_ids) != sorted(set(ple_layer_ids)):
        raise ValueError(f"ple_layer_ids = {list(ple_layer_ids)}: allowed are ascending numbers")
    primes = primes_from(ngram_vocab_size_base)
    return tuple(
        QwenHasher(
            multipliers=_multipliers(vocab_size, ngram_size, place, seed),
            primes=tuple(tuple(islice(primes, heads_per_ngram)) for _ in range(2, ngram_size + 1)),
            vocabulary=vocab_size,
            pad=eos_token_id,
            stop=eos_token_id,
            divisible_by=make_ngram_vocab_size_divisible_by,
        )
        for place in range(len(ple_layer_ids))
    )


def _multipliers(vocabulary: int, count: int, place: int, seed: int) -> tuple[int, ...]:
    """Odd numbers whose product with any token id fits int64."""
    half = max(1, (2**63 - 1) // vocabulary // 2)
    base = seed + 10_007 * place
    return tuple(2 * (_splitmix64(base + _GOLDEN * (distance + 1)) % half) + 1 for distance in range(count))


def _splitmix64(state: int) -> int:
    """The number that splitmix64 gives next in this state."""
    state = (state + _GOLDEN) & _WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
    return state ^ (state >> 31)
