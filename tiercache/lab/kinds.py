"""Misses by kind of rows: of each table of a store, or of each order of n-grams, whose heads follow one another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache import index
from tiercache.lab.bounds import Uses
from tiercache.level import PLAN_MISSES, Level, new_plan, plan_batch, release
from tiercache.native import lean, prefetch


class Kinds(NamedTuple):
    """Kind k has the rows edges[k] : edges[k + 1]; names has one a kind, edges int64[k + 1] ascends."""

    names: tuple[str, ...]
    edges: npt.NDArray[np.int64]

    def of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The kind of each row, int64[n]. Rows beyond the edges are of the first or the last kind."""
        return np.clip(np.searchsorted(self.edges, rows, side="right") - 1, 0, len(self.names) - 1)

    def sizes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many rows are of each kind, int64[k]."""
        if len(self.names) == 1:
            return np.array([rows.size], np.int64)
        return np.bincount(self.of(rows), minlength=len(self.names))

    def accesses(self, uses: Uses) -> npt.NDArray[np.int64]:
        """Uses of each kind's rows, int64[k]: distinct rows of each batch."""
        return np.bincount(self.of(uses.rows)[uses.number], minlength=len(self.names))


def everything(name: str) -> Kinds:
    """All rows as one kind."""
    return Kinds((name,), np.array([0, 2**62], np.int64))


def by_table(names: Sequence[str], num_rows: Sequence[int]) -> Kinds:
    """The tables of a store, in the order in which their rows follow one another."""
    return Kinds(tuple(names), np.append(0, np.cumsum(num_rows)).astype(np.int64))


def replay_kinds(
    level: Level, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], kinds: Kinds
) -> npt.NDArray[np.int64]:
    """`Level.replay`, and the distinct misses of each kind, int64[k]."""
    longest = int(np.diff(offsets).max(initial=0))
    level.make_room(longest)
    missed = np.zeros(len(kinds.names), np.int64)
    books = level.slots, level.table, level.seen, level.counters, level.state
    _replay(*books, rows, offsets, new_plan(longest), kinds.edges, missed)
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
    """Plan batch after batch of a trace, and count the misses of each kind. plan: room for the longest batch."""
    for b in range(offsets.size - 1):
        batch = rows[offsets[b] : offsets[b + 1]]
        if batch.size <= 4 and offsets[b + 1] + 16 < rows.size:
            for i in range(offsets[b], offsets[b + 1]):
                prefetch(index.address(table, rows[i + 16]))
        plan.counts[PLAN_MISSES] = 0
        plan_batch(slots, table, seen, counters, state, batch, plan, 0, True)
        for i in range(plan.counts[PLAN_MISSES]):
            row, kind = plan.all_misses[i], 0
            while kind + 1 < missed.size and row >= edges[kind + 1]:
                kind += 1
            missed[kind] += 1
        release(slots, counters, plan)
