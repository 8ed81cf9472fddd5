"""Traces whose rows are announced before they are asked for, replayed through a level that looks ahead."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.ahead import announce_batch, ask_batch
from tiercache.lab.trace import Trace
from tiercache.level import Level, Plan, new_plan, plan_batch, release
from tiercache.native import lean
from tiercache.policies.expected import MAX_LANES


class Announced(NamedTuple):
    """Before batch b, rows[offsets[b] : offsets[b + 1]] are announced. rows, lanes int64[m], offsets int64[b + 1]."""

    rows: npt.NDArray[np.int64]
    lanes: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]


def windows(trace: Trace, sequences: npt.NDArray[np.int64], heads: int, tokens: int) -> Announced:
    """A look-ahead: before a token is asked for, it and the tokens behind it in its sequence are known, `tokens` of them.

    A trace in the order of tokens, `heads` rows each. sequences: int64[T], of each token; its tokens come in order. Of a
    sequence that has not begun nothing is known.
    """
    num_tokens = sequences.size
    by_sequence = np.argsort(sequences, kind="stable")
    first = np.diff(sequences[by_sequence], prepend=-1) != 0
    begin = np.maximum.accumulate(np.where(first, np.arange(num_tokens), 0))
    teller = np.empty(num_tokens, np.int64)
    teller[by_sequence] = by_sequence[np.maximum(np.arange(num_tokens) - tokens + 1, begin)]
    order = np.argsort(teller, kind="stable")
    told = trace.rows.reshape(num_tokens, -1)[order].reshape(-1)
    lanes = np.repeat(sequences[order] % MAX_LANES, heads)
    batch_of = np.searchsorted(trace.offsets, np.arange(num_tokens) * heads, side="right") - 1
    counts = np.bincount(batch_of[teller], minlength=trace.num_batches) * heads
    return Announced(told, lanes, np.append(0, np.cumsum(counts)))


def replay_ahead(level: Level, trace: Trace, announced: Announced) -> npt.NDArray[np.int64]:
    """Plan the batches one after the other, each behind its announcements; their distinct hits, int64[b]."""
    longest = int(np.diff(trace.offsets).max(initial=0))
    level.make_room(longest)
    level.look_ahead()
    hits = np.empty(trace.num_batches, np.int64)
    _replay(
        level.slots, level.table, level.seen, level.counters, level.state, *trace, *announced, hits, new_plan(longest)
    )
    return hits


@lean
def _replay(
    slots: Any, table: Any, seen: Any, counters: Any, state: Any, rows: Any, offsets: Any, told: Any, lanes: Any, until: Any,
    batch_hits: Any, plan: Plan,
) -> None:  # fmt: skip
    for b in range(offsets.size - 1):
        begin = until[b]
        while begin < until[b + 1]:
            end = begin + 1
            while end < until[b + 1] and lanes[end] == lanes[begin]:
                end += 1
            announce_batch(slots, table, state, told[begin:end], lanes[begin])
            begin = end
        batch = rows[offsets[b] : offsets[b + 1]]
        ask_batch(slots, table, state, batch)
        plan_batch(slots, table, seen, counters, state, batch, plan, 0, True)
        batch_hits[b] = plan.counts[0]
        release(slots, counters, plan)
