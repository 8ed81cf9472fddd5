"""LRU at every capacity, from one pass over a trace.

LRU of capacity c holds the c rows that were used last. So a use is a hit from the capacity on that its row's place in the order
of use says, and a histogram of these places, the stack distances, is the whole curve.

Each use has a time, and a row's place is the number of times since its last use that are some row's last use: all of them,
but for those that a later use of their row has made void, which a Fenwick tree over time counts. When the tree is full, what is
void is left out and the times are moved together, in a larger tree where they fill more than half: O(log n) a use, n distinct
rows.

Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.native import jit

_SMALLEST = 1 << 12
"""Times of the first tree."""

_DIRECT = 8
"""Row numbers a use up to which they are taken as they are; sparser ones are numbered first, by sorting."""

_NEVER, _ONLY_NOW = -1, -2


def lru_hits(rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
    """Hits of LRU at each capacity from 0 to that of all distinct rows: int64[u + 1], from an empty start.

    rows: int64[n], not negative. offsets: int64[b + 1], batch i is rows[offsets[i] : offsets[i + 1]]; None for batches of one
    row, for which this is what "lru" counts when it is simulated.

    Of a batch each distinct row counts once. It is a hit where it was among the rows used last before the batch began, and
    the batch's rows count as used in first-seen order. A level tells its policy of a batch's hits before its misses, and which
    is which depends on the capacity: there a row may come to leave earlier or later by less than a batch.
    """
    if not rows.size:
        return np.zeros(1, np.int64)
    number, count = _numbered(rows)
    batches = np.arange(rows.size + 1, dtype=np.int64) if offsets is None else offsets
    places, distinct = histogram(number, batches, count)
    return np.cumsum(places[: distinct + 1])


def _numbered(rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """(a number for each row, how many numbers there may be)."""
    most = int(rows.max()) + 1
    if most <= _DIRECT * rows.size:
        return rows, most
    distinct, number = np.unique(rows, return_inverse=True)
    return number, distinct.size


@jit
def histogram(number: Any, offsets: Any, count: int) -> tuple[Any, int]:
    """(int64[count + 1], uses by place in the order of use, from 1; distinct rows). number: int64[n], below `count`.

    `last` has the time of each row's last use; while a batch is under way, `-3 - time` for its rows, or what says never.
    """
    places = np.zeros(count + 1, np.int64)
    last = np.full(count, _NEVER, np.int32)
    void = np.zeros(_SMALLEST + 1, np.int32)
    row_at = np.empty(_SMALLEST, np.int32)
    now = num_void = 0
    for b in range(offsets.size - 1):
        begin, end = offsets[b], offsets[b + 1]
        if now + end - begin > row_at.size:
            row_at = together(row_at, last, now, now - num_void + end - begin)
            void = np.zeros(row_at.size + 1, np.int32)
            now, num_void = now - num_void, 0
        start = now
        for i in range(begin, end):
            time = last[number[i]]
            if time >= 0:
                places[start - time - (num_void - before(void, time))] += 1
                last[number[i]] = -3 - time
            elif time == _NEVER:
                last[number[i]] = _ONLY_NOW
        for i in range(begin, end):
            time = last[number[i]]
            if time >= start:
                continue
            if time != _ONLY_NOW:
                count_void(void, -3 - time)
                num_void += 1
            last[number[i]] = now
            row_at[now] = number[i]
            now += 1
    return places, now - num_void


@jit
def together(row_at: Any, last: Any, now: int, wanted: int) -> Any:
    """The row of each time, without the void times of those before `now`; room for twice the `wanted` times."""
    size = row_at.size
    while size < 2 * wanted:
        size *= 2
    moved = np.empty(size, np.int32)
    time = 0
    for old in range(now):
        row = row_at[old]
        if last[row] == old:
            moved[time] = row
            last[row] = time
            time += 1
    return moved


@jit
def before(void: Any, time: int) -> int:
    """Void times before this one."""
    total = 0
    i = time
    while i > 0:
        total += void[i]
        i &= i - 1
    return total


@jit
def count_void(void: Any, time: int) -> None:
    """A time is void from now on."""
    i = time + 1
    while i < void.size:
        void[i] += 1
        i += i & -i
