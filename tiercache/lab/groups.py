"""Misses by group of rows: of each table of a store, or of each order of n-grams, whose heads follow one another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache import index
from tiercache.lab.bounds import Uses
from tiercache.level import PLAN_MISSES, Level, new_plan, plan_batch, release
from tiercache.native import lean, prefetch


class Groups(NamedTuple):
    """Group g has the rows edges[g] : edges[g + 1]; names has one a group, edges int64[g + 1] ascends."""

    names: tuple[str, ...]
    edges: npt.NDArray[np.int64]

    def of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The group of each row, int64[n]. Rows beyond the edges are of the first or the last group."""
        return np.clip(np.searchsorted(self.edges, rows, side="right") - 1, 0, len(self.names) - 1)

    def sizes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many rows are of each group, int64[g]."""
        if len(self.names) == 1:
            return np.array([rows.size], np.int64)
        return np.bincount(self.of(rows), minlength=len(self.names))

    def accesses(self, uses: Uses) -> npt.NDArray[np.int64]:
        """Uses of each group's rows, int64[g]: distinct rows of each batch."""
        return np.bincount(self.of(uses.rows)[uses.number], minlength=len(self.names))


def everything(name: str) -> Groups:
    """All rows as one group."""
    return Groups((name,), np.array([0, 2**62], np.int64))


def by_table(names: Sequence[str], num_rows: Sequence[int]) -> Groups:
    """The tables of a store, in the order in which their rows follow one another."""
    return Groups(tuple(names), np.append(0, np.cumsum(num_rows)).astype(np.int64))


def replay_groups(
    level: Level, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], groups: Groups
) -> npt.NDArray[np.int64]:
    """`Level.replay`, and the distinct misses of each group, int64[g]."""
    longest = int(np.diff(offsets).max(initial=0))
    level.make_room(longest)
    missed = np.zeros(len(groups.names), np.int64)
    books = level.slots, level.table, level.seen, level.counters, level.state
    _replay(*books, rows, offsets, new_plan(longest), groups.edges, missed)
    return missed


@lean
def _replay(
    slots: Any,
    table: Any,
    seen: Any,
    counters: Any,
    state: Any,
    rows: Any,
    offsets: Any,
    plan: Any,
    edges: Any,
    missed: Any,
) -> None:
    """Plan batch after batch of a trace, and count the misses of each group. plan: room for the longest batch."""
    for b in range(offsets.size - 1):
        batch = rows[offsets[b] : offsets[b + 1]]
        if batch.size <= 4 and offsets[b + 1] + 16 < rows.size:
            for i in range(offsets[b], offsets[b + 1]):
                prefetch(index.address(table, rows[i + 16]))
        plan.counts[PLAN_MISSES] = 0
        plan_batch(slots, table, seen, counters, state, batch, plan, 0, True)
        for i in range(plan.counts[PLAN_MISSES]):
            row, group = plan.all_misses[i], 0
            while group + 1 < missed.size and row >= edges[group + 1]:
                group += 1
            missed[group] += 1
        release(slots, counters, plan)
