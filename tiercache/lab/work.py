"""What tiers of some size leave to be done: a config's levels plan a trace, and what each batch lacks is counted.

A tier that begins empty is of no interest to who buys it: the first part of a trace fills the tiers, and only the rest counts.

Of a long trace a sample of its rows is planned (`sampling`). It tells which share of the rows asked for misses, and not which
batch they are of: a fetch of ten rows that misses one waits, and one that misses none does not. So batches are taken together
that are about as large, and of each such class it is assumed that rows miss independently of each other. Nearby rows share
reads. A sample has them apart, so its row numbers are drawn together by the rate before reads are counted: then as many lie
near each other as in the trace.
"""

from collections.abc import Sequence
from math import exp, lgamma, log
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.config import StoreConfig
from tiercache.lab.model import Numbers, Work
from tiercache.lab.sampling import distinct_rows, sample
from tiercache.lab.tiers import Levels, levels_of
from tiercache.lab.trace import Trace
from tiercache.level import PLAN_HITS, PLAN_MISSES, new_plan
from tiercache.recording.blocks import RecordedTable
from tiercache.stack import StackPlan, plan_stack
from tiercache.storage.checksum import PAGE_BYTES
from tiercache.storage.reads import Files, Layout, bounce_bytes, count_reads, longest_piece, new_layout
from tiercache.storage.table import FileTable

_MOST_ROWS, _MOST_BATCHES = 2_000_000, 100_000
"""Of a trace that is planned as it is; a simulation then takes some seconds."""

_MOST_MISSES = 64
"""Up to so many expected misses a batch, each number of them is looked at; beyond, their mean."""


class Asked(NamedTuple):
    """A trace, made ready to be planned by many tiers.

    trace      the rows that are planned, of the store, in batches as far as they have such rows
    rate       share of all row numbers that are planned
    number     int64[b], which of all batches each planned one is
    rows       int64[B], rows of each batch of the whole trace; distinct int64[B], without duplicates
    first      the first batch that counts
    accesses   distinct rows of the batches that count, summed
    first_uses how many of these are of rows that no batch before asked for: no tier can have them
    touched    distinct rows of the whole trace, about
    """

    trace: Trace
    rate: float
    number: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    distinct: npt.NDArray[np.int64]
    first: int
    accesses: int
    first_uses: float
    touched: int


def ask(trace: Trace, *, warm_up: float = 0.5, rate: float | None = None) -> Asked:
    """Make a trace ready. warm_up: share of its rows that only fill the tiers. rate: share of its row numbers that are planned;
    where not given all, or as many as make a simulation take some seconds.

    ValueError where no batch is left to count.
    """
    rows, distinct = np.diff(trace.offsets), distinct_rows(*trace)
    first = int(np.searchsorted(trace.offsets[:-1], warm_up * trace.rows.size))
    if not rows[first:].sum():
        raise ValueError(f"warm_up = {warm_up}: leaves no batch to count of {trace.num_batches}")
    if rate is None:
        rate = min(1.0, _MOST_ROWS / trace.rows.size, _MOST_BATCHES / max(int(np.count_nonzero(rows)), 1))
    part = sample(*trace, rate=rate)
    assert part.offsets is not None
    sizes = np.diff(part.offsets)
    number = np.flatnonzero(sizes)
    planned = Trace(part.rows, np.append(0, np.cumsum(sizes[number])))
    known, at = np.unique(planned.rows, return_index=True)
    begin = planned.offsets[np.searchsorted(number, first)]
    return Asked(
        planned,
        part.rate,
        number,
        rows,
        distinct,
        first,
        int(distinct[first:].sum()),
        np.count_nonzero(at >= begin) / part.rate,
        round(known.size / part.rate),
    )


class ReadCounter:
    """How many reads bring rows of a store of these tables, whose reads are aligned to so many bytes, and their bytes.

    Rows of a sample of this rate are drawn together, so that the numbers are those of the sample's rows among all.
    """

    def __init__(self, tables: Sequence[FileTable], alignment: int, *, verify: bool = False, rate: float = 1.0) -> None:
        num_files = sum(len(table.files) for table in tables)
        nothing = np.zeros(num_files, np.int64)
        self._files = Files(nothing, nothing, nothing, nothing)
        self._alignment = max(alignment, PAGE_BYTES) if verify else alignment
        self._longest = bounce_bytes(longest_piece(tables), alignment)
        self._rate = rate
        self._ends = np.cumsum([table.num_rows for table in tables])
        self._layouts: list[Layout] = []
        first_file = 0
        for table in tables:
            self._layouts.append(new_layout(table, first_file))
            first_file += len(table.files)

    def count(self, rows: npt.NDArray[np.int64]) -> tuple[int, int]:
        """(reads, bytes) for distinct rows of one table, as rows of the store."""
        which = int(np.searchsorted(self._ends, rows[0], "right"))
        local = rows - (self._ends[which - 1] if which else 0)
        if self._rate < 1:
            local = (local * self._rate).astype(np.int64)
        return count_reads(self._layouts[which], self._files, local, self._alignment, self._longest)


