"""Samples of traces: the uses of some rows, which a smaller tier serves about as the tier serves all of them.

A row is in the sample if its hash says so, with all its uses, and a tier of `rate * capacity` slots over the sample has about
the hit rate of one of `capacity` slots over the trace. The rows of an n-gram's heads are hashed apart, so that the sample has
one head here and one there of many n-grams: that is as good as a sample of that many n-grams, and better than one of whole
n-grams, whose heads tell the same eight times. What the sample has too many or too few of, as a hot row is in it or not, is
known, and is taken for hits of any size (SHARDS-adj).

Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.curve import hash_of
from tiercache.index import tag_of
from tiercache.lab.bounds import Bounds
from tiercache.lab.distances import lru_hits
from tiercache.lab.simulator import Counts
from tiercache.native import jit


class Sample(NamedTuple):
    """rows, offsets: the trace of the sampled rows, offsets None for batches of one row. rate: share of all rows that may be
    sampled. accesses: uses of sampled rows that were to be expected, each a distinct row of a batch.
    """

    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64] | None
    rate: float
    accesses: float

    def slots(self, capacity: int) -> int:
        """Slots over the sample that stand for `capacity` slots over the trace."""
        return scaled(capacity, self.rate)

    def adjusted(self, counts: Counts) -> Counts:
        """Counts of a policy over the sample, as of the accesses that were to be expected."""
        accesses = round(self.accesses)
        hits = min(max(counts.hits + accesses - counts.accesses, 0), accesses)
        return Counts(accesses, hits, accesses - hits, counts.bypasses)

    def adjusted_bounds(self, bounds: Bounds) -> Bounds:
        """The same for bounds."""
        accesses = round(self.accesses)
        hits = (min(max(each + accesses - bounds.accesses, 0), accesses) for each in bounds[1:])
        return Bounds(accesses, *hits)


def sample(rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64] | None = None, *, rate: float) -> Sample:
    """A share `rate` of all rows that there may be, with all their uses. rows, offsets: a trace, as for `simulate`.

    Always the same sample of the same trace. Raises ValueError for a rate that is not above 0 and at most 1.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate = {rate!r}: allowed are shares above 0, up to 1")
    limit = limit_of(rate)
    rate = limit / 2**32
    accesses = rows.size if offsets is None else num_accesses(rows, offsets)
    if limit == 2**32:
        return Sample(rows, offsets, 1.0, float(accesses))
    chosen = choose(rows, limit)
    kept = None if offsets is None else np.searchsorted(chosen, offsets)
    return Sample(rows[chosen], kept, rate, rate * accesses)


def scaled(slots: int, rate: float) -> int:
    """Slots over a sample that stand for `slots` over the trace; at least one."""
    return max(1, round(rate * slots))


def limit_of(rate: float) -> int:
    """Rows whose hash is below this are sampled."""
    return max(1, round(rate * 2**32))


class LruCurve(NamedTuple):
    """Hit rate of LRU at every capacity.

    hits float64[s + 1]: at as many slots over the sample as its index says; accesses, rate: as in Sample.
    """

    hits: npt.NDArray[np.float64]
    accesses: float
    rate: float

    def hit_rate(self, capacities: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Share of accesses that are hits at these capacities, in slots: float64 of their shape."""
        slots = np.asarray(capacities, np.float64) * self.rate
        return np.interp(slots, np.arange(self.hits.size), self.hits) / max(self.accesses, 1e-300)


def lru_curve(rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64] | None = None, *, rate: float = 1.0) -> LruCurve:
    """The curve of LRU over a trace, exact, or of a sample where rate is below 1. What is counted: see `lru_hits`."""
    sampled = sample(rows, offsets, rate=rate)
    hits = lru_hits(sampled.rows, sampled.offsets)
    uses = sampled.rows.size if sampled.offsets is None else num_accesses(sampled.rows, sampled.offsets)
    adjusted = np.clip(hits + (sampled.accesses - uses), 0, sampled.accesses)
    adjusted[0] = 0
    return LruCurve(adjusted, sampled.accesses, sampled.rate)


@jit
def choose(rows: Any, limit: int) -> Any:
    """Positions of the rows whose hash is below a limit, ascending: int64[m]."""
    count = 0
    for i in range(rows.size):
        count += hash_of(rows[i]) < limit
    chosen = np.empty(count, np.int64)
    at = 0
    for i in range(rows.size):
        if hash_of(rows[i]) < limit:
            chosen[at] = i
            at += 1
    return chosen


def num_accesses(rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> int:
    """Distinct rows of each batch, summed."""
    return int(distinct_rows(rows, offsets).sum())


@jit
def distinct_rows(rows: Any, offsets: Any) -> Any:
    """Distinct rows of each batch: int64[b]."""
    longest = 1
    for b in range(offsets.size - 1):
        longest = max(longest, offsets[b + 1] - offsets[b])
    size = 2
    while size < 2 * longest:
        size *= 2
    seen = np.empty(size, np.int64)
    batch = np.full(size, -1, np.int64)
    counts = np.zeros(offsets.size - 1, np.int64)
    for b in range(offsets.size - 1):
        for i in range(offsets[b], offsets[b + 1]):
            at = tag_of(rows[i]) & (size - 1)
            while batch[at] == b and seen[at] != rows[i]:
                at = (at + 1) & (size - 1)
            if batch[at] != b:
                batch[at] = b
                seen[at] = rows[i]
                counts[b] += 1
    return counts
