"""The look-ahead of a level: rows that callers announce, rows that are asked for, and what its slots know of both.

A slot's `due` is when its row is used next, so that a policy that looks for a victim reads nothing else: whatever changes the
next use of a row that is resident writes it.
"""

from typing import Any

from tiercache import index
from tiercache.native import int64, lean, prefetch
from tiercache.policies import expected as e
from tiercache.policies.foresight import now_of

_NEAR = 16
"""Rows between asking for what leads to a row, and using it."""


@lean
def announce_batch(slots: Any, table: Any, state: Any, rows: Any, lane: int) -> int:
    """Announce rows (int64[n]) behind the others of a lane; how many there was room for. Gives up some of what is overdue."""
    now = now_of(state)
    keys = slots["key"]
    before = state.expected.book[e.LEFT]
    e.begin_measuring(state.expected, now)
    for i in range(rows.size):
        if i + _NEAR < rows.size:
            e.ask_for(state.expected, rows[i + _NEAR])
            prefetch(index.address(table, rows[i + _NEAR]))
        due = e.announce(state.expected, lane, rows[i], now)
        if due != e.NO_DUE:
            _note(keys, table, state, rows[i], due)
    kept = state.expected.book[e.LEFT] - before
    _tidy(keys, table, state, now, rows.size)
    return kept


@lean
def ask_batch(slots: Any, table: Any, state: Any, rows: Any) -> None:
    """Rows (int64[n]) are asked for: the next use of each position's row is over."""
    now = now_of(state)
    keys = slots["key"]
    for i in range(rows.size):
        if i + _NEAR < rows.size:
            e.ask_for(state.expected, rows[i + _NEAR])
            prefetch(index.address(table, rows[i + _NEAR]))
        due = e.meet(state.expected, rows[i], now)
        if due != e.NONE:
            _note(keys, table, state, rows[i], due)
    e.count_asked(state.expected, rows.size, now)
    _tidy(keys, table, state, now, rows.size)


@lean
def cancel_lane(slots: Any, table: Any, state: Any, lane: int) -> None:
    """Nothing of a lane is expected any more."""
    row = int64(e.NO_ROW)
    while row != e.DONE:
        row = e.give_up(state.expected, lane)
        if row >= 0:
            _note(slots["key"], table, state, row, e.first_due(state.expected, row))


@lean
def _tidy(keys: Any, table: Any, state: Any, now: int, num_rows: int) -> None:
    """Look at as many lanes and uses as rows were announced or asked for, and give up what is overdue."""
    for _ in range(num_rows + 1):
        row = e.next_overdue(state.expected, now, keys.size)
        if row >= 0:
            _note(keys, table, state, row, e.first_due(state.expected, row))


@lean
def _note(keys: Any, table: Any, state: Any, row: int, due: int) -> None:
    """Write when a row is used next to its slot, if it has one."""
    slot = index.find(table, keys, row)
    if slot >= 0:
        state.due[slot] = due