def work_of(
    config: StoreConfig,
    tables: Sequence[RecordedTable],
    asked: Asked,
    reads: ReadCounter | None,
) -> Work:
    """What the tiers of a config leave to be done of the batches that count. ConfigError as from `simulate_tiers`.

    reads: for a sample of the rate of `asked`; without one each row missed is a read, of no bytes.
    """
    levels = levels_of(config, tables, rate=asked.rate)
    lacks = np.zeros((asked.trace.num_batches, 4))  # below, misses, reads, bytes
    begin = int(np.searchsorted(asked.number, asked.first))
    plan = _plan_host if levels.device is None else _plan_both
    for batch, rows in enumerate(asked.trace.batches()):
        below, misses = plan(levels, rows)
        if batch >= begin:
            lacks[batch, :2] = below, misses.size
            if misses.size:
                lacks[batch, 2:] = (misses.size, 0) if reads is None else reads.count(misses)
    if asked.rate < 1:
        return _of_classes(asked, begin, lacks)
    all_lacks = np.zeros((asked.rows.size, 4))
    all_lacks[asked.number] = lacks
    below, missed, requests, num_bytes = all_lacks[asked.first :].T
    rows_asked = asked.rows[asked.first :].astype(np.float64)
    return Work(np.ones(rows_asked.size), rows_asked, below, missed, requests, num_bytes)


def _plan_host(levels: Levels, rows: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int64]]:
    """(0, rows that no tier has) of a batch."""
    plan = new_plan(rows.size)
    if not levels.host.plan_into(plan, rows, 0, idly=True):
        levels.host.release(plan)
    return 0, plan.misses


def _plan_both(levels: Levels, rows: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int64]]:
    """(rows that only the host tier has, rows that no tier has) of a batch."""
    assert levels.device is not None
    plan = StackPlan(rows.size, above=True)
    if not plan_stack(levels.device, levels.host, plan, rows, 0, levels.most, idly=True):
        assert plan.above is not None
        levels.device.release(plan.above)
        levels.host.release(plan.below)
    return int(plan.below.counts[PLAN_HITS]), plan.below.all_misses[: plan.below.counts[PLAN_MISSES]]


def _of_classes(asked: Asked, begin: int, lacks: Numbers) -> Work:
    """What a sample lacks, as of all batches that count: by classes of batches of about the same size."""
    distinct, rows = asked.distinct[asked.first :], asked.rows[asked.first :]
    size = _class_of(distinct)
    sampled = _class_of(asked.distinct[asked.number[begin:]])
    parts = []
    for each in np.unique(size[distinct > 0]):
        inside = size == each
        accesses, batches = int(distinct[inside].sum()), int(np.count_nonzero(inside))
        below, misses, reads, num_bytes = lacks[begin:][sampled == each].sum(axis=0)
        # Uses that the sample has too many or too few of are those of hot rows: hits of the top tier.
        missing, under = (min(count / (asked.rate * accesses), 1.0) for count in (misses, below))
        ways, likely = _numbers_of_misses(accesses / batches, missing)
        missed = np.array(ways)
        rest = (accesses / batches - missed) * min(under / max(1 - missing, 1e-12), 1.0)
        a_miss = reads / max(misses, 1)
        parts.append(
            Work(
                batches * np.array(likely),
                np.full(missed.size, rows[inside].sum() / batches),
                rest,
                missed,
                missed * a_miss,
                missed * a_miss * num_bytes / max(reads, 1),
            )
        )
    return Work(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _class_of(distinct: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64[b]: half octaves of a batch's size."""
    return np.floor(2 * np.log2(np.maximum(distinct, 1))).astype(np.int64)


def _numbers_of_misses(size: float, share: float) -> tuple[list[float], list[float]]:
    """(numbers of misses, how likely each is) of a batch of `size` rows that each miss with this probability."""
    mean, rows = size * share, round(size)
    if mean > _MOST_MISSES or rows < 1 or share in (0, 1):
        return [mean], [1.0]
    most = min(rows, int(mean + 8 * mean**0.5 + 8))
    logs = [
        lgamma(rows + 1) - lgamma(k + 1) - lgamma(rows - k + 1) + k * log(share) + (rows - k) * log(1 - share)
        for k in range(most + 1)
    ]
    likely = [exp(each) for each in logs]
    total = sum(likely)
    # Sizes are means of a class, and no whole numbers: the mean stays what it was.
    stretch = mean / (sum(k * each for k, each in enumerate(likely)) / total)
    return [k * stretch for k in range(most + 1)], [each / total for each in likely]
