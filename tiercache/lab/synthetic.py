"""Traces and texts that are made up, from a seed: for what no real text shows alone.

Popularity is Zipf's: the row of rank r is asked for in proportion to 1 / r**exponent, with whatever exponent, as text has one
below 1. Ranks are drawn by inverting the continuous law, and are scattered over the table, as a hash does it.
"""

import math

import numpy as np
import numpy.typing as npt

from tiercache.lab.tokens import TokenStream
from tiercache.lab.trace import Trace

Rows = npt.NDArray[np.int64]


def zipf(num_rows: int, *, batches: int, size: int, exponent: float = 0.8, seed: int = 0) -> Trace:
    """Batches of `size` rows each, drawn independently."""
    ranks = _ranks(num_rows, batches * size, exponent, np.random.default_rng(seed))
    return _even(_scatter(ranks, num_rows, seed), size)


def shifting(
    num_rows: int, *, batches: int, size: int, exponent: float = 0.8, period: int = 100, share: float = 0.5, seed: int = 0
) -> Trace:
    """`zipf` whose popularity shifts: after each `period` batches a share of the ranks belongs to other rows,
    which may have a rank already."""
    if period < 1 or not 0 <= share <= 1:
        raise ValueError(f"period = {period}, share = {share}: allowed are a period of 1 or more and a share from 0 to 1")
    random = np.random.default_rng(seed)
    ranks = _ranks(num_rows, batches * size, exponent, random)
    phase = np.arange(ranks.size) // (size * period)
    # A rank moves with probability `share` at each shift; how often it has moved decides which row has it.
    moves = np.zeros(ranks.size, np.int64)
    for number in range(1, int(phase.max(initial=0)) + 1):
        moved = _mix(ranks, seed + number) < share
        moves += moved & (phase >= number)
    return _even(_scatter((ranks + moves * (num_rows // 7 + 1)) % num_rows, num_rows, seed), size)


def scanning(
    num_rows: int, *, batches: int, size: int, exponent: float = 0.8, every: int = 4, seed: int = 0
) -> Trace:
    """`zipf` in which every `every`-th batch is the next piece of a scan of the whole table, again and again."""
    if every < 2:
        raise ValueError(f"every = {every}: allowed are 2 and more")
    rows = zipf(num_rows, batches=batches, size=size, exponent=exponent, seed=seed).rows.reshape(batches, size)
    scans = rows[every - 1 :: every]
    scans[:] = np.arange(scans.size).reshape(scans.shape) % num_rows
    return _even(rows.reshape(-1), size)


def markov_text(num_tokens: int, *, vocabulary: int, exponent: float = 1.0, memory: float = 0.7, seed: int = 0) -> TokenStream:
    """A text whose n-grams repeat: with probability `memory` a token is the one that usually follows the one before.

    Each token has four such followers, the first twice as likely as the second, and so on; otherwise it is drawn from
    Zipf's law. Documents have 2,000 tokens. Hash it as any text.
    """
    if not 0 <= memory <= 1:
        raise ValueError(f"memory = {memory}: allowed are shares from 0 to 1")
    random = np.random.default_rng(seed)
    fresh = _scatter(_ranks(vocabulary, num_tokens, exponent, random), vocabulary, seed)
    followers = _scatter(_ranks(vocabulary, 4 * vocabulary, exponent, random), vocabulary, seed).reshape(vocabulary, 4)
    follows = random.random(num_tokens) < memory
    which = np.minimum(random.geometric(0.5, num_tokens) - 1, 3)
    tokens = fresh.copy()
    for at in np.flatnonzero(follows[1:]) + 1:
        tokens[at] = followers[tokens[at - 1], which[at]]
    documents = np.diff(np.append(np.arange(0, num_tokens, _DOCUMENT), num_tokens))
    return TokenStream(tokens, documents)


_DOCUMENT = 2000


def _ranks(num_rows: int, count: int, exponent: float, random: np.random.Generator) -> Rows:
    """int64[count] from 0, rank r with the weight of the integral of x**-exponent from r + 1 to r + 2."""
    if num_rows < 1 or not exponent >= 0:
        raise ValueError(f"num_rows = {num_rows}, exponent = {exponent}: allowed are 1 row and more, an exponent of 0 and more")
    share, end = random.random(count), num_rows + 1.0
    if exponent == 1:
        ranks = np.exp(share * math.log(end))
    else:
        power = 1 - exponent
        ranks = (1 + share * (end**power - 1)) ** (1 / power)
    return np.minimum(ranks.astype(np.int64) - 1, num_rows - 1)


def _scatter(ranks: Rows, num_rows: int, seed: int) -> Rows:
    """A row for each rank, none for two: a multiple of the rank modulo the table's size."""
    factor = 1
    if num_rows > 2:
        factor = int(np.random.default_rng(seed).integers(1, num_rows))
        while math.gcd(factor, num_rows) != 1:
            factor = factor % num_rows + 1
    if num_rows >= 1 << 31:
        return np.array([rank * factor % num_rows for rank in ranks.tolist()], np.int64)
    return ranks * factor % num_rows


def _mix(ranks: Rows, seed: int) -> npt.NDArray[np.float64]:
    """float64[n] in [0, 1): the same for the same rank and seed."""
    words = ranks.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(31)
    words *= np.uint64(0x94D049BB133111EB)
    return (words >> np.uint64(11)).astype(np.float64) / 2**53


def _even(rows: Rows, size: int) -> Trace:
    if size < 1:
        raise ValueError(f"size = {size}: allowed are batches of 1 row or more")
    return Trace(rows, np.arange(0, rows.size + 1, size, dtype=np.int64))
