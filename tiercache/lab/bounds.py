"""What no policy can beat on a trace, each bound with knowledge that a policy does not have.

Belady knows the future: after each batch it keeps, of what it had and what the batch brought, the rows that are needed
again soonest. Nothing that serves a batch from what was resident before it, and may keep rows out, has more hits.
Static-optimal knows the totals: it holds the rows with the most uses, each from its first use on. Unbounded holds all.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
"""

import heapq
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.lab.trace import Trace
from tiercache.native import jit

_NEVER = 2**31 - 1


class Bounds(NamedTuple):
    """Hits of each bound at one capacity, of so many accesses (distinct rows of a batch)."""

    accesses: int
    belady: int
    static: int
    unbounded: int


class Uses(NamedTuple):
    """The uses of a trace: one a distinct row of each batch, in the order of the batches.

    rows    int64[u]      distinct rows, ascending; a row's place here is its number below
    number  int64[n]      row of each use
    again   int64[n]      batch of the same row's next use, or 2**31 - 1
    offsets int64[b + 1]  batch i has the uses offsets[i] : offsets[i + 1]
    """

    rows: npt.NDArray[np.int64]
    number: npt.NDArray[np.int64]
    again: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """int64[u], uses of each row."""
        return np.bincount(self.number, minlength=self.rows.size)

    def hottest(self, num_rows: int) -> npt.NDArray[np.int64]:
        """The rows with the most uses, most used first, at most so many."""
        return self.rows[np.argsort(-self.counts, kind="stable")[:num_rows]]


def uses_of(trace: Trace) -> Uses:
    """Costs two sorts of the trace. Good for the bounds at every capacity."""
    batch = np.repeat(np.arange(trace.num_batches), np.diff(trace.offsets))
    order = np.argsort(trace.rows, kind="stable")
    rows, batch = trace.rows[order], batch[order]
    first = np.diff(rows, prepend=-1) != 0
    kept = first | (np.diff(batch, prepend=-1) != 0)
    rows, batch, first = rows[kept], batch[kept], first[kept]
    again = np.where(np.append(first[1:], True), _NEVER, np.append(batch[1:], 0))
    by_batch = np.argsort(batch, kind="stable")
    offsets = np.searchsorted(batch[by_batch], np.arange(trace.num_batches + 1))
    return Uses(rows[first], (np.cumsum(first) - 1)[by_batch], again[by_batch], offsets)


def bounds(capacity: int, uses: Uses) -> Bounds:
    """All three for a tier of `capacity` rows that starts empty."""
    held = np.sort(uses.counts)[::-1][:capacity]
    belady = _belady(uses.number, uses.again, uses.offsets, uses.rows.size, capacity)
    accesses = uses.number.size
    return Bounds(accesses, belady, int((held - 1).sum()), accesses - uses.rows.size)


@jit
def _belady(number: Any, again: Any, offsets: Any, num_rows: int, capacity: int) -> int:
    """Hits of the best choice. The heap has the farthest next use on top, and below it uses that are over."""
    due = np.full(num_rows, -1, np.int64)
    heap = [np.int64(0)]
    heap.clear()
    hits = held = 0
    for batch in range(offsets.size - 1):
        for i in range(offsets[batch], offsets[batch + 1]):
            row = number[i]
            if due[row] >= 0:
                hits += 1
                held -= 1
            due[row] = -1
            if again[i] != _NEVER:
                due[row] = again[i]
                held += 1
                heapq.heappush(heap, -((again[i] << 32) | row))
        while held > capacity:
            farthest = -heapq.heappop(heap)
            row = farthest & 0xFFFFFFFF
            if due[row] == farthest >> 32:
                due[row] = -1
                held -= 1
    return hits
