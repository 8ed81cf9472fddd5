"""The working set over time: what each window of a trace asks for, and how much of it was never asked for before."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.lab.bounds import Uses
from tiercache.native import jit


class Windows(NamedTuple):
    """A trace in windows of about as many accesses each, all int64[w].

    batches   the batch behind each window's last
    accesses  distinct rows of each batch, summed
    distinct  rows of the window
    fresh     those of them that no window before has asked for
    """

    batches: npt.NDArray[np.int64]
    accesses: npt.NDArray[np.int64]
    distinct: npt.NDArray[np.int64]
    fresh: npt.NDArray[np.int64]

    @property
    def cumulative(self) -> npt.NDArray[np.int64]:
        """int64[w]: rows that were asked for until the end of each window."""
        return np.cumsum(self.fresh)


def windows(uses: Uses, count: int = 64) -> Windows:
    """At most `count` windows; a batch is whole in one, so that there may be fewer. Exact, in one pass."""
    total = uses.number.size
    wanted = np.arange(1, count + 1, dtype=np.int64) * total // max(count, 1)
    batches = np.unique(np.searchsorted(uses.offsets, wanted, side="left"))
    batches = batches[batches > 0]
    ends = uses.offsets[batches]
    keep = np.diff(ends, prepend=0) > 0
    batches, ends = batches[keep], ends[keep]
    distinct, fresh = _count(uses.number, ends, uses.rows.size)
    return Windows(batches, np.diff(ends, prepend=0), distinct, fresh)


@jit
def _count(number: Any, ends: Any, num_rows: int) -> Any:
    """(distinct rows, rows never seen before) of each window; number: int64[n], below `num_rows`."""
    last = np.full(num_rows, -1, np.int64)
    distinct, fresh = np.zeros(ends.size, np.int64), np.zeros(ends.size, np.int64)
    begin = 0
    for window in range(ends.size):
        for i in range(begin, ends[window]):
            row = number[i]
            if last[row] != window:
                distinct[window] += 1
                fresh[window] += last[row] < 0
                last[row] = window
        begin = ends[window]
    return distinct, fresh
